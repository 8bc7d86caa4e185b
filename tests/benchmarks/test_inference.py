"""Jobs on trained runs."""

import pytest
from inference import evaluation_job, refining_job, selection_job
from refiner_run import write_refiner_run

from cmvae.models.cmvae import CMVAE
from cmvae.models.refiner import Refiner
from cmvae.utils.errors import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory, quadrants_shards):
    """The folders of a CMVAE's run and of its refiner's."""
    folder = tmp_path_factory.mktemp("runs")
    write_refiner_run(folder, quadrants_shards)
    return folder / "cmvae", folder / "refiner"


def test_a_selection_encodes_once_or_once_for_each_number_of_clusters(runs, monkeypatch):
    passes = []
    encode = CMVAE.encode
    monkeypatch.setattr(CMVAE, "encode", lambda model, inputs: passes.append(1) or encode(model, inputs))
    once, again = (selection_job(str(runs[0]), again) for again in (False, True))
    once.run()
    num_batches = len(passes)
    again.run()
    # Four clusters: three, two and one are left.
    assert len(passes) - num_batches == 3 * num_batches
    assert once.num_items == again.num_items > 0


def test_refined_images_are_counted_over_all_modalities(runs, monkeypatch):
    refined = []
    refine = Refiner.refine

    def count(self, images, *arguments, **settings):
        refined.extend(x.shape for x in images.values())
        return refine(self, images, *arguments, **settings)

    monkeypatch.setattr(Refiner, "refine", count)
    job = refining_job(str(runs[1]), ["num_steps=1"], 130)
    job.run()
    # Rounded up to equally many of each modality, in batches of at most 64.
    assert sum(shape[0] for shape in refined) == job.num_items >= 130
    assert max(shape[0] for shape in refined) <= 64
    assert refined[0][1:] == (3, 8, 8)


def test_a_group_of_metrics_is_computed_and_nothing_written(runs):
    before = sorted(runs[0].rglob("*"))
    job = evaluation_job(str(runs[0]), "clustering")
    job.run()
    assert sorted(runs[0].rglob("*")) == before
    assert job.facts["metrics"] > 0


def test_a_group_that_has_no_metric_for_the_run_says_so(runs):
    job = evaluation_job(str(runs[0]), "text")
    job.run()
    assert job.facts["metrics"] == 0
    assert job.facts["left_out"]


def test_runs_of_the_other_kind_are_refused(runs):
    with pytest.raises(UserError, match="has no clusters"):
        selection_job(str(runs[1]), False)
    with pytest.raises(UserError, match="refines nothing"):
        refining_job(str(runs[0]), [], 10)
