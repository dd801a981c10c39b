"""What the right grid is worth: the same model trained on the runtime's grid and on others, scored in the runtime.

    python benchmarks/contrast.py            # three seeds, each score to outputs/contrast.jsonl, to docs/contrast.md
    python benchmarks/contrast.py --first 3  # three more, say in another process
    python benchmarks/contrast.py --seeds 0  # docs/contrast.md anew from what was recorded
    python benchmarks/contrast.py --arms q4_0 --seeds 8 --windows 200   # the four-bit arms alone
    python benchmarks/contrast.py --steps 5 --windows 2 --seeds 1 --record outputs/look.jsonl --print   # a look

In every arm the embedded model is fine-tuned for the same steps at the same learning rate (AdamW, 3e-4, cosine) on the
same batches, written out and scored by the runtime itself on windows of 256 tokens of the embedded evaluation text. A
seed is another order of the training text, the same in all of its arms. "Re-derived" means that the trained weights are
handed over in floating point and quantized again by ggml's own rule (gguf-py's, byte for byte llama.cpp's), as every
tool does that exports a float checkpoint. Differences are paired: those of the same seeds and windows from the first
arm of the runtime, with the standard error of their mean over seeds and over windows. "Not distinguishable" is said
where zero lies in the 95% interval (Student's t) over seeds or in that over windows.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import contrast_table
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
from qat.errors import UserError
from qat.exporters import export, target_module
from qat.exporters.gguf_blocks import TYPES
from qat.frozen import Frozen
from qat.models.load import load
from qat.quantizers.lsq import LSQ
from qat.quantizers.minmax import MinMax
from qat.recipes import CONFIGS
from qat.scheme import QuantSpec
from qat.shipping import tokenizer_files

RATE = 3e-4


class Bench:
    """The model, one seed's order of the data, and where its figures go. said: how they came to be."""

    def __init__(self, args: argparse.Namespace, seed: int, said: str) -> None:
        self.loaded = load(None, name="gpt2_mini")
        self.data = StdlibData(block_size=256, batch_size=args.batch, seed=seed)
        self.data.attach(self.loaded.tokenizer)
        self.batch = self.data.evaluation("test", args.windows)
        if (there := len(self.batch["input_ids"])) < args.windows:
            raise UserError(f"the evaluation text has {there} windows, not {args.windows}; give --windows {there}")
        self.args, self.seed, self.said = args, seed, said

    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        config = self.loaded.model.config.to_dict()
        return {**config, "architectures": [type(self.loaded.model).__name__], "name": "contrast"}

    def train(self, scheme: dict[str, Any] | None, quantizer: WeightQuantizer = MinMax) -> Any:
        """A fresh copy of the model, fine-tuned under `scheme` (None: in floating point)."""
        torch.manual_seed(self.seed)
        net: Any = copy.deepcopy(self.loaded.model)
        if scheme is not None:
            extra = {k: v for k, v in scheme.items() if k != "rules"}
            qat.prepare(net, scheme["rules"], weight=quantizer, **extra)
        scales = [p for n, p in net.named_parameters() if n.endswith("_quantizer.scale")]
        others = [p for n, p in net.named_parameters() if not n.endswith("_quantizer.scale")]
        groups = [{"params": others}, {"params": scales, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.1)
        schedule = get_cosine_schedule_with_warmup(optimizer, self.args.steps // 10, self.args.steps)
        net.train()
        batches = iter(self.data.train_dataloader())
        for _ in range(self.args.steps):
            batch = next(batches)
            loss = net(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return net.eval()

    @cached_property
    def floating(self) -> tuple[float, dict[str, Tensor]]:
        """Fine-tuned in floating point: the loss in torch, and the parameters."""
        net = self.train(None)
        return self.in_torch(net), state(net)

    def frozen(self, net: Any) -> Frozen:
        """The trained model's codes, scales and floats."""
        return qat.convert(net, config=self.config(), tokenizer=tokenizer_files(self.loaded.tokenizer))

    def in_torch(self, net: Any) -> float:
        """Loss of the model as trained, in nats."""
        return evaluation.figures(evaluation.answer(net, self.batch, 8))["loss"]

    def in_runtime(self, frozen: Frozen, exporter: str) -> list[float]:
        """Loss of each window in the exporter's runtime, in nats."""
        with tempfile.TemporaryDirectory() as folder:
            path = export(frozen, exporter, Path(folder, exporter))
            got = runtimes.run(target_module(exporter).RUNTIME, path, score=self.batch["input_ids"])["score"]
        return (-got).double().mean(1).tolist()  # no label is left out in this data: windows weigh the same

    def score(self, runtime: str, arm: str, trained: float, frozen: Frozen, exporter: str = "gguf") -> None:
        """Score `frozen` in its runtime and add a line to the record."""
        self.record(runtime, arm, trained, self.in_runtime(frozen, exporter))

    def record(self, runtime: str, arm: str, trained: float, nll: list[float]) -> None:
        """Add a line to the record: loss in torch, and of each window in the runtime, in nats."""
        settings = f"{self.args.steps} steps of {self.args.batch} × 256 tokens, {self.args.windows} windows"
        line: contrast_table.Record = {"settings": settings, "said": self.said, "seed": self.seed}
        line |= {"runtime": runtime, "arm": arm, "torch": trained, "nll": nll}
        with self.args.record.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        print(f"{self.seed} | {runtime} | {arm} | {trained:.4f} | {sum(nll) / len(nll):.4f}", flush=True)


def scheme(name: str) -> dict[str, Any]:
    """A scheme of configs/scheme as objects."""
    return instantiate(OmegaConf.load(CONFIGS / "scheme" / f"{name}.yaml"), _convert_="all")


def weight_only(name: str, change: Callable[[QuantSpec], QuantSpec] = lambda spec: spec) -> dict[str, Any]:
    """A scheme without its activations, and with another weight grid in its last rule, that of the linears."""
    *others, last = [replace(r, scheme=replace(r.scheme, input=None)) for r in scheme(name)["rules"]]
    last = replace(last, scheme=replace(last.scheme, weight=change(last.scheme.weight)))
    return {"rules": [*others, last]}


def rederived(frozen: Frozen, values: dict[str, Tensor], linear: str) -> Frozen:
    """`frozen` with codes and scales that ggml's own quantizer gives `values` (by parameter name, as the float layer
    stores them): linears on its type `linear`, the embedding on Q8_0. Floats too are those of `values`, if there."""
    types = {t.ggml.name: t for t in TYPES}
    weights = {}
    for name, w in frozen.weights.items():
        held = types["Q8_0" if "wte" in name else linear]
        matrix = values[name].t().contiguous() if w.kind == "Conv1D" else values[name]
        codes, scale, offset = held.unpack(quants.quantize(matrix.detach().numpy(), held.ggml))
        weights[name] = replace(w, tensor=QTensor(codes, scale, offset, held.spec))
    floats = {name: values.get(name, value) for name, value in frozen.floats.items()}
    return replace(frozen, weights=weights, floats=floats, inputs={})


def bfloat16_scales(frozen: Frozen) -> Frozen:
    """The same codes with scales rounded to bfloat16, as runtimes do that store them so."""
    weights = {}
    for name, w in frozen.weights.items():
        spec = replace(w.tensor.spec, scale="bfloat16")
        weights[name] = replace(w, tensor=replace(w.tensor, scale=w.tensor.scale.bfloat16(), spec=spec))
    return replace(frozen, weights=weights)


def state(net: Any) -> dict[str, Tensor]:
    """Float parameters and buffers by name."""
    return {n: p.detach() for n, p in (*net.named_parameters(), *net.named_buffers())}


def right_grid(b: Bench, kind: str, name: str, quantizer: WeightQuantizer) -> Frozen:
    """Trained on the grid of ggml's type `kind` with its activations; gives what was trained."""
    runtime = f"llama.cpp {kind}"
    net = b.train(scheme(name), quantizer)
    right, trained = b.frozen(net), b.in_torch(net)
    b.score(runtime, "its grid and its activations", trained, right)
    b.score(runtime, "the same, its float master weights re-derived", trained, rederived(right, state(net), kind))
    return right


def float_inputs(b: Bench, kind: str, name: str, quantizer: WeightQuantizer) -> None:
    """Trained on the grid of ggml's type `kind` without the activations that the runtime has."""
    net = b.train(weight_only(name), quantizer)
    b.score(f"llama.cpp {kind}", "its grid, float activations", b.in_torch(net), b.frozen(net))


def other_grid(b: Bench, kind: str, arm: str, spec: dict[str, Any], quantizer: WeightQuantizer) -> tuple[float, Frozen]:
    """Trained on another grid and re-derived to ggml's type `kind`; gives the loss in torch and what was trained."""
    net = b.train(spec, quantizer)
    found, trained = b.frozen(net), b.in_torch(net)
    values = {n: w.dequantize() for n, w in found.weights.items()}
    b.score(f"llama.cpp {kind}", f"{arm}, re-derived", trained, rederived(found, values, kind))
    return trained, found


def no_grid(b: Bench, kind: str, like: Frozen) -> None:
    """Trained in floating point and re-derived to ggml's type `kind`. like: which weights are quantized."""
    trained, values = b.floating
    b.score(f"llama.cpp {kind}", "no grid: float fine-tuning, re-derived", trained, rederived(like, values, kind))


def before(b: Bench) -> None:
    """The model that every arm starts from, in torch."""
    nll = evaluation.answer(b.loaded.model, b.batch, 8)["nll"].double().mean(1).tolist()
    b.record("torch", "float, not fine-tuned", b.in_torch(b.loaded.model), nll)


def ternary(b: Bench) -> Frozen:
    """The arms that differ by the grid of two-bit weights alone; gives what was trained on the right one."""
    right = right_grid(b, "TQ2_0", "llama_tq2_0", LSQ)
    int2 = weight_only("llama_tq2_0", lambda s: replace(s, qtype="int2", block=(1, 32)))
    other_grid(b, "TQ2_0", "another 2-bit grid (int2 in groups of 32)", int2, LSQ)
    return right


def q4_0(b: Bench) -> None:
    """The arms of four-bit weights."""
    right = right_grid(b, "Q4_0", "llama_q4_0", MinMax)
    float_inputs(b, "Q4_0", "llama_q4_0", MinMax)
    no_grid(b, "Q4_0", right)
    half = weight_only("llama_q4_0", lambda s: replace(s, range="absmax_half", scale="float32"))
    loss, found = other_grid(b, "Q4_0", "another int4 grid (max/7.5, float32 scales)", half, MinMax)
    b.score("transformers", "max/7.5, float32 scales kept", loss, found, "hf")
    b.score("transformers", "the same, scales rounded to bfloat16", loss, bfloat16_scales(found), "hf")


def run(b: Bench) -> None:
    """All arms of one seed."""
    before(b)
    right = ternary(b)
    float_inputs(b, "TQ2_0", "llama_tq2_0", LSQ)
    no_grid(b, "TQ2_0", right)
    q4_0(b)


ARMS = {"all": run, "ternary": ternary, "q4_0": q4_0}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    about, *_ = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--arms", choices=ARMS, default="all", help="ternary: the right grid and int2; q4_0: four bits")
    parser.add_argument("--seeds", type=int, default=3, help="how many orders of the training text")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--steps", type=int, default=60, help="of each arm")
    parser.add_argument("--batch", type=int, default=4, help="windows of 256 tokens in a step")
    parser.add_argument("--windows", type=int, default=32, help="of evaluation text, which has 232")
    parser.add_argument("--record", type=Path, default=Path("outputs/contrast.jsonl"), help="each score is appended")
    parser.add_argument("--print", action="store_true", help="leave docs/contrast.md as it is")
    return parser


def command(args: argparse.Namespace) -> str:
    """The shortest command that measures the same; where its figures go is left out."""
    usual = arguments()
    said = {k: v for k, v in vars(args).items() if k not in ("record", "print") and v != usual.get_default(k)}
    return " ".join(["python benchmarks/contrast.py", *(f"--{k} {v}" for k, v in said.items())])


def main() -> None:
    """Measure, print, write."""
    parser = arguments()
    args = parser.parse_args()
    args.record.parent.mkdir(parents=True, exist_ok=True)
    said = f"`{command(args)}`; {machine(torch.get_num_threads())}"
    try:
        for seed in range(args.first, args.first + args.seeds):
            ARMS[args.arms](Bench(args, seed, said))
        records = contrast_table.read(args.record)
    except UserError as error:
        parser.error(str(error))
    print(contrast_table.tables(records))
    if not args.print:
        contrast_table.write(" ".join((__doc__ or "").split("\n\n")[2].split()), records)


if __name__ == "__main__":
    main()
