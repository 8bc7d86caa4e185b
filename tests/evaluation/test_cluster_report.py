"""The page of the clusters: sections, what it escapes and embeds, its size, and how a browser shows it."""

from __future__ import annotations

import asyncio
import html.parser
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import find_browser, open_page
from mixed import COLOURS, LENGTH, Mixed, MixedOracle

from cmvae.clustering import joint_location, merge_clusters
from cmvae.config import ModalityConfig, ModelConfig
from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.datasets.base import Sample
from cmvae.datasets.writer import write_shards
from cmvae.evaluation.cluster_report import ReportSource, make_page, read_clusters, summary_limits
from cmvae.evaluation.cluster_summary import ClusterSummary
from cmvae.modalities import (
    BinaryModality,
    CategoricalModality,
    ImageModality,
    Modality,
    TextModality,
    VectorModality,
)
from cmvae.modalities.text import SPECIAL_TOKENS
from cmvae.models.cmvae import CMVAE, Posterior
from cmvae.models.encoding import encode_split
from cmvae.models.export import ClusterRecord, CurveRecord
from cmvae.visualize.cluster_page import render_page

SECTIONS = ["clusters", "map", "tree", "labels", "check", "curves", "settings"]
MAX_BYTES = 15 * 2**20
# Would set `window.hacked` as HTML, as an attribute, as a script or in a JSON block of a script.
ATTACK = '<img src=x onerror="window.hacked=1">\'"</script><script>window.hacked=1</script>{{ 7*7 }}'
EVIL: dict[str, Modality] = {
    "photo": ImageModality(shape=(3, 8, 8)),
    "caption": TextModality(
        shape=(LENGTH,), categories=(*SPECIAL_TOKENS, f"red{ATTACK}", f"green{ATTACK}", f"blue{ATTACK}")
    ),
    "sizes": VectorModality(shape=(2,), columns=(f"wing{ATTACK}", "beak"), mean=(50, 3), std=(20, 1.5)),
    "marks": BinaryModality(shape=(3,), columns=("crest", "stripe", f"spot{ATTACK}")),
    "habitat": CategoricalModality(categories=("shore", f"forest{ATTACK}", "field"), optional=True),
}


class Evil(Mixed):
    """The mixed data with names and words that are HTML."""

    name = ATTACK
    class_names = tuple(f"{colour}{ATTACK}" for colour in COLOURS)
    modalities = EVIL

    def sample(self, split: str, index: int) -> Sample:
        rng = np.random.default_rng([9, index])
        label = index % 3
        values = {
            "photo": (90 * label + rng.integers(0, 30, (3, 8, 8))).astype(np.uint8),
            "caption": np.array([3 + label, 1] + [0] * (LENGTH - 2)),
            "sizes": np.array([30 + 20 * label, rng.normal()], dtype=np.float32),
            "marks": (np.arange(3) == label).astype(np.uint8),
            "habitat": np.array(label),
        }
        if index % 5 == 0:
            del values["habitat"]
        return Sample(values, label)


