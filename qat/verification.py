"""verify: a written file against what was frozen, and then in its real runtime.

The file is read back with its consumer's own code; codes, stored scales, offsets and weights dequantized in float32
must be equal bit for bit, and the tokenizer must be the same. Then its runtime scores the run's evaluation text.
"""

import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qat import diagnosis, evaluation
from qat.errors import UserError
from qat.exporters import as_held, identify, made_of_others, read, read_any, target_module
from qat.exporters.gguf import gguf_file
from qat.exporters.gguf_models import same_model
from qat.files import read_manifest
from qat.frozen import Frozen
from qat.rescue import float_original, is_ours, source
from qat.rescue_gguf import tokenizer_difference, vocabulary_difference
from qat.runtimes import run
from qat.tokenizer_diagnosis import HARD_LINES
from qat.tokenizer_diagnosis import difference as tokenizers
from qat.verdict import Verdict

TOKENIZER_LINES = 300


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
    written = None if hasattr(module, "UNREADABLE") else read(module, path)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    verdict.figures |= {"path": str(path), "bytes": size}
    if written is not None:
        verdict.figures["bits_per_weight"] = bits_per_weight(written)
    if manifest is None:
        verdict.unchecked.append(f"{path} has no manifest.json: whether its files are as they were written")
    if written is None:
        verdict.unchecked.append(module.UNREADABLE)
    original = None if base is None or written is None else float_original(base)
    if base is None and written is not None:
        _against_manifest(written, manifest, verdict)
    elif original is not None and written is not None:
        figures, verdict.differences = diagnosis.against_float(written, original)
        verdict.figures |= figures
    elif base is not None:
        both_gguf = target == "gguf" and not is_ours(base) and identify(base)[0] == "gguf"
        frozen = read_any(base) if both_gguf else source(base)
        if written is None:
            verdict.differences += made_of_others(manifest, as_held(module, frozen))
        else:
            of = "frozen" if is_ours(base) else identify(base)[0]
            whole = of in ("frozen", target) and getattr(module, "WHOLE_CONFIG", False)
            kind = written.config.get("model_type")
            if "gguf" in (target, of) and same_model(kind, frozen.config.get("model_type")):
                frozen = replace(frozen, config={**frozen.config, "model_type": kind})
            compare(written, as_held(module, frozen), verdict, whole_config=whole, same_files=of != "gguf")
        verdict.unchecked += getattr(module, "caveats", lambda _: [])(frozen)
        why = None
        if both_gguf:
            why = tokenizer_difference(gguf_file(path), gguf_file(base))
        elif target == "gguf":
            why = vocabulary_difference(gguf_file(path), frozen.tokenizer)
        verdict.differences += [why] if why else []
        if runtime and not verdict.differences:
            _tokenizer(path, module, frozen, base, verdict)
    if runtime and not verdict.differences and "worst_sqnr" not in verdict.figures:
        _run(path, module.RUNTIME, base, verdict)
    return verdict


def own_run(folder: Path) -> Path | None:
    """The run folder that an exported folder lies in, None if it lies elsewhere."""
    run_dir = folder.absolute().parent.parent
    return run_dir if folder.absolute().parent.name == "export" and (run_dir / "frozen").is_dir() else None


def bits_per_weight(frozen: Frozen) -> float:
    """Stored bits (codes, scales, offsets, floats) over all weights; ties count once."""
    tensors = [w.tensor.codes for w in frozen.weights.values()] + list(frozen.floats.values())
    return 8 * frozen.nbytes() / sum(t.numel() for t in tensors)


def compare(
    written: Frozen, frozen: Frozen, verdict: Verdict, *, whole_config: bool = False, same_files: bool = True
) -> None:
    """Every tensor of `frozen` against the written one; sets codes_equal and weights_equal.

    whole_config: the file keeps every key of the configuration, so that one which is not there is a difference.
    same_files: the tokenizer's files are copies; one rebuilt from a GGUF file needs only to split text alike.
    """
    codes = weights = True
    for name, want in frozen.weights.items():
        have = written.weights.get(name)
        if have is not None and diagnosis.identical(have, want):
            continue
        if have is None:
            verdict.differences.append(f"{name} is quantized in the frozen model but not in the file")
            codes = weights = False
            continue
        found = diagnosis.weights(have, want)
        if found:
            codes = False
            verdict.differences.append(f"{name}: {found.text}")
        a, b = have.dequantize(), want.dequantize()
        if a.shape != b.shape or not torch.equal(a, b):
            weights = False
            if not found:
                effect = diagnosis.effect(a, b)
                verdict.differences.append(f"{name}: the weights dequantized in float32 differ{effect}")
    for name, want in frozen.floats.items():
        have = written.floats.get(name)
        if have is None:
            verdict.differences.append(f"{name} is missing from the file")
            weights = False
        elif found := diagnosis.floats(have, want):
            weights = False
            verdict.differences.append(f"{name}: {found.text}")
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
        for name in frozen.tokenizer if same_files else ():
            if written.tokenizer.get(name) != frozen.tokenizer.get(name):
                verdict.differences.append(f"{name}: not the tokenizer's file of the frozen model")
        if not same_files and (why := tokenizers(written.tokenizer, frozen.tokenizer)):
            verdict.differences.append(why)
    verdict.figures |= {"codes_equal": codes, "weights_equal": weights}


FREE_KEYS = {  # may differ without changing what the model computes
    *("name", "_name_or_path", "dtype", "torch_dtype", "transformers_version", "architectures", "quantization_config"),
    "use_cache",
}


def _same(have: Any, want: Any) -> bool:
    if isinstance(want, float):
        return isinstance(have, int | float) and math.isclose(have, want, rel_tol=1e-6)
    return have == want


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
    """The runtime's own tokenizer against the Hugging Face one, on lines of the evaluation text and hard ones.

    Of another tool's checkpoint there are the hard ones alone; if it is a GGUF file, llama.cpp is asked about it too.
    """
    asked = [(module.RUNTIME, path)]
    if is_ours(base):
        if not (base / "evaluation.safetensors").is_file():
            return
    elif frozen.tokenizer and identify(base)[0] == "gguf":
        asked.append(("llama_cpp", base))
    if not frozen.tokenizer or not any(name.startswith("tokenizer") for name in frozen.tokenizer):
        return
    import tempfile

    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in frozen.tokenizer.items():
            Path(folder, name).write_bytes(content)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    text = ""
    if (base / "evaluation.safetensors").is_file():
        ids = evaluation.load(base / "evaluation.safetensors")["input_ids"]
        text = str(tokenizer.decode(ids.flatten().tolist(), skip_special_tokens=True))
    lines = [line for line in text.splitlines() if line.strip()][:TOKENIZER_LINES] + HARD_LINES
    known = getattr(module, "known_difference", None)
    if known is not None:  # lines on which the runtime cannot agree, and says why
        reasons = {line: known(frozen.tokenizer, line) for line in lines}
        verdict.unchecked += sorted({f"tokenizer lines: {why}" for why in reasons.values() if why})
        lines = [line for line in lines if not reasons[line]]
    want = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    for runtime, file in asked:
        have = run(runtime, file, tokenize=lines)["tokenize"]
        for line, a, b in zip(lines, have, want, strict=True):
            if list(a) != list(b):
                said = f"the tokenizer differs on {line[:60]!r}: {list(a)[:12]} in {file}, {list(b)[:12]} in {base}"
                verdict.differences.append(said)
                break
    verdict.figures["tokenizer_lines"] = len(lines)


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
