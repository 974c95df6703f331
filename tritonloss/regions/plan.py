"""The plan of a call: what it computes, on maps of which sizes and in which arithmetic.

A pass (``forward.py``, ``backward.py``) asks for its launches by ``of_kind``. It makes the plan and
then the launches, once for logits and labels of one kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from kernels_reference.region_mutual_information import pooled_size

from .._core.configurations import Configuration, launch_configuration
from .._core.prepared_launch import is_aligned, kind, prepared
from .._engine.planes import compute_dtype
from .._engine.strip_launch import ignored_class
from .features import Reading
from .lag_sums import Strip

# An image of at most so many regions and pixels is small: see is_small.
_FEW_REGIONS = 32 * 32
_FEW_PIXELS = 128 * 128
_few_regions = _FEW_REGIONS

# By region_size: the columns that a lane owns where maps are logits, as many as do not spill.
_SHARED_COLUMNS = {1: 4, 2: 4, 3: 4, 4: 2, 5: 1}

_T = TypeVar("_T")


class Options(NamedTuple):
    """The options of the loss, as they pass through the operators."""

    region_size: int
    pooling: str | None
    pool_size: int
    moments: str
    epsilon: float
    bce_weight: float
    ignore: str
    ignore_index: int | None
    precision: str | None
    bce_smooth: float = 0.0
    small: bool = False  # float64 from the logits to their gradient: see is_small
    group: str | None = None  # the name of a process group

    @property
    def pools(self) -> bool:
        """Whether cells of several pixels become one."""
        return self.pooling is not None and self.pool_size > 1

    @property
    def samples(self) -> bool:
        """Whether a cell is read at one place, by interpolation, and not as a whole."""
        return self.pools and self.pooling == "nearest"

    @property
    def side(self) -> int:
        """Side of a cell in pixels."""
        return self.pool_size if self.pools else 1

    @property
    def cell(self) -> int:
        """What the pooled maps are to be divided by: they hold sums for "avg"."""
        return self.pool_size**2 if self.pools and self.pooling == "avg" else 1

    @property
    def drops(self) -> bool:
        """Whether regions that touch an invalid pixel are left out."""
        return self.ignore == "drop"


class Plan(NamedTuple):
    """What follows from the options, and from dtypes and sizes of logits and labels."""

    options: Options
    images: int
    classes: int
    height: int
    width: int
    rows: int  # of the maps that regions are taken from
    columns: int
    has_maps: bool  # whether those maps are in memory; else they are the logits and the labels
    is_direct: bool  # whether the moments are of every product of every region; else lag sums
    arithmetic: torch.dtype  # of probabilities, maps and gradients on their way to the logits
    ignored: int  # the ignore label as the kernels take it

    @property
    def planes(self) -> int:
        """The number of all classes of all images."""
        return self.images * self.classes

    @property
    def map_shape(self) -> tuple[int, int, int, int]:
        return self.images, self.classes, self.rows, self.columns

    @property
    def mark_shape(self) -> tuple[int, ...]:
        """The shape of marks on cells, where regions that touch some are left out; else (0,)."""
        return (self.images, self.rows, self.columns) if self.options.drops else (0,)

    @property
    def region_rows(self) -> int:
        """The number of regions one below the other."""
        return self.rows - self.options.region_size + 1

    @property
    def region_columns(self) -> int:
        """The number of regions side by side."""
        return self.columns - self.options.region_size + 1

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """The shape of marks on the regions, where some are left out; else (0,)."""
        return (self.images, self.region_rows, self.region_columns) if self.options.drops else (0,)

    @property
    def side(self) -> int:
        """The side of a matrix of moments: residuals, labels, and a constant 1."""
        return 2 * self.options.region_size**2 + 1

    @property
    def weights_shape(self) -> tuple[int, int, int, int]:
        return self.images, self.classes, self.side, self.options.region_size**2

    @property
    def reading(self) -> Reading:
        """How the kernels read features."""
        return Reading(self.has_maps, -1 if self.has_maps else self.ignored)


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass."""

    statistics: torch.Tensor  # [1] float64: bce_weight / V
    residual: torch.Tensor  # [N, C, h, w], or empty: the regions are taken from the logits
    labels: torch.Tensor  # [N, C, h, w] float16, or empty
    kept: torch.Tensor  # [N, regions down, regions across] uint8, or empty: all
    weights: torch.Tensor  # [N, C, 2 d + 1, d] float64: for residuals, for labels, and constants


