"""The model card of a run, for the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cmvae.config import CMVAEExperiment, dump_yaml
from cmvae.models.cmvae import ExportConfig
from cmvae.models.export import load_clusters, read_export_config
from cmvae.utils.tables import markdown_table

# Metrics of an evaluation in the card, where there are any.
_METRICS = {
    "clustering/acc": "clustering accuracy",
    "clustering/nmi": "normalised mutual information",
    "coherence/conditional": "conditional coherence",
    "coherence/unconditional": "unconditional coherence",
    "likelihood/joint": "joint log-likelihood (nats)",
}
_FRONT_MATTER = """---
library_name: cmvae
tags:
- clustering
- multimodal
- variational-autoencoder
---
"""


def write_model_card(config: CMVAEExperiment, run_dir: Path, repository: str) -> str:
    """Describe a trained model: data, clusters, results, settings and use.

    Args:
        config: the experiment of the run.
        run_dir: folder of the run, with its export and, if it was evaluated, its evaluation.
        repository: `user/name` that the card belongs to.

    Raises:
        UserError: the export is missing or damaged.
    """
    export = run_dir / "export"
    modalities = read_export_config(export, ExportConfig).modalities
    _, record = load_clusters(export)
    described = markdown_table(
        ["modality", "kind", "shape"],
        [
            [name, modalities[name].kind, "×".join(map(str, modalities[name].shape))]
            for name in config.model.modalities
        ],
    )
    found = "as requested" if record.told is not None else f"found by {record.criterion}"
    sections = [
        _FRONT_MATTER,
        f"# {config.name}\n",
        "A CMVAE (Palumbo et al., ICLR 2024): it clusters samples of several modalities without labels, and "
        "generates any modality from any other.\n",
        f"{record.num_clusters} clusters, {found}.\n",
        described + "\n",
    ]
    metrics = _read_metrics(run_dir)
    if metrics:
        rows = [[title, f"{metrics[name]:.3f}"] for name, title in _METRICS.items() if name in metrics]
        sections.append("## Results\n\n" + markdown_table(["metric", "test split"], rows) + "\n")
    usage = (
        "from cmvae import CMVAE\n\n"
        f'model = CMVAE.from_pretrained("{repository}")\n'
        "samples = model.generate(16)  # by modality; model.modalities[name].to_stored gives its units\n"
    )
    sections.append(f"## Use\n\n```python\n{usage}```\n")
    sections.append(f"## Settings\n\n```yaml\n{dump_yaml(config)}```\n")
    return "\n".join(sections)


def _read_metrics(run_dir: Path) -> Mapping[str, float]:
    path = run_dir / "evaluation" / "metrics.json"
    metrics: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return metrics
