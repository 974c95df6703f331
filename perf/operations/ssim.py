"""Cases, bytes and goals of SSIM: the loss on labels, and the similarity of two images."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_reference import ssim as ssim_reference
from kernels_reference import ssim_loss as ssim_loss_reference
from perf.operations import peers
from perf.operations.contract import (
    SHAPES,
    Case,
    CodeGoal,
    Floor,
    Given,
    Goal,
    KernelNotes,
    LoopNotes,
    Number,
    Operation,
    Shape,
    random_labels,
    random_map,
    rarely,
    share_of_the_map,
    variations,
)
from tritonloss import functional
from tritonloss.windows import ssim as images
from tritonloss.windows import ssim_loss as losses

IMAGES = Shape("images", 16, 3, 1024, 1024)
ODD_IMAGES = Shape("odd-images", 16, 3, 513, 513)


def loss_inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Logits [N, C, H, W] and labels [N, H, W]."""
    return random_map(case, device), random_labels(case, device)


def loss_launch(case: Case, tensors: tuple[Tensor, ...]) -> None:
    """Run the forward and backward launchers of the loss."""
    logits, target = tensors
    given = {"form": "full", "window_size": 11, "ignore_index": 255, **case.options}
    full = given["form"] == "full"
    options = losses.LossOptions(full, given["window_size"], 1.5, 1e-4, 9e-4, given["ignore_index"])
    loss, scale = losses._loss_forward(logits, target, options)
    losses._loss_backward(loss, scale, logits, target, options)


def loss_floor(case: Case) -> Floor:
    """Forward reads logits and labels: L + T. Backward also writes the gradient: 2 L + T."""
    logits = case.shape.elements * case.torch_dtype.itemsize
    labels = case.shape.pixels * getattr(torch, str(case.labels)).itemsize
    return Floor(forward=logits + labels, backward=2 * logits + labels)


