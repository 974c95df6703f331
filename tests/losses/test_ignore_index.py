"""The default ignore label, 255: one of the classes as soon as there are 256."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonloss
from tritonloss import functional

Made = Callable[..., nn.Module]


def _margin_loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    offset = torch.ones(logits.size(1), device=logits.device)
    return functional.margin_calibrated_loss(logits, target, (offset, offset), **options)


def _margin_module(classes: int = 3, **options: Any) -> nn.Module:
    return tritonloss.MarginCalibratedLoss((torch.ones(classes), torch.ones(classes)), **options)


def _window_loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    return functional.ssim_loss(logits, target, window_size=3, **options)


def _region_loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    return functional.rmi_loss(logits, target, region_size=1, pooling=None, **options)


LOSSES = {
    "structural_similarity_loss": functional.structural_similarity_loss,
    "ssim_loss": _window_loss,
    "rmi_loss": _region_loss,
    "cross_entropy": functional.cross_entropy,
    "binary_cross_entropy": functional.binary_cross_entropy,
    "focal_loss": functional.focal_loss,
    "margin_calibrated_loss": _margin_loss,
}
MODULES: dict[str, Made] = {
    "StructuralSimilarityLoss": tritonloss.StructuralSimilarityLoss,
    "SSIMLoss": lambda **options: tritonloss.SSIMLoss(window_size=3, **options),
    "RMILoss": lambda **options: tritonloss.RMILoss(region_size=1, pooling=None, **options),
    "RMILoss.released": tritonloss.RMILoss.released,
    "CrossEntropyLoss": tritonloss.CrossEntropyLoss,
    "BinaryCrossEntropyLoss": tritonloss.BinaryCrossEntropyLoss,
    "FocalLoss": tritonloss.FocalLoss,
    "MarginCalibratedLoss": _margin_module,
}
REFUSED = r"^ignore_index must be given for 300 classes, of which its default is one: 255 .*None"


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return LOSSES[request.param]


@pytest.fixture(params=MODULES)
def made(request: pytest.FixtureRequest) -> Made:
    return MODULES[request.param]


def case(classes: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, classes, 2, 2, generator=generator)
    target = torch.tensor([[[0, 1], [254, 255]]]).clamp(max=classes - 1)
    return logits.to(device), target.to(device)


def test_the_default_is_no_answer_for_256_classes(
    loss: Callable[..., Tensor], device: torch.device
) -> None:
    for classes in (256, 300):
        logits, target = case(classes, device)
        with pytest.raises(ValueError, match=f"^ignore_index must be given for {classes} "):
            loss(logits, target)


def test_whatever_is_given_holds(loss: Callable[..., Tensor], device: torch.device) -> None:
    """255 given ignores class 255, None and others do not; with 255 classes nothing has changed."""
    with tritonloss.use_backend("reference"):
        logits, target = case(256, device)
        elsewhere = logits.clone()
        elsewhere[..., 1, 1] = 3.0
        for ignore_index in (255, int("255")):
            first = loss(logits, target, ignore_index=ignore_index)
            second = loss(elsewhere, target, ignore_index=ignore_index)
            assert torch.equal(first, second)
        for ignore_index in (None, -100, 7):
            first = loss(logits, target, ignore_index=ignore_index)
            second = loss(elsewhere, target, ignore_index=ignore_index)
            assert not torch.equal(first, second)
        logits, target = case(255, device)
        assert torch.equal(loss(logits, target), loss(logits, target, ignore_index=255))


def test_modules_keep_their_default(made: Made) -> None:
    saved = io.BytesIO()
    torch.save(made(), saved)
    saved.seek(0)
    logits, target = case(300)
    criteria = [made(), copy.deepcopy(made()), pickle.loads(pickle.dumps(made()))]
    criteria.append(torch.load(saved, weights_only=False))
    for criterion in criteria:
        assert criterion.ignore_index == 255
        assert "ignore_index=255" in repr(criterion)
        if not isinstance(criterion, tritonloss.MarginCalibratedLoss):
            with pytest.raises(ValueError, match=REFUSED):
                criterion(logits, target)


def test_modules_keep_what_is_given(made: Made) -> None:
    logits, target = (x.repeat_interleave(4, -1).repeat_interleave(4, -2) for x in case(300))
    options = {"classes": 300} if made is _margin_module else {}
    for ignore_index in (255, None):
        criterion = pickle.loads(pickle.dumps(made(ignore_index=ignore_index, **options)))
        with tritonloss.use_backend("reference"):
            assert criterion(logits, target).isfinite()


def test_margins_of_256_classes_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=REFUSED):
        _margin_module(300)


def test_counts_of_256_classes() -> None:
    labels = torch.full((2, 3), 255)
    assert tritonloss.count_labels(labels, 255).sum() == 0
    for classes in (256, 300):
        with pytest.raises(ValueError, match=f"^ignore_index must be given for {classes} "):
            tritonloss.count_labels(labels, classes)
        with pytest.raises(ValueError, match="^ignore_index must be given"):
            tritonloss.count_labels([labels], classes)
        assert tritonloss.count_labels(labels, classes, ignore_index=255).sum() == 0
        assert tritonloss.count_labels(labels, classes, ignore_index=None)[255] == 6


def test_the_default_reads_as_255() -> None:
    taking = [getattr(functional, name) for name in LOSSES]
    taking += [tritonloss.count_labels, tritonloss.RMILoss.released, tritonloss.RMILoss]
    for function in taking:
        parameter = inspect.signature(function).parameters["ignore_index"]
        assert parameter.default == 255 and isinstance(parameter.default, int)
        assert str(parameter).endswith("ignore_index: 'int | None' = 255")
        assert f"{parameter.default}" == str(parameter.default) == "255"


@pytest.mark.parametrize(
    ("backend", "dynamic"), [("triton", False), ("triton", True), ("reference", False)]
)
def test_compiled_functions(loss: Callable[..., Tensor], backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager", dynamic=dynamic)
    with tritonloss.use_backend(backend):
        logits, target = case(3)
        torch.testing.assert_close(compiled(logits, target), loss(logits, target))
        logits, target = (x[..., 1:, 1:] for x in case(256))
        with pytest.raises(Exception, match="ignore_index must be given|Observed exception"):
            compiled(logits, target)
        # Few classes and what was given: 256 classes take long in the interpreter.
        logits, target = (x[..., 1:, 1:] for x in case(3))
        assert compiled(logits, target, ignore_index=2) == 0
        assert compiled(logits, target, ignore_index=None) != 0


@pytest.mark.parametrize("name", [name for name in MODULES if name != "RMILoss.released"])
def test_compiled_and_exported_modules(name: str) -> None:
    torch._dynamo.reset()
    criterion = MODULES[name]()
    logits, target = case(3)
    with tritonloss.use_backend("triton"):
        expected = criterion(logits, target)
        compiled = torch.compile(criterion, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(logits, target), expected)
        for strict in (False, True):
            exported = torch.export.export(criterion, (logits, target), strict=strict)
            torch.testing.assert_close(exported.module()(logits, target), expected)
