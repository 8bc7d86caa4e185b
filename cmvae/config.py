"""The whole experiment as frozen pydantic models: load YAML, apply `key=value` overrides, explain mistakes.

Imports neither torch nor anything that does, so that a mistake is reported in the first second.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)

from cmvae.data.index import OnError, ShardIndex
from cmvae.modalities import ModalityName
from cmvae.modalities.base import LikelihoodName
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole

Family = Literal["normal", "laplace"]
AugmentationName = Literal["flip", "crop"]
CriterionName = Literal["entropy", "silhouette", "stability", "agreement"]

# Parts of pydantic's locations that are no keys of the YAML: of a mapping's key, and of branches of a union.
_NO_KEY = re.compile(r"\[key\]|literal\[.*\]|constrained-\w+")


_Value = TypeVar("_Value")
_RESUMABLE = "may change when a run resumes"
Resumable = Annotated[_Value, _RESUMABLE]
"""Mark of a setting, or of a whole section, that may change when a run resumes: it changes what is reported,
kept or tolerated, but not the training. See `is_resumable`."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LikelihoodConfig(_Settings):
    """How a decoder's output is compared with the data: log p(x_n | z, w_n) and its weight s_n."""

    family: LikelihoodName | None = None
    """None is what fits the kind of the modality: Laplace for images, Normal for vectors, and so on."""
    scale: float = Field(default=0.75, gt=0)
    """Laplace's b or the Normal's standard deviation; images are in [0, 1], vectors standardised."""
    weight: float = Field(default=1.0, gt=0)
    """s_n: what the modality's log-likelihood is multiplied by in every log-weight."""


class ModalityConfig(_Settings):
    """Networks and likelihood of one modality."""

    network: str | None = None
    """Encoder and decoder family, a name from `cmvae.models.networks.NETWORKS`; None: what fits the kind."""
    width: PositiveInt = 64
    """Filters of the first stage, or hidden units; the published PolyMNIST networks have 64."""
    likelihood: LikelihoodConfig = LikelihoodConfig()


class ModelConfig(_Settings):
    """The generative model and its encoders."""

    family: Family = "laplace"
    """Family of every prior and posterior."""
    shared_dim: PositiveInt = 32
    """Dimensions of z."""
    private_dim: PositiveInt = 32
    """Dimensions of each w_m."""
    num_clusters: int = Field(default=40, ge=2)
    """Clusters to start from: more than are expected, the selection drops what is not needed."""
    cluster_mean_range: float = Field(default=1.0, gt=0)
    """Cluster means start uniform in (−range, range)."""
    assign_by: Literal["vote", "joint"] = "vote"
    """Where a sample's modalities disagree: each chooses a cluster and the mode is taken (the paper), or the
    cluster is read from the geometric median of their locations, see `cmvae.clustering.joint_location`."""
    modalities: dict[ModalityName, ModalityConfig] = Field(min_length=1)


def _as_several(value: object) -> object:
    if value is None:
        return ()
    if isinstance(value, int):
        return (value,)
    if not isinstance(value, (list, tuple)):
        raise ValueError("give one step, several as [800, 1500], or null")
    return value


class AlignmentConfig(_Settings):
    """The contrast between modalities beside the bound, see `cmvae.models.alignment`. Off with one modality.

    It tells samples apart, but not those of one group, where the packed data has groups.
    """

    weight: float = Field(default=0.0, ge=0)
    """What the contrast is multiplied by, in nats of the bound a sample; 0 is the published objective."""
    pretrain: Annotated[float, Field(ge=0, lt=1)] | PositiveInt = 0.0
    """The training begins with the contrast alone, on the encoders of z: for a share of its steps, or for so
    many. Then cluster means are found as by `refit_clusters_at`."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the logits. At 1 two encodings of one sample are expected to differ as two samples of p(z|c) do."""
    augment: dict[ModalityName, tuple[AugmentationName, ...]] = {}
    """Image modalities that the contrast sees mirrored at random (`flip`) or as a random part (`crop`): what
    a picture shows must be the same after it. The bound sees them as they are."""

    @model_validator(mode="after")
    def _pretrains_with_a_weight(self) -> AlignmentConfig:
        if self.pretrain and not self.weight:
            raise ValueError("pretrain needs a weight above 0: it trains with this term alone")
        return self


