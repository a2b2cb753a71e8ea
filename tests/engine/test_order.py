from __future__ import annotations

import numpy as np
import pytest

from guidetune.artefacts import derive_seed
from guidetune.engine.batching import epoch_order, optimiser_batch, steps_per_epoch


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (10, 3), (1000, 64), (64, 64)])
def test_batches_are_cuts_of_each_epochs_own_permutation(rows: int, batch: int) -> None:
    per_epoch = steps_per_epoch(rows, batch)
    for epoch in (0, 2, 1):  # any order of asking
        whole = np.random.default_rng(derive_seed(7, "order", epoch)).permutation(rows)
        got = [optimiser_batch(rows, batch, 7, epoch * per_epoch + step) for step in range(per_epoch)]
        assert np.concatenate(got).tolist() == whole.tolist() and got[0].dtype == np.int64
        got[0][0] = -1  # a batch is the caller's own
        assert optimiser_batch(rows, batch, 7, epoch * per_epoch)[0] == whole[0]


def test_an_epochs_order_is_drawn_once() -> None:
    epoch_order.cache_clear()
    for step in range(50):
        optimiser_batch(100, 4, 1, step)
    assert epoch_order.cache_info().misses == 2
    assert epoch_order(100, 1, 1).itemsize == 4
    with pytest.raises(ValueError):
        epoch_order(100, 1, 1)[0] = 0  # shared by all steps of the epoch
