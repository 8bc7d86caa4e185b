"""The experiment as frozen pydantic models: load YAML, apply `key=value` overrides, explain mistakes.

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

from cmvae.data.index import TABLE_NAME, OnError, ShardIndex, TableSchema
from cmvae.modalities import ModalityName
from cmvae.modalities.base import LikelihoodName
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole

Family = Literal["normal", "laplace"]
AugmentationName = Literal["flip", "crop"]
CriterionName = Literal["entropy", "silhouette", "stability", "agreement"]

# Parts of pydantic's error locations that are not keys of the YAML.
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
    """None selects the default of the kind of modality: Laplace for images, Normal for vectors, and so on."""
    scale: float = Field(default=0.75, gt=0)
    """Laplace's b or the Normal's standard deviation; images are in [0, 1], vectors standardised."""
    weight: float = Field(default=1.0, gt=0)
    """s_n: factor of the log-likelihood of this modality in every log-weight."""


class ModalityConfig(_Settings):
    """Networks and likelihood of one modality."""

    network: str | None = None
    """Encoder and decoder family, a name from `cmvae.models.networks.NETWORKS`; None: default of the kind."""
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
    """Number of clusters at the start: more than you expect, as the selection drops or merges the others."""
    cluster_mean_range: float = Field(default=1.0, gt=0)
    """Cluster means start uniform in (−range, range)."""
    auxiliary_prior: Literal["learned", "fixed"] = "learned"
    """Scale of the auxiliary priors r_m(w_m), from which w is drawn where z comes from another modality:
    learned (the paper), or fixed at that of p(w_m), from which generation draws. A learned scale shrinks with
    the family normal, decoders tell the two apart by it, and generations lose coherence."""
    assign_by: Literal["vote", "joint"] = "vote"
    """How the modalities of a sample decide together: `vote` takes the mode of their clusters (the paper),
    `joint` the cluster at the geometric median of their locations, see `cmvae.clustering.joint_location`."""
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
    """The contrastive term between modalities, see `cmvae.models.alignment`. Off with one modality.

    It tells samples apart, but not those of one group, where the packed data has groups.
    """

    weight: float = Field(default=0.0, ge=0)
    """Factor of the term, in nats of the bound per sample; 0 is the published objective."""
    pretrain: Annotated[float, Field(ge=0, lt=1)] | PositiveInt = 0.0
    """Length of a first phase that trains the encoders of z with this term alone: a share of the steps, or a
    number of steps. Cluster means are then found as by `refit_clusters_at`."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the logits. At 1, two encodings of one sample are expected to differ as two samples of
    p(z|c) do."""
    augment: dict[ModalityName, tuple[AugmentationName, ...]] = {}
    """Random augmentations of image modalities in this term only: mirroring (`flip`), random crops (`crop`).
    They must not change what an image shows. The bound uses the images without augmentation."""

    @model_validator(mode="after")
    def _pretrains_with_a_weight(self) -> AlignmentConfig:
        if self.pretrain and not self.weight:
            raise ValueError("pretrain needs a weight above 0: it trains with this term alone")
        return self


class ObjectiveConfig(_Settings):
    """The bound to maximise."""

    name: Literal["iwae", "dreg"] = "iwae"
    """`iwae` with one sample is the ELBO."""
    num_samples: PositiveInt = 1
    """K: samples of the latents for each source modality."""
    beta: float = Field(default=1.0, gt=0)
    """Weight of the prior and posterior terms in every log-weight."""
    cross_sources: Literal["all"] | PositiveInt = "all"
    """Number of other modalities that each modality is decoded from in a step: all, or a number of random
    ones, which are weighted so that the expectation of the bound stays the same. With a number, the time per
    step is linear in the number of modalities."""
    decoder_checkpoint_above: PositiveInt | None = None
    """Number of samples whose feature maps each decoder keeps for the backward pass; null keeps all. Further
    samples are decoded in parts of at most this size and again in the backward pass. Memory then does not
    grow with the number of samples or with the square of the number of modalities, and a step takes longer.
    A decoder with batch norm keeps all, as its statistics are those of all samples."""
    refit_clusters_at: Annotated[tuple[PositiveInt, ...], BeforeValidator(_as_several)] = ()
    """Steps before which cluster means are found again by k-means on encoded train data, see
    `cmvae.clustering.find_cluster_means`, and π becomes uniform: one step, several (`[800, 1500]`), or none
    (null). A cluster that took two classes early seldom releases one; later, when classes lie apart, k-means
    separates them. VaDE (Jiang et al., 2017) initialises its mixture by k-means, too, after pretraining."""
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
    """The clusters of the export."""

    criterion: CriterionName = "entropy"
    """How the number of clusters is chosen. `entropy` is the published way: components of the trained mixture
    are dropped while the penalised normalised entropy falls. The others find clusters in z after the
    training, see `cmvae.clustering.merge_clusters`, and choose the number with the highest mean `silhouette`,
    the largest number on which halves of the data agree (`stability`), or the number on which modalities
    agree most (`agreement`)."""
    normaliser: Literal["active", "initial"] = "active"
    """Normaliser of `entropy`: the number of clusters in use or, as in the released code, the number at the
    start."""
    num_clusters: int | None = Field(default=None, ge=2)
    """Number of clusters; null lets the criterion decide."""


class UNetConfig(_Settings):
    """The U-Net of the diffusion. DiffuseVAE takes 128 channels, multipliers 1, 2, 2, 2 at 32 px."""

    channels: int = Field(default=128, gt=0, multiple_of=8)
    """Channels of the first level."""
    multipliers: tuple[PositiveInt, ...] = Field(default=(1, 2, 2), min_length=1)
    """Channels of every level in multiples of the first; each level after it halves height and width."""
    blocks: PositiveInt = 2
    """Residual blocks per level."""
    attention_sizes: tuple[PositiveInt, ...] = ()
    """Heights of the levels with attention, besides the lowest level."""
    dropout: float = Field(default=0.1, ge=0, lt=1)


class DiffusionConfig(_Settings):
    """The forward process and the target of the network, by default as in DDPM and DiffuseVAE."""

    num_timesteps: int = Field(default=1000, ge=2)
    """T."""
    schedule: Literal["linear", "cosine"] = "linear"
    """β from 1e-4 to 0.02 (DDPM), or the squared cosine of Nichol & Dhariwal (2021)."""
    prediction: Literal["epsilon", "v", "sample"] = "epsilon"
    """What the network predicts: the noise, the velocity of Salimans & Ho (2022), or the image."""
    loss_weighting: Literal["uniform", "min_snr"] = "uniform"
    """Weight of the squared error over time steps; `min_snr` is from Hang et al. (2023)."""
    min_snr_gamma: float = Field(default=5.0, gt=0)


class ConditioningConfig(_Settings):
    """The condition of the diffusion.

    A reconstruction is concatenated with the noisy image on channels, latents are added to the embedding of
    the time step.
    """

    source: Literal["any", "self", "latent", "none"] = "any"
    """Source of the reconstruction: a random modality at every step, or the modality of the image. `latent`
    is z and w without a reconstruction, and none a plain DDPM."""
    shared: Literal["mean", "sample"] = "mean"
    """z in training: the location of q(z|x), or a sample. A sample may show another class than the image, and
    a network that is trained on such pairs changes the class now and then. w is always sampled."""
    latent: bool = False
    """z of the reconstruction as a second condition."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of noise on the reconstruction in training; images are in [−1, 1]."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of training images without a condition; guidance needs some."""


class SamplerConfig(_Settings):
    """How a reconstruction is refined."""

    name: Literal["ddpm", "ddim", "dpm_solver"] = "dpm_solver"
    """Ancestral sampling, DDIM with η = 0, or DPM-Solver++ of second order."""
    num_steps: PositiveInt = 20
    """Evaluations of the network."""
    start: float = Field(default=1.0, gt=0, le=1)
    """Start of the sampling as a share of T: 1 is pure noise, less is the reconstruction with noise."""
    guidance: float = Field(default=1.0, ge=0)
    """Classifier-free guidance (Ho & Salimans, 2022); 1 is none."""
    guidance_from: float = Field(default=0.0, ge=0, lt=1)
    """Guidance is used above this share of T. The noisy time steps decide what an image shows; in the others,
    guidance only reduces variety (compare Kynkäänniemi et al., 2024)."""
    candidates: PositiveInt = 1
    """Number of refinements of every image. The one is kept whose encoding is nearest to z; compare the
    reranking of Ramesh et al. (2021), here without another model."""


class RefinerConfig(_Settings):
    """The conditional diffusion of D-CMVAE."""

    sharing: Literal["per_modality", "shared"] = "per_modality"
    """One U-Net per image modality, or one for all with the modality as class label."""
    network: UNetConfig = UNetConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    sampler: Resumable[SamplerConfig] = SamplerConfig()

    @model_validator(mode="after")
    def _reconstruction_is_noised(self) -> RefinerConfig:
        conditioning = self.conditioning
        if conditioning.source == "latent" and (conditioning.latent or conditioning.noise):
            raise ValueError(
                "conditioning.source latent has z as its condition already, and no reconstruction that noise "
                "could be added to: leave out conditioning.latent and conditioning.noise"
            )
        return self

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
    """The shards and how to read them."""

    shards: Resumable[Annotated[str, BeforeValidator(_path_to_str)]]
    """Folder that `cmvae pack` wrote, or the URL of a copy of it: `https://`, `s3://`, …"""
    num_workers: Resumable[int] = Field(default=1, ge=0)
    """Reader processes per rank; the order of samples does not depend on it."""
    shuffle_window: PositiveInt = 4096
    """A global batch is drawn from shards that hold at least this number of samples together."""
    cache_megabytes: Resumable[int] = Field(default=256, ge=0)
    """A decoded train split of at most this size is kept in the memory of each reader process."""
    on_device: Resumable[bool] = False
    """Keep the whole train split, as stored, in the memory of the training device (on a CPU, in that of the
    process), instead of reading it anew in every epoch. The order of samples is the same."""
    on_error: Resumable[OnError] = "error"
    """Whether a damaged sample ends a training or is skipped. A batch keeps its other samples, so that all
    ranks have the same number of batches. An evaluation always ends with an error, as metrics describe a
    whole split."""
    max_skipped: Resumable[int] = Field(default=100, ge=0)
    """Maximum number of samples that are skipped in an epoch, or in a validation, over all ranks."""


class OptimizerConfig(_Settings):
    """Adam and its learning rate."""

    learning_rate: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    amsgrad: bool = True
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a half cosine down to zero at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Maximum norm of the gradient; null does not clip."""


