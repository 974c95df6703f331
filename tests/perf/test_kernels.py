"""Distinct kernels over images of any size: each costs seconds at the first image that needs it."""

from __future__ import annotations

from typing import Any

import pytest

from perf.measuring import kernels, launches
from perf.operations.contract import operations

pytestmark = pytest.mark.compile_only

# Kernels of a loss in one pass, all together.
MOST = 6
# All sizes, and 16 bits, are in the rest of the tests.
WAYS = [
    pytest.param(
        (layout, sizes, dtype),
        id=f"{layout}, {sizes[0]} and more, {dtype}",
        marks=() if (sizes, dtype) == (kernels.PHOTOGRAPHS, "float32") else pytest.mark.thorough,
    )
    for layout in kernels.LAYOUTS
    for sizes in (kernels.PHOTOGRAPHS, kernels.ANY_SIZE)
    for dtype in ("float32", "bfloat16")
]


@pytest.fixture(scope="module", params=WAYS)
def counted(request: pytest.FixtureRequest) -> dict[str, kernels.Distinct]:
    layout, sizes, dtype = request.param
    return kernels.collect(layout, sizes, changes={"dtype": dtype})


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", [op.name for op in operations() if launches.has_images(op)])
def test_images_of_any_size_share_their_kernels(
    name: str, direction: str, counted: dict[str, kernels.Distinct]
) -> None:
    if direction == "backward" and not operations([name])[0].differentiable:
        assert kernels.of_pass(counted[name], direction) == 0
        return
    assert 1 <= kernels.of_pass(counted[name], direction) <= MOST, counted[name]


@pytest.mark.parametrize("layout", ["crops", "channels_last"])
@pytest.mark.parametrize(
    "options",
    [
        {"pooling": None},
        {"pooling": None, "precision": "float32"},
        {"pooling": None, "ignore": "drop"},
        {"pooling": "nearest"},
        {"pooling": "max", "ignore": "drop"},
        {"precision": "float32"},
    ],
    ids=str,
)
def test_small_and_large_images_share_kernels_of_rmi(options: dict[str, Any], layout: str) -> None:
    """Small images have other kernels than large ones, all but the last of the forward pass."""
    counted = kernels.collect(layout, kernels.ANY_SIZE, ["rmi_loss"], {"options": options})
    for direction in ("forward", "backward"):
        assert 1 <= kernels.of_pass(counted["rmi_loss"], direction) <= MOST, counted
