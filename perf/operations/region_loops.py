"""How to read the machine code of the kernels of region mutual information."""

from __future__ import annotations

from perf.operations.contract import Given, KernelNotes, LoopNotes, share_of_the_map
from tritonloss.regions.lag_sums import RUN
from tritonloss.regions.pooling_kernels import FACTORS


def _lanes(given: Given) -> float:
    return float(given["LANES"] / given["THREADS"])


def _pixels(given: Given) -> float:
    """Pixels of a strip of rows, per thread."""
    return _lanes(given) * given["ROWS"]


def _area(given: Given) -> float:
    return float(given["REGION"] ** 2)


def _classes(given: Given) -> float:
    """Classes of a program: the third axis of the grid shares them out."""
    return float(given["channels"] / given["GRID.2"])


def _cells(given: Given) -> float:
    """Full-resolution pixels and classes that a thread pools."""
    pixels = given["CELLS"] * given["SIZE"] * given["SIZE"]
    return float(pixels / given["THREADS"]) * _classes(given)


def _side(given: Given) -> float:
    """Lines of the frame along one direction."""
    return float(2 * (given["STRIP.region"] - 1))


def _strip_pixels(given: Given) -> float:
    """Pixels of a strip of the map, per thread."""
    lanes = given["STRIP.lanes"] / given["THREADS"]
    return float(lanes * given["STRIP.columns"] * given["STRIP.rows"])


def _passes(given: Given) -> int:
    """How many programs share a strip's lags."""
    return 1 if given["STRIP.region"] < 4 else 2


def _strip_halo(given: Given) -> float:
    """Rows that are read for each that is completed."""
    return 1 + 2 * (given["STRIP.region"] - 1) / given["STRIP.rows"]


def _frame_programs(given: Given) -> float:
    """Programs for one share of a plane's lags: one for each line, and one for the rest."""
    return 2 * _side(given) + given["STRIP.spare"] + 1


def _of_lines(given: Given) -> float:
    """Rounds along all lines of a plane, on average over its programs."""
    side = _side(given)
    left = (given["width"] - side) % (given["STRIP.spare"] + 1)
    pixels = side * (given["width"] - side) + (side + left) * (given["height"] - side)
    return float(pixels / given["STRIP.lanes"] / _frame_programs(given))


def _of_lags(given: Given) -> float:
    """Rounds through the lags of the core and the corners, on average over a plane's programs."""
    region = given["STRIP.region"]
    block = 32 if region < 4 else 8
    shares = region // given["STRIP.depth"]
    return (4 * region * (2 * region - 1) + 2) / (block * shares) / _frame_programs(given)


def _of_cells(given: Given) -> float:
    region, cells = given["REGION"], given["cells"]
    return float(region**2 + cells - (2 * region - 1) ** 2) if cells else 0.0


def _rows_at_once(given: Given) -> float:
    """Rows that a round of the lag sums is made of, as the kernel says."""
    is_pair = given["STRIP.columns"] == 4 and given["STRIP.region"] == 3
    return 2.0 if is_pair and not given["READING.centred"] else 1.0


def _rows_of_entropy(given: Given) -> float:
    return float(given["ROWS"] * given["parts"] / given["PROGRAMS"])


def _regions(given: Given) -> float:
    return float(given["window_rows"] * given["window_columns"])


_CLASSES = LoopNotes("classes", ".channel", _classes)
_HEAD = (
    LoopNotes("chunks", "_of_matrix", lambda g: 0.0 if g["cells"] else g["chunks"]),
    LoopNotes("cells", "_of_cells", _of_cells),
    LoopNotes("parts", "_store_loss", lambda g: g["parts"] / g["BLOCK"] / g["PROGRAMS"]),
    LoopNotes("elimination", ".k", _area),
)
KERNELS = {
    # per pixel and class of the maps that it reads
    "_rmi_lags_kernel": KernelNotes(
        lambda given: _strip_pixels(given) / _passes(given),
        (
            LoopNotes(
                "rows",
                "_add_core.i",
                lambda g: g["STRIP.rows"] / _passes(g),
                unroll=_rows_at_once,
            ),
            LoopNotes(
                "runs", "_add_core.first", lambda g: g["STRIP.rows"] / RUN.value / _passes(g)
            ),
            LoopNotes(
                "valid pixels",
                "_valid_of_core",
                lambda g: g["STRIP.rows"] * g["STRIP.columns"] / g["channels"] / _passes(g),
            ),
        ),
    ),
    "_rmi_interior_kernel": KernelNotes(
        _strip_pixels,
        (LoopNotes("rows", ".i", lambda g: g["STRIP.rows"] * _strip_halo(g), share=_strip_halo),),
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
    # The first programs add up the cross entropy, the others sample; here on average over all.
    "_rmi_sample_kernel": KernelNotes(
        share_of_the_map,
        (
            LoopNotes("rows", "_leave_entropy.i", _rows_of_entropy),
            LoopNotes(
                "blocks",
                "_leave_entropy.block",
                lambda g: _rows_of_entropy(g) * -(-g["channels"] // FACTORS.value),
            ),
            LoopNotes(
                "classes of pixels",
                "_leave_entropy.channel",
                lambda g: _rows_of_entropy(g) * g["channels"],
            ),
            LoopNotes(
                "classes", ".channel", lambda g: g["channels"] * (1 - g["parts"] / g["PROGRAMS"])
            ),
        ),
    ),
    "_rmi_sample_backward_kernel": KernelNotes(
        lambda given: _lanes(given) * given["channels"],
        (LoopNotes("classes", ".channel", lambda g: g["channels"]),),
    ),
    "_rmi_frame_kernel": KernelNotes(
        share_of_the_map,
        (
            LoopNotes("lines", "_add_line", _of_lines),
            LoopNotes("strips", "_core_sum", lambda g: _of_lags(g) * -(-g["strips"] // 16)),
            LoopNotes("lags", "_rmi_frame_kernel", _of_lags),
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