class ObjectiveConfig(_Settings):
    """The bound that is maximised."""

    name: Literal["iwae", "dreg"] = "iwae"
    """`iwae` with one sample is the ELBO."""
    num_samples: PositiveInt = 1
    """K: samples of the latents for each source modality."""
    beta: float = Field(default=1.0, gt=0)
    """Weight of the prior and posterior terms in every log-weight."""
    cross_sources: Literal["all"] | PositiveInt = "all"
    """Other modalities that each is decoded from in a training step: all, or so many, drawn anew every step
    and weighted to keep the bound's expectation. Takes time linear in the number of modalities."""
    decoder_checkpoint_above: PositiveInt | None = None
    """Gradient checkpointing of decoders: number of samples for which each decoder keeps its feature maps.
    The others are decoded in parts of at most this size, and again in the backward pass. Memory then does not
    grow with the number of samples or with the square of the number of modalities; a step takes longer by the
    second decoding. null keeps all maps. So does a decoder with batch norm, whose statistics are those
    of all samples."""
    refit_clusters_at: Annotated[tuple[PositiveInt, ...], BeforeValidator(_as_several)] = ()
    """Before the update that follows so many, the cluster means are found anew by k-means on encoded train
    data, see `cmvae.clustering.find_cluster_means`, and π becomes uniform: at one step, at several (`[800,
    1500]`), or never (null). A cluster that took two classes early on seldom lets one go, and later, when
    they lie apart, the halves of one class are known as such. VaDE (Jiang et al., 2017) sets its mixture up
    by k-means, too, after pretraining."""
    alignment: AlignmentConfig = AlignmentConfig()

    @model_validator(mode="after")
    def _terms_add_up(self) -> ObjectiveConfig:
        if self.cross_sources != "all" and self.num_samples > 1:
            raise ValueError(
                f"cross_sources is {self.cross_sources} with num_samples {self.num_samples}: leaving terms "
                "out is unbiased with one sample only. Set cross_sources to all, or num_samples to 1"
            )
        return self


class ClustersConfig(_Settings):
    """The clusters of the export: how many, and where."""

    criterion: CriterionName = "entropy"
    """`entropy` is the paper's: components of the trained mixture are dropped while the penalised normalised
    entropy falls. The others set the clusters anew by what z shows, see `cmvae.clustering.merge_clusters`,
    and take the number with the highest mean `silhouette`, the largest number that halves of the data agree
    about (`stability`), or that modalities agree about most (`agreement`)."""
    normaliser: Literal["active", "initial"] = "active"
    """Of `entropy`: the clusters in use, or as in the released code all that the training began with."""
    num_clusters: int | None = Field(default=None, ge=2)
    """Take so many, whatever the criterion selects; null lets it decide."""


class UNetConfig(_Settings):
    """The U-Net of the diffusion. DiffuseVAE takes 128 channels, multipliers 1, 2, 2, 2 at 32 px."""

    channels: int = Field(default=128, gt=0, multiple_of=8)
    """Of the first level."""
    multipliers: tuple[PositiveInt, ...] = Field(default=(1, 2, 2), min_length=1)
    """Channels of every level in multiples of the first; each level after it halves height and width."""
    blocks: PositiveInt = 2
    """Residual blocks a level."""
    attention_sizes: tuple[PositiveInt, ...] = ()
    """Heights at which levels attend, besides the lowest one between the two halves."""
    dropout: float = Field(default=0.1, ge=0, lt=1)


