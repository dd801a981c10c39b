"""Post-training quantization: ways to choose a fixed grid for a weight, each a function (tensor, spec) -> QParams."""
