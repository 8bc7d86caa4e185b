"""Tables and folders of all sorts, and what must come of packing them.

Packing either refuses data with a message that people can act on, or gives shards from which what was put in
is read back, and with which the starter config trains for a step.
"""

from __future__ import annotations

import argparse
import csv
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image

from cmvae.config import CMVAEExperiment, check_against_shards
from cmvae.data.batch import to_device
from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.datasets import folder, table
from cmvae.datasets.packing import SKIPPED_NAME
from cmvae.datasets.writer import write_shards
from cmvae.modalities.tokenizer import split_words
from cmvae.training.optimization import build_optimizer
from cmvae.training.starter_config import write_starter_config
from cmvae.training.tasks import build_task
from cmvae.training.train_split import open_train_split
from cmvae.training.trial import try_starter_config
from cmvae.utils.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
NAMES = st.one_of(
    st.sampled_from(
        ["no", "on", "2024", "null", "a,b", "a=b", "label", "x*", "\u732b", "$", "%", "Ä b", "key"]
    ),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8),
)
SENTENCES = [
    "a red bird",
    "\u4e00\u53ea\u7ea2\u9e1f",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f44d $x$",
]
NUMBERS = st.one_of(
    st.floats(-1e20, 1e20).map(repr),
    st.floats(-100, 100).map(lambda x: f"{x:.3f}"),
    st.integers(-5, 5).map(str),
    st.integers(1_700_000_000, 1_700_003_600).map(str),
)
CELLS = {
    "vector": NUMBERS,
    "binary": st.sampled_from(["0", "1", "yes", "No", "TRUE", "false", "1.0"]),
    "categorical": st.one_of(st.sampled_from(["$", "$$", "red", "1", "1.0", "nan", "NA"]), TEXT),
    "text": st.one_of(
        TEXT,
        st.sampled_from(
            [
                "a red bird",
                "\u4e00\u53ea\u7ea2\u9e1f",
                "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
                "\U0001f44d $x$",
            ]
        ),
    ),
    "date": st.one_of(
        st.datetimes(datetime(1, 1, 1), datetime(9998, 12, 31)).map(lambda d: d.isoformat(" ", "seconds")),
        st.dates().map(str),
        st.integers(10_000, 2_000_000_000).map(str),
    ),
}
WRONG = st.sampled_from(["?", "1_0", "1e39", "-inf", "nan", "2024-13-01", "1,5", "--", "\x00", "\u0661"])


@dataclass
class Table:
    """A table as it is written, and the command line to pack it."""

    names: list[str]
    kinds: list[str]
    rows: list[list[str]]
    delimiter: str = ","
    flags: list[str] = field(default_factory=list)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """A table with one modality per column, perhaps with labels, keys, wrong and empty cells."""
    kinds = draw(st.lists(st.sampled_from(sorted(CELLS)), min_size=1, max_size=4))
    names = [f"c{number}" for number in range(len(kinds) + 1)]
    for _ in range(draw(st.integers(0, 2))):
        names[draw(st.integers(0, len(kinds)))] = draw(NAMES)
    num_rows = draw(st.one_of(st.integers(20, 40), st.integers(20, 40), st.integers(0, 20)))
    columns = [draw(st.lists(CELLS[kind], min_size=num_rows, max_size=num_rows)) for kind in kinds]
    columns.append([draw(st.sampled_from(["", "a", "b", "$"])) for _ in range(num_rows)])
    for _ in range(draw(st.integers(0, 3)) if num_rows and draw(st.integers(0, 3)) == 0 else 0):
        column, row = draw(st.integers(0, len(kinds) - 1)), draw(st.integers(0, num_rows - 1))
        columns[column][row] = draw(st.one_of(WRONG, st.just("")))
    flags = [f"--{kind}={name}" for kind, name in zip(kinds, names[:-1], strict=True)]
    if draw(st.booleans()):
        flags.append(f"--label={names[-1]}")
    flags += draw(st.sampled_from([[], ["--min-count=1"], ["--decimal=,"], ["--na=NA"], ["--text-length=8"]]))
    rows = [list(row) for row in zip(*columns, strict=True)]
    return Table(names, kinds, rows, draw(st.sampled_from([",", ";", "\t", "|"])), flags)


