"""verify: a written file against what was frozen, and then in its real runtime.

The file is read back with its consumer's own code; codes, stored scales, offsets and weights dequantized in float32
must be equal bit for bit, and the tokenizer must be the same. Then its runtime scores the run's evaluation text.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qat import evaluation
from qat.errors import UserError, VerifyError
from qat.exporters import as_held, identify, made_of_others, target_module
from qat.files import read_manifest
from qat.frozen import Frozen, FrozenWeight
from qat.runtimes import run

TOKENIZER_LINES = 300


@dataclass
class Verdict:
    """figures: the report's entry for this export. differences: what is wrong, the first thing first. unchecked:
    what could not be checked, and why."""

    target: str
    figures: dict[str, Any] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def raise_if_different(self) -> None:
        """Raises VerifyError naming the first tensor that differs."""
        if self.differences:
            more = f" (and {len(self.differences) - 1} more)" if len(self.differences) > 1 else ""
            raise VerifyError(self.differences[0] + more)

    def lines(self) -> list[str]:
        """What was found, a line each, for the terminal."""
        f = self.figures
        out = [f"  WRONG: {d}" for d in self.differences]
        if "codes_equal" in f:
            out.append(
                f"  codes and stored scales equal: {f['codes_equal']}, float32 weights equal: {f['weights_equal']}"
            )
        if "tokenizer_lines" in f and not self.differences:
            out.append(f"  tokenizer equal on {f['tokenizer_lines']} lines")
        if "runtime" in f:
            quality = f"perplexity {f['perplexity']:.4f}" if "perplexity" in f else f"accuracy {f['accuracy']:.4f}"
            out.append(
                f"  {f['runtime']}: loss {f['loss']:.6f}, {quality}, largest difference {f['max_logit_diff']:.2g}"
            )
        return out + [f"  not checked: {u}" for u in self.unchecked]


def verify(path: Path, *, against: Path | None = None, runtime: bool = True) -> Verdict:
    """Check the export at `path`. against: a run folder, a frozen folder or another export.

    Without `against`, an export inside a run folder is compared with that run; any other only with its own manifest.
    Raises UserError if there is nothing to read, VerifyError if a file is damaged beyond reading.
    """
    path = Path(path)
    target, manifest = identify(path)
    if target == "frozen":
        frozen = Frozen.load(path)
        return Verdict("frozen", {"codes_equal": True, "weights_equal": True, "bytes": frozen.nbytes()})
    module = target_module(target)
    verdict = Verdict(target)
    folder = path.parent if path.is_file() else path
    base = Path(against) if against is not None else own_run(folder)
    written = None if hasattr(module, "UNREADABLE") else module.read(path)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    verdict.figures |= {"path": str(path), "bytes": size}
    if written is not None:
        verdict.figures["bits_per_weight"] = bits_per_weight(written)
    if manifest is None:
        verdict.unchecked.append(f"{path} has no manifest.json: whether its files are as they were written")
    if written is None:
        verdict.unchecked.append(module.UNREADABLE)
    if base is None and written is not None:
        _against_manifest(written, manifest, verdict)
    elif base is not None:
        frozen = read_any(base)
        if written is None:
            verdict.differences += made_of_others(manifest, as_held(module, frozen))
        else:
            compare(written, as_held(module, frozen), verdict, whole_config=getattr(module, "WHOLE_CONFIG", False))
        verdict.unchecked += getattr(module, "caveats", lambda _: [])(frozen)
        if runtime and not verdict.differences:
            _tokenizer(path, module, frozen, base, verdict)
    if runtime and not verdict.differences:
        _run(path, module.RUNTIME, base, verdict)
    return verdict


def read_any(path: Path) -> Frozen:
    """The codes and scales of a run folder, a frozen folder or an export."""
    path = Path(path)
    if (path / "frozen").is_dir():
        return Frozen.load(path / "frozen")
    if (path / "frozen.json").is_file():
        return Frozen.load(path)
    target, _ = identify(path)
    return target_module(target).read(path)


def own_run(folder: Path) -> Path | None:
    """The run folder that an exported folder lies in, None if it lies elsewhere."""
    run_dir = folder.absolute().parent.parent
    return run_dir if folder.absolute().parent.name == "export" and (run_dir / "frozen").is_dir() else None


def bits_per_weight(frozen: Frozen) -> float:
    """Stored bits (codes, scales, offsets, floats) over all weights; ties count once."""
    tensors = [w.tensor.codes for w in frozen.weights.values()] + list(frozen.floats.values())
    return 8 * frozen.nbytes() / sum(t.numel() for t in tensors)


def compare(written: Frozen, frozen: Frozen, verdict: Verdict, *, whole_config: bool = False) -> None:
    """Every tensor of `frozen` against the written one; sets codes_equal and weights_equal.

    whole_config: the file keeps every key of the configuration, so that one which is not there is a difference.
    """
    codes = weights = True
    for name, want in frozen.weights.items():
        have = written.weights.get(name)
        if have is None:
            verdict.differences.append(f"{name} is quantized in the frozen model but not in the file")
            codes = weights = False
            continue
        why = _codes_differ(have, want)
        if why:
            codes = False
            verdict.differences.append(f"{name}: {why}")
        a, b = have.dequantize(), want.dequantize()
        if a.shape != b.shape or not torch.equal(a, b):
            weights = False
            verdict.differences.append(f"{name}: the weights dequantized in float32 differ{_sqnr(a, b)}")
    for name, want in frozen.floats.items():
        have = written.floats.get(name)
        if have is None:
            verdict.differences.append(f"{name} is missing from the file")
            weights = False
        elif have.shape != want.shape or not torch.equal(have.float(), want.float()):
            weights = False
            verdict.differences.append(f"{name}: the unquantized values differ{_sqnr(have.float(), want.float())}")
    extra = sorted((set(written.weights) | set(written.floats)) - set(frozen.weights) - set(frozen.floats))
    if extra:
        verdict.differences.append(f"{extra[0]} is in the file but not in the frozen model")
        weights = False
    for name, want_input in frozen.inputs.items():
        if not want_input.static:
            continue
        have_input = written.inputs.get(name)
        same = have_input is not None and all(
            (a is None) == (b is None) and (a is None or b is None or torch.equal(a.float(), b.float()))
            for a, b in ((have_input.scale, want_input.scale), (have_input.offset, want_input.offset))
        )
        if not same:
            codes = False
            verdict.differences.append(f"{name}: the input's scale or zero point differs from the calibrated one")
    for key, want in frozen.config.items():
        have = written.config.get(key)
        if key not in written.config:
            if whole_config and key != "_name_or_path":
                verdict.differences.append(f"config {key} is missing from the file, {want!r} in the frozen model")
        elif key in FREE_KEYS or (not whole_config and (want is None or key == "max_position_embeddings")):
            continue  # llama.cpp caps the context at a sliding window
        elif not _same(have, want):
            verdict.differences.append(f"config {key} is {have!r} in the file, {want!r} in the frozen model")
    if whole_config and written.ties != frozen.ties:
        verdict.differences.append(f"the ties are {written.ties} in the file, {frozen.ties} in the frozen model")
    if written.tokenizer and frozen.tokenizer:  # a format with a tokenizer of its own is compared in its runtime
        for name in frozen.tokenizer:
            if written.tokenizer.get(name) != frozen.tokenizer.get(name):
                verdict.differences.append(f"{name}: not the tokenizer's file of the frozen model")
    verdict.figures |= {"codes_equal": codes, "weights_equal": weights}


FREE_KEYS = {  # may differ without changing what the model computes
    *("name", "_name_or_path", "dtype", "torch_dtype", "transformers_version", "architectures", "quantization_config"),
    "use_cache",
}


def _same(have: Any, want: Any) -> bool:
    if isinstance(want, float):
        return isinstance(have, int | float) and math.isclose(have, want, rel_tol=1e-6)
    return have == want


def _codes_differ(have: FrozenWeight, want: FrozenWeight) -> str | None:
    a, b = have.tensor, want.tensor
    if a.codes.shape != b.codes.shape:
        return f"the codes have shape {tuple(a.codes.shape)}, not {tuple(b.codes.shape)}"
    if not torch.equal(a.codes.int(), b.codes.int()):
        count = int((a.codes.int() != b.codes.int()).sum())
        return f"{count} of {b.codes.numel()} codes differ{_sqnr(have.dequantize(), want.dequantize())}"
    if a.scale.shape != b.scale.shape or not torch.equal(a.scale.float(), b.scale.float()):
        return "the codes are equal but the stored scales differ"
    if (a.offset is None) != (b.offset is None):
        return "one has an offset and the other has none"
    if a.offset is not None and b.offset is not None and not torch.equal(a.offset.float(), b.offset.float()):
        return "the codes are equal but the stored offsets differ"
    return None


def _sqnr(have: Tensor, want: Tensor) -> str:
    """How large a difference is, in decibels of signal over it."""
    if have.shape != want.shape:
        return f" in shape: {tuple(have.shape)}, not {tuple(want.shape)}"
    noise = float((have - want).double().square().sum())
    return f" ({10 * math.log10(float(want.double().square().sum()) / noise):.1f} dB SQNR)" if noise > 0 else ""


def _against_manifest(written: Frozen, manifest: dict[str, Any] | None, verdict: Verdict) -> None:
    if manifest is None:
        verdict.unchecked.append("codes, scales and weights: there is nothing to compare with; give --against")
        return
    have = written.digests()
    wrong = [n for n in sorted(manifest["tensors"]) if n in have and have[n] != manifest["tensors"][n]]
    missing = [n for n in sorted(manifest["tensors"]) if n not in have]
    verdict.differences += [f"{n}: not the tensor whose digest is in the manifest" for n in wrong]
    if missing:
        verdict.unchecked.append(f"{len(missing)} tensors that the file stores in another form ({missing[0]}, …)")
    verdict.figures |= {"codes_equal": not wrong, "weights_equal": not wrong}


def _tokenizer(path: Path, module: ModuleType, frozen: Frozen, base: Path, verdict: Verdict) -> None:
    """The runtime's own tokenizer against the Hugging Face one, on lines of the evaluation text and hard ones."""
    if not frozen.tokenizer or not (base / "evaluation.safetensors").is_file():
        return
    import tempfile

    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in frozen.tokenizer.items():
            Path(folder, name).write_bytes(content)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = evaluation.load(base / "evaluation.safetensors")["input_ids"]
    text: str = tokenizer.decode(ids.flatten().tolist(), skip_special_tokens=True)  # pyright: ignore[reportAssignmentType]
    lines = [line for line in text.splitlines() if line.strip()][:TOKENIZER_LINES] + HARD_LINES
    known = getattr(module, "known_difference", None)
    if known is not None:  # lines on which the runtime cannot agree, and says why
        reasons = {line: known(frozen.tokenizer, line) for line in lines}
        verdict.unchecked += sorted({f"tokenizer lines: {why}" for why in reasons.values() if why})
        lines = [line for line in lines if not reasons[line]]
    want = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    have = run(module.RUNTIME, path, tokenize=lines)["tokenize"]
    for line, a, b in zip(lines, have, want, strict=True):
        if list(a) != list(b):
            said = f"the tokenizer differs on {line[:60]!r}: {list(a)[:12]} in the file, {list(b)[:12]} trained"
            verdict.differences.append(said)
            break
    verdict.figures["tokenizer_lines"] = len(lines)


