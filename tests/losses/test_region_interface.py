"""Region mutual information as a function and a module: autograd, compile, memory, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

import tritonloss
from tests.losses.region_ways import DIRECT, RAW, SMALL, WAYS, kernel_gradient
from tests.oracle import segmentation_case
from tritonloss._tools.launches import recorded
from tritonloss.functional import rmi_loss
from tritonloss.regions import plan
from tritonloss.regions.backward import backward_pass
from tritonloss.regions.forward import forward_pass
from tritonloss.regions.plan import Options
from tritonloss.regions.region_mutual_information import RMI


@pytest.fixture(autouse=True)
def kernels_of_large_images() -> Iterator[None]:
    """The small images of these tests take the kernels of large ones.

    tests/losses/test_region_digits.py is about those of small ones.
    """
    with plan.kernels_of_large_images():
        yield


@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        {**SMALL, "pooling": "max"},
        {**SMALL, "pooling": "nearest"},
        {**SMALL, "ignore": "drop"},
        DIRECT,
        RAW,
    ],
)
def test_gradcheck(options: dict[str, Any], device: torch.device) -> None:
    logits, target = segmentation_case((1, 1, 8, 8), dtype=torch.float64, device=device)
    with tritonloss.use_backend("triton"):
        assert torch.autograd.gradcheck(
            lambda z: rmi_loss(z, target, epsilon=1e-2, **options),
            logits.requires_grad_(),
            fast_mode=True,
        )


@WAYS
def test_backward_twice_and_logits_reused(options: dict[str, Any], device: torch.device) -> None:
    x, target = segmentation_case((1, 1, 7, 8), device=device)
    x.requires_grad_()
    with tritonloss.use_backend("triton"):
        loss = rmi_loss(x, target, **options)
    total = loss + x.softmax(1).square().mean()
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    (second,) = torch.autograd.grad(2 * total, x)
    torch.testing.assert_close(second, 2 * first, rtol=1e-5, atol=1e-8)


@WAYS
def test_no_gradient_wanted(options: dict[str, Any], device: torch.device) -> None:
    logits, target = segmentation_case((1, 1, 7, 8), device=device)
    expected, _ = kernel_gradient(logits, target, **options)
    with tritonloss.use_backend("triton"):
        for grad_mode in (torch.inference_mode(), torch.enable_grad()):
            with grad_mode:
                loss = rmi_loss(logits, target, **options)
                assert torch.equal(loss, expected) and not loss.requires_grad


@WAYS
def test_inputs_are_left_alone_and_bits_the_same(
    options: dict[str, Any], device: torch.device
) -> None:
    logits, target = segmentation_case((1, 1, 7, 8), device=device)
    before, labels = logits.clone(), target.clone()
    first, second = (kernel_gradient(logits, target, **options) for _ in range(2))
    assert torch.equal(logits, before) and torch.equal(target, labels)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled(backend: str, device: torch.device) -> None:
    logits, target = segmentation_case((1, 1, 7, 8), device=device)
    expected = kernel_gradient(logits, target, **SMALL)
    compiled = torch.compile(
        lambda z: rmi_loss(z, target, **SMALL), fullgraph=True, backend=backend
    )
    leaf = logits.clone().requires_grad_()
    with tritonloss.use_backend("triton"):
        loss = compiled(leaf)
    loss.backward()
    assert torch.equal(loss, expected[0]) and torch.equal(leaf.grad, expected[1])


@WAYS
def test_operators(options: dict[str, Any], device: torch.device) -> None:
    logits, target = segmentation_case((1, 1, 7, 8), device=device)
    defaults = Options(3, "avg", 4, "mean", 1e-6, 0.5, "zero", 255, None)
    arguments = (logits.requires_grad_(), target, *defaults._replace(**options))
    torch.library.opcheck(
        RMI.forward,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_autocast(device: torch.device) -> None:
    logits, target = segmentation_case((1, 1, 7, 8), dtype=torch.bfloat16, device=device)
    expected, _ = kernel_gradient(logits, target, **SMALL)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss, gradient = kernel_gradient(logits, target, **SMALL)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert gradient.dtype == torch.bfloat16


def test_functional_call(device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 8, 9), device=device)
    module = tritonloss.RMILoss(**SMALL)
    assert torch.equal(
        torch.func.functional_call(module, {}, (logits, target)), module(logits, target)
    )


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        ({}, 4, 5),
        ({"pooling": None}, 3, 3),
        ({"pooling": "nearest"}, 4, 5),
        ({"ignore": "drop"}, 4, 3),
        ({"small": True}, 3, 2),
    ],
)
def test_launches(
    options: dict[str, Any], forward: int, backward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A usual call has nine, two of which make the gradient to the logits.

    The pooled gradients of most images wait where that of the last images goes: these come last.
    """
    assert launches_of(options, monkeypatch) == (forward, backward)


