"""Export targets, one file each: `refuse`, `export`, `read` and the RUNTIME that must run the result.

`export` here wraps them all: a temporary folder, the files, a model card, a manifest, then one rename. To add a target:
one file with those four names, and a YAML in configs/target. `missing_runtime`, `refuse_tokenizer`, `refuse_text`,
`refuse_scheme` (a weight and its layer's input), `refuse_together` (all weights), `refuse_values` (the very scales of
one), `KV_CACHES` and `GELUS` (of training's, what its runtime computes), `stored_dtype` (of unquantized parameters),
`runtime` (another than RUNTIME for some of its files), `as_held` (a Frozen as the file can say it), `header`
(config.json, metadata or graph, for `verify`), `compare_header` (how a file's differs from it, where it is no JSON),
`caveats` (what its runtime computes otherwise than training), `readers` (who cannot load the file), `UNREADABLE` (why
its file cannot be read back), and `APPENDS` (its files are written from the first byte to the last, so that they may
be hashed meanwhile) are for targets that have something to say there.
"""

from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from qat.errors import UserError
from qat.exporters.reading import read
from qat.files import MANIFEST, atomic_folder, read_manifest, refuse_foreign, sha256, write_manifest
from qat.frozen import Frozen
from qat.meanwhile import fewer_threads, flushed_meanwhile, hashed_meanwhile


