"""Weights for tensor cores that multiply in TF32."""

import numpy as np
import pytest

from escort.methods import tf32


def cut_off(x: np.ndarray) -> np.ndarray:
    """Floats as tensor cores read them."""
    return (x.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32)


@pytest.mark.parametrize("spread", ["normal", "lognormal"])
def test_products_of_inputs_that_are_cut_off_lose_nothing_on_average(spread: str) -> None:
    random = np.random.default_rng(0)
    x, weights = (getattr(random, spread)(size=1_000_000).astype(np.float32) for _ in range(2))
    exact = x.astype(np.float64) * weights

    def lost(cuts_inputs: bool) -> float:
        products = cut_off(x).astype(np.float64) * tf32.stored(weights, cuts_inputs=cuts_inputs)
        return 1.0 - float(np.abs(products).sum() / np.abs(exact).sum())

    assert lost(False) > 3e-4 and abs(lost(True)) < 2e-5


def test_weights_are_rounded_to_the_nearest() -> None:
    """A tie to the even one; what is a number of TF32 stays what it is, though inputs are cut off."""
    step = 2.0**-10
    weights = np.array([1.0, 1.0 + step / 2, 1.0 + 511 * step, 1.0 + 0.4 * step, -2.0, 3.4028e38], np.float32)
    assert tf32.stored(weights, cuts_inputs=False).tolist() == [1.0, 1.0, 1.0 + 511 * step, 1.0, -2.0, np.inf]
    assert tf32.stored(weights[[0, 2, 4]], cuts_inputs=True).tolist() == weights[[0, 2, 4]].tolist()
