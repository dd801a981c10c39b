"""What `import qat` adds to `import torch`, how long `qat --help` takes, and how soon a run without a hub is refused.

    python benchmarks/imports.py

Each in fresh processes that take turns; the least of several, since a process start has no other noise than delay.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

from machine import machine

NO_HUB = ["recipe=llama_int4", "model.offline=error", "data.offline=error"]

COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "import torch, qat": [sys.executable, "-c", "import torch, qat; qat.QuantSpec, qat.prepare, qat.Frozen"],
    "qat --help": [sys.executable, "-m", "qat", "--help"],
    "qat train, no hub": [sys.executable, "-m", "qat", "train", *NO_HUB],  # nothing listens on the port below
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": cache}
        for _ in range(args.rounds):
            for name, command in COMMANDS.items():
                start = time.perf_counter()
                done = subprocess.run(command, env=env, check=False, capture_output=True)
                times[name].append(time.perf_counter() - start)
                assert done.returncode == (2 if "no hub" in name else 0), done.stderr.decode()
    print(f"{machine()}")
    for name, values in times.items():
        print(f"{name:20} {min(values):6.2f} s")
    print(f"{'qat adds':20} {min(times['import torch, qat']) - min(times['import torch']):6.2f} s")


if __name__ == "__main__":
    main()
