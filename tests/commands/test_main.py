"""`cmvae` itself: names, help, exit codes, and what it imports before it has to."""

from __future__ import annotations

import re
import runpy
import sys

import pytest
from commands import ROOT, run_command

import cmvae
from cmvae.commands import COMMANDS
from cmvae.commands.__main__ import main
from cmvae.commands.shipped import find_experiment, find_launch_file
from cmvae.utils.errors import UserError

ENTRY_POINTS = sorted([*(ROOT / "launch").glob("*.py"), *(ROOT / "tools").glob("*.py")])


def modules_imported_by(*arguments: object, folder) -> tuple[int, set[str]]:
    """The exit code of a Python process, and the top-level packages that it imported."""
    done = run_command([sys.executable, "-X", "importtime", *arguments], folder)
    names = re.findall(r"^import time: +\d+ \| +\d+ \| +([\w.]+)$", done.stderr, re.MULTILINE)
    assert "cmvae" in names
    return done.returncode, {name.partition(".")[0] for name in names}


def test_help_lists_every_command_and_imports_nothing_slow(tmp_path, monkeypatch, capsys):
    code, imported = modules_imported_by("-m", "cmvae.commands", "--help", folder=tmp_path)
    assert code == 0
    assert not imported & {"torch", "numpy", "pydantic", "yaml"}
    monkeypatch.setattr(sys, "argv", ["cmvae", "--help"])
    main()
    assert re.findall(r"^  (\w+) ", capsys.readouterr().out, re.MULTILINE) == list(COMMANDS)


def test_importing_the_package_imports_nothing_slow(tmp_path):
    code, imported = modules_imported_by("-c", "import cmvae", folder=tmp_path)
    assert code == 0
    assert not imported & {"torch", "numpy", "pydantic", "yaml"}
    assert [getattr(cmvae, name).__name__ for name in cmvae.__all__] == cmvae.__all__


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["digits", "seed=x"],
        ["digits", "seed=x", "--launch", "zero2"],
        ["digits", "--launch", "no"],
    ],
)
def test_a_mistake_in_the_settings_is_found_without_torch(tmp_path, arguments):
    code, imported = modules_imported_by("-m", "cmvae.commands", "train", *arguments, folder=tmp_path)
    assert code == 2
    assert not imported & {"torch", "accelerate", "mlflow", "scipy", "sklearn", "matplotlib"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert out.startswith(f"usage: cmvae {command} ")
    assert f"    cmvae {command} " in out, "an example"


@pytest.mark.parametrize("script", ENTRY_POINTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_of_the_checkout_are_the_same_commands(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert not end.value.code
    assert f"usage: {script.name} " in capsys.readouterr().out


def test_an_unknown_command_is_named(call):
    code, _, err = call("trian", "digits")
    assert code == 2
    assert err.startswith("error: trian: no such command")


def test_shipped_files_are_found_by_name_and_a_file_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_experiment("digits").read_text() == (ROOT / "configs/digits.yaml").read_text()
    assert find_launch_file("zero2").read_text() == (ROOT / "configs/accelerate/zero2.yaml").read_text()
    (tmp_path / "digits").mkdir()
    assert find_experiment("digits").name == "digits.yaml", "a folder is no experiment"
    (tmp_path / "digits").rmdir()
    (tmp_path / "digits").write_text("name: mine")
    assert find_experiment("digits").read_text() == "name: mine"


def test_an_unknown_name_lists_the_names():
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    with pytest.raises(UserError, match=f"^nonsense: no such file.* Names: {', '.join(names)}$"):
        find_experiment("nonsense")
    with pytest.raises(UserError, match=r"no launch file has this name\. Names: cpu, ddp, gpu"):
        find_launch_file("digits")
