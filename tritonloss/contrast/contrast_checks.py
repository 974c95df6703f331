"""Checks of what all functions of contrast are given."""

from __future__ import annotations

import torch

from .._core import checks

# The most dimensions of an embedding: a tile of keys has all of them.
MOST_DIMS = 512
PRECISIONS = ("tf32x3", "bf16")
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_embeddings(
    name: str, embeddings: torch.Tensor, anchors: torch.Tensor | None = None
) -> None:
    """``embeddings`` must be floating-point [., D]; keys are like the anchors, on their device."""
    dims = f"D of 1 to {MOST_DIMS}" if anchors is None else f"D of {anchors.size(1)} as anchors"
    accepted = (
        f"{name} must be a float16, bfloat16, float32 or float64 tensor of shape (., D) with {dims}"
    )
    if not isinstance(embeddings, torch.Tensor):
        raise TypeError(f"{accepted}; got {type(embeddings).__name__}")
    checks.check_dense(embeddings, name)
    if embeddings.dtype not in _FLOATING:
        raise TypeError(f"{accepted}; got {checks.described(embeddings)}")
    right = embeddings.dim() == 2 and 1 <= embeddings.size(1) <= MOST_DIMS
    if not right or (anchors is not None and embeddings.size(1) != anchors.size(1)):
        raise ValueError(f"{accepted}; got {checks.described(embeddings)}")
    if anchors is not None:
        checks.check_same_device(anchors, "anchors", embeddings, name)


def check_labels_of(name: str, labels: torch.Tensor, of: str, embeddings: torch.Tensor) -> None:
    """``labels`` must be integers, one for each embedding, on their device."""
    accepted = f"{name} must hold integer labels of shape ({len(embeddings)},) to match {of}"
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"{accepted}; got {type(labels).__name__}")
    checks.check_dense(labels, name)
    if not checks.holds_labels(labels):
        raise TypeError(f"{accepted}; got {checks.described(labels)}")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"{accepted}; got {checks.described(labels)}")
    checks.check_same_device(embeddings, of, labels, name)


def check_options(
    temperature: float,
    base_temperature: float,
    hardest: float | None,
    precision: str,
    ignore_index: int | None,
) -> None:
    """Check the options of the loss."""
    checks.check_range("temperature", temperature, 1e-4, 1e4)
    checks.check_range("base_temperature", base_temperature, 1e-4, 1e4)
    if hardest is not None:
        checks.check_range("hardest", hardest, 0.0, 1.0, interval="(]")
    checks.check_option("precision", precision, PRECISIONS)
    checks.check_ignore_index(ignore_index)


def check_maps(embeddings: torch.Tensor, target: torch.Tensor) -> None:
    """A map of embeddings must be floating-point, and the labels be those of as many images."""
    accepted = (
        "embeddings must be a float16, bfloat16, float32 or float64 tensor of shape (N, D, h, w) "
        f"with D of 1 to {MOST_DIMS}"
    )
    if not isinstance(embeddings, torch.Tensor):
        raise TypeError(f"{accepted}; got {type(embeddings).__name__}")
    checks.check_dense(embeddings, "embeddings")
    if embeddings.dtype not in _FLOATING:
        raise TypeError(f"{accepted}; got {checks.described(embeddings)}")
    if embeddings.dim() != 4 or not 1 <= embeddings.size(1) <= MOST_DIMS:
        raise ValueError(f"{accepted}; got {checks.described(embeddings)}")
    _check_map_of_labels("target", target, "integer labels", embeddings)


def check_prediction(prediction: torch.Tensor, embeddings: torch.Tensor) -> None:
    """``prediction`` must be logits of the embeddings' images, or predicted labels."""
    what = f"logits of shape ({len(embeddings)}, C, H, W), or integer labels"
    if isinstance(prediction, torch.Tensor) and prediction.dtype in _FLOATING:
        checks.check_dense(prediction, "prediction")
        _check_shape("prediction", prediction, what, embeddings, 4)
    else:
        _check_map_of_labels("prediction", prediction, what, embeddings)


def _check_map_of_labels(
    name: str, labels: torch.Tensor, what: str, embeddings: torch.Tensor
) -> None:
    accepted = f"{name} must hold {what} of shape ({len(embeddings)}, H, W)"
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"{accepted}; got {type(labels).__name__}")
    checks.check_dense(labels, name)
    if not checks.holds_labels(labels):
        raise TypeError(f"{accepted}; got {checks.described(labels)}")
    _check_shape(name, labels, what, embeddings, 3)


def _check_shape(
    name: str, labels: torch.Tensor, what: str, embeddings: torch.Tensor, dims: int
) -> None:
    has_pixels = labels.dim() == dims and 0 not in labels.shape[1:]
    if not has_pixels or len(labels) != len(embeddings):
        raise ValueError(
            f"{name} must hold {what} of shape ({len(embeddings)}, H, W) to match embeddings of "
            f"shape {tuple(embeddings.shape)}; got {checks.described(labels)}"
        )
    checks.check_same_device(embeddings, "embeddings", labels, name)
