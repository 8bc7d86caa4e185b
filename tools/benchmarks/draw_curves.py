"""Draw one metric of several runs from MLflow.

python tools/benchmarks/draw_curves.py runs/A runs/B --out curves.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plots import curve_comparison

from cmvae.tracking import read_curve
from cmvae.utils.errors import UserError
from cmvae.utils.process_exit import run_main


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Draw one metric of several runs, and their differences.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs; the first is the reference")
    parser.add_argument("--metric", default="train/bound", help="name in MLflow (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="image file")
    return parser.parse_args()


def main() -> int:
    """Read, draw, and print the largest differences."""
    arguments = parse_arguments()
    curves = {folder.name: read_curve(folder, arguments.metric) for folder in arguments.runs}
    (first, reference), *others = curves.items()
    differences = {}
    for name, curve in others:
        if curve.keys() != reference.keys():
            raise UserError(f"{name}: has other steps than {first}. Train both equally long")
        differences[name] = {step: abs(value - reference[step]) for step, value in curve.items()}
    figure = curve_comparison(curves, differences, arguments.metric, first)
    try:
        figure.savefig(arguments.out)
    except OSError as error:
        raise UserError(f"--out {arguments.out}: cannot be written: {error}") from error
    for name, difference in differences.items():
        step = max(difference, key=lambda step: difference[step])
        share = difference[step] / abs(reference[step])
        print(f"{name} − {first}: at most {difference[step]:.2e}, {share:.1e} of the value, at step {step}")
    return 0


if __name__ == "__main__":
    run_main(main)
