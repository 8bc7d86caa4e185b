"""`cmvae evaluate` for `accelerate launch launch/evaluate.py runs/NAME`."""

from cmvae.commands import run

if __name__ == "__main__":
    run("evaluate")
