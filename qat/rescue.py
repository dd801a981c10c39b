"""Checkpoints that other tools made, read so that any target can write them: same codes, same scales, nothing rounded.

`source` reads one and adds what its format leaves out (ties, layer kinds, a GGUF file's config.json and tokenizer);
`fit` moves weights that a target cannot hold as they are to a grid of its own that holds the same values.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qat.errors import UserError, understood
from qat.exporters import identify, read_any, target_module
from qat.exporters.gguf import gguf_file
from qat.exporters.hf_folder import read_config, read_tensors, tokenizer_files
from qat.exporters.reading import refuse_unsound
from qat.frozen import Frozen, FrozenWeight
from qat.regrid import regrid
from qat.rescue_gguf import config_of, tokenizer_of
from qat.scheme import QuantSpec

TOKENIZER = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template", "spiece")
OURS = ("frozen", "mlx", "onnx")  # their readers leave nothing out


def is_ours(path: Path) -> bool:
    """Whether this is a run folder or a frozen folder, which need no rescue."""
    return path.is_dir() and ((path / "frozen").is_dir() or (path / "frozen.json").is_file())


def source(path: Path) -> Frozen:
    """A run, a frozen folder, or a checkpoint of any tool in a format that can be read, complete.

    Raises UserError for what cannot be carried over exactly, or has tensors that its model does not, or lacks some.
    """
    path = Path(path)
    if is_ours(path):
        return read_any(path)
    target, _ = identify(path)
    frozen = read_any(path)
    if target in OURS:
        return frozen
    if target == "gguf":
        file = gguf_file(path)
        with understood(file):
            config = {**config_of(file, frozen.config), "tie_word_embeddings": bool(frozen.ties)}
            frozen = replace(frozen, tokenizer=tokenizer_of(file))
        for key, layer in (("attention_bias", "q_proj"), ("mlp_bias", "up_proj")):  # the metadata does not say
            if key in config and any(name.endswith(f"{layer}.bias") for name in frozen.floats):
                config[key] = True
        frozen = replace(frozen, config=config)
    else:
        frozen = replace(frozen, tokenizer=_kept(frozen.tokenizer))
    return _completed(frozen, path)


def float_original(path: Path) -> Frozen | None:
    """A Hugging Face folder that nobody quantized, as floats alone; None for anything else."""
    path = Path(path)
    if not (path / "config.json").is_file() or is_ours(path) or (path / "manifest.json").is_file():
        return None
    config = read_config(path)
    if "quantization_config" in config or "quantization" in config:
        return None
    frozen = Frozen({}, read_tensors(path)[0], config=config, tokenizer=_kept(tokenizer_files(path)))
    refuse_unsound(frozen, path)
    return _completed(frozen, path)


def _kept(files: dict[str, bytes]) -> dict[str, bytes]:
    return {n: c for n, c in files.items() if n.startswith(TOKENIZER) or n == "generation_config.json"}


def _skeleton(config: dict[str, Any], path: Path, tensors: int) -> Any:
    """transformers' model of this config, without storage. tensors: how many the checkpoint has."""
    import transformers

    try:
        loaded = transformers.AutoConfig.for_model(**config)
        if (getattr(loaded, "num_hidden_layers", None) or 0) > tensors:
            raise ValueError(f"{loaded.num_hidden_layers} layers, and {tensors} tensors in the checkpoint")
        cls: Any = getattr(transformers, (config.get("architectures") or [""])[0], None)
        with torch.device("meta"):
            return (
                cls(loaded)
                if hasattr(cls, "from_pretrained")
                else transformers.AutoModelForCausalLM.from_config(loaded)
            )
    except Exception as error:  # transformers and its validators have many kinds
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"transformers cannot build the model of {path} ({said})") from error


def _completed(frozen: Frozen, path: Path) -> Frozen:
    """Ties and layer kinds from the model; biases of zeros that the model does not have (AutoGPTQ's) left out."""
    model = _skeleton(frozen.config, path, len(frozen.weights) + len(frozen.floats))
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    shapes |= {name: tuple(b.shape) for name, b in model.named_buffers(remove_duplicate=False)}
    held = {*frozen.weights, *frozen.floats}
    ties = {alias: name for alias, name in tied.items() if alias not in held and name in held}
    floats = {n: t for n, t in frozen.floats.items() if n in shapes or not n.endswith(".bias") or bool(t.any())}
    kinds = {f"{n}.weight": type(m).__name__ for n, m in model.named_modules()}
    weights = {n: replace(w, kind=_kind(kinds.get(n, w.kind), w)) for n, w in frozen.weights.items()}
    own = set(model.state_dict())
    for name in sorted({*weights, *floats} - shapes.keys()):
        raise UserError(f"{path}: {type(model).__name__} has no parameter {name}, which the checkpoint has")
    for name in sorted(own - {*weights, *floats} - ties.keys()):
        raise UserError(f"{path}: {name} of {type(model).__name__} is missing from the checkpoint")
    for name, shape in ((n, t.shape) for part in (weights, floats) for n, t in part.items()):
        if tuple(shape) != shapes[name]:
            raise UserError(f"{path}: {name} has shape {tuple(shape)}; {type(model).__name__} has {shapes[name]}")
    return replace(frozen, weights=weights, floats=floats, ties=ties)


def _kind(said: str, w: FrozenWeight) -> str:
    """The class of the layer; a scaled or padded embedding is an Embedding to every target."""
    return w.kind if w.kind in ("Embedding", "Conv1D") else said


def fit(frozen: Frozen, target: str) -> tuple[Frozen, list[str]]:
    """(`frozen` with every weight on a grid that the target holds, what was moved, a line each kind of move).

    Raises UserError, with the target's reason and nearest grid, for a weight that no grid of it holds exactly.
    """
    module = target_module(target)
    moves: Counter[str] = Counter()
    weights: dict[str, FrozenWeight] = {}
    for name, w in frozen.weights.items():

        def refuse(spec: QuantSpec, name: str = name, w: FrozenWeight = w) -> str | None:
            return module.refuse(name, w.kind, w.shape, spec, frozen.config)

        def refuse_values(w: FrozenWeight, name: str = name) -> str | None:
            why = getattr(module, "refuse_values", None)
            return why and why(name, w, frozen)

        found = regrid(w, refuse, refuse_values)
        if found is None:
            raise UserError(
                f"export to {target}: {name} ({w.tensor.spec.label()}): {refuse(w.tensor.spec) or refuse_values(w)}. "
                "No grid of this target holds the same weights exactly"
            )
        if found is not w:
            moves[f"{w.tensor.spec.label()} as {found.tensor.spec.label()}"] += 1
        weights[name] = found
    said = [f"{count} weights of {what}, every value the same" for what, count in moves.items()]
    return replace(frozen, weights=weights), said
