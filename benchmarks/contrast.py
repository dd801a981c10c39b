"""What the right grid is worth: the same model trained on the runtime's grid and on others, scored in the runtime.

    python benchmarks/contrast.py            # to docs/contrast.md
    python benchmarks/contrast.py --steps 5 --windows 2   # a look, printed only

The embedded model is fine-tuned for the same steps on the same batches in each arm, written to GGUF and scored by
llama.cpp itself on windows of 256 tokens of the embedded evaluation text. "Re-derived" means that the trained weights
are handed over in floating point and quantized again by ggml's own rule (gguf-py's, byte for byte llama.cpp's), as
every tool does that exports a float checkpoint.
"""

import argparse
import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gguf import quants
from hydra.utils import instantiate
from machine import machine
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

import qat
from qat import evaluation, runtimes
from qat.affine import QTensor
from qat.conversion import WeightQuantizer
from qat.data.stdlib import StdlibData
from qat.exporters import export, target_module
from qat.exporters.gguf_blocks import TYPES
from qat.frozen import Frozen
from qat.models.load import load
from qat.quantizers.lsq import LSQ
from qat.quantizers.minmax import MinMax
from qat.recipes import CONFIGS
from qat.scheme import QuantSpec
from qat.shipping import tokenizer_files


class Bench:
    """The model, its data, and the figures so far."""

    def __init__(self, steps: int, windows: int) -> None:
        self.loaded = load(None, name="gpt2_mini")
        self.data = StdlibData(block_size=256, batch_size=8)
        self.data.attach(self.loaded.tokenizer)
        self.batch = self.data.evaluation("test", windows)
        self.steps = steps
        self.rows: list[str] = []

    def config(self) -> dict[str, Any]:
        config = self.loaded.model.config.to_dict()
        return {**config, "architectures": [type(self.loaded.model).__name__], "name": "contrast"}

    def train(self, scheme: dict[str, Any] | None, quantizer: WeightQuantizer = MinMax, times: int = 1) -> Any:
        """A fresh copy of the model, fine-tuned for steps * times under `scheme` (None: in floating point)."""
        torch.manual_seed(0)
        net: Any = copy.deepcopy(self.loaded.model)
        if scheme is not None:
            extra = {k: v for k, v in scheme.items() if k != "rules"}
            qat.prepare(net, scheme["rules"], weight=quantizer, **extra)
        scales = [p for n, p in net.named_parameters() if n.endswith("_quantizer.scale")]
        others = [p for n, p in net.named_parameters() if not n.endswith("_quantizer.scale")]
        groups = [{"params": others}, {"params": scales, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4 * (3 if times > 1 else 1), weight_decay=0.1)
        steps = self.steps * times
        schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
        net.train()
        batches = iter(self.data.train_dataloader())
        for _ in range(steps):
            batch = next(batches)
            loss = net(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return net.eval()

    def frozen(self, net: Any) -> Frozen:
        return qat.convert(net, config=self.config(), tokenizer=tokenizer_files(self.loaded.tokenizer))

    def in_torch(self, net: Any) -> float:
        return evaluation.figures(evaluation.answer(net, self.batch, 8))["perplexity"]

    def in_runtime(self, frozen: Frozen, exporter: str = "gguf") -> float:
        with tempfile.TemporaryDirectory() as folder:
            path = export(frozen, exporter, Path(folder, exporter))
            got = runtimes.run(target_module(exporter).RUNTIME, path, score=self.batch["input_ids"])["score"]
        return evaluation.figures({"nll": -got, "labels": self.batch["labels"]})["perplexity"]

    def row(self, runtime: str, arm: str, trained: float, run: float, best: float | None) -> None:
        worse = "" if best is None else f"{math.log(run / best):+.4f}"
        self.rows.append(f"| {runtime} | {arm} | {trained:.3f} | {run:.3f} | {worse} |")
        print(self.rows[-1], flush=True)


def scheme(name: str) -> dict[str, Any]:
    return instantiate(OmegaConf.load(CONFIGS / "scheme" / f"{name}.yaml"), _convert_="all")


def with_linears(name: str, change: Callable[[QuantSpec], QuantSpec]) -> dict[str, Any]:
    """A scheme whose last rule, that of the linears, has another weight grid and float inputs."""
    found = scheme(name)
    last = found["rules"][-1]
    found["rules"][-1] = replace(last, scheme=replace(last.scheme, weight=change(last.scheme.weight), input=None))
    return found


def rederived(frozen: Frozen, values: dict[str, Tensor], linear: str) -> Frozen:
    """`frozen` with codes and scales that ggml's own quantizer gives `values` (by parameter name, as the float layer
    stores them): linears on its type `linear`, the embedding on Q8_0."""
    types = {t.ggml.name: t for t in TYPES}
    weights = {}
    for name, w in frozen.weights.items():
        held = types["Q8_0" if "wte" in name else linear]
        matrix = values[name].t().contiguous() if w.kind == "Conv1D" else values[name]
        codes, scale, offset = held.unpack(quants.quantize(matrix.detach().numpy(), held.ggml))
        weights[name] = replace(w, tensor=QTensor(codes, scale, offset, held.spec))
    return replace(frozen, weights=weights, inputs={})


def bfloat16_scales(frozen: Frozen) -> Frozen:
    """The same codes with scales rounded to bfloat16, as runtimes do that store them so."""
    weights = {}
    for name, w in frozen.weights.items():
        spec = replace(w.tensor.spec, scale="bfloat16")
        weights[name] = replace(w, tensor=replace(w.tensor, scale=w.tensor.scale.bfloat16(), spec=spec))
    return replace(frozen, weights=weights)


def q4_0(b: Bench) -> None:
    """llama.cpp's Q4_0: trained with its activations; and five other ways to get there."""
    net = b.train(scheme("llama_q4_0"))
    right = b.frozen(net)
    best = b.in_runtime(right)
    b.row("llama.cpp Q4_0", "its grid and its activations (`target=llama_cpp`)", b.in_torch(net), best, None)
    masters = {n: p.detach() for n, p in net.named_parameters()}
    again = b.in_runtime(rederived(right, masters, "Q4_0"))
    b.row("llama.cpp Q4_0", "the same, its float master weights re-derived", b.in_torch(net), again, best)
    net = b.train(scheme("int4_g32"))
    b.row("llama.cpp Q4_0", "its grid, float activations", b.in_torch(net), b.in_runtime(b.frozen(net)), best)
    net = b.train(with_linears("llama_q4_0", lambda s: replace(s, range="absmax_half", scale="float32")))
    other = b.frozen(net)
    values = {n: w.dequantize() for n, w in other.weights.items()}
    again = b.in_runtime(rederived(other, values, "Q4_0"))
    b.row("llama.cpp Q4_0", "another int4 grid (max/7.5, float32 scales), re-derived", b.in_torch(net), again, best)
    trained, exact = b.in_torch(net), b.in_runtime(replace(other, inputs={}), "hf")
    b.row("transformers", "max/7.5, float32 scales kept", trained, exact, None)
    rounded = b.in_runtime(bfloat16_scales(replace(other, inputs={})), "hf")
    b.row("transformers", "max/7.5, scales rounded to bfloat16 on export", trained, rounded, exact)
    net = b.train(None)
    masters = {n: p.detach() for n, p in net.named_parameters()}
    again = b.in_runtime(rederived(right, masters, "Q4_0"))
    b.row("llama.cpp Q4_0", "no grid: float fine-tuning, re-derived", b.in_torch(net), again, best)
    again = b.in_runtime(rederived(right, masters, "TQ2_0"))
    b.row("llama.cpp TQ2_0", "no grid: float fine-tuning, re-derived", b.in_torch(net), again, None)


def tq2_0(b: Bench, times: int) -> None:
    """Ternary: learned scales on the runtime's grid; handed over as codes, and as float master weights."""
    net = b.train(scheme("llama_tq2_0"), LSQ, times)
    right = b.frozen(net)
    best = b.in_runtime(right)
    b.row("llama.cpp TQ2_0", "its grid and its activations, learned scales", b.in_torch(net), best, None)
    masters = {n: p.detach() for n, p in net.named_parameters()}
    again = b.in_runtime(rederived(right, masters, "TQ2_0"))
    b.row("llama.cpp TQ2_0", "the same, its float master weights re-derived", b.in_torch(net), again, best)
    net = b.train(with_linears("llama_tq2_0", lambda s: replace(s, qtype="int2", block=(1, 32))), LSQ, times)
    other = b.frozen(net)
    values = {n: w.dequantize() for n, w in other.weights.items()}
    again = b.in_runtime(rederived(other, values, "TQ2_0"))
    b.row("llama.cpp TQ2_0", "another 2-bit grid (int2 in groups of 32), re-derived", b.in_torch(net), again, best)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, help="of each arm (default 100, and docs/contrast.md is written)")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--ternary", type=int, default=2, help="times as many steps for ternary arms")
    args = parser.parse_args()
    b = Bench(args.steps or 100, args.windows)
    head = (
        "| runtime | trained on | in torch | in the runtime | worse than the right grid, nats |\n|---|---|---|---|---|"
    )
    print(head, flush=True)
    b.row("torch", "float, not fine-tuned", b.in_torch(b.loaded.model), b.in_torch(b.loaded.model), None)
    q4_0(b)
    tq2_0(b, args.ternary)
    if args.steps is None:
        about = " ".join((__doc__ or "").split("\n\n")[2].split())
        setting = (
            f"{b.steps} steps of 8 × 256 tokens ({args.ternary} times as many for ternary), {args.windows} windows"
        )
        run = f"`python benchmarks/contrast.py`, {setting}, {machine(torch.get_num_threads())}."
        text = f"# What the right grid is worth\n{about}\n\n{run}"
        table = "\n".join([head, *b.rows])
        Path(__file__).parents[1].joinpath("docs/contrast.md").write_text(f"{text}\n\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
