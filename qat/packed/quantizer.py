"""The transformers quantizer behind quant_method "qat": packed layers in `from_pretrained`. Imports transformers."""

from typing import Any

from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qat.modules.numerics import use_noted
from qat.packed.replace import replace_layers, tie_layers

ALIGNMENT = 64  # bytes; what torch itself allocates by


class QatConfig(QuantizationConfigMixin):
    """`quantization_config` of a folder that `qat.exporters.hf` wrote; see exporters/hf_layout.py for the keys."""

    def __init__(
        self,
        specs: list[dict[str, Any]],
        weights: dict[str, dict[str, Any]],
        inputs: dict[str, dict[str, Any]] | None = None,
        ties: dict[str, str] | None = None,
        format: str = "pack-quantized",
        **kwargs: Any,
    ) -> None:
        self.quant_method = "qat"  # pyright: ignore[reportAttributeAccessIssue]
        self.format = format
        self.specs, self.weights, self.inputs, self.ties = specs, weights, inputs or {}, ties or {}


class QatQuantizer(HfQuantizer):
    """Replaces the layers before weights are loaded or initialised; the words then load like any other tensor.

    fast: kernels have replaced packed layers (see fast.py), whose state is no longer that of the folder.
    """

    requires_calibration = True  # a float model is quantized by `qat.prepare` and `qat.convert`, not here
    fast = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        replace_layers(model, self.quantization_config.to_dict())

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        tie_layers(model, self.quantization_config.to_dict())
        use_noted(model, {key: getattr(model.config, key, None) for key in ("gelu", "kv_cache", "kernels")})  # pyright: ignore[reportAttributeAccessIssue]
        for p in model.parameters():  # BLAS sums one to three rows in another order if memory is mapped off a boundary
            if p.is_floating_point() and p.device.type == "cpu" and p.data_ptr() % ALIGNMENT:
                p.data = p.data.clone()

    def is_serializable(self) -> bool:
        return not self.fast

    @property
    def is_trainable(self) -> bool:
        return False
