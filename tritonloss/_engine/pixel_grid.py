"""How kernels go through pixels: configurations, grids and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from .._core.backend import architecture, warp_size
from .._core.configurations import Configuration, launch_configuration
from .._core.prepared_launch import is_aligned
from .pixel_kernels import _pixelwise_backward_kernel, _pixelwise_forward_kernel
from .pixel_terms import Loss, Walk, Way, labels_of
from .pixels import Tile

# Classes of a lane that has four pixels, where more would spill: beside several states, and going
# forward on GPUs that add pairs of registers, those of this compute capability and above.
_WIDE = 20
PAIRS = 100
# Classes of a bundle where neighbouring addresses are classes (channels_last).
_LAST_BUNDLE = 64


# Programs that add up over several tiles each, as many as a large GPU has room for twice, and the
# most tiles of one.
PROGRAMS = 1024
_MOST_ROUNDS = 64


# --- what kernels are given -----------------------------------------------------------------------


def forward_over_pixels(
    losses: Sequence[Loss], logits: torch.Tensor, target: torch.Tensor, walk: Walk
) -> Way:
    """The way of a forward pass through the pixels of ``logits``."""
    programs, arguments = over_pixels(losses, "forward", logits, target)
    tile = arguments["TILE"]
    arguments |= {
        "logits_strides": in_grains(logits, tile),
        "target_strides": in_grains(target, tile),
        **labels_of(losses, logits, target, walk.ignore_index),
    }
    # With a grain above 1 logits and labels are aligned; what a launch allocates always is.
    return Way(_pixelwise_forward_kernel, programs, arguments, tile.grain > 1)


def backward_over_pixels(
    losses: Sequence[Loss],
    logits: torch.Tensor,
    target: torch.Tensor,
    walk: Walk,
    grads: tuple[torch.Tensor, torch.Tensor],
) -> Way:
    """The way of a backward pass; ``grads`` are of the loss and of the logits."""
    upstream, grad_logits = grads
    programs, arguments = over_pixels(losses, "backward", logits, target, grad_logits)
    tile, reduced = arguments["TILE"], walk.reduction != "none"
    arguments |= {
        "upstream_strides": (0, 0, 0) if reduced else upstream.stride(),
        "logits_strides": in_grains(logits, tile),
        "target_strides": in_grains(target, tile),
        "grad_strides": in_grains(grad_logits, tile),
        "REDUCED": reduced,
        **labels_of(losses, logits, target, walk.ignore_index),
    }
    aligned = tile.grain > 1 and (reduced or is_aligned(upstream))
    return Way(_pixelwise_backward_kernel, programs, arguments, aligned)


# --- configurations -------------------------------------------------------------------------------


def pixel_heuristic(losses: Sequence[Loss], direction: str, logits: torch.Tensor) -> Configuration:
    """A configuration that is always valid: two or four pixels per lane."""
    warps, classes = 4, logits.size(1)
    forward = direction == "forward"
    most = min(loss.unroll for loss in losses)
    held = max(loss.held if forward else loss.held_back for loss in losses)
    if _classes_in_lanes(logits):
        # Every lane of a pixel repeats what is done once per pixel: few classes get few lanes.
        lanes = 8 if classes > 32 else min(4, triton.next_power_of_2(classes))
        slots = triton.cdiv(classes, lanes)
        # Every value has an address of its own, in registers of its own.
        pixels = 4 if slots <= 8 else 2
        unroll = most if forward else 4 if lanes == 8 else 8
    else:
        lanes, slots = 1, classes
        wide = max(loss.held_wide for loss in losses)
        if len(losses) > 2 or (forward and architecture() >= PAIRS):
            wide = min(wide, _WIDE)
        pixels, unroll = 2 if wide < slots <= held else 4, most if forward else 8
    return {
        "PIXELS": pixels * warps * warp_size() // lanes,
        "CLASS_LANES": lanes,
        "UNROLL": held if slots <= held else unroll,
        "num_warps": warps,
    }


def over_pixels(
    losses: Sequence[Loss],
    direction: str,
    logits: torch.Tensor,
    target: torch.Tensor,
    *grads: torch.Tensor,
    name: str | None = None,
    heuristic: Configuration | None = None,
    few: bool = False,
) -> tuple[int, dict[str, Any]]:
    """(programs, arguments) of a kernel that goes through all pixels of ``logits``.

    ``name`` and ``heuristic`` are for kernels that have configurations of their own. With ``few``
    pixels lie in whole grains of 4, or anywhere: every other way would be another kernel to
    compile.
    """
    name = name or (losses[0].name if len(losses) == 1 else "weighted_sum")
    in_lanes = _classes_in_lanes(logits) and all(grad.stride(1) == 1 for grad in grads)
    is_contiguous = not in_lanes and _is_flat(False, logits, target, *grads)
    configuration = launch_configuration(
        f"{name}_{direction}",
        device=logits.device,
        dtype=logits.dtype,
        classes=logits.size(1),
        window=1,
        layout="channels_last" if in_lanes else "contiguous" if is_contiguous else "strided",
        heuristic=heuristic or pixel_heuristic(losses, direction, logits),
    )
    warps, lanes = int(configuration["num_warps"]), int(configuration["CLASS_LANES"])
    # No more lanes than a bundle has classes, so that a slot is within one bundle.
    pixels, lanes = int(configuration["PIXELS"]), min(lanes, _LAST_BUNDLE) if in_lanes else 1
    flat = is_contiguous if lanes == 1 else _is_flat(True, logits, target, *grads)
    grain = 1
    if lanes == 1:
        per_lane = max(pixels // (warps * warp_size()), 1)
        grain = _grain(per_lane, logits, target, *grads) if flat else 1
        if few and grain < 4:
            grain, flat = 1, False
        # Without whole aligned grains a lane's neighbouring pixels would be moved one by one. Every
        # such move would touch as many cache lines as if the pixels were apart: one pixel per lane
        # is better.
        pixels = pixels if grain > 1 else min(pixels, warps * warp_size())
    size = logits.size(2) * logits.size(3)
    classes = logits.size(1)
    unroll = min(int(configuration["UNROLL"]), triton.cdiv(classes, lanes))
    step = unroll * lanes
    double = logits.dtype == torch.float64
    tiles = triton.cdiv(size, pixels)
    return logits.size(0) * tiles, {
        "pixels": size // grain,
        "width": logits.size(3),
        "tiles": tiles,
        "full": (classes - 1) // step * step,
        "TILE": Tile(
            pixels, lanes, unroll, grain, flat, classes, double, *_bundles(logits, lanes, unroll)
        ),
        "num_warps": warps,
        "enable_fp_fusion": True,
    }


def _classes_in_lanes(logits: torch.Tensor) -> bool:
    """Whether neighbouring addresses are classes, so that neighbouring lanes should be too."""
    return logits.size(1) > 1 and logits.stride(1) == 1 and logits.stride(3) != 1


def _bundles(logits: torch.Tensor, lanes: int, unroll: int) -> tuple[int, int]:
    """(classes of a bundle, slots of any block that are in one bundle).

    256 classes make at most 32 bundles, whose numbers take five bits. In the forward pass a bundle
    costs two instructions. In the backward pass all classes of one bundle are read once more, which
    costs less where lanes share them.
    """
    classes = logits.size(1)
    bundle = _LAST_BUNDLE if _classes_in_lanes(logits) else 8 if classes > 64 else 4
    slots = bundle // lanes
    aligned = unroll * lanes >= classes or unroll % slots == 0 or slots % unroll == 0
    return bundle, slots if aligned else 1


def _is_flat(
    in_lanes: bool, logits: torch.Tensor, target: torch.Tensor, *maps: torch.Tensor
) -> bool:
    """Whether the pixels of every map lie at even distances, and side by side unless in_lanes."""
    width = logits.size(3)
    if target.stride(2) != 1 or target.stride(1) != width:
        return False
    for tensor in (logits, *maps):
        if tensor.stride(2) != width * tensor.stride(3):
            return False
        if not in_lanes and tensor.stride(3) != 1:
            return False
    return True


def _grain(per_lane: int, *maps: torch.Tensor) -> int:
    """How many neighbouring pixels of flat maps are moved at once: 1, 2 or 4, up to per_lane."""
    grain = min(per_lane, 4) if all(is_aligned(tensor) for tensor in maps) else 1
    while grain > 1:
        strides = [stride for tensor in maps for stride in tensor.stride()[:-2]]
        size = maps[0].size(2) * maps[0].size(3)
        if size % grain == 0 and all(stride % grain == 0 for stride in strides):
            return grain
        grain //= 2
    return 1


def rounds_of(tiles: int) -> int:
    """How many tiles a program goes through that adds up what it finds before it leaves it."""
    return min(max(tiles // PROGRAMS, 1), _MOST_ROUNDS)


def in_grains(tensor: torch.Tensor, tile: Tile) -> tuple[int, ...]:
    """The tensor's strides as the kernels take them: outer ones in units of the grain."""
    if tile.grain == 1:
        return tensor.stride()
    outer = tensor.dim() - 2
    return (*(s // tile.grain for s in tensor.stride()[:outer]), *tensor.stride()[outer:])
