"""Layers that train with fake-quantized weights and inputs, one file each.

To add one: a file with the layer, and a line below. Keys are the float class's full name, matched exactly (a
subclass may not call our forward), and spelled as strings so that importing this costs no transformers import.
"""

from importlib import import_module

from torch import nn

_SCALED = "qat.modules.scaled_embedding.QuantScaledEmbedding"
LAYERS = {
    "torch.nn.modules.linear.Linear": "qat.modules.linear.QuantLinear",
    "torch.nn.modules.sparse.Embedding": "qat.modules.embedding.QuantEmbedding",
    "transformers.models.gemma.modeling_gemma.GemmaTextScaledWordEmbedding": _SCALED,
    "transformers.models.gemma2.modeling_gemma2.Gemma2TextScaledWordEmbedding": _SCALED,
    "transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding": _SCALED,
    "torch.nn.modules.conv.Conv2d": "qat.modules.conv2d.QuantConv2d",
    "transformers.pytorch_utils.Conv1D": "qat.modules.conv1d.QuantConv1D",
}


def full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def kind(module: nn.Module) -> str:
    """The name of its class, as rules match it; every embedding that has a layer here is an Embedding."""
    stands_in = LAYERS.get(full_name(module), "")
    return "Embedding" if stands_in.endswith("Embedding") else type(module).__name__


def quantized_class(module: nn.Module) -> type[nn.Module]:
    """The training layer that stands in for `module`, whose full name must be in LAYERS."""
    file, _, name = LAYERS[full_name(module)].rpartition(".")
    return getattr(import_module(file), name)
