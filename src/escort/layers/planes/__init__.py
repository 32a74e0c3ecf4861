"""What stands between convolutions and runs by kernels of our own on a GPU: layers of torch, one file per kernel."""
