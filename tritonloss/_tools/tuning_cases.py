"""All cases to tune: those of every slice, for several numbers of classes and layouts."""

from __future__ import annotations

import argparse
import functools
import importlib
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from types import ModuleType

from .._core.configurations import Shape, TuningCase
from .examples import public_modules

# A shape for each bucket of classes of the standard data sets.
STREETS: Shape = (2, 19, 512, 1024)
MANY_CLASSES: Shape = (2, 150, 256, 512)
TWO_CLASSES: Shape = (8, 2, 512, 512)
SIZES: tuple[tuple[Shape, str], ...] = (
    (STREETS, "contiguous"),
    (STREETS, "channels_last"),
    (MANY_CLASSES, "contiguous"),
    (TWO_CLASSES, "contiguous"),
    (MANY_CLASSES, "channels_last"),
    (TWO_CLASSES, "channels_last"),
    (STREETS, "strided"),
)


def slices() -> list[str]:
    """The names of the public modules, in any room, that have something to tune."""
    return [name for name in public_modules() if hasattr(_module(name), "tuning_cases")]


def own_cases(slice_name: str) -> list[TuningCase]:
    """The cases that the slice itself states, numbered."""
    cases: list[TuningCase] = _module(slice_name).tuning_cases()
    return [replace(case, slice=slice_name, number=n) for n, case in enumerate(cases)]


def tuning_cases(
    operator: str | None = None, shapes: Sequence[Shape] | None = None, first: bool = False
) -> list[TuningCase]:
    """The cases of every slice, or of one operator: first every slice's first, and so on.

    After the cases that a slice states come those of them that can be sized, for other classes and
    layouts. With ``shapes`` there are only sized ones, in the layout that the slice states. With
    ``first`` there is only the first case of each operator.

    Raises:
        ValueError: no slice has an operator of that name, or none of its cases can be sized.
    """
    own = [own_cases(name) for name in slices()]
    if operator is not None:
        known = sorted({case.operator for cases in own for case in cases})
        own = [[case for case in cases if case.operator == operator] for cases in own]
        if not any(own):
            raise ValueError(f"--op must be one of {', '.join(known)}; got {operator!r}")
    if first:
        own = [_first_of_each_operator(cases) for cases in own]
    if first and shapes is None:
        queues = own
    elif shapes is None:
        queues = [_distinct(cases + _at_sizes(cases)) for cases in own]
    else:
        queues = [_distinct(_at_shapes(cases, shapes)) for cases in own]
        if not any(queues):
            raise ValueError("--shapes: no case of these operators depends on a shape")
    return [case for turn in zip_longest(*queues) for case in turn if case is not None]


def shape_of(text: str) -> Shape:
    """The shape that is written NxCxHxW on a command line.

    Raises:
        argparse.ArgumentTypeError: the text is not of that form.
    """
    sizes = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", text)
    if sizes is None or "0" in sizes.groups():
        raise argparse.ArgumentTypeError(f"must be like 4x19x1024x2048; got {text!r}")
    batch, classes, height, width = map(int, sizes.groups())
    return batch, classes, height, width


def _at_sizes(cases: Sequence[TuningCase]) -> list[TuningCase]:
    found = [sized(case, shape, layout) for shape, layout in SIZES for case in cases]
    return [case for case in found if case is not None]


def _at_shapes(cases: Sequence[TuningCase], shapes: Sequence[Shape]) -> list[TuningCase]:
    found = [sized(case, shape, case.layout) for shape in shapes for case in cases]
    return [case for case in found if case is not None]


def _distinct(cases: Sequence[TuningCase]) -> list[TuningCase]:
    """The first case of every key."""
    first: dict[str, TuningCase] = {}
    for case in cases:
        first.setdefault(case.key, case)
    return list(first.values())


def _first_of_each_operator(cases: Sequence[TuningCase]) -> list[TuningCase]:
    first: dict[str, TuningCase] = {}
    for case in cases:
        first.setdefault(case.operator, case)
    return list(first.values())


def sized(case: TuningCase, shape: Shape, layout: str) -> TuningCase | None:
    """The case for other logits; None if it cannot be sized, or has no such layout."""
    if case.sized is None or layout not in case.layouts:
        return None
    run = functools.partial(case.sized, shape, layout)
    found = replace(case, classes=shape[1], layout=layout, shape=shape, run=run)
    if case.sized_candidates is not None:
        found = replace(found, candidates=case.sized_candidates(shape[1], layout))
    return found


def same_case(slice_name: str, number: int, shape: Shape | None, layout: str) -> TuningCase:
    """The case that another process has described by these."""
    case = own_cases(slice_name)[number]
    found = case if shape is None else sized(case, shape, layout)
    assert found is not None
    return found


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"tritonloss.{name}")
