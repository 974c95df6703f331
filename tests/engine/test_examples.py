"""What every slice's examples must satisfy: names and defaults agree, operators are sound."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kernels_reference
import tritonloss
from tests.oracle import segmentation_case
from tritonloss import functional
from tritonloss._core.example import Example
from tritonloss._tools.examples import examples

ALL = examples()
# Sums of losses are modules only: their examples have functions that users do not see.
EXAMPLES = [e for e in ALL if e.function.__module__ != tritonloss.WeightedSum.__module__]
MODULES = {example.module.__name__: example for example in EXAMPLES if example.module}


def keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults of the parameters that have one, or that can be given by name only."""
    found = inspect.signature(function).parameters.values()
    options = [p for p in found if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    return {p.name: p.default for p in options}


def reference_of(example: Example) -> Callable[..., Any]:
    name = example.function.__name__
    return getattr(kernels_reference, name, None) or getattr(kernels_reference.linalg, name)


def test_names_are_distinct_and_cover_the_public_functions() -> None:
    names = [example.name for example in ALL]
    assert len(set(names)) == len(names)
    shown = {example.function for example in EXAMPLES}
    public = {getattr(functional, name) for name in functional.__all__}
    public |= {getattr(tritonloss.linalg, name) for name in tritonloss.linalg.__all__}
    assert shown == public | {tritonloss.gaussian_statistics, tritonloss.predict}
    modules = {name for name in tritonloss.__all__ if name.endswith("Loss")}
    # They have tests of their own: one samples what its function is given, and the other has
    # parameters, and asks for the number of classes.
    assert set(MODULES) == modules - {"PixelContrastLoss", "AdaptiveAffinityFieldLoss"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_function_options_and_reference_agree_on_names_and_defaults(example: Example) -> None:
    given = keywords(example.function)
    options = example.operator.options
    defaults = {} if options is None else options._field_defaults
    for name in given.keys() & defaults.keys():
        assert given[name] == defaults[name], name
    if options is not None:
        assert given.keys() & set(options._fields)
    # A reference may have switches of its own, for example to show a defect of the released code.
    assert given.items() <= keywords(reference_of(example)).items()


@pytest.mark.parametrize("example", MODULES.values(), ids=lambda example: example.module.__name__)
def test_a_module_takes_what_its_function_takes(example: Example) -> None:
    assert example.module is not None
    of_function = list(inspect.signature(example.function).parameters.values())[2:]
    assert list(inspect.signature(example.module).parameters.values()) == of_function

    logits, target = segmentation_case((1, 3, 9, 12))
    given = example.arguments(logits, target)
    module = example.module(*given[2:], **example.options)
    expected = example(logits, target)[0]
    for made in (module, pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(made(*given[:2]), expected)
        assert repr(made) == repr(module)
    for name, default in keywords(example.function).items():
        if not isinstance(default, torch.Tensor) and default is not None:
            assert f"{name}={example.options.get(name, default)!r}" in repr(module)
