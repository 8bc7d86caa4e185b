"""`cmvae impute`: present cells stay, missing ones are filled in the units and words of the table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from new_rows import COLOURS, make_rows, read
from pyarrow import parquet

from cmvae.commands.imputed_table import summarise
from cmvae.modalities import BinaryModality, CategoricalModality, VectorModality
from cmvae.models.likelihoods import LocationLikelihood

SPREADS = {"a": "a_sd", "b": "b_sd", "colour": "colour_confidence", "ok": "ok_confidence"}
FILLED = ("caption", "colour", "a", "b", "ok")


def check_filled(before, after):
    """Every cell of the rows before is unchanged, or was missing and is filled with something plausible."""
    number_filled = 0
    for old, new in zip(before, after, strict=True):
        for column in new:
            if column not in FILLED:
                assert column in SPREADS.values() or new[column] == str(old[column])
                continue
            if column in old and str(old[column]).strip() not in ("", "?"):
                assert new[column] == str(old[column])
                assert new.get(SPREADS.get(column), "") == ""
                continue
            number_filled += 1
            if column in ("a", "b"):
                assert (80 if column == "a" else 1) < float(new[column]) < (160 if column == "a" else 4)
                # At least the noise of the likelihood, whose scale is 0.75 of the deviation in the training.
                assert (5 if column == "a" else 0.1) < float(new[SPREADS[column]]) < 40
            elif column == "colour":
                assert new[column] in COLOURS
                assert 1 / 3 <= float(new["colour_confidence"]) <= 1
            elif column == "ok":
                assert new[column] in ("Yes", "No")
                assert 0.5 <= float(new["ok_confidence"]) <= 1
    return number_filled


def test_missing_cells_are_filled_and_present_cells_stay(run, table, call, tmp_path):
    rows = make_rows(40, tmp_path, seed=3)
    for number, row in enumerate(rows):
        # What no modality is made of, and texts that a table must quote.
        row["note"] = f' x, "{number}"\n\rz '
        row[""] = f"unnamed {number}"
    rows[0] |= {"caption": "  Two  spaces, kept ", "a": " 101.5 ", "colour": "mauve"}
    rows[1] |= dict.fromkeys((*FILLED, "photo"), "")
    path = table(rows)
    code, said, err = call("impute", run, path, "--out", tmp_path / "full.csv", "--draws", 5)
    assert code == 0, err
    full = read(tmp_path / "full.csv")
    assert list(full[0]) == [*rows[0], "colour_confidence", "a_sd", "b_sd", "ok_confidence"]
    number = check_filled(rows, full)
    assert f"{number} cells filled in 40 rows" in said
    assert "photo: missing in 1 rows, and not imputed: images and dates are not written" in err
    assert "colour: 1 of" in err
    assert "'mauve'" in err
    code, _, err = call("impute", run, path, "--out", tmp_path / "again.csv", "--draws", 5)
    assert code == 0, err
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "full.csv").read_bytes()
    code, _, err = call("impute", run, path, "--out", tmp_path / "seed.csv", "--draws", 5, "--seed", 1)
    assert code == 0, err
    assert (tmp_path / "seed.csv").read_bytes() != (tmp_path / "full.csv").read_bytes()


def test_columns_that_the_table_lacks_are_added(run, table, call, tmp_path):
    rows = [{"b": row["b"], "ok": row["ok"]} for row in make_rows(5, tmp_path)]
    code, _, err = call("impute", run, table(rows), "--out", tmp_path / "full.csv", "--draws", 2)
    assert code == 0, err
    full = read(tmp_path / "full.csv")
    assert list(full[0])[:5] == ["b", "ok", "caption", "colour", "a"]
    assert check_filled(rows, full) == 15
    assert "photo: missing in 5 rows" in err


def test_other_forms_are_read_and_written(run, table, call, tmp_path):
    rows = make_rows(20, tmp_path)
    european = [
        {**row, "a": str(row["a"]).replace(".", ","), "b": str(row["b"]).replace(".", ",")} for row in rows
    ]
    path = tmp_path / "new.csv"
    header = ";".join(european[0])
    path.write_text("\n".join([header, *(";".join(map(str, row.values())) for row in european)]))
    flags = ("--draws", 2, "--decimal", ",")
    table([{"a": 1}], "ignored.csv")  # copies the photos
    code, _, err = call("impute", run, path, "--out", tmp_path / "full.csv", *flags)
    assert code == 0, err
    lines = (tmp_path / "full.csv").read_text().splitlines()
    assert lines[0].startswith(f"{header};")
    filled = dict(zip(lines[0].split(";"), lines[5].split(";"), strict=True))
    assert "," in filled["a"]
    assert float(filled["a"].replace(",", ".")) == pytest.approx(120, abs=40)

    columns = {name: [None if row[name] in ("", "?") else row[name] for row in rows] for name in rows[0]}
    parquet.write_table(pa.table(columns), tmp_path / "new.parquet")
    code, _, err = call("impute", run, tmp_path / "new.parquet", "--out", tmp_path / "full.tsv", "--draws", 2)
    assert code == 0, err
    assert (tmp_path / "full.tsv").read_text().startswith("a\tb\tcolour")
    code, _, err = call("impute", run, path, "--out", tmp_path / "full.parquet")
    assert code == 2
    assert "Name it .csv or .tsv" in err


def test_a_spread_that_would_replace_a_column_is_refused(run, table, call, tmp_path):
    path = table([{"b": 2.0, "a": "", "a_sd": 1.0}])
    code, _, err = call("impute", run, path, "--out", tmp_path / "full.csv")
    assert code == 2
    assert "has a column 'a_sd', where the spread of the draws is to be written. Rename it" in err
    assert not (tmp_path / "full.csv").exists()


@pytest.mark.parametrize("family", ["normal", "laplace"])
def test_the_spread_of_numbers_is_that_of_sampled_data(family):
    """Between means of p(x | z, w) and within it, in the units of the table, where these are sampled."""
    rng = np.random.default_rng(0)
    draws = rng.normal([5.0, -300.0], [1.0, 20.0], size=(50, 2)).astype(np.float32)
    modality = VectorModality(shape=(2,), columns=("x", "y"), mean=(5.0, -300.0), std=(2.0, 30.0))
    noise_variance = LocationLikelihood(family).variance(0.6)
    noise = getattr(rng, family)(0, 0.6, size=(20_000, 50, 2)) * modality.std
    sampled = (draws + noise).std(axis=(0, 1))
    cells = summarise(modality, draws, (), ".", noise_variance)
    for dimension, (value, spread) in enumerate(cells):
        assert float(value) == pytest.approx(draws[:, dimension].astype(float).mean(), abs=0.02)
        assert float(spread) == pytest.approx(sampled[dimension], rel=0.02)
    # A single draw has the spread of the likelihood.
    ((_, alone), _) = summarise(modality, draws[:1], (), ".", noise_variance)
    assert float(alone) == pytest.approx(noise.std(axis=(0, 1))[0], rel=0.02)


def test_draws_of_categories_are_counted():
    binary = BinaryModality(shape=(2,), columns=("p", "q"))
    draws = np.array([[1, 0], [1, 0], [0, 0], [1, 1]], dtype=np.uint8)
    assert summarise(binary, draws, [("yes", "no"), ("1", "0")], ",") == [("yes", "0,75"), ("0", "0,75")]
    categorical = CategoricalModality(categories=("red", "blue"))
    assert summarise(categorical, np.array([1, 0, 1, 1]), (), ".") == [("blue", "0.75")]
