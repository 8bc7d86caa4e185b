"""Upload the export of a run to the Hugging Face Hub, with a model card.

    cmvae push runs/digits user/digits --private

`CMVAE.from_pretrained("user/digits")` and `MultimodalClusterer.from_pretrained("user/digits")` load it
on any machine. The card describes the data, the
clusters, the results of `cmvae evaluate` if there are any, and the settings. Log in first, with
`hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from cmvae.config import load_cmvae_run
from cmvae.utils.arguments import command_parser
from cmvae.utils.errors import UserError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of the run, e.g. runs/digits")
    parser.add_argument("repository", metavar="USER/NAME", help="repository, created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    return parser.parse_args()


def main() -> int:
    """Write the card, upload."""
    arguments = parse_arguments()
    config = load_cmvae_run(arguments.run)

    from cmvae.commands.model_card import write_model_card
    from cmvae.estimator import MultimodalClusterer
    from cmvae.models.hub import push_export

    card = write_model_card(config, arguments.run, arguments.repository)
    try:
        clusterer = MultimodalClusterer.from_run(arguments.run)
    except ValueError as error:
        raise UserError(str(error)) from error
    with tempfile.TemporaryDirectory(prefix="cmvae-") as temporary:
        # With the columns of the table that it was trained on, so that it reads new rows.
        folder = Path(temporary) / "export"
        clusterer.save_pretrained(folder)
        url = push_export(folder, arguments.repository, card, arguments.private)
    print(f"uploaded: {url}")
    return 0
