import calendar
import itertools
import math
import re
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
import torch
from packing import parse, read, write_csv
from PIL import Image
from pyarrow import parquet

from cmvae.data.reader import EvaluationLoader
from cmvae.datasets import table
from cmvae.datasets.columns import number_classes
from cmvae.datasets.writer import write_shards
from cmvae.utils.errors import UserError

SPECIES = ("finch", "auklet")
COLOURS = ("red", "green", "blue")


@pytest.fixture
def rows(tmp_path) -> list[dict[str, object]]:
    """Sixty birds: every third has no image, every fifth no caption, every seventh no weight."""
    (tmp_path / "photos").mkdir()
    made: list[dict[str, object]] = []
    for number in range(60):
        Image.new("RGB", (40, 20), (4 * number, 0, 255)).save(tmp_path / "photos" / f"{number}.png")
        made.append(
            {
                "photo": "" if number % 3 == 0 else f"photos/{number}.png",
                "caption": "" if number % 5 == 0 else f"A {COLOURS[number % 3]} bird, isn't it?",
                "Wing length": number / 2,
                "weight": "" if number % 7 == 0 else 1e3 + number,
                "hops": "yes" if number % 2 else "no",
                "colour": COLOURS[number % 3],
                "species": SPECIES[number % 2],
                "split": ("train", "train", "train", "Val", "test")[number % 5],
            }
        )
    return made


FLAGS = (
    "--image photo --text caption --vector size=weight --categorical colour --binary hops --label species "
    "--split split --image-size 16 --min-count 2"
)


@pytest.fixture
def packed(tmp_path, rows):
    path = write_csv(tmp_path / "birds.csv", rows)
    source = read(path, FLAGS, "--vector", "Wing length")
    index = write_shards(source, tmp_path / "out", shard_size=20)
    batches = {
        split: next(iter(EvaluationLoader(tmp_path / "out", split=split, modalities=list(index.modalities),
                                          batch_size=index.splits[split].num_samples)))
        for split in index.splits
    }  # fmt: skip
    return index, batches


def test_what_was_in_the_table_is_in_the_shards(rows, packed):
    index, batches = packed
    assert list(index.modalities) == ["photo", "caption", "size", "colour", "hops", "wing_length"]
    assert index.class_names == ("auklet", "finch")
    words = index.modalities["caption"].categories
    assert words[:4] == ("<pad>", "<eos>", "<unk>", "a")
    seen = []
    for split, residues in (("train", {0, 1, 2}), ("validation", {3}), ("test", {4})):
        batch = batches[split]
        for place, key in enumerate(batch["key"]):
            number = int(key.removeprefix("row-")) - 2
            row = rows[number]
            seen.append(number)
            assert number % 5 in residues
            assert index.class_names[batch["label"][place]] == row["species"]
            mask = batch["mask"][place].tolist()
            assert mask == [number % 3 > 0, number % 5 > 0, number % 7 > 0, True, True, True]
            if mask[0]:
                assert (batch["photo"][place].amax((1, 2)) - np.array([4 * number, 0, 255])).abs().max() <= 1
            if mask[1]:
                tokens = [words[token] for token in batch["caption"][place].tolist()]
                assert tokens[:6] == ["a", COLOURS[number % 3], "bird", "isn't", "it", "<eos>"]
            if mask[2]:
                assert batch["size"][place].tolist() == [1e3 + number]
            assert index.modalities["colour"].categories[batch["colour"][place]] == row["colour"]
            assert batch["hops"][place].tolist() == [number % 2]
            assert batch["wing_length"][place].tolist() == [number / 2]
    assert sorted(seen) == list(range(60))
    optional = {name: modality.optional for name, modality in index.modalities.items()}
    assert optional == {
        "photo": True, "caption": True, "size": True, "colour": False, "hops": False, "wing_length": False
    }  # fmt: skip


