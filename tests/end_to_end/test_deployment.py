"""Files for clusters name commands, experiments and launch files that exist.

Their schemas were checked by hand: hadolint 2.15, kubeflow-trainer-api 2.3, SkyPilot's schemas.
"""

from __future__ import annotations

import re
import shlex

import yaml
from commands import ROOT

from cmvae.commands import COMMANDS
from cmvae.commands.shipped import find_experiment, find_launch_file


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
