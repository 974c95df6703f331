"""The launchers of losses that share a read of the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from .._core.backend import device_guard, registers
from .._core.configurations import Configuration
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .cell_grid import axes_of_walk
from .class_cell_launch import (
    Gradients,
    Left,
    Walked,
    bins_of,
    launch_gradients,
    prepare_gradients,
    prepare_sums,
    with_slopes,
)
from .class_launch import ClassResults, from_sums, prepare_join, table_strides
from .joint_kernels import (
    Heads,
    Places,
    _joint_backward_kernel,
    _joint_forward_kernel,
    _joint_head_kernel,
)
from .joint_terms import Joint, is_taken
from .pixel_grid import in_grains, over_pixels, pixel_heuristic, rounds_of
from .pixel_launch import launch_backward, launch_forward, means_of_ranks
from .pixel_terms import (
    Kept,
    Loss,
    Term,
    Weights,
    key_of,
    labels_of,
    maps_of,
    numbers_of,
    tables_of,
    terms_of,
)
from .planes import compute_dtype
from .sums import tickets

_IN_BLOCKS = 4  # classes; of 8, Triton 3.6 spills 32 bytes on sm_80


class JointResults(NamedTuple):
    """What a forward launch returns."""

    loss: torch.Tensor  # []: the weighted sum
    terms: torch.Tensor  # [losses]: what it is the sum of, without the weights
    scale: Any  # what gradients are multiplied by: of class sums 1, then of every pixelwise loss
    table: Any  # [2, N or 1, C]: what own pixels get on top, what all get; or None
    maps: tuple[torch.Tensor, ...]  # for the backward pass, [N, H, W] each


def allocated(joint: Joint, logits: torch.Tensor, target: torch.Tensor, save: bool) -> JointResults:
    """The results, of which nothing is computed yet; maps are there if ``save``."""
    dtype = compute_dtype(logits.dtype)
    saved = maps_of(_losses(joint), logits, joint.walk.upsample is not None) if save else []
    groups = logits.size(0) if _is_per_image(joint) else 1
    shape = (2, groups, logits.size(1))
    return JointResults(
        logits.new_empty((), dtype=dtype),
        logits.new_empty((len(joint.order),), dtype=dtype),
        logits.new_empty((len(_all_terms(joint)),), dtype=dtype),
        logits.new_empty(shape, dtype=dtype) if joint.classes else None,
        tuple([logits.new_empty(target.shape, dtype=d) for its in saved for d in its.stored]),
    )


def launch_joint(
    joint: Joint, logits: torch.Tensor, target: torch.Tensor, save: bool
) -> JointResults:
    """The weighted sum, and what its backward pass needs if ``save``."""
    if not joint.classes:
        terms = logits.new_empty((len(joint.order),), dtype=compute_dtype(logits.dtype))
        weights = Weights(joint.weights, joint.places)
        loss, kept = launch_forward(
            joint.terms, logits, target, joint.walk, save, weights=weights, values=terms
        )
        return JointResults(loss, terms, kept.scale, None, kept.maps)
    results = allocated(joint, logits, target, save)
    images, classes = logits.shape[:2]
    shape = (3, images, classes + 1)
    sums = logits.new_empty(shape, dtype=torch.float64)
    in_groups = joint.walk.group is not None
    if target.numel() == 0:
        values = sums.new_zeros((len(joint.terms), 2, 1))
        return _of_ranks(joint, logits, sums.zero_(), values, results)
    launch, programs = prepared(
        ("joint", *_kind_of(joint, logits, target), save),
        lambda: _prepare_sums(joint, logits, target, save),
    )
    parts = logits.new_empty((*shape, programs), dtype=compute_dtype(logits.dtype))
    values = parts.new_empty((len(joint.terms), 2, programs * images))
    own, other = tables_of(_all_terms(joint), logits)
    with device_guard(logits):
        launch(
            logits_ptr=logits,
            target_ptr=target,
            own_ptrs=own,
            other_ptrs=other,
            map_ptrs=results.maps,
            parts_ptr=parts,
            values_ptr=values,
            **axes_of_walk(logits, target, joint.walk),
        )
        if in_groups:
            add_up = prepared(
                ("class_join", shape, programs, parts.dtype, parts.device),
                lambda: prepare_join(images, classes, programs),
            )
            add_up(parts_ptr=parts, sums_ptr=sums)
            return _of_ranks(joint, logits, sums, values, results)
        finish = prepared(
            ("joint_head", *_kind_of_heads(joint, logits), programs),
            lambda: _prepare_heads(joint, logits, programs),
        )
        tables = (len(joint.classes), 2, images, classes)
        finish(
            parts_ptr=parts,
            sums_ptr=sums,
            class_weight_ptrs=tuple(
                [logits if w is None else w.contiguous() for w in joint.class_weights]
            ),
            tables_ptr=logits.new_empty(tables, dtype=torch.float64),
            values_ptr=values,
            totals_ptr=sums.new_empty((len(joint.terms), 2)),
            weights_ptr=joint.weights,
            loss_ptr=results.loss,
            terms_ptr=results.terms,
            scale_ptr=results.scale,
            table_ptr=results.table,
            tickets_ptr=tickets(1, logits.device),
        )
    return results


def _of_ranks(
    joint: Joint,
    logits: torch.Tensor,
    sums: torch.Tensor,
    values: torch.Tensor,
    results: JointResults,
) -> JointResults:
    """The results from this rank's class sums [3, N, C + 1], some of them added up over ranks.

    Here the head of every loss is a launch of its own.
    """
    count, classes = len(joint.terms), logits.size(1)
    weights = [joint.weights[place] for place in joint.places]
    loss = sums.new_zeros(())
    results.scale[0].fill_(1.0)
    if count > 0:
        valid = sums[2, :, -1].sum()
        totals = torch.cat((values.double().sum(-1).flatten(), valid.view(1)))
        found, factors = means_of_ranks(totals, joint.walk)
        for k in range(count):
            results.terms[joint.order[k]] = found[k]
            results.scale[1 + k] = weights[k] * factors[k]
            loss = loss + weights[k] * found[k]
    table = results.table.new_zeros(results.table.shape, dtype=torch.float64)
    for k, head in enumerate(joint.classes, count):
        groups = logits.size(0) if head.counting.per_image else 1
        alone = ClassResults(
            sums.new_empty(()),
            sums.new_empty((1,)),
            sums.new_zeros((2, groups, classes)),
            None,
            None,
        )
        alone = from_sums(head, sums, logits, joint.class_weights[k - count], alone)
        results.terms[joint.order[k]] = alone.loss
        loss = loss + weights[k] * alone.loss
        table += weights[k] * alone.scale * alone.table
    results.loss.copy_(loss)
    results.table.copy_(table)
    return results


def launch_joint_backward(
    joint: Joint,
    upstream: torch.Tensor,
    kept: JointResults,
    logits: torch.Tensor,
    target: torch.Tensor,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of the logits; it is added to ``before``, in place, if that is there."""
    if not joint.classes:
        scale = Kept(kept.scale, kept.maps)
        return launch_backward(
            joint.terms, upstream, scale, logits, target, joint.walk, before=before
        )
    if target.numel() == 0:
        return torch.zeros_like(logits) if before is None else before
    grad_logits = torch.empty_like(logits) if before is None else before
    own, other = tables_of(joint.terms, logits)
    adds = None if before is None else kind(before)
    key = ("joint_backward", *_kind_of(joint, logits, target), adds)
    if joint.walk.upsample is not None:
        tensors = Walked(logits, target, grad_logits)
        launches = prepared(key, lambda: _prepare_cells_backward(joint, tensors, adds is not None))
        left = Left(kept.scale, kept.table, kept.maps, own, other)
        with device_guard(logits):
            launch_gradients(launches, upstream, left, tensors, joint.walk)
        return grad_logits
    launch, maps = prepared(
        key, lambda: _prepare_backward(joint, logits, target, grad_logits, adds is not None)
    )
    with device_guard(logits):
        launch(
            upstream_ptr=upstream,
            scale_ptr=kept.scale,
            logits_ptr=logits,
            target_ptr=target,
            own_ptrs=own,
            other_ptrs=other,
            table_ptr=kept.table,
            map_ptrs=kept.maps[:maps],
            grad_ptr=grad_logits,
        )
    return grad_logits


