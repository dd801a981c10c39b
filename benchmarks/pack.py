"""Speed of deciding int4 codes and packing them: gigabytes of fp32 weights a second, ours beside others'.

    python benchmarks/pack.py --threads 1

Everything from the float weight to packed bytes and scales, block 32, interleaved; medians.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from machine import machine
from subjects import INT4

from qat.affine import choose_qparams, quantize
from qat.packing import pack


def ours(w: torch.Tensor) -> object:
    q = quantize(w, choose_qparams(w, INT4), INT4)
    return pack(q.codes, 4, q.spec.type.qmin), q.scale


def compressed_tensors() -> Callable[[torch.Tensor], object]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
    from compressed_tensors.quantization.lifecycle.forward import quantize as theirs
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=4, symmetric=True, strategy=QuantizationStrategy.GROUP, group_size=32)

    def run(w: torch.Tensor) -> object:
        t = w.view(w.shape[0], -1, 32)
        scale, zero = calculate_qparams(t.amin(-1), t.amax(-1), args)
        return pack_to_int32(theirs(w, scale, zero, args, dtype=torch.int8), 4), scale

    return run


def gguf() -> Callable[[torch.Tensor], object]:
    from gguf import GGMLQuantizationType, quants

    return lambda w: quants.quantize(w.numpy(), GGMLQuantizationType.Q4_0)


def torchao() -> Callable[[torch.Tensor], object]:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    def run(w: torch.Tensor) -> object:
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(w)
        quantize_(
            layer,
            IntxWeightOnlyConfig(
                weight_dtype=torch.int4,  # pyright: ignore[reportAttributeAccessIssue]
                granularity=PerGroup(32),
            ),
        )
        return layer

    return run


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", type=int, default=4096)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    w = torch.randn(args.size, args.size) * 0.02
    methods: dict[str, Callable[[torch.Tensor], object]] = {"ours": ours}
    for name, make in (("compressed-tensors", compressed_tensors), ("gguf-py", gguf), ("torchao (unpacked)", torchao)):
        try:
            methods[name] = make()
            methods[name](w)
        except Exception as e:  # a rival that cannot run here is reported, not hidden
            methods.pop(name, None)
            print(f"{name}: cannot run: {type(e).__name__}: {str(e).splitlines()[0][:100]}")
    ours(w)
    wall: dict[str, list[float]] = {n: [] for n in methods}
    cpu: dict[str, list[float]] = {n: [] for n in methods}
    for _ in range(args.rounds):
        for name, run in methods.items():
            a, b = time.perf_counter(), time.process_time()
            run(w)
            wall[name].append(time.perf_counter() - a)
            cpu[name].append(time.process_time() - b)
    print(f"{args.size} x {args.size} to int4 block 32 ({machine(args.threads)})")
    print(f"{'':20} {'GB/s':>8} {'GB per cpu s':>14}")
    for name in methods:
        rates = (w.nbytes / statistics.median(t[name]) / 1e9 for t in (wall, cpu))
        print("{:20} {:8.2f} {:14.2f}".format(name, *rates))


if __name__ == "__main__":
    main()
