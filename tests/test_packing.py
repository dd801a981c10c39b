"""Packing: every width and odd column counts, against big-integer arithmetic and compressed-tensors' packer."""

import numpy as np
import pytest
import torch

from qat.packing import pack, unpack

WIDTHS = range(1, 9)


def codes(rows: int, cols: int, bits: int) -> torch.Tensor:
    raw = np.random.PCG64(bits * 1000 + cols).random_raw(rows * cols) % np.uint64(2**bits)
    return torch.from_numpy(raw.astype(np.uint8)).reshape(rows, cols)


def words_of(row: list[int], bits: int) -> list[int]:
    """One row as one big integer, cut into little-endian 32-bit words."""
    whole = sum(code << (i * bits) for i, code in enumerate(row))
    count = -(-len(row) * bits // 32)
    words = [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [w - 2**32 if w >= 2**31 else w for w in words]


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_bit_is_where_a_big_integer_has_it(bits: int) -> None:
    for cols in (1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 65, 95, 96, 97, 129):
        c = codes(3, cols, bits)
        packed = pack(c, bits)
        assert packed.dtype == torch.int32
        assert packed.tolist() == [words_of(row, bits) for row in c.tolist()]
        assert torch.equal(unpack(packed, bits, cols), c)


@pytest.mark.parametrize("bits", WIDTHS)
def test_extremes(bits: int) -> None:
    full = torch.full((2, 37), 2**bits - 1, dtype=torch.uint8)
    assert torch.equal(unpack(pack(full, bits), bits, 37), full)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("cols", [32, 96, 100])
def test_compressed_tensors_packs_the_same_words(bits: int, cols: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    c = codes(16, cols, bits)
    signed = (c.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    packed = pack(c, bits)
    assert torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size([16, cols])), signed)


def test_a_strided_view_packs_like_its_copy() -> None:
    c = codes(33, 64, 4).t()
    assert torch.equal(pack(c, 4), pack(c.contiguous(), 4))
    packed = pack(codes(8, 64, 4), 4)
    assert torch.equal(unpack(packed.t().contiguous().t(), 4, 64), codes(8, 64, 4))


def test_too_few_words_are_refused() -> None:
    with pytest.raises(ValueError, match="need 4 words a row, not 3"):
        unpack(torch.zeros(1, 3, dtype=torch.int32), 4, 32)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_views_are_packed_as_their_copies(bits: int) -> None:
    """A column taken as a row is "contiguous" with another stride, and rows of a slice begin anywhere."""
    codes = torch.randint(0, 2**bits, (64, 33), dtype=torch.uint8)
    for view in (
        codes[:, :1].t(),
        codes[:, :1].contiguous().t(),
        codes[1:, :32],
        codes.reshape(-1)[1:65].reshape(2, 32),
    ):
        assert torch.equal(pack(view, bits), pack(view.clone(memory_format=torch.contiguous_format), bits))
        assert torch.equal(unpack(pack(view, bits), bits, view.shape[1]), view)
