"""Upload the export of a run to the Hugging Face Hub, with a model card.

    cmvae push runs/digits user/digits --private

`CMVAE.from_pretrained("user/digits")` loads it on any machine. The card describes the data, the
clusters, the results of `cmvae evaluate` if there are any, and the settings. Log in first, with
`hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cmvae.config import load_cmvae_run
from cmvae.utils.arguments import command_parser


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
    from cmvae.models.hub import push_export

    card = write_model_card(config, arguments.run, arguments.repository)
    url = push_export(arguments.run / "export", arguments.repository, card, arguments.private)
    print(f"uploaded: {url}")
    return 0
