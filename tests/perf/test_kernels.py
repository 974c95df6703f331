"""Distinct kernels over images of any size: each costs seconds at the first image that needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from perf.compiling.compile_only import compilers
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


Count = Callable[..., kernels.Distinct]


@pytest.fixture(scope="module")
def count() -> Iterator[Count]:
    """Counts an operation's distinct kernels, in one process for all tests, each way once."""
    found: dict[str, kernels.Distinct] = {}

    def counted(name: str, layout: str, sizes: kernels.Range, **changes: Any) -> kernels.Distinct:
        key = str((name, layout, sizes, changes))
        if key not in found:
            work = pool.submit(kernels.count, layout, sizes, [name], changes)
            found[key] = work.result()[name]
        return found[key]

    with compilers(workers=1) as pool:
        yield counted


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", [op.name for op in operations() if launches.has_images(op)])
@pytest.mark.parametrize("way", WAYS)
def test_images_of_any_size_share_their_kernels(
    way: tuple[str, kernels.Range, str], name: str, direction: str, count: Count
) -> None:
    layout, sizes, dtype = way
    counted = count(name, layout, sizes, dtype=dtype)
    if direction == "backward" and not operations([name])[0].differentiable:
        assert kernels.of_pass(counted, direction) == 0
        return
    assert 1 <= kernels.of_pass(counted, direction) <= MOST, counted


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
def test_small_and_large_images_share_kernels_of_rmi(
    options: dict[str, Any], layout: str, count: Count
) -> None:
    """Small images have other kernels than large ones, all but the last of the forward pass."""
    counted = count("rmi_loss", layout, kernels.ANY_SIZE, options=options)
    for direction in ("forward", "backward"):
        assert 1 <= kernels.of_pass(counted, direction) <= MOST, counted
