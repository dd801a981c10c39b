"""Training, validation and test rows by hash: the same row is always on the same side, wherever it stands."""

from collections.abc import Callable

import numpy as np

HELD_OUT = 0.025  # of all rows for validation, and as much for test


def split(
    hashes: np.ndarray, tokens: Callable[[int], int], least: int, *, together: bool = True
) -> dict[str, np.ndarray] | None:
    """Row numbers (sorted int64) of train, validation and test, from one uint64 hash per row.

    Of the range of hashes the lowest 2.5% are validation and the next 2.5% test. A side with fewer than `least` tokens
    takes more rows, in the order of their hashes. With `together`, equal rows never come to several sides; without, it
    is 2.5% of the rows. `tokens(i)` is called for no more rows than that needs. None if the rows do not suffice.
    """
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]

    def cut(start: int, share: float, threshold: float) -> int:
        end, held = start, 0
        while held < least and end < len(order):
            held += tokens(int(order[end]))
            end += 1
        if held < least:
            return -1
        if not together:
            return max(end, start + int(share * len(order)))
        end = max(end, int(np.searchsorted(ranked, np.uint64(threshold * 2**64))))
        while 0 < end < len(order) and ranked[end] == ranked[end - 1]:
            end += 1
        return end

    first = cut(0, HELD_OUT, HELD_OUT)
    second = cut(first, HELD_OUT, 2 * HELD_OUT) if first >= 0 else -1
    if second < 0 or cut(second, 0.0, 0.0) < 0:
        return None
    parts = {"validation": order[:first], "test": order[first:second], "train": order[second:]}
    return {name: np.sort(rows) for name, rows in parts.items()}