def targets() -> list[str]:
    """The names that `export` takes: the files of this folder that write a target."""
    found = (p for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")
    return sorted(p.stem for p in found if "\nRUNTIME = " in p.read_text(encoding="utf-8"))


def target_module(target: str) -> ModuleType:
    """The file of a target. Raises UserError listing those there are."""
    if target not in targets():
        raise UserError(f"there is no export target {target!r}; there are {', '.join(targets())}")
    return import_module(f"qat.exporters.{target}")


def runtime_of(target: str, path: Path) -> str:
    """The file of qat/runtimes that runs the export at `path`: the target's RUNTIME, unless it chooses file by file."""
    module = target_module(target)
    return getattr(module, "runtime", lambda _: module.RUNTIME)(path)


def refuse_missing_runtimes(names: list[str]) -> None:
    """Raises UserError for an unknown target, or one whose runtime is not installed to prove its file."""
    for name in names:
        missing = getattr(target_module(name), "missing_runtime", None)
        if missing is not None and (remedy := missing()):
            raise UserError(f"export to {name} is proven in its runtime, which is not installed: {remedy}")


def refuse_tokenizers(names: list[str], files: dict[str, bytes], config: dict[str, Any]) -> None:
    """Raises UserError if a target cannot express the tokenizer (file name -> contents)."""
    for name in names:
        refuse = getattr(target_module(name), "refuse_tokenizer", None)
        if refuse is not None and files and (why := refuse(files, config)):
            raise UserError(f"export to {name}: {why}")


def refuse_texts(names: list[str], tokens: int, config: dict[str, Any]) -> None:
    """Raises UserError if a target's runtime cannot compute texts of so many tokens as the model does."""
    for name in names:
        refuse = getattr(target_module(name), "refuse_text", None)
        if refuse is not None and (why := refuse(tokens, config)):
            raise UserError(f"export to {name}: {why}")


def refuse_caches(names: list[str], kv_cache: str | None) -> None:
    """Raises UserError if a target's runtime does not compute over the KV cache that training simulates."""
    for name in names:
        if kv_cache and kv_cache not in getattr(target_module(name), "KV_CACHES", ()):
            raise UserError(f"export to {name}: kv_cache={kv_cache} is llama.cpp's; leave it out, or export to gguf")


def caveats(frozen: Frozen, target: str) -> list[str]:
    """What must be known of an export: who cannot load it, and its `roundings`; a sentence each."""
    readers: list[str] = getattr(target_module(target), "readers", lambda _: [])(frozen)
    return [*readers, *roundings(frozen, target)]


def roundings(frozen: Frozen, target: str) -> list[str]:
    """What the runtime of a target computes otherwise than training did, a sentence each."""
    module = target_module(target)
    out: list[str] = list(getattr(module, "caveats", lambda _: [])(frozen))
    for key, known, what in (("gelu", "GELUS", "llama.cpp's GELU table"), ("kv_cache", "KV_CACHES", "a KV cache")):
        value = frozen.config.get(key)
        if value and value not in getattr(module, known, ()):
            out.append(f"the model was trained with {what} ({key}={value}), which this target does not compute")
    return out


def export(frozen: Frozen, target: str, path: Path, *, card: str = "") -> Path:
    """Write `frozen` for `target` as the folder `path`, whole or not at all; returns `path`.

    card: the text of README.md, the model card. Raises UserError for a grid that the target cannot hold,
    and where `path` holds what qat did not write.
    """
    module = target_module(target)
    for name, w in frozen.weights.items():
        why = module.refuse(name, w.kind, w.shape, w.tensor.spec, frozen.config)
        if why:
            raise UserError(f"export to {target}: {name} (shape {w.shape}): {why}")
    path = Path(path)
    refuse_foreign(path)
    digests = as_held(module, frozen).digests()
    follow = hashed_meanwhile if getattr(module, "APPENDS", False) else lambda _: nullcontext(sha256)
    with atomic_folder(path) as folder, flushed_meanwhile(folder), follow(folder) as hashed:
        with fewer_threads():
            module.export(frozen, folder)
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
        write_manifest(folder, {"kind": "export", "target": target, "tensors": digests}, hashed)
    return path


def as_held(module: ModuleType, frozen: Frozen) -> Frozen:
    """What `read` of a target gives back of `frozen`: the same, unless the target says otherwise."""
    return getattr(module, "as_held", lambda same: same)(frozen)


def made_of_others(manifest: dict[str, Any] | None, frozen: Frozen) -> list[str]:
    """For a file that cannot be read back: the tensors of `frozen` that it was not made of, by its manifest."""
    if manifest is None:
        return []
    said = manifest["tensors"]
    return [
        f"{n}: the file was made of another tensor, by its manifest"
        for n, d in frozen.digests(like=said).items()
        if said.get(n) != d
    ]


def identify(path: Path) -> tuple[str, dict[str, Any] | None]:
    """(target, manifest) of an exported folder or file; the manifest is None where there is none.

    Raises UserError if it is nothing we know, VerifyError if a file does not match its manifest.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is no file or folder" if path.exists() else f"{path} does not exist")
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        return str(manifest.get("target", manifest["kind"])), manifest
    names = [path.name] if path.is_file() else [p.name for p in folder.iterdir()]
    if (folder / "config.json").is_file() and (found := _method(folder)) in targets():
        return found, None
    for ending, target in ((".gguf", "gguf"), (".onnx", "onnx"), (".pte", "executorch"), ("config.json", "hf")):
        if any(n.endswith(ending) for n in names):
            return target, None
    raise UserError(f"{path} holds no .gguf, no .onnx and no config.json: give a run, a frozen folder or an export")


def read_any(path: Path) -> Frozen:
    """The codes and scales of a run folder, a frozen folder, an export, or another tool's checkpoint."""
    path = Path(path)
    if (path / "frozen").is_dir():
        return Frozen.load(path / "frozen")
    if (path / "frozen.json").is_file():
        return Frozen.load(path)
    target, _ = identify(path)
    return read(target_module(target), path)


def _method(folder: Path) -> str:
    """The target that a Hugging Face folder's quantization names; "" without one."""
    try:
        config = import_module("qat.exporters.hf_folder").read_config(folder)
        found = config.get("quantization_config") or {}
        if "quantization" in config:
            return "mlx"
        old = found.get("checkpoint_format", found.get("format", "gptq")) == "gptq"
        return "gptq_v1" if found.get("quant_method") == "gptq" and old else found.get("quant_method", "")
    except (UserError, AttributeError, TypeError):
        return ""
