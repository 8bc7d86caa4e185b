"""Files for clusters name commands, experiments and launch files that exist.

Their schemas were checked by hand: hadolint 2.15, kubeflow-trainer-api 2.3, SkyPilot's schemas. Scripts were
checked with shellcheck 0.11.
"""

from __future__ import annotations

import re
import shlex
import sys

import pytest
import yaml
from commands import ROOT, run_cmvae, run_command
from packing import contents, write_csv

from cmvae.commands import COMMANDS
from cmvae.commands.shipped import find_experiment, find_launch_file
from cmvae.datasets.digits import DigitsSource
from cmvae.datasets.packing import join_shards
from cmvae.datasets.writer import write_shards


def test_the_container_runs_the_command_and_copies_what_installing_needs():
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"FROM \S+ AS (\w+)", text) == ["base", "cpu", "cuda"]
    assert text.count('ENTRYPOINT ["cmvae"]') == 2
    copied = re.findall(r"^COPY (.+) \S+$", text, flags=re.MULTILINE)
    ignored = (ROOT / ".dockerignore").read_text().split()
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored, "the build would not see it"
    # What pyproject.toml refers to.
    project = (ROOT / "pyproject.toml").read_text()
    assert 'readme = "README.md"' in project
    assert "README.md" in " ".join(copied)


def check_training(words):
    """`cmvae train EXPERIMENT --resume …` with files that exist."""
    start = words.index("cmvae")
    assert words[start + 1] in COMMANDS
    find_experiment(words[start + 2])
    assert "--resume" in words
    if "--launch" in words:
        assert find_launch_file(words[words.index("--launch") + 1]).is_file()


def test_the_job_on_kubernetes_trains_in_the_volume_that_all_nodes_mount():
    job = yaml.safe_load((ROOT / "launch/kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    check_training(job["spec"]["trainer"]["command"])
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["volumeMounts"] == [{"name": pod["volumes"][0]["name"], "mountPath": "/work"}]
    assert "WORKDIR /work" in (ROOT / "Dockerfile").read_text()


def test_the_job_of_skypilot_starts_its_ranks_on_all_machines():
    task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    assert {"name", "resources", "num_nodes", "workdir", "file_mounts", "setup", "run"} == set(task)
    (line,) = [line for line in task["run"].replace("\\\n", " ").splitlines() if "cmvae" in line]
    words = shlex.split(line)
    check_training(words)
    for flag in ("--num-machines", "--num-processes", "--machine-rank", "--main-process-ip"):
        assert flag in words


TABLE = "table t.csv --vector x --text note --shard-size 20 --out"


def write_table(folder):
    rows = [{"x": n / 3, "note": f"word{n % 5} and word{n % 7}"} for n in range(60)]
    write_csv(folder / "t.csv", rows)


def test_the_job_array_of_slurm_packs_the_parts(tmp_path):
    write_table(tmp_path)
    # The installed command.
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "cmvae"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m cmvae.commands "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:/usr/bin:/bin"
    for task in ("2", "1"):
        job = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_CPUS_PER_TASK": "1"}
        done = run_command(
            ["bash", ROOT / "launch/pack.sbatch", *TABLE.split(), "mine"], tmp_path, **job, PATH=path
        )
        assert done.returncode == 0, done.stderr
        assert f"Part {task}/2 is packed. After the last one: cmvae pack join mine" in done.stdout
    done = run_cmvae("pack", "join", "mine", "--config", "c.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "60 samples, " in done.stdout
    assert done.stdout.endswith("cmvae train c.yaml\n")
    whole = run_cmvae("pack", *TABLE.split(), "whole/mine", "--config", "w.yaml", folder=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert contents(tmp_path / "mine") == contents(tmp_path / "whole" / "mine")
    config = (tmp_path / "w.yaml").read_text()
    assert (tmp_path / "c.yaml").read_text() == config.replace("whole/mine", "mine")


def test_the_workers_of_a_dask_cluster_pack_the_parts(tmp_path):
    distributed = pytest.importorskip("distributed", reason="pip install 'cmvae[dask]'")
    flags = "digits --pairings 1 --limit 60 --shard-size 25 --workers 1 --out"
    settings = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**settings) as cluster:
        start = [sys.executable, ROOT / "launch/pack_dask.py", cluster.scheduler_address, 2]
        done = run_command([*start, *flags.split(), "digits"], tmp_path, timeout=600)
        assert done.returncode == 0, done.stderr
        assert "2 of 2 parts are packed" in done.stdout
        refused = run_command([*start, *flags.split(), "digits", "--seed", 1], tmp_path, timeout=600)
    assert refused.returncode == 2
    assert "holds parts that do not fit: seed is 1 and 0" in refused.stderr
    join_shards(tmp_path / "digits")
    write_shards(DigitsSource(pairings=1), tmp_path / "whole", limit=60, shard_size=25)
    assert contents(tmp_path / "digits") == contents(tmp_path / "whole")
