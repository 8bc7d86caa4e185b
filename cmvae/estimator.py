"""Clustering from Python in the way of scikit-learn: fit and predict on data in memory."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from cmvae.clustering import joint_location
from cmvae.config import (
    TABLE_NAME,
    CMVAEExperiment,
    load_cmvae_run,
    load_config,
    load_run_table,
    save_config,
)
from cmvae.data.batch import stack_values, to_device
from cmvae.data.index import TableSchema
from cmvae.datasets.columns import ColumnSource, read_row
from cmvae.datasets.embedding import EmbedRequest, embed_request, embed_source
from cmvae.datasets.memory import names_of, read_values
from cmvae.datasets.splits import draw_splits
from cmvae.datasets.values import (
    FitSettings,
    Kind,
    Values,
    count_unknown,
    describe_unknown,
    fit_modality,
    make_column,
)
from cmvae.datasets.writer import write_shards
from cmvae.modalities import Modality, embedding_of
from cmvae.models.cmvae import CMVAE, stack_shared_locations
from cmvae.models.export import load_clusters
from cmvae.models.hub import find_export
from cmvae.models.imputation import generate_from_present
from cmvae.training.cmvae_task import CMVAETask
from cmvae.training.starter_config import STARTER_CLUSTERS, write_starter_config
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole
from cmvae.utils.progress import quiet
from cmvae.utils.seeds import derive_seed

ESTIMATOR_NAME = "clusterer.json"
EXPERIMENT_NAME = "experiment.yaml"
NO_CLUSTER = -1
"""Label of a sample that has none of the modalities."""


class MultimodalClusterer(ClusterMixin, TransformerMixin, BaseEstimator):
    """Cluster samples that have several modalities, with a CMVAE (Palumbo et al., ICLR 2024).

    Data is a dict from modality to values of N samples: an array (N, D) or a data frame of numbers, a list of
    sentences or of categories, images as arrays or paths. None and NaN are missing values; a sample needs one
    modality at least. A single array (N, D) is one modality.

    Args:
        num_clusters: number of clusters; None finds the number that the data shows.
        kinds: kinds of modalities, `image`, `text`, `vector`, `binary` or `categorical`, where the values do
            not show it. Numbers are vectors, booleans binary, strings categorical if there are at most 20
            different single words, else text.
        columns: for one data frame: by modality the name of a column or a list of names.
        seed: of the weights, the order of samples and all noise.
        embed: by modality of images or sentences a pretrained network, `LIBRARY:NETWORK[@PATH]` as for
            `cmvae pack --embed`: its features become another modality, `NAME_features`.
        image_size: height and width to which images in files are resized; arrays keep their size.
        validation_fraction: share of the samples that are held out of the training. They are used to
            validate, and to choose the number of clusters by `clusters.criterion: entropy`.
        settings: settings of the experiment by dotted key, such as `{"train.max_steps": 500}`, see
            `cmvae.config`; the others are those that `cmvae pack` would write for the data.
        run_dir: folder for shards, checkpoints and export, which are kept; None uses a temporary folder.
        verbose: whether to draw progress bars.

    Attributes:
        labels_: (N,) int64, cluster of each sample, from 0; -1 for a sample without any modality.
        num_clusters_: number of clusters.
        model_: the trained `CMVAE`.
        config_: the experiment, a `cmvae.config.CMVAEExperiment`.
        n_features_in_: number of columns, if the data was one array.
    """

    def __init__(
        self,
        num_clusters: int | None = None,
        *,
        kinds: Mapping[str, Kind] | None = None,
        columns: Mapping[str, str | Sequence[str]] | None = None,
        embed: Mapping[str, str] | None = None,
        seed: int = 0,
        image_size: int = 64,
        validation_fraction: float = 0.1,
        settings: Mapping[str, Any] | None = None,
        run_dir: str | Path | None = None,
        verbose: bool = True,
    ) -> None:
        self.num_clusters = num_clusters
        self.kinds = kinds
        self.columns = columns
        self.embed = embed
        self.seed = seed
        self.image_size = image_size
        self.validation_fraction = validation_fraction
        self.settings = settings
        self.run_dir = run_dir
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None, groups: Sequence[Any] | None = None) -> MultimodalClusterer:
        """Train a model and assign the samples.

        Args:
            X: data, see the class.
            y: ignored.
            groups: (N,) group of each sample: samples of one group are not contrasted with each other and are
                held out together.

        Raises:
            ValueError: the data or a setting is invalid; the message says which.
            KeyboardInterrupt: the training was stopped with Ctrl-C.
        """
        with _errors_as_value_errors(), _global_random_state_kept(), quiet(not self.verbose):
            values = self._read(X, reset=True)
            for name in self.kinds or {}:
                if name not in values:
                    raise UserError(f"kinds: no modality {name!r}; there are {', '.join(values)}")
            self._kinds = {name: part.kind for name, part in values.items()}
            with _run_folder(self.run_dir) as folder:
                self._train(values, groups, folder)
                export = folder / "run" / "export"
                self.model_ = CMVAE.from_pretrained(export)
                self._clusters = load_clusters(export)
            self._set_clusters()
        # The rare words of the training data are unknown on purpose.
        self.labels_ = np.concatenate([self._assign(*part) for part in self._encode(X, report_unknown=False)])
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Cluster of each sample, (N,) int64 from 0; -1 for a sample without any modality.

        Args:
            X: data with some or all modalities of the training, any number of samples. Words and categories
                that the model does not know are reported in a warning, and read as `<unk>` and missing.

        Raises:
            ValueError: the data does not fit the model.
        """
        return np.concatenate([self._assign(*part) for part in self._encode(X)])

    def predict_proba(self, X: Any) -> np.ndarray:
        """p(c | z) at the joint location of the modalities, (N, num_clusters_).

        NaN for a sample without any modality.
        """
        return np.concatenate([self._probabilities(*part) for part in self._encode(X)])

    def predict_with_proba(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """What `predict` and `predict_proba` return, from one encoding of the data."""
        parts = [(self._assign(*part), self._probabilities(*part)) for part in self._encode(X)]
        labels, probabilities = map(np.concatenate, zip(*parts, strict=True))
        return labels, probabilities

    def transform(self, X: Any) -> np.ndarray:
        """Joint location of the modalities in the shared space, (N, shared_dim).

        NaN for a sample without any modality.
        """
        return np.concatenate([self._locate(*part) for part in self._encode(X)])

    def _encode(self, data: Any, report_unknown: bool = True) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """By batch: locations (B, M, D_z) of q(z|x_m), and the modalities that samples have, (B, M) bool."""
        for inputs, mask in self._batches(data, report_unknown):
            yield stack_shared_locations(self.model_.encode(inputs)).detach().numpy(), mask.numpy()

    def _assign(self, located: np.ndarray, present: np.ndarray) -> np.ndarray:
        labels, has_some = np.full(len(located), NO_CLUSTER), present.any(axis=1)
        if has_some.any():
            clusters = self.model_.assign_locations(located[has_some], present[has_some]).cluster.numpy()
            labels[has_some] = np.searchsorted(self._active, clusters)
        return labels

    def _locate(self, located: np.ndarray, present: np.ndarray) -> np.ndarray:
        has_some = present.any(axis=1)
        joint = np.full((len(located), located.shape[2]), np.nan, dtype=np.float32)
        joint[has_some] = joint_location(located[has_some], present[has_some])
        return joint

    def _probabilities(self, located: np.ndarray, present: np.ndarray) -> np.ndarray:
        locations = self._locate(located, present)
        has_some = present.any(axis=1)
        probabilities = np.full((len(locations), self.num_clusters_), np.nan)
        if has_some.any():
            probabilities[has_some] = self.model_.cluster_probabilities(locations[has_some])[:, self._active]
        return probabilities

    def sample(self, n_samples: int = 1, cluster: int | None = None) -> dict[str, Any]:
        """Generate samples of all modalities, unconditionally or of one cluster.

        Returns:
            By modality N values in the form of the data: images (N, channels, height, width) uint8, vectors
            (N, D) float32 in their units, binary (N, D) uint8, sentences and categories a list of str.
        """
        check_is_fitted(self)
        if cluster is not None and not 0 <= cluster < self.num_clusters_:
            raise ValueError(f"cluster {cluster}: there are clusters 0 to {self.num_clusters_ - 1}")
        chosen = None if cluster is None else int(self._active[cluster])
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "sample"))
        generated = self.model_.generate(n_samples, cluster=chosen, generator=generator)
        modalities = self.model_.modalities
        return {name: self._as_given(name, modalities[name].to_stored(x)) for name, x in generated.items()}

    def impute(self, X: Any) -> dict[str, Any]:
        """The data with missing modalities generated from those that are present.

        Modalities that `X` does not have at all are generated for all samples. A sample without any modality
        is generated unconditionally.

        Returns:
            By modality of the model, as `sample` returns them.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "impute"))
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self.model_.modality_names}
        for inputs, mask in self._batches(X):
            names = list(inputs)
            generated = generate_from_present(
                self.model_, inputs, mask, self.model_.modality_names, generator
            )
            for name, data in generated.items():
                if name in inputs:
                    there = mask[:, names.index(name)]
                    data[there] = inputs[name][there].to(data.dtype)
                parts[name].append(self.model_.modalities[name].to_stored(data))
        return {name: self._as_given(name, np.concatenate(stored)) for name, stored in parts.items()}

    def score(self, X: Any, y: Any = None) -> float:
        """Mean bound on the joint log-likelihood per sample, in nats, with the same noise at every call.

        Args:
            X: data with all modalities of the training; single values may be missing.
            y: ignored.
        """
        check_is_fitted(self)
        task = CMVAETask(self.model_, self.config_.objective).eval()
        total, count = 0.0, 0
        for inputs, mask in self._batches(X):
            if set(inputs) != set(self.model_.modality_names):
                raise ValueError(f"score needs all modalities: {', '.join(self.model_.modality_names)}")
            valid = mask.any(1)
            batch = {**inputs, "mask": mask, "valid": valid, "_seed": self.seed}
            batch["_place"] = range(count, count + len(mask))
            with torch.no_grad():
                _, report = task(batch)
            total += float(report["bound"][valid].sum())
            count += int(valid.sum())
        return total / max(count, 1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model and what `from_pretrained` needs; no pickles.

        Args:
            folder: where to; an earlier export in it is replaced.
        """
        check_is_fitted(self)
        folder = Path(folder)
        self.model_.save_pretrained(folder, self._clusters)
        parameters = {
            "num_clusters": self.num_clusters,
            "kinds": self._kinds,
            "columns": self._columns_as_lists(),
            "embed": None if self.embed is None else dict(self.embed),
            "seed": self.seed,
            "image_size": self.image_size,
        }
        write_whole(folder / ESTIMATOR_NAME, (json.dumps(parameters, indent=1) + "\n").encode())
        save_config(self.config_, folder / EXPERIMENT_NAME)

    @classmethod
    def from_pretrained(cls, folder: str | Path, num_clusters: int | None = None) -> MultimodalClusterer:
        """Load what `save_pretrained` wrote.

        Args:
            folder: the export, or `user/name` of a model on the Hugging Face Hub.
            num_clusters: another number of clusters, from the same model; None keeps the number.

        Raises:
            ValueError: the folder is no such export, or is damaged.
        """
        with _errors_as_value_errors():
            folder = find_export(folder)
            try:
                parameters = json.loads((folder / ESTIMATOR_NAME).read_text(encoding="utf-8"))
                loaded = cls(**parameters)
            except (OSError, TypeError, ValueError) as error:
                raise UserError(f"{folder / ESTIMATOR_NAME}: cannot be read: {error}") from error
            loaded.config_ = _as_cmvae(load_config(folder / EXPERIMENT_NAME))
            loaded.model_ = CMVAE.from_pretrained(folder, num_clusters=num_clusters)
            loaded._clusters = load_clusters(folder)
            loaded._kinds = dict(loaded.kinds or {})
        loaded._set_clusters()
        return loaded

    @classmethod
    def from_run(cls, run_dir: str | Path, num_clusters: int | None = None) -> MultimodalClusterer:
        """Use the model of a training by `cmvae train`.

        Where the run was trained on a table, data is a data frame with columns of that table, of which dates
        are not read; otherwise a dict with the modalities of the run.

        Args:
            run_dir: folder of the run.
            num_clusters: another number of clusters, from the same model; None keeps the number.

        Raises:
            ValueError: the folder is no run of a CMVAE that was trained to its end, or is damaged.
        """
        run_dir = Path(run_dir)
        with _errors_as_value_errors():
            config = load_cmvae_run(run_dir)
            model = CMVAE.from_pretrained(run_dir / "export", num_clusters=num_clusters)
            kinds = {name: _given_kind(modality) for name, modality in model.modalities.items()}
            columns: dict[str, str | Sequence[str]] | None = None
            if (run_dir / TABLE_NAME).is_file():
                table = load_run_table(run_dir)
                of_table = table.columns
                # One column is a list of its cells, several are a matrix.
                columns = {
                    name: list(of_table[name]) if kinds[name] in ("vector", "binary") else of_table[name][0]
                    for name in kinds
                    if name not in table.dates
                }
            sizes = [modality.shape[1] for modality in model.modalities.values() if modality.kind == "image"]
            loaded = cls(
                config.clusters.num_clusters,
                kinds=kinds,
                columns=columns,
                seed=config.seed,
                image_size=sizes[0] if sizes else 64,
            )
            loaded.config_, loaded.model_, loaded._kinds = config, model, kinds
            loaded._clusters = load_clusters(run_dir / "export")
        loaded._set_clusters()
        return loaded

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")

    def _read(self, data: Any, reset: bool = False) -> dict[str, Values]:
        """The modalities of `data`; `reset` where they are those of the training."""
        if self.columns:
            columns = self.columns if reset else self._present_columns(data)
            return read_values(data, self.kinds or {} if reset else self._kinds, columns)
        if not isinstance(data, Mapping) or hasattr(data, "toarray"):  # a sparse matrix may be a mapping
            data = {"x": validate_data(self, data, reset=reset, ensure_all_finite="allow-nan")}
        return read_values(data, self.kinds or {} if reset else self._kinds, {})

    def _present_columns(self, data: Any) -> dict[str, str | Sequence[str]]:
        """`columns` of the modalities that a data frame has."""
        known = set(getattr(data, "columns", ()))
        return {
            name: chosen
            for name, chosen in (self.columns or {}).items()
            if known.issuperset(names_of(chosen))
        }

    def _columns_as_lists(self) -> dict[str, str | list[str]] | None:
        if self.columns is None:
            return None
        return {name: c if isinstance(c, str) else list(c) for name, c in self.columns.items()}

    def _train(self, values: Mapping[str, Values], groups: Sequence[Any] | None, folder: Path) -> None:
        """Pack the values and train on them, below `folder`."""
        num_samples = len(next(iter(values.values())))
        groups_of = np.arange(num_samples) if groups is None else np.asarray(groups)
        kept = np.flatnonzero(np.any([part.present for part in values.values()], axis=0))
        if len(kept) < 2:
            raise UserError(f"{len(kept)} samples with a modality: a clustering needs at least 2")
        rng = np.random.default_rng(derive_seed(self.seed, "validation rows"))
        share = max(self.validation_fraction, 1 / len(kept))
        drawn = draw_splits(groups_of[kept], (1 - share, share, 0.0), rng)
        splits = {split: kept[members] for split, members in drawn.items() if len(members)}
        settings = FitSettings(image_size=self.image_size)
        modalities = {
            name: fit_modality(name, part, splits["train"], settings) for name, part in values.items()
        }
        columns = {name: make_column(name, part, modalities[name]) for name, part in values.items()}
        named = {name: tuple(names_of(chosen)) for name, chosen in (self.columns or {}).items()}
        source = ColumnSource(
            name="memory",
            columns=columns,
            splits=splits,
            labels=None,
            class_names=None,
            keys=[f"row-{row:09d}" for row in range(num_samples)],
            settings={"source": "memory"},
            groups=None if groups is None else [str(group) for group in groups],
            # `cmvae cluster` reads new rows from tables with the same columns.
            table=TableSchema(columns=named) if named else None,
        )
        source = embed_source(source, self._embed_requests())
        shards = folder / "shards"
        index = write_shards(source, shards, seed=self.seed, force=True, table=source.table)
        path = folder / EXPERIMENT_NAME
        path.write_text(write_starter_config(index, shards), encoding="utf-8")
        overrides = [
            f"seed={self.seed}",
            f"output_dir={json.dumps(str(folder / 'run'))}",
            "tracking.enabled=false",
        ]
        if self.num_clusters is not None:
            overrides.append(f"clusters.num_clusters={self.num_clusters}")
            overrides.append(f"model.num_clusters={max(self.num_clusters, STARTER_CLUSTERS)}")
        overrides += [
            f"{key}={yaml.safe_dump(value).strip()}" for key, value in (self.settings or {}).items()
        ]
        self.config_ = _as_cmvae(load_config(path, overrides))

        from cmvae.training.run import run_training

        if run_training(self.config_, index, overwrite=True) is not None:
            raise KeyboardInterrupt

    def _embed_requests(self) -> list[EmbedRequest]:
        try:
            return [embed_request(f"{name}={network}") for name, network in (self.embed or {}).items()]
        except argparse.ArgumentTypeError as error:
            raise UserError(f"embed: {error}") from error

    def _set_clusters(self) -> None:
        self._active = self.model_.cluster_prior.active.cpu().numpy().nonzero()[0]
        self.num_clusters_ = len(self._active)

    def _batches(self, data: Any, report_unknown: bool = True) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Batches of data (B, *shape) by modality, and which samples have which of them, (B, M) bool."""
        check_is_fitted(self)
        with _errors_as_value_errors():
            values = self._read(data)
            unknown = [name for name in values if name not in self.model_.modalities]
            if unknown:
                known = ", ".join(self.model_.modalities)
                raise UserError(f"no modality {', '.join(unknown)}: the model was trained on {known}")
            for name, modality in self.model_.modalities.items():
                embedding = embedding_of(modality)
                if embedding is not None and embedding.of in values:
                    values.setdefault(name, values[embedding.of])
            columns = {
                name: make_column(name, values[name], self.model_.modalities[name])
                for name in self.model_.modality_names
                if name in values
            }
            modalities = {name: self.model_.modalities[name] for name in columns}
            for name, modality in modalities.items() if report_unknown else ():
                message = describe_unknown(name, count_unknown(values[name], modality), modality)
                if message is not None:
                    warnings.warn(message, stacklevel=2)
            num_samples, size = len(next(iter(values.values()))), self.config_.evaluation.batch_size
            for start in range(0, num_samples, size):
                rows = range(start, min(start + size, num_samples))
                stored = stack_values([read_row(columns, row) for row in rows], modalities)
                inputs = to_device(stored, modalities, torch.device("cpu"))
                yield inputs, inputs.pop("mask")

    def _as_given(self, name: str, stored: np.ndarray) -> Any:
        modality = self.model_.modalities[name]
        return [modality.describe(row) for row in stored] if modality.num_categories else stored


def _given_kind(modality: Modality) -> Kind:
    """The kind of the values that a modality is made from."""
    embedding = embedding_of(modality)
    return cast(Kind, modality.kind if embedding is None else embedding.kind)


def _as_cmvae(config: Any) -> CMVAEExperiment:
    if not isinstance(config, CMVAEExperiment):
        raise UserError("settings: describe the training of a CMVAE, not of a refiner")
    return config


@contextlib.contextmanager
def _run_folder(run_dir: str | Path | None) -> Iterator[Path]:
    if run_dir is not None:
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="cmvae-") as temporary:
        yield Path(temporary)


@contextlib.contextmanager
def _errors_as_value_errors() -> Iterator[None]:
    """scikit-learn's callers expect a `ValueError` for invalid data and settings."""
    try:
        yield
    except UserError as error:
        raise ValueError(str(error)) from error


@contextlib.contextmanager
def _global_random_state_kept() -> Iterator[None]:
    """Training seeds the global generators: give the caller's state back."""
    numpy_state = np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
