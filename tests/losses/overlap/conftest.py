"""Small programs for the losses of overlap, and each of the losses in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.losses.overlap.cases import LOSSES, Loss, named
from tests.slices import operators_with
from tritonloss._core import configurations


@pytest.fixture(autouse=True)
def small_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Programs of 64 pixels and blocks of 4 classes, unless a test wants what ships."""
    size = {"PIXELS": 64, "CLASS_LANES": 4, "UNROLL": 4, "num_warps": 1}
    if request.node.get_closest_marker("shipped_sizes"):
        size = {}
    with ExitStack() as stack:
        for operator in operators_with("PIXELS"):
            stack.enter_context(configurations.forced(operator, size))
        yield


@pytest.fixture(params=LOSSES, ids=named)
def loss(request: pytest.FixtureRequest) -> Loss:
    return request.param
