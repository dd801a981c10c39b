"""Memory and speed from a trained model to a file: peak over the size of its float32 weights, and their GB a second.

    python benchmarks/export.py --params 1b --threads 1 llama_cpp transformers

The arguments are names of configs/target, whose grids are put on a random Llama. Every step has a process of its own:
`freeze` decides the codes and writes RUN/frozen, `export` writes the target's folder from that, `verify` reads it back
and compares. GB/s is over `freeze` and `export`. Peak: the largest resident size of the step less what Python and its
libraries took before it. The limit that a step may reach is the float size and one layer, here the largest matrix.
"""

import argparse
import ctypes
import gc
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from machine import machine
from omegaconf import OmegaConf

from qat.recipes import CONFIGS

# hidden, intermediate, layers, heads, heads of keys and values; vocabulary 32000, head and embedding apart
SHAPES = {
    "0.03b": (256, 1024, 8, 4, 2),
    "0.3b": (1024, 4096, 14, 16, 8),
    "1b": (2048, 7168, 17, 16, 8),
}
VOCABULARY = 32000
STEPS = ("freeze", "export", "verify")
DEFAULT = ("llama_cpp", "transformers", "onnxruntime_int4", "torchao_int4", "gptq_int4", "awq_int4", "mlx")


def model(params: str) -> Any:
    """A Llama with random weights, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, groups = SHAPES[params]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def scheme(target: str) -> tuple[str, Any]:
    """(exporter, scheme) of a YAML of configs/target; the first exporter where there are more."""
    composed: Any = OmegaConf.load(CONFIGS / "target" / f"{target}.yaml")
    name = next(d["override /scheme"] for d in composed.defaults if "override /scheme" in d)
    return composed.export[0], instantiate(OmegaConf.load(CONFIGS / "scheme" / f"{name}.yaml"), _convert_="all")


def resident() -> int:
    """Bytes of this process that are in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measured(work: Callable[[], object]) -> tuple[int, float, float]:
    """(the largest resident size in bytes, seconds by the clock, seconds of CPU)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not count as resident
    Path("/proc/self/clear_refs").write_text("5")  # nor its peak as a peak
    start, used = time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024, seconds, cpu


def step(name: str, target: str, params: str, folder: Path) -> dict[str, float]:
    """One step, in this process: peak bytes, seconds, CPU seconds; of `freeze` also the bytes of all floats and of the
    largest matrix."""
    import transformers.models.llama.modeling_llama  # noqa: F401  what every step has loaded before it begins

    import qat
    from qat.exporters import export, target_module
    from qat.frozen import Frozen
    from qat.models.load import load
    from qat.shipping import tokenizer_files
    from qat.verification import verify

    exporter, chosen = scheme(target)
    target_module(exporter)
    before = resident()
    sums: dict[str, float] = {}
    if name == "freeze":
        net: Any = qat.prepare(model(params), chosen["rules"])
        sizes = [p.numel() * 4 for p in net.parameters()]
        config = {**net.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
        files = tokenizer_files(load(None, name="gpt2_mini").tokenizer)
        found = measured(lambda: qat.convert(net, config=config, tokenizer=files, path=folder / "frozen"))
        sums = {"float": sum(sizes), "layer": max(sizes)}
    elif name == "export":
        found = measured(lambda: export(Frozen.load(folder / "frozen"), exporter, folder / "out"))
    else:
        found = measured(lambda: verify(folder / "out", against=folder / "frozen", runtime=False).raise_if_different())
    return sums | {"peak": found[0] - before, "seconds": found[1], "cpu": found[2]}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("targets", nargs="*", default=DEFAULT, help="names of configs/target")
    p.add_argument("--params", choices=SHAPES, default="0.3b")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    p.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    if args.step:
        print("measured", json.dumps(step(args.step, args.targets[0], args.params, args.folder)))
        return
    print(f"random Llama, {args.params} ({machine(args.threads)})")
    steps = "".join(f"{f'{s}: peak':>14} {'s':>5} {'cpu s':>5}" for s in STEPS)
    print(f"{'target':30}{steps}{'limit':>7} {'GB/s':>6} {'GB/cpu s':>9}")
    for target in args.targets:
        folder = Path(tempfile.mkdtemp(prefix="qat-export-"))
        found: list[dict[str, float]] = []
        try:
            for name in STEPS:
                options = [f"--step={name}", f"--params={args.params}", f"--threads={args.threads}"]
                command = [sys.executable, __file__, target, *options, f"--folder={folder}"]
                run = subprocess.run(command, capture_output=True, text=True, check=False)
                lines = [x for x in run.stdout.splitlines() if x.startswith("measured ")]
                if run.returncode or not lines:
                    said = (run.stderr.strip().splitlines() or ["no output"])[-1]
                    print(f"{target:30} {name} cannot run: {said[:120]}", flush=True)
                    break
                found.append(json.loads(lines[-1].removeprefix("measured ")))
        finally:
            shutil.rmtree(folder)
        if len(found) < len(STEPS):
            continue
        size = found[0]["float"]
        cells = "".join(f"{f['peak'] / size:14.3f} {f['seconds']:5.1f} {f['cpu']:5.1f}" for f in found)
        limit = 1 + found[0]["layer"] / size
        wall, cpu = (size / 1e9 / (found[0][k] + found[1][k]) for k in ("seconds", "cpu"))
        name = f"{scheme(target)[0]}, {target}"
        print(f"{name:30}{cells}{limit:7.3f} {wall:6.2f} {cpu:9.2f}", flush=True)


if __name__ == "__main__":
    main()
