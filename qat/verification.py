"""verify: a written file against what was frozen, and then in its real runtime.

The file is read back with its consumer's own code; codes, stored scales, offsets and weights dequantized in float32
must be equal bit for bit, and inputs, configuration and tokenizer must be the same. Then its runtime scores the run's
evaluation text, and must find the loss of the trained model.
"""

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qat import comparison, diagnosis, proof
from qat.errors import UserError
from qat.exporters import (
    as_held,
    caveats,
    gguf,
    identify,
    made_of_others,
    read,
    read_any,
    roundings,
    runtime_of,
    target_module,
)
from qat.exporters.gguf_models import same_model
from qat.exporters.hf_folder import float_dtype, read_config
from qat.files import FAILED
from qat.frozen import Frozen
from qat.rescue import float_original, is_ours, source
from qat.rescue_gguf import tokenizer_difference, vocabulary_difference
from qat.verdict import Verdict


def verify(path: Path, *, against: Path | None = None, runtime: bool = True) -> Verdict:
    """Check the export or the frozen folder at `path`. against: a run folder, a frozen folder or another export.

    Without `against`, an export inside a run folder is compared with that run; any other only with its own manifest.
    Raises UserError if there is nothing to read, VerifyError if a file is damaged beyond reading.
    """
    path = Path(path)
    target, manifest = identify(path)
    module = None if target == "frozen" else target_module(target)
    verdict = Verdict(target, {"path": str(path), "bytes": _size(path)})
    base = Path(against) if against is not None else own_run(path.parent if path.is_file() else path)
    if manifest is None:
        verdict.unchecked.append(f"{path} has no manifest.json: whether its files are as they were written")
    if module is not None and hasattr(module, "UNREADABLE"):
        verdict.unchecked.append(module.UNREADABLE)
        written = None
    else:
        written = Frozen.load(path) if module is None else read(module, path)
        verdict.figures["bits_per_weight"] = bits_per_weight(written)
    original = None
    rounded: list[str] = []
    if base is None and written is not None:
        _against_manifest(written, manifest, verdict)
    elif base is not None:
        original = None if written is None else float_original(base)
        frozen = original or _base(base, target)
        if written is None:
            verdict.differences += made_of_others(manifest, _held(module, frozen))
        else:
            _against(path, written, module, frozen, base, original is not None, verdict)
        verdict.unchecked += [] if module is None else caveats(frozen, target)
        rounded = [] if module is None else roundings(frozen, target)
        if module is not None and runtime_of(target, path) == "vllm":
            rounded = []  # what hf says there is of transformers
        if (dtype := float_dtype(frozen)) != torch.float32:
            rounded = [*rounded, f"the trained model computes in {dtype}"]
        if runtime and module is not None and not verdict.differences:
            proof.tokenizer(path, module, frozen, base, verdict)
    if runtime and module is not None and not verdict.differences and original is None:
        proof.score(path, module, base, rounded, verdict)
    return verdict


def _size(path: Path) -> int:
    """Bytes of a folder, or of a file with its external data."""
    files = [path, path.with_name(f"{path.name}.data")] if path.is_file() else path.rglob("*")
    return sum(f.stat().st_size for f in files if f.is_file())


def _base(base: Path, target: str) -> Frozen:
    """What to compare with. Of two GGUF files the metadata is compared as it is."""
    return read_any(base) if target == "gguf" and _kind(base) == "gguf" else source(base)


def _kind(base: Path) -> str:
    return "frozen" if is_ours(base) else identify(base)[0]


def _held(module: ModuleType | None, frozen: Frozen) -> Frozen:
    return frozen if module is None else as_held(module, frozen)


def _against(
    path: Path, written: Frozen, module: ModuleType | None, frozen: Frozen, base: Path, is_float: bool, verdict: Verdict
) -> None:
    """The file at `path` against `frozen`, read from `base`, which is_float: an unquantized original."""
    of, target = _kind(base), verdict.target
    if is_float:
        figures, verdict.differences = diagnosis.against_float(written, _held(module, frozen))
        verdict.figures |= figures
    else:
        held = _held(None if of == "frozen" else target_module(of), written)
        verdict.differences, codes, weights = comparison.tensors(held, _held(module, frozen))
        verdict.figures |= {"codes_equal": codes, "weights_equal": weights}
        if "gguf" not in (target, of):  # which has no word for inputs: llama.cpp decides by the weights
            verdict.differences += comparison.inputs(written, frozen)
        elif refuse := getattr(module, "refuse_scheme", None):
            why = ((name, refuse(scheme, frozen.config)) for name, scheme in frozen.schemes().items())
            verdict.differences += [f"the input of {name}: {said}" for name, said in why if said]
    copies = of != "gguf" and not is_float
    verdict.differences += _headers(
        path, written, module, frozen, base, whole=not is_float and of in ("frozen", target)
    )
    if target == "gguf":
        if of != "gguf" and (why := vocabulary_difference(gguf.gguf_file(path), frozen.tokenizer)):
            verdict.differences.append(why)
        return
    if path.is_file() and frozen.tokenizer and not written.tokenizer:
        verdict.unchecked.append("the tokenizer: one file is compared, without its folder")
    else:
        verdict.differences += comparison.tokenizer(written.tokenizer, frozen.tokenizer, copies=copies)


