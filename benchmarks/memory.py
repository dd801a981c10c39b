"""Memory that training grows by, divided by that of the float model: each method in a process of its own.

    python benchmarks/memory.py --tokens 128

Growth = peak resident size over a few steps of AdamW, minus the resident size before the first.
"""

import argparse
import ctypes
import gc
import resource
import subprocess
import sys
from pathlib import Path

import torch
from machine import machine
from subjects import METHODS, MODELS, arguments, train_step


def resident() -> int:
    """Bytes of this process that are in memory now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(method: str, model: str, batch: int, tokens: int, steps: int) -> int:
    """Growth in bytes."""
    torch.manual_seed(0)
    prepared = METHODS[method](MODELS[model]()).train()
    step = train_step(prepared, batch, tokens, 2048)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what construction freed must not count as resident
    Path("/proc/self/clear_refs").write_text("5")  # nor its peak as a peak
    before = resident()
    for _ in range(steps):
        step()
    peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before


def main() -> None:
    p = arguments(__doc__)
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        print("growth", measure(args.only, args.model, args.batch, args.tokens, args.steps))
        return
    print(f"{args.model}, {args.batch} x {args.tokens} tokens, int4 block 32 ({machine(args.threads)})")
    print(f"{'':10} {'growth MB':>10} {'/ plain':>8}")
    base = 0
    for name in dict.fromkeys(["plain", *args.methods]):
        options = [f"--{k}={getattr(args, k)}" for k in ("model", "batch", "tokens", "threads", "steps")]
        run = subprocess.run([sys.executable, __file__, "--only", name, *options], capture_output=True, text=True)
        lines = [x for x in run.stdout.splitlines() if x.startswith("growth ")]
        if run.returncode or not lines:
            print(f"{name:10} cannot run: {(run.stderr.strip().splitlines() or ['no output'])[-1][:100]}")
            continue
        growth = int(lines[-1].split()[1])
        base = base or growth
        print(f"{name:10} {growth / 1e6:10.0f} {growth / base:8.2f}")


if __name__ == "__main__":
    main()
