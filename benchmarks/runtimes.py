"""How large each target's file is and how fast its runtime runs it, beside the float model in the same runtime.

    python benchmarks/runtimes.py                              # all of configs/target, tables put into docs/runtimes.md
    python benchmarks/runtimes.py --targets llama_cpp mlx      # these only, printed

A random-weight Llama is rounded to nearest on each target's grid, exported as `qat export` does, and decodes.
"""

import argparse
import copy
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from file_sizes import WEIGHT_FILES, Size, measure
from hydra.utils import instantiate
from machine import machine
from omegaconf import OmegaConf
from runtimes_clock import Clock, Lengths, python_of, race
from transformers import LlamaConfig, LlamaForCausalLM

import qat
from qat import runtimes
from qat.conversion import calibrate
from qat.errors import UserError
from qat.exporters import export, target_module
from qat.frozen import Frozen
from qat.models.load import load
from qat.recipes import CONFIGS
from qat.runtimes.environments import interpreter
from qat.runtimes.transformers_folder import method
from qat.shipping import tokenizer_files

DOCUMENT = Path(__file__).parents[1] / "docs/runtimes.md"
# the half precision that a runtime is usually given, if it takes one on a CPU
HALVES = {"llama_cpp": torch.float16, "transformers_folder": torch.bfloat16, "mlx": torch.bfloat16}
SIZES = (
    "| target | export | code bits | file, MB | all files, MB | smaller than fp32 | bits a weight | quantized weights "
    "| bits each | left float, MB | the rest, MB | of a bf16 model, MB | smaller than fp32 |"
)
SPEEDS = "| runtime | target | load, s | prompt, tokens/s | × fp32 | × half | generation, tokens/s | × fp32 | × half |"


@dataclass
class Artefact:
    """One export. half: its size where the model's floats are bfloat16, if that changes the file."""

    target: str
    exporter: str
    runtime: str
    scheme: str
    path: Path
    size: Size | None = None
    half: Size | None = None
    why: str = ""  # it is not there


