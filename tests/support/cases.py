"""Which cells of a grid are in the suite; `make test-all` has them all."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cases(argument: str, values: Iterable[Any], *, in_suite: Collection[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by all of these values; those that are not in the suite are marked as exhaustive."""
    return pytest.mark.parametrize(
        argument, [pytest.param(value, marks=() if value in in_suite else pytest.mark.exhaustive) for value in values]
    )
