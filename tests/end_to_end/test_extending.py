"""docs/extending.md: a copy of the checkout with the page's files and lines in it does what the page says."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT

PAGE = ROOT / "docs/extending.md"
REGISTRY = "cmvae/modalities/__init__.py"
_BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The checkout as a reader of the page would have it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("cmvae", "launch", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for language, path, text in _BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if path == REGISTRY:
            registry = (folder / path).read_text(encoding="utf-8")
            import_line, entry = text.strip("\n").split("\n\n")
            head, start, tail = registry.partition("AnyModality = Annotated[\n")
            (folder / path).write_text(f"{head}{import_line}\n\n{start}{entry}\n{tail}", encoding="utf-8")
        elif language != "bash":
            assert not (folder / path).exists(), "a new kind changes no other file"
            (folder / path).write_text(text, encoding="utf-8")
    return folder


def run(checkout, command):
    """Run a command of the page in the copy, with its library and not the one that is installed."""
    environment = {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        shlex.split(command),
        cwd=checkout,
        env=environment,
        timeout=300,
        text=True,
        capture_output=True,
        check=False,
    )


def test_the_page_does_what_it_says(checkout):
    (commands,) = [
        text for language, _, text in _BLOCK.findall(PAGE.read_text("utf-8")) if language == "bash"
    ]
    for command in commands.splitlines():
        done = run(checkout, command)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    # Bands that the notes were made in; a spectrogram of each, generated from its name alone.
    assert re.findall(r"(\w+): loudest in band (\d+)", done.stdout) == [
        ("low", "2"),
        ("middle", "5"),
        ("high", "9"),
        ("top", "13"),
    ]
    sounds = sorted((checkout / "tones/sound").iterdir())
    assert len(sounds) == 16
    first = np.load(sounds[0], allow_pickle=False)
    assert (first.dtype, first.shape) == (np.float16, (1, 16, 16))
    assert (checkout / "tones/grid.png").stat().st_size > 1000
