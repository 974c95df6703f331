"""Small programs for the pixelwise losses, and each of the losses in turn."""

from __future__ import annotations

import pytest

from tests.losses.pixelwise.cases import LOSSES, Loss, named
from tests.losses.pixelwise.margins import VARIANTS


@pytest.fixture(autouse=True)
def programs_for_the_interpreter(small_runs: None) -> None:
    """Programs of 64 pixels and blocks of 4 classes."""


@pytest.fixture(params=LOSSES, ids=named)
def loss(request: pytest.FixtureRequest) -> Loss:
    return request.param


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param