def _losses(joint: Joint) -> list[Loss]:
    return [term.loss for term in _all_terms(joint)]


def _all_terms(joint: Joint) -> tuple[Term, ...]:
    """The class sums, if there are any, and the pixelwise losses."""
    return (*(Term(loss.loss, ()) for loss in joint.classes[:1]), *joint.terms)


def _kind_of(joint: Joint, logits: torch.Tensor, target: torch.Tensor) -> tuple[Any, ...]:
    """All that a launch over pixels depends on."""
    return key_of(_all_terms(joint)), kind(logits), kind(target), joint.walk, _is_per_image(joint)


def _kind_of_heads(joint: Joint, logits: torch.Tensor) -> tuple[Any, ...]:
    """All that a launch of the heads depends on, but for the number of programs."""
    heads = tuple([
        (loss.head, loss.options, loss.counting, loss.numbers, weight is None or weight.dtype)
        for loss, weight in zip(joint.classes, joint.class_weights, strict=True)
    ])  # fmt: skip
    like = logits.shape[:2], logits.dtype, logits.device
    return heads, joint.places, joint.order, joint.walk.reduction, *like


# --- launches -------------------------------------------------------------------------------------


def _prepare_sums(
    joint: Joint, logits: torch.Tensor, target: torch.Tensor, save: bool
) -> tuple[PreparedLaunch, int]:
    """(the launch, its programs of an image)."""
    terms, losses = _all_terms(joint), _losses(joint)
    probabilities = joint.classes[0].probabilities
    if joint.walk.upsample is not None:
        return prepare_sums(terms, probabilities, logits, target, joint.walk, save, _taken(joint))
    images, classes = logits.shape[:2]
    heuristic = _forward_heuristic(losses, logits)
    _, arguments = over_pixels(losses, "forward", logits, target, name="joint", heuristic=heuristic)
    tile, tiles = arguments["TILE"], arguments.pop("tiles")
    rounds = 1
    if triton.cdiv(classes, tile.lanes) <= tile.unroll:
        rounds = rounds_of(images * tiles)
    programs = triton.cdiv(tiles, rounds)
    constants = {
        **arguments,
        **labels_of(losses, logits, target, joint.walk.ignore_index),
        "numbers": numbers_of(terms, None)["numbers"],
        "logits_strides": in_grains(logits, tile),
        "target_strides": in_grains(target, tile),
        "rounds": rounds,
        "programs": programs,
        "images": images,
        "TERMS": terms_of(terms, logits, joint.walk, save),
        "PROBABILITIES": probabilities,
        "BINS": bins_of(classes),
        **registers(),
    }
    grid = (images * programs,)
    return PreparedLaunch(_joint_forward_kernel, grid, constants, tile.grain > 1), programs