HARD_LINES = [
    "  leading and   inner   spaces\tand\ttabs ",
    "1234567890 3.14159 0xFF 1e-5",
    "naïve café — “quotes” … ﬁ ½",
    "日本語のテキスト 한국어 العربية עברית",
    "emoji 🙂👩‍👩‍👧 and \u200b zero width",
    "don't we'll I'm you've they'd IT'S",
    "def f(x: int) -> str:  # comment",
    "\u00a0non-breaking\u2003em space",
]


def _run(path: Path, runtime: str, base: Path | None, verdict: Verdict) -> None:
    """The evaluation text in the real runtime: loss, perplexity or accuracy, and the largest difference."""
    if base is None or not (base / "evaluation.safetensors").is_file():
        verdict.unchecked.append("loss in the runtime: no evaluation.safetensors; give --against RUN")
        return
    e = evaluation.load(base / "evaluation.safetensors")
    if "x" in e:
        got = run(runtime, path, predict=e["x"], version="")
        logits: Tensor = got["predict"]
        same = float((logits.argmax(-1) == e["logits"].argmax(-1)).double().mean())
        verdict.figures |= {**evaluation.figures({**e, "logits": logits}), "predictions_equal": same}
        diff = float((logits - e["logits"]).abs().max())
    else:
        got = run(runtime, path, score=e["input_ids"], logprobs=e["prompts"].tolist(), version="")
        verdict.figures |= evaluation.figures({"nll": -got["score"], "labels": e["labels"]})
        diff = float((got["logprobs"] - e["logprobs"]).abs().max())
    verdict.figures |= {"runtime": got["version"], "max_logit_diff": diff}


def verify_run(run_dir: Path) -> dict[str, Verdict]:
    """Every export of a run. Raises UserError if it has none."""
    folders = sorted(p for p in (Path(run_dir) / "export").glob("*") if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise UserError(f"{run_dir} has no export to verify; write one with: qat export {run_dir} --to gguf")
    read_manifest(Path(run_dir) / "frozen")
    return {p.name: verify(p) for p in folders}
