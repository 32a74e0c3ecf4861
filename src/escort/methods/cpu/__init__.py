"""The ways to run a convolution on CPUs."""
