"""`kernel="fast"`: torch's own int4 and int8 matmuls in the place of exact packed layers, where shape and grid allow.

They multiply in bfloat16 (in float32 they are 30 times slower), so results differ from the exact ones; by how much is
measured on a probe and logged. Codes and scales are still those of the file. int4: symmetric grids of up to 4 bits,
groups of a multiple of 32; int8: one scale a row. Both need scales that bfloat16 holds exactly, as portable ones are.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.exporters.hf_layout import to_codes
from qat.packed.base import PackedLayer
from qat.packed.linear import PackedLinear

log = logging.getLogger(__name__)

ROWS = 16  # the CPU kernels take multiples of this many outputs; fewer are padded
TOLERANCE = 0.02  # of the largest exact output: bfloat16 rounds to 0.004, a wrong layout is off by more than 1


@dataclass
class Speedup:
    """fast: layer -> kernel. exact: layer -> why it stayed so. max_difference: of the probe's output, absolute."""

    fast: dict[str, str] = field(default_factory=dict)
    exact: dict[str, str] = field(default_factory=dict)
    max_difference: float = 0.0


class FastLinear(nn.Module):
    """A linear layer on one of torch's packed kernels; input of any floating dtype, output in the same."""

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        codes = to_codes(layer.weight, _spec(layer), layer.cols)
        scale = layer.weight_scale
        assert scale is not None
        spare = -layer.rows % ROWS
        codes, scale = F.pad(codes, (0, 0, 0, spare)), F.pad(scale.bfloat16(), (0, 0, 0, spare))
        self.out, self.bits = layer.rows, 4 if _spec(layer).type.bits <= 4 else 8
        self.group = _group(layer) or layer.cols
        self.bias = layer.bias
        if self.bits == 8:
            self.register_buffer("words", codes)
            self.register_buffer("scale", scale.flatten())
            return
        scale = scale.repeat_interleave(layer.cols // scale.shape[1] // self.group, dim=1).t()
        self.register_buffer("scale", torch.stack([scale, torch.zeros_like(scale)], -1).contiguous())
        unsigned = codes.int() + 8
        if codes.is_cuda:
            pairs = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).to(torch.uint8)
            self.register_buffer("words", torch.ops.aten._convert_weight_to_int4pack(pairs, 8))
        else:
            self.register_buffer("words", torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1))

    def forward(self, x: Tensor) -> Tensor:
        words, scale = self.get_buffer("words"), self.get_buffer("scale")
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        if self.bits == 8:
            y = torch.ops.aten._weight_int8pack_mm(rows, words, scale)
        elif x.is_cuda:
            y = torch.ops.aten._weight_int4pack_mm(rows, words, self.group, scale)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, words, self.group, scale)
        y = y[:, : self.out].to(x.dtype)
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], self.out)

    def extra_repr(self) -> str:
        return f"int{self.bits} kernel, out {self.out}, group {self.group}"


@torch.no_grad()
def speed_up(model: Any, probe: Tensor | None = None) -> Speedup:
    """Replace, in place, every packed linear layer that a kernel fits; kept as `model.qat_kernels`, and logged.

    probe: int64 token ids (n, T) on which exact and fast outputs are compared; 16 random ones if absent.
    """
    if probe is None:
        random = torch.Generator().manual_seed(0)
        size = model.config.get_text_config().vocab_size
        probe = torch.randint(0, size, (1, 16), generator=random).to(model.device)
    found = {n: m for n, m in model.named_modules() if isinstance(m, PackedLayer)}
    linears = {n: m for n, m in found.items() if isinstance(m, PackedLinear)}
    exact = _output(model, probe)
    result = Speedup()
    for name, layer in linears.items():
        why = _why_not(layer, found)
        if why is None:
            fast = FastLinear(layer)
            why = _check(layer, fast)
            if why is None:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, fast)
                result.fast[name] = f"int{fast.bits}"
        if why is not None:
            result.exact[name] = why
    result.max_difference = float((_output(model, probe) - exact).abs().max())
    for why in dict.fromkeys(result.exact.values()):
        names = [n for n, reason in result.exact.items() if reason == why]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        log.warning("%s%s: the exact kernel, because %s", names[0], more, why)
    log.warning(
        "kernel='fast': %d of %d packed linear layers in bfloat16; largest difference from exact on %d tokens: %.3g "
        "(outputs up to %.3g)",
        len(result.fast),
        len(linears),
        probe.numel(),
        result.max_difference,
        float(exact.abs().max()),
    )
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer.fast = True  # its state is no longer that of the folder, so saving must fail
    model.qat_kernels = result
    return result


def _output(model: Any, probe: Tensor) -> Tensor:
    return model(probe)[0].float()


def _spec(layer: PackedLinear) -> Any:
    assert layer.spec is not None
    return layer.spec


def _group(layer: PackedLinear) -> int | None:
    """Columns that share a scale, as an int4 kernel wants to know it; None if no supported size divides them."""
    assert layer.weight_scale is not None
    size = layer.cols // layer.weight_scale.shape[1]
    return next((g for g in (256, 128, 64, 32) if size % g == 0), None)


def _why_not(layer: PackedLinear, found: dict[str, PackedLayer]) -> str | None:
    spec, scale = layer.spec, layer.weight_scale
    if spec is None or scale is None or layer.input_spec is not None:
        return "its input is quantized"
    holder = next((n for n, m in found.items() if m is not layer and m.weight is layer.weight), None)
    if holder is not None:
        return f"it shares its words with {holder}"
    if spec.offset is not None or spec.type.qmin == 0:
        return "its grid is asymmetric"
    if spec.block[0] != 1:
        return f"blocks of several rows ({spec.label()})"
    if not torch.equal(scale.bfloat16().float(), scale.float()):
        return f"bfloat16 cannot hold its {spec.scale} scales"
    if spec.type.bits > 4:
        if layer.weight.is_cuda:
            return "torch has no int8 kernel for it on CUDA"
        if scale.shape[1] != 1 or layer.cols % 32:
            return f"the int8 kernel wants one scale a row and inputs by 32, not {spec.label()} of {layer.cols}"
        return None
    if _group(layer) is None:
        return f"the int4 kernel wants groups by 32, not {layer.cols // scale.shape[1]}"
    return "the CUDA kernel wants inputs by 128" if layer.weight.is_cuda and layer.cols % 128 else None


def _check(layer: PackedLinear, fast: FastLinear) -> str | None:
    """Both on random inputs: a kernel that is missing from this build of torch or wrong on this machine is not used."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, layer.cols, generator=random).to(layer.weight.device, layer.dtype)
    try:
        got, want = fast(x), layer(x)
    except (RuntimeError, NotImplementedError) as e:
        return f"the kernel fails here: {str(e).splitlines()[0]}"
    off = float((got - want).abs().max() / want.abs().max())
    return None if off < TOLERANCE else f"the kernel is off by {off:.2g} of the largest output here"
