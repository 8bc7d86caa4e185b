"""New rows of a table for a trained run: `cluster RUN TABLE` and `pack table --like RUN`."""

from __future__ import annotations

import pyarrow as pa
import pytest
from new_rows import FLAGS, make_rows, read
from packing import write_csv
from pyarrow import parquet

from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader


def clusters(rows):
    return {
        row["key"]: {name: cell for name, cell in row.items() if name.endswith("cluster")} for row in rows
    }


def test_the_training_table_gets_the_clusters_of_its_shards(trained, run, call, tmp_path):
    code, _, err = call("cluster", run, trained / "shards/base", "--out", tmp_path / "packed.csv")
    assert code == 0, err
    code, said, _ = call("cluster", run, trained / "base.csv", "--out", tmp_path / "table.csv")
    assert code == 0
    assert "90 samples in" in said
    packed, direct = read(tmp_path / "packed.csv"), read(tmp_path / "table.csv")
    assert [row["key"] for row in direct] == [f"row-{number:06d}" for number in range(2, 92)]
    assert "split" not in direct[0]
    assert clusters(direct) == clusters(packed)
    assert any(row["size_cluster"] == "" for row in direct), "a ? is an empty cell, as in training"

    like = trained / "shards/like"
    code, said, err = call("pack", "table", trained / "base.csv", "--out", like, "--like", run, "--force")
    assert code == 0, err
    assert f"cmvae cluster {run} {like}" in said
    base, again = ShardIndex.load(trained / "shards/base"), ShardIndex.load(like)
    assert list(again.splits) == ["test"]
    assert again.splits["test"].num_samples == 90
    assert again.modalities == base.modalities
    code, _, err = call("cluster", run, like, "--out", tmp_path / "like.csv")
    assert code == 0, err
    assert clusters(read(tmp_path / "like.csv")) == clusters(packed)


def test_unknown_words_and_categories_are_counted_and_reported(run, table, call, tmp_path):
    rows = make_rows(40, tmp_path, seed=1)
    for number, row in enumerate(rows):
        row["caption"] = "A red thing, number nine"
        row["colour"] = "mauve" if number < 4 else "teal" if number < 6 else "red"
    path = table(rows)
    code, _, err = call("cluster", run, path, "--out", tmp_path / "a.csv")
    assert code == 0
    assert "caption: 40 of 200 words are unknown to the model and read as <unk>, for example 'nine'" in err
    assert (
        "colour: 6 of 40 categories are unknown to the model and read as missing, for example 'mauve', 'teal'"
        in err
    )
    out = read(tmp_path / "a.csv")
    assert [row["colour_cluster"] == "" for row in out] == [True] * 6 + [False] * 34
    code, _, err = call("pack", "table", path, "--out", tmp_path / "packed", "--like", run)
    assert code == 0
    assert "caption: 40 of 200 words are unknown" in err
    assert "colour: 6 of 40 categories are unknown" in err
    code, _, err = call("cluster", run, tmp_path / "packed", "--out", tmp_path / "b.csv")
    assert code == 0, err
    assert clusters(read(tmp_path / "b.csv")) == clusters(out)


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_rows_is_read_by_the_statistics_of_the_run(trained, run, table, call, tmp_path, count):
    """Of one row nothing could be fitted: its clusters are those that it has among all rows."""
    rows = make_rows(90, tmp_path)[50 : 50 + count]
    path = table(rows)
    code, _, err = call("cluster", run, path, "--out", tmp_path / "few.csv")
    assert code == 0, err
    code, _, err = call("cluster", run, trained / "base.csv", "--out", tmp_path / "all.csv")
    assert code == 0, err
    expected = list(clusters(read(tmp_path / "all.csv")).values())[50 : 50 + count]
    assert list(clusters(read(tmp_path / "few.csv")).values()) == expected
    code, _, err = call("pack", "table", path, "--out", tmp_path / "packed", "--like", run)
    assert code == 0, err
    index = ShardIndex.load(tmp_path / "packed")
    trained_on = ShardIndex.load(trained / "shards/base").modalities["size"]
    assert (index.modalities["size"].mean, index.modalities["size"].std) == (trained_on.mean, trained_on.std)
    loader = EvaluationLoader(tmp_path / "packed", split="test", modalities=["size"], batch_size=count)
    stored = {k: v for batch in loader for k, v in zip(batch["key"], batch["size"].tolist(), strict=True)}
    first = stored["row-000002"]
    assert first == pytest.approx([rows[0]["a"], rows[0]["b"]], abs=1e-4), "in the units of the table"


def test_a_missing_column_is_a_missing_modality(run, table, call, tmp_path):
    rows = make_rows(12, tmp_path)
    path = table(
        [{name: cell for name, cell in row.items() if name not in ("b", "photo", "ok")} for row in rows]
    )
    code, _, err = call("cluster", run, path, "--out", tmp_path / "a.csv")
    assert code == 0
    assert f"{path}: no column b: size is missing in all rows" in err
    assert f"{path}: no column photo: photo is missing in all rows" in err
    out = read(tmp_path / "a.csv")
    assert list(out[0]) == [
        "key", "cluster", "confidence", "caption_cluster", "caption_confidence", "colour_cluster",
        "colour_confidence",
    ]  # fmt: skip
    code, _, err = call("pack", "table", path, "--out", tmp_path / "packed", "--like", run)
    assert code == 0
    assert "no column b: size is missing in all rows" in err
    assert list(ShardIndex.load(tmp_path / "packed").modalities) == ["caption", "colour"]


