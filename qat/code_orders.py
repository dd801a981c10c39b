"""Orders in which packers confuse the codes of a word: swapped nibbles, halves against interleaved, AWQ's, reversed."""

import torch
from torch import Tensor

AWQ = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds column AWQ[i]


def _halves(n: int) -> dict[str, list[int]]:
    """Of a ggml block that keeps n codes in n / 2 bytes."""
    half = n // 2
    return {
        f"low and high nibbles are swapped (each half of {n} codes)": [*range(half, n), *range(half)],
        f"nibbles are interleaved, not in halves of {n} codes": [i // 2 + half * (i % 2) for i in range(n)],
        f"nibbles are in halves of {n} codes, not interleaved": [2 * (i % half) + i // half for i in range(n)],
    }


# what is wrong -> where, in each run of as many codes, the right code lies
ORDERS = {
    "the two nibbles of every byte are swapped": [1, 0],
    "the two nibbles of every byte are swapped (2-bit codes, or AWQ's order)": [2, 3, 0, 1],
    "every 8 codes are in AWQ's order": AWQ,
    "every 8 codes are in the order before AWQ's": [AWQ.index(i) for i in range(8)],
    "every 8 codes are reversed": list(range(7, -1, -1)),
    "every 4 codes are reversed": [3, 2, 1, 0],
    **_halves(32),  # Q4_0, Q4_1, Q5_0, Q5_1
    **_halves(64),  # Q4_K, Q5_K
    **_halves(128),  # Q6_K; TQ2_0, whose bytes hold four codes, 32 apart
    "the four 2-bit codes of every byte are reversed": [32 * (3 - i // 32) + i % 32 for i in range(128)],
}


def code_order(have: Tensor, want: Tensor, bits: int) -> str | None:
    """In which of these orders `have` holds the codes of `want`; None if in none of them.

    have, want: codes of `bits` bits, int32 (R, C), from 0 on. Wider codes may have their low nibbles alone in another
    order, since ggml keeps their upper bits elsewhere.
    """
    if bits == 8 and any(
        torch.equal((have ^ x) >> 4 | ((have ^ x) & 15) << 4, want ^ x) for x in (0, 128)
    ):  # int8: 128
        return "the two nibbles of every code are swapped"
    for along, a, b in (("", have, want), (", along the rows", have.t(), want.t())):
        for said, order in ORDERS.items():
            if a.shape[1] % len(order) == 0 and _fits(a, b, order, bits):
                return f"{said}{along}"
    return None


def _fits(a: Tensor, b: Tensor, order: list[int], bits: int) -> bool:
    moved = a.reshape(len(a), -1, len(order))[..., order].flatten(1)
    return torch.equal(moved, b) or (bits > 4 and torch.equal(a >> 4 << 4 | moved & 15, b))
