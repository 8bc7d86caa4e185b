"""Look into packed data: python tools/inspect_shards.py shards/NAME."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a checkout that is not installed

from cmvae.data.schema import ShardIndex, ShardSchema
from cmvae.errors import UserError

SHEET_COLUMNS = 16


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Print, verify and draw what is in a shard folder.")
    parser.add_argument(
        "folder", type=Path, help="what tools/make_shards.py wrote, for example shards/digits"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not read all shards; no class counts then"
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="PATH", help="contact sheet (default: contact_sheet.png in the folder)"
    )
    return parser.parse_args(arguments)


def describe(index: ShardIndex) -> str:
    """The index as a table."""
    lines = [f"{index.name}: {', '.join(f'{key} {value}' for key, value in index.source.items())}"]
    lines.append(f"{'split':<12}{'samples':>10}{'shards':>8}{'bytes':>15}")
    for name, split in index.splits.items():
        num_bytes = sum(shard.num_bytes for shard in split.shards)
        lines.append(f"{name:<12}{split.num_samples:>10,}{len(split.shards):>8,}{num_bytes:>15,}")
    lines.append(f"{'modality':<12}{'kind':>10}{'dtype':>8}{'shape':>15}")
    for modality_name, modality in index.modalities.items():
        shape = "×".join(str(size) for size in modality.shape)
        lines.append(f"{modality_name:<12}{modality.kind:>10}{modality.dtype:>8}{shape:>15}")
    for modality_name, classifier in index.classifiers.items():
        lines.append(f"classifier of {modality_name}: {classifier.accuracy:.1%} right on test")
    return "\n".join(lines)


def verify(folder: Path, index: ShardIndex) -> dict[str, Counter[int]]:
    """Compare checksums and sample counts of all shards with the index.

    Returns:
        Of each split the number of samples of each class, −1 where there are no labels.

    Raises:
        UserError: a shard is not what the index says; all bad shards are named.
    """
    from cmvae.data.reader import SplitReader
    from cmvae.progress import progress_bar

    counts: dict[str, Counter[int]] = {}
    problems = []
    for name, split in index.splits.items():
        counts[name] = Counter()
        # No modality is asked for: the images need not be kept to count the samples.
        reader = SplitReader(folder, name, modalities=())
        for shard in progress_bar(split.shards, desc=f"verify {name}", unit=" shards", leave=False):
            try:
                check_sum(folder, shard)
                counts[name].update(reader.label(sample) for sample in reader.read_shard(shard))
            except UserError as problem:
                problems.append(str(problem))
    if problems:
        raise UserError("\n".join(problems))
    return counts


def check_sum(folder: Path, shard: ShardSchema) -> None:
    """Compare the SHA-256 of a shard with the index.

    Raises:
        UserError: it differs.
    """
    path = folder / shard.name
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != shard.sha256:
        raise UserError(
            f"{path}: its SHA-256 is {digest.hexdigest()}, its index says {shard.sha256}. The shard was "
            "changed or damaged: pack the data set again with tools/make_shards.py"
        )


def draw_sheet(folder: Path, index: ShardIndex, path: Path) -> None:
    """Draw the first samples of every split: a column a sample, a row a modality, labels below."""
    import matplotlib as mpl

    mpl.use("agg")
    import numpy as np
    from matplotlib import pyplot as plt

    from cmvae.data.reader import EvaluationLoader

    rows = len(index.modalities)
    figure, axes = plt.subplots(
        len(index.splits),
        figsize=(SHEET_COLUMNS * 0.7, len(index.splits) * (rows * 0.7 + 0.6)),
        squeeze=False,
        layout="constrained",
    )
    for axis, name in zip(axes[:, 0], index.splits, strict=True):
        loader = EvaluationLoader(
            folder, split=name, modalities=list(index.modalities), batch_size=SHEET_COLUMNS
        )
        batch = next(iter(loader))
        strips = []
        for modality in index.modalities:
            images = batch[modality].numpy()
            if images.shape[1] == 1:
                images = images.repeat(3, axis=1)
            strips.append(np.concatenate(images.transpose(0, 2, 3, 1), axis=1))
        # Modalities may differ in size: each row is drawn into its own unit of height.
        for row, strip in enumerate(strips):
            axis.imshow(strip, extent=(0, SHEET_COLUMNS, row + 1, row), interpolation="nearest")
        axis.set(xlim=(0, SHEET_COLUMNS), ylim=(rows, 0), title=f"{index.name}, {name}")
        axis.set_yticks(np.arange(rows) + 0.5, list(index.modalities))
        labels = [
            index.class_names[label] if index.class_names is not None else key
            for label, key in zip(batch["label"].tolist(), batch["key"], strict=True)
        ]
        axis.set_xticks(np.arange(SHEET_COLUMNS) + 0.5, labels)
        axis.tick_params(length=0)
    figure.savefig(path, dpi=120)


def main() -> int:
    """Print what is inside, verify it, draw the contact sheet."""
    arguments = parse_arguments()
    folder = arguments.folder
    sheet = arguments.sheet if arguments.sheet is not None else folder / "contact_sheet.png"
    try:
        index = ShardIndex.load(folder)
        print(describe(index))
        if not arguments.no_verify:
            counts = verify(folder, index)
            if index.class_names is not None:
                print(f"{'class':<12}" + "".join(f"{name:>12}" for name in counts))
                for label, class_name in enumerate(index.class_names):
                    print(f"{class_name:<12}" + "".join(f"{count[label]:>12,}" for count in counts.values()))
            print("All shards have the checksums and sample counts of the index.")
        draw_sheet(folder, index, sheet)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"Contact sheet: {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
