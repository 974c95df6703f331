"""What the slices declare, for tests that go through all of it: there is no list of losses here."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tritonloss._core.example import Example
from tritonloss._tools.examples import examples
from tritonloss._tools.tuning_cases import own_cases, slices

Ways = dict[str, Example]

EXAMPLES: Ways = {example.name: example for example in examples()}
# What has a gradient.
DIFFERENTIABLE: Ways = {n: e for n, e in EXAMPLES.items() if e.operator.differentiable}
# Matrices are no maps: tests/losses/test_linalg.py tests them.
OF_MAPS: Ways = {n: e for n, e in DIFFERENTIABLE.items() if "linalg" not in e.function.__module__}
# The losses of logits and labels: what is also a module.
OF_LABELS: Ways = {name: example for name, example in EXAMPLES.items() if example.module}


def one_of_each(ways: Iterable[Example] = OF_LABELS.values()) -> Ways:
    """The first example of every function, by the function's name."""
    found: Ways = {}
    for example in ways:
        found.setdefault(example.function.__name__, example)
    return found


def with_more(ways: Ways, more: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Ways:
    """The ways, and more ways through the same functions.

    `more` has, by a function's name and then by what is special about the call, the fields that
    differ from the function's first example. Only `options` and `way` are not taken over from it.
    """
    first = one_of_each(ways.values())
    found = dict(ways)
    for function, calls in more.items():
        for special, fields in calls.items():
            changed = {"options": {}, "way": nullcontext, **fields}
            name = f"{function}, {special}"
            assert name not in found, name
            found[name] = replace(first[function], name=name, **changed)
    return found


def is_pixelwise(example: Example) -> bool:
    """Whether it is an example of a pixelwise loss: only these have tables of the classes."""
    return "own_table" in example.operator.inputs


def is_upsampled(example: Example) -> bool:
    """Whether it interpolates its logits: a pixel's loss depends on more than those under it."""
    return example.options.get("upsample") is not None


def as_a_number(results: Iterable[Tensor]) -> Tensor:
    """One number that depends on all differentiable results: a scalar itself, or maps' squares."""
    floating = [result for result in results if result.is_floating_point()]
    if len(floating) == 1 and floating[0].dim() == 0:
        return floating[0]
    return torch.stack([result.square().mean() for result in floating]).sum()


@functools.cache
def operators_with(setting: str) -> tuple[str, ...]:
    """The operators whose configurations have a setting of that name: COLUMNS, PIXELS."""
    cases = [case for name in slices() for case in own_cases(name)]
    asking = (case.operator for case in cases if setting in case.candidates[0])
    return tuple(dict.fromkeys(asking))
