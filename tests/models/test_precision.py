"""`train.mixed_precision` on devices with and without support for bf16."""

import logging

import pytest
import torch
from commands import ROOT

from cmvae import distributed
from cmvae.config import load_config
from cmvae.models.precision import autocast_dtype, computes_in_bf16, network_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def set_support(monkeypatch, avx512=False, amx=False, gpu=False):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu)


@pytest.mark.parametrize(
    ("device", "support", "precision"),
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
def test_auto_is_bf16_if_the_device_supports_it(monkeypatch, device, support, precision):
    set_support(monkeypatch, **support)
    assert network_precision("auto", device) == precision
    assert autocast_dtype("auto", device) == {"fp32": None, "bf16": torch.bfloat16}[precision]


@pytest.mark.parametrize(
    ("setting", "dtype"), [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_explicit_precision_is_used_on_any_device(monkeypatch, setting, dtype):
    for supported in (False, True):
        set_support(monkeypatch, avx512=supported, gpu=supported)
        for device in (CPU, GPU):
            assert (network_precision(setting, device), autocast_dtype(setting, device)) == (setting, dtype)


def test_bf16_support_agrees_with_the_flags_of_the_processor():
    # Independent of torch: the flags that Linux reports.
    try:
        with open("/proc/cpuinfo") as file:
            flags = {flag for line in file if line.startswith("flags") for flag in line.split()}
    except FileNotFoundError:
        pytest.skip("no /proc/cpuinfo")
    if not flags:
        pytest.skip("no x86 processor")
    assert computes_in_bf16(CPU) == bool(flags & {"avx512_bf16", "amx_tile"})


@pytest.mark.parametrize(
    ("setting", "supported", "warned"),
    [("bf16", False, True), ("bf16", True, False), ("auto", False, False), ("fp32", False, False)],
)
def test_unsupported_bf16_gives_a_warning(monkeypatch, caplog, setting, supported, warned):
    monkeypatch.setattr(distributed, "computes_in_bf16", lambda device: supported)
    config = load_config(ROOT / "configs/digits.yaml", [f"train.mixed_precision={setting}"])
    with caplog.at_level(logging.WARNING, "cmvae"):
        distributed.start_accelerator(config)
    warnings = [record.getMessage() for record in caplog.records if "bf16" in record.getMessage()]
    assert len(warnings) == warned
    if warned:
        assert "this processor" in warnings[0]
        assert "train.mixed_precision=auto" in warnings[0]
