"""The notebook of docs/ runs from top to bottom, and shows what it says."""

from __future__ import annotations

import json
import sys

from commands import ROOT, run_command

NOTEBOOK = ROOT / "docs" / "clusters_from_python.ipynb"


def test_the_notebook_runs(tmp_path):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    # What the last expression of each cell gives is its output.
    program = """
import ast, json, sys
names = {}
for source in json.load(open(sys.argv[1])):
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    print("OUTPUT", repr(None if last is None else eval(compile(last, "cell", "eval"), names)), flush=True)
"""
    (tmp_path / "cells.json").write_text(json.dumps(["".join(cell["source"]) for cell in cells]))
    done = run_command([sys.executable, "-c", program, "cells.json"], tmp_path)
    assert done.returncode == 0, done.stderr
    outputs = [text.strip() for text in done.stdout.split("OUTPUT ")[1:]]
    assert len(outputs) == len(cells)
    assert outputs[0].startswith("".join(cells[0]["outputs"][0]["data"]["text/plain"]))
    assert outputs[1].startswith("(3, "), "the number of clusters that the page shows"
    assert outputs[-1] == "np.True_", "a saved model predicts the same"
    assert (tmp_path / "wine-clusters" / "model.safetensors").is_file()
