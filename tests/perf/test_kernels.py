"""Distinct kernels over images of any size: each costs seconds at the first image that needs it."""

from __future__ import annotations

import pytest

from perf.measuring import kernels, launches
from perf.operations.contract import operations

pytestmark = pytest.mark.compile_only

MOST = 6


@pytest.fixture(scope="module", params=kernels.LAYOUTS)
def counted(request: pytest.FixtureRequest) -> dict[str, kernels.Distinct]:
    return kernels.collect(request.param)


@pytest.mark.parametrize("name", [op.name for op in operations() if launches.has_images(op)])
def test_images_of_any_size_share_their_kernels(
    name: str, counted: dict[str, kernels.Distinct]
) -> None:
    assert any(kernel.startswith("forward") for kernel in counted[name])
    backward = any(kernel.startswith("backward") for kernel in counted[name])
    assert backward == operations([name])[0].differentiable
    assert max(counted[name].values()) <= MOST, counted[name]