class DiffusionConfig(_Settings):
    """The forward process and what the network learns of it, by default as in DDPM and DiffuseVAE."""

    num_timesteps: int = Field(default=1000, ge=2)
    """T."""
    schedule: Literal["linear", "cosine"] = "linear"
    """β from 1e-4 to 0.02 (DDPM), or the squared cosine of Nichol & Dhariwal (2021)."""
    prediction: Literal["epsilon", "v", "sample"] = "epsilon"
    """What the network predicts: the noise, the velocity of Salimans & Ho (2022), or the image."""
    loss_weighting: Literal["uniform", "min_snr"] = "uniform"
    """Of the squared error of the prediction over time steps; `min_snr` is that of Hang et al. (2023)."""
    min_snr_gamma: float = Field(default=5.0, gt=0)


class ConditioningConfig(_Settings):
    """What the diffusion is conditioned on, concatenated with the noisy image on channels."""

    source: Literal["any", "self", "none"] = "any"
    """A reconstruction from a modality drawn anew at every step, always from the image's own modality, or
    nothing: a plain DDPM."""
    shared: Literal["mean", "sample"] = "mean"
    """z of the reconstructions in training: the location of q(z|x), or a sample of it. A sample may show a
    class that the image is not of; a network that has seen that shows another one, too, from time to time."""
    latent: bool = False
    """z of the reconstruction as a second condition."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of noise on the reconstruction while training, the image being in [−1, 1]."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of training images whose condition is left out; guidance takes some."""


class SamplerConfig(_Settings):
    """How a reconstruction is refined."""

    name: Literal["ddpm", "ddim", "dpm_solver"] = "dpm_solver"
    """Ancestral sampling, DDIM with η = 0, or DPM-Solver++ of second order."""
    num_steps: PositiveInt = 20
    """Evaluations of the network."""
    start: float = Field(default=1.0, gt=0, le=1)
    """Where in T it starts: 1 is pure noise, less is the reconstruction, noised so far."""
    guidance: float = Field(default=1.0, ge=0)
    """1 is the network as it is; more exaggerates what the condition changes (Ho & Salimans, 2022)."""
    guidance_from: float = Field(default=0.0, ge=0, lt=1)
    """Guidance acts from this share of T on: what a picture shows is decided in the noisy time steps; in the
    others guidance only takes variety away (compare Kynkäänniemi et al., 2024)."""
    candidates: PositiveInt = 1
    """Pictures that are made of every image. The one is kept from which the CMVAE reads z best; compare the
    reranking of Ramesh et al. (2021), here without another model."""


class RefinerConfig(_Settings):
    """The conditional diffusion of D-CMVAE."""

    sharing: Literal["per_modality", "shared"] = "per_modality"
    """One U-Net an image modality, or one for all with the modality as class label."""
    network: UNetConfig = UNetConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    sampler: Resumable[SamplerConfig] = SamplerConfig()

    @model_validator(mode="after")
    def _sampler_fits(self) -> RefinerConfig:
        reach = round(self.sampler.start * self.diffusion.num_timesteps)
        if self.sampler.num_steps > reach:
            raise ValueError(
                f"sampler.num_steps is {self.sampler.num_steps}, but below sampler.start there are only "
                f"{reach} time steps to take; set it to {reach} or fewer"
            )
        if self.sampler.guidance != 1 and self.conditioning.dropout == 0:
            raise ValueError(
                "sampler.guidance other than 1 compares with a network that has learned to do without the "
                "condition: set conditioning.dropout, say to 0.1, and train"
            )
        return self


