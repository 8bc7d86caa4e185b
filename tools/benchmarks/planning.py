"""Measure the first batch of a rank of a very large split: python tools/benchmarks/planning.py [options].

Writes a real index with its file of shards, but only the tars that the first batch needs. A fresh process
then reads that batch; its time and memory are reported without and with those of the imports.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from cmvae.utils.arguments import non_negative_integer, positive_integer

EPOCH = 3
SPLIT = "train"


def main() -> None:
    """Measure what the options describe, or, in the fresh process, read a batch."""
    parser = argparse.ArgumentParser(description="Measure the first batch of a very large split.")
    parser.add_argument("--shards", type=positive_integer, default=1_000_000, metavar="N")
    parser.add_argument("--samples-per-shard", type=positive_integer, default=1000, metavar="N")
    parser.add_argument("--batch-size", type=positive_integer, default=128, metavar="B", help="per rank")
    parser.add_argument("--ranks", type=positive_integer, default=64, metavar="W")
    parser.add_argument("--skip", type=non_negative_integer, default=0, metavar="N", help="batches to skip")
    parser.add_argument("--repeats", type=positive_integer, default=3, metavar="N")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read is not None:
        print(json.dumps(read_first_batch(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_split(arguments, Path(folder))
        for _ in range(arguments.repeats):
            command = [sys.executable, __file__, *sys.argv[1:], f"--read={folder}"]
            print(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def write_split(arguments: argparse.Namespace, folder: Path) -> None:
    """An index of as many equal shards, and those of the first batch of the last rank."""
    from cmvae.data.index import INDEX_NAME, ShardIndex, ShardSchema, SplitSchema
    from cmvae.data.plan import TrainingPlan
    from cmvae.data.shard_table import write_shard_table
    from cmvae.modalities import VectorModality

    modality = VectorModality(shape=(4,), columns=tuple("abcd"), mean=(0.0,) * 4, std=(1.0,) * 4)
    tar_path = folder / "template"
    with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(arguments.samples_per_shard):
            content = modality.encode(np.full(4, number, np.float32))
            member = tarfile.TarInfo(f"k{number:06d}.x.{modality.suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    fields = {"num_samples": arguments.samples_per_shard, "num_bytes": tar_path.stat().st_size}
    names = [f"{SPLIT}-{number:06d}.tar" for number in range(arguments.shards)]
    # Without validation, which would take a minute; reading validates.
    shards = [ShardSchema.model_construct(name=name, sha256="0" * 64, **fields) for name in names]
    split = SplitSchema(
        num_samples=arguments.shards * arguments.samples_per_shard,
        shard_table=write_shard_table(folder / f"{SPLIT}.shards", shards),
    )
    index = ShardIndex(
        name="planning", source={}, modalities={"x": modality}, class_names=None, splits={SPLIT: split}
    )
    (folder / INDEX_NAME).write_text(index.model_dump_json())

    sizes = np.full(arguments.shards, arguments.samples_per_shard)
    plan = TrainingPlan(sizes, arguments.batch_size * arguments.ranks)
    rank = plan.for_rank(EPOCH, arguments.ranks - 1, arguments.ranks)
    needed = {
        shard
        for slot in rank.batch(arguments.skip)[0].tolist()
        for shard in np.unique(rank.window(slot)[1] // arguments.samples_per_shard).tolist()
    }
    for shard in needed:
        (folder / names[shard]).hardlink_to(tar_path)


def read_first_batch(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of wall time and of this process, and MiB, from an import to the first batch."""
    began, process_began = time.perf_counter(), time.process_time()
    from child import peak_memory

    from cmvae.data.reader import TrainingLoader

    imported, process_imported, import_memory = time.perf_counter(), time.process_time(), peak_memory()
    loader = TrainingLoader(
        arguments.read,
        modalities=["x"],
        batch_size=arguments.batch_size,
        rank=arguments.ranks - 1,
        world_size=arguments.ranks,
    )
    batch = next(loader.epoch_batches(EPOCH, arguments.skip))
    done, process_done, memory = time.perf_counter(), time.process_time(), peak_memory()
    return {
        "samples": len(batch["key"]),
        "batches_per_epoch": loader.batches_per_epoch,
        "seconds": round(done - imported, 2),
        "cpu_seconds": round(process_done - process_imported, 2),
        "import_seconds": round(imported - began, 2),
        "import_cpu_seconds": round(process_imported - process_began, 2),
        "mib": memory // 2**20 - import_memory // 2**20,
        "import_mib": import_memory // 2**20,
    }


if __name__ == "__main__":
    main()
