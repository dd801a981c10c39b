"""What GGUF export must know of a model family: tensors, row order, metadata, and what llama.cpp does not compute.

The defaults are those of a Llama-like decoder. A family is an instance of `Family`, or of a subclass with what differs;
an override without a docstring keeps the promise that stands here. To be checked against llama.cpp's llama-model.cpp
(what it reads and computes) and convert_hf_to_gguf.py (row orders), and transformers' configuration and modeling files.
Methods that take a config raise KeyError for a key that every config.json of the family has.
"""

from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from torch import Tensor

from qat.errors import UserError

Config = dict[str, Any]

ATTENTION = tuple(f"self_attn.{m}" for m in ("q_proj", "k_proj", "v_proj", "o_proj"))
GATED_MLP = tuple(f"mlp.{m}" for m in ("gate_proj", "up_proj", "down_proj"))
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")  # one formula; llama.cpp has it as a table of float16


@dataclass(frozen=True)
class Family:
    """arch: llama.cpp's name. layer: modules of one layer, under `layers`. activations, ropes: those that llama.cpp
    computes for it. tied: whether llama.cpp takes the head from the embedding; None where it knows both."""

    arch: MODEL_ARCH
    layer: tuple[str, ...]
    activations: tuple[str, ...] = ("silu",)
    ropes: tuple[str, ...] = ("default", "linear")
    partial_rotary: bool = False
    tied: bool | None = None
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    top: tuple[str, ...] = ("model.norm",)

    def n_layers(self, config: Config) -> int:
        """How many decoder layers the model has."""
        return config["num_hidden_layers"]

    def modules(self, layers: int) -> list[str]:
        """Every module that may have a weight or a bias."""
        inside = (f"{self.layers}.{i}.{m}" for i in range(layers) for m in self.layer)
        return [self.embedding, *self.top, self.head, *inside]

    def head_dim(self, config: Config) -> int:
        """The width of one attention head."""
        return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]

    def rotary_dim(self, config: Config) -> int:
        """How many of a head's dimensions are rotated, from the first on."""
        return int(self.head_dim(config) * self.rope(config).get("partial_rotary_factor", 1.0))

    def rope(self, config: Config) -> dict[str, Any]:
        """transformers 5 keeps everything in rope_parameters; older configs have rope_theta and rope_scaling."""
        rope = {"rope_theta": config.get("rope_theta", 10000.0)}
        rope |= {k: config[k] for k in ("partial_rotary_factor",) if config.get(k) is not None}
        rope |= config.get("rope_scaling") or {}
        rope |= config.get("rope_parameters") or {}
        return {**rope, "rope_type": rope.get("rope_type") or rope.get("type") or "default"}

    def refuse(self, config: Config) -> str | None:
        """Why llama.cpp cannot compute this model; None if it can."""
        kind = config["model_type"]
        if why := self.refuse_activation(config):
            return why
        rope = self.rope(config)
        if rope["rope_type"] not in self.ropes:
            return f"GGUF export does not know rope type {rope['rope_type']} for {kind}"
        if not self.partial_rotary and rope.get("partial_rotary_factor", 1.0) != 1.0:
            return f"GGUF export does not know partial rotary embeddings for {kind}"
        tied = config.get("tie_word_embeddings")
        if self.tied is not None and tied is not None and tied != self.tied:
            form = "takes the head from the embedding" if self.tied else "wants a head of its own"
            return f"llama.cpp's {kind} {form}; set tie_word_embeddings to {str(self.tied).lower()}"
        return None

    def refuse_activation(self, config: Config) -> str | None:
        """Why llama.cpp computes another activation than the model; None if it is one of `activations`."""
        keys = ("activation_function", "hidden_activation", "hidden_act")
        asked = next((config[key] for key in keys if config.get(key)), self.activations[0])
        if asked in self.activations:
            return None
        why = f"llama.cpp's {config['model_type']} computes {self.activations[0]}, not {asked}"
        if asked == "gelu" and self.activations == TANH_GELU:
            why += "; train with that (gelu: float16_table in a scheme, as scheme=llama_q4_0 has it)"
        return why

    def ignored_window(self, config: Config) -> int | None:
        """The sliding window of the model, where llama.cpp attends to everything instead."""
        return config.get("sliding_window")

    def text_limit(self, config: Config) -> tuple[int, str] | None:
        """The most tokens that llama.cpp computes as trained, and why; None if there is no limit."""
        window = self.ignored_window(config)
        why = f"llama.cpp computes this model without its sliding window of {window} tokens"
        return (window, why) if window else None

    def context(self, config: Config) -> int:
        """The context length that the file names: what llama.cpp computes as trained."""
        return min(config["max_position_embeddings"], self.ignored_window(config) or config["max_position_embeddings"])

    def row_order(self, name: str, config: Config) -> Tensor | None:
        """The Hugging Face row behind each GGUF row of this parameter (int64 [out]); None if the order is the same."""
        return None

    def stored(self, name: str, value: Tensor) -> Tensor:
        """What the file holds of an unquantized parameter: same shape and dtype, rows in the order of Hugging Face."""
        return value

    def restored(self, name: str, value: Tensor) -> Tensor:
        """A parameter from what the file holds: `stored` of it is that again, bit for bit."""
        return value

    def extra_tensors(self, config: Config) -> dict[str, Tensor]:
        """Tensors that llama.cpp wants and transformers computes, by GGUF name: float32 [rotated dimensions / 2]."""
        return {}

    def write_metadata(self, w: GGUFWriter, config: Config) -> None:
        """The hyperparameters that llama.cpp needs, under their GGUF names."""
        rope = self.rope(config)
        w.add_context_length(self.context(config))
        w.add_embedding_length(config["hidden_size"])
        w.add_feed_forward_length(config["intermediate_size"])
        w.add_head_count(config["num_attention_heads"])
        w.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
        w.add_key_length(self.head_dim(config))
        w.add_value_length(self.head_dim(config))
        if "rms_norm_eps" in config:
            w.add_layer_norm_rms_eps(config["rms_norm_eps"])
        else:
            w.add_layer_norm_eps(config["layer_norm_eps"])
        w.add_rope_dimension_count(self.rotary_dim(config))
        w.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] in ("linear", "yarn"):
            w.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
            w.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])

    def read_config(self, get: dict[str, Any]) -> Config:
        """Metadata without the architecture's prefix -> the part of config.json that it holds.

        Raises KeyError where a key is missing for which llama.cpp has no default.
        """
        rms = "attention.layer_norm_rms_epsilon"
        norm = {"rms_norm_eps": get[rms]} if rms in get else {"layer_norm_eps": get["attention.layer_norm_epsilon"]}
        heads = get["attention.head_count"]
        return {
            "num_hidden_layers": get["block_count"],
            "hidden_size": get["embedding_length"],
            "num_attention_heads": heads,
            "num_key_value_heads": get.get("attention.head_count_kv", heads),  # these have llama.cpp's defaults
            "head_dim": get.get("attention.key_length", get["embedding_length"] // heads),
            "max_position_embeddings": get["context_length"],
            "intermediate_size": get["feed_forward_length"],
            **norm,
            "rope_theta": get.get("rope.freq_base", 10000.0),
        }

    def read_rope(self, get: dict[str, Any], derived: dict[str, Tensor]) -> dict[str, Any]:
        """rope_parameters from the metadata without its prefix and the tensors that `extra_tensors` has.

        Raises UserError for a kind of rotary positions that config.json cannot be told exactly.
        """
        known = {"type", "factor", "original_context_length", "finetuned"}
        said = {k.removeprefix("rope.scaling."): v for k, v in get.items() if k.startswith("rope.scaling.")}
        said = {"factor": get.get("rope.scale_linear", 1.0), **said}  # the name before there was more than one kind
        kind = said.get("type", "linear")
        odd = sorted(said.keys() - known) or sorted(derived) or [kind] * (kind not in ("none", "linear", "yarn"))
        if odd:
            raise UserError(f"the file's rotary positions ({odd[0]}) are of a kind that cannot be carried over exactly")
        rope = {"rope_type": "default", "rope_theta": get.get("rope.freq_base", 10000.0)}
        if kind != "none" and said["factor"] not in (0.0, 1.0):
            rope |= {"rope_type": kind, "factor": said["factor"]}
            if kind == "yarn":
                rope["original_max_position_embeddings"] = said.get("original_context_length", get["context_length"])
        width = get.get("attention.key_length", get["embedding_length"] // get["attention.head_count"])
        part = get.get("rope.dimension_count", width) / width
        if part != 1.0 and not self.partial_rotary:
            raise UserError(f"the file rotates {part:g} of each head, which this model's config.json cannot say")
        return {**rope, "partial_rotary_factor": part} if self.partial_rotary else rope
