"""`cmvae COMMAND …`: the installed command; `python -m cmvae.commands` is the same."""

from __future__ import annotations

import sys
from importlib.metadata import version

from cmvae.commands import COMMANDS, run


def usage() -> str:
    """What `cmvae --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: cmvae COMMAND [arguments]",
            "",
            "Multimodal generative clustering: pack data, train, evaluate, use what was trained.",
            "",
            "commands:",
            *lines,
            "",
            "`cmvae COMMAND --help` explains a command, `cmvae --version` prints the version.",
        ]
    )


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"cmvae {version('cmvae')}")
    elif name in COMMANDS:
        # argparse takes the name of the program from here.
        sys.argv[:2] = [f"cmvae {name}"]
        run(name)
    else:
        print(f"error: {name}: no such command\n\n{usage()}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
