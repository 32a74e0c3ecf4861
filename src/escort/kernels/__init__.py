"""The kernels: `cpu/` is compiled into `_cpu` with the package, `cuda/` where it runs."""