def test_a_row_without_anything_is_in_no_cluster(run, table, call, tmp_path):
    rows = make_rows(3, tmp_path)
    rows[1] |= {"a": "", "colour": "mauve", "caption": "", "photo": "", "ok": ""}
    code, said, _ = call("cluster", run, table(rows), "--out", tmp_path / "a.csv")
    assert code == 0
    assert "2 samples in" in said
    assert "1 samples have none of" in said
    assert [row["cluster"] == "" for row in read(tmp_path / "a.csv")] == [False, True, False]


def test_other_forms_of_the_same_rows(run, table, call, tmp_path):
    rows = make_rows(20, tmp_path)
    code, _, err = call("cluster", run, table(rows), "--out", tmp_path / "a.csv", "--num-clusters", 3)
    assert code == 0, err
    expected = (tmp_path / "a.csv").read_bytes()
    assert {row["cluster"] for row in read(tmp_path / "a.csv")} <= set("012")

    columns = {name: [None if row[name] in ("", "?") else row[name] for row in rows] for name in rows[0]}
    parquet.write_table(pa.table(columns), tmp_path / "new.parquet")
    assert (
        call("cluster", run, tmp_path / "new.parquet", "--out", tmp_path / "b.csv", "--num-clusters", 3)[0]
        == 0
    )
    assert [{**row, "key": ""} for row in read(tmp_path / "b.csv")] == [
        {**row, "key": ""} for row in read(tmp_path / "a.csv")
    ]

    european = [
        {**row, "a": str(row["a"]).replace(".", ","), "b": str(row["b"]).replace(".", ",")} for row in rows
    ]
    path = write_csv(tmp_path / "new.tsv", european, delimiter="\t")
    code, _, err = call("cluster", run, path, "--out", tmp_path / "c.csv")
    assert code == 2
    assert "add --decimal ," in err
    assert (
        call("cluster", run, path, "--out", tmp_path / "c.csv", "--num-clusters", 3, "--decimal", ",")[0] == 0
    )
    assert (tmp_path / "c.csv").read_bytes() == expected


def test_modalities_and_groups_of_a_table(trained, run, call, tmp_path):
    shards, path = trained / "shards/base", trained / "base.csv"
    for flags in (["--modalities", "size,colour"], ["--by-group"]):
        for data, out in ((shards, "packed.csv"), (path, "table.csv")):
            code, _, err = call("cluster", run, data, "--out", tmp_path / out, "--overwrite", *flags)
            assert code == 0, err
        packed, direct = read(tmp_path / "packed.csv"), read(tmp_path / "table.csv")
        assert clusters(direct) == clusters(packed)
    assert [row["group"] for row in direct] == [row["owner"] for row in read(path)]
    of_group = {}
    for row in direct:
        assert of_group.setdefault(row["group"], row["cluster"]) == row["cluster"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--text", "caption"], "--text: comes from the run with --like. Leave it out"),
        (["--image-size", "16"], "--image-size: comes from the run with --like. Leave it out"),
        (["--config", "a.yaml"], "--config: comes from the run with --like. Leave it out"),
    ],
)
def test_flags_that_the_run_decides_are_refused(trained, run, call, tmp_path, flags, expected):
    code, _, err = call("pack", "table", trained / "base.csv", "--out", tmp_path / "x", "--like", run, *flags)
    assert code == 2
    assert expected in err
    assert not (tmp_path / "x").exists()


def test_tables_that_do_not_fit_are_explained(run, make_run, table, call, tmp_path):
    path = table([{"x": 1, "y": 2}])
    code, _, err = call("cluster", run, path, "--out", tmp_path / "a.csv")
    assert code == 2
    assert "has the columns x, y, but the run was trained on caption, colour, a, b, photo, ok" in err
    path = table([{"a": 1, "b": "12_34"}])
    code, _, err = call("cluster", run, path, "--out", tmp_path / "a.csv")
    assert code == 2
    assert "new.csv: row 2, column b: '12_34' is not a number" in err
    code, _, err = call("cluster", run, tmp_path / "none.csv", "--out", tmp_path / "a.csv")
    assert code == 2
    assert "none.csv: no such file" in err
    code, _, err = call("cluster", make_run(), path, "--out", tmp_path / "a.csv")
    assert code == 2
    assert "was not trained on a table" in err
    code, _, err = call("cluster", run, path, "--out", tmp_path / "a.csv", "--split", "test")
    assert code == 2
    assert "is a table, which has no splits" in err
    assert not (tmp_path / "a.csv").exists()


def test_other_data_with_its_own_vocabulary_names_the_remedy(run, table, call, tmp_path):
    rows = make_rows(90, tmp_path, seed=2)
    path = table([{**row, "caption": f"{row['caption']} indeed indeed"} for row in rows])
    code, _, err = call("pack", "table", path, "--out", tmp_path / "own", *FLAGS)
    assert code == 0, err
    code, _, err = call("cluster", run, tmp_path / "own", "--out", tmp_path / "a.csv")
    assert code == 2
    assert "modalities.caption.categories" in err
    assert "Pack new rows of a table with --like RUN" in err