def _path_to_str(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


class DataConfig(_Settings):
    """Which shards are read, and how."""

    shards: Resumable[Annotated[str, BeforeValidator(_path_to_str)]]
    """Folder that `cmvae pack` wrote, or the URL of a copy of it: `https://`, `s3://`, …"""
    num_workers: Resumable[int] = Field(default=1, ge=0)
    """Reader processes a rank; the order of samples does not depend on it."""
    shuffle_window: PositiveInt = 4096
    """Samples are shuffled among neighbouring shards that hold at least so many samples together."""
    cache_megabytes: Resumable[int] = Field(default=256, ge=0)
    """A train split that takes at most so much when decoded stays in the memory of each reader process."""
    on_error: Resumable[OnError] = "error"
    """A damaged sample ends a training, or is left out: its batch goes on with the others, so that all ranks
    have as many batches as ever. An evaluation always ends: its figures are of a whole split."""
    max_skipped: Resumable[int] = Field(default=100, ge=0)
    """At most so many samples are left out of an epoch, or of a validation, on all ranks together."""


class OptimizerConfig(_Settings):
    """Adam and its learning rate."""

    learning_rate: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    amsgrad: bool = True
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a half cosine down to zero at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Gradients are scaled down to this norm; null leaves them alone."""


MixedPrecision = Literal["auto", "fp32", "bf16", "fp16"]


class TrainConfig(_Settings):
    """The training loop. A step is one optimizer update."""

    batch_size: PositiveInt = 128
    """Samples a rank in one forward pass."""
    gradient_accumulation_steps: PositiveInt = 1
    epochs: PositiveInt | None = None
    max_steps: PositiveInt | None = None
    """Training ends after `epochs` or `max_steps`, whichever comes first."""
    mixed_precision: MixedPrecision = "fp32"
    """Precision of the networks; densities and reductions are always fp32. `auto` is bf16 where the device
    has instructions for it, else fp32: a processor without them takes ten times as long in bf16. A training
    first compares gradients of a few samples in both and takes fp32, with a warning, if bf16's are wrong."""
    compile: Resumable[bool] = False
    """Let torch compile the networks, which takes minutes at the start. For GPUs, where it joins the small
    operations between convolutions; a CPU gains nothing, and DeepSpeed does not go with it."""
    log_every: Resumable[PositiveInt] = 25
    """Steps between two points of the training curves."""
    validate_every: Resumable[PositiveInt | None] = None
    """Steps between validations, each with a picture; null validates at the end only."""
    checkpoint_every: Resumable[PositiveInt | None] = None
    """Steps between checkpoints; null keeps only the one at the end."""
    keep_checkpoints: Resumable[PositiveInt] = 2
    hang_timeout: Resumable[float] = Field(default=1800, gt=0)
    """Seconds without a batch, step or checkpoint after which the run ends and names the rank in question."""
    ema_decay: float | None = Field(default=None, ge=0, lt=1)
    """Validate and export an exponential moving average of the weights with this decay; null the weights."""

    @model_validator(mode="after")
    def _has_an_end(self) -> TrainConfig:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("say how long to train: set epochs or max_steps")
        return self


MetricGroup = Literal[
    "clustering", "coherence", "frechet", "fidelity", "text", "prediction", "probe", "likelihood"
]


class EvaluationConfig(_Settings):
    """Validation, cluster selection and `cmvae evaluate`, which takes these keys as they are."""

    batch_size: PositiveInt = 256
    split: Literal["train", "validation", "test"] = "test"
    """The split that is evaluated."""
    metrics: tuple[MetricGroup, ...] = typing.get_args(MetricGroup)
    """Groups of metrics to compute."""
    seed: int = Field(default=0, ge=0)
    """Of all noise of an evaluation; every sample has its own stream."""
    num_generated: PositiveInt = 10_000
    """Unconditional samples, for coherence and distances."""
    likelihood_samples: PositiveInt = 1000
    """Importance samples for each sample's joint log-likelihood."""
    inception_weights: Path | None = None
    """torch-fidelity's Inception-v3 weights, for FID; null asks torch-fidelity to fetch them, if it can."""
    map_samples: PositiveInt = 2000
    """Samples on the 2-D map of z."""


class TrackingConfig(_Settings):
    """MLflow."""

    enabled: bool = True
    """False switches MLflow off altogether."""
    experiment: str = "cmvae"
    parent: Path | None = None
    """Folder of a run, or of restarts, below whose run of MLflow this one is shown."""


class ExperimentConfig(_Settings):
    """What the experiments have in common, whatever they train."""

    name: Resumable[str] = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run, and of its folder below runs/."""
    output_dir: Resumable[Path | None] = None
    """Folder of the run; null is runs/NAME."""
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    evaluation: Resumable[EvaluationConfig] = EvaluationConfig()
    tracking: Resumable[TrackingConfig] = TrackingConfig()

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self.output_dir if self.output_dir is not None else Path("runs") / self.name


class CMVAEExperiment(ExperimentConfig):
    """Training a CMVAE: what a YAML file in configs/ says."""

    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    clusters: ClustersConfig = ClustersConfig()

    @model_validator(mode="after")
    def _fits_its_model(self) -> CMVAEExperiment:
        told, largest = self.clusters.num_clusters, self.model.num_clusters
        if told is not None and told > largest:
            raise ValueError(
                f"clusters.num_clusters is {told}, but the model has {largest}; set model.num_clusters to "
                f"{told} or more"
            )
        for name in self.objective.alignment.augment:
            if name not in self.model.modalities:
                raise ValueError(
                    f"objective.alignment.augment: no modality {name!r} in model.modalities, which has "
                    f"{', '.join(self.model.modalities)}"
                )
        return self

    @model_validator(mode="after")
    def _there_are_so_many_sources(self) -> CMVAEExperiment:
        cross_sources, others = self.objective.cross_sources, len(self.model.modalities) - 1
        if cross_sources != "all" and cross_sources > others:
            raise ValueError(
                f"objective.cross_sources is {cross_sources}, but every modality has {others} others; "
                "set it to all or to fewer"
            )
        return self


class RefinerExperiment(ExperimentConfig):
    """Training the diffusion that refines a CMVAE: a YAML file with the section `refiner`."""

    cmvae: Resumable[Path]
    """Folder of the CMVAE's run, whose export is refined and stays as it is. It may move; a hash of its
    weights tells whether it is the same."""
    refiner: RefinerConfig = RefinerConfig()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment from YAML and apply overrides such as `train.batch_size=64`.

    Args:
        path: the YAML file.
        overrides: `key=value`, the key dotted, the value read as YAML.

    Raises:
        UserError: the file cannot be read, or a key or value does not fit; the message names the file,
            the key and the remedy.
    """
    path = Path(path)
    settings = _read_yaml(path)
    for override in overrides:
        _apply_override(settings, override)
    experiment = RefinerExperiment if "refiner" in settings else CMVAEExperiment
    try:
        return experiment.model_validate(settings)
    except ValidationError as error:
        problems = [_explain(problem, experiment) for problem in error.errors()]
        source = str(path) if not overrides else f"{path} with {' '.join(overrides)}"
        raise UserError("\n".join(f"{source}: {problem}" for problem in problems)) from error


def load_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The experiment of a run, from its folder.

    Raises:
        UserError: the folder is no run, or as `load_config`.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path}: missing, so {run_dir} is no run. Train one with cmvae train CONFIG")
    return load_config(path, overrides)


