"""Where a parameter lies in the flat vector, and in which role."""

from __future__ import annotations

import torch
from rounds import SHAPES

import lgc


def test_a_small_tensor_whose_last_role_is_that_of_the_others_is_in_the_pool_again() -> None:
    shapes = [(name, torch.zeros(shape)) for name, shape in SHAPES.items()]
    plain = lgc.LGCRing(rate=0.05).layout(shapes)
    overridden = lgc.LGCRing(rate=0.05, roles={"*.bias": lgc.Role.SHARED, "*s": lgc.Role.OWN}).layout(shapes)
    assert overridden.own == plain.own
