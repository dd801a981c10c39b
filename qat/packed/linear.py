"""Linear layers (nn.Linear and GPT-2's Conv1D) of packed integers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.affine import choose_qparams
from qat.exporters.hf_layout import to_codes
from qat.kernels.block_sum import with_block_sums
from qat.kernels.integer_dot import integer_linear
from qat.packed.base import PackedLayer

WHOLE = 2**24  # weights up to which a layer is multiplied in one piece; a larger one (an output head) goes in parts


class PackedLinear(PackedLayer):
    """The float weight exists only while the layer runs: 64 MB of float32 at most, freed before the next layer.

    A layer above WHOLE weights is multiplied in parts of whole rows; each output is the same sum either way.
    """

    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        taken = self.input_spec
        if taken is not None and taken.integer_dot and self.spec is not None:
            codes = to_codes(self.weight, self.spec, self.cols)
            grid = choose_qparams(x.reshape(-1, x.shape[-1]), taken)
            assert self.weight_scale is not None
            return integer_linear(x, grid, taken, codes, self.weight_scale, self.bias)
        out = self._product(self.quantized_input(x))
        if taken is None or taken.block_sum is None or self.spec is None:
            return out
        return with_block_sums(out, x, taken, self.offsets())

    def _product(self, x: Tensor) -> Tensor:
        if self.spec is None or self.rows * self.cols <= WHOLE:
            return F.linear(x, self.dense(x.dtype), self.bias)
        step = max(1, WHOLE // self.cols // 1024) * 1024
        parts = [
            F.linear(x, self.dense(x.dtype, i, min(i + step, self.rows)), self._bias(i, step))
            for i in range(0, self.rows, step)
        ]
        return torch.cat(parts, -1)

    def _bias(self, start: int, step: int) -> Tensor | None:
        return None if self.bias is None else self.bias[start : start + step]