def of_kind(
    part: str,
    options: Options,
    logits: torch.Tensor,
    target: torch.Tensor,
    prepare: Callable[[Plan], _T],
) -> _T:
    """What ``prepare`` returns for the plan; called once for logits and labels of one kind."""
    key = (part, options, kind(logits), kind(target))
    return prepared(key, lambda: prepare(plan_of(options, logits, target)))


def plan_of(options: Options, logits: torch.Tensor, target: torch.Tensor) -> Plan:
    """The plan for such logits and labels."""
    images, classes, height, width = logits.shape
    rows, columns = pooled_size(height, width, options.pooling, options.pool_size)
    small = options.small
    return Plan(
        options=options,
        images=images,
        classes=classes,
        height=height,
        width=width,
        rows=rows,
        columns=columns,
        has_maps=options.pools or small,
        is_direct=options.drops or small,
        arithmetic=torch.float64 if small else compute_dtype(logits.dtype),
        ignored=ignored_class(options.ignore_index, classes, target.dtype),
    )


def is_small(options: Options, height: int, width: int) -> bool:
    """Whether an image of this size is to be float64 from its logits to their gradient.

    With few regions the covariance of the predictions would be singular without epsilon. Its
    inverse makes rounding errors of float32 up to 1 / epsilon times as large, and the gradient is
    what is left of sums that cancel. With more regions this ends; up to there float64 costs little.

    Maps without a core have no lag sums over it. That they are rare is why they are small too:
    kernels of their own would only be compiled.
    """
    rows, columns = pooled_size(height, width, options.pooling, options.pool_size)
    reach = options.region_size - 1
    chunk = 1 if options.pools else _SHARED_COLUMNS[options.region_size]
    has_core = rows > 2 * reach and columns >= 2 * reach + chunk
    few = (rows - reach) * (columns - reach) <= _few_regions
    return not has_core or (few and height * width <= _FEW_PIXELS)


@contextmanager
def kernels_of_large_images() -> Iterator[None]:
    """Let small images take the kernels of large ones, so that these can be tested on them."""
    global _few_regions
    _few_regions = 0
    try:
        yield
    finally:
        _few_regions = _FEW_REGIONS


