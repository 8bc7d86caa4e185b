"""`cmvae cluster` in a checkout."""

from cmvae.commands import run

if __name__ == "__main__":
    run("cluster")
