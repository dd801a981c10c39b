"""A causal language model and its tokenizer from the hub, a Hugging Face folder, or an embedded model.

transformers only warns where weights are missing (and draws them at random) or where a tokenizer has no vocabulary
(and returns an empty one). Here both are errors.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from qat import hub
from qat.errors import UserError

EMBEDDED = {name: Path(__file__).parents[1] / "assets" / name for name in ("gpt2_mini", "llama_mini")}
EMBEDDED_CONTEXT = 256  # tokens they were trained on; their later positions are untrained
DTYPES = ("float32", "bfloat16", "float16", "auto")
SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # of what a model needs besides weights


class Loaded(NamedTuple):
    """`source` is where the weights came from (hub id and commit, folder, or an embedded model's name)."""

    model: Any
    tokenizer: Any
    source: str
    fallback: hub.Fallback | None

    @property
    def name(self) -> str:
        """The name that reports use."""
        return self.source


@dataclass(kw_only=True)
class Pretrained:
    """`model=` in a recipe: cheap to build; `load` does the work, with the options of the function `load`."""

    path: str | None
    name: str = "hf"
    dtype: str = "float32"
    device_map: Any = None
    offline: str = "error"
    explicit: bool = False
    trust_remote_code: bool = False

    def load(self, data: Any = None) -> Loaded:
        """The model and its tokenizer; `data` is of no use here."""
        return load(**vars(self))


def load(
    path: str | None,
    *,
    name: str = "gpt2",
    dtype: str = "float32",
    device_map: Any = None,
    offline: str = "error",
    explicit: bool = False,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load `path`, a folder or a hub id; None is the embedded model called `name`.

    `offline` says what an unreachable hub means: "error", or the embedded model to use, which never happens if the
    path is `explicit`. `dtype` and `device_map` go to transformers. Raises UserError.
    """
    if dtype not in DTYPES:
        raise UserError(f"model.dtype={dtype} is not possible; choose one of {', '.join(DTYPES)}")
    hub.check_offline(offline, EMBEDDED, "model")
    options = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
    if not path:
        if name not in EMBEDDED:
            raise UserError(f"model={name} needs model.path: a Hugging Face folder or a hub id")
        return Loaded(*_embedded(name, options), name, None)
    if (folder := local(path)) is not None:
        return Loaded(*_read(folder, str(folder), options), str(folder), None)

    def choose(names: list[str], card: dict[str, Any]) -> list[str]:
        return _choose(path, names, trust_remote_code)

    try:
        folder, _ = hub.fetch(path, "model", "model.path", choose)
    except hub.Unreachable as e:
        fallback = hub.stand_in(path, offline=offline, explicit=explicit, reason=str(e), key="model")
        return Loaded(*_embedded(fallback.used, options), fallback.used, fallback)
    return Loaded(*_read(folder, path, options), f"{path}@{folder.name}", None)


def local(path: str) -> Path | None:
    """The folder of a `path` on disk, None for a hub id. Raises UserError for what is neither."""
    folder = Path(path).expanduser()
    if not folder.exists() and not hub.is_id(path):
        raise UserError(f"model.path={path}: there is no such folder")
    return folder if folder.exists() else None


def away(repo: str, trust_remote_code: bool) -> str | None:
    """Why the model cannot be had from the hub or its cache; None if it can. Downloads nothing. Raises UserError."""
    return hub.away(repo, "model", "model.path", lambda names, card: _choose(repo, names, trust_remote_code))


def refuse_folder(folder: Path, label: str) -> dict[str, Any]:
    """config.json of a folder with weights to train. Raises UserError; needs no import of transformers or torch."""
    if not folder.is_dir():
        raise UserError(f"{label} is a file; model.path needs the folder around it")
    config = _json(folder / "config.json", label)
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "unknown method")
        raise UserError(f"{label} is already quantized ({method}); training needs the float model it was made from")
    _refuse_weights(folder, label)
    return config


def _embedded(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    if not (EMBEDDED[name] / "config.json").is_file():
        raise UserError(
            f"the embedded model (qat/assets/{name}) is missing from this installation; reinstall the package "
            "or give model.path"
        )
    return _read(EMBEDDED[name], f"the embedded {name}", options)


def _choose(repo: str, names: list[str], trust_remote_code: bool) -> list[str]:
    """The files to download: one set of weights, safetensors where there are any; code only if it may run."""
    for pattern in (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin"):
        if weights := [name for name in names if re.fullmatch(pattern, name)]:
            suffixes = (*SUFFIXES, ".py") if trust_remote_code else SUFFIXES
            return [name for name in names if name.endswith(suffixes) and "/" not in name] + weights
    raise UserError(f"{repo} holds no weights that transformers loads (model.safetensors, or its shards)")


def _refuse_weights(folder: Path, label: str) -> None:
    """Raise UserError unless the weight files of a folder are all there, each a whole file."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [folder / name]
        elif index.is_file():
            files = [folder / n for n in sorted(set(_json(index, label)["weight_map"].values()))]
        else:
            continue
        for file in files:
            if not file.is_file():
                raise UserError(f"{label} lacks {file.name}, which its index lists; copy or download the folder again")
            if file.suffix == ".safetensors":
                try:
                    with safe_open(file, "np"):
                        pass
                except SafetensorError as e:
                    raise UserError(
                        f"{label}: {file.name} is damaged or cut short ({e}); copy or download it again"
                    ) from e
        return
    raise UserError(f"{label} holds no weights: model.safetensors (or its shards and index) is missing")


def _json(file: Path, label: str) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{label}: {file.name} is missing or not valid JSON ({e})") from e


def _read(folder: Path, label: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer of a complete folder, nothing in them invented."""
    from transformers import CONFIG_MAPPING

    config = refuse_folder(folder, label)
    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING and not options["trust_remote_code"]:
        raise UserError(
            f"{label} runs its own Python code; read it, then add model.trust_remote_code=true if you trust it"
        )
    tokenizer = read_tokenizer(folder, label, options["trust_remote_code"])
    model = _model(folder, label, config, options)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"{label}: the tokenizer knows {len(tokenizer)} ids but the model embeds {rows}; they differ")
    return model, tokenizer


def _model(folder: Path, label: str, config: dict[str, Any], options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        # Mismatched sizes are let through here only to be named below.
        pair: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        kind = config.get("model_type", "none named")
        raise UserError(f"{label} (model type {kind}) cannot be loaded: {hub.first_line(e)}") from e
    model, found = pair
    lost = sorted(found["missing_keys"] | {key for key, *_ in found["mismatched_keys"]})
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(
            f"{label}: the weights lack {lost[0]}{more}, or have another shape than config.json asks for; "
            "is it a causal language model, and config.json its own?"
        )
    return model


def read_tokenizer(folder: Path, label: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder, whose messages call it `label`. Raises UserError if it is not complete."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, TypeError) as e:
        raise UserError(f"{label}: the tokenizer cannot be loaded ({hub.first_line(e)})") from e
    names = set(type(tokenizer).vocab_files_names.values())
    if names and not any((folder / name).is_file() for name in names | {"tokenizer.json"}):
        raise UserError(f"{label} has no tokenizer: tokenizer.json is missing; copy it from the model's original")
    return tokenizer
