"""What goes into a wheel besides the package: compiled kernels of layers that many networks have.

    python -m shipping build/shipping/shipped.kernels

Needs the compiler (the extra cuda13 or cuda12) and no GPU. `make wheel SHIP=1` runs it.
"""