# --- launch arguments -----------------------------------------------------------------------------


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """(image, class, row, column) strides; label maps have the class stride 0."""
    stride = tensor.stride()
    return stride if tensor.dim() == 4 else (stride[0], 0, stride[1], stride[2])


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides as of ``strides``, of a contiguous map of this shape that is not allocated yet."""
    height, width = shape[-2:]
    channels = shape[1] if len(shape) == 4 else 0
    return max(channels, 1) * height * width, height * width if channels else 0, width, 1


def is_flat(*maps: torch.Tensor) -> bool:
    """Whether the pixels of every row lie side by side."""
    return all(tensor.stride(-1) == 1 for tensor in maps)


def feature_arguments(plan: Plan, *maps: torch.Tensor) -> dict[str, Any]:
    """Launch arguments of a kernel that reads features, except the pointers.

    ``maps`` are the logits, the labels, and what is stored with the same walk.
    """
    logits, target = maps[:2]
    of_maps = contiguous_strides(plan.map_shape)
    return {
        "first_strides": of_maps if plan.has_maps else strides(logits),
        "second_strides": of_maps if plan.has_maps else strides(target),
        "channels": plan.classes,
        "READING": plan.reading._replace(flat=plan.has_maps or is_flat(*maps)),
        "enable_fp_fusion": True,
    }


def configuration_of(
    operator: str, plan: Plan, logits: torch.Tensor, window: int, **heuristic: int
) -> Configuration:
    """The launch configuration of an operator: a tuned one, or the heuristic as given."""
    return launch_configuration(
        operator,
        device=logits.device,
        dtype=logits.dtype if plan.arithmetic == torch.float32 else plan.arithmetic,
        classes=plan.classes,
        window=window,
        layout="contiguous" if logits.is_contiguous() else "strided",
        heuristic={"num_warps": 4, **heuristic},
    )


def core_strip(
    operator: str, plan: Plan, logits: torch.Tensor, target: torch.Tensor
) -> dict[str, Any]:
    """A program's strip and its warps, of "rmi_moments" or "rmi_gradient"."""
    region = plan.options.region_size
    columns, lanes = 1, 128
    if not plan.has_maps:
        columns = _SHARED_COLUMNS[region]  # of one lane share the sigmoids beside them
        operator, lanes = f"{operator}_of_logits", 32 if columns > 1 else 128
    elif operator == "rmi_moments" and region == 4:
        lanes = 256  # with 128, ptxas takes no more than 168 registers and spills two
    launch = configuration_of(
        operator, plan, logits, region, LANES=lanes, ROWS=64, num_warps=lanes // 32
    )
    lanes, rows = int(launch["LANES"]), int(launch["ROWS"])
    # Rows that begin anywhere are read one by one: to shift chunks would take 17 selections for 4
    # columns, and the loads that it spares are no bottleneck. The last lane of a row's gradient is
    # moved to the left, so as to end with the core.
    whole = operator.startswith("rmi_moments") or 2 * (region - 1) % columns == 0
    grain = columns if whole and _is_whole(columns, logits, target) else 1
    strip = Strip(region, region, columns, lanes, rows, columns - 1, grain)
    return {"STRIP": strip, "num_warps": int(launch["num_warps"])}


def _is_whole(columns: int, *maps: torch.Tensor) -> bool:
    """Whether every row is made of whole, aligned chunks of so many pixels."""
    return is_flat(*maps) and all(
        is_aligned(tensor)
        and all(size % columns == 0 for size in (tensor.size(-1), *tensor.stride()[:-1]))
        for tensor in maps
    )


def cells_and_warps(pool_size: int) -> tuple[int, int]:
    """(cells, warps) of a program.

    They are few, since padding makes one cell in a row more than fit evenly: 129 for 513 pixels.
    """
    warps = 2 if pool_size == 2 else 1  # a single one spills under Triton 3.6
    return max(warps * 128 // triton.next_power_of_2(pool_size), 1), warps


def cell_arguments(operator: str, plan: Plan, logits: torch.Tensor) -> dict[str, Any]:
    """Launch arguments of a kernel whose tiles are pooling cells."""
    size = plan.options.side
    cells, warps = cells_and_warps(size)
    maximum = plan.options.pools and plan.options.pooling == "max"
    if plan.arithmetic == torch.float64:
        cells = max(cells // (4 if maximum else 2), 1)  # twice as many would spill
    return {
        "cell_rows": triton.cdiv(plan.height + size // 2, size),
        "SIZE": size,
        "SIDE": triton.next_power_of_2(size),
        "MAXIMUM": maximum,
        **configuration_of(operator, plan, logits, size, CELLS=cells, num_warps=warps),
        "enable_fp_fusion": True,
    }


def cell_grid(images: int, classes: int, width: int, cells: dict[str, Any]) -> tuple[int, int, int]:
    """(rows of cells, blocks of cells, shares of classes); more shares where programs are few."""
    blocks = triton.cdiv(triton.cdiv(width + cells["SIZE"] // 2, cells["SIZE"]), cells["CELLS"])
    rows = images * cells["cell_rows"]
    return rows, blocks, min(classes, max(1, 4096 // (rows * blocks)))
