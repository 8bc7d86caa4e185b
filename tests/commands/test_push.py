"""`cmvae push` and loading from the Hub, against a stand-in of its API."""

from __future__ import annotations

import sys

import pytest
import yaml
from commands import run_command
from hub_stand_in import hub_stand_in
from safetensors.torch import load

from cmvae.training.run import run_training

REPOSITORY = "ada/birds-of-paradise"


@pytest.fixture
def hub(tmp_path):
    with hub_stand_in() as server:
        yield server


@pytest.fixture
def run_dir(experiment, tmp_path):
    from cmvae.data.index import ShardIndex

    config = experiment("train.max_steps=2", "train.checkpoint_every=null")
    run_training(config, ShardIndex.load(config.data.shards))
    return config.run_dir


def call(hub, tmp_path, *arguments, login="secret"):
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": login,
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return run_command([sys.executable, *arguments], tmp_path, **environment)


def push(hub, tmp_path, run_dir, *options, **environment):
    return call(hub, tmp_path, "-m", "cmvae.commands", "push", run_dir, REPOSITORY, *options, **environment)


LOAD = """
import sys
from cmvae import CMVAE
model = CMVAE.from_pretrained(sys.argv[1])
print(sum(p.double().sum().item() for p in model.parameters()), int(model.cluster_prior.active.sum()))
"""


def test_a_model_travels_to_the_hub_and_back(hub, tmp_path, run_dir):
    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation" / "metrics.json").write_text('{"clustering/acc": 0.75, "probe/z/m0": 0.5}')
    done = push(hub, tmp_path, run_dir, "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"uploaded: {hub.url}/{REPOSITORY}\n"
    assert hub.private == {REPOSITORY: True}
    files = hub.repositories[REPOSITORY]
    assert set(files) == {
        "README.md",
        "config.yaml",
        "model.safetensors",
        "clusters.safetensors",
        "clusters.json",
    }
    assert load(files["model.safetensors"])
    _, front, card = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "cmvae"
    assert f'CMVAE.from_pretrained("{REPOSITORY}")' in card
    assert "| clustering accuracy | 0.750" in card
    assert "| m0       | image | 3×16×16 |" in card
    # What others have put there is not downloaded: no pickle can be.
    files["pytorch_model.bin"] = b"a pickle"
    loaded = [call(hub, tmp_path, "-c", LOAD, place) for place in (REPOSITORY, run_dir / "export")]
    assert [one.returncode for one in loaded] == [0, 0], loaded[0].stderr
    assert loaded[0].stdout == loaded[1].stdout
    assert not list((tmp_path / "hf").rglob("pytorch_model.bin"))
    # A second time it is a new commit of the same repository.
    assert push(hub, tmp_path, run_dir).returncode == 0


def test_what_goes_wrong_is_an_error_with_a_remedy(hub, tmp_path, run_dir):
    refused = push(hub, tmp_path, run_dir, login="wrong")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {REPOSITORY}: cannot be uploaded: ")
    assert "hf auth login" in refused.stderr
    named = call(hub, tmp_path, "-m", "cmvae.commands", "push", run_dir, "birds")
    assert "birds: not the name of a repository. Give one such as user/name" in named.stderr
    (run_dir / "export" / "model.safetensors").unlink()
    empty = push(hub, tmp_path, run_dir)
    assert empty.returncode == 2
    assert "export" in empty.stderr
    for output in (refused.stderr, named.stderr, empty.stderr):
        assert "Traceback" not in output


def test_a_name_that_is_nowhere_is_said_to_be(hub, tmp_path):
    program = """
from cmvae import CMVAE
from cmvae.utils.errors import UserError
for name in ("nobody/nothing", "some/folder/deeper"):
    try:
        CMVAE.from_pretrained(name)
    except UserError as error:
        print(error)
"""
    done = call(hub, tmp_path, "-c", program)
    first, second = done.stdout.splitlines()
    assert first.startswith("nobody/nothing: neither a folder nor a model on the Hugging Face Hub")
    assert second.startswith("some/folder/deeper/model.safetensors: missing")
    hub.server_close()
    unreachable = call(hub, tmp_path, "-c", program).stdout.splitlines()[0]
    assert unreachable.startswith(
        "nobody/nothing: no such folder, and the Hugging Face Hub cannot be reached"
    )
