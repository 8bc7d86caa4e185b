"""Print, verify and draw what a shard folder holds.

    cmvae inspect shards/digits
    cmvae inspect https://host/digits --no-verify

Prints splits, modalities, classes and missing modalities, compares the checksums of all shards with
the index, and draws a contact sheet.
"""

from __future__ import annotations

import argparse
import functools
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from cmvae.data.index import ShardIndex, ShardSchema, ShardTableSchema
from cmvae.data.remote import Location, is_remote
from cmvae.utils.arguments import command_parser
from cmvae.utils.attempts import attempt
from cmvae.utils.errors import UserError
from cmvae.utils.files import sha256_of

SHEET_COLUMNS = 12
_CELL, _LABELS = 1.1, 1.4
"""Inches: a cell of the contact sheet, and the names beside it."""


@dataclass
class Tally:
    """What was counted in one split."""

    labels: Counter[int] = field(default_factory=Counter)
    """Samples of each class, −1 where there are no labels."""
    missing: Counter[str] = field(default_factory=Counter)
    """Samples that lack each modality."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__)
    parser.add_argument("location", help="what `cmvae pack` wrote, for example shards/digits, or its URL")
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not read all shards; no counts of classes and missing modalities then",
    )
    parser.add_argument(
        "--sheet",
        type=Path,
        metavar="PATH",
        help="contact sheet (default: contact_sheet.png in the shard folder, for a URL in the current one)",
    )
    return parser.parse_args()


def describe(index: ShardIndex) -> str:
    """The index as a table."""
    # A table may have hundreds of columns.
    settings = [
        f"{key} {textwrap.shorten(str(value), 60, placeholder=' …')}" for key, value in index.source.items()
    ]
    lines = [f"{index.name}: {', '.join(settings)}"]
    has_groups = any(split.num_groups for split in index.splits.values())
    lines.append(f"{'split':<12}{'samples':>10}{'shards':>8}{'bytes':>15}" + f"{'groups':>10}" * has_groups)
    for name, split in index.splits.items():
        line = f"{name:<12}{split.num_samples:>10,}{split.num_shards:>8,}{split.num_bytes:>15,}"
        lines.append(line + f"{split.num_groups:>10,}" * has_groups)
    lines.append(f"{'modality':<12}{'kind':>12}{'dtype':>8}{'shape':>15}")
    for modality_name, modality in index.modalities.items():
        shape = "×".join(str(size) for size in modality.shape) or "scalar"
        line = f"{modality_name:<12} {modality.kind:>11}{modality.dtype:>8}{shape:>15}"
        if modality.num_categories:
            line += f"  {modality.num_categories:,} {'words' if modality.kind == 'text' else 'categories'}"
        lines.append(line)
    for modality_name, classifier in index.classifiers.items():
        lines.append(f"classifier of {modality_name}: {classifier.accuracy:.1%} right on test")
    return "\n".join(lines)


def verify(location: Location, index: ShardIndex) -> dict[str, Tally]:
    """Compare checksums and sample counts of all shards with the index, and the keys with each other.

    Returns:
        Of each split what was counted.

    Raises:
        UserError: a shard is not what the index says; all bad shards are named.
    """
    from cmvae.data.split_reader import SplitReader, member_suffix
    from cmvae.utils.progress import progress_bar

    tallies: dict[str, Tally] = {}
    problems = []
    # What every sample has need not be kept to count the samples.
    optional = {
        name: member_suffix(name, modality)
        for name, modality in index.modalities.items()
        if modality.optional
    }
    for name, split in index.splits.items():
        tally = tallies[name] = Tally()
        keys: set[str] = set()
        reader = SplitReader(location, name, modalities=tuple(optional))
        if split.shard_table is not None and not is_remote(location):
            check_sum(Path(location), split.shard_table)
        for shard in progress_bar(reader.shards, desc=f"verify {name}", unit=" shards", leave=False):
            try:
                # What is fetched has been compared.
                if not is_remote(location):
                    check_sum(Path(location), shard)
                for sample in reader.read_shard(shard):
                    if isinstance(sample, UserError):
                        raise sample
                    if sample["__key__"] in keys:
                        raise UserError(
                            f"{location}/{shard.name}: the key {sample['__key__']} is in an earlier shard of "
                            f"{name}, too. Give every sample a key of its own, and pack the data set again"
                        )
                    keys.add(sample["__key__"])
                    tally.labels[reader.label(sample)] += 1
                    tally.missing.update(key for key, suffix in optional.items() if suffix not in sample)
            except UserError as problem:
                problems.append(str(problem))
    if problems:
        raise UserError("\n".join(problems))
    return tallies


def describe_tallies(index: ShardIndex, tallies: dict[str, Tally]) -> str:
    """Samples of every class and without every optional modality, as tables."""
    lines = []
    if index.class_names is not None:
        width = max(12, *(len(name) + 1 for name in index.class_names))
        lines.append(f"{'class':<{width}}" + "".join(f"{name:>12}" for name in tallies))
        for label, class_name in enumerate(index.class_names):
            counts = (tally.labels[label] for tally in tallies.values())
            lines.append(f"{class_name:<{width}}" + "".join(f"{count:>12,}" for count in counts))
        if index.partly_labelled:
            unlabelled = "".join(f"{tally.labels[-1]:>12,}" for tally in tallies.values())
            lines.append(f"{'(no label)':<{width}}" + unlabelled)
    optional = [name for name, modality in index.modalities.items() if modality.optional]
    if optional:
        lines.append(f"{'without':<12}" + "".join(f"{name:>12}" for name in tallies))
        for name in optional:
            counts = (tally.missing[name] for tally in tallies.values())
            lines.append(f"{name:<11} " + "".join(f"{count:>12,}" for count in counts))
    return "\n".join(lines)


def check_sum(folder: Path, shard: ShardSchema | ShardTableSchema) -> None:
    """Compare the SHA-256 of a shard, or of the file that lists them, with the index.

    Raises:
        UserError: it differs.
    """
    path = folder / shard.name
    found = sha256_of(path)
    if found != shard.sha256:
        raise UserError(
            f"{path}: its SHA-256 is {found}, its index says {shard.sha256}. The file was "
            "changed or damaged: pack the data set again with cmvae pack"
        )


def draw_sheet(location: Location, index: ShardIndex, path: Path) -> Path:
    """Draw the first samples of every split: one column per sample, one row per modality, labels below."""
    from cmvae.data.reader import EvaluationLoader
    from cmvae.visualize.style import Figure

    height = _CELL * len(index.modalities) + 0.7
    figure = Figure(figsize=(SHEET_COLUMNS * _CELL + _LABELS, len(index.splits) * height))
    panels = figure.subfigures(len(index.splits), squeeze=False)[:, 0]
    for panel, split in zip(panels, index.splits, strict=True):
        loader = EvaluationLoader(
            location, split=split, modalities=list(index.modalities), batch_size=SHEET_COLUMNS
        )
        batch = next(iter(loader))
        panel.suptitle(f"{index.name}, {split}", fontsize=9)
        rows = panel.subplots(
            len(index.modalities),
            SHEET_COLUMNS,
            squeeze=False,
            gridspec_kw={
                "left": _LABELS / (SHEET_COLUMNS * _CELL + _LABELS),
                "right": 0.99,
                "top": 1 - 0.3 / height,
                "bottom": 0.3 / height,
            },
        )
        for row, (name, modality) in zip(rows, index.modalities.items(), strict=True):
            place = list(index.modalities).index(name)
            row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
            for sample, ax in enumerate(row):
                ax.set(xticks=[], yticks=[])
                # A split of fewer samples is filled up with its last one.
                if batch["valid"][sample] and batch["mask"][sample, place]:
                    modality.draw(ax, batch[name][sample].numpy())
                else:
                    ax.set_facecolor("#dee2e6")
        for ax, label, key in zip(rows[-1], batch["label"].tolist(), batch["key"], strict=True):
            text = index.class_names[label] if index.class_names is not None and label >= 0 else key
            ax.set_xlabel(text if len(text) <= 24 else f"{text[:23]}…", fontsize=6)
    figure.savefig(path)
    return path


def main() -> int:
    """Print what is inside, verify it, draw the contact sheet."""
    arguments = parse_arguments()
    location = arguments.location
    sheet = arguments.sheet or Path("" if is_remote(location) else location) / "contact_sheet.png"
    index = ShardIndex.load(location)
    print(describe(index))
    if not arguments.no_verify:
        print(describe_tallies(index, verify(location, index)))
        print("All shards have the checksums and sample counts of the index.")
    if attempt(str(sheet), functools.partial(draw_sheet, location, index, sheet)):
        print(f"Contact sheet: {sheet}")
    return 0
