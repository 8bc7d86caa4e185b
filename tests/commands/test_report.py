"""`cmvae report` on an untrained export: where the page goes, and what is refused."""

from __future__ import annotations

import re


def facts(page) -> dict[str, str]:
    """Names and values in the head of the page."""
    text = page.read_text(encoding="utf-8")
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))


def test_the_page_is_written_into_the_run_and_covers_all_splits(call, make_run, index):
    run = make_run()
    code, out, _ = call("report", run)
    assert code == 0
    assert str(run / "report.html") in out
    total = sum(split.num_samples for split in index.splits.values())
    found = facts(run / "report.html")
    assert found["samples"] == f"{total:,}"
    assert found["splits"] == "train, validation, test"
    assert found["number of clusters"] == "3, not recorded"
    assert found["modalities"] == "m0, m1, m2"


def test_one_split_and_another_path(call, make_run, index, tmp_path):
    run, out = make_run("m0"), tmp_path / "page.html"
    assert call("report", run, "--split", "test", "--out", out)[0] == 0
    assert facts(out)["samples"] == str(index.splits["test"].num_samples)
    assert not (run / "report.html").exists()
    text = out.read_text(encoding="utf-8")
    assert "No sample has two modalities that could disagree." in text
    assert "This run has no tree of its clusters." in text


def test_mistakes_are_named(call, make_run, make_refiner_run, tmp_path):
    run = make_run("m0")
    for arguments, message in (
        ((run, "--split", "nonsense"), "no split 'nonsense'"),
        ((run, "--out", tmp_path / "no/page.html"), "no/page.html: not a file in a folder that exists"),
        ((run, "--num-clusters", 2), "number of clusters of this export cannot be changed"),
        ((tmp_path / "nowhere",), "is no run"),
        ((make_refiner_run()[0],), "the run of a refiner"),
    ):
        code, _, err = call("report", *arguments)
        assert code == 2
        assert message in err


def test_a_full_disk_is_named(call, make_run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cmvae.commands.report.write_whole", full)
    code, _, err = call("report", make_run("m0"))
    assert code == 2
    assert (
        "report.html: cannot be written: [Errno 28] No space left on device. Give another path with --out"
        in err
    )
