"""Small programs for the losses of overlap, and each of the losses in turn."""

from __future__ import annotations

import pytest

from tests.losses.overlap.cases import LOSSES, Loss, named


@pytest.fixture(autouse=True)
def programs_for_the_interpreter(small_runs: None) -> None:
    """Programs of 64 pixels and blocks of 4 classes."""


@pytest.fixture(params=LOSSES, ids=named)
def loss(request: pytest.FixtureRequest) -> Loss:
    return request.param