def pack_table(made: Table, place: Path) -> bool:
    """Whether a table can be packed; if so, what was put in must be read back."""
    path = place / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=made.delimiter)
        writer.writerow(made.names)
        writer.writerows(made.rows)
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--out", type=Path, default=place / "2024")
    parser.add_argument("--seed", type=int, default=0)
    table.add_arguments(parser)
    try:
        arguments = parser.parse_args([str(path), *made.flags])
    except argparse.ArgumentError:
        return False
    try:
        source = table.from_arguments(arguments)
    except UserError as error:
        _check_message(error)
        # The report does not need a table that can be packed.
        try:
            assert table.check_report(arguments).startswith("| column")
        except UserError as unreadable:
            _check_message(unreadable)
        return False
    try:
        found = _pack(source, arguments)
    except UserError as error:
        _check_message(error)
        return False
    names = [name.strip() for name in made.names]
    empty = {"", *(arguments.na or ())}
    blank = sum(all(not cell.strip() for cell in row) for row in made.rows)
    assert len(found) == len(made.rows) - blank
    for number, row in enumerate(made.rows, 2):
        if all(not cell.strip() for cell in row):
            continue
        sample = found[f"row-{number:06d}"]
        for name, modality in source.modalities.items():
            (column,) = source.table.columns[name]
            cell = row[names.index(column)].strip()
            if cell in empty:
                assert sample[name] is None, (name, cell)
            else:
                kind = made.kinds[names.index(column)]
                _check_value(kind, modality, cell, sample[name], arguments.decimal or ".")
        if arguments.label is not None:
            label = row[-1].strip()
            assert sample["label"] == (-1 if label in empty else source.class_names.index(label))
    return True


def _check_value(kind: str, modality: Any, cell: str, stored: np.ndarray, decimal: str) -> None:
    if kind == "vector":
        wanted = float(cell.replace(decimal, "."))
        # A number, or closer to it than a thousandth of a deviation.
        assert math.isclose(stored[0], wanted, rel_tol=1e-6, abs_tol=1e-3 * modality.std[0]), (cell, stored)
    elif kind == "binary":
        assert stored.tolist() == [cell.lower() in ("1", "1.0", "yes", "true")]
    elif kind == "categorical":
        assert modality.categories[int(stored)] == cell
    elif kind == "text":
        words = [word if word in modality.categories[3:] else "<unk>" for word in split_words(cell)]
        assert modality.describe(stored).split(" ") == (words[: modality.shape[0] - 1] or [""])
    else:
        seconds = float(cell) if cell.isdigit() else _timestamp(cell)
        assert stored[0] == seconds
        assert np.abs(stored[1:]).max() <= 1 + 1e-9


def _timestamp(cell: str) -> float:
    return (
        datetime.fromisoformat(cell).replace(tzinfo=timezone.utc) - datetime(1970, 1, 1, tzinfo=timezone.utc)
    ).total_seconds()


def _pack(source: Any, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By key the stored values and the label of each sample, read from the shards, which train for a step."""
    try_starter_config(source, arguments.out, arguments.on_error)
    index = write_shards(source, arguments.out, shard_size=25, on_error=arguments.on_error)
    config = CMVAEExperiment.model_validate(yaml.safe_load(write_starter_config(index, arguments.out)))
    assert config.name == "2024"
    check_against_shards(config, index, "starter config")
    _train_for_a_step(config, index)
    found: dict[str, dict[str, Any]] = {}
    for split in index.splits:
        names = list(index.modalities)
        for batch in EvaluationLoader(arguments.out, split=split, modalities=names, batch_size=7):
            for row in batch["valid"].nonzero().flatten().tolist():
                found[batch["key"][row]] = {
                    "label": int(batch["label"][row]),
                    **{
                        name: batch[name][row].numpy() if batch["mask"][row, place] else None
                        for place, name in enumerate(names)
                    },
                }
    assert len(found) == sum(split.num_samples for split in index.splits.values())
    return found


def _train_for_a_step(config: CMVAEExperiment, index: ShardIndex) -> None:
    """One update of the starter config's model from the first batch of the shards."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    task = build_task(config, index, device, None)
    loader = open_train_split(
        config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 0})}),
        list(config.model.modalities),
        device,
    )
    batch = to_device(next(loader.epoch_batches(0)), index.modalities, device)
    task.begin(1)
    loss, _ = task({**batch, "_seed": 0, "_place": range(len(batch["valid"]))})
    loss.backward()
    build_optimizer(task, config.optimizer).step()
    assert loss.isfinite()
    assert all(parameter.isfinite().all() for parameter in task.parameters())


def _check_message(error: UserError) -> None:
    """A message has something to say, and no traceback or repr of an object in it."""
    message = str(error)
    assert len(message) > 15
    assert "Traceback" not in message
    assert "object at 0x" not in message


