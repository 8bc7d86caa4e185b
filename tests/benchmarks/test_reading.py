"""Job of reading."""

import pytest
from reading import shards_job


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_reads_so_many_batches_through_as_many_epochs_as_it_takes(digits_shards, num_workers):
    job = shards_job(str(digits_shards), 64, num_workers, 5)
    assert job.measure()["seconds"] > 0
    assert job.num_items == 5 * 64
