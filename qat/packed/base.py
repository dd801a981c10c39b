"""What the packed layers share: int32 words and scales as their state, and values made of them for one forward pass.

Values are computed in float32 with the arithmetic of affine.py, a slab of rows at a time, and cast last, so they are
bit for bit those of the fake-quantized layer.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from qat.affine import QParams, choose_qparams, from_codes, tile
from qat.exporters.hf_layout import to_codes, to_offset
from qat.fake_quantize import fake_quantize
from qat.scheme import QuantSpec, check_block, matrix, stored_dtype

SLAB = 2**15  # weights dequantized at a time on a CPU: they stay in its cache, and torch starts no threads for so few


class PackedLayer(nn.Module):
    """weight: int32 words (out, ceil(in * bits / 32)), or the float parameter if only the input is quantized.

    The buffers are those of `hf_layout.encode` and keep their stored dtype whatever `.to(dtype)` asks for; `dtype` is
    that of the layer's other numbers, and of an embedding's output.
    """

    kind: str  # the float layer's class name, and its weight's shape
    shape: tuple[int, ...]
    rows: int  # of the weight as (out, in)
    cols: int
    like: Tensor  # empty; follows `.to(dtype)`
    weight: Tensor
    weight_scale: Tensor | None
    weight_offset: Tensor | None
    input_scale: Tensor | None
    input_offset: Tensor | None
    spec: QuantSpec | None
    input_spec: QuantSpec | None

    @classmethod
    def from_float(cls, layer: nn.Module, spec: QuantSpec | None, inputs: QuantSpec | None, static: bool) -> Self:
        """An empty packed layer in the place of a float one, on the same device; takes over its attributes and bias.

        spec, inputs: of weight and input; None = floating point. static: the input's scale is stored.
        """
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        own = set(new.__dict__)
        new.__dict__.update({k: v for k, v in layer.__dict__.items() if k not in own})
        weight: Tensor = layer.weight  # pyright: ignore[reportAssignmentType]
        new.kind = type(layer).__name__
        new.shape = tuple(weight.shape)
        new.rows, new.cols = matrix(new.kind, new.shape)
        new.spec, new.input_spec = spec, inputs
        for name in ("weight_scale", "weight_offset", "input_scale", "input_offset"):
            new.register_buffer(name, None)
        new.register_buffer("like", weight.new_empty(0), persistent=False)
        if "bias" in layer._parameters:
            new.bias = layer.bias
        if spec is None:
            new.weight = weight
        else:
            new._allocate(spec, weight.device)
        if inputs is not None and static:
            new.input_scale, new.input_offset = _grid((1, 1), inputs, weight.device)
            if inputs.offset == "zero_point":
                new.input_offset = torch.empty(1, 1, dtype=torch.int32, device=weight.device)
        return new.train(layer.training)

    def _allocate(self, spec: QuantSpec, device: torch.device) -> None:
        r, c = check_block((self.rows, self.cols), spec.block)
        words = -(-self.cols * spec.type.bits // 32)
        self.weight = nn.Parameter(torch.empty(self.rows, words, dtype=torch.int32, device=device), requires_grad=False)
        grid = (self.rows // r, self.cols // c)
        self.weight_scale, self.weight_offset = _grid(grid, spec, device)
        if spec.offset == "zero_point":
            packed = -(-grid[0] * spec.type.bits // 32)
            self.weight_offset = torch.empty(packed, grid[1], dtype=torch.int32, device=device)

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    def values(self, index: Tensor | slice, dtype: torch.dtype, offset: Tensor | None) -> Tensor:
        """Rows of the weight (n, in). offset: that of the whole weight, as `offsets` gives it."""
        spec, scale, at = self._grid_of(index)
        codes = to_codes(self.weight[index], spec, self.cols)
        some = None if offset is None else offset[at]
        _, c = check_block((self.rows, self.cols), spec.block)
        return from_codes(tile(codes, (1, c)), scale[at], some, spec, dtype)

    def _grid_of(self, index: Tensor | slice) -> tuple[QuantSpec, Tensor, Tensor | slice]:
        """The spec, all scales, and which of their rows belong to the weight's rows `index`."""
        assert self.spec is not None
        assert self.weight_scale is not None
        r, _ = check_block((self.rows, self.cols), self.spec.block)
        if r == 1:
            return self.spec, self.weight_scale, index
        rows = torch.arange(self.rows, device=self.weight.device)[index] if isinstance(index, slice) else index
        return self.spec, self.weight_scale, rows // r

    def _fill(self, out: Tensor, piece: slice) -> None:
        """`values` of whole bytes without offset, seven times as fast: in place, in the float32 rows `out`."""
        spec, scale, at = self._grid_of(piece)
        bits = spec.type.bits
        raw = self.weight[piece].view(torch.uint8)[:, : self.cols * bits // 8]
        codes = out.view(out.shape[0], -1, 8 // bits)
        for i in range(8 // bits):
            codes[..., i] = (raw.bitwise_right_shift(i * bits) if i else raw) & (2**bits - 1)
        some = scale[at].float()
        out.view(out.shape[0], some.shape[1], -1).add_(spec.type.qmin).mul_(some[..., None])

    def offsets(self) -> Tensor | None:
        """The offset of the whole weight, (out / r, in / c)."""
        assert self.spec is not None
        r, _ = check_block((self.rows, self.cols), self.spec.block)
        return to_offset(self.weight_offset, self.spec, self.rows // r)

    def slabs(self, start: int, stop: int) -> list[slice]:
        """Rows start..stop in pieces of about SLAB weights; all at once on a GPU."""
        step = stop - start if self.weight.is_cuda else max(1, SLAB // self.cols)
        return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of the weight (out, in) in `dtype`: a new tensor, for the caller to drop."""
        stop = self.rows if stop is None else stop
        if self.spec is None:
            w = self.weight.t() if self.kind == "Conv1D" else self.weight.reshape(self.rows, self.cols)
            return w[start:stop].to(dtype)
        if self.kind == "Conv1D":  # in memory as the float layer has it: BLAS sums short inputs in another order else
            out = torch.empty(self.cols, stop - start, dtype=dtype, device=self.weight.device).t()
        else:
            out = torch.empty(stop - start, self.cols, dtype=dtype, device=self.weight.device)
        pieces, bits = self.slabs(start, stop), self.spec.type.bits
        offset = self.offsets()
        in_bytes = offset is None and 8 % bits == 0 and self.cols * bits % 8 == 0
        buffer = torch.empty(pieces[0].stop - start if in_bytes else 0, self.cols, device=self.weight.device)
        for piece in pieces:
            rows = out[piece.start - start : piece.stop - start]
            if in_bytes:
                part = buffer[: rows.shape[0]]
                self._fill(part, piece)
                rows.copy_(part)
            else:
                rows.copy_(self.values(piece, dtype, offset))
        return out

    def quantized_input(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(
                f"a packed layer got {x.dtype} activations: this architecture casts them to the dtype of the weight, "
                "which packed integers cannot give; load it with transformers from a float checkpoint instead"
            )
        spec = self.input_spec
        if spec is None:
            return x
        rows = x.reshape(-1, x.shape[-1])
        static = None if self.input_scale is None else QParams(self.input_scale, self.input_offset)
        return fake_quantize(rows, static or choose_qparams(rows, spec), spec).reshape(x.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {n: b for n, b in self._buffers.items() if b is not None and n != "like"}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def tie(self, holder: "PackedLayer") -> None:
        """Use the words and scales of `holder`, which has the same weight."""
        self.weight = holder.weight
        self.weight_scale, self.weight_offset = holder.weight_scale, holder.weight_offset

    def extra_repr(self) -> str:
        taken = f", input {self.input_spec.label()}" if self.input_spec else ""
        return f"{self.kind} ({self.rows}, {self.cols}), {self.spec.label() if self.spec else 'float'}{taken}"


def _grid(shape: tuple[int, int], spec: QuantSpec, device: torch.device) -> tuple[Tensor, Tensor | None]:
    scale = torch.empty(shape, dtype=stored_dtype(spec.scale), device=device)
    if spec.offset is None or spec.offset == "zero_point":
        return scale, None
    return scale, torch.empty(shape, dtype=stored_dtype(spec.offset), device=device)
