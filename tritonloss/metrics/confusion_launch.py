"""The launchers of the confusion matrix: of logits, of label maps, and of what is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._core.backend import device_guard
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._engine.pixel_launch import Loss, _launch, _strides
from .._engine.pixel_walk import Terms
from .._engine.pixels import Record, no_lookups
from .._engine.planes import ignored_class
from .confusion_kernels import (
    Options,
    _confusion_matrix_kernel,
    _label_confusion_kernel,
    _predict_kernel,
    largest_add,
    largest_start,
)

# Configurations are those of a loss's forward pass, kept under this name. Nothing but the fold of
# its record is called.
LARGEST = Loss(
    "confusion_matrix",
    Record(largest_start, largest_add, largest_add, largest_add, largest_add, no_lookups),
    saved=lambda logits: (),
    unroll=4,  # of 8 that are two bytes wide Triton 3.9 spills
    binary=True,
)


def launch_matrix(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int | None
) -> torch.Tensor:
    """The matrix of logits and labels."""
    is_binary = logits.size(1) == 1
    classes = 2 if is_binary else logits.size(1)
    matrix = logits.new_zeros((classes, classes), dtype=torch.int64)
    if target.numel() == 0:
        return matrix

    def prepare() -> PreparedLaunch:
        grid, arguments = _launch([LARGEST], "forward", logits, target)
        constants = {
            "logits_strides": _strides(logits, arguments["TILE"]),
            "target_strides": _strides(target, arguments["TILE"]),
            "TERMS": _terms(is_binary),
            "IGNORED": ignored_class(ignore_index, classes, target.dtype),
            "BINARY": is_binary,
            "BINS": _bins(classes),
            **arguments,
        }
        return PreparedLaunch(
            _confusion_matrix_kernel, grid, constants, arguments["TILE"].grain > 1
        )

    launch = prepared(("confusion_matrix", kind(logits), kind(target), ignore_index), prepare)
    with device_guard(logits):
        launch(logits_ptr=logits, target_ptr=target, matrix_ptr=matrix)
    return matrix


def launch_label_matrix(
    prediction: torch.Tensor, target: torch.Tensor, classes: int, ignore_index: int | None
) -> torch.Tensor:
    """The matrix of predicted and true labels."""
    matrix = torch.zeros((classes, classes), dtype=torch.int64, device=target.device)
    if target.numel() == 0:
        return matrix

    def prepare() -> PreparedLaunch:
        # As a map of one channel.
        grid, arguments = _launch([LARGEST], "forward", prediction.unsqueeze(1), target)
        del arguments["full"]
        tile = arguments["TILE"]._replace(classes=classes)
        constants = {
            "prediction_strides": _strides(prediction, tile),
            "target_strides": _strides(target, tile),
            "IGNORED": ignored_class(ignore_index, classes, target.dtype),
            "BINS": _bins(classes),
            **arguments,
            "TILE": tile,
        }
        return PreparedLaunch(_label_confusion_kernel, grid, constants, tile.grain > 1)

    key = ("label_confusion", kind(prediction), kind(target), classes, ignore_index)
    launch = prepared(key, prepare)
    with device_guard(target):
        launch(prediction_ptr=prediction, target_ptr=target, matrix_ptr=matrix)
    return matrix


def launch_prediction(logits: torch.Tensor) -> torch.Tensor:
    """The class of every pixel."""
    prediction = empty_prediction(logits, logits.shape[2:])
    if prediction.numel() == 0:
        return prediction

    def prepare() -> PreparedLaunch:
        # What is written lies as labels would that are read.
        grid, arguments = _launch([LARGEST], "forward", logits, prediction)
        constants = {
            "logits_strides": _strides(logits, arguments["TILE"]),
            "TERMS": _terms(logits.size(1) == 1),
            **arguments,
        }
        return PreparedLaunch(_predict_kernel, grid, constants, arguments["TILE"].grain > 1)

    launch = prepared(("predict", kind(logits)), prepare)
    with device_guard(logits):
        launch(logits_ptr=logits, prediction_ptr=prediction)
    return prediction


def empty_prediction(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """A map [N, *size] for classes, in the narrowest integer of uint8 and int32."""
    dtype = torch.uint8 if logits.size(1) <= 256 else torch.int32
    return logits.new_empty((logits.size(0), *size), dtype=dtype)


def _terms(is_binary: bool) -> Terms:
    """The record as the walk takes it: one, of one pass."""
    record = LARGEST.record
    functions: dict[str, Any] = {
        name: (getattr(record, name) or record.add,) for name in Record._fields
    }
    return Terms(
        **functions, twice=(False,), passes=1, options=(Options(is_binary),), maps=(0,),
        first_map=(0,),
    )  # fmt: skip


def _bins(classes: int) -> int:
    """A histogram's size for all pairs of classes; not fewer than a warp has lanes."""
    return max(1 << (classes * classes - 1).bit_length(), 64)
