"""How strips are launched: configurations, programs, strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from .._core.backend import warp_size
from .._core.configurations import Configuration, launch_configuration
from .._core.prepared_launch import is_aligned
from . import planes
from .strips import LabelStrides, Strides, Strip


def channels_in_lanes(x: torch.Tensor) -> bool:
    """Whether neighbouring addresses are channels (channels_last): the lanes then run over them."""
    return x.size(1) > 1 and 0 < x.stride(1) < x.stride(3)


def strip_heuristic(columns: int, **extra: int | str) -> Configuration:
    """A configuration that is always valid; ``columns`` and ``extra`` are an operator's choice."""
    warps = 4
    return {
        "COLUMNS": columns,
        "LANES": warps * warp_size(),
        "ROWS": 64,
        "UNROLL": 1,
        "num_warps": warps,
        **extra,
    }


def strip_configuration(
    operator: str, x: torch.Tensor, window_size: int, heuristic: Configuration
) -> Configuration:
    """The launch configuration of a strip kernel for maps like x."""
    layout = "contiguous" if x.stride(-1) == 1 else "strided"
    return launch_configuration(
        operator,
        device=x.device,
        dtype=x.dtype,
        classes=x.size(1),
        window=window_size,
        layout="channels_last" if channels_in_lanes(x) else layout,
        heuristic=heuristic,
    )


def strip_candidates(heuristic: Configuration, **choices: Sequence[str]) -> list[Configuration]:
    """The heuristic and its neighbours, one setting changed at a time: what the tuner tries."""
    columns, rows = int(heuristic["COLUMNS"]), int(heuristic["ROWS"])
    lanes, warps = int(heuristic["LANES"]), int(heuristic["num_warps"])
    changes: list[Configuration] = [{"COLUMNS": other} for other in (1, 2, 4) if other != columns]
    changes += [{"ROWS": rows // 2}, {"ROWS": rows * 2}]
    changes += [{"LANES": lanes // 2, "num_warps": warps // 2}]
    changes += [{"LANES": lanes * 2, "num_warps": warps * 2}]
    changes += [{"UNROLL": 3 - int(heuristic["UNROLL"])}]
    changes += [{name: value} for name, values in choices.items() for value in values]
    candidates = [heuristic]
    candidates += [{**heuristic, **change} for change in changes]
    return [c for i, c in enumerate(candidates) if c not in candidates[:i]]


def strip_launch(
    shape: torch.Size,
    configuration: Configuration,
    padding: str,
    *maps: torch.Tensor,
    fitting: Sequence[int] = (),
) -> tuple[tuple[int], dict[str, Any]]:
    """(grid, arguments) of a kernel that covers maps of ``shape`` [N, C, H, W] with strips.

    ``maps`` are all tensors that it loads or stores. The first decides whether lanes are channels.
    Programs have fewer warps than they are configured for wherever that leaves far fewer lanes
    beyond the last column. ``fitting`` are the lanes that a row takes, of each of the maps whose
    programs are to have as many; by default of these alone.
    """
    images, channels, height, width = shape
    columns, rows = int(configuration["COLUMNS"]), int(configuration["ROWS"])
    in_lanes = channels_in_lanes(maps[0])
    needed = lanes_of_row(shape, columns, in_lanes)
    lanes, warps = _fitted(configuration, *(fitting or (needed,)))

    # Mirrored columns are loaded one by one, which makes the code long enough without unrolling.
    mirrored = padding in ("reflect", "replicate")
    grain = 1 if mirrored else grain_of(columns, *maps)
    shifted = grain == 1 < columns and all(tensor.stride(-1) == 1 for tensor in maps)
    unroll = 1 if mirrored else int(configuration["UNROLL"])
    tiles_x, tiles_y = triton.cdiv(needed, lanes), triton.cdiv(height, rows)
    return (images * tiles_x * tiles_y * (1 if in_lanes else channels),), {
        "channels": channels,
        "tiles_x": tiles_x,
        "tiles_y": tiles_y,
        "STRIP": Strip(columns, lanes, rows, unroll, grain, in_lanes, shifted),
        "num_warps": warps,
        "enable_fp_fusion": True,
    }


def lanes_of_row(shape: torch.Size, columns: int, in_lanes: bool) -> int:
    """How many lanes a row takes, of all channels if lanes run over those."""
    chunks = int(triton.cdiv(shape[3], columns))
    return chunks * shape[1] if in_lanes else chunks


def _fitted(configuration: Configuration, *needed: int) -> tuple[int, int]:
    """Lanes and warps of a program: those configured, or a quarter if that leaves far fewer idle.

    Of 129 lanes, a row of 513 columns, two programs of four warps would leave 127 idle. A third
    choice would be one more kernel to compile.
    """
    lanes, warps = int(configuration["LANES"]), int(configuration["num_warps"])
    quarters = (0, 2) if warps >= 4 else range(warps.bit_length())
    choices = [(lanes >> halvings, warps >> halvings) for halvings in quarters]
    totals = [sum(triton.cdiv(row, lanes) * lanes for row in needed) for lanes, _ in choices]
    return choices[next(i for i, total in enumerate(totals) if total * 16 <= min(totals) * 17)]


def strides(tensor: torch.Tensor, strip: Strip) -> Strides:
    """The strides of a map [N, C, H, W] as the kernels take them."""
    return Strides(*_in_grains(tensor, strip))


def label_strides(tensor: torch.Tensor, strip: Strip) -> LabelStrides:
    """The strides of a label map [N, H, W] as the kernels take them."""
    return LabelStrides(*_in_grains(tensor, strip))


def ignored_class(ignore_index: int | None, classes: int, dtype: torch.dtype) -> int:
    """The kernels' IGNORED, for losses of each class against the rest; see `sanitised_label`.

    For one class, whose labels are 0 and 1, it is -3 minus the number used otherwise, by which a
    kernel can tell.
    """
    if classes == 1:
        return -3 - planes.ignored_class(ignore_index, 2, dtype)
    return planes.ignored_class(ignore_index, classes, dtype)


def _in_grains(tensor: torch.Tensor, strip: Strip) -> tuple[int, ...]:
    """The tensor's strides, all but the last in units of the strip's grain."""
    return (*(stride // strip.grain for stride in tensor.stride()[:-1]), tensor.stride(-1))


def grain_of(columns: int, *maps: torch.Tensor) -> int:
    """``columns`` if every row of every map is made of whole aligned chunks, else 1."""
    for tensor in maps:
        if tensor.stride(-1) != 1 or tensor.size(-1) % columns or not is_aligned(tensor):
            return 1
        if any(stride % columns for stride in tensor.stride()[:-1]):
            return 1
    return columns
