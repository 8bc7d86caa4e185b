"""Job of reading: the project's reader."""

from __future__ import annotations

from itertools import chain, count, islice

from job import Job

from cmvae.data.index import ShardIndex
from cmvae.data.reader import TrainingLoader


def shards_job(shards: str, batch_size: int, num_workers: int, num_batches: int) -> Job:
    """Read batches of the train split, epoch after epoch, without a cache of decoded samples.

    Args:
        shards: folder or URL of packed data.
        batch_size: samples per batch.
        num_workers: number of reader processes.
        num_batches: batches per run.
    """
    names = list(ShardIndex.load(shards).modalities)
    loader = TrainingLoader(shards, modalities=names, batch_size=batch_size, num_workers=num_workers)
    batches = chain.from_iterable(map(loader.epoch_batches, count()))

    def run() -> None:
        for _ in islice(batches, num_batches):
            pass

    return Job(run, num_batches * batch_size)