MixedPrecision = Literal["auto", "fp32", "bf16", "fp16"]


class TrainConfig(_Settings):
    """The training loop. A step is one optimizer update."""

    batch_size: PositiveInt = 128
    """Samples per rank in one forward pass."""
    global_batch_size: PositiveInt | None = None
    """Samples of all ranks together in one forward pass, in place of `batch_size`: a run then gives the same
    results on any number of ranks that divides it, and may change the number on resume."""
    gradient_accumulation_steps: PositiveInt = 1
    epochs: PositiveInt | None = None
    max_steps: PositiveInt | None = None
    """Training ends after `epochs` or `max_steps`, whichever comes first."""
    mixed_precision: MixedPrecision = "fp32"
    """Precision of the networks; densities and reductions are always fp32. `auto` is bf16 where the device
    has instructions for it, else fp32: a processor without them takes ten times as long in bf16. A training
    first compares gradients of a few samples in both and takes fp32, with a warning, if bf16's are wrong."""
    compile: Resumable[bool | Literal["reduce-overhead"]] = False
    """Compile the networks with torch.compile, which takes minutes at the start. `reduce-overhead` also
    records them as CUDA graphs, so that a GPU does not wait for the launches of small kernels. Useful on
    GPUs, where it fuses the operations between convolutions; a CPU gains nothing, and DeepSpeed does not
    support it."""
    log_every: Resumable[PositiveInt] = 25
    """Steps between two points of the training curves."""
    validate_every: Resumable[PositiveInt | None] = None
    """Steps between validations, each with figures; null validates at the end only."""
    coherence_samples: Resumable[PositiveInt | None] = None
    """Number of validation samples, and of joint samples, for coherence at every validation of a CMVAE. It
    needs the classifiers of `cmvae classifiers`. Null measures coherence only in `cmvae evaluate`."""
    checkpoint_every: Resumable[PositiveInt | None] = None
    """Steps between checkpoints; null keeps only the one at the end."""
    keep_checkpoints: Resumable[PositiveInt] = 2
    hang_timeout: Resumable[float] = Field(default=1800, gt=0)
    """Seconds without a batch, step or checkpoint after which the run ends and names the rank that hangs."""
    ema_decay: float | None = Field(default=None, ge=0, lt=1)
    """Decay of the exponential moving average of the weights, which is validated and exported; null uses the
    weights."""

    @model_validator(mode="after")
    def _has_an_end(self) -> TrainConfig:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("say how long to train: set epochs or max_steps")
        return self

    def batch_size_per_rank(self, world_size: int) -> int:
        """Samples of one of `world_size` ranks in one forward pass.

        Raises:
            UserError: the ranks cannot share the global batch evenly.
        """
        if self.global_batch_size is None:
            return self.batch_size
        if self.global_batch_size % world_size:
            raise UserError(
                f"train.global_batch_size: {self.global_batch_size} samples cannot be shared evenly by "
                f"{world_size} ranks. Set it to a multiple of {world_size}, or launch another number of ranks"
            )
        return self.global_batch_size // world_size


