"""Distinct kernels over images of any size: each costs seconds at the first image that needs it."""

from __future__ import annotations

import pytest

from perf.measuring import kernels, launches
from perf.operations.contract import operations

pytestmark = pytest.mark.compile_only

# Kernels of a loss in one pass, all together.
MOST = 6
# From thumbnails on, those of one loss are more.
EXCEPTIONS = {
    # One of a kind each: four for most images, three in float64 for the smallest.
    ("rmi_loss", "forward"): 7,
}
RANGES = (kernels.PHOTOGRAPHS, kernels.THUMBNAILS_AND_LARGER)
WAYS = [(layout, sizes) for layout in kernels.LAYOUTS for sizes in RANGES]
Counted = tuple[kernels.Range, dict[str, kernels.Distinct]]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            (layout, sizes),
            id=f"{layout}, {sizes[0]} and more",
            marks=() if sizes == kernels.PHOTOGRAPHS else pytest.mark.thorough,
        )
        for layout, sizes in WAYS
    ],
)
def counted(request: pytest.FixtureRequest) -> Counted:
    layout, sizes = request.param
    return sizes, kernels.collect(layout, sizes)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", [op.name for op in operations() if launches.has_images(op)])
def test_images_of_any_size_share_their_kernels(
    name: str, direction: str, counted: Counted
) -> None:
    sizes, distinct = counted
    if direction == "backward" and not operations([name])[0].differentiable:
        assert kernels.of_pass(distinct[name], direction) == 0
        return
    most = MOST if sizes == kernels.PHOTOGRAPHS else EXCEPTIONS.get((name, direction), MOST)
    assert 1 <= kernels.of_pass(distinct[name], direction) <= most, distinct[name]
