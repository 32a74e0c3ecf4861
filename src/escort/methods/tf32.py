"""Weights for tensor cores that multiply in TF32: of a float they read the upper 19 bits, and cut off the others."""

from __future__ import annotations

import numpy as np

from escort.filter import FloatArray

#: What inputs lose on average that are cut off: half of the last bit, 2**-11 of a power of two, over mantissas from 1
#: to 2 whose logarithms are as likely, (1 - 1/2) / ln 2. It is always a loss: 2 % and more in a network of 50 layers.
_CUT_OFF = 2.0**-11 * 0.5 / np.log(2.0)


def stored(weights: FloatArray, *, cuts_inputs: bool) -> FloatArray:
    """Weights rounded to the nearest number of TF32, a tie to the even one; infinite where one is too large.

    Args:
        cuts_inputs: they meet inputs that are cut off instead of rounded. Then they are larger by what inputs lose on
            average, but for those that TF32 holds: all of the same few would be rounded in the same direction.
    """
    bits = weights.view(np.uint32)
    if cuts_inputs:
        enlarged = (weights * np.float32(1.0 + _CUT_OFF)).view(np.uint32)
        bits = np.where(bits & np.uint32(0x1FFF), enlarged, bits)
    return (bits + np.uint32(0xFFF) + (bits >> 13 & 1) & ~np.uint32(0x1FFF)).view(np.float32)