MetricGroup = Literal[
    "clustering", "coherence", "frechet", "fidelity", "text", "prediction", "probe", "likelihood"
]


class EvaluationConfig(_Settings):
    """Validation, cluster selection and `cmvae evaluate`, which takes these keys without the section."""

    batch_size: PositiveInt = 256
    split: Literal["train", "validation", "test"] = "test"
    """Split to evaluate."""
    metrics: tuple[MetricGroup, ...] = typing.get_args(MetricGroup)
    """Groups of metrics to compute."""
    protocol: Literal["default", "released"] = "default"
    """`released` also counts as the released CMVAE code does, in metrics that begin with `released/`, see
    `cmvae.evaluation.released`."""
    seed: int = Field(default=0, ge=0)
    """Seed of all noise of an evaluation; every sample has its own stream."""
    num_generated: PositiveInt = 10_000
    """Unconditional samples, for coherence and distances."""
    num_conditional: PositiveInt | None = None
    """Samples of the split that images and texts are generated from and compared with: the first ones, which
    packing has shuffled. Null takes the whole split."""
    likelihood_samples: PositiveInt = 1000
    """Importance samples for each sample's joint log-likelihood."""
    inception_weights: Path | None = None
    """Weights of Inception-v3 for FID, in the format of torch-fidelity; null lets torch-fidelity download
    them."""
    map_samples: PositiveInt = 2000
    """Samples on the 2-D map of z."""