def load_cmvae_run(run_dir: Path, overrides: Sequence[str] = ()) -> CMVAEExperiment:
    """The experiment of a CMVAE's run, from its folder.

    Raises:
        UserError: it is the run of a refiner, or as `load_run_config`.
    """
    config = load_run_config(run_dir, overrides)
    if not isinstance(config, CMVAEExperiment):
        raise UserError(f"{run_dir}: the run of a refiner, where that of a CMVAE is wanted")
    return config


def save_config(config: ExperimentConfig, path: str | Path) -> None:
    """Write an experiment as YAML that `load_config` reads back."""
    write_whole(Path(path), dump_yaml(config).encode())


def dump_yaml(config: ExperimentConfig) -> str:
    """The experiment as YAML text, every setting spelt out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flatten(config: ExperimentConfig) -> dict[str, Any]:
    """All settings under dotted keys, for experiment trackers."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, child in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, child)
        else:
            yield prefix, value

    return dict(walk("", config.model_dump(mode="json")))


def is_resumable(experiment: type[ExperimentConfig], key: str) -> bool:
    """Whether a setting may change when a run resumes.

    Args:
        experiment: the class that has the setting.
        key: dotted, as from `flatten`.
    """
    annotation: Any = experiment
    for part in key.split("."):
        is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        field = annotation.model_fields.get(part) if is_section else None
        if field is None:
            return False
        if _RESUMABLE in field.metadata:
            return True
        annotation = field.annotation
    return False


