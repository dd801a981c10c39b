"""Layers that hold real packed integers, one file each, and what loads a model into them.

To add one: a file with the layer, and a line below. Keys are the float class's name.
"""

LAYERS = {
    "Linear": "qat.packed.linear.PackedLinear",
    "Conv1D": "qat.packed.linear.PackedLinear",
    "Embedding": "qat.packed.embedding.PackedEmbedding",
    "GemmaTextScaledWordEmbedding": "qat.packed.embedding.PackedScaledEmbedding",
    "Gemma2TextScaledWordEmbedding": "qat.packed.embedding.PackedScaledEmbedding",
    "Gemma3TextScaledWordEmbedding": "qat.packed.embedding.PackedScaledEmbedding",
    "Conv2d": "qat.packed.conv2d.PackedConv2d",
}