def llama(layers: int) -> Any:
    """1024 wide, tied; with 12 layers a fifth of its weights are the embedding, as in Llamas and Qwens of about 1B."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": layers,
        "head_dim": 64,
    }
    heads: dict[str, Any] = {"num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True}
    tokens: dict[str, Any] = {"vocab_size": 32000, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 512}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, **tokens)).eval()


def artefacts(chosen: list[str], folder: Path) -> list[Artefact]:
    """What the chosen files of configs/target export (all, if none is chosen)."""
    found = []
    for file in sorted((CONFIGS / "target").glob("*.yaml")):
        composed: Any = OmegaConf.load(file)
        scheme = next(d["override /scheme"] for d in composed.defaults if "override /scheme" in d)
        for name in composed.export if not chosen or file.stem in chosen else []:
            runtime = target_module(name).RUNTIME
            found.append(Artefact(file.stem, name, runtime, scheme, folder / f"{file.stem}-{name}"))
    return found


class Bench:
    """The model, and where its files go."""

    def __init__(self, layers: int, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = tokenizer_files(load(None, name="gpt2_mini").tokenizer)
        self.model = llama(layers)
        architecture = type(self.model).__name__
        self.config = {**self.model.config.to_dict(), "architectures": [architecture], "name": "random Llama"}

    def freeze(self, name: str, exporters: list[str]) -> Frozen:
        """Rounded to nearest. Raises UserError if the audit refuses."""
        scheme = instantiate(OmegaConf.load(CONFIGS / "scheme" / f"{name}.yaml"), _convert_="all")
        model = copy.deepcopy(self.model)
        qat.audit(model, scheme["rules"], targets=exporters, config=self.config)
        net = qat.prepare(model, scheme["rules"], gelu=scheme.get("gelu")).eval()
        calibrate(net, [torch.randint(2, 4000, (1, 64))], lambda m, ids: m(input_ids=ids))
        return qat.convert(net, config=self.config, tokenizer=self.tokenizer)

    def write(self, all_of: list[Artefact]) -> None:
        """Export all artefacts of one scheme."""
        try:
            frozen = self.freeze(all_of[0].scheme, [a.exporter for a in all_of])
        except UserError as error:
            for a in all_of:
                a.why = f"refused: {error}"
            return
        halved = {n: t.bfloat16() if t.is_floating_point() else t for n, t in frozen.floats.items()}
        for a in all_of:
            try:
                a.size = measure(export(frozen, a.exporter, a.path), frozen)
            except UserError as error:
                a.why = f"not run: {error}"
                continue
            module = target_module(a.exporter)
            if not hasattr(module, "stored_dtype") and module.RUNTIME != "executorch":  # those store float32 anyway
                other = replace(frozen, floats=halved)
                a.half = measure(export(other, a.exporter, self.folder / "half"), other)
                shutil.rmtree(self.folder / "half")

    def floats(self, runtime: str) -> dict[str, Path]:
        """dtype -> the float model as this runtime takes it."""
        made = {}
        for dtype in (torch.float32, *([HALVES[runtime]] if runtime in HALVES else [])):
            name = str(dtype).removeprefix("torch.")
            made[name] = self.folder / f"{runtime}-{name}"
            if not made[name].exists():
                self.float(runtime, dtype, made[name])
        return made

    def float(self, runtime: str, dtype: torch.dtype, path: Path) -> None:
        model = copy.deepcopy(self.model).to(dtype)
        if runtime in ("llama_cpp", "ort"):
            floats = {n: p.detach() for n, p in model.named_parameters()}
            ties = {"lm_head.weight": "model.embed_tokens.weight"}
            frozen = Frozen({}, floats, ties=ties, config=self.config, tokenizer=self.tokenizer)
            export(frozen, "gguf" if runtime == "llama_cpp" else "onnx", path)
            return
        model.save_pretrained(path)
        if runtime == "executorch":
            room = str(self.config["max_position_embeddings"])
            out = str(path / "model.pte")
            command = [interpreter(runtime), "-m", "qat.runtimes.executorch_lower", str(path), out, room]
            done = subprocess.run(command, env=runtimes.environment(), capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(f"the float model cannot be lowered: {done.stderr.strip().splitlines()[-1][:300]}")


def size_row(a: Artefact) -> str:
    s = a.size
    if s is None:
        return f"| {a.target} | {a.exporter} | {a.why} | | | | | | | | | | |"
    cells = [a.target, a.exporter, f"{8 * s.codes / s.quantized:.2f}", mb(s.file), mb(s.folder), f"{s.smaller:.2f}"]
    cells += [f"{s.bits:.2f}", f"{s.quantized / s.weights:.1%}"]
    cells += ["–" if s.bits_quantized is None else f"{s.bits_quantized:.3f}", mb(s.floats), mb(s.other)]
    cells += ["the same", ""] if a.half is None else [mb(a.half.file), f"{a.half.smaller:.2f}"]
    return f"| {' | '.join(cells)} |"


def mb(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:.2f}"


def speed_table(bench: Bench, found: list[Artefact], lengths: Lengths, rounds: int) -> list[str]:
    groups: dict[tuple[str, str], list[Artefact]] = defaultdict(list)
    lines = [SPEEDS, rule(SPEEDS)]
    for a in found:
        try:
            if a.size is not None:
                groups[a.runtime, python_of(a.runtime, a.path)].append(a)
        except UserError as error:
            lines.append(f"| {a.runtime} | {a.target} | not run: {error} | | | | | | |")
    for group in groups.values():
        try:
            lines += speeds(group, bench.floats(group[0].runtime), lengths, rounds)
        except UserError as error:
            lines.append(f"| {group[0].runtime} | all | not run: {error} | | | | | | |")
    return lines


def speeds(group: list[Artefact], floats: dict[str, Path], lengths: Lengths, rounds: int) -> list[str]:
    """Rows of one runtime in one Python: its floats over all rounds, then each artefact against them."""
    runtime, python = group[0].runtime, python_of(group[0].runtime, group[0].path)
    beside = {name: Clock(runtime, python, path, lengths) for name, path in floats.items()}
    whole: dict[str, list[tuple[float, float]]] = defaultdict(list)
    rows: list[str] = []
    seen, versions = dict[str, str](), dict[str | None, str]()
    try:
        for a in group:
            helper = method(a.path) if runtime == "transformers_folder" else None
            if helper not in versions:
                versions[helper] = runtimes.run(runtime, a.path, version="")["version"]
            version = versions[helper]
            if (same := seen.setdefault(contents(a.path), a.target)) != a.target:
                rows.append(f"| {version} | {a.target} | the same file as {same} | | | | | | |")
                continue
            clock = None
            try:
                clock = Clock(runtime, python, a.path, lengths)
                found = race({**beside, "": clock}, rounds)
                mine = found.pop("")
                rows.append(speed_row(version, a.target, clock.load, mine, list(found.values()), lengths))
                for name, times in found.items():
                    whole[name] += times
            except UserError as error:
                rows.append(f"| {version} | {a.target} | not run: {error} | | | | | | |")
            finally:
                if clock:
                    clock.close()
            print(rows[-1], flush=True)
        head = [speed_row(runtime, f"({n})", beside[n].load, whole[n], [], lengths) for n in floats if whole]
        return head + rows
    finally:
        for clock in beside.values():
            clock.close()


def speed_row(
    runtime: str,
    name: str,
    load: float,
    mine: list[tuple[float, float]],
    floats: list[list[tuple[float, float]]],
    lengths: Lengths,
) -> str:
    """Medians; ratios are those of the same round. floats: that of float32, then that of half precision."""
    cells = [runtime, name, f"{load:.2f}"]
    for part, tokens in ((0, lengths.prompt), (1, 1)):
        cells.append(f"{tokens / median(t[part] for t in mine):.1f}")
        ratios = [median(f[part] / t[part] for f, t in zip(times, mine, strict=True)) for times in floats]
        cells += [*(f"{ratio:.2f}" for ratio in ratios), *["" if not floats else "–"] * (2 - len(ratios))]
    return f"| {' | '.join(cells)} |"


def contents(path: Path) -> str:
    """What tells one weight file from another."""
    (file,) = (f for f in path.iterdir() if f.suffix in WEIGHT_FILES)
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def put(text: str, name: str, lines: list[str]) -> str:
    """The text with what stands between the marks of `name` replaced. Raises ValueError without them."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end {name} -->)", re.DOTALL)
    if not marked.search(text):
        raise ValueError(f"there is no part {name!r}")
    return marked.sub(lambda m: m[1] + "\n".join(lines) + m[2], text)


