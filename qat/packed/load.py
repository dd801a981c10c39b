"""`qat.load`: a quantized model with its weights as packed integers in memory, from a folder, a run or a Frozen.

The model is built without storage, then every tensor is read straight into its packed layer; a float copy of the
weights exists at no time. `pack` puts the same layers into any float nn.Module that is at hand.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qat.errors import UserError, VerifyError, understood
from qat.exporters.compressed_tensors_read import our_name, ours
from qat.exporters.hf import packed_tensors, quantization
from qat.exporters.hf_folder import float_dtype, weight_files
from qat.exporters.hf_layout import describe
from qat.frozen import Frozen
from qat.modules.numerics import use_noted
from qat.packed.replace import replace_layers, tie_layers


def load(path: Path | str | Frozen, *, kernel: str = "exact", dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model at `path`: a Hugging Face folder (quant_method "qat" or "compressed-tensors"), a run, a
    frozen folder, or a Frozen itself. It runs and generates as usual, and is for inference.

    kernel: "exact" computes bit for bit what the fake-quantized model did; "fast" uses torch's int4 and int8 kernels
    where they fit (see fast.py) and logs how far that is from exact. dtype: of everything that is not quantized.
    Raises UserError for something that cannot be loaded, VerifyError for a damaged file.
    """
    if kernel not in ("exact", "fast"):
        raise UserError(f"kernel is {kernel!r}; it must be 'exact' or 'fast'")
    if not dtype.is_floating_point:
        raise UserError(f"dtype is {dtype}; it must be a floating-point dtype: the weights stay packed integers anyway")
    with _source(path) as (config, described, tensors, folder):
        try:
            model = _build(config, described, tensors, folder, dtype)
        except Exception as e:  # transformers and its validators have many kinds
            if folder is None or isinstance(e, UserError | VerifyError):
                raise
            why = f"{type(e).__name__}: {e}".splitlines()[0]
            raise VerifyError(f"transformers cannot build the model of {folder / 'config.json'} ({why})") from e
    if kernel == "fast":
        from qat.packed.fast import speed_up

        speed_up(model)
    return model


def pack(model: nn.Module, frozen: Frozen) -> nn.Module:
    """Put the packed weights of `frozen` into a float `model` of the same architecture, in place; returns the model.

    Unquantized parameters are loaded too. Raises UserError if the two do not fit.
    """
    described = describe(frozen)
    replace_layers(model, described)
    dtype = float_dtype(frozen)
    try:
        left = model.to(dtype).load_state_dict(_packed(frozen), strict=False, assign=True)
    except RuntimeError as e:
        raise UserError(f"the model is not the one that was frozen: {e}") from e
    tie_layers(model, described)
    missing = [n for n in left.missing_keys if n not in frozen.ties]
    if missing or left.unexpected_keys:
        name = (missing + left.unexpected_keys)[0]
        raise UserError(f"the model is not the one that was frozen: {name} is in only one of the two")
    use_noted(model, frozen.config)
    return model.eval()


def _packed(frozen: Frozen) -> dict[str, Tensor]:
    return {name: make() for name, make in packed_tensors(frozen, plain=False)}


@contextmanager
def _source(path: Path | str | Frozen) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any], Path | None]]:
    """(config, quantization, name -> tensor or a slice yet to be read, folder) of anything `load` takes."""
    if not isinstance(path, Frozen):
        path = Path(path).expanduser()
        if (path / "frozen").is_dir():
            path = Frozen.load(path / "frozen")
        elif (path / "frozen.json").is_file():
            path = Frozen.load(path)
        elif not (path / "config.json").is_file():
            raise UserError(f"{path} is no run, no frozen folder and no Hugging Face folder; give one of these")
    if isinstance(path, Frozen):
        yield path.config, describe(path), _packed(path), None
        return
    config, described = quantization(path)
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for file in weight_files(path):
            try:
                f = stack.enter_context(safe_open(file, "pt"))
            except SafetensorError as e:
                raise VerifyError(f"{file} cannot be read: {e}") from e
            with understood(path / "config.json"):
                tensors |= {name: _lazy(f, key, name, described) for key in f.keys() if (name := our_name(key))}  # noqa: SIM118
        yield config, described, tensors, path


def _lazy(file: Any, key: str, name: str, described: dict[str, Any]) -> Any:
    """A slice yet to be read, or the tensor where it is stored in another form than packed layers have."""
    piece = file.get_slice(key)
    return ours(name, file.get_tensor(key), described) if piece.get_dtype() == "I8" or "_scale" in name else piece


def _build(
    config: dict[str, Any], described: dict[str, Any], tensors: dict[str, Any], folder: Path | None, dtype: torch.dtype
) -> Any:
    import transformers

    import qat.hf_plugin  # the quantizer behind `quantization_config`

    qat.hf_plugin.install()
    if not config.get("model_type"):
        raise UserError("this is not a transformers model; build its float model and use qat.packed.load.pack on it")
    loaded = transformers.AutoConfig.for_model(**config, quantization_config=described)
    names = config.get("architectures") or [None]
    cls: Any = getattr(transformers, names[0] or "", None)
    if cls is None:
        cls = transformers.AutoModelForCausalLM._model_mapping[type(loaded)]
    generation = folder / "generation_config.json" if folder else None
    if generation is not None and generation.is_file():
        settings = transformers.GenerationConfig.from_dict(json.loads(generation.read_text(encoding="utf-8")))
    else:
        settings = None
    model, info = cls.from_pretrained(
        None, config=loaded, state_dict=tensors, dtype=dtype, generation_config=settings, output_loading_info=True
    )
    wrong = [*info["missing_keys"], *(k[0] for k in info["mismatched_keys"]), *info["unexpected_keys"]]
    if wrong:
        raise VerifyError(
            f"{cls.__name__} does not fit the file: {sorted(wrong)[0]} is missing, superfluous or misshapen"
        )
    return model
