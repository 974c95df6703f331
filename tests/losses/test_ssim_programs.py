"""How SSIM cuts planes into programs, and how many planes' coefficients the scratch holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from perf.operations.contract import SHAPES, Shape
from tritonloss._engine import strip_launch
from tritonloss.windows import ssim_launch
from tritonloss.windows.ssim_launch import AT_A_TIME, ENOUGH
from tritonloss.windows.ssim_options import ImageOptions, LossOptions

LOSS = LossOptions(full=True, window_size=11, sigma=1.5, c1=1e-4, c2=9e-4, ignore_index=255)
VALID = ImageOptions(window_size=11, sigma=1.5, data_range=1.0, padding="valid", mapped=False)
REFLECT = VALID._replace(padding="reflect")


def forward_plan(shape: Shape, options: Any = LOSS) -> dict[str, Any]:
    """The arguments of the launch."""
    x, y = maps(shape, options)
    result = ssim_launch.empty_results(x, options).result
    return ssim_launch._forward_plan(x, y, result, options).launch._arguments


def backward_plan(shape: Shape, options: Any = LOSS) -> tuple[dict[str, Any], int]:
    """The arguments of the launch, and the elements of the scratch."""
    x, y = maps(shape, options)
    gradients = ssim_launch.empty_gradients(x, y, both=y.dim() == 4)
    grad = torch.empty((), device=x.device)
    plan = ssim_launch._backward_plan((grad, x, y, *gradients), options)
    assert plan.launch is not None
    return plan.launch._arguments, math.prod(plan.scratch)


def maps(shape: Shape, options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.empty(shape.size, device="meta")
    if isinstance(options, ImageOptions):
        return x, torch.empty_like(x)
    return x, torch.empty((shape.batch, *shape.size[2:]), dtype=torch.uint8, device="meta")


def test_programs_fit_the_width() -> None:
    """Of 129 lanes two programs of 128 would leave half of them idle."""
    forward, (backward, _) = forward_plan(SHAPES["voc"]), backward_plan(SHAPES["voc"])
    for strip in (forward["STRIP"], backward["OUT_STRIP"], backward["STRIP"]):
        assert strip.lanes == 32
    assert forward["tiles_x"] == backward["out_tiles_x"] == backward["tiles_x"] == 5
    assert forward["num_warps"] == backward["num_warps"] == 1


@pytest.mark.parametrize("name", SHAPES)
def test_launches_keep_a_gpu_busy(name: str) -> None:
    """About two rounds of programs, of four warps or four times as many of one."""
    forward, (backward, _) = forward_plan(SHAPES[name]), backward_plan(SHAPES[name])
    for launch in (forward, backward):
        assert launch["programs"] * launch["num_warps"] >= ENOUGH * 4
    # What a unit's gradients wait for has been taken so many tiles before.
    between = backward["lag"] * (backward["out_tiles"] + backward["tiles"])
    assert between * backward["num_warps"] >= AT_A_TIME * 4 or backward["ring"] == backward["units"]


@pytest.mark.parametrize("options", [LOSS, VALID, REFLECT], ids=["loss", "valid", "reflect"])
@pytest.mark.parametrize("width", [513, 600, 640, 1030])
def test_fitted_programs_take_no_more_scratch(
    width: int, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape("some", 16, 21, 500, width)
    launch, fitted = backward_plan(shape, options)
    monkeypatch.setattr(strip_launch, "_fitted", lambda *_: (128, 4))
    unfitted, scratch = backward_plan(shape, options)
    assert launch["STRIP"].lanes == launch["OUT_STRIP"].lanes == 32 * launch["num_warps"]
    assert launch["num_warps"] < unfitted["num_warps"] == 4
    assert fitted <= scratch


@pytest.mark.parametrize("options", [LOSS, VALID, REFLECT], ids=["loss", "valid", "reflect"])
@pytest.mark.parametrize("name", SHAPES)
def test_programs_of_one_wave_go_backward_on_amd(
    name: str, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release waits for the stores of its own wave only: see _count_one."""
    for module in (strip_launch, ssim_launch):
        monkeypatch.setattr(module, "warp_size", lambda: 64)
    launch, _ = backward_plan(SHAPES[name], options)
    assert launch["num_warps"] == 1
    assert launch["STRIP"].lanes == launch["OUT_STRIP"].lanes == 64
