"""Two machines, each a network namespace, and one cable; launched as `multi_node.yaml` documents it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT
from safetensors.torch import load_file
from torch import equal

NODES = ("cmvae-node0", "cmvae-node1")
CABLE = ("cmvae-eth0", "cmvae-eth1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
STEPS = 30

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None,
        reason="network namespaces need root and iproute2",
    ),
]


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def nodes():
    """Two namespaces that see each other and nothing else."""
    try:
        for node in NODES:
            ip("netns", "add", node)
        ip("link", "add", CABLE[0], "netns", NODES[0], "type", "veth", "peer", CABLE[1], "netns", NODES[1])
        for node, end, address in zip(NODES, CABLE, ADDRESSES, strict=True):
            ip("-n", node, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", node, "link", "set", "lo", "up")
            ip("-n", node, "link", "set", end, "up")
        yield NODES
    finally:
        for node in NODES:
            kill(node)
            subprocess.run(["ip", "netns", "del", node], check=False, capture_output=True)


def kill(node):
    """Everything that runs on a node, as if its power were gone."""
    pids = subprocess.run(["ip", "netns", "pids", node], check=False, capture_output=True, text=True).stdout
    for pid in pids.split():
        os.kill(int(pid), signal.SIGKILL)


def set_cable(state):
    ip("-n", NODES[1], "link", "set", CABLE[1], state)


def start(rank, run, experiment_file, *settings):
    """The documented command on one of the nodes."""
    log = (run.parent / f"{run.name}-node{rank}.txt").open("a")
    return subprocess.Popen(
        [
            *("ip", "netns", "exec", NODES[rank], "accelerate", "launch"),
            f"--config_file={ROOT}/configs/accelerate/multi_node.yaml",
            *("--num_machines=2", "--num_processes=2", f"--machine_rank={rank}"),
            *(f"--main_process_ip={ADDRESSES[0]}", "--main_process_port=29500"),
            *(ROOT / "launch/train.py", experiment_file, "--resume", f"output_dir={run}"),
            *("train.batch_size=8", f"train.max_steps={STEPS}", "train.checkpoint_every=1", *settings),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            # A machine's own name need not be that of the address under which the other one sees it.
            "GLOO_SOCKET_IFNAME": CABLE[rank],
        },
        stdout=log,
        stderr=log,
    )


def train(run, experiment_file, *settings):
    """Both nodes, to the end."""
    finish([start(rank, run, experiment_file, *settings) for rank in (0, 1)], run, codes=[0, 0])


def finish(processes, run, codes):
    left = [process.wait(timeout=240) for process in processes]
    assert left == codes, "".join(path.read_text() for path in run.parent.glob(f"{run.name}-node*.txt"))


def wait_for_step(run, step):
    deadline = time.monotonic() + 200
    while not [path for path in run.glob("checkpoints/step-*") if int(path.name[5:]) >= step]:
        assert time.monotonic() < deadline, (run.parent / f"{run.name}-node0.txt").read_text()
        time.sleep(0.02)


def last_weights(run):
    return load_file(run / f"checkpoints/step-{STEPS:08d}/model.safetensors")


def test_a_cut_cable_and_a_dead_node_lose_nothing(nodes, tmp_path, experiment_file):
    whole = tmp_path / "whole"
    train(whole, experiment_file)
    expected = last_weights(whole)

    def assert_exact(run):
        found = last_weights(run)
        assert all(equal(tensor, found[name]) for name, tensor in expected.items())

    # A cut that is mended within the timeout is waited out.
    run = tmp_path / "mended"
    processes = [start(rank, run, experiment_file) for rank in (0, 1)]
    wait_for_step(run, 3)
    set_cable("down")
    reached = json.loads(newest(run).read_text())["state"]["step"]
    time.sleep(3)
    stood = json.loads(newest(run).read_text())["state"]["step"]
    set_cable("up")
    finish(processes, run, codes=[0, 0])
    assert reached <= stood <= reached + 1 < STEPS, "the cut came too late, or cut nothing"
    assert_exact(run)

    # One that is not ends both, and --resume goes on once it is.
    run = tmp_path / "cut"
    processes = [start(rank, run, experiment_file, "train.hang_timeout=10") for rank in (0, 1)]
    wait_for_step(run, 3)
    set_cable("down")
    finish(processes, run, codes=[1, 1])
    assert int(newest(run).parent.name[5:]) < STEPS
    told = "".join(path.read_text() for path in (run / "logs").glob("rank-*.log"))
    assert "no progress for 10 s (train.hang_timeout)" in told
    set_cable("up")
    train(run, experiment_file)
    assert_exact(run)

    # A node dies, the other ends, and both come back.
    run = tmp_path / "dead"
    processes = [start(rank, run, experiment_file) for rank in (0, 1)]
    wait_for_step(run, 3)
    kill(nodes[1])
    finish(processes, run, codes=[1, -signal.SIGKILL])
    assert int(newest(run).parent.name[5:]) < STEPS
    train(run, experiment_file)
    assert_exact(run)


def newest(run):
    return max(run.glob("checkpoints/step-*/state.json"))
