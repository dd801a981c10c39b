"""Which arms benchmarks/contrast.py has, what it records of each, and that its settings are what was measured."""

import json
from pathlib import Path
from typing import Any

import contrast
import pytest

from qat.errors import UserError

FOUR_BITS = [
    ("llama.cpp Q4_0", "its grid and its activations"),
    ("llama.cpp Q4_0", "the same, its float master weights re-derived"),
    ("llama.cpp Q4_0", "its grid, float activations"),
    ("llama.cpp Q4_0", "no grid: float fine-tuning, re-derived"),
    ("llama.cpp Q4_0", "another int4 grid (max/7.5, float32 scales), re-derived"),
    ("transformers", "max/7.5, float32 scales kept"),
    ("transformers", "the same, scales rounded to bfloat16"),
]
TWO_BITS = [
    ("llama.cpp TQ2_0", "its grid and its activations"),
    ("llama.cpp TQ2_0", "the same, its float master weights re-derived"),
    ("llama.cpp TQ2_0", "another 2-bit grid (int2 in groups of 32), re-derived"),
]
REST = [("llama.cpp TQ2_0", arm) for arm in ("its grid, float activations", "no grid: float fine-tuning, re-derived")]


def bench(tmp_path: Path, *argv: str) -> contrast.Bench:
    args = contrast.arguments().parse_args(
        ["--steps", "1", "--batch", "1", "--windows", "2", "--record", str(tmp_path / "record"), *argv]
    )
    return contrast.Bench(args, 0, "how")


@pytest.mark.parametrize(
    ("arms", "want"),
    [
        ("q4_0", FOUR_BITS),
        ("ternary", TWO_BITS),
        ("all", [("torch", "float, not fine-tuned"), *TWO_BITS, *REST, *FOUR_BITS]),
    ],
)
def test_arms(arms: str, want: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without training or runtimes: what is trained under which scheme, and recorded as what."""
    b = bench(tmp_path)
    trained: list[Any] = []

    def prepared(_: contrast.Bench, scheme: Any, *how: Any) -> Any:
        trained.append(scheme)
        net = contrast.copy.deepcopy(b.loaded.model)
        return net if scheme is None else contrast.qat.prepare(net, scheme["rules"]).eval()

    monkeypatch.setattr(contrast.Bench, "train", prepared)
    monkeypatch.setattr(contrast.Bench, "in_torch", lambda *_: 3.0)
    monkeypatch.setattr(contrast.Bench, "in_runtime", lambda *_: [3.0, 3.5])
    contrast.ARMS[arms](b)
    lines = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
    assert [(r["runtime"], r["arm"]) for r in lines] == want
    assert {(r["said"], r["settings"]) for r in lines} == {("how", "1 steps of 1 × 256 tokens, 2 windows")}
    assert sum(scheme is None for scheme in trained) == (arms != "ternary")  # the float arm is trained once


def test_more_windows_than_there_are_is_an_error_with_the_number(tmp_path: Path) -> None:
    assert len(bench(tmp_path, "--windows", "200").batch["input_ids"]) == 200
    with pytest.raises(UserError, match="has 232 windows, not 233; give --windows 232"):
        bench(tmp_path, "--windows", "233")


def test_the_command_says_what_is_not_usual_and_no_path() -> None:
    def said(*argv: str) -> str:
        return contrast.command(contrast.arguments().parse_args(argv))

    assert said() == "python benchmarks/contrast.py"
    long = ["--arms", "q4_0", "--seeds", "8", "--first", "0", "--windows", "200", "--print", "--record", "x.jsonl"]
    assert said(*long) == "python benchmarks/contrast.py --arms q4_0 --seeds 8 --windows 200"
