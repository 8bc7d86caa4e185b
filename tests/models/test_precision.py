"""What `train.mixed_precision: auto` takes, by what a device computes in."""

import logging

import pytest
import torch
from commands import ROOT

from cmvae import distributed
from cmvae.config import load_config
from cmvae.models.precision import autocast_dtype, computes_in_bf16, network_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def pretend(monkeypatch, avx512=False, amx=False, gpu=False):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu)


@pytest.mark.parametrize(
    ("device", "machine", "precision"),
    [
        (CPU, {}, "fp32"),
        (CPU, {"avx512": True}, "bf16"),
        (CPU, {"amx": True}, "bf16"),
        (CPU, {"gpu": True}, "fp32"),
        (GPU, {"avx512": True}, "fp32"),
        (GPU, {"gpu": True}, "bf16"),
        (torch.device("mps"), {"avx512": True, "gpu": True}, "fp32"),
    ],
)
def test_auto_is_bf16_where_there_are_instructions_for_it(monkeypatch, device, machine, precision):
    pretend(monkeypatch, **machine)
    assert network_precision("auto", device) == precision
    assert autocast_dtype("auto", device) == {"fp32": None, "bf16": torch.bfloat16}[precision]


@pytest.mark.parametrize(
    ("setting", "dtype"), [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_what_is_asked_for_is_taken_on_any_machine(monkeypatch, setting, dtype):
    for has in (False, True):
        pretend(monkeypatch, avx512=has, gpu=has)
        for device in (CPU, GPU):
            assert (network_precision(setting, device), autocast_dtype(setting, device)) == (setting, dtype)


def test_the_flags_of_the_processor_agree():
    # Independent of torch: what Linux reads off the processor.
    try:
        with open("/proc/cpuinfo") as file:
            flags = {flag for line in file if line.startswith("flags") for flag in line.split()}
    except FileNotFoundError:
        pytest.skip("no /proc/cpuinfo")
    if not flags:
        pytest.skip("no x86 processor")
    assert computes_in_bf16(CPU) == bool(flags & {"avx512_bf16", "amx_tile"})


@pytest.mark.parametrize(
    ("setting", "has", "warned"),
    [("bf16", False, True), ("bf16", True, False), ("auto", False, False), ("fp32", False, False)],
)
def test_bf16_on_a_processor_without_it_is_told(monkeypatch, caplog, setting, has, warned):
    monkeypatch.setattr(distributed, "computes_in_bf16", lambda device: has)
    config = load_config(ROOT / "configs/digits.yaml", [f"train.mixed_precision={setting}"])
    with caplog.at_level(logging.WARNING, "cmvae"):
        distributed.start_accelerator(config)
    told = [record.getMessage() for record in caplog.records if "bf16" in record.getMessage()]
    assert len(told) == warned
    if warned:
        assert "this processor" in told[0]
        assert "train.mixed_precision=auto" in told[0]