def rule(head: str) -> str:
    return "|" + "---|" * (head.count(" | ") + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = sorted(f.stem for f in (CONFIGS / "target").glob("*.yaml"))
    parser.add_argument("--targets", nargs="+", default=[], choices=names, metavar="NAME", help="of configs/target")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3, help="of timing; 0: sizes alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=32, help="tokens generated after the prompt")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lengths = Lengths(args.threads, args.prompt, args.new)
    with tempfile.TemporaryDirectory(prefix="runtimes-") as folder:
        bench, found = Bench(args.layers, Path(folder)), artefacts(args.targets, Path(folder))
        for scheme in dict.fromkeys(a.scheme for a in found):
            bench.write([a for a in found if a.scheme == scheme])
        weights = next(a.size.weights for a in found if a.size)
        about = f"{args.layers} layers, {weights / 1e6:.1f}M weights, {4 * weights / 1e6:.1f} MB in fp32"
        sizes = [SIZES, rule(SIZES), *map(size_row, found)]
        print(about, *sizes, sep="\n", flush=True)
        speed = speed_table(bench, found, lengths, args.rounds) if args.rounds else []
        print(*speed, sep="\n")
    if not args.targets:
        said = " ".join(["python benchmarks/runtimes.py", *sys.argv[1:]])
        where = f"`{said}`: {about}; {machine(args.threads)}."
        text = put(DOCUMENT.read_text(encoding="utf-8"), "sizes", [where, "", *sizes])
        if args.rounds:
            tokens = f"{args.prompt} tokens of prompt, {args.new} after it, {args.rounds} rounds"
            text = put(text, "speeds", [f"{where} {tokens}.", "", *speed])
        DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
