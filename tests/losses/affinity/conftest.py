"""Small programs, so that even small images take several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tritonloss._core.configurations import forced


@pytest.fixture(autouse=True)
def programs_for_the_interpreter(request: pytest.FixtureRequest) -> Iterator[None]:
    """Programs of 8 columns and 2 rows, unless a test wants what ships."""
    with ExitStack() as stack:
        if not request.node.get_closest_marker("shipped_sizes"):
            for direction in ("forward", "backward"):
                size = {"LANES": 8, "ROWS": 2, "num_warps": 1}
                stack.enter_context(forced(f"affinity_field_{direction}", size))
        yield
