"""Small tiles, so that a few dozen anchors and keys need several programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tritonloss._core.configurations import forced
from tritonloss.contrast.tile_launch import PASSES

SMALL = {"ANCHORS": 16, "KEYS": 16, "DEPTH": 16, "WIDTH": 32, "num_warps": 1, "num_stages": 1}
WHOLE = {**SMALL, "DEPTH": 512, "WIDTH": 512}


@pytest.fixture(autouse=True, params=["slices", "whole"])
def small_tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiles of 16 anchors and keys, with 16 dimensions at once or all of them."""
    if request.node.get_closest_marker("shipped_sizes"):
        yield
        return
    with ExitStack() as stack:
        for which in PASSES:
            size = SMALL if request.param == "slices" else WHOLE
            stack.enter_context(forced(f"pixel_contrast_{which}", size))
        yield