@pytest.mark.parametrize("region_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("pooling", ["avg", "max", "nearest", None])
def test_nine_launches_at_most(
    pooling: str | None, region_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit holds whatever the options."""
    for precision in (None, "float64", "float32"):
        for moments in ("mean", "sum"):
            for ignore in ("zero", "drop"):
                options = {
                    "region_size": region_size,
                    "pooling": pooling,
                    "precision": precision,
                    "moments": moments,
                    "ignore": ignore,
                }
                assert sum(launches_of(options, monkeypatch)) <= 9


def launches_of(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """How many kernels the forward and the backward pass launch, with nothing run."""
    logits = torch.empty((2, 3, 64, 80), device="meta")
    target = torch.empty((2, 64, 80), dtype=torch.uint8, device="meta")
    chosen = Options(3, "avg", 4, "mean", 1e-6, 0.5, "zero", 255, None)._replace(**options)
    launched: list[Any] = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *_, **__: launched.append(self))
    with recorded("skip"):
        loss, _, saved = forward_pass(chosen, logits, target)
        forward = len(launched)
        backward_pass(chosen, loss, logits, target, saved)
    return forward, len(launched) - forward


def test_room_for_the_pooled_gradient(device: torch.device) -> None:
    """Most images' pooled gradients wait where the last images' gradient goes: nothing changes."""
    logits, target = segmentation_case((3, 2, 8, 9), device=device)
    options = {"region_size": 1, "bce_weight": 0.0}
    for dtype in (torch.float32, torch.float16):
        cast = logits.to(dtype)
        _, together = kernel_gradient(cast, target, **options)
        for image in (0, 2):
            part = slice(image, image + 1)
            _, alone = kernel_gradient(cast[part], target[part], **options)
            allowed = {"rtol": 1e-3, "atol": 1e-6} if dtype == torch.float16 else {}
            torch.testing.assert_close(3 * together[part], alone, **allowed)


def test_module(device: torch.device) -> None:
    logits, target = segmentation_case((1, 2, 16, 18), device=device)
    options = {
        "region_size": 2,
        "pooling": "max",
        "pool_size": 3,
        "moments": "sum",
        "epsilon": 1e-2,
        "bce_weight": 0.25,
        "ignore": "drop",
        "ignore_index": 1,
        "precision": "float64",
        "return_info": True,
    }
    module = tritonloss.RMILoss(**options)
    target = target.where(target != 255, 1)
    with tritonloss.use_backend("reference"):
        for ours, expected in zip(
            module(logits, target), rmi_loss(logits, target, **options), strict=True
        ):
            assert torch.equal(ours, expected)
    assert all(f"{name}={value!r}" in repr(module) for name, value in options.items())
    assert not list(module.parameters()) and not module.state_dict()
    released = tritonloss.RMILoss.released(ignore_index=None)
    assert (released.moments, released.epsilon, released.ignore_index) == ("sum", 5e-4, None)
    with pytest.raises(TypeError):
        tritonloss.RMILoss(5)


LOGITS = torch.zeros(2, 3, 12, 16)
TARGET = torch.zeros(2, 12, 16, dtype=torch.uint8)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("logits", "target", "options", "error", "message"),
    [
        (None, TARGET, {}, TypeError, "logits must be .*NoneType"),
        (LOGITS[0], TARGET, {}, ValueError, r"logits must be .*\(3, 12, 16\)"),
        (LOGITS, TARGET.float(), {}, TypeError, "target must hold .*float32"),
        (LOGITS, TARGET[:, None], {}, ValueError, r"target must hold .*\(2, 1, 12, 16\)"),
        (LOGITS, TARGET, {"region_size": 6}, ValueError, "region_size must be .*1 to 5; got 6"),
        (LOGITS, TARGET, {"region_size": 3.0}, TypeError, "region_size must be .*3.0"),
        (LOGITS, TARGET, {"pooling": "mean"}, ValueError, "pooling must be .* or None; got 'mean'"),
        (LOGITS, TARGET, {"pool_size": 0}, ValueError, "pool_size must be .*got 0"),
        (LOGITS, TARGET, {"pool_size": 9}, ValueError, "pool_size must be .*got 9"),
        (LOGITS, TARGET, {"moments": "average"}, ValueError, "moments must be .*'average'"),
        (LOGITS, TARGET, {"epsilon": 0.0}, ValueError, "epsilon must be .*got 0.0"),
        (LOGITS, TARGET, {"epsilon": "1"}, TypeError, "epsilon must be .*'1'"),
        (LOGITS, TARGET, {"bce_weight": 1.5}, ValueError, "bce_weight must be .*got 1.5"),
        (LOGITS, TARGET, {"ignore": "skip"}, ValueError, "ignore must be .*'skip'"),
        (LOGITS, TARGET, {"ignore_index": 1.0}, TypeError, "ignore_index must be .*1.0"),
        (LOGITS, TARGET, {"precision": "half"}, ValueError, "precision must be .*'half'"),
        (LOGITS, TARGET, {"return_info": 1}, TypeError, "return_info must be .*1"),
        (
            LOGITS,
            TARGET,
            {"region_size": 5},
            ValueError,
            "logits must be large enough .*region_size=5 .*height 12 .*pooled to 4 x 5",
        ),
        (LOGITS[..., :0], TARGET[..., :0], {}, ValueError, "logits must be large enough"),
        (LOGITS, TARGET + 7, {}, ValueError, r"target must hold .*7 \(384x\)"),
    ],
)
def test_errors(
    logits: Any,
    target: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    backend: Any,
) -> None:
    with tritonloss.use_backend(backend), pytest.raises(error, match=message):
        rmi_loss(logits, target, **options)


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError):
        rmi_loss(LOGITS, TARGET, 3)
