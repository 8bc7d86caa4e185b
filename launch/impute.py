"""`cmvae impute` in a checkout."""

from cmvae.commands import run

if __name__ == "__main__":
    run("impute")
