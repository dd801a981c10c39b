"""torch.compile must give the same bits: it drops casts to narrow dtypes and may reorder; see affine.store_offset."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_affine import FLAVOURS, SPECS, make

from qat.affine import choose_qparams, store_offset
from qat.fake_quantize import fake_quantize
from qat.scheme import STORED, QuantSpec


def compiles(test: Callable[[], None]) -> Callable[[], None]:
    """Without torch's own warnings as it traces an autograd.Function and generates code for two half types."""
    test = pytest.mark.filterwarnings("ignore::DeprecationWarning")(test)
    return pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed:UserWarning")(test)


COMPILED = [
    QuantSpec(qtype="int4", block=(1, 8)),
    QuantSpec(qtype="uint8", block=(1, -1), range="minmax", scale="float16", offset="zero_point"),
]


def compiled_equals_eager(specs: list[QuantSpec], flavours: tuple[str, ...]) -> None:
    def grids(x: torch.Tensor) -> list[torch.Tensor]:
        return [fake_quantize(x, choose_qparams(x, s), s) for s in specs]

    torch._dynamo.reset()
    compiled = torch.compile(grids, dynamic=False, fullgraph=True)
    for flavour in flavours:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.from_numpy(make(flavour, 7)).to(dtype)
            for spec, a, b in zip(specs, grids(x), compiled(x), strict=True):
                assert torch.equal(a, b), (spec, flavour, dtype)


@compiles
def test_compiled_equals_eager() -> None:
    compiled_equals_eager(COMPILED, ("normal", "zero rows", "tiny"))


@pytest.mark.slow
@compiles
def test_compiled_equals_eager_for_many_specs() -> None:
    sample = random.Random(0).sample(SPECS, 12)
    for i in range(0, len(sample), 4):
        compiled_equals_eager(sample[i : i + 4], FLAVOURS)


@pytest.mark.parametrize("dtype", STORED)
def test_the_compiled_rounding_of_scales_is_the_cast(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The integer arithmetic that stands in for casts under torch.compile, on every kind of float32."""
    raw = np.random.PCG64(5).random_raw(500_000).astype(np.uint32)
    edges = np.float32([0, -0.0, 65504, 65519.996, 65520, 65280, 65408, 2**-14, 2**-24, 2**-25, 3 * 2**-25, np.inf])
    v = torch.from_numpy(np.concatenate([raw.view(np.float32), edges, -edges]))
    v = v[~v.isnan()]
    want = store_offset(v, dtype)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(store_offset(v, dtype), want)
    assert store_offset(torch.tensor([torch.nan]), dtype).isnan().all()
