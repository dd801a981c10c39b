"""One line for the head of a table: date, torch, processor and its instructions, threads, load."""

import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

VNNI = {"avx512_vnni", "avx_vnni"}  # flags of /proc/cpuinfo; with either, runtimes take other integer kernels


def machine(threads: int | None = None) -> str:
    """Of this machine, now. threads: how many measured."""
    info, load = Path("/proc/cpuinfo"), Path("/proc/loadavg")
    cpu = processor(info.read_text() if info.exists() else "", torch.backends.cpu.get_cpu_capability())
    parts = [str(date.today()), f"torch {version('torch')}", cpu]
    if threads:
        parts.append("1 thread" if threads == 1 else f"{threads} threads")
    if load.exists():
        parts.append(f"load {load.read_text().split()[0]}")
    return ", ".join(parts)


def processor(info: str, capability: str) -> str:
    """Name and instruction set, such as "AMD EPYC (AVX512, VNNI)". info: the text of /proc/cpuinfo, or ""; capability:
    the vector instructions that torch uses."""
    lines = [(key.strip(), value.strip()) for key, _, value in (x.partition(":") for x in info.splitlines())]
    found = dict(reversed(lines))  # the first processor's
    name = found.get("model name", platform.processor() or platform.machine())
    vnni = ", VNNI" if VNNI & set(found.get("flags", "").split()) else ""
    return f"{name} ({capability}{vnni})"
