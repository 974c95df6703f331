"""What every test stands on: the interpreter where no GPU is, and no unwritten element unseen."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    # Triton replaces its own library's functions at import: after that the setting does nothing.
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU; none is here"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def small_programs() -> Iterator[None]:
    """Programs of 64 columns and 4 rows, so that a small image needs several of them."""
    from tritonloss._tuning import forced

    operators = (
        "gaussian_statistics_forward",
        "gaussian_statistics_backward",
        "structural_similarity_forward",
        "structural_similarity_backward",
        "structural_similarity_stored",
        "ssim_forward",
        "ssim_coefficients",
        "ssim_backward",
    )
    with ExitStack() as stack:
        for operator in operators:
            stack.enter_context(
                forced(operator, {"COLUMNS": 2, "LANES": 32, "ROWS": 4, "num_warps": 1})
            )
        yield


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that the package allocates holds NaN (or -77) until a kernel writes it."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    yield


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller == "tritonloss" or caller.startswith("tritonloss."):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -77)
        return tensor

    return allocate_poisoned
