"""Bytes whose nibbles are swapped in every packing, and matrices quantized the wrong way round, are named."""

from dataclasses import replace

import pytest
import torch
from prepared_models import ALL, prepared

from qat import diagnosis
from qat.affine import QTensor, choose_qparams, quantize
from qat.exporters import awq, gptq
from qat.exporters.gguf_blocks import TYPES, BlockType
from qat.frozen import FrozenWeight
from qat.scheme import QuantSpec

# where the codes lie in the bytes of a block of ggml's; Q5_K and Q6_K: the low nibbles
BODY = {
    **{"Q4_0": (18, 2, 18), "Q4_1": (20, 4, 20), "Q5_0": (22, 6, 22), "Q5_1": (24, 8, 24), "Q8_0": (34, 2, 34)},
    **{"Q4_K": (144, 16, 144), "Q5_K": (176, 48, 176), "Q6_K": (210, 0, 128), "TQ2_0": (66, 0, 64)},
}


def weight(spec: QuantSpec, rows: int = 64, cols: int = 512) -> FrozenWeight:
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) + 0.2
    return FrozenWeight(quantize(x, choose_qparams(x, spec), spec), "Linear", (rows, cols))


@pytest.mark.parametrize("held", TYPES, ids=lambda t: t.ggml.name)
def test_swapped_nibbles_of_every_block_type(held: BlockType) -> None:
    w = weight(held.spec)
    size, start, stop = BODY[held.ggml.name]
    data = held.pack(w.tensor).copy()
    body = data.reshape(len(data), -1, size)[..., start:stop]
    body[:] = body >> 4 | body << 4
    damaged = replace(w, tensor=QTensor(*held.unpack(data), w.tensor.spec))
    found = diagnosis.weights(damaged, w)
    assert found is not None
    assert found.kind == "nibble order", found
    assert "nibbles" in found.text
    assert "swapped" in found.text
    assert "dB SQNR" in found.text


@pytest.mark.parametrize("offset", [None, "zero_point"])
@pytest.mark.parametrize(("bits", "target"), [(4, "awq"), (4, "gptq"), (8, "gptq"), (2, "gptq")])
def test_swapped_nibbles_of_packed_words(bits: int, target: str, offset: str | None) -> None:
    kind = {"range": "minmax", "offset": offset} if offset else {}
    w = weight(QuantSpec(qtype=f"int{bits}", block=(1, 32), scale="float16", **kind))  # pyright: ignore[reportArgumentType]
    packed = {k: make() for k, make in (awq.words(w) if target == "awq" else gptq.words(w, 2)).items()}
    words = packed["qweight"].view(torch.uint8)
    packed["qweight"] = (words >> 4 | words << 4).view(torch.int32)
    found_ = {"bits": bits, "group_size": 32, "sym": offset is None}
    if target == "gptq":
        parts = [packed[k] for k in gptq.PARTS[:3]]
        damaged = gptq._weight("w", parts, found_, {}, False)
    else:
        codes, zero = (awq._unpack(packed[k]).t().contiguous() for k in ("qweight", "qzeros"))
        damaged = awq.restored("w", codes, zero, packed["scales"].t().contiguous(), {**found_, "sym": True}, {})
    said = diagnosis.weights(damaged, w)
    assert said is not None
    assert said.kind == "nibble order", said
    assert ("along the rows" in said.text) == (target == "awq")


@pytest.mark.parametrize("leaf", ["attn.c_attn", "attn.c_proj"])
def test_a_conv1d_that_was_quantized_without_turning_it(leaf: str) -> None:
    """As a writer that forgets that Conv1D keeps (in, out): other scales, other codes."""
    _, frozen = prepared("gpt2", ALL)
    w = next(w for n, w in frozen.weights.items() if leaf in n)
    value, spec = w.dequantize(), w.tensor.spec
    wrong = FrozenWeight(quantize(value, choose_qparams(value, spec), spec), "Conv1D", (value.shape[1], value.shape[0]))
    found = diagnosis.weights(wrong, w)
    assert found is not None
    assert found.kind == "transposition", found
    assert diagnosis.weights(w, w) is None
    other = replace(w, tensor=replace(w.tensor, codes=-w.tensor.codes.roll(1, 1)))
    unrelated = diagnosis.weights(other, w)
    assert unrelated is not None
    assert unrelated.kind == "codes", unrelated
