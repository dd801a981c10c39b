"""One line for the head of a table: date, torch, processor and its instructions, threads, load."""

import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

INFO = Path("/proc/cpuinfo")
VNNI = {"avx512_vnni", "avx_vnni"}  # its flags; with either, runtimes take other integer kernels


def machine(threads: int | None = None) -> str:
    """Of this machine, now. threads: how many measured."""
    load = Path("/proc/loadavg")
    parts = [str(date.today()), f"torch {version('torch')}", processor(info(), torch.backends.cpu.get_cpu_capability())]
    if threads:
        parts.append("1 thread" if threads == 1 else f"{threads} threads")
    if load.exists():
        parts.append(f"load {load.read_text().split()[0]}")
    return ", ".join(parts)


def info() -> str:
    """The text of /proc/cpuinfo, or ""."""
    return INFO.read_text() if INFO.exists() else ""


def first(info: str) -> dict[str, str]:
    """What that text says of the first processor."""
    lines = [(key.strip(), value.strip()) for key, _, value in (x.partition(":") for x in info.splitlines())]
    return dict(reversed(lines))


def has_vnni(info: str) -> bool:
    """Whether four products of bytes are added in 32 bits by one instruction."""
    return bool(VNNI & set(first(info).get("flags", "").split()))


def instructions(info: str, capability: str) -> str:
    """The instruction set, such as "AVX512, VNNI". capability: the vectors that torch uses."""
    return f"{capability}, VNNI" if has_vnni(info) else capability


def processor(info: str, capability: str) -> str:
    """Name and instruction set, such as "AMD EPYC (AVX512, VNNI)"."""
    name = first(info).get("model name", platform.processor() or platform.machine())
    return f"{name} ({instructions(info, capability)})"
