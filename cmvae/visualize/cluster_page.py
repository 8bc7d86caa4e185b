"""The page that says what the clusters of a run are: one HTML file that needs no server and no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cmvae.visualize.page_figures import Figure

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class ValueView:
    """One value of one modality: a picture or a text."""

    modality: str
    text: str = ""
    image: str = ""
    """A `data:` URI; empty if the value is shown as text."""


@dataclass(frozen=True)
class SampleView:
    """One sample, real or generated."""

    values: Sequence[ValueView]
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class FeatureView:
    """One word, category or column that sets a cluster apart."""

    modality: str
    name: str
    inside: str
    """Its share or mean in the cluster."""
    outside: str
    """Its share or mean elsewhere."""
    strength: str
    """Effect size, lift or weight."""


@dataclass(frozen=True)
class ClusterView:
    """One cluster."""

    id: int
    colour: str
    size: int
    share: float
    """Of all samples that have a cluster."""
    confidence: float
    """Mean p(c|z) of its samples."""
    stability: float | None
    """None if there are too few samples."""
    neighbours: Sequence[tuple[int, float]]
    """Other clusters, nearest first, with their distances."""
    classes: Sequence[tuple[str, float]]
    """Most frequent classes of its labelled samples, with their shares."""
    summary: Sequence[str]
    """What sets it apart most, in a few words."""
    columns: Sequence[FeatureView]
    words: Sequence[FeatureView]
    categories: Sequence[FeatureView]
    presence: Sequence[FeatureView]
    """Modalities that its samples have more or less often than others."""
    mean_images: Sequence[ValueView]
    nearest: Sequence[SampleView]
    least_sure: Sequence[SampleView]
    generated: Sequence[SampleView]


@dataclass(frozen=True)
class CheckView:
    """A sample whose modalities choose different clusters."""

    sample: SampleView
    modality: str
    """The modality that makes the rarest choice."""
    rate: float
    """How often this modality chooses the same for samples of the cluster."""
    opinions: Mapping[str, tuple[int, float]]
    """Modality → the cluster that it chooses, and its probability."""


@dataclass(frozen=True)
class ClusterPage:
    """Contents of the page. All strings may come from the data; they are shown literally."""

    title: str
    facts: Sequence[tuple[str, str]]
    """Names and values about the run and the data."""
    modalities: Sequence[str]
    clusters: Sequence[ClusterView]
    overall_images: Sequence[ValueView]
    """Mean image of all samples per image modality."""
    neighbour_kind: str
    """What the distances of `ClusterView.neighbours` are."""
    figures: Mapping[str, Figure]
    """`map`, `tree`, `criteria`, `confusion`, `curves` and `histograms-CLUSTER`, each where there is one."""
    map_samples: Sequence[SampleView]
    """The sample of each point of the map, by its index."""
    map_note: str
    to_check: Sequence[CheckView]
    check_note: str
    curves_note: str
    settings: str
    """The config, as YAML."""


def render_page(page: ClusterPage) -> str:
    """Render the page.

    Everything is embedded, plotly.js once. All text is escaped, and a Content-Security-Policy admits only the
    two scripts of the page, by their hashes, and no request to any host.
    """
    # Slow to import, and used only here.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [get_plotlyjs(), (_TEMPLATES / "page.js").read_text(encoding="utf-8")]
    return environment.get_template("page.html.j2").render(
        page=page,
        data={"figures": page.figures, "samples": [_compact(sample) for sample in page.map_samples]},
        scripts=scripts,
        script_hashes=[_csp_hash(script) for script in scripts],
        style=(_TEMPLATES / "page.css").read_text(encoding="utf-8"),
    )


def _compact(sample: SampleView) -> dict[str, Any]:
    """A sample of the map without empty fields, of which there would be thousands."""
    values = [{key: text for key, text in asdict(value).items() if text} for value in sample.values]
    return {"title": sample.title, "note": sample.note, "values": values}


def _csp_hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
