"""What quantization does to each layer of a prepared model: signal over noise, and how many weights are clipped."""

import math
from typing import TypedDict

import torch
from torch import nn

from qat.affine import tile
from qat.modules.base import QuantLayer
from qat.scheme import bits_per_weight


class LayerStats(TypedDict):
    """name: the parameter. sqnr_db: power of the float weight over the power of its error. clip_rate: share of weights
    more than half a step outside the codes. bits: stored bits a weight. scheme: the grid."""

    name: str
    sqnr_db: float
    clip_rate: float
    bits: float
    scheme: str


@torch.no_grad()
def layer_stats(model: nn.Module) -> list[LayerStats]:
    """One entry for each quantized weight, tied ones once, in model order; an exact layer is given as 200 dB."""
    out: list[LayerStats] = []
    seen: set[int] = set()
    for path, layer in model.named_modules():
        if not isinstance(layer, QuantLayer) or layer.weight_quantizer is None or id(layer.weight) in seen:
            continue
        seen.add(id(layer.weight))
        quantizer, spec = layer.weight_quantizer, layer.weight_quantizer.spec
        w = layer.canonical(layer.weight).float()
        qparams = quantizer.qparams(w)
        error = quantizer.dequantized(w) - w
        steps = tile(w, spec.block) / qparams.scale.float()[..., None, None]
        if spec.offset == "zero_point" and qparams.offset is not None:
            steps = steps + qparams.offset.float()[..., None, None]
        elif qparams.offset is not None:
            steps = steps - (qparams.offset.float() / qparams.scale.float())[..., None, None]
        clipped = (steps > spec.type.qmax + 0.5) | (steps < spec.type.qmin - 0.5)
        noise = float(error.double().square().sum())
        signal = float(w.double().square().sum())
        out.append(
            {
                "name": f"{path}.weight",
                "sqnr_db": 10 * math.log10(signal / noise) if noise and signal else 200.0,
                "clip_rate": float(clipped.double().mean()),
                "bits": bits_per_weight(spec, (w.shape[0], w.shape[1])),
                "scheme": spec.label(),
            }
        )
    return out
