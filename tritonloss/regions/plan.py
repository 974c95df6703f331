"""What the passes of region mutual information share: options, maps, launch configurations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton

from kernels_reference.region_mutual_information import pooled_size

from .._core.configurations import Configuration, launch_configuration
from .._engine.strips import compute_dtype, ignored_class
from .features import Reading

# See is_small.
_FEW_REGIONS = 32 * 32
_FEW_PIXELS = 128 * 128
_few_regions = _FEW_REGIONS


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

    @property
    def pools(self) -> bool:
        """Whether cells of several pixels become one."""
        return self.pooling is not None and self.pool_size > 1

    @property
    def samples(self) -> bool:
        """Whether a cell is read at a place, and not as a whole."""
        return self.pools and self.pooling == "nearest"

    @property
    def side(self) -> int:
        """Side of a cell in pixels."""
        return self.pool_size if self.pools else 1

    @property
    def cell(self) -> int:
        """By how much the pooled maps are to be divided: they hold sums for "avg"."""
        return self.pool_size**2 if self.pools and self.pooling == "avg" else 1


class Maps(NamedTuple):
    """What the regions are taken from: pooled maps, or the logits and the labels themselves."""

    first: torch.Tensor
    second: torch.Tensor
    ignored: int
    pooled: bool

    @property
    def height(self) -> int:
        return self.first.size(2)

    @property
    def width(self) -> int:
        return self.first.size(3)

    @property
    def arguments(self) -> dict[str, Any]:
        """The launch arguments of a kernel that reads them as features."""
        return {
            "first_ptr": self.first,
            "second_ptr": self.second,
            "first_strides": strides(self.first),
            "second_strides": strides(self.second),
            "channels": self.first.size(1),
            "READING": Reading(self.pooled, self.ignored),
            "enable_fp_fusion": True,
        }


class Part(NamedTuple):
    """Some of the images (axis 0) or of the classes (axis 1)."""

    axis: int
    start: int
    length: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.narrow(self.axis, self.start, self.length)


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass."""

    statistics: torch.Tensor  # [1]: bce_weight / V
    residual: torch.Tensor  # [N, C, h, w], or empty: not pooled
    labels: torch.Tensor  # [N, C, h, w] float16, or empty
    kept: torch.Tensor  # [N, regions down, regions across] uint8, or empty: all
    residual_weights: torch.Tensor  # [N, C, d, d] float64
    label_weights: torch.Tensor  # [N, C, d, d] float64
    constants: torch.Tensor  # [N, C, d] float64

    def of(self, part: Part) -> Saved:
        """The same of a part; of `kept` all classes of an image have the same."""
        kept = part.of(self.kept) if part.axis == 0 and self.kept.numel() else self.kept
        others = (part.of(tensor) for tensor in self[4:])
        return Saved(self.statistics, part.of(self.residual), part.of(self.labels), kept, *others)


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of batch, channel, row and column; label maps have the channel stride 0."""
    stride = tensor.stride()
    return stride if tensor.dim() == 4 else (stride[0], 0, stride[1], stride[2])


def maps_of(
    options: Options,
    logits: torch.Tensor,
    target: torch.Tensor,
    residual: torch.Tensor,
    labels: torch.Tensor,
) -> Maps:
    if residual.numel():
        return Maps(residual, labels, -1, True)
    return Maps(logits, target, ignored(options, logits, target), False)


def ignored(options: Options, logits: torch.Tensor, target: torch.Tensor) -> int:
    """The ignore label as the kernels take it."""
    return ignored_class(options.ignore_index, logits.size(1), target.dtype)


def is_small(options: Options, height: int, width: int) -> bool:
    """Whether an image of this size is float64 from its logits to their gradient.

    Of few regions the covariance of the predictions is singular but for epsilon: its inverse makes
    of float32's rounding errors up to 1 / epsilon of their size, and the gradient is what is left
    of sums that cancel. That passes with the number of regions, and float64 costs little till then.
    """
    rows, columns = pooled_size(height, width, options.pooling, options.pool_size)
    reach = options.region_size - 1
    few = (rows - reach) * (columns - reach) <= _few_regions
    return few and height * width <= _FEW_PIXELS


@contextmanager
def kernels_of_large_images() -> Iterator[None]:
    """Let small images take the kernels of large ones: for what tests those on small images."""
    global _few_regions
    _few_regions = 0
    try:
        yield
    finally:
        _few_regions = _FEW_REGIONS


def has_maps(options: Options, height: int, width: int) -> bool:
    """Whether the regions are taken from maps in memory; a small image has them in any case."""
    return options.pools or is_small(options, height, width)


def is_direct(options: Options, height: int, width: int) -> bool:
    """Whether the moments take every product of every region: no lag sums."""
    if options.ignore == "drop" or is_small(options, height, width):
        return True
    pooled = pooled_size(height, width, options.pooling, options.pool_size)
    return min(pooled) < 2 * options.region_size - 1


def arithmetic_dtype(options: Options, logits: torch.Tensor) -> torch.dtype:
    """The dtype of probabilities, pooled maps and gradients on their way to the logits."""
    if is_small(options, *logits.shape[2:]):
        return torch.float64
    return compute_dtype(logits.dtype)


def sums_in_double(options: Options, logits: torch.Tensor) -> bool:
    """Whether lag sums are float64: where the GPU is slow at that (1/64), they are float32.

    The data-centre GPUs of NVIDIA (8.0, 9.0, 10.0) and of AMD (gfx9) are fast.
    """
    if options.precision is not None or logits.device.type != "cuda":
        return options.precision != "float32"
    if torch.version.hip is not None:
        return "gfx9" in torch.cuda.get_device_properties(logits.device).gcnArchName
    return torch.cuda.get_device_capability(logits.device) in ((8, 0), (9, 0), (10, 0))


def launch_of(
    operator: str,
    logits: torch.Tensor,
    arithmetic: torch.dtype,
    window: int,
    *,
    num_warps: int = 4,
    **sizes: int,
) -> Configuration:
    """The launch configuration of an operator, tuned or else as given."""
    return launch_configuration(
        operator,
        device=logits.device,
        dtype=logits.dtype if arithmetic == torch.float32 else arithmetic,
        classes=logits.size(1),
        window=window,
        layout="contiguous" if logits.is_contiguous() else "strided",
        heuristic={**sizes, "num_warps": num_warps},
    )


def cells_and_warps(pool_size: int) -> tuple[int, int]:
    """How many cells a program takes.

    Few: padding makes one cell more in a row than fit evenly, 129 for 513 pixels.
    """
    warps = 2 if pool_size == 2 else 1  # a single one spills under Triton 3.6
    return max(warps * 128 // triton.next_power_of_2(pool_size), 1), warps


def cells_of(
    operator: str, options: Options, logits: torch.Tensor, arithmetic: torch.dtype
) -> dict[str, Any]:
    """Launch arguments of a kernel whose tiles are pooling cells."""
    size = options.side
    side = triton.next_power_of_2(size)
    cells, warps = cells_and_warps(size)
    if arithmetic == torch.float64:
        cells = max(cells // 2, 1)  # twice as many would spill
    launch = launch_of(operator, logits, arithmetic, size, CELLS=cells, num_warps=warps)
    return {
        "cell_rows": triton.cdiv(logits.size(2) + size // 2, size),
        "SIZE": size,
        "SIDE": side,
        "MAXIMUM": options.pools and options.pooling == "max",
        **launch,
        "enable_fp_fusion": True,
    }


def cell_grid(logits: torch.Tensor, cells: dict[str, Any]) -> tuple[int, int, int]:
    """(rows of cells, blocks of cells, shares of the classes): few programs share the classes."""
    batch, channels, _, width = logits.shape
    blocks = triton.cdiv(triton.cdiv(width + cells["SIZE"] // 2, cells["SIZE"]), cells["CELLS"])
    rows = batch * cells["cell_rows"]
    return rows, blocks, min(channels, max(1, 4096 // (rows * blocks)))
