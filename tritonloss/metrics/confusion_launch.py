"""The launchers of the confusion matrix: of logits, of label maps, and of what is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._core.backend import device_guard
from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .._engine.cell_grid import axes_of, cell_heuristic, over_cells, pointers_of
from .._engine.largest import Options, largest_add, largest_start
from .._engine.pixel_grid import in_grains, over_pixels
from .._engine.pixel_terms import Loss, Term, Walk, terms_of
from .._engine.pixels import Record, no_lookups
from .._engine.planes import ignored_class
from .confusion_cells import _upsampled_confusion_kernel, _upsampled_predict_kernel
from .confusion_kernels import (
    _confusion_matrix_kernel,
    _label_confusion_kernel,
    _predict_kernel,
)

# Configurations are those of a loss's forward pass, kept under this name; of interpolated logits
# they are the heuristic's. Nothing but the fold of its record is called.
LARGEST = Loss(
    "confusion_matrix",
    Record(largest_start, largest_add, largest_add, largest_add, largest_add, no_lookups),
    saved=lambda logits, interpolated: (),
    # Of 8 as many instructions, and more registers: of interpolated logits half as many again.
    unroll=4,
    binary=True,
)


# --- the matrix -----------------------------------------------------------------------------------


def launch_matrix(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int | None,
    align_corners: bool = False,
) -> torch.Tensor:
    """The matrix of logits, which are interpolated if the labels are more, and labels."""
    classes = 2 if logits.size(1) == 1 else logits.size(1)
    matrix = logits.new_zeros((classes, classes), dtype=torch.int64)
    if target.numel() == 0:
        return matrix
    if target.shape[1:] != logits.shape[2:]:
        walk = Walk(ignore_index, "sum", "bilinear", align_corners)
        _launch_cells(logits, target, walk, matrix)
        return matrix

    def prepare() -> PreparedLaunch:
        programs, arguments = over_pixels([LARGEST], "forward", logits, target)
        constants = {
            "logits_strides": in_grains(logits, arguments["TILE"]),
            "target_strides": in_grains(target, arguments["TILE"]),
            "TERMS": _terms(logits, Walk(ignore_index, "sum")),
            "IGNORED": ignored_class(ignore_index, classes, target.dtype),
            "BINARY": logits.size(1) == 1,
            "BINS": _bins(classes),
            **arguments,
        }
        aligned = arguments["TILE"].grain > 1
        return PreparedLaunch(_confusion_matrix_kernel, (programs,), constants, aligned)

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
        programs, arguments = over_pixels([LARGEST], "forward", prediction.unsqueeze(1), target)
        del arguments["full"]
        tile = arguments["TILE"]._replace(classes=classes)
        constants = {
            "prediction_strides": in_grains(prediction, tile),
            "target_strides": in_grains(target, tile),
            "IGNORED": ignored_class(ignore_index, classes, target.dtype),
            "BINS": _bins(classes),
            **arguments,
            "TILE": tile,
        }
        return PreparedLaunch(_label_confusion_kernel, (programs,), constants, tile.grain > 1)

    key = ("label_confusion", kind(prediction), kind(target), classes, ignore_index)
    launch = prepared(key, prepare)
    with device_guard(target):
        launch(prediction_ptr=prediction, target_ptr=target, matrix_ptr=matrix)
    return matrix


# --- the prediction -------------------------------------------------------------------------------


def launch_prediction(
    logits: torch.Tensor, size: Sequence[int] | None = None, align_corners: bool = False
) -> torch.Tensor:
    """The class of every pixel, of logits that are interpolated to a size if it is another."""
    prediction = empty_prediction(logits, size)
    if prediction.numel() == 0:
        return prediction
    if prediction.shape[1:] != logits.shape[2:]:
        _launch_cells(logits, prediction, Walk(None, "sum", "bilinear", align_corners), None)
        return prediction

    def prepare() -> PreparedLaunch:
        # What is written lies as labels would that are read.
        programs, arguments = over_pixels([LARGEST], "forward", logits, prediction)
        constants = {
            "logits_strides": in_grains(logits, arguments["TILE"]),
            "TERMS": _terms(logits, Walk(None, "sum")),
            **arguments,
        }
        return PreparedLaunch(_predict_kernel, (programs,), constants, arguments["TILE"].grain > 1)

    launch = prepared(("predict", kind(logits)), prepare)
    with device_guard(logits):
        launch(logits_ptr=logits, prediction_ptr=prediction)
    return prediction


def empty_prediction(logits: torch.Tensor, size: Sequence[int] | None) -> torch.Tensor:
    """A map [N, *size] for classes, in the narrowest integer of uint8 and int32."""
    dtype = torch.uint8 if logits.size(1) <= 256 else torch.int32
    size = logits.shape[2:] if size is None else size
    return logits.new_empty((logits.size(0), *size), dtype=dtype)


# --- interpolated logits --------------------------------------------------------------------------


def _launch_cells(
    logits: torch.Tensor, labels: torch.Tensor, walk: Walk, matrix: torch.Tensor | None
) -> None:
    """Count interpolated logits against labels; without a matrix write what they predict there."""
    axes = axes_of(logits, labels, walk.align_corners)
    name = "prediction" if matrix is None else "target"

    def prepare() -> PreparedLaunch:
        _, columns = axes
        configuration = cell_heuristic([LARGEST], "forward", columns.most)
        programs, arguments = over_cells([LARGEST], logits, labels, walk, axes, configuration)
        constants = {
            "logits_strides": logits.stride(),
            f"{name}_strides": labels.stride(),
            "TERMS": _terms(logits, walk),
            **arguments,
        }
        kernel = _upsampled_predict_kernel
        if matrix is not None:
            kernel = _upsampled_confusion_kernel
            constants["BINS"] = _bins(matrix.size(0))
        return PreparedLaunch(kernel, (programs,), constants, aligned=False)

    launch = prepared(("upsampled", name, kind(logits), kind(labels), walk), prepare)
    tensors = {"logits_ptr": logits, f"{name}_ptr": labels}
    if matrix is not None:
        tensors["matrix_ptr"] = matrix
    with device_guard(logits):
        launch(**tensors, **pointers_of(axes))


def _terms(logits: torch.Tensor, walk: Walk) -> Any:
    """The search for the largest logit, as walks take it."""
    return terms_of((Term(LARGEST, Options(logits.size(1) == 1)),), logits, walk, save=False)


def _bins(classes: int) -> int:
    """A histogram's size for all pairs of classes; not fewer than a warp has lanes."""
    return max(1 << (classes * classes - 1).bit_length(), 64)
