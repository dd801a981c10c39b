"""The line that says on which machine a table was measured."""

import pytest
from machine import machine, processor

INFO = "model name\t: One CPU\nflags\t\t: fpu avx2{}\n\nmodel name\t: Another\nflags\t: fpu\n"


@pytest.mark.parametrize(
    ("flag", "said"),
    [("", "One CPU (AVX2)"), (" avx512_vnni", "One CPU (AVX2, VNNI)"), (" avx_vnni", "One CPU (AVX2, VNNI)")],
)
def test_name_and_instructions_are_the_first_processors(flag: str, said: str) -> None:
    assert processor(INFO.format(flag), "AVX2") == said


def test_without_cpuinfo_the_capability_is_still_there() -> None:
    assert processor("", "DEFAULT").endswith(" (DEFAULT)")


def test_one_thread_is_singular() -> None:
    assert ", 1 thread, " in machine(1) + ", "
    assert ", 2 threads" in machine(2)
    assert "thread" not in machine()
