import gzip
import io
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmvae.data import download
from cmvae.datasets import polymnist
from cmvae.datasets.polymnist import PolyMNISTSource, ReleasedPolyMNISTSource, read_mnist
from cmvae.utils.errors import UserError

NUM_TRAIN, NUM_TEST = 80, 30


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(256, size=(NUM_TRAIN, 28, 28), dtype=np.uint8),
        "y_train": rng.integers(10, size=NUM_TRAIN, dtype=np.uint8),
        "x_test": rng.integers(256, size=(NUM_TEST, 28, 28), dtype=np.uint8),
        "y_test": rng.integers(10, size=NUM_TEST, dtype=np.uint8),
    }


@pytest.fixture
def npz(tmp_path, arrays) -> Path:
    np.savez(tmp_path / "mnist.npz", **arrays)
    return tmp_path / "mnist.npz"


@pytest.fixture
def backgrounds(tmp_path) -> Path:
    """Three photographs in which each pixel says where it is: (row, column, 10 · modality)."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for modality, (height, width) in enumerate([(100, 120), (28, 90), (60, 28)]):
        rows, columns = np.mgrid[:height, :width]
        pixels = np.stack([rows, columns, np.full_like(rows, 10 * modality)], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{modality + 1}.png")
    (folder / "README.txt").write_text("not a photograph")
    return folder


def test_images_are_crops_inverted_under_a_digit_of_the_class(npz, backgrounds, arrays):
    source = PolyMNISTSource(read_mnist(npz), backgrounds, seed=4)
    assert list(source.modalities) == ["m0", "m1", "m2"]
    used: dict[str, list[list[int]]] = {
        "train": [[], [], []],
        "validation": [[], [], []],
        "test": [[], [], []],
    }
    corners = set()
    for split, size in source.split_sizes.items():
        part = "train" if split == "train" else "test"
        masks = arrays[f"x_{part}"] > 128
        for index in range(size):
            sample = source.sample(split, index)
            for modality, image in enumerate(sample.values.values()):
                assert image.shape == (3, 28, 28)
                mask = image[2] == 255 - 10 * modality
                assert (image[2][~mask] == 10 * modality).all()
                # With random pixels for digits no two masks are equal: the mask names the image.
                (underlying,) = np.flatnonzero((masks == mask).all(axis=(1, 2))).tolist()
                assert arrays[f"y_{part}"][underlying] == sample.label
                used[split][modality].append(underlying)
                crop = np.where(mask, 255 - image, image).astype(int)
                top, left = crop[0, 0, 0], crop[1, 0, 0]
                assert (crop[0] == top + np.arange(28)[:, None]).all()
                assert (crop[1] == left + np.arange(28)).all()
                corners.add((modality, top, left))
    assert source.split_sizes == {"train": NUM_TRAIN, "validation": NUM_TEST // 2, "test": NUM_TEST // 2}
    for modality in range(3):
        assert sorted(used["train"][modality]) == list(range(NUM_TRAIN))
        assert sorted(used["validation"][modality] + used["test"][modality]) == list(range(NUM_TEST))
        assert set(used["test"][modality]) == set(used["test"][0])
    assert used["train"][0] != used["train"][1] != used["train"][2]
    assert len({corner for corner in corners if corner[0] == 0}) > 90
    # The photographs of modalities 1 and 2 fit the crop in one direction: its ends are reached, never passed.
    assert {top for modality, top, _ in corners if modality == 1} == {0}
    assert {left for modality, _, left in corners if modality == 2} == {0}


def test_seeds_split_the_test_images_differently(npz, backgrounds):
    mnist = read_mnist(npz)
    labels = [PolyMNISTSource(mnist, backgrounds, seed).labels["test"].tolist() for seed in (0, 0, 1)]
    assert labels[0] == labels[1] != labels[2]


def write_idx(folder: Path, arrays, compress: bool) -> None:
    names = {"x": "images-idx3-ubyte", "y": "labels-idx1-ubyte"}
    for key, array in arrays.items():
        header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        name = f"{'train' if key.endswith('train') else 't10k'}-{names[key[0]]}"
        content = header + array.tobytes()
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_hold_the_same_arrays(tmp_path, arrays, compress):
    write_idx(tmp_path, arrays, compress)
    mnist = read_mnist(tmp_path)
    for key, array in arrays.items():
        np.testing.assert_array_equal(getattr(mnist, key), array)


def test_damaged_mnist_is_named(tmp_path, arrays):
    with pytest.raises(UserError, match=r"nothing\.npz: no such file.*--mnist"):
        read_mnist(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(UserError, match=r"text\.npz: cannot be read"):
        read_mnist(tmp_path / "text.npz")
    np.savez(tmp_path / "short.npz", x_train=arrays["x_train"])
    with pytest.raises(UserError, match=r"short\.npz.*x_train, y_train"):
        read_mnist(tmp_path / "short.npz")
    pickled = {**arrays, "y_test": np.array([object()] * NUM_TEST)}
    np.savez(tmp_path / "pickled.npz", **pickled)
    with pytest.raises(UserError, match=r"pickled\.npz"):
        read_mnist(tmp_path / "pickled.npz")
    np.savez(tmp_path / "wrong.npz", **{**arrays, "y_test": arrays["y_test"][:-1]})
    with pytest.raises(UserError, match=r"wrong\.npz: y_test"):
        read_mnist(tmp_path / "wrong.npz")
    np.savez(tmp_path / "large.npz", **{**arrays, "x_test": np.zeros((NUM_TEST, 32, 32), np.uint8)})
    with pytest.raises(UserError, match=r"large\.npz: x_test"):
        read_mnist(tmp_path / "large.npz")
    folder = tmp_path / "idx"
    folder.mkdir()
    write_idx(folder, arrays, compress=False)
    (folder / "t10k-images-idx3-ubyte").write_bytes((folder / "t10k-images-idx3-ubyte").read_bytes()[:-1])
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte"):
        read_mnist(folder)
    (folder / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(UserError, match="neither t10k-images-idx3-ubyte nor"):
        read_mnist(folder)


def test_unfit_backgrounds_are_named(npz, tmp_path):
    mnist = read_mnist(npz)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        PolyMNISTSource(mnist, tmp_path / "nowhere")
    folder = tmp_path / "bad"
    folder.mkdir()
    with pytest.raises(UserError, match=r"bad: has no \.jpg"):
        PolyMNISTSource(mnist, folder)
    Image.new("RGB", (27, 100)).save(folder / "1.jpg")
    with pytest.raises(UserError, match=r"1\.jpg: smaller than 28×28"):
        PolyMNISTSource(mnist, folder)
    (folder / "1.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1\.jpg: cannot be read"):
        PolyMNISTSource(mnist, folder)


def released_image(part: str, modality: int, index: int) -> np.ndarray:
    rng = np.random.default_rng([part == "test", modality, index])
    return rng.integers(256, size=(28, 28, 3), dtype=np.uint8)


def released_files():
    for part, size in (("train", 12), ("test", 6)):
        for modality in range(2):
            for index in range(size):
                buffer = io.BytesIO()
                Image.fromarray(released_image(part, modality, index)).save(buffer, "PNG")
                yield f"PolyMNIST/{part}/m{modality}/{index}.{index % 10}.png", buffer.getvalue()


@pytest.fixture
def released(tmp_path) -> Path:
    for name, content in released_files():
        path = tmp_path / "released" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "released"


def check_released(source: ReleasedPolyMNISTSource) -> None:
    assert source.split_sizes == {"train": 12, "validation": 3, "test": 3}
    for index in range(12):
        sample = source.sample("train", index)
        assert sample.label == index % 10
        for modality in range(2):
            expected = released_image("train", modality, index).transpose(2, 0, 1)
            np.testing.assert_array_equal(sample.values[f"m{modality}"], expected)
    held_out = {
        source.sample(split, index).values["m1"].tobytes()
        for split in ("validation", "test")
        for index in range(3)
    }
    assert held_out == {released_image("test", 1, i).transpose(2, 0, 1).tobytes() for i in range(6)}


def test_the_released_folder_is_paired_by_file_name(released):
    check_released(ReleasedPolyMNISTSource(released / "PolyMNIST"))
    check_released(ReleasedPolyMNISTSource(released))


def test_a_damaged_released_folder_is_named(released, tmp_path):
    with pytest.raises(UserError, match="nowhere: not the released PolyMNIST"):
        ReleasedPolyMNISTSource(tmp_path / "nowhere")
    root = released / "PolyMNIST"
    Image.new("L", (28, 28)).save(root / "train" / "m1" / "3.3.png")
    with pytest.raises(UserError, match=r"train/m1/3\.3\.png: L image of 28×28, expected RGB"):
        ReleasedPolyMNISTSource(root).sample("train", 3)
    (root / "train" / "m1" / "4.4.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"train/m1/4\.4\.png: cannot be decoded as PNG"):
        ReleasedPolyMNISTSource(root).sample("train", 4)
    (root / "test" / "m1" / "2.2.png").unlink()
    with pytest.raises(UserError, match=r"test/m1: has other images.*2\.2\.png"):
        ReleasedPolyMNISTSource(root)


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    """The release, in a folder of its own as the real one is, with members that must not be unpacked."""
    path = tmp_path / "release.zip"
    with zipfile.ZipFile(path, "w") as members:
        for name, content in released_files():
            members.writestr(f"data_PM_ICLR_2024/{name}", content)
        members.writestr("../../escaped.png", b"x")
        members.writestr("PolyMNIST/train/m0/../../../../escaped.png", b"x")
        members.writestr("data_PM_ICLR_2024/classifier.pth", b"x")
    monkeypatch.setattr(polymnist, "RELEASE_URL", path.as_uri())
    return path


def test_the_release_is_fetched_and_unpacked_safely_and_once(archive, tmp_path):
    cache = tmp_path / "deep" / "cache"
    folder = polymnist.download_release(cache)
    check_released(ReleasedPolyMNISTSource(folder))
    assert sorted(path.name for path in cache.iterdir()) == ["PolyMNIST", "PolyMNIST.zip"]
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 36
    assert not list(tmp_path.rglob("escaped.png"))
    archive.unlink()
    assert polymnist.download_release(cache) == folder


def test_without_a_network_the_message_says_what_to_put_where(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(polymnist, "RELEASE_URL", "http://127.0.0.1:9/release.zip")  # nothing listens there
    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(download, "LONGEST_WAIT", 0.02)
    cache = tmp_path / "cache"
    with pytest.raises(UserError) as problem:
        polymnist.download_release(cache)
    assert polymnist.RELEASE_URL in str(problem.value)
    assert str(cache / "PolyMNIST.zip") in str(problem.value)
    # Doing as it says makes the same command go on.
    archive.rename(cache / "PolyMNIST.zip")
    check_released(ReleasedPolyMNISTSource(polymnist.download_release(cache)))


def test_an_archive_of_something_else_is_refused(tmp_path):
    tmp_path.joinpath("PolyMNIST.zip").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=r"PolyMNIST\.zip: cannot be unpacked"):
        polymnist.download_release(tmp_path)
    with zipfile.ZipFile(tmp_path / "PolyMNIST.zip", "w") as members:
        members.writestr("cat.png", b"x")
    with pytest.raises(UserError, match=r"PolyMNIST\.zip: does not contain PolyMNIST"):
        polymnist.download_release(tmp_path)


def test_mnist_by_torchvision_says_what_to_do_without_a_network(tmp_path, monkeypatch):
    def refuse(*arguments, **settings):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match="--mnist PATH"):
        polymnist.download_mnist(tmp_path)


def test_mnist_by_torchvision_is_read_from_where_it_puts_it(tmp_path, arrays):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    write_idx(raw, arrays, compress=False)
    # All files are there, so that nothing is downloaded.
    mnist = read_mnist(polymnist.download_mnist(tmp_path))
    np.testing.assert_array_equal(mnist.x_train, arrays["x_train"])


def test_sources_are_light_to_import():
    script = "import sys, cmvae.datasets; print(*{'torch', 'sklearn', 'webdataset'} & set(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert output.stdout.strip() == ""