def image_inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Two images in [0, 1], the second one the first with noise."""
    x = random_map(case, device, seed=0).sigmoid()
    noise = random_map(case, device, seed=1).mul_(0.05)
    return x, (x + noise).clamp_(0, 1)


def image_launch(case: Case, tensors: tuple[Tensor, ...]) -> None:
    """Run the forward and backward launchers for two images, with gradients to both."""
    x, y = tensors
    given = {"window_size": 11, "padding": "zeros", "reduction": "mean", **case.options}
    mapped = given["reduction"] == "none"
    options = images.ImageOptions(given["window_size"], 1.5, 1.0, given["padding"], mapped)
    result, scale = images._image_forward(x, y, options)
    images._image_backward(result, scale, x, y, True, options)


def image_floor(case: Case) -> Floor:
    """Forward reads both images, 2 L; backward reads both and writes both gradients, 4 L.

    The map of reduction "none" is written, and its gradient read, on top.
    """
    image = case.shape.elements * case.torch_dtype.itemsize
    similarity = 4 * case.shape.elements if case.options.get("reduction") == "none" else 0
    return Floor(forward=2 * image + similarity, backward=4 * image + similarity)


LOSS_BASE = Case(
    SHAPES["cityscapes"], labels="uint8", options={"window_size": 11}, against_compile=True
)
LOSS_CASES = variations(
    LOSS_BASE,
    {"options": {"window_size": 3}},
    *({"shape": SHAPES[name], "against_compile": False} for name in ("voc", "coco-stuff")),
    {"dtype": "bfloat16", "against_compile": False},
    {"options": {"window_size": 3, "form": "contrast_structure"}, "against_compile": False},
    {"options": {"window_size": 3}, "layout": "channels_last", "against_compile": False},
)
IMAGE_BASE = Case(IMAGES, options={"window_size": 11}, against_compile=True)
IMAGE_CASES = variations(
    IMAGE_BASE,
    {"options": {"padding": "valid"}, "against_compile": False},
    {"options": {"window_size": 3}, "against_compile": False},
    {"shape": ODD_IMAGES, "against_compile": False},
    {"options": {"window_size": 3, "reduction": "none"}, "against_compile": False},
    {"options": {"window_size": 3, "padding": "reflect"}, "against_compile": False},
    {"dtype": "bfloat16", "against_compile": False},
)

_WINDOWS = (5, 7, 9, 11, 15)
# One case for each way a kernel is built: every window, and what else changes the code.
LOSS_SHIPPED = variations(
    Case(SHAPES["cityscapes"], labels="uint8", options={"window_size": 3}, everywhere=True),
    {"options": {"window_size": 11}},
    *({"options": {"window_size": window}, "everywhere": False} for window in (1, 5, 7, 9, 15, 31)),
    *({"dtype": dtype, "everywhere": False} for dtype in ("bfloat16", "float16")),
    {"labels": "int64", "everywhere": False},
    *({"layout": layout, "everywhere": False} for layout in ("channels_last", "strided")),
    {"shape": SHAPES["voc"], "everywhere": False},
    {"options": {"form": "contrast_structure"}, "everywhere": False},
    {"options": {"window_size": 11}, "dtype": "bfloat16", "everywhere": False},
    {"dtype": "float64", "everywhere": False},
)
LOSS_RARE = rarely(
    LOSS_SHIPPED[0],
    *({"labels": "int64", "options": {"window_size": window}} for window in _WINDOWS),
    *({"dtype": "float64", "options": {"window_size": window}} for window in _WINDOWS),
    *({"labels": labels} for labels in ("int16", "int32")),
)
IMAGE_SHIPPED = variations(
    Case(IMAGES, options={"window_size": 3}, everywhere=True),
    {"options": {"window_size": 11}},
    *({"options": {"window_size": window}, "everywhere": False} for window in (5, 7, 9, 15, 31)),
    *({"dtype": dtype, "everywhere": False} for dtype in ("bfloat16", "float16")),
    *({"layout": layout, "everywhere": False} for layout in ("channels_last", "strided")),
    {"shape": ODD_IMAGES, "everywhere": False},
    *({"options": {"padding": padding}, "everywhere": False} for padding in ("reflect", "valid")),
    {"options": {"reduction": "none"}, "everywhere": False},
    {"options": {"window_size": 11, "reduction": "none"}, "everywhere": False},
    {"options": {"window_size": 11, "padding": "reflect"}, "everywhere": False},
    {"dtype": "float64", "everywhere": False},
)
IMAGE_RARE = rarely(
    IMAGE_SHIPPED[0],
    *({"dtype": "float64", "options": {"window_size": window}} for window in _WINDOWS),
)


def _goals(name: str, case: Case) -> tuple[Goal, ...]:
    """The goals that hold for every loss with a window."""
    return (
        Goal(f"{name}: share of the copy bandwidth", case, "share_of_copy", at_least=0.40),
        Goal(f"{name}: speed against eager", case, "speedup_vs_eager", at_least=10),
        Goal(f"{name}: speed against torch.compile", case, "speedup_vs_compile", at_least=2),
    )


def _outputs(given: Given) -> float:
    """Outputs of one thread of the forward kernel, where its tile lies within the map."""
    return float(given["STRIP.columns"] * given["rows"] * given["STRIP.lanes"] / given["THREADS"])


def _rows(given: Given) -> float:
    """Rows of a tile, and of the windows that begin above it."""
    return float(given["rows"] + given["WINDOW.size"] - 1)


def _coefficient_rows(given: Given) -> float:
    """Rows likewise of tiles of coefficients, on average over the programs going backward."""
    rows = given["out_rows"] + given["WINDOW.size"] - 1
    return float(rows * given["out_tiles"] * given["units"] / given["PROGRAMS"])


def _gradient_rows(given: Given) -> float:
    """Rows likewise of tiles of gradients, on average over the programs going backward."""
    return float(_rows(given) * given["tiles"] * given["units"] / given["PROGRAMS"])


def _unroll(given: Given) -> float:
    return float(given["STRIP.unroll"])


def _never(given: Given) -> float:
    """0: for waiting for other programs, and for what the last one alone does."""
    return 0.0


def _taps(within: str, rows: Number) -> LoopNotes:
    """Notes of a loop over a window's taps, which is not unrolled where a lane has one column."""
    taps = {".distance": lambda size: size // 2, ".step": lambda size: size}[within]
    return LoopNotes("taps", within, lambda given: rows(given) * taps(given["WINDOW.size"]))


_KERNELS = {
    "_ssim_forward_kernel": KernelNotes(
        _outputs, (LoopNotes("rows", ".i", _rows, unroll=_unroll), _taps(".distance", _rows))
    ),
    "_ssim_backward_kernel": KernelNotes(
        share_of_the_map,
        (
            LoopNotes("coefficients", "_store_coefficients.i", _coefficient_rows, unroll=_unroll),
            LoopNotes("gradients", "_store_gradients.i", _gradient_rows, unroll=_unroll),
            _taps(".distance", _coefficient_rows),
            _taps(".step", _gradient_rows),
            LoopNotes("waiting", "_wait_for", _never),
            LoopNotes("counters", "_put_back", _never),
        ),
    ),
}
# Instructions forward and backward. Of smaller windows those on the line from the loss of single
# pixels, which filters nothing, to a window of 11.
_MOST = {3: (80.4, 151.0), 5: (101.5, 193.3), 7: (122.7, 235.5), 11: (165.0, 320.0)}
_CODE_GOALS = tuple(
    CodeGoal(
        text=f"SSIM loss, window {case.options['window_size']}, {direction}: instructions",
        case=case,
        kernel=f"_ssim_{direction}_kernel",
        loop="total",
        at_most=most,
    )
    for case in (LOSS_SHIPPED[0], LOSS_SHIPPED[3], LOSS_SHIPPED[4], LOSS_SHIPPED[1])
    for direction, most in zip(
        ("forward", "backward"), _MOST[case.options["window_size"]], strict=True
    )
)
_OPERATORS = (
    "ssim_forward", "ssim_backward", "ssim_loss_backward", "ssim_careful_forward",
    "ssim_careful_backward",
)  # fmt: skip
OPERATIONS = (
    Operation(
        name="ssim_loss",
        function=functional.ssim_loss,
        reference=ssim_loss_reference,
        inputs=loss_inputs,
        launch=loss_launch,
        floor=loss_floor,
        cases=LOSS_CASES,
        shipped=(*LOSS_SHIPPED, *LOSS_RARE),
        kernels=_KERNELS,
        operators=_OPERATORS,
        goals=(
            *_goals("SSIM loss, window 11", LOSS_BASE),
            *_CODE_GOALS,
        ),
    ),
    Operation(
        name="ssim",
        function=functional.ssim,
        reference=ssim_reference,
        inputs=image_inputs,
        launch=image_launch,
        floor=image_floor,
        cases=IMAGE_CASES,
        shipped=(*IMAGE_SHIPPED, *IMAGE_RARE),
        kernels=_KERNELS,
        operators=_OPERATORS,
        goals=_goals("SSIM of images, window 11", IMAGE_BASE),
        libraries=peers.SSIM,
    ),
)