class TrackingConfig(_Settings):
    """MLflow."""

    enabled: bool = True
    """False switches MLflow off."""
    experiment: str = "cmvae"
    parent: Path | None = None
    """Folder of a run, or of restarts, whose MLflow run is the parent of this one."""


class ExperimentConfig(_Settings):
    """Settings of every experiment."""

    name: Resumable[str] = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run and of its folder in runs/."""
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
    """Folder of the run of the CMVAE, whose generated images are refined. It may move: a hash of its weights
    identifies it."""
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


def load_run_table(run_dir: Path) -> TableSchema:
    """How rows of a table are read for a run, from its folder.

    Raises:
        UserError: the run was not trained on a table, or the file is damaged.
    """
    path = run_dir / TABLE_NAME
    try:
        return TableSchema.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: missing, so {run_dir} was not trained on a table. Pack the data like that of the "
            "run, and give the shards"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}. Train the run again") from error


def load_cmvae_run(run_dir: Path, overrides: Sequence[str] = ()) -> CMVAEExperiment:
    """The experiment of a CMVAE's run, from its folder.

    Raises:
        UserError: it is the run of a refiner, or as `load_run_config`.
    """
    config = load_run_config(run_dir, overrides)
    if not isinstance(config, CMVAEExperiment):
        raise UserError(f"{run_dir}: the run of a refiner. Give the run of a CMVAE")
    return config


def save_config(config: ExperimentConfig, path: str | Path) -> None:
    """Write an experiment as YAML that `load_config` reads back."""
    write_whole(Path(path), dump_yaml(config).encode())


def dump_yaml(config: ExperimentConfig) -> str:
    """The experiment as YAML text, with every setting."""
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
    """The modalities that an experiment reads: those of its model, or of the CMVAE that it refines.

    Raises:
        UserError: the CMVAE's run is missing.
    """
    if isinstance(config, RefinerExperiment):
        return tuple(load_cmvae_run(config.cmvae).model.modalities)
    if isinstance(config, CMVAEExperiment):
        return tuple(config.model.modalities)
    raise TypeError(f"{type(config).__name__} trains nothing")


def check_against_shards(config: ExperimentConfig, index: ShardIndex, source: str) -> None:
    """Refuse a config whose modalities do not fit the shards.

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
