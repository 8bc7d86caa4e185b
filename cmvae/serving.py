"""Models for MLflow: rows of a table in, clusters and their probabilities out. No pickle is written.

`mlflow models serve -m FOLDER --env-manager local` answers over HTTP, and `mlflow.pyfunc.load_model(FOLDER)`
loads the model in Python. MLflow finds `_load_pyfunc` by the name of this module.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from cmvae.estimator import MultimodalClusterer
from cmvae.modalities import embedding_of
from cmvae.utils.errors import UserError
from cmvae.utils.files import remove_folder

_EXAMPLES = 3


class ServedClusterer:
    """What MLflow calls: `predict` on a data frame."""

    def __init__(self, clusterer: MultimodalClusterer) -> None:
        self._clusterer = clusterer

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Cluster rows.

        Args:
            model_input: columns of the table that the run was trained on; a modality is missing if a column
                of it is, or a cell.
            params: not used.

        Returns:
            Per row `cluster`, -1 if it has no modality, and `probability_0`, `probability_1`, ….
        """
        clusters, probabilities = self._clusterer.predict_with_proba(model_input)
        columns = {f"probability_{cluster}": p for cluster, p in enumerate(probabilities.T)}
        return pd.DataFrame({"cluster": clusters, **columns})


def _load_pyfunc(data_path: str) -> ServedClusterer:
    return ServedClusterer(MultimodalClusterer.from_pretrained(data_path))


def write_mlflow_model(run_dir: Path, folder: Path, num_clusters: int | None = None) -> None:
    """Write the model of a run as an MLflow model with a signature and an example.

    Args:
        run_dir: folder of a run that was trained on a table. Images and features of pretrained networks are
            not served: a row is clustered by its other columns.
        folder: where to; an earlier model there is replaced.
        num_clusters: another number of clusters, from the same model; None keeps the number.

    Raises:
        UserError: the run was not trained on a table, or on images alone, or its export is missing or
            damaged.
    """
    import mlflow.pyfunc
    from mlflow.models.signature import ModelSignature, infer_signature
    from mlflow.types import ColSpec, Schema, TensorSpec

    try:
        clusterer = MultimodalClusterer.from_run(run_dir, num_clusters)
    except ValueError as error:
        raise UserError(str(error)) from error
    if clusterer.columns is None:
        raise UserError(f"{run_dir}: was not trained on a table. Only rows of a table can be served")
    found = {name: embedding_of(modality) for name, modality in clusterer.model_.modalities.items()}
    embeddings = {name: embedding for name, embedding in found.items() if embedding is not None}
    served = {
        name: chosen
        for name, chosen in clusterer.columns.items()
        if clusterer.model_.modalities[name].kind != "image" and name not in embeddings
    }
    if not served:
        raise UserError(
            f"{run_dir}: was trained on images or features alone. Only other columns of a table can be served"
        )
    clusterer.columns = served
    extra = "[embed]" if any(embedding.of in served for embedding in embeddings.values()) else ""
    example = _example_rows(clusterer)
    answer = ServedClusterer(clusterer).predict(example)
    columns: list[ColSpec | TensorSpec] = [
        ColSpec("double" if is_numeric_dtype(example[name]) else "string", name, required=False)
        for name in example.columns
    ]
    signature = ModelSignature(inputs=Schema(columns), outputs=infer_signature(example, answer).outputs)
    if folder.exists():
        remove_folder(folder)
    with tempfile.TemporaryDirectory(prefix="cmvae-") as temporary:
        clusterer.save_pretrained(Path(temporary) / "clusterer")
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=__name__,
            data_path=str(Path(temporary) / "clusterer"),
            signature=signature,
            input_example=example,
            pip_requirements=[f"cmvae{extra}=={version('cmvae')}"],
        )


def _example_rows(clusterer: MultimodalClusterer) -> pd.DataFrame:
    """Rows that the model generates, in the columns and units of its table."""
    rows: dict[str, Any] = {}
    sampled = clusterer.sample(_EXAMPLES)
    for name, chosen in (clusterer.columns or {}).items():
        values = sampled[name]
        if isinstance(chosen, str):
            rows[chosen] = np.array(list(values), dtype=object)
        else:
            rows |= dict(zip(chosen, np.asarray(values, dtype=np.float64).T, strict=True))
    return pd.DataFrame(rows)