class Parsed(html.parser.HTMLParser):
    """What a browser would find in a page: elements with attributes, and text outside of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag in ("script", "style"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data):
        if not self._open:
            self.text.append(data)


@pytest.fixture(scope="module")
def evil(tmp_path_factory) -> Path:
    """Folder with shards/ of `Evil` and the run/ of an untrained model, with four clusters and a tree."""
    folder = tmp_path_factory.mktemp("evil")
    write_shards(Evil(), folder / "shards")
    torch.manual_seed(0)
    names = {name: ModalityConfig(width=2) for name in EVIL}
    config = ModelConfig(shared_dim=4, private_dim=3, num_clusters=5, modalities=names, assign_by="joint")
    model = CMVAE(config, EVIL).eval()
    batches = EvaluationLoader(folder / "shards", split="train", modalities=list(EVIL), batch_size=64)
    encoded = encode_split(model, batches)
    hierarchy = merge_clusters(joint_location(encoded.shared_loc, encoded.present), 5)
    curve = CurveRecord(num_clusters=(5, 4, 3, 2), values=(0.5, 0.9, 0.4, 0.3), selected=4)
    record = ClusterRecord(criterion="stability", selected=4, told=None, curves={"stability": curve})
    model.cluster_prior.take(hierarchy, 4)
    model.save_pretrained(folder / "run/export", (hierarchy, record))
    return folder


@pytest.fixture
def evil_page(evil, experiment) -> Path:
    """The page of `Evil`, made once."""
    out = evil / "report.html"
    if not out.exists():
        shards = evil / "shards"
        config, splits = experiment(f"data.shards={shards}"), ["train", "validation", "test"]
        read = read_clusters(config, ShardIndex.load(shards), evil / "run", splits)
        out.write_text(render_page(make_page(*read)), encoding="utf-8")
    return out


def test_the_page_is_complete_and_shows_names_of_the_data_literally(evil_page):
    parsed = Parsed(evil_page.read_text(encoding="utf-8"))
    ids = [attributes.get("id") for tag, attributes in parsed.elements if tag == "section"]
    assert [name for name in ids if name in SECTIONS] == SECTIONS
    assert sum(name.startswith("cluster-") for name in ids) == 4
    text = " ".join(" ".join(parsed.text).split())
    for title in (
        "What sets it apart", "Nearest to its mean", "Least sure", "Generated from it", "Cohen’s d",
        "stability", "mean of this cluster", "config.yaml",
    ):  # fmt: skip
        assert title in text
    # Long names are cut, so only their beginnings are there; every kind of name is.
    for name in (
        "<img src=x onerror=",
        "red<img src=x",
        "wing<img src=x",
        "forest<img src=x",
        "spot<img src=x",
    ):
        assert name in text


def test_nothing_of_the_data_becomes_markup_and_nothing_is_loaded(evil_page):
    page = evil_page.read_text(encoding="utf-8")
    parsed = Parsed(page)
    scripts = [attributes for tag, attributes in parsed.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}, {}]
    for tag, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/webp;base64,")), (tag, name, value[:80])
    (policy,) = [
        attributes["content"] for _, attributes in parsed.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]  # fmt: skip
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe-inline" not in policy.partition("script-src")[2]
    assert "{{ 7*7 }}" in "".join(parsed.text), "templates are not evaluated"


def test_the_figures_are_valid_for_plotly(evil_page):
    import plotly.graph_objects as go

    page = evil_page.read_text(encoding="utf-8")
    start = page.index('id="data">') + len('id="data">')
    data = json.loads(page[start : page.index("</script>", start)])
    assert {"map", "tree", "criteria", "confusion"} <= data["figures"].keys()
    for figure in data["figures"].values():
        go.Figure(figure)  # raises for a property that Plotly does not know
    points = [n for trace in data["figures"]["map"]["data"][:4] for n in trace["customdata"]]
    assert sorted(points) == list(range(len(data["samples"])))


def test_clusters_that_are_known_are_described_by_what_makes_them(experiment, tmp_path):
    write_shards(Mixed(), tmp_path / "shards")
    model, index = MixedOracle(), ShardIndex.load(tmp_path / "shards")
    model.save_pretrained(tmp_path / "run/export")
    source = ReportSource(
        experiment(f"data.shards={tmp_path / 'shards'}"), index, tmp_path / "run", ["test"], model
    )
    summary = ClusterSummary(model, 3, summary_limits(source), seed=0)
    loader = EvaluationLoader(
        tmp_path / "shards", split="test", modalities=model.modality_names, batch_size=32
    )
    summary.add_batches(("test", batch) for batch in loader)
    page = make_page(source, summary)
    assert [cluster.size for cluster in page.clusters] == [20, 20, 20]
    for cluster, colour, habitat, mark in zip(
        page.clusters, COLOURS, ("shore", "forest", "field"), ("crest", "stripe", "spot"), strict=True
    ):
        assert cluster.classes == [(colour, 1.0)]
        assert cluster.words[0].name == colour
        assert (cluster.words[0].inside, cluster.words[0].outside) == ("100%", "0%")
        assert [(view.name, view.strength) for view in cluster.categories] == [(habitat, "3")]
        (column,) = [view for view in cluster.columns if view.name == mark]
        assert (column.inside, column.outside) == ("100%", "0%")
        assert len(cluster.generated) == len(cluster.nearest) == 8
    wing = {view.name: view for view in page.clusters[2].columns}["wing"]
    assert float(wing.inside) == pytest.approx(70, abs=2), "in the units of the data"
    assert float(wing.outside) == pytest.approx(40, abs=2)
    assert page.to_check == []
    assert page.figures["confusion"]["data"][0]["customdata"] == np.diag([20, 20, 20]).tolist()


class Noise(CMVAE):
    """Fifty clusters of incompressible pictures, long texts and wide tables, encoded without a network."""

    def __init__(self) -> None:
        words = tuple(f"word-{number}" for number in range(2000))
        modalities = {
            "photo": ImageModality(shape=(3, 64, 64)),
            "text": TextModality(shape=(64,), categories=(*SPECIAL_TOKENS, *words)),
            "table": VectorModality(
                shape=(60,),
                columns=tuple("c" * 200 + str(n) for n in range(60)),
                mean=(0,) * 60,
                std=(1,) * 60,
            ),
        }
        config = ModelConfig(
            shared_dim=8,
            private_dim=2,
            num_clusters=50,
            cluster_mean_range=3,
            modalities={name: ModalityConfig(width=2) for name in modalities},
        )
        super().__init__(config, modalities)
        self.eval()

    def encode(self, inputs):
        tables = inputs["table"]
        posteriors = {}
        for number, name in enumerate(inputs):
            loc = tables[:, 8 * number : 8 * number + 8]
            posteriors[name] = Posterior(
                self.family(loc, torch.ones_like(loc)), self.family(loc[:, :2], torch.ones_like(loc[:, :2]))
            )
        return posteriors


def test_the_page_of_100_000_samples_has_at_most_15_mb(experiment, tmp_path):
    torch.manual_seed(0)
    rng, model = np.random.default_rng(0), Noise()
    model.save_pretrained(tmp_path / "run/export")
    num_classes, size = 300, 500
    index = ShardIndex.model_validate(
        {
            "name": "noise",
            "source": {},
            "modalities": {name: m.model_dump() for name, m in model.modalities.items()},
            "class_names": [f"class {'x' * 300}{n}" for n in range(num_classes)],
            "splits": {},
        }
    )
    config = experiment("evaluation.map_samples=2000")
    source = ReportSource(config, index, tmp_path / "run", ["train"], model)
    summary = ClusterSummary(model, num_classes, summary_limits(source), seed=0)
    modalities = [
        {
            "photo": torch.from_numpy(rng.integers(0, 256, (size, 3, 64, 64), dtype=np.uint8)),
            "text": torch.from_numpy(rng.integers(3, 2003, (size, 64))),
            "table": torch.from_numpy(rng.normal(size=(size, 60), scale=3).astype(np.float32)),
            "mask": torch.ones(size, 3, dtype=torch.bool),
            "valid": torch.ones(size, dtype=torch.bool),
            "label": torch.from_numpy(rng.integers(num_classes, size=size)),
        }
        for _ in range(5)
    ]
    for number in range(200):
        keys = [f"{'k' * 200}-{number}-{row}" for row in range(size)]
        summary.add_batches([("train", modalities[number % 5] | {"key": keys})])
    assert summary.sizes.sum() == 100_000
    page = make_page(source, summary)
    assert all(cluster.nearest and cluster.least_sure for cluster in page.clusters)
    assert {f"histograms-{cluster.id}" for cluster in page.clusters} <= page.figures.keys()
    assert len(page.to_check) > 10
    size_of_page = len(render_page(page).encode())
    assert 5 * 2**20 < size_of_page <= MAX_BYTES


def test_a_browser_draws_the_page_and_shows_the_sample_under_the_pointer(evil_page, tmp_path):
    find_browser()

    async def look() -> None:
        async with open_page(evil_page.as_uri(), tmp_path / "profile") as page:
            places = await page.evaluate("document.querySelectorAll('.plot').length")
            assert places >= 4
            for place in range(places):
                await page.evaluate(f"document.querySelectorAll('.plot')[{place}].scrollIntoView()")
                await page.wait_for(f"document.querySelectorAll('.plot')[{place}].dataset.drawn === 'yes'")
            drawn = (
                "[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('svg.main-svg'))"
            )
            assert await page.evaluate(drawn)

            await page.evaluate("document.getElementById('map').scrollIntoView()")
            point = "document.querySelector('#map .points path').getBoundingClientRect()"
            x, y = [await page.evaluate(f"{point}.{side} + 3") for side in ("left", "top")]
            await page.move_mouse(x - 40, y - 40)
            await page.move_mouse(x, y)
            await page.wait_for("!document.getElementById('hover').hidden")
            shown = await page.evaluate("document.getElementById('hover').textContent")
            assert "caption: " in shown
            assert "<img src=x" in shown, "as text"
            assert await page.evaluate("document.querySelector('#hover img').naturalWidth") == 8

            background = "getComputedStyle(document.body).backgroundColor"
            letters = "getComputedStyle(document.querySelector('#tree .xtick text')).fill"
            light = [await page.evaluate(colour) for colour in (background, letters)]
            await page.send(
                "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}]
            )
            await page.wait_for(f"{background} !== {json.dumps(light[0])}")
            await page.wait_for(f"{letters} !== {json.dumps(light[1])}")

            assert await page.evaluate("window.hacked") is None
            assert page.errors == []
            assert {url.partition(":")[0] for url in page.requests} <= {"file", "data", "blob"}

    asyncio.run(look())


def test_the_curves_of_an_untracked_run_are_explained(evil_page):
    text = " ".join(Parsed(evil_page.read_text(encoding="utf-8")).text)
    assert "No curves: " in text
    assert "tracking.enabled=true" in text