def test_statistics_are_those_of_train_alone(packed):
    index, _ = packed
    train = np.array([number / 2 for number in range(60) if number % 5 < 3])
    assert index.modalities["wing_length"].mean == pytest.approx([train.mean()])
    assert index.modalities["wing_length"].std == pytest.approx([train.std()])
    weights = np.array([1e3 + number for number in range(60) if number % 5 < 3 and number % 7 > 0])
    assert index.modalities["size"].mean == pytest.approx([weights.mean()])


def test_words_of_the_other_splits_are_unknown(tmp_path):
    rows = [{"t": "seen seen", "s": "train"}, {"t": "new seen", "s": "test"}, {"t": "new", "s": "val"}]
    source = read(write_csv(tmp_path / "t.csv", rows), "--text t --split s --min-count 1")
    assert source.modalities["t"].categories == ("<pad>", "<eos>", "<unk>", "seen")
    # Two words and the end, and no longer than train needs: the next multiple of eight.
    assert source.sample("test", 0).values["t"].tolist() == [2, 3, 1, 0, 0, 0, 0, 0]


def test_a_long_text_is_cut(tmp_path):
    path = write_csv(tmp_path / "t.csv", [{"t": "word " * 30}] * 20)
    assert read(path, "--text t").modalities["t"].shape == (32,)
    tokens = read(path, "--text t --text-length 16").sample("train", 0).values["t"]
    assert tokens.tolist() == [3] * 15 + [1]
    with pytest.raises(SystemExit):
        read(path, "--text t --text-length 20")


def test_parquet_reads_as_csv_does(tmp_path):
    parquet.write_table(
        pa.table(
            {
                "a": [1.5, None, float("nan"), 4.0, 5.0, 6.0],
                "b": [1, 2, 3, 4, 5, 6],
                "yes": [True, False, None, True, False, True],
                "s": ["train", "train", "train", "train", "val", "test"],
                "label": pa.array([10, 9, 10, 9, 9, 10], pa.int8()),
            }
        ),
        tmp_path / "t.parquet",
    )
    source = read(tmp_path / "t.parquet", "--vector a --vector b --binary yes --split s --label label")
    assert source.class_names == ("9", "10")
    found = [source.sample("train", number) for number in range(4)]
    assert [list(sample.values) for sample in found] == [
        ["a", "b", "yes"],
        ["b", "yes"],
        ["b"],
        ["a", "b", "yes"],
    ]
    assert [sample.values["b"].tolist() for sample in found] == [[1], [2], [3], [4]]
    assert [sample.key for sample in found] == ["row-000001", "row-000002", "row-000003", "row-000004"]
    assert found[0].values["yes"].tolist() == [1]


def numbers(count: int, **more) -> list[dict[str, object]]:
    """Rows of measurements; integers in order would be ids."""
    return [{"x": float(number), "y": -float(number), **more} for number in range(count)]


def test_what_the_split_column_never_names_is_drawn_from_train(tmp_path):
    rows = [{**row, "s": "test" if row["x"] < 20 else "train"} for row in numbers(100)]
    source = read(write_csv(tmp_path / "t.csv", rows), "--vector x --split s")
    assert source.split_sizes == {"train": 72, "validation": 8, "test": 20}
    assert source.splits["test"].tolist() == list(range(20))


