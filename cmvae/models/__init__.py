"""CMVAE and D-CMVAE: models, networks, objectives and exports."""
