"""How to read the machine code of the kernels of region mutual information."""

from __future__ import annotations

from perf.operations.contract import Given, KernelNotes, LoopNotes, share_of_the_map
from tritonloss.regions.pooling_kernels import FACTORS


def _lanes(given: Given) -> float:
    return float(given["LANES"] / given["THREADS"])


def _pixels(given: Given) -> float:
    """Pixels of a strip of rows, per thread."""
    return _lanes(given) * given["ROWS"]


def _halo(given: Given) -> float:
    """Rows that are read for each that is completed."""
    return 1 + 2 * (given["REGION"] - 1) / given["ROWS"]


def _area(given: Given) -> float:
    return float(given["REGION"] ** 2)


def _classes(given: Given) -> float:
    """Classes of a program, where they are shared out along the third axis of the grid."""
    return float(given["channels"] / given["GRID.2"])


def _cells(given: Given) -> float:
    """Full-resolution pixels and classes that a thread pools."""
    pixels = given["CELLS"] * given["SIZE"] * given["SIZE"]
    return float(pixels / given["THREADS"]) * _classes(given)


def _blocks(size: float, given: Given) -> float:
    return -(-size // given["BLOCK"])


def _core(name: str, given: Given) -> float:
    return float(given[name] - 2 * (given["REGION"] - 1))


def _regions(given: Given) -> float:
    return float(given["window_rows"] * given["window_columns"])


_CLASSES = LoopNotes("classes", ".channel", _classes)
_HEAD = (
    LoopNotes("chunks", "_load_moments", lambda given: given["chunks"] - 1),
    LoopNotes("elimination", ".k", _area),
)
KERNELS = {
    # per pixel and class of the maps that it reads
    "_rmi_lags_kernel": KernelNotes(_pixels, (LoopNotes("rows", ".i", lambda g: g["ROWS"]),)),
    "_rmi_interior_kernel": KernelNotes(
        _pixels, (LoopNotes("rows", ".i", lambda g: g["ROWS"] * _halo(g), share=_halo),)
    ),
    # per pixel and class of the logits
    "_rmi_pool_kernel": KernelNotes(_cells, (_CLASSES,)),
    "_rmi_expand_kernel": KernelNotes(_cells, (_CLASSES,)),
    "_rmi_cross_entropy_kernel": KernelNotes(
        lambda given: _pixels(given) * given["channels"],
        (
            LoopNotes("rows", ".i", lambda g: g["ROWS"]),
            LoopNotes("blocks", ".block", lambda g: g["ROWS"] * -(-g["channels"] // FACTORS.value)),
            LoopNotes("classes", ".channel", lambda g: g["ROWS"] * g["channels"]),
        ),
    ),
    "_rmi_sample_kernel": KernelNotes(
        share_of_the_map, (LoopNotes("classes", ".channel", lambda g: g["channels"]),)
    ),
    "_rmi_sample_backward_kernel": KernelNotes(
        lambda given: _lanes(given) * given["channels"],
        (LoopNotes("classes", ".channel", lambda g: g["channels"]),),
    ),
    "_rmi_center_kernel": KernelNotes(share_of_the_map),
    "_rmi_frame_kernel": KernelNotes(
        share_of_the_map,
        (
            LoopNotes("parts", "_rmi_frame_kernel", lambda g: _blocks(g["parts"], g)),
            LoopNotes("frame rows", "_rmi_frame_kernel", lambda g: _blocks(_core("width", g), g)),
            LoopNotes(
                "frame columns", "_rmi_frame_kernel", lambda g: _blocks(_core("height", g), g)
            ),
        ),
    ),
    "_rmi_regions_kernel": KernelNotes(share_of_the_map),
    "_rmi_direct_moments_kernel": KernelNotes(
        share_of_the_map,
        (LoopNotes("regions", ".start", lambda g: _regions(g) / (g["chunks"] * g["BLOCK"])),),
    ),
    "_rmi_head_kernel": KernelNotes(share_of_the_map, _HEAD),
    "_rmi_taps_kernel": KernelNotes(share_of_the_map, (LoopNotes("places", ".place", _area),)),
    "_rmi_border_kernel": KernelNotes(
        share_of_the_map, (LoopNotes("taps", ".q", lambda g: (2 * g["REGION"] - 1) ** 2),)
    ),
    "_rmi_direct_gradient_kernel": KernelNotes(
        share_of_the_map,
        (
            LoopNotes("regions", ".own", _area),
            LoopNotes("places", ".other", lambda given: _area(given) ** 2),
        ),
    ),
}
