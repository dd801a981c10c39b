"""Why a row of the parity table misses a bound: causes that were traced, and the one that a run can measure itself."""

import copy
from dataclasses import replace
from typing import Any

from parity_table import FLOAT, SHARE
from torch import Tensor, nn

NOISE = "the median is within the bound of float activations, 2e-6, but above the float64 spread"
LAST_BIT = "about half of the prompts flip a code, so the median is chance; the simulation is further from itself"
CAUSES = {
    "gguf": "llama.cpp rounds activations to 8 bits; this scheme trains none",
    "hf": "transformers divides tokens by max / 127.5, vLLM (which the scheme simulates) by max / 127",
    "awq": "gptqmodel multiplies code and scale in float16",
    "gptq": "gptqmodel multiplies code and scale in float16",
}
TRACED = {
    ("portable_int4", "gguf"),
    ("portable_int8", "gguf"),
    ("vllm_w8a8", "hf"),
    ("awq_int4", "awq"),
    ("gptq_int4", "gptq"),
    ("gptq_int4_asymmetric", "gptq"),
    ("gptq_int8", "gptq"),
}


def as_transformers(net: Any, target: str, runtime: str) -> nn.Module | None:
    """The simulation with the formula by which transformers rounds tokens in place of vLLM's, where a target asks
    for vLLM's and its folder is run in transformers; None elsewhere."""
    if runtime != "transformers_folder" or target != "vllm_w8a8":
        return None
    other = copy.deepcopy(net)
    for module in other.modules():
        if (taken := getattr(module, "input_quantizer", None)) is not None:
            taken.spec = replace(taken.spec, range="absmax_half", divide="stored")
    return other


def cause(target: str, exporter: str, missed: str, theirs: Tensor | None, error: Tensor, widest: float) -> str:
    """The cell of a row; empty where nothing is missed.

    theirs: errors [prompts] of `as_transformers`. error: those of the simulation; widest: its widest spread.
    """
    if missed == "none":
        return ""
    if (target, exporter) in TRACED and (exporter != "hf" or theirs is not None):
        figure = "" if theirs is None else f"; with that formula simulated the largest error is {theirs.max():.1e}"
        return CAUSES[exporter] + figure
    if missed == "**logits**" and float((error <= FLOAT).float().mean()) >= SHARE and float(error.median()) <= FLOAT:
        return NOISE
    within = float((error <= FLOAT).float().mean()) >= SHARE and float(error.median()) <= widest
    return LAST_BIT if missed == "**logits**" and within else "not traced"
