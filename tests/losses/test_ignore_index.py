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
from tests.slices import OF_LABELS, is_upsampled, one_of_each, with_more
from tritonloss._core.example import Example

MORE: dict[str, Any] = {
    "cross_entropy": {"plain": {}},
    "focal_loss": {"mean": {}},
    "rmi_loss": {"no pooling": {"options": {"region_size": 1, "pooling": None}}},
}
# A loss of one channel has no class 255.
OF_CLASSES = {n: e for n, e in OF_LABELS.items() if not e.binary}
WAYS = with_more({n: e for n, e in OF_CLASSES.items() if not is_upsampled(e)}, MORE)
RELEASED = {"module": tritonloss.RMILoss.released}
MODULES = with_more(
    one_of_each(OF_CLASSES.values()),
    {**MORE, "rmi_loss": {**MORE["rmi_loss"], "released": RELEASED}},
)
REFUSED = r"^ignore_index must be given for 300 classes, of which its default is one: 255 .*None"


@pytest.fixture(params=WAYS)
def loss(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    way = WAYS[request.param]

    def only_result(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        (result,) = way(logits, target, **options)
        return result

    return only_result


@pytest.fixture(params=MODULES)
def way(request: pytest.FixtureRequest) -> Example:
    return MODULES[request.param]


def made(way: Example, classes: int = 3, **options: Any) -> nn.Module:
    """The way's module; if it takes more than options, that is made for so many classes."""
    assert way.module is not None
    return way.module(*way.arguments(*case(classes))[2:], **way.options, **options)


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


def test_modules_keep_their_default(way: Example) -> None:
    saved = io.BytesIO()
    torch.save(made(way), saved)
    saved.seek(0)
    logits, target = case(300)
    criteria = [made(way), copy.deepcopy(made(way)), pickle.loads(pickle.dumps(made(way)))]
    criteria.append(torch.load(saved, weights_only=False))
    # Offsets are pairs of tables of the classes.
    extras = way.arguments(logits, target)[2:]
    knows_its_classes = any(isinstance(extra, tuple) for extra in extras)
    for criterion in criteria:
        assert criterion.ignore_index == 255
        assert "ignore_index=255" in repr(criterion)
        if not knows_its_classes:
            with pytest.raises(ValueError, match=REFUSED):
                criterion(logits, target)
    if knows_its_classes:
        with pytest.raises(ValueError, match=REFUSED):
            made(way, 300)


def test_modules_keep_what_is_given(way: Example) -> None:
    logits, target = (x.repeat_interleave(4, -1).repeat_interleave(4, -2) for x in case(300))
    for ignore_index in (255, None):
        criterion = pickle.loads(pickle.dumps(made(way, 300, ignore_index=ignore_index)))
        with tritonloss.use_backend("reference"):
            assert criterion(logits, target).isfinite().all()


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
    taking: list[Any] = [way.function for way in WAYS.values()]
    taking += [way.module for way in MODULES.values()]
    for function in (*taking, tritonloss.count_labels):
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
        with pytest.raises(Exception, match="ignore_index must be given|Observed exception"):
            compiled(*case(256))
        # A label that is given is tested with few classes: 256 take long in the interpreter.
        target = torch.full_like(target, 2)
        assert (compiled(logits, target, ignore_index=2) == 0).all()
        assert (compiled(logits, target, ignore_index=None) != 0).any()


@pytest.mark.parametrize("name", [name for name in MODULES if "released" not in name])
def test_compiled_and_exported_modules(name: str) -> None:
    torch._dynamo.reset()
    criterion = made(MODULES[name])
    logits, target = case(3)
    with tritonloss.use_backend("triton"):
        expected = criterion(logits, target)
        compiled = torch.compile(criterion, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(logits, target), expected)
        for strict in (False, True):
            exported = torch.export.export(criterion, (logits, target), strict=strict)
            torch.testing.assert_close(exported.module()(logits, target), expected)
