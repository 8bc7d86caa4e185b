"""Small image classifiers, one per modality, for generated images.

They are trained once per packed data set, on its labelled train split, and stored beside the shards in
`classifiers/MODALITY.safetensors`; the index holds their accuracy on real test images. Coherence takes their
predictions, distances between sets of images their features.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from cmvae.data.index import (
    CLASSIFIERS_FOLDER,
    INDEX_NAME,
    ClassifierSchema,
    ShardIndex,
)
from cmvae.data.reader import EvaluationLoader
from cmvae.data.remote import Location, open_file
from cmvae.modalities import Modality
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole

_LOGGER = logging.getLogger(__name__)

NUM_FEATURES = 32
"""F. Small, so that a Gaussian can be fitted to the features of some hundred test images."""
MIN_ACCURACY, GOOD_ACCURACY = 0.80, 0.95
"""Accuracy on real test images: below the first a classifier is refused, below the second it is used with a
warning."""
DEFAULT_WIDTH = 16

# The last feature map is flattened, so it must be small for any size of images.
_LAST_MAP_SIZE = 7
_BATCH_SIZE, _EVALUATION_BATCH_SIZE = 64, 512
_LEARNING_RATE, _WEIGHT_DECAY = 5e-3, 5e-2
# Default number of epochs: enough to see so many images, and at least five.
_IMAGES_SEEN, _MIN_EPOCHS = 30_000, 5
# Ranges of the augmentation: rotation in radians, scale and shear, shift in half images, contrast,
# brightness.
_TURN, _SCALE, _SHIFT, _CONTRAST, _BRIGHTNESS = 0.14, 0.08, 0.07, 0.4, 0.15
# With so many train images, half of each batch is not augmented, because interpolation blurs what shows at
# single pixels, such as digits inverted against grey: accuracy on m0 of PolyMNIST is 0.979 instead of 0.969.
_MANY_IMAGES = 10_000


class ImageClassifier(nn.Module):
    """Convolutions and poolings, F features, then a linear head.

    Args:
        shape: (channels, height, width) of an image.
        num_classes: number of classes.
        width: channels of the first convolution; each pooling doubles them, up to four times as many.
    """

    def __init__(self, shape: Sequence[int], num_classes: int, width: int = DEFAULT_WIDTH) -> None:
        super().__init__()
        channels, height, width_px = shape
        num_halvings = max(0, math.ceil(math.log2(max(height, width_px) / _LAST_MAP_SIZE)))
        layers: list[nn.Module] = []
        for stage in range(num_halvings + 1):
            out_channels = width * min(2**stage, 4)
            layers += [nn.MaxPool2d(2, ceil_mode=True)] if stage else []
            layers += [
                nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            ]
            channels = out_channels
        pixels = math.ceil(height / 2**num_halvings) * math.ceil(width_px / 2**num_halvings)
        self.trunk = nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Linear(channels * pixels, NUM_FEATURES, bias=False),
            nn.BatchNorm1d(NUM_FEATURES),
        )
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, num_classes) and features (B, F), before their ReLU.

        Batch normalization gives features about unit variance on the train images, so that none dominates a
        distance, and before the ReLU a Gaussian fits better.

        Args:
            images: (B, C, H, W) in [0, 1].
        """
        features = self.trunk(images)
        return self.head(features.relu()), features

    @torch.no_grad()
    def classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predict classes (B,) int64, and features (B, F) fp32.

        Args:
            images: (B, C, H, W), clipped to [0, 1] as an image file would be.
        """
        logits, features = self(images.clamp(0, 1))
        return logits.argmax(-1), features


def default_epochs(num_images: int) -> int:
    """Default number of epochs for a number of train images."""
    return max(_MIN_EPOCHS, math.ceil(_IMAGES_SEEN / num_images))


def train_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    width: int,
    epochs: int,
    seed: int,
    report: Callable[[int], None] = lambda step: None,
) -> ImageClassifier:
    """Train a classifier with AdamW and a one-cycle learning rate, on augmented images.

    If there are many images, half of each batch is not augmented.

    Deterministic on a CPU: the same arguments give the same weights.

    Args:
        images: (N, C, H, W) uint8, on the training device.
        labels: (N,) int64, on the same device.
        num_classes: number of classes.
        width: channels of the first convolution.
        epochs: number of epochs.
        seed: seed of the initial weights, the order and the augmentation.
        report: called after each of the `num_steps(N, epochs)` steps with its number, from 1.

    Returns:
        The classifier in evaluation mode, on the images' device.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = ImageClassifier(images.shape[1:], num_classes, width)
    classifier.to(images.device).train()
    total = num_steps(len(images), epochs)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=total)
    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for rows in order.split(_BATCH_SIZE)[: total // epochs]:
            batch = images[rows].float() / 255
            num_augmented = len(batch) if len(images) < _MANY_IMAGES else len(batch) // 2
            batch[:num_augmented] = _augment(batch[:num_augmented], generator)
            logits, _ = classifier(batch)
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[rows]).backward()
            optimizer.step()
            schedule.step()
            step += 1
            report(step)
    return classifier.eval()


