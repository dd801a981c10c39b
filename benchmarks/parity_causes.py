"""Why a row of the parity table misses a bound: causes that were traced, and those that a run can measure itself."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from machine import has_vnni, info
from parity_table import FLOAT, SHARE
from torch import Tensor, nn

from qat.modules.base import QuantLayer

NOISE = "the median is within the bound of float activations, 2e-6, but above the float64 spread"
LAST_BIT = "about half of the prompts flip a code, so the median is chance; the simulation is further from itself"
CAUSES = {  # by exporter
    "gguf": "llama.cpp rounds activations to 8 bits; this scheme trains none",
    **dict.fromkeys(("awq", "gptq", "gptq_v1"), "gptqmodel multiplies code and scale in float16"),
}
FORMULA = "transformers divides tokens by max / 127.5, vLLM (which the scheme simulates) by max / 127"
UNSIGNED = "onnxruntime multiplies unsigned codes and takes zero points off in float32, whose last bits flip codes"
SATURATED = "vLLM's int8 kernel (oneDNN) saturates the sum of two products at 16 bits where a processor has no VNNI"
TRACED = ("portable_int4", "portable_int8")  # of gguf, the targets whose scheme trains no activations


def as_transformers(net: Any) -> nn.Module:
    """The simulation with the formula by which transformers rounds tokens in place of vLLM's."""
    other = copy.deepcopy(net)
    for module in other.modules():
        if (taken := getattr(module, "input_quantizer", None)) is not None:
            taken.spec = replace(taken.spec, range="absmax_half", divide="stored")
    return other


def saturating(net: Any) -> nn.Module:
    """The simulation with `saturating_linear` wherever inputs are quantized."""
    other = copy.deepcopy(net)
    for module in other.modules():
        if isinstance(module, QuantLayer) and module.input_quantizer is not None:
            module.forward = partial(saturating_linear, module)
    return other


@torch.no_grad()
def saturating_linear(layer: QuantLayer, x: Tensor) -> Tensor:
    """x (..., in) -> (..., out) by int8 codes without zero points, as x86 has it without VNNI: inputs are shifted by
    128, and the products of two neighbours added in 16 bits (vpmaddubsw)."""
    assert layer.input_quantizer is not None
    assert layer.weight_quantizer is not None
    given = layer.input_quantizer.quantize(x.reshape(-1, x.shape[-1]))
    weight = layer.weight_quantizer.quantize(layer.weight)
    codes = weight.codes.int()
    products = (given.codes.int() + 128)[:, None] * codes  # [rows, out, in]
    pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
    out = (pairs.sum(-1) - 128 * codes.sum(-1)).float() * given.scale * weight.scale.float().t()
    out = out if layer.bias is None else out + layer.bias
    return out.reshape(*x.shape[:-1], -1)


def unsigned(net: Any) -> nn.Module:
    """The simulation with `unsigned_linear` wherever inputs are quantized."""
    other = copy.deepcopy(net)
    for module in other.modules():
        if (
            isinstance(module, QuantLayer)
            and module.input_quantizer is not None
            and module.weight_quantizer is not None
        ):
            module.forward = partial(unsigned_linear, module)
    return other


@torch.no_grad()
def unsigned_linear(layer: QuantLayer, x: Tensor) -> Tensor:
    """x (..., in) -> (..., out) as MatMulNBits at level 4 sums it: block by block the exact product of the codes, those
    of the weight counted from 0 up, and then, in float32, each block's zero point times the sum of its inputs off."""
    assert layer.input_quantizer is not None
    assert layer.weight_quantizer is not None
    given = layer.input_quantizer.quantize(x.reshape(-1, x.shape[-1]))
    weight = layer.weight_quantizer.quantize(layer.canonical(layer.weight))
    rows, blocks = given.scale.shape
    a = given.codes.double().view(rows, blocks, -1)
    shift = 0 if weight.spec.type.qmin == 0 else 2 ** (weight.spec.type.bits - 1)  # as the exporter stores them
    w = weight.codes.double().view(len(weight.codes), blocks, -1) + shift
    zero = (torch.zeros_like(weight.scale) if weight.offset is None else weight.offset).float() + shift
    out = torch.zeros(rows, len(w))
    for i in range(blocks):
        scales = given.scale[:, i, None].float() * weight.scale[:, i].float()
        out = (out.double() + (a[:, i] @ w[:, i].t()) * scales.double()).float()
    out = out - (a.sum(-1).float() * given.scale.float()) @ (zero * weight.scale.float()).t()
    return (out if layer.bias is None else out + layer.bias).reshape(*x.shape[:-1], -1)


def known(target: str, runtime: str) -> tuple[Callable[[Any], nn.Module], str] | None:
    """What the runtime of a target is known to compute otherwise than the scheme: how to simulate that, and what it
    is; None where there is nothing."""
    if target.split("@")[0] == "onnxruntime_int4" and runtime == "ort":
        return unsigned, UNSIGNED
    if target == "vllm_w8a8" and runtime == "transformers_folder":
        return as_transformers, FORMULA
    if target in ("vllm_w8a8", "vllm_w8a8_static") and runtime == "vllm" and not has_vnni(info()):
        return saturating, SATURATED
    return None


def cause(
    target: str,
    exporter: str,
    missed: str,
    simulated: tuple[str, Tensor, Tensor] | None,
    error: Tensor,
    widest: float,
    turned: str = "",
    perplexities: str = "",
) -> str:
    """The cell of a row; empty where nothing is missed.

    simulated: what `known` says, the errors [prompts] with that, and how far that is from the scheme. error: those of
    the scheme; widest: its widest spread. turned: what `greedy` found of the step at which texts part;
    perplexities: where those of other evaluations lie.
    """
    if missed == "none":
        return ""
    if simulated is not None:
        what, left, moved = simulated
        if what != UNSIGNED:
            return (
                f"{what}; with that simulated the median error is {left.median():.1e}, {within(left):.0%} within 2e-6"
            )
        # the order of its sums is not known, so such a simulation is no nearer: but is it as far from the scheme's?
        if missed == "**logits**" and within(moved) <= within(error):
            return (
                f"{what}; a simulation that does so too has {within(moved):.0%} of the prompts within 2e-6 of this one"
            )
    if exporter in CAUSES and (exporter != "gguf" or target in TRACED):
        return CAUSES[exporter]
    median = float(error.median()) if within(error) >= SHARE else torch.inf
    why = {
        "**logits**": NOISE if median <= FLOAT else LAST_BIT if median <= widest else "",
        "**greedy**": turned,
        "**perplexity**": perplexities,
    }
    found = {what: why.get(what, "") for what in missed.split(", ")}
    if not any(found.values()):
        return "not traced"
    return "; ".join(said or f"{what.strip('*')} not traced" for what, said in found.items())


def within(error: Tensor) -> float:
    """The share of prompts that are within the bound of float activations."""
    return float((error <= FLOAT).float().mean())
