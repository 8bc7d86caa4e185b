"""Models as tensors: CMVAE and D-CMVAE, their objectives, networks and exports."""
