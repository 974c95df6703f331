"""The launcher that finds each anchor's hardest negatives and positives."""

from __future__ import annotations

from typing import Any

import torch
import triton

from .._core.prepared_launch import PreparedLaunch, kind, prepared
from .selection_kernels import _digits_kernel, _narrow_kernel
from .tile_launch import Options, Pair, over_tiles

_BLOCK = 64


def launch_selection(
    pair: Pair, tensors: dict[str, Any], bounds: torch.Tensor, options: Options
) -> None:
    """Write the bounds [2, A]: the lowest score of negatives that count, the highest of positives.

    ``tensors`` are the pointers of the kernels over tiles.
    """
    arguments = over_tiles("hardest", pair, options)
    double = arguments["TILE"].double
    count, splits = len(pair.anchors), arguments["splits"]
    integer = torch.int64 if double else torch.int32
    counts = bounds.new_empty((2, splits, count, 16), dtype=torch.int32)
    places = bounds.new_empty((2, count), dtype=integer)
    ranks = bounds.new_empty((2, count), dtype=torch.int32)
    given = {name: tensor for name, tensor in tensors.items() if name != "bounds_ptr"}
    key = kind(pair.anchors), kind(pair.keys), pair.own, options
    first = 60 if double else 28
    for shift in range(first, -1, -4):

        def prepare_digits(shift: int = shift) -> PreparedLaunch:
            programs = 2 * arguments["tiles"] * splits
            digit = {"shift": shift, "first_shift": first}
            return PreparedLaunch(_digits_kernel, (programs,), {**arguments, **digit})

        def prepare_narrow(shift: int = shift) -> PreparedLaunch:
            constants = {
                "anchors": count,
                "splits": splits,
                "shift": shift,
                "first_shift": first,
                "SHARE": options.hardest,
                "DOUBLE": double,
                "BLOCK": _BLOCK,
                "num_warps": 4,
                "enable_fp_fusion": True,
            }
            programs = 2 * triton.cdiv(count, _BLOCK)
            return PreparedLaunch(_narrow_kernel, (programs,), constants, aligned=True)

        prepared(("contrast_digits", shift, *key), prepare_digits)(
            **given, places_ptr=places, counts_ptr=counts
        )
        prepared(("contrast_narrow", shift, *key), prepare_narrow)(
            counts_ptr=counts, places_ptr=places, ranks_ptr=ranks, bounds_ptr=bounds
        )
