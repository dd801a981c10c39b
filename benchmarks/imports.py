"""What `import qat` adds to `import torch`, and how long `qat --help` takes.

    python benchmarks/imports.py

Each in fresh processes that take turns; the least of several, since a process start has no other noise than delay.
"""

import argparse
import subprocess
import sys
import time

from machine import machine

COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "import torch, qat": [sys.executable, "-c", "import torch, qat; qat.QuantSpec, qat.prepare, qat.Frozen"],
    "qat --help": [sys.executable, "-m", "qat", "--help"],
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.rounds):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times[name].append(time.perf_counter() - start)
    print(f"{machine()}")
    for name, values in times.items():
        print(f"{name:20} {min(values):6.2f} s")
    print(f"{'qat adds':20} {min(times['import torch, qat']) - min(times['import torch']):6.2f} s")


if __name__ == "__main__":
    main()