def num_steps(num_images: int, epochs: int) -> int:
    """Number of optimizer steps of a training: full batches only, at least one per epoch."""
    return epochs * max(1, num_images // _BATCH_SIZE)


def train_classifiers(
    folder: Path,
    *,
    device: torch.device,
    width: int = DEFAULT_WIDTH,
    epochs: int | None = None,
    seed: int = 0,
    report: Callable[[str, int, int], None] = lambda modality, total, step: None,
) -> dict[str, ClassifierSchema]:
    """Train a classifier per image modality of a packed data set, and save them beside its shards.

    The validation split is not used. Nothing is written before all are trained; the index is written last.

    Args:
        folder: what `cmvae pack` wrote, with labels.
        device: training device.
        width: channels of the first convolution.
        epochs: number of epochs; None sees about 30,000 images.
        seed: seed of everything random.
        report: called after each step with modality, total number of steps, and number of the step.

    Returns:
        Modality → the new entry of the index.

    Raises:
        UserError: the data has no labels or no images, or a class has none, a shard is damaged, or the files
            cannot be written.
    """
    index = ShardIndex.load(folder)
    if index.class_names is None:
        raise UserError(
            f"{folder}: has no labels to train classifiers with. Pack the data with labels, or evaluate "
            "without coherence, frechet and fidelity"
        )
    image_names = [name for name, of_name in index.modalities.items() if "generative" in of_name.metrics]
    if not image_names:
        raise UserError(
            f"{folder}: has no image modality, so there is nothing to train. Text is classified without this "
            "command"
        )
    contents, entries = {}, {}
    for modality in image_names:
        images, labels = (tensor.to(device) for tensor in read_labelled(folder, "train", modality))
        missing = set(range(len(index.class_names))) - set(labels.tolist())
        if missing:
            raise UserError(
                f"{folder}: the train split has no sample of class "
                f"{', '.join(index.class_names[label] for label in sorted(missing))} with {modality}. Pack "
                "more samples"
            )
        passes = epochs if epochs is not None else default_epochs(len(images))
        total = num_steps(len(images), passes)
        classifier = train_classifier(
            images,
            labels,
            len(index.class_names),
            width=width,
            epochs=passes,
            seed=seed,
            report=partial(report, modality, total),
        )
        accuracy = _measure_accuracy(classifier, *read_labelled(folder, "test", modality))
        weights = {name: tensor.cpu().contiguous() for name, tensor in classifier.state_dict().items()}
        contents[modality] = save(weights)
        entries[modality] = ClassifierSchema(
            file=f"{CLASSIFIERS_FOLDER}/{modality}.safetensors",
            sha256=hashlib.sha256(contents[modality]).hexdigest(),
            width=width,
            epochs=passes,
            seed=seed,
            accuracy=accuracy,
        )
    try:
        (folder / CLASSIFIERS_FOLDER).mkdir(exist_ok=True)
        for modality, entry in entries.items():
            write_whole(folder / entry.file, contents[modality])
        changed = index.model_copy(update={"classifiers": entries})
        write_whole(folder / INDEX_NAME, changed.model_dump_json(indent=2).encode())
    except OSError as error:
        raise UserError(
            f"{folder / CLASSIFIERS_FOLDER}: cannot be written: {error}. Free some space and run "
            f"{_command(folder)} again"
        ) from error
    return entries


def load_classifiers(
    location: Location, index: ShardIndex, modalities: Sequence[str], device: torch.device
) -> dict[str, ImageClassifier]:
    """Load the classifiers of modalities, in evaluation mode; logs a warning for a low accuracy.

    Args:
        location: the shard folder, or its URL.
        index: its index.
        modalities: image modalities.
        device: device of the classifiers.

    Raises:
        UserError: the data has no labels, a modality has no classifier, or it is missing, changed, damaged or
            below `MIN_ACCURACY`.
    """
    check_classifiers(location, index, modalities)
    return {
        name: _load_classifier(location, index.classifiers[name], index.modalities[name], index, device)
        for name in modalities
    }


def check_classifiers(location: Location, index: ShardIndex, modalities: Sequence[str]) -> None:
    """Check that modalities have classifiers, from the index alone.

    Raises:
        UserError: the data has no labels, or a modality has no classifier.
    """
    if index.class_names is None:
        raise UserError(f"{location}: has no labels, so there are no classifiers")
    missing = [name for name in modalities if name not in index.classifiers]
    if missing:
        raise UserError(
            f"{location}: no classifier for modality {', '.join(missing)}. Train them once: "
            f"{_command(location)}"
        )


def _load_classifier(
    location: Location,
    entry: ClassifierSchema,
    modality: Modality,
    index: ShardIndex,
    device: torch.device,
) -> ImageClassifier:
    path = f"{location}/{entry.file}"
    if entry.accuracy < MIN_ACCURACY:
        raise UserError(
            f"{path}: has an accuracy of {entry.accuracy:.1%} on real test images, below {MIN_ACCURACY:.0%}, "
            "too low to judge generated ones. Train it longer or wider: "
            f"{_command(location)} --epochs {2 * entry.epochs} --width {2 * entry.width}"
        )
    try:
        with open_file(location, entry.file, num_bytes=None, sha256=entry.sha256) as file:
            content = file.read()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}), though the index lists it. Train it again: "
            f"{_command(location)}"
        ) from error
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise UserError(
            f"{path}: its SHA-256 is not that in the index, so it was changed or damaged. Train it again: "
            f"{_command(location)}"
        )
    classifier = ImageClassifier(modality.shape, len(index.class_names or ()), entry.width)
    try:
        classifier.load_state_dict(load(content))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{path}: does not fit this version's classifier: {error}. Train it again: {_command(location)}"
        ) from error
    if entry.accuracy < GOOD_ACCURACY:
        _LOGGER.warning(
            "%s: has an accuracy of %.1f %% on real test images, below %.0f %%, which limits coherence",
            path,
            100 * entry.accuracy,
            100 * GOOD_ACCURACY,
        )
    return classifier.to(device).eval()


