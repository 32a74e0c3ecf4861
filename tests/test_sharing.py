"""Tensors that the runners of a filter share."""

from __future__ import annotations

import torch

from escort.methods.sharing import shared


class Owner:
    pass


def test_a_tensor_is_made_once_as_long_as_somebody_has_it() -> None:
    owner, made = Owner(), []

    def make() -> tuple[torch.Tensor, int]:
        made.append(len(made))
        return torch.zeros(3), made[-1]

    first, known = shared(owner, "key", make)
    again, same = shared(owner, "key", make)
    assert again is first and (known, same) == (0, 0)
    assert shared(owner, "another key", make)[1] == 1 and shared(Owner(), "key", make)[1] == 2
    del first, again
    assert shared(owner, "key", make)[1] == 3
