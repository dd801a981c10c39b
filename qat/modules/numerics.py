"""What a runtime rounds besides weights and inputs, put into a model: its GELU, its KV cache and its kernels.

They are noted in the model's config, under the keys of `Numerics`, so that whoever loads the model computes them too.
"""

from typing import Any

from torch import nn

from qat.errors import UserError
from qat.modules.activation import use_kernel_activations
from qat.modules.gelu import use_table_gelu
from qat.modules.norm import use_kernel_norms
from qat.scheme import GELUS, KERNELS


def refuse_numerics(model: nn.Module, gelu: str | None, kv_cache: str | None, kernels: str | None = None) -> None:
    """Raises UserError for a gelu, kv_cache or kernels that does not exist, or that the model cannot have."""
    if gelu and gelu not in GELUS:
        raise UserError(f"gelu={gelu} is not possible; choose {', '.join(GELUS)} or leave it out")
    if kernels and kernels not in KERNELS:
        raise UserError(f"kernels={kernels} is not possible; choose {', '.join(KERNELS)} or leave it out")
    if kv_cache:
        from qat.modules.attention import refuse_kv_cache

        refuse_kv_cache(model, kv_cache)


def use_numerics(model: nn.Module, gelu: str | None, kv_cache: str | None, kernels: str | None = None) -> None:
    """Let `model` compute with that GELU and those kernels, over that KV cache, in place. Raises as `refuse_numerics`,
    unchanged."""
    refuse_numerics(model, gelu, kv_cache, kernels)
    config: Any = getattr(model, "config", None)
    if gelu and use_table_gelu(model):  # a model without GELU has nothing to note
        config.gelu = gelu
    if kernels and hasattr(config, "to_dict"):  # what cannot be noted is not done
        replaced = use_kernel_norms(model, kernels) + use_kernel_activations(model, kernels)
        if replaced:
            config.kernels = kernels
    if kv_cache:
        from qat.modules.attention import use_kv_cache

        use_kv_cache(model, kv_cache)
        config.kv_cache = kv_cache


def use_noted(model: nn.Module, config: dict[str, Any]) -> None:
    """`use_numerics` with what a frozen model's config notes. Raises UserError if that is nothing known."""
    use_numerics(model, config.get("gelu"), config.get("kv_cache"), config.get("kernels"))
