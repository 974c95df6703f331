"""What every slice's examples must satisfy: names and defaults agree, operators are sound."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels_reference
import tritonloss
from tests.oracle import segmentation_case
from tritonloss import functional
from tritonloss._core.example import Example
from tritonloss._core.operator import Operator
from tritonloss._tools.examples import examples
from tritonloss._tools.tuning_cases import tuning_cases

EXAMPLES = examples()
MODULES = {example.module.__name__: example for example in EXAMPLES if example.module}


def keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults of the keyword-only parameters."""
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.kind is inspect.Parameter.KEYWORD_ONLY}


def reference_of(example: Example) -> Callable[..., Any]:
    name = example.function.__name__
    return getattr(kernels_reference, name, None) or getattr(kernels_reference.linalg, name)


def test_names_are_distinct_and_cover_the_public_functions() -> None:
    names = [example.name for example in EXAMPLES]
    assert len(set(names)) == len(names)
    shown = {example.function for example in EXAMPLES}
    public = {getattr(functional, name) for name in functional.__all__}
    public |= {getattr(tritonloss.linalg, name) for name in tritonloss.linalg.__all__}
    assert shown == public | {tritonloss.gaussian_statistics}
    modules = {name for name in tritonloss.__all__ if name.endswith("Loss")}
    assert set(MODULES) == modules


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_function_options_and_reference_agree_on_names_and_defaults(example: Example) -> None:
    given = keywords(example.function)
    options = example.operator.options
    defaults = {} if options is None else options._field_defaults
    assert {name: given[name] for name in defaults if name in given} == {
        name: default for name, default in defaults.items() if name in given
    }
    if options is not None:
        assert given.keys() & set(options._fields), example.name
    assert keywords(reference_of(example)) == given


@pytest.mark.parametrize("example", MODULES.values(), ids=lambda example: example.module.__name__)
def test_a_module_takes_what_its_function_takes(example: Example) -> None:
    assert example.module is not None
    of_function = list(inspect.signature(example.function).parameters.values())[2:]
    assert list(inspect.signature(example.module).parameters.values()) == of_function

    logits, target = segmentation_case((1, 3, 9, 12))
    extra = example.arguments(logits, target)[2:]
    module = example.module(*extra, **example.options)
    expected = example(logits, target)[0]
    for made in (module, pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(made(logits, target), expected)
        assert repr(made) == repr(module)
    for name, default in keywords(example.function).items():
        if not isinstance(default, torch.Tensor) and default is not None:
            assert f"{name}={example.options.get(name, default)!r}" in repr(module)


def test_every_configuration_of_an_example_can_be_tuned() -> None:
    """The tuner knows what examples launch: by the names under which configurations are kept."""
    known = {case.operator.rpartition("_")[0] for case in tuning_cases()}
    for example in EXAMPLES:
        stem = example.operator.name.split("_")[0]
        assert any(name.startswith(stem) or stem in name for name in known), example.name


@pytest.mark.parity
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_the_custom_operators_are_sound(
    example: Example, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.library.opcheck of the forward operator, with the arguments of the call."""
    calls: list[tuple[Any, ...]] = []
    call = Operator.__call__

    def recorded(operator: Operator, *tensors: Tensor | None, options: Any = ()) -> Any:
        calls.append((*tensors, *((True,) if operator._saves else ()), *options))
        return call(operator, *tensors, options=options)

    monkeypatch.setattr(Operator, "__call__", recorded)
    logits, target = segmentation_case((1, 2, 7, 9), device=device)
    with tritonloss.use_backend("triton"), example.way():
        example(logits.requires_grad_(), target)
        for arguments in calls:
            torch.library.opcheck(
                example.operator.forward,
                arguments,
                test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
            )
    assert calls
