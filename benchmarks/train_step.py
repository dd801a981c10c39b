"""Time of a training step with fake-quantization, divided by that of the float model.

    python benchmarks/train_step.py --model llama_40m --batch 1 --tokens 128
    python benchmarks/train_step.py --model gpt2_mini --batch 8 --tokens 128

All methods live in one process and take turns, so that a busy machine slows each of them alike; the ratio is the
median of the ratios of neighbouring steps. Process-CPU time is shown beside the wall clock: it does not see other
processes, except through caches and memory bandwidth.
"""

import statistics
import time

import torch
from machine import machine
from subjects import METHODS, MODELS, arguments, train_step


def main() -> None:
    p = arguments(__doc__)
    p.add_argument("--rounds", type=int, default=15)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    steps = {}
    for name in dict.fromkeys(["plain", *args.methods]):
        torch.manual_seed(0)
        try:
            model = METHODS[name](MODELS[args.model]()).train()
            steps[name] = train_step(model, args.batch, args.tokens, 2048)
            for _ in range(2):
                steps[name]()
        except Exception as e:  # a rival that cannot run here is reported, not hidden
            steps.pop(name, None)
            print(f"{name}: cannot run: {type(e).__name__}: {str(e).splitlines()[0][:100]}")
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            a, b = time.perf_counter(), time.process_time()
            step()
            wall[name].append(time.perf_counter() - a)
            cpu[name].append(time.process_time() - b)
    print(f"{args.model}, {args.batch} x {args.tokens} tokens, int4 block 32 ({machine(args.threads)})")
    print(f"{'':10} {'ms':>8} {'/ plain':>8} {'cpu ms':>8} {'/ plain':>8}")
    for name in steps:
        row = []
        for times in (wall, cpu):
            ratios = [t / base for t, base in zip(times[name], times["plain"], strict=True)]
            row += [statistics.median(times[name]) * 1e3, statistics.median(ratios)]
        print(f"{name:10} {row[0]:8.1f} {row[1]:8.2f} {row[2]:8.1f} {row[3]:8.2f}")


if __name__ == "__main__":
    main()