def test_groups_and_classes_are_respected_where_splits_are_drawn(tmp_path):
    rows = [{"x": float(n), "bird": n // 10, "kind": n // 10 % 2} for n in range(400)]
    path = write_csv(tmp_path / "t.csv", rows)
    source = read(path, "--vector x --group bird --label kind")
    birds = {split: set((found // 10).tolist()) for split, found in source.splits.items()}
    assert sum(map(len, birds.values())) == 40
    assert [sum(bird % 2 for bird in found) for found in birds.values()] == [16, 2, 2]


def test_an_image_of_two_splits_is_reported(tmp_path, capsys):
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    path = write_csv(tmp_path / "t.csv", [{"p": "one.png", "x": n % 9} for n in range(30)])
    read(path, "--image p --vector x")
    assert "1 images are in train and in another split" in capsys.readouterr().err


def test_a_constant_column_is_reported_and_harmless(tmp_path, capsys):
    path = write_csv(tmp_path / "t.csv", numbers(30, z=5))
    source = read(path, "--vector all=x,z")
    assert source.modalities["all"].std[1] == 1.0
    assert "all: z never vary" in capsys.readouterr().err


def test_large_offsets_are_standardised(tmp_path):
    """Seconds since 1970 as a measurement: single precision would round them to 128 seconds."""
    seconds = [1_700_000_000 + 37 * n % 1000 for n in range(60)]
    source = read(write_csv(tmp_path / "t.csv", [{"a": s} for s in seconds]), "--vector a")
    index = write_shards(source, tmp_path / "o")
    modality = index.modalities["a"]
    batches = [next(iter(EvaluationLoader(tmp_path / "o", split=s, modalities=["a"], batch_size=60)))
               for s in index.splits]  # fmt: skip
    stored = {key: x.item() for b in batches for key, x in zip(b["key"], b["a"], strict=True)}
    assert [stored[f"row-{n + 2:06d}"] for n in range(60)] == seconds
    data = modality.to_data(batches[0]["a"][batches[0]["valid"]])
    assert data.dtype == torch.float32
    assert data.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert modality.to_stored(data) == pytest.approx(batches[0]["a"][batches[0]["valid"]].numpy(), abs=1e-3)
    assert f"a: {seconds[1]}" == modality.describe(np.array([seconds[1]], dtype=np.float64))


def test_a_column_is_constant_only_if_it_does_not_vary(tmp_path, capsys):
    rows = [{"same": 0.1 + 0.2, "nearly": 1e9 + n % 2, "tiny": n % 2 * 1e-200} for n in range(40)]
    modality = read(write_csv(tmp_path / "t.csv", rows), "--vector all=*").modalities["all"]
    assert "all: same never vary" in capsys.readouterr().err
    assert modality.std[0] == 1
    assert modality.std[1] == pytest.approx(0.5, abs=0.05)
    assert 0 < modality.std[2] < 1e-199


def test_a_number_far_from_those_of_train_is_refused(tmp_path):
    rows = [*numbers(40, s="train"), {"x": 1e30, "y": 0, "s": "test"}, {"x": 1, "y": 1, "s": "val"}]
    with pytest.raises(UserError, match=r"row 42, column x: 1e\+30 is \de\+\d+ standard deviations"):
        read(write_csv(tmp_path / "t.csv", rows), "--vector all=x,y --split s")


@pytest.mark.parametrize("step", [1, -3])
def test_ids_are_no_measurement(tmp_path, step):
    path = write_csv(tmp_path / "t.csv", [{"id": 100_000_000 + step * n, "x": n % 7} for n in range(40)])
    with pytest.raises(UserError, match=r"column id: its integers all differ and are in order.*--key id"):
        read(path, "--vector x --vector id")
    assert read(path, "--vector x --key id").split_sizes["train"] == 32
    shuffled = [{"n": n * 7 % 40} for n in range(40)]
    assert "n" in read(write_csv(tmp_path / "u.csv", shuffled), "--vector n").modalities


DATES = [datetime(2024, 2, 27, 6) + timedelta(hours=31 * n) for n in range(50)]


@pytest.mark.parametrize(
    ("form", "flags"),
    [
        ("%Y-%m-%d %H:%M:%S", ()),
        ("%Y-%m-%dT%H:%M:%SZ", ()),
        ("%d.%m.%Y %H:%M", ("--date-format", "%d.%m.%Y %H:%M")),
        ("seconds", ()),
    ],
)
def test_dates_are_seconds_and_parts_of_day_week_and_year(tmp_path, form, flags):
    def text(date):
        return f"{calendar.timegm(date.timetuple())}" if form == "seconds" else date.strftime(form)

    source = read(write_csv(tmp_path / "t.csv", [{"when": text(d)} for d in DATES]), "--date when", *flags)
    modality = source.modalities["when"]
    assert modality.columns == (
        "when seconds", "when day sine", "when day cosine", "when week sine", "when week cosine",
        "when year sine", "when year cosine",
    )  # fmt: skip
    found = {sample.key: sample.values["when"] for sample in samples(source)}
    for row, date in enumerate(DATES):
        seconds, *parts = found[f"row-{row + 2:06d}"].tolist()
        assert np.datetime64(round(seconds), "s") == np.datetime64(date)
        day = (date.hour + date.minute / 60) / 24
        week = (date.weekday() + day) / 7
        year = (date.timetuple().tm_yday - 1 + day) / 366
        wanted = [f(2 * math.pi * place) for place in (day, week, year) for f in (math.sin, math.cos)]
        assert parts == pytest.approx(wanted, abs=1e-9)


def test_dates_without_a_time_have_no_place_in_the_day(tmp_path):
    rows = [{"when": f"2024-01-{1 + n % 28:02d}" if n else ""} for n in range(40)]
    rows[0]["x"] = rows[1]["x"] = 1
    source = read(
        write_csv(tmp_path / "t.csv", [{"x": 1.0, **row} for row in rows]), "--date when --vector x"
    )
    assert len(source.modalities["when"].columns) == 5
    assert source.modalities["when"].optional


@pytest.mark.parametrize("cell", ["2024-02-30", "31.12.2024", "yesterday", "1714570200000", "12"])
def test_what_is_no_date_is_refused(tmp_path, cell):
    path = write_csv(tmp_path / "t.csv", [{"d": "2024-05-01"}] * 20 + [{"d": cell}])
    with pytest.raises(UserError, match=rf"row 22, column d: '{cell}' is not"):
        read(path, "--date d")


def test_a_pattern_leaves_out_columns_with_another_purpose(tmp_path):
    rows = [
        {**row, "kind": row["x"] % 2, "bird": row["x"], "id": int(row["x"])}
        for row in numbers(40, part="train")
    ]
    path = write_csv(tmp_path / "t.csv", rows)
    source = read(path, "--vector all=* --label kind --split part --group bird --key id")
    assert source.modalities["all"].columns == ("x", "y")
    # Whoever names a column means it.
    with pytest.raises(UserError, match="--label kind: is also a modality"):
        read(path, "--vector x,kind --label kind")


def test_patterns_names_and_keys(tmp_path):
    rows = [{"px_1": n / 2, "px_2": n % 3, "px_10": n % 4, "id": f"bird_{n}"} for n in range(30)]
    source = read(write_csv(tmp_path / "t.csv", rows), "--vector", "px_*", "--key", "id")
    assert source.modalities["vector"].columns == ("px_1", "px_2", "px_10")
    assert source.sample("train", 0).key.startswith("bird_")


def test_other_separators_and_empty_cells(tmp_path):
    rows = [{"a": "NA" if n == 3 else n / 2, "b": n / 2} for n in range(30)]
    path = write_csv(tmp_path / "t.csv", rows, delimiter=";")
    for separator in ("", "--separator ;"):  # found in the column names, or given
        source = read(path, f"{separator} --vector a --vector b --na NA")
        assert source.modalities["a"].optional
        assert not source.modalities["b"].optional
    with pytest.raises(UserError, match="--separator"):
        read(path, "--separator , --vector a")


def write(path, text: str):
    path.write_bytes(text.encode())
    return path


def samples(source):
    return [source.sample(split, n) for split, size in source.split_sizes.items() for n in range(size)]


ROWS = "".join(f"{n}.5;red,{n};x\r\n" for n in range(30))


@pytest.mark.parametrize("first", ["", "sep=;\r\n", '"sep=;"\n', "\ufeffsep=;\r\n"])
def test_tables_of_european_spreadsheets(tmp_path, first):
    path = write(tmp_path / "t.csv", first + "a;colour;b\r\n" + ROWS.replace(".", ","))
    source = read(path, "--vector a --text colour --decimal ,")
    assert sorted(sample.values["a"] for sample in samples(source)) == [n + 0.5 for n in range(30)]
    row = 2 + bool(first)
    with pytest.raises(UserError, match=rf"row {row}, column a: '0,5' is not a number.*add --decimal ,"):
        read(path, "--vector a")


def test_with_a_decimal_comma_a_point_is_not_guessed_away(tmp_path):
    """1.234 is 1234 to some who write 0,5."""
    path = write(tmp_path / "t.csv", "a;b\n1.234;1\n" + "0,5;2\n" * 20)
    with pytest.raises(UserError, match=r"row 2, column a: '1\.234' is not a number"):
        read(path, "--vector a --decimal ,")


def test_blank_rows_are_ignored_and_counted(tmp_path):
    rows = "".join(f"{n}.0,x\n\n , \n" for n in range(30))
    source = read(write(tmp_path / "t.csv", "\na,b\n" + rows + ",\n\n"), "--vector a")
    found = {sample.key: int(sample.values["a"][0]) for sample in samples(source)}
    assert found == {f"row-{3 * n + 3:06d}": n for n in range(30)}


def test_columns_without_a_name_are_ignored(tmp_path):
    rows = "".join(f"{n},{n % 7},,\n" for n in range(30))
    source = read(write(tmp_path / "t.csv", ",a,,\n" + rows), "--vector", "all=*")
    assert source.modalities["all"].columns == ("a",)


@pytest.mark.parametrize("cell", ["12_34", "1e39", "-1e400", "inf", "nan", "0x10", "1,234.5", "--1"])
def test_what_is_not_a_number_of_single_precision_is_refused(tmp_path, cell):
    path = write_csv(tmp_path / "t.csv", [*numbers(3), {"x": cell, "y": 1}, *numbers(20)])
    with pytest.raises(UserError, match=rf"row 5, column x: '{cell}' is (not a number|out of the range)"):
        read(path, "--vector x")


def test_cells_may_be_long(tmp_path):
    path = write_csv(tmp_path / "t.csv", [{"t": "word " * 30_000}] * 20)
    assert read(path, "--text t").modalities["t"].shape == (32,)


@pytest.mark.parametrize("name", ["label", "Size", "2d"])
def test_a_modality_s_name_is_checked_before_the_table_is_read(tmp_path, capsys, name):
    with pytest.raises(SystemExit):
        read(tmp_path / "missing.csv", f"--text {name}=caption")
    assert f"modality name '{name}' must be lower-case letters" in capsys.readouterr().err


def test_classes_are_in_the_same_order_whatever_the_hashes(tmp_path):
    names = ["10", "9", "nan", "2", "inf"]
    found = {number_classes(order)[1] for order in itertools.permutations(names)}
    assert found == {("10", "2", "9", "inf", "nan")}
    assert number_classes(["10", "9", "2"])[1] == ("2", "9", "10")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--vector caption", r"birds\.csv: row 3, column caption: .A green bird.*is not a number.*--na"),
        ("--binary colour", r"row 2, column colour: 'red' is none of"),
        ("--vector wieght", r"no column 'wieght'. Did you mean 'weight'\?"),
        ("--text caption --group caption", r"row 2, column caption: empty"),
        ("--vector weight --split colour", r"row 2, column colour: 'red' is not a split"),
        ("--vector weight", r"birds\.csv: row 2, .*row 9, .*and 4 more: has no value in any modality"),
        ("--text colour --label colour", "--label colour: is also a modality"),
        (
            "--text colour --categorical colour",
            "already a modality 'colour'. Give another name: --categorical NAME=colour",
        ),
        ("--image weight", r"row 3, column weight: .*1001.0: no such file"),
        ("--image *s*", "--image .*: selects .*Give one column"),
        ("--text caption --text colour --key colour", r"row 5: the key 'red' is also that of .*row 2"),
        ("--text colour --key caption", r"row 2, column caption: empty"),
        ("", "no modality is given"),
    ],
)
def test_mistakes_are_named_with_row_and_column(tmp_path, rows, flags, message):
    path = write_csv(tmp_path / "birds.csv", rows)
    with pytest.raises(UserError, match=message):
        read(path, flags)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n1,2,3\n", "row 3 has 3 cells, but there are 2 column names"),
        (b"a,b\n1,2\n1\n", "row 3 has 1 cells"),
        (b"a,a\n1,2\n", "row 1: two columns are called 'a'"),
        (b"a,b\n", "has no rows"),
        (b"", "has no rows"),
        ("a\né\n".encode("latin-1"), "UTF-8"),
        (b'a\n"1\n', "cannot be read as CSV"),
    ],
)
def test_a_broken_csv_is_refused(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "t.csv", "--vector a")


def test_a_broken_parquet_is_refused(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read(tmp_path / "t.parquet", "--vector a")


def test_paths_stay_below_the_table_unless_they_are_absolute(tmp_path):
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    path = tmp_path / "deep" / "t.csv"
    write_csv(path, [{"p": "a/../../secret.png"}] * 30)
    with pytest.raises(UserError, match=r"row 2, column p: .* leads out of .*absolute path"):
        read(path, "--image p")
    write_csv(path, [{"p": tmp_path / "secret.png"}] * 30)
    assert read(path, "--image p").split_sizes["train"] == 24


def test_a_damaged_image_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    source = read(write_csv(tmp_path / "t.csv", [{"p": "bad.png"}] * 30), "--image p")
    with pytest.raises(UserError, match=r"t\.csv: row \d+, column p: .*bad\.png: cannot be read as an image"):
        source.sample("train", 0)


def test_images_are_rotated_cropped_and_resized(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:10, 18:42] = (200, 100, 50)
    pixels[10:, 18:42] = (30, 60, 90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(pixels).save(tmp_path / "p.png", exif=exif)
    # What is fully transparent is white, whatever colour lies below.
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "q.png")
    rows = [{"p": "p.png", "q": "q.png"}] * 30
    path = write_csv(tmp_path / "t.csv", rows)
    sample = read(path, "--image p --image q --image-size 8").sample("train", 0)
    # The upper half of what the chip saw is on the right when the image is held upright.
    for columns, colour in [(slice(5, 8), (200, 100, 50)), (slice(0, 3), (30, 60, 90))]:
        assert np.abs(sample.values["p"][:, :, columns].astype(int).mean((1, 2)) - colour).max() < 10
    assert (sample.values["q"] == 255).all()
    grey = read(path, "--image p --image-size 8 --channels 1").sample("train", 0).values["p"]
    assert grey.shape == (1, 8, 8)
    assert abs(int(grey[0, 4, 7]) - (0.299 * 200 + 0.587 * 100 + 0.114 * 50)) < 5


def test_sixteen_bits_are_refused_rather_than_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "deep.png")
    source = read(write_csv(tmp_path / "t.csv", [{"p": "deep.png"}] * 30), "--image p")
    with pytest.raises(UserError, match="more than 8 bits per channel"):
        source.sample("train", 0)


def test_half_of_the_labels_are_enough(tmp_path):
    """Samples without a label keep their place, and metrics count the others."""
    rows = [{"x": n / 2, "kind": ("", "a", "b")[n % 3]} for n in range(60)]
    source = read(write_csv(tmp_path / "t.csv", rows), "--vector x --label kind")
    index = write_shards(source, tmp_path / "out")
    assert index.class_names == ("a", "b")
    assert index.partly_labelled
    for split in index.splits:
        for batch in EvaluationLoader(tmp_path / "out", split=split, modalities=["x"], batch_size=60):
            for key, label in zip(batch["key"], batch["label"].tolist(), strict=True):
                assert label == (int(key.removeprefix("row-")) - 2) % 3 - 1
    empty = write_csv(tmp_path / "u.csv", [{"x": n / 2, "kind": ""} for n in range(60)])
    with pytest.raises(UserError, match="column kind: no row has a label"):
        read(empty, "--vector x --label kind")


def test_all_mistakes_are_named_at_once(tmp_path):
    rows = [
        {"x": "a" if n in (3, 7) else n / 2, "y": "?" if n == 9 else 0.5 + n % 3, "k": n // 2}
        for n in range(60)
    ]
    path = write_csv(tmp_path / "t.csv", rows)
    with pytest.raises(UserError) as caught:
        read(path, "--vector xy=x,y --key k --text none")
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert sum("no column 'none'" in line for line in lines) == 1
    assert lines[-1] == "... and 14 more"
    with pytest.raises(UserError) as caught:
        read(path, "--vector xy=x,y")
    places = re.findall(r"row (\d+), column (\w)", str(caught.value))
    assert places == [("5", "x"), ("9", "x"), ("11", "y")]


def test_all_ragged_rows_are_named(tmp_path):
    path = write(tmp_path / "t.csv", "a,b\n1,2,3\n" + "1,2\n" * 20 + "1\n")
    with pytest.raises(UserError, match=r"(?s)row 2 has 3 cells.*row 23 has 1 cells"):
        read(path, "--vector a")


def test_names_of_columns_may_have_commas_and_equals_signs(tmp_path):
    rows = [{"a,b": n / 2, "c=d": n % 5, "x": n % 3} for n in range(40)]
    source = read(write_csv(tmp_path / "t.csv", rows), "--vector a,b --vector c=d --vector e=x")
    assert {name: m.columns for name, m in source.modalities.items()} == {
        "a_b": ("a,b",), "c_d": ("c=d",), "e": ("x",)
    }  # fmt: skip


def test_pictures_in_parquet_cells_are_explained(tmp_path):
    table = pa.table({"p": [b"\x89PNG"] * 30, "q": [{"bytes": b"x", "path": "a"}] * 30})
    parquet.write_table(table, tmp_path / "t.parquet")
    for column in ("p", "q"):
        with pytest.raises(UserError, match=rf"row 1, column {column}: binary or nested data. Save the"):
            read(tmp_path / "t.parquet", f"--image {column}")


def test_words_that_are_mostly_unknown_are_reported(tmp_path, capsys):
    texts = [{"t": f"w{n} v{n} the", "u": "a red bird " * 20} for n in range(40)]
    read(write_csv(tmp_path / "t.csv", texts), "--text t --text u")
    reported = capsys.readouterr().err
    assert "warning: t: 64 of 96 words of the train split occur less than 3 times" in reported
    assert "note: u: 40 texts are cut after 31 words" in reported
    assert "warning: u" not in reported


def test_a_column_is_taken_for_what_its_cells_are(tmp_path):
    rows = [
        {
            "id": 100 + n, "size": n % 7 / 2, "ok": ("yes", "no")[n % 2], "day": f"2024-01-{1 + n % 28:02d}",
            "photo": f"p/{n}.JPG", "kind": "ab"[n % 2] * 2, "note": f"a text of {n} words",
            "name": f"n{n * 7 % 40}",
            "same": "x", "none": "", "mixed": n / 2 if n % 9 else "oops",
        }
        for n in range(40)
    ]  # fmt: skip
    path = write_csv(tmp_path / "t.csv", rows)
    report = table.check_report(parse(path, "--vector size --label kind"))
    found = {
        cells[0]: cells[1:] for line in report.splitlines()[2:] if (cells := re.split(r" *\| *", line)[1:-1])
    }
    assert {name: form for name, (_, form, _) in found.items()} == {
        "id": "key", "size": "numbers", "ok": "yes or no", "day": "dates", "photo": "images",
        "kind": "categories",
        "note": "text", "name": "key", "same": "nothing", "none": "nothing", "mixed": "numbers",
    }  # fmt: skip
    assert found["size"][0] == "--vector size"
    assert found["kind"][0] == "--label kind"
    assert found["photo"][0] == "not used; --image photo"
    assert "not 'oops' in row 2 and 4 more" in found["mixed"][2]


def test_missing_images_can_be_left_out(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    rows = [{"p": "gone.png" if n == 4 else "one.png", "x": n % 9} for n in range(30)]
    path = write_csv(tmp_path / "t.csv", rows)
    with pytest.raises(UserError, match=r"row 6, column p: .*gone\.png: no such file"):
        read(path, "--image p")
    source = read(path, "--image p --on-error skip --image-size 8")
    index = write_shards(source, tmp_path / "out", on_error="skip")
    assert sum(split.num_samples for split in index.splits.values()) == 29
    assert "row 6, column p" in (tmp_path / "out" / "skipped.txt").read_text()
