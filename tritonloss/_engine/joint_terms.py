"""Losses that share a read of the logits: which can, and what their launchers are given."""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .class_launch import ClassLoss
from .pixel_terms import Term, Walk, maps_of
from .planes import compute_dtype

MOST = 4  # losses of a walk, with all of those of class sums as one of them
MOST_MAPS = 4


class Member(NamedTuple):
    """A slice whose loss can share a read of the logits: a pixelwise one, or one of class sums.

    Attributes:
        options: the options of its operator, a NamedTuple of numbers, strings, flags and tuples.
        term: (logits, own table, other table, options, save) -> a ``Term``, of a pixelwise loss.
        classes: (options, logits, weight) -> a ``ClassLoss``, of one of class sums.
    """

    options: type[Any]
    term: Callable[..., Term] | None = None
    classes: Callable[..., ClassLoss] | None = None


class Joint(NamedTuple):
    """Losses that share a read, with what they were given.

    Attributes:
        terms: the pixelwise ones.
        classes: those of class sums, of the same probabilities.
        class_weights: of each of these its weights of the classes, or None.
        walk: what all of them share.
        weights: float64, the weights of the sum and perhaps of other losses.
        places: of every loss where its weight is, ``terms`` first.
        order: of every loss where its value is among what is returned.
    """

    terms: tuple[Term, ...]
    classes: tuple[ClassLoss, ...]
    class_weights: tuple[torch.Tensor | None, ...]
    walk: Walk
    weights: torch.Tensor
    places: tuple[int, ...]
    order: tuple[int, ...]


def described(slice_name: str, options: Any) -> str:
    """A loss in words, of which it can be made again, also in another process.

    The options are numbers, strings, flags, None and tuples of integers.
    """
    return f"{slice_name}: " + "".join([f"{_text(value)}, " for value in options])


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "(" + "".join([f"{number}, " for number in value]) + ")"
    return f"{value!r}"


@functools.lru_cache(maxsize=1024)
def member_of(loss: str) -> tuple[Member, Any]:
    """(the slice, its options) of a loss in words."""
    name, _, options = loss.partition(": ")
    module = importlib.import_module(f"{__package__.rpartition('.')[0]}.{name}")
    member: Member = module.MEMBER
    return member, member.options(*ast.literal_eval(f"({options})"))


def joint_of(
    losses: Sequence[str],
    tables: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]],
    logits: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor,
    places: Sequence[int],
    save: bool,
) -> Joint:
    """The losses as their launchers take them; ``tables`` and ``places`` are of every loss."""
    terms, classes, class_weights, of_terms, of_classes = [], [], [], [], []
    for number, (loss, (own, other)) in enumerate(zip(losses, tables, strict=True)):
        member, options = member_of(loss)
        if member.term is not None:
            terms.append(member.term(logits, own, other, options, save))
            of_terms.append(number)
        elif member.classes is not None:
            classes.append(member.classes(options, logits, own))
            class_weights.append(own)
            of_classes.append(number)
    # Those whose slopes the class sums take in come last.
    if classes:
        takes = classes[0].probabilities.takes
        ranks = [is_taken(term, takes) for term in terms]
        ways = sorted(range(len(terms)), key=ranks.__getitem__)
        terms, of_terms = [terms[i] for i in ways], [of_terms[i] for i in ways]
    order = (*of_terms, *of_classes)
    return Joint(
        tuple(terms),
        tuple(classes),
        tuple(class_weights),
        _walk_of(losses, logits, target),
        weights,
        tuple(places[number] for number in order),
        order,
    )


def is_taken(term: Term, takes: Callable[..., Any] | None) -> bool:
    """Whether a loss's slopes are taken in by those of class sums."""
    return term.loss.record.slope is takes and not term.options.smoothed


def _walk_of(losses: Sequence[str], logits: torch.Tensor, target: torch.Tensor) -> Walk:
    """The walk that all losses ask for; to interpolate to the same size is to do nothing."""
    found = [member_of(loss)[1] for loss in losses]
    reduction = next((o.reduction for o in found if hasattr(o, "reduction")), "mean")
    first = found[0]
    if first.upsample is None or logits.shape[2:] == target.shape[1:]:
        return Walk(first.ignore_index, reduction, group=first.group)
    return Walk(first.ignore_index, reduction, first.upsample, first.align_corners, first.group)


def grouped(
    losses: Sequence[str | None], logits: torch.Tensor, target: torch.Tensor
) -> list[list[int]]:
    """The losses, by their numbers, in groups that share a read each, in their order.

    A loss that shares none is alone. Those that are None cannot.
    """
    interpolated = bool(logits.shape[2:] != target.shape[1:])
    found = _grouped_apart(tuple(losses), int(logits.size(1)), logits.dtype, interpolated)
    return [list(group) for group in found]


def _grouped_apart(
    losses: tuple[str | None, ...], classes: int, dtype: torch.dtype, interpolated: bool
) -> tuple[tuple[int, ...], ...]:
    return _grouped(losses, classes, dtype, interpolated)


# Not to be traced: torch.compile takes the result as a constant, as it is of numbers and words.
# This is torch._dynamo.assume_constant_result, but torch._dynamo is not imported yet.
_marked: Any = _grouped_apart
_marked._dynamo_marked_constant = True


@functools.lru_cache(maxsize=256)
def _grouped(
    losses: tuple[str | None, ...], classes: int, dtype: torch.dtype, interpolated: bool
) -> tuple[tuple[int, ...], ...]:
    logits = torch.empty((1, classes, 1, 1), dtype=dtype, device="meta")
    groups: list[list[int]] = []
    for number in range(len(losses)):
        for group in groups:
            together = [losses[i] for i in (*group, number)]
            if _can_share([one for one in together if one is not None], logits, interpolated):
                if None not in together:
                    group.append(number)
                    break
        else:
            groups.append([number])
    return tuple(tuple(group) for group in groups)


def _can_share(losses: Sequence[str], logits: torch.Tensor, interpolated: bool) -> bool:
    """Whether these losses can share a read."""
    members = [member_of(loss) for loss in losses]
    pixelwise = [(m, o) for m, o in members if m.term is not None]
    of_sums = [(m, o) for m, o in members if m.classes is not None]
    walks = {
        (o.ignore_index, o.group, o.align_corners if interpolated else None) for _, o in members
    }
    reductions = {options.reduction for _, options in pixelwise}
    activations = {options.activation for _, options in of_sums}
    if max(len(walks), len(reductions), len(activations)) > 1:
        return False
    terms = [m.term(logits, None, None, o, True) for m, o in pixelwise if m.term is not None]
    found = [m.classes(o, logits, None).loss for m, o in of_sums[:1] if m.classes is not None]
    found += [term.loss for term in terms]
    maps = sum(len(its.stored) for its in maps_of(found, logits, interpolated))
    return len(found) <= MOST and maps <= MOST_MAPS


def stacked(
    tables: Sequence[torch.Tensor | None], logits: torch.Tensor
) -> tuple[torch.Tensor | None, tuple[int, ...]]:
    """(all tables that are there as one [rows, C], of every table its row, or -1)."""
    there = [table for table in tables if table is not None]
    rows, count = [], 0
    for table in tables:
        rows.append(-1 if table is None else count)
        count += table is not None
    dtype = compute_dtype(logits.dtype)
    return (torch.stack([table.to(dtype) for table in there]) if there else None), tuple(rows)
