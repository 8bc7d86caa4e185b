"""`cmvae train` for `accelerate launch launch/train.py configs/….yaml`."""

from cmvae.commands import run

if __name__ == "__main__":
    run("train")