def read_labelled(location: Location, split: str, modality: str) -> tuple[Tensor, Tensor]:
    """Read the labelled samples of a split that have a modality.

    Returns:
        Values (N, *shape) as stored, such as images (N, C, H, W) uint8, and labels (N,) int64.

    Raises:
        UserError: the split is missing or damaged.
    """
    loader = EvaluationLoader(location, split=split, modalities=[modality], batch_size=_EVALUATION_BATCH_SIZE)
    values, labels = [], []
    for batch in loader:
        there = batch["valid"] & batch["mask"][:, 0] & (batch["label"] >= 0)
        values.append(batch[modality][there])
        labels.append(batch["label"][there])
    return torch.cat(values), torch.cat(labels)


def _measure_accuracy(classifier: ImageClassifier, images: Tensor, labels: Tensor) -> float:
    device = next(classifier.parameters()).device
    right = 0
    for start in range(0, len(images), _EVALUATION_BATCH_SIZE):
        rows = slice(start, start + _EVALUATION_BATCH_SIZE)
        predicted, _ = classifier.classify(images[rows].to(device).float() / 255)
        right += int((predicted.cpu() == labels[rows]).sum())
    return right / max(1, len(images))


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale, shear and shift a little, and change contrast and brightness per channel.

    Generated images differ a little from real ones in colours and positions, and should be classified all the
    same. Flips are left out, because they change digits and letters.
    """

    def uniform(largest: float, *shape: int) -> Tensor:
        values = (2 * torch.rand(len(images), *shape, generator=generator) - 1) * largest
        return values.to(images.device)

    angle, shear = uniform(_TURN), uniform(_SCALE)
    scale_x, scale_y = 1 + uniform(_SCALE), 1 + uniform(_SCALE)
    rows = (
        torch.stack([scale_x * angle.cos(), shear - scale_y * angle.sin(), uniform(_SHIFT)], dim=1),
        torch.stack([scale_x * angle.sin(), scale_y * angle.cos(), uniform(_SHIFT)], dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    channels = images.shape[1]
    contrast = 1 + uniform(_CONTRAST, channels, 1, 1)
    return 0.5 + (moved - 0.5) * contrast + uniform(_BRIGHTNESS, channels, 1, 1)


def _command(location: Location) -> str:
    return f"cmvae classifiers {location}"