def _forward_heuristic(losses: list[Loss], logits: torch.Tensor) -> Configuration:
    """Where the classes of a lane are in blocks these are small: every loss has a state."""
    found = pixel_heuristic(losses, "forward", logits)
    is_in_blocks = int(found["CLASS_LANES"]) == 1 and int(found["UNROLL"]) < logits.size(1)
    return {**found, "UNROLL": _IN_BLOCKS} if is_in_blocks else found


def _prepare_heads(joint: Joint, logits: torch.Tensor, programs: int) -> PreparedLaunch:
    images, classes = logits.shape[:2]
    heads = joint.classes
    constants = {
        "numbers": tuple(loss.numbers for loss in heads),
        "places": Places(joint.places, joint.order),
        "programs": programs,
        "images": images,
        "groups": images if _is_per_image(joint) else 1,
        "HEADS": Heads(
            tuple(loss.head for loss in heads),
            tuple(loss.options for loss in heads),
            tuple(loss.counting for loss in heads),
            tuple(loss.counting.per_image for loss in heads),
        ),
        "REDUCTION": joint.walk.reduction,
        "CLASSES": classes,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    programs = images * (classes + 1) + 2 * len(joint.terms)
    return PreparedLaunch(_joint_head_kernel, (programs,), constants, False)


def _prepare_backward(
    joint: Joint, logits: torch.Tensor, target: torch.Tensor, grad_logits: torch.Tensor, adds: bool
) -> tuple[PreparedLaunch, int]:
    """(the launch, how many maps it reads)."""
    terms, losses = _all_terms(joint), _losses(joint)
    programs, arguments = over_pixels(losses, "backward", logits, target, grad_logits, name="joint")
    tile = arguments["TILE"]
    known = terms_of(terms, logits, joint.walk, True, adds)
    probabilities = joint.classes[0].probabilities
    constants = {
        **arguments,
        **labels_of(losses, logits, target, joint.walk.ignore_index),
        "numbers": numbers_of(terms, None)["numbers"],
        "logits_strides": in_grains(logits, tile),
        "target_strides": in_grains(target, tile),
        "grad_strides": in_grains(grad_logits, tile),
        "table_strides": table_strides(_is_per_image(joint), logits),
        "TERMS": with_slopes(known, probabilities, _taken(joint)),
        "PROBABILITIES": probabilities,
    }
    launch = PreparedLaunch(_joint_backward_kernel, (programs,), constants, tile.grain > 1)
    return launch, sum(known.stored)


def _prepare_cells_backward(joint: Joint, tensors: Walked, adds: bool) -> Gradients:
    """The launches over interpolated logits."""
    return prepare_gradients(
        _all_terms(joint),
        joint.classes[0].probabilities,
        tensors,
        joint.walk,
        table_strides(_is_per_image(joint), tensors.logits),
        taken=_taken(joint),
        adds=adds,
    )


def _taken(joint: Joint) -> int:
    """How many of the losses are taken in by the class sums: the last ones."""
    takes = joint.classes[0].probabilities.takes
    return sum(is_taken(term, takes) for term in joint.terms)


def _is_per_image(joint: Joint) -> bool:
    return any(loss.counting.per_image for loss in joint.classes)