def _headers(
    path: Path, written: Frozen, module: ModuleType | None, frozen: Frozen, base: Path, *, whole: bool
) -> list[str]:
    """Configuration, metadata or graph against what the same exporter would write now; whole: and nothing else."""
    kind, of = written.config.get("model_type"), _kind(base)
    told_apart = module is not gguf and of != "gguf"
    if not told_apart and isinstance(kind, str) and same_model(kind, frozen.config.get("model_type")):
        frozen = replace(frozen, config={**frozen.config, "model_type": kind})
    if module is None or not hasattr(module, "header"):
        return comparison.config(written.config, frozen.config, whole=whole and module is None)
    if module is gguf and of == "gguf":
        files = gguf.gguf_file(path), gguf.gguf_file(base)
        found = comparison.metadata(*(_untokenized(gguf.read_header(f)) for f in files))
        why = tokenizer_difference(*files)
        return [*found, why] if why else found
    now = replace(written, config=frozen.config, tokenizer=frozen.tokenizer, ties=frozen.ties)
    if hasattr(module, "compare_header"):
        return _graph(path, written, module, now, of_gguf=of == "gguf", whole=whole)
    have = getattr(module, "read_header", read_config)(path)
    if module is gguf and (not comparison.is_our_metadata(have) or "tokenizer.json" not in frozen.tokenizer):
        now, have = replace(now, tokenizer={}), _untokenized(have)
    try:
        want = module.header(now)
    except UserError as why:  # it could not have been written
        return [str(why)]
    if module is gguf:
        return comparison.metadata(have, want)
    return comparison.config(have, want, whole=whole, exact=comparison.is_our_config(have) or is_ours(base))


def _graph(path: Path, written: Frozen, module: ModuleType, now: Frozen, *, of_gguf: bool, whole: bool) -> list[str]:
    """The file's graph against that of `now`, and the configuration that it keeps. of_gguf: that of `now` is GGUF
    metadata, which say less than a graph needs; the file's own configuration says the rest."""
    found = comparison.config(written.config, now.config, whole=whole)
    if of_gguf:
        told = {k: v for k, v in now.config.items() if v is not None and k != "max_position_embeddings"}  # likewise
        now = replace(now, config={**written.config, **told})
    try:
        return [*found, *module.compare_header(path, module.header(now))]
    except UserError as why:  # it could not have been written
        return [*found, str(why)]


def _untokenized(metadata: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in metadata.items() if not k.startswith("tokenizer.")}


def own_run(folder: Path) -> Path | None:
    """The run folder that an exported folder lies in, None if it lies elsewhere."""
    run_dir = folder.absolute().parent.parent
    return run_dir if folder.absolute().parent.name == "export" and (run_dir / "frozen").is_dir() else None


def bits_per_weight(frozen: Frozen) -> float:
    """Stored bits (codes, scales, offsets, floats) over all weights; ties count once."""
    codes = sum(w.tensor.shape.numel() for w in frozen.weights.values())  # one at a time: each maps its file
    return 8 * frozen.nbytes() / (codes + sum(t.numel() for t in frozen.floats.values()))


def _against_manifest(written: Frozen, manifest: dict[str, Any] | None, verdict: Verdict) -> None:
    if manifest is None:
        verdict.unchecked.append("codes, scales and weights: there is nothing to compare with; give --against")
        return
    have = written.digests(like=manifest["tensors"])
    wrong = [n for n in sorted(manifest["tensors"]) if n in have and have[n] != manifest["tensors"][n]]
    missing = [n for n in sorted(manifest["tensors"]) if n not in have]
    verdict.differences += [f"{n}: not the tensor whose digest is in the manifest" for n in wrong]
    if missing:
        verdict.unchecked.append(f"{len(missing)} tensors that the file stores in another form ({missing[0]}, …)")
    verdict.figures |= {"codes_equal": not wrong, "weights_equal": not wrong}


def verify_run(run_dir: Path, *, against: Path | None = None, runtime: bool = True) -> dict[str, Verdict]:
    """Every export of a run, against the run if nothing else is given. Raises UserError if it has none."""
    found = (p for p in (Path(run_dir) / "export").glob("[!.]*") if p.is_dir())
    folders = sorted(p for p in found if FAILED not in p.name)
    if not folders:
        raise UserError(f"{run_dir} has no export to verify; write one with: qat export {run_dir} --to gguf")
    Frozen.load(Path(run_dir) / "frozen")
    return {p.name: verify(p, against=against, runtime=runtime) for p in folders}
