"""CMVAE: multimodal generative clustering."""
