"""CUDA kernels from source to launch: compiled, kept on disk, loaded, bound. Knows of no convolution."""
