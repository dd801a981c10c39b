"""One line for the head of a table: date, torch, processor, threads, load."""

import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path


def machine(threads: int | None = None) -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    load = Path("/proc/loadavg")
    parts = [str(date.today()), f"torch {version('torch')}", cpu]
    if threads:
        parts.append(f"{threads} threads")
    if load.exists():
        parts.append(f"load {load.read_text().split()[0]}")
    return ", ".join(parts)
