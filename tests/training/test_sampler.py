"""Batches follow from the step number alone."""

from itertools import islice

import pytest

from qat.training.sampler import StepSampler


@pytest.mark.parametrize("start", [1, 2, 5, 17])
def test_starting_late_continues_the_same_stream(start: int) -> None:
    whole = list(islice(StepSampler(11, 4, seed=3), 30))
    assert list(islice(StepSampler(11, 4, seed=3, start=start), 30 - start)) == whole[start:]


def test_every_epoch_has_each_item_once_in_another_order() -> None:
    stream = [i for batch in islice(StepSampler(10, 4, seed=0), 10) for i in batch]
    epochs = [stream[at : at + 10] for at in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_larger_than_the_data_wraps() -> None:
    (batch,) = islice(StepSampler(3, 7, seed=0), 1)
    assert len(batch) == 7
    assert set(batch) == {0, 1, 2}
