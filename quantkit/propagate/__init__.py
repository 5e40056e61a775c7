"""Quantising while the model runs: each layer sees the inputs that the layers before it give."""
