"""Jobs of reading: both ways read the same images."""

import pytest
import torch
from mixed import Mixed
from reading import PairedImages, folder_job, shards_job, write_folder

from cmvae.data.reader import EvaluationLoader
from cmvae.datasets.writer import write_shards
from cmvae.utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits_shards):
    """The images of the first 12 train samples."""
    folder = tmp_path_factory.mktemp("folder")
    write_folder(str(digits_shards), folder, 12)
    return folder


def test_the_folder_has_the_images_of_the_shards(folder, digits_shards):
    names = ["m0", "m1", "m2"]
    (batch,) = EvaluationLoader(digits_shards, split="train", modalities=names, batch_size=12, num_samples=12)
    images = PairedImages(folder)
    assert len(images) == 12
    assert sorted(path.name for path in folder.iterdir()) == names
    # As names sort: 0, 1, 10, 11, 2, …
    for place, number in enumerate(sorted(range(12), key=str)):
        for name, image in zip(names, images[place], strict=True):
            assert torch.equal(image, batch[name][number].float() / 255)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_reads_so_many_batches_through_as_many_epochs_as_it_takes(folder, digits_shards, num_workers):
    for job in (
        shards_job(str(digits_shards), 64, num_workers, 5),
        folder_job(str(folder), 4, num_workers, 5),
    ):
        assert job.measure()["seconds"] > 0
        assert job.num_items in (5 * 64, 5 * 4)


def test_other_kinds_are_no_images(tmp_path):
    write_shards(Mixed(), tmp_path / "mixed")
    with pytest.raises(UserError, match="not an image modality"):
        write_folder(str(tmp_path / "mixed"), tmp_path / "folder", 4)
    assert not (tmp_path / "folder").exists()
