"""Training, validation and test rows by hash: the same row is always on the same side, wherever it stands."""

from collections.abc import Callable

import numpy as np

VALIDATION, TEST = 0.025, 0.05  # hashes below the first are validation, below the second test


def split(hashes: np.ndarray, tokens: Callable[[int], int], least: int) -> dict[str, np.ndarray] | None:
    """Row numbers (sorted int64) of train, validation and test, from one uint64 hash per row.

    A side that would have fewer than `least` tokens takes more rows, in the order of their hashes; equal rows stay
    together. `tokens(i)` is called for no more rows than that needs. None if the rows do not suffice.
    """
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]

    def cut(start: int, fraction: float) -> int:
        end, held = start, 0
        while held < least and end < len(order):
            held += tokens(int(order[end]))
            end += 1
        end = max(end, int(np.searchsorted(ranked, np.uint64(fraction * 2**64))))
        while 0 < end < len(order) and ranked[end] == ranked[end - 1]:
            end += 1
        return end if held >= least else -1

    first = cut(0, VALIDATION)
    second = cut(first, TEST) if first >= 0 else -1
    if second < 0 or cut(second, 0.0) < 0:
        return None
    parts = {"validation": order[:first], "test": order[first:second], "train": order[second:]}
    return {name: np.sort(rows) for name, rows in parts.items()}
