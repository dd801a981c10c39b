"""Which models GGUF export knows: Hugging Face <-> GGUF tensor names and metadata, from the files of gguf_families."""

from functools import cache
from typing import Any

from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from torch import Tensor

from qat.exporters.gguf_families import gemma, gpt2, gpt_neox, llama, phi
from qat.exporters.gguf_families.base import Config, Family

# model_type of config.json -> family
FAMILIES: dict[str, Family] = {
    **gpt2.FAMILIES,
    **llama.FAMILIES,
    **gemma.FAMILIES,
    **phi.FAMILIES,
    **gpt_neox.FAMILIES,
}
MODEL_TYPE = "qat.model_type"  # ours: to llama.cpp a Mistral is a Llama
KV_CACHE = "qat.kv_cache"  # ours: the cache that training simulated, if any
MODEL_TYPES = {MODEL_ARCH_NAMES[f.arch]: name for name, f in reversed(FAMILIES.items())}
# tensors of `extra_tensors`, which a reader leaves out
DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@cache
def names(model_type: str, layers: int) -> dict[str, str]:
    """Hugging Face parameter name -> GGUF tensor name, for every parameter the family can have."""
    family = FAMILIES[model_type]
    table = get_tensor_name_map(family.arch, layers)
    found = {m: table.get_name(m) for m in family.modules(layers)}
    return {f"{m}.{kind}": f"{to}.{kind}" for m, to in found.items() if to for kind in ("weight", "bias")}


def refuse_model(config: Config) -> str | None:
    """Why llama.cpp cannot compute this model; None if it can."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        return f"GGUF export knows {', '.join(FAMILIES)}, not {kind}; use the hf target"
    return FAMILIES[kind].refuse(config)


def same_model(a: str | None, b: str | None) -> bool:
    """Whether llama.cpp tells two model types apart: it has one name, and one computation, for Llama and Mistral."""
    return a == b or (a in FAMILIES and FAMILIES[a] is FAMILIES.get(b or ""))


def refuse_text(tokens: int, config: Config) -> str | None:
    """Why llama.cpp cannot score texts of so many tokens as trained; None if it can."""
    family = FAMILIES.get(config.get("model_type", ""))
    limit = family.text_limit(config) if family else None
    if not limit or tokens <= limit[0]:
        return None
    return f"{limit[1]}, so texts must stay inside it; give data.block_size={limit[0]} or less"


def write_metadata(w: GGUFWriter, config: Config) -> None:
    """The hyperparameters that llama.cpp needs, under their GGUF names."""
    family = FAMILIES[config["model_type"]]
    w.add_string(MODEL_TYPE, config["model_type"])
    if config.get("kv_cache"):
        w.add_string(KV_CACHE, config["kv_cache"])
    w.add_block_count(family.n_layers(config))
    family.write_metadata(w, config)


def read_config(fields: dict[str, Any]) -> Config:
    """Metadata of a GGUF file -> the part of config.json that it holds. Raises KeyError where some is missing."""
    arch = fields["general.architecture"]
    model_type = fields.get(MODEL_TYPE, MODEL_TYPES[arch])
    get = {k.removeprefix(f"{arch}."): v for k, v in fields.items() if k.startswith(f"{arch}.")}
    return {"model_type": model_type, **FAMILIES[model_type].read_config(get)}


def read_rope(fields: dict[str, Any], derived: dict[str, Tensor]) -> dict[str, Any]:
    """Metadata and the tensors of DERIVED -> rope_parameters of config.json; nothing for learned positions.

    Raises UserError for rotary positions that config.json cannot be told exactly.
    """
    arch = fields["general.architecture"]
    if arch == MODEL_ARCH_NAMES[FAMILIES["gpt2"].arch]:
        return {}
    family = FAMILIES[fields.get(MODEL_TYPE, MODEL_TYPES[arch])]
    return family.read_rope({k.removeprefix(f"{arch}."): v for k, v in fields.items()}, derived)
