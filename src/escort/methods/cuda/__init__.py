"""The ways to run a convolution on NVIDIA GPUs."""
