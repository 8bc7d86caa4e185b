"""What a training imports before it has something to draw."""

import sys

import pytest
from commands import ROOT, run_command


@pytest.mark.parametrize("module", ["cmvae.training.run", "cmvae.training.refiner_task"])
def test_training_imports_no_matplotlib(module):
    program = f"import sys, {module}; print(*(name for name in sys.modules if name.startswith('matplotlib')))"
    done = run_command([sys.executable, "-c", program], ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