FILES = {
    "image": st.tuples(
        st.sampled_from(["L", "RGB", "RGBA", "P", "1", "LA"]), st.integers(1, 9), st.integers(1, 9)
    ),
    "text": TEXT.map(str.encode),
    "vector": st.one_of(
        st.lists(st.floats(-10, 10), min_size=3, max_size=3).map(np.array),
        st.lists(st.integers(0, 5), min_size=3, max_size=3).map(np.array),
    ),
}
ODD_FILES = {
    "image": st.tuples(st.sampled_from(["I;16", "F"]), st.integers(1, 9), st.integers(1, 9)),
    "text": st.binary(max_size=20),
    "vector": st.sampled_from(
        [np.zeros(3, bool), np.zeros((1, 3)), np.zeros(0), np.zeros(4), np.array("x"), np.array([1e300] * 3)]
    ),
}
STEMS = st.text(
    st.one_of(st.sampled_from("ab.-_ \u732b\u72ac\u00e9$"), st.characters(exclude_categories=["Cs", "Cc"])),
    min_size=1,
    max_size=20,
).filter(lambda name: "/" not in name and name.strip(". ") and not name.startswith("."))
SUFFIXES = {"image": ".png", "text": ".txt", "vector": ".npy"}


@dataclass
class Folder:
    """Files by subfolder and stem, and the flags of the command line."""

    kinds: dict[str, str]
    files: dict[tuple[str, str], Any]
    damaged: dict[tuple[str, str], bytes]
    labels: Mapping[str, str] | None
    flags: list[str]


@st.composite
def folders(draw: st.DrawFn) -> Folder:
    """A folder with one to three subfolders, perhaps with labels, missing and damaged files."""
    kinds = draw(st.dictionaries(STEMS, st.sampled_from(sorted(FILES)), min_size=1, max_size=3))
    stems = draw(
        st.lists(STEMS, min_size=0, max_size=25, unique_by=lambda s: unicodedata.normalize("NFC", s))
    )
    stems += [f"n{n}" for n in range(draw(st.sampled_from([20, 20, 20, 0])))]
    files = {
        (name, stem): draw(FILES[kind])
        for name, kind in kinds.items()
        for stem in stems
        if draw(st.integers(0, 9)) < 9
    }
    broken = (
        draw(st.lists(st.sampled_from(sorted(files)), max_size=2)) if files and draw(st.booleans()) else []
    )
    damaged = {place: draw(st.binary(max_size=9)) for place in broken}
    labels = {s: draw(st.sampled_from(["", "x", "$"])) for s in stems} if draw(st.booleans()) else None
    flags = ["--image-size=8", f"--on-error={draw(st.sampled_from(['skip', 'error']))}"]
    return Folder(kinds, files, damaged, labels, flags)


def pack_folder(made: Folder, place: Path) -> bool:
    """Whether a folder can be packed; if so, all samples are in the shards or in the list beside them."""
    root = place / "data"
    for name in made.kinds:
        (root / name).mkdir(parents=True)
    for (name, stem), content in made.files.items():
        path = root / name / f"{stem}{SUFFIXES[made.kinds[name]]}"
        if (name, stem) in made.damaged:
            path.write_bytes(made.damaged[name, stem])
        elif made.kinds[name] == "image":
            mode, width, height = content
            Image.new(mode, (width, height)).save(path, "TIFF" if mode == "F" else "PNG")
        elif made.kinds[name] == "text":
            path.write_bytes(content)
        else:
            np.save(path, content)
    if made.labels is not None:
        with (root / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["name", "label"], *made.labels.items()])
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--out", type=Path, default=place / "2024")
    parser.add_argument("--seed", type=int, default=0)
    folder.add_arguments(parser)
    arguments = parser.parse_args([str(root), *made.flags])
    try:
        source = folder.from_arguments(arguments)
        found = _pack(source, arguments)
    except UserError as error:
        _check_message(error)
        return False
    listed = arguments.out / SKIPPED_NAME
    skipped = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    assert len(found) + len(skipped) == len(source.keys)
    for key, stem in zip(
        source.keys, sorted({unicodedata.normalize("NFC", s) for _, s in made.files}), strict=True
    ):
        if key in found and made.labels is not None:
            label = {unicodedata.normalize("NFC", s): x for s, x in made.labels.items()}[stem]
            assert found[key]["label"] == (-1 if not label else source.class_names.index(label))
    return True
