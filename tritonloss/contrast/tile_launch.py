"""What all launchers over tiles of anchors and keys have in common."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver

from .._core import checks
from .._core.backend import INTERPRETED, architecture
from .._core.configurations import Configuration, launch_configuration
from .tiles import Tile

# Of the last one all passes are where only the hardest pairs count.
PASSES = ("negatives", "positives", "slopes", "hardest")
# Programs that a large GPU has work for: two for each of its processors. Of positives more, since
# most of what a program does is to wait for the classes of tiles that hold none. Of slopes one,
# each of which leaves a sum of the size of its anchors.
_PROGRAMS = {"negatives": 264, "positives": 1056, "slopes": 132, "hardest": 1056}
# The fewest tiles of keys that a program goes through, unless there are no more.
_TILES = 4


class Options(NamedTuple):
    """The options of the operator."""

    temperature: float = 0.1
    base_temperature: float = 0.07
    hardest: float | None = None
    precision: str = "tf32x3"
    ignore_index: int | None = checks.IGNORE_INDEX
    group: str | None = None  # a process group's name


class Pair(NamedTuple):
    """Anchors and keys as the kernels take them: of one dtype, with rows without gaps."""

    anchors: torch.Tensor
    keys: torch.Tensor
    own: bool  # whether the keys are the anchors


def tile_dtype(anchors: torch.Tensor, keys: torch.Tensor | None, precision: str) -> torch.dtype:
    """The dtype that anchors and keys are multiplied in."""
    dtype = anchors.dtype if keys is None else torch.promote_types(anchors.dtype, keys.dtype)
    return torch.bfloat16 if dtype == torch.float32 and precision == "bf16" else dtype


def pair_of(anchors: torch.Tensor, keys: torch.Tensor | None, options: Options) -> Pair:
    """Anchors and keys as the kernels take them."""
    dtype = tile_dtype(anchors, keys, options.precision)
    anchors = anchors.to(dtype)
    if INTERPRETED and dtype == torch.bfloat16:  # which the interpreter multiplies as integers
        anchors, keys = anchors.float(), None if keys is None else keys.float()
        dtype = anchors.dtype
    anchors = _in_rows(anchors)
    return Pair(anchors, anchors if keys is None else _in_rows(keys.to(dtype)), keys is None)


def _in_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix itself if its rows have no gaps, else a copy."""
    return matrix if matrix.stride(1) == 1 or matrix.size(1) == 1 else matrix.contiguous()


def heuristic(which: str, dims: int, dtype: torch.dtype, own: bool) -> Configuration:
    """A configuration that is always valid.

    Of 16 bits a tile has all dimensions, and its keys are read once. Of float32, whose products
    are made of several, it has some at a time: all would take more registers than there are.
    """
    if dtype == torch.float64:
        return _configuration(32, 32, 32, 32, 4, 1)
    if dtype == torch.float32:
        return _configuration(64, 32, 32, 128, 8, 2)
    if dims > 128 and which in ("slopes", "hardest") and _is_amd():
        return _configuration(64, 32, 64, 128, 8, 2)
    arch = architecture()
    if dims > 256:
        if 90 <= arch < 120 and not own:
            return _configuration(64, 32, 512, 512, 8, 2)
        return _configuration(64, 32, 64, 256, 8, 2)
    # From sm_100 to sm_110 narrow tiles take more registers than wide ones, on Triton 3.6.
    narrow = which in ("positives", "hardest") and not 100 <= arch < 120
    if own or narrow:
        return _configuration(64, 32, 256, 256, 8, 2)
    # Keys are read once for all anchors of a tile, which is what Hopper would wait for.
    return _configuration(128 if arch == 90 else 64, 64, 256, 256, 8, 2)


def _is_amd() -> bool:
    return not INTERPRETED and bool(driver.active.get_current_target().backend == "hip")


def _configuration(
    anchors: int, keys: int, depth: int, width: int, warps: int, stages: int
) -> Configuration:
    return {
        "ANCHORS": anchors,
        "KEYS": keys,
        "DEPTH": depth,
        "WIDTH": width,
        "num_warps": warps,
        "num_stages": stages,
    }


def over_tiles(which: str, pair: Pair, options: Options) -> dict[str, Any]:
    """Arguments of a pass over tiles of anchors and keys: one of PASSES.

    Among the hardest a score's last bit counts. There all passes have tiles of one size, in which
    a score has the same bits.
    """
    anchors, keys = pair.anchors, pair.keys
    programs = _PROGRAMS[which]
    if options.hardest is not None:
        which = "hardest"
    count, dims = anchors.shape
    configuration = launch_configuration(
        f"pixel_contrast_{which}",
        device=anchors.device,
        dtype=anchors.dtype,
        classes=dims,
        window=1,
        layout="own" if pair.own else "keys",
        heuristic=heuristic(which, dims, anchors.dtype, pair.own),
    )
    whole = triton.next_power_of_2(max(dims, 16))
    strides = anchors.stride(0), keys.stride(0)
    grain = math.gcd(*strides, 16 // anchors.element_size())
    tile = Tile(
        anchors=int(configuration["ANCHORS"]),
        keys=int(configuration["KEYS"]),
        dims=dims,
        depth=min(int(configuration["DEPTH"]), whole),
        width=min(int(configuration["WIDTH"]), whole),
        grain=grain,
        precision=_precision_on_target(),
        double=anchors.dtype == torch.float64,
        own=pair.own,
        hardest=options.hardest is not None,
    )
    tiles, across = triton.cdiv(count, tile.anchors), triton.cdiv(len(keys), tile.keys)
    return {
        "anchors_stride": strides[0] // grain,
        "keys_stride": strides[1] // grain,
        "anchors": count,
        "keys": len(keys),
        "tiles": tiles,
        "splits": max(min(programs // tiles, across // _TILES), 1),
        "scale": 1.0 / (math.log(2.0) * options.temperature),
        "TILE": tile,
        "num_warps": int(configuration["num_warps"]),
        "num_stages": int(configuration["num_stages"]),
        "enable_fp_fusion": True,
    }


def _precision_on_target() -> str:
    """How float32 is multiplied: on AMD's GPUs as it is, on NVIDIA's in three products of tf32."""
    return "ieee" if INTERPRETED or _is_amd() else "tf32x3"