def read_modalities(config: ExperimentConfig) -> tuple[str, ...]:
    """The modalities that an experiment reads: its model's, or those of the CMVAE that it refines.

    Raises:
        UserError: the CMVAE's run is missing.
    """
    if isinstance(config, RefinerExperiment):
        return tuple(load_cmvae_run(config.cmvae).model.modalities)
    if isinstance(config, CMVAEExperiment):
        return tuple(config.model.modalities)
    raise TypeError(f"{type(config).__name__} trains nothing")


def check_against_shards(config: ExperimentConfig, index: ShardIndex, source: str) -> None:
    """Refuse a config that asks for modalities which the shards lack.

    Args:
        config: the experiment.
        index: the index of `config.data.shards`.
        source: the config's file, for the message.

    Raises:
        UserError: the shards lack a modality of the config or have one that its likelihood does not fit, or
            the CMVAE to refine is missing.
    """
    try:
        modalities = read_modalities(config)
    except UserError as error:
        raise UserError(f"{source}: cmvae: {error}") from error
    missing = [name for name in modalities if name not in index.modalities]
    if missing:
        key = f"model.modalities.{missing[0]}" if isinstance(config, CMVAEExperiment) else "cmvae"
        raise UserError(
            f"{source}: {key}: {config.data.shards} has no modality {missing[0]!r}; it has "
            f"{', '.join(index.modalities)}. Rename or remove it, or set data.shards to a data set that has "
            "it"
        )
    if isinstance(config, CMVAEExperiment):
        for name, modality in config.model.modalities.items():
            known, family = index.modalities[name], modality.likelihood.family
            if known.kind != "image" and name in config.objective.alignment.augment:
                raise UserError(
                    f"{source}: objective.alignment.augment: {name} is of kind {known.kind}, and only images "
                    "are augmented; remove it there"
                )
            if family is not None and family not in known.likelihoods:
                raise UserError(
                    f"{source}: model.modalities.{name}.likelihood.family: {family} does not fit a modality "
                    f"of kind {known.kind}; take {' or '.join(known.likelihoods)}"
                )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = sorted(str(other) for other in path.parent.glob("*.yaml"))
        hint = f"; {path.parent} has {', '.join(known)}" if known else ""
        raise UserError(f"{path}: no such file{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: no valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, this file holds {settings!r}")
    return settings


def _apply_override(settings: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: write key=value, for example train.batch_size=64")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is no valid YAML: {error}") from error
    *parents, last = key.split(".")
    node = settings
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {parent} is a value, it has no keys below it")
        # YAML anchors make several keys share one mapping; an override must change only its own.
        node[parent] = child = dict(child)
        node = child
    node[last] = value


def _explain(problem: Any, experiment: type[ExperimentConfig]) -> str:
    """One pydantic problem as: key, what is wrong, what to do."""
    location = [str(part) for part in problem["loc"] if not _NO_KEY.fullmatch(str(part))]
    key = ".".join(location) or "the experiment"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(experiment, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
        return f"{key}: no such key; {remedy}"
    if problem["type"] == "missing":
        return f"{key}: missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    if isinstance(value, (str, int, float, bool, type(None))):
        return f"{key}: {value!r} does not fit: {message[:1].lower()}{message[1:]}"
    return f"{key}: {message[:1].lower()}{message[1:]}"


def _known_keys(experiment: type[ExperimentConfig], location: list[str]) -> list[str]:
    """The keys that settings have at `location`, found by walking the models' own fields."""
    annotation: Any = experiment
    for part in location:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(part)
            annotation = field.annotation if field is not None else None
        elif typing.get_origin(annotation) is dict:
            annotation = typing.get_args(annotation)[1]
        else:
            return []
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return list(annotation.model_fields)
    return []
