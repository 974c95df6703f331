"""How to read the machine code of the kernels that interpolate logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from perf.operations import lovasz, neuro_iou, overlap
from perf.operations.contract import Given, KernelNotes, LoopNotes, share_of_the_map


def _blocks(given: Given) -> float:
    return float((given["TILE.classes"] - 1) // given["TILE.unroll"])


def _completed(given: Given) -> float:
    return _blocks(given) * given["TILE.unroll"] / given["TILE.classes"]


def _rows_of_cells(given: Given) -> float:
    return float(given["sizes.nodes"] + 1)


def _rows_of_pixels(given: Given) -> float:
    """As many as cells have on average. A warp with cells of two strips has the more of both."""
    return _rows_of_cells(given) * given["sizes.rows"] / (given["sizes.height"] + 1)


def _chunks(given: Given) -> float:
    return _rows_of_pixels(given) * given["CELLS.chunks"]


def class_loop(name: str, within: str = "_fold_blocks") -> LoopNotes:
    """Notes of a loop over blocks of classes, all but the last one."""
    return LoopNotes(name, within, _blocks, share=_completed)


def _tiles(given: Given) -> float:
    return float(given["rounds"])


_BACKWARD = KernelNotes(
    share_of_the_map,
    (
        LoopNotes("rows of cells", "_upsampled_backward_kernel.i", _rows_of_cells),
        LoopNotes("rows of pixels", "sums_of_cells._", _rows_of_pixels),
        LoopNotes("chunks of columns", "sums_of_cells.chunk", _chunks),
    ),
)
KERNELS = {
    "_upsampled_forward_kernel": KernelNotes(share_of_the_map, (class_loop("classes"),)),
    "_upsampled_backward_kernel": _BACKWARD,
}
TWO_PASSES = {
    "_upsampled_forward_kernel": KernelNotes(
        share_of_the_map, (class_loop("top two"), class_loop("penalties"))
    ),
    "_upsampled_backward_kernel": _BACKWARD,
}

OVERLAP_KERNELS = {
    "_class_cells_forward_kernel": KernelNotes(
        share_of_the_map,
        (class_loop("statistics"), class_loop("classes", "_class_cells_forward_kernel")),
    ),
    "_class_cells_held_kernel": KernelNotes(
        share_of_the_map,
        (
            LoopNotes("tiles", "_class_cells_held_kernel.i", _tiles),
            LoopNotes("rows", "_class_cells_held_kernel.k", lambda g: _tiles(g) * g["CELLS.rows"]),
        ),
    ),
    "_class_head_kernel": overlap.HEAD,
    "_class_cells_project_kernel": KernelNotes(
        share_of_the_map, (class_loop("classes", "_class_cells_project_kernel"),)
    ),
    "_upsampled_backward_kernel": _BACKWARD,
}


def _of_a_sort(kernels: Mapping[str, KernelNotes]) -> dict[str, KernelNotes]:
    """Those of the losses by a sort, which interpolates in memory: all but the histograms'."""
    return {name: notes for name, notes in kernels.items() if "histogram" not in name}


# Lovász: a histogram's program has several tiles.
LOVASZ_KERNELS = {
    **_of_a_sort(lovasz.KERNELS),
    "_cell_statistics_kernel": KernelNotes(
        share_of_the_map, (class_loop("classes"), lovasz.ATOMICS)
    ),
    "_cell_histogram_kernel": KernelNotes(
        share_of_the_map, (LoopNotes("tiles", "_cell_histogram_kernel.i", _tiles),)
    ),
    "_cell_project_kernel": KernelNotes(
        share_of_the_map, (class_loop("classes", "_cell_project_kernel"),)
    ),
    "_upsampled_backward_kernel": _BACKWARD,
}
LOVASZ_HINGE_KERNELS = {
    **_of_a_sort(lovasz.HINGE_KERNELS),
    "_cell_hinge_histogram_kernel": KernelNotes(
        share_of_the_map,
        (LoopNotes("tiles", "_cell_hinge_histogram_kernel.i", _tiles), lovasz.ATOMICS),
    ),
    "_upsampled_backward_kernel": _BACKWARD,
}

NEURO_KERNELS = {
    "_membership_cells_kernel": KernelNotes(
        share_of_the_map,
        (
            replace(class_loop("classes"), rounds=lambda given: _tiles(given) * _blocks(given)),
            *neuro_iou.OF_TILES,
            LoopNotes("tiles", "_membership_cells_kernel", _tiles),
            LoopNotes("tiles", "", _tiles),
        ),
    ),
    "_membership_project_kernel": KernelNotes(share_of_the_map),
    "_upsampled_backward_kernel": _BACKWARD,
}
