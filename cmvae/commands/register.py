"""Write the model of a run as an MLflow model, which MLflow serves over HTTP.

    cmvae register runs/wine --out wine-model
    mlflow models serve -m wine-model --env-manager local --port 5001
    curl localhost:5001/invocations -H 'Content-Type: application/json' \
        -d '{"dataframe_records": [{"alcohol": 13.2, "hue": 1.05}]}'
    cmvae register runs/wine --name wine       # a version in MLflow's registry, too

A row has columns of the table that the run was trained on, missing ones are left out or null. The
answer has its cluster and the probability of each cluster. The model has a signature and an
example, and no pickles. With --name it is logged to the MLflow run of the training, and registered.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cmvae.config import load_cmvae_run
from cmvae.utils.arguments import add_num_clusters_argument, command_parser


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of the run, e.g. runs/wine")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to (default: RUN/mlflow_model)")
    parser.add_argument("--name", help="register the model in MLflow under this name")
    add_num_clusters_argument(parser)
    return parser.parse_args()


def main() -> int:
    """Write, register."""
    arguments = parse_arguments()
    load_cmvae_run(arguments.run)
    folder: Path = arguments.out or arguments.run / "mlflow_model"

    from cmvae.serving import write_mlflow_model
    from cmvae.tracking import register_model

    write_mlflow_model(arguments.run, folder, arguments.num_clusters)
    print(f"{folder}: written. Next: mlflow models serve -m {folder} --env-manager local")
    if arguments.name is not None:
        number = register_model(arguments.run, folder, arguments.name)
        print(f"registered: {arguments.name}, version {number}")
    return 0
