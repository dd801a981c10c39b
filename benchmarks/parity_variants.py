"""What benchmarks/parity.py puts on a model by a target's name: schemes of configs/target, and variants of these.

A variant, such as `mlx@2bit`, is the scheme of the target before the @ with another grid of its linears, or another
exporter. Formats hold more grids than there are targets; these are the ones that the exporters' tests write as well.
Each is measured on two models only: the embedded one that its target takes, and one random Llama.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from hydra.utils import instantiate
from omegaconf import OmegaConf
from parity_subjects import RANDOM

from qat.models.load import EMBEDDED
from qat.recipes import CONFIGS
from qat.scheme import QuantSpec, Rule

GPT2_MINI = ("gguf", "mlx", "onnx")  # exporters whose variants are put on it; the others, on llama_mini


class Variant(NamedTuple):
    """The exporter, and what it does to the grid of the target's linears."""

    exporter: str
    change: Callable[[QuantSpec], QuantSpec]


def grid(exporter: str, **changes: Any) -> Variant:
    """These fields of the grid otherwise."""
    return Variant(exporter, lambda spec: replace(spec, **changes))


ZERO: dict[str, Any] = {"range": "minmax", "offset": "zero_point"}
VARIANTS = {
    "awq_int4@symmetric": grid("awq", range="absmax", offset=None),
    "executorch@g64": grid("executorch", block=(1, 64)),
    "gptq_int4@v1": grid("gptq_v1"),
    "gptq_int4@2bit": grid("gptq", qtype="int2", block=(1, 32), **ZERO),
    "gptq_int4_asymmetric@v1": grid("gptq_v1"),
    "gptq_int8@g128": grid("gptq", block=(1, 128)),
    "llama_cpp_q4_1@q5_1": grid("gguf", qtype="uint5"),
    "llama_cpp_q4_k@q5_k": grid("gguf", qtype="uint5"),
    **{f"mlx@{bits}bit": grid("mlx", qtype=f"uint{bits}") for bits in (2, 3, 5, 6, 8)},
    "mlx@symmetric": grid("mlx", qtype="int4", range="absmax", offset=None),
    "mlx@g32": grid("mlx", block=(1, 32)),
    "mlx@g128": grid("mlx", block=(1, 128)),
    "onnxruntime_int4@2bit": grid("onnx", qtype="int2", range="absmax_half"),
    "onnxruntime_int4@ternary": grid("onnx", qtype="ternary", range="absmax_half"),
    "onnxruntime_int4@8bit": grid("onnx", qtype="int8", range="absmax"),
    "onnxruntime_int4@asymmetric": grid("onnx", **ZERO),
    "onnxruntime_int4_float@2bit": grid("onnx", qtype="int2", range="absmax_half"),
    "onnxruntime_int4_float@2bit_asymmetric": grid("onnx", qtype="uint2", **ZERO),
    "onnxruntime_int4_float@8bit": grid("onnx", qtype="int8", range="absmax"),
    "onnxruntime_int4_float@8bit_asymmetric": grid("onnx", qtype="uint8", **ZERO),
    "onnxruntime_int4_float@asymmetric": grid("onnx", **ZERO),
    "torchao_8da4w@asymmetric": grid("torchao", **ZERO),
    **{f"torchao_int4@{bits}bit": grid("torchao", qtype=f"int{bits}") for bits in (2, 3, 5, 6, 7, 8)},
    "torchao_int4@asymmetric": grid("torchao", **ZERO),
    "transformers@3bit": grid("hf", qtype="int3"),
    "transformers_w8a16@g32": grid("hf", block=(1, 32)),
    "vllm_w4a16_asymmetric@8bit": grid("hf", qtype="int8"),
    "vllm_w4a8@channel": grid("hf", block=(1, -1)),
}


def exports() -> list[tuple[str, str]]:
    """(target, exporter) of every row's first two cells: each file of configs/target that exports a language model,
    its variants after it."""
    found: list[tuple[str, str]] = []
    for file in sorted((CONFIGS / "target").glob("*.yaml")):
        config: Any = OmegaConf.load(file)
        found += [(file.stem, name) for name in config.export]
        found += [(key, v.exporter) for key, v in VARIANTS.items() if key.partition("@")[0] == file.stem]
    return found


def models(target: str, exporter: str) -> list[str]:
    """The names of the subjects that it is put on."""
    if target not in VARIANTS:
        return [*EMBEDDED, *RANDOM]
    return ["gpt2_mini" if exporter in GPT2_MINI else "llama_mini", "random Llama, float32"]


def scheme_of(target: str) -> dict[str, Any]:
    """`rules`, and what else training simulates, as keywords of `qat.prepare`."""
    base = target.partition("@")[0]
    composed: Any = OmegaConf.load(CONFIGS / "target" / f"{base}.yaml")
    name = next(d["override /scheme"] for d in composed.defaults if "override /scheme" in d)
    scheme = instantiate(OmegaConf.load(CONFIGS / "scheme" / f"{name}.yaml"), _convert_="all")
    scheme = {**scheme, **composed.get("scheme", {})}
    if target in VARIANTS:
        scheme["rules"] = changed(scheme["rules"], VARIANTS[target].change)
    return scheme


def changed(rules: list[Rule], change: Callable[[QuantSpec], QuantSpec]) -> list[Rule]:
    """The rules with another grid of the linears, which the last one gives, wherever else it is used too: MLX has the
    embedding on it."""
    last = rules[-1].scheme
    assert last is not None
    assert last.weight is not None
    new = change(last.weight)
    return [
        replace(r, scheme=replace(r.scheme, weight=new)) if r.scheme and r.scheme.weight == last.weight else r
        for r in rules
    ]
