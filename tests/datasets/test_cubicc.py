import argparse
import io
import json
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmvae.config import load_config
from cmvae.data.reader import EvaluationLoader
from cmvae.datasets import cubicc
from cmvae.datasets.writer import write_shards
from cmvae.utils.errors import UserError

MINI = Path(__file__).resolve().parents[3] / "shared" / "data" / "cub_mini64"
SPLITS = ("train", "validation", "test")
SHARES = (0.7, 0.15, 0.15)
WORDS = ("<exc>", "<pad>", "<eos>", "a", "red", "bird")


def parse(*flags: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    cubicc.add_arguments(parser)
    return parser.parse_args([str(flag) for flag in flags])


def read(*flags: object):
    """The source that a command line describes."""
    return cubicc.from_arguments(parse(*flags))


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--released", "x"], "cubicc"),
        (["--download"], "cubicc"),
        (["--cub", "x"], "cubicc"),
        (["--mini", "x"], "cubicc_cpu"),
    ],
)
def test_each_form_has_the_experiment_that_fits_it(flags, name):
    path = cubicc.config_for(parse(*flags))
    assert load_config(Path(__file__).parents[2] / path).name == name


@pytest.mark.skipif(not MINI.is_dir(), reason="cub_mini64 may not be handed on with the project")
def test_real_birds_are_split_by_photograph_and_grouped_into_families(tmp_path):
    source = read("--mini", MINI)
    texts = json.loads((MINI / "captions.json").read_text())
    with np.load(MINI / "images.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    by_stem = {Path(file).stem: number for number, file in enumerate(texts["files"])}
    lone = ("Bunting", "Cormorant", "Crow", "Flicker")
    kept = [name for name in by_stem if not texts["classes"][labels[by_stem[name]]].endswith(lone)]
    assert len(kept) == 1019
    used: dict[str, Counter] = {}
    families = {}
    for split in SPLITS:
        keys = [source.keys[row] for row in source.splits[split]]
        used[split] = Counter(key.rpartition("-")[0] for key in keys)
        assert set(used[split].values()) == {10}
        share = np.bincount([labels[by_stem[stem]] for stem in used[split]], minlength=22)
        whole = np.bincount([labels[by_stem[stem]] for stem in kept], minlength=22)
        assert np.abs(share - SHARES[SPLITS.index(split)] * whole).max() <= 2
        for index in range(0, source.split_sizes[split], 97):
            sample = source.sample(split, index)
            stem, _, number = sample.key.rpartition("-")
            assert sample.group == stem
            image = by_stem[stem]
            np.testing.assert_array_equal(sample.values["image"], images[image].transpose(2, 0, 1))
            words = source.modalities["caption"].categories
            said = [words[token] for token in sample.values["caption"].tolist()]
            expected_text = "".join(
                c if c.isalnum() else " " for c in texts["captions"][image][int(number)].lower()
            )
            for word, expected in zip(said, expected_text.split(), strict=False):
                assert word in (expected, "<unk>", "<eos>")
            families.setdefault(texts["classes"][labels[image]], set()).add(sample.label)
    assert sum(map(len, used.values())) == len(set(kept) & set().union(*used.values())) == 1019
    assert all(len(found) == 1 for found in families.values())
    by_name = {name.partition(".")[2]: source.class_names[found.pop()] for name, found in families.items()}
    assert by_name["Groove_billed_Ani"] == by_name["Yellow_billed_Cuckoo"] == "Cuckoo_and_Ani"
    assert by_name["Boat_tailed_Grackle"] == by_name["Red_winged_Blackbird"] == "Blackbird_and_Grackle"
    assert Counter(by_name.values())["Auklet"] == 4
    # No photograph is there twice under two names, either.
    pixels = {split: {source.sample(split, i).values["image"].tobytes() for i in range(0, size, 1)}
              for split, size in source.split_sizes.items()}  # fmt: skip
    assert not pixels["train"] & pixels["test"]


@pytest.fixture(scope="module")
def cub(tmp_path_factory) -> Path:
    """Every subspecies of CUBICC and one other, ten grey photographs each; brightness is the number."""
    root = tmp_path_factory.mktemp("cub") / "CUB_200_2011"
    names = [name for members in cubicc.SPECIES.values() for name in members] + ["House_Sparrow"]
    files: list[str] = []
    for number, name in enumerate(names, 1):
        folder = f"{number:03d}.{name}"
        (root / "images" / folder).mkdir(parents=True)
        (root / "text" / folder).mkdir(parents=True)
        for photograph in range(10):
            stem = f"{name}_{photograph:04d}"
            grey = 10 * number + photograph
            image = Image.new("RGB", (120, 70), (grey,) * 3)
            # A bird at the left border, which the square in the middle does not show.
            image.paste((0, 0, 255), (0, 20, 8, 50))
            image.save(root / "images" / folder / f"{stem}.jpg", quality=95)
            files.append(f"{folder}/{stem}.jpg")
            lines = [f"A {name.replace('_', ' ')}, seen from angle {caption}." for caption in range(10)]
            (root / "text" / folder / f"{stem}.txt").write_text("\n".join(lines) + "\n\n")
    numbered = list(enumerate(files, 1))
    (root / "images.txt").write_text("".join(f"{number} {file}\n" for number, file in numbered))
    (root / "bounding_boxes.txt").write_text(
        "".join(f"{number} 0.0 20.0 8.0 30.0\n" for number, _ in numbered)
    )
    return root


def test_photographs_are_cropped_to_the_birds(cub):
    image = read("--cub", cub, "--crop").sample("test", 0).values["image"].astype(int)
    # The square is 33 pixels high and wide: the box of 8 × 30 is its left quarter.
    assert image.shape == (3, 64, 64)
    blue = image[2] - image[0] > 100
    assert blue[8:56, :12].all()
    assert not blue[:, 20:].any()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("images.txt", None, r"images\.txt: cannot be read.*omit --crop"),
        ("bounding_boxes.txt", "1 0 0 5 5\n", r"do not give a box for each photograph.*omit --crop"),
        ("bounding_boxes.txt", None, r"bounding_boxes\.txt: cannot be read"),
    ],
)
def test_missing_boxes_are_reported(cub, tmp_path, file, content, message):
    for name in ("images", "text"):
        (tmp_path / name).symlink_to(cub / name)
    for name in ("images.txt", "bounding_boxes.txt"):
        shutil.copy(cub / name, tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        read("--cub", tmp_path, "--crop")


def test_the_release_has_no_boxes(tmp_path):
    with pytest.raises(UserError, match=r"--crop: the release has no bounding boxes"):
        read("--released", tmp_path, "--crop")


def test_squeezed_frames_are_cropped_in_pixels_of_the_original(tmp_path):
    # An original of 500 × 375 and one of 375 × 500 pixels; the bird is white.
    boxes = np.array([[100, 50, 200, 100], [50, 280, 200, 200]], np.float32)
    images = np.zeros((2, 64, 64, 3), np.uint8)
    for image, (left, top, width, height), (across, down) in zip(
        images, boxes, ((500, 375), (375, 500)), strict=True
    ):
        x, y = 64 / across, 64 / down
        image[round(top * y) : round((top + height) * y), round(left * x) : round((left + width) * x)] = 255
    np.savez(
        tmp_path / "images.npz",
        images=np.tile(images, (4, 1, 1, 1)),
        labels=np.tile([0, 1], 4),
        bbox=np.tile(boxes, (4, 1)),
    )
    captions = {
        "classes": ["001.Sooty_Albatross", "002.Purple_Finch"],
        "files": [f"{number}.jpg" for number in range(8)],
        "captions": [["a bird"] * 10] * 8,
    }
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    column = read("--mini", tmp_path, "--crop").columns["image"]
    wide, square = (column.read(row)[0] > 127 for row in (0, 10))
    # The square has 1.1 times the longer side: 220 pixels.
    assert abs(wide.mean() - 200 * 100 / 220**2) < 0.05
    assert abs(square.mean() - 1 / 1.1**2) < 0.05
    assert wide[32, 32]
    assert square[32, 32]


def test_the_original_folder_gives_the_subspecies_of_cubicc(cub):
    source = read("--cub", cub)
    assert sum(source.split_sizes.values()) == 22 * 10 * 10
    assert source.class_names == tuple(cubicc.SPECIES)
    held = {split: {source.keys[row].rpartition("-")[0] for row in source.splits[split]} for split in SPLITS}
    assert not held["train"] & held["test"]
    assert not held["train"] & held["validation"]
    assert not held["validation"] & held["test"]
    names = [name for members in cubicc.SPECIES.values() for name in members]
    words = source.modalities["caption"].categories
    for index in range(0, source.split_sizes["test"], 13):
        sample = source.sample("test", index)
        stem, _, caption = sample.key.rpartition("-")
        assert sample.group == stem
        name, _, photograph = stem.rpartition("_")
        assert name in cubicc.SPECIES[source.class_names[sample.label]]
        grey = 10 * (names.index(name) + 1) + int(photograph)
        assert sample.values["image"].shape == (3, 64, 64)
        assert abs(sample.values["image"].astype(int) - grey).max() <= 2
        said = [words[token] for token in sample.values["caption"].tolist()]
        assert said[: said.index("<eos>")] == [
            "a", *name.lower().split("_"), "seen", "from", "angle", caption
        ]  # fmt: skip


def test_captions_may_lie_elsewhere_and_their_lack_is_reported(cub, tmp_path):
    shutil.copytree(cub / "images", tmp_path / "images")
    with pytest.raises(UserError, match=r"neither text/ nor text_c10/.*--captions"):
        read("--cub", tmp_path)
    assert read("--cub", tmp_path, "--captions", cub / "text").split_sizes == read("--cub", cub).split_sizes
    with pytest.raises(UserError, match=r"0000\.txt: cannot be read"):
        read("--cub", tmp_path, "--captions", tmp_path)
    shutil.rmtree(next((tmp_path / "images").glob("*.Blue_Jay")))
    with pytest.raises(UserError, match=r"no folder NUMBER\.Blue_Jay"):
        read("--cub", tmp_path, "--captions", cub / "text")


@pytest.fixture
def released(tmp_path) -> Path:
    """Eight photographs of ten pairs each in the released form; caption n of a photograph has n words."""
    folder = tmp_path / "released"
    folder.mkdir()
    photograph = np.repeat(np.arange(8), 10)
    torch.save(
        torch.from_numpy(photograph / 10).float()[:, None, None, None].expand(80, 3, 64, 64).clone(),
        folder / "images.pt",
    )
    tokens = np.ones((80, 12), np.int64)
    for pair in range(80):
        tokens[pair, : pair % 10] = 3 + photograph[pair] % 3
        tokens[pair, pair % 10] = 2
    torch.save(
        torch.nn.functional.one_hot(torch.from_numpy(tokens), len(WORDS)).float(), folder / "captions.pt"
    )
    torch.save(torch.from_numpy(photograph % 2), folder / "labels.pt")
    torch.save(torch.from_numpy(photograph), folder / "original_labels.pt")
    for name, first, last in (("train", 0, 60), ("validation", 60, 70), ("test", 70, 80)):
        np.save(folder / f"{name}_split.npy", np.arange(first, last))
    (folder / "cub.vocab").write_text(json.dumps({"i2w": dict(enumerate(WORDS))}))
    return folder


def test_the_released_folder_reads_as_what_it_holds(released, tmp_path):
    source = read("--released", released)
    assert source.split_sizes == {"train": 60, "validation": 10, "test": 10}
    index = write_shards(source, tmp_path / "out")
    words = index.modalities["caption"].categories
    assert words == ("<pad>", "<eos>", "<unk>", "a", "red", "bird")
    for split in SPLITS:
        (batch,) = EvaluationLoader(
            tmp_path / "out", split=split, modalities=["image", "caption"], batch_size=60
        )
        for place, key in enumerate(batch["key"][: index.splits[split].num_samples]):
            pair = int(key.removeprefix("pair-"))
            photograph = pair // 10
            assert batch["label"][place] == photograph % 2
            assert batch["group_name"][place] == f"photo-{10 * photograph:05d}"
            assert (batch["image"][place] == round(25.5 * photograph)).all()
            said = [words[token] for token in batch["caption"][place].tolist()]
            length = pair % 10
            assert said == [words[3 + photograph % 3]] * length + ["<eos>"] + ["<pad>"] * (11 - length)


def test_released_splits_that_divide_a_photograph_are_drawn_again(released, capsys):
    np.save(released / "train_split.npy", np.arange(0, 65))
    np.save(released / "validation_split.npy", np.arange(65, 70))
    source = read("--released", released, "--fractions", "0.5,0.25,0.25")
    assert "split again by photograph" in capsys.readouterr().err
    held = {split: set((rows // 10).tolist()) for split, rows in source.splits.items()}
    assert [len(held[split]) for split in SPLITS] == [4, 2, 2]


class Harm:
    def __reduce__(self):
        return (print, ("harm",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("images.pt", torch.zeros(80, 3, 28, 28), r"images\.pt: has shape \(80, 3, 28, 28\)"),
        ("images.pt", torch.full((80, 3, 64, 64), 2.0), r"images\.pt: values from 2 to 2"),
        ("images.pt", [1, 2], r"images\.pt: contains list"),
        ("labels.pt", Harm(), r"labels\.pt: cannot be read as a tensor"),
        ("labels.pt", torch.zeros(79), "the numbers of .* differ"),
        ("captions.pt", torch.zeros(80, 12, 7), r"captions\.pt: .*expected \(N, length, 6\)"),
        ("test_split.npy", np.array([80]), r"test_split\.npy: indices 80 to 80, but there are 80 pairs"),
        ("test_split.npy", np.array([1.5]), r"test_split\.npy: float64"),
        ("test_split.npy", np.array([Harm()], dtype=object), r"test_split\.npy: cannot be read"),
        ("cub.vocab", b"{", r"cub\.vocab: cannot be read as JSON"),
        ("cub.vocab", b"[]", r"cub\.vocab: has no i2w"),
        ("cub.vocab", None, r"cub\.vocab: missing"),
    ],
)
def test_what_the_released_folder_should_not_hold_is_named(released, capfd, name, content, message):
    path = released / name
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif name.endswith(".npy"):
        np.save(path, content, allow_pickle=True)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message):
        read("--released", released)
    assert "harm" not in capfd.readouterr().out


def test_the_release_is_fetched_and_only_its_files_are_unpacked(released, tmp_path, monkeypatch):
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as members:
        for path in released.iterdir():
            members.write(path, f"data/CUBICC/{path.name}")
        members.writestr("../../escaped.txt", b"x")
        members.writestr("data/CUBICC/classifier.pt", io.BytesIO(b"x").getvalue())
    monkeypatch.setattr(cubicc, "RELEASE_URL", archive.as_uri())
    source = read("--download", "--cache", tmp_path / "cache")
    assert source.split_sizes == {"train": 60, "validation": 10, "test": 10}
    assert sorted(path.name for path in (tmp_path / "cache" / "CUBICC").iterdir()) == sorted(
        path.name for path in released.iterdir()
    )
