"""Cases, bytes and goals of pixel contrast with a memory's keys."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels_reference import pixel_contrast_loss as reference_of_pairs
from perf.operations.contract import (
    Case,
    CodeGoal,
    Floor,
    Given,
    Goal,
    KernelNotes,
    LoopNotes,
    Operation,
    Shape,
    rarely,
    share_of_the_map,
    variations,
)
from tritonloss import functional
from tritonloss.contrast.pixel_contrast import PIXEL_CONTRAST, Options
from tritonloss.contrast.tile_launch import PASSES

CLASSES = 19
_KEYS, _ANCHORS = 190000, 1024


class Anchors(Shape):
    """Anchors [batch, classes, height, width], of which the classes are the dimensions.

    The memory grows with them: 190 000 keys for 1024 anchors, and no more for more.
    """

    def reduced(self) -> Anchors:
        return replace(self, batch=self.batch // 16)

    def tiny(self) -> Anchors:
        return replace(self, batch=3, classes=min(self.classes, 5))


def _anchors(dims: int, count: int = _ANCHORS) -> Anchors:
    return Anchors(f"{count} anchors of {dims}", count, dims, 1, 1)


def number_of_keys(anchors: int) -> int:
    """How many keys there are beside so many anchors."""
    return min(_KEYS, _KEYS * anchors // _ANCHORS)


@functools.cache
def _keys(count: int, dims: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys of length 1 and their classes in order; they are no input, as they get no gradient."""
    classes = torch.arange(count, device=device) * CLASSES // max(count, 1)
    if device.type == "meta":
        return torch.empty(count, dims, dtype=dtype, device=device), classes
    generator = torch.Generator(device).manual_seed(2)
    values = torch.randn(count, dims, device=device, generator=generator)
    return F.normalize(values).to(dtype), classes


def keys_of(anchors: Tensor, own: bool) -> tuple[Tensor, Tensor] | tuple[()]:
    """Keys in the anchors' dtype, and their classes; none if the keys are the anchors."""
    if own:
        return ()
    rows, dims = anchors.shape
    return _keys(number_of_keys(rows), dims, anchors.dtype, anchors.device)


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Anchors of length 1, as a map, and their classes in order."""
    rows = case.shape.pixels
    anchors = torch.empty(case.shape.size, dtype=case.torch_dtype, device=device)
    labels = torch.arange(rows, device=device) * CLASSES // rows
    if device.type == "meta":
        return anchors, labels
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(case.shape.size, device=device, generator=generator)
    return F.normalize(values).to(case.torch_dtype), labels


def _rows(anchors: Tensor) -> Tensor:
    return anchors.movedim(1, -1).flatten(0, -2)


def loss(anchors: Tensor, labels: Tensor, own: bool = False, **options: Any) -> Tensor:
    """The loss with these keys."""
    rows = _rows(anchors)
    return functional.pixel_contrast_loss(rows, labels, *keys_of(rows, own), **options)


def reference(anchors: Tensor, labels: Tensor, own: bool = False, **options: Any) -> Tensor:
    """The reference with these keys."""
    rows = _rows(anchors)
    return reference_of_pairs(rows, labels, *keys_of(rows, own), **options)


def launch(case: Case, tensors: tuple[Tensor, ...]) -> None:
    """The launchers of both passes."""
    anchors, labels = tensors
    given = dict(case.options)
    keys = keys_of(_rows(anchors), given.pop("own", False)) or (None, None)
    if given.get("precision") == "bf16" and keys[0] is not None:
        keys = keys[0].to(torch.bfloat16), keys[1]
    PIXEL_CONTRAST.both_passes(_rows(anchors), labels, *keys, options=Options(**given))


def kept(case: Case) -> int:
    """Bytes of the keys and of their classes."""
    if case.options.get("own"):
        return 0
    keys = number_of_keys(case.shape.pixels)
    return keys * (case.shape.classes * case.torch_dtype.itemsize + 8)


def floor(case: Case) -> Floor:
    """Forward reads anchors, keys and classes; backward reads them and writes the gradient."""
    anchors = case.shape.elements * case.torch_dtype.itemsize
    read = anchors + 8 * case.shape.pixels + kept(case)
    return Floor(forward=read, backward=read + anchors)


def _pairs(given: Given) -> float:
    """The pairs that a thread of a pass goes through."""
    return float(given["TILE.anchors"] * given["keys"] / given["splits"] / given["THREADS"])


def _tiles(given: Given) -> float:
    return float(given["keys"] / given["splits"] / given["TILE.keys"])


def _slices(given: Given) -> float:
    """Slices of all tiles, where a tile has not all dimensions at once."""
    return _tiles(given) * float(-(-given["TILE.dims"] // given["TILE.depth"]))


def _over_tiles(kernel: str, *more: LoopNotes) -> KernelNotes:
    slices = LoopNotes("slices", "scores_of", _slices)
    # For sm_100 only the waiting in these loops has a place in the source. They may be those over
    # tiles or over slices: as many rounds as there are slices is what they make at the most.
    nowhere = LoopNotes("loops without a place", ".", _slices)
    return KernelNotes(_pairs, (slices, *more, LoopNotes("tiles", kernel, _tiles), nowhere))


def _over_parts(kernel: str) -> KernelNotes:
    return KernelNotes(
        share_of_the_map, (LoopNotes("parts", kernel, lambda given: float(given["splits"])),)
    )


_PARTS = LoopNotes("parts", "_log_sum", lambda given: float(given["parts"]))
KERNELS = {
    "_classes_kernel": KernelNotes(share_of_the_map),
    "_negatives_kernel": _over_tiles("_negatives_kernel"),
    "_positives_kernel": _over_tiles("_positives_kernel", _PARTS),
    "_slopes_kernel": _over_tiles("_slopes_kernel"),
    "_digits_kernel": _over_tiles("_digits_kernel"),
    **{k: _over_parts(k) for k in ("_statistics_kernel", "_gradient_kernel", "_narrow_kernel")},
}

_BASE = Case(_anchors(256), dtype="bfloat16")
# float32 through tiles of bfloat16 is not among them: it is wrong by what the docstring says, and a
# test holds it to that; here a case has to be as precise as its dtype.
CASES = variations(
    _BASE,
    {"dtype": "float32"},
    {"options": {"hardest": 0.1}},
    {"options": {"own": True}},
    {"dtype": "float32", "options": {"own": True}},
    {"shape": _anchors(512)},
    {"shape": _anchors(64)},
)
_ONCE = {"everywhere": False}
SHIPPED = (
    *variations(
        replace(_BASE, everywhere=True),
        {"dtype": "float32"},
        {"shape": _anchors(512)},
        {"options": {"own": True}},
        {"options": {"hardest": 0.1}},
        {"dtype": "float32", "options": {"own": True}},
        {"dtype": "float32", "options": {"hardest": 0.1}},
        {"dtype": "float32", "options": {"precision": "bf16"}, **_ONCE},
        {"dtype": "float16", **_ONCE},
        {"shape": _anchors(512), "options": {"own": True}, **_ONCE},
        {"shape": _anchors(100), **_ONCE},
        {"shape": _anchors(16), **_ONCE},
    ),
    *rarely(
        _BASE,
        {"shape": _anchors(128)},
        {"shape": _anchors(384)},
        {"shape": _anchors(7)},
        {"shape": _anchors(512), "options": {"hardest": 0.1}},
        {"dtype": "float32", "shape": _anchors(512)},
        {"dtype": "float32", "shape": _anchors(100)},
        {"dtype": "float64"},
        {"dtype": "float64", "options": {"own": True}},
        {"dtype": "float64", "options": {"hardest": 0.1}},
    ),
)
_SMALL = {"ANCHORS": 16, "KEYS": 32, "DEPTH": 16, "WIDTH": 32, "num_warps": 1, "num_stages": 1}
GOALS: tuple[Goal | CodeGoal, ...] = (
    Goal("Pixel contrast, H200: milliseconds of both passes, 0.5 + 0.9", CASES[0], "ms_p50",
         at_most=1.4),
    Goal("Pixel contrast: extra MiB", CASES[0], "peak_delta_MiB", at_most=20.0),
    # Of a tile of 128 x 64 pairs the first loop takes 1228 cycles to issue, and 1024 of the tensor
    # cores: these are 45 % of the sum. Of the second it is 1526 and 2048, 57 %. The goals are what
    # was first counted, and a twentieth.
    *(
        CodeGoal(f"Pixel contrast, {kernel}: instructions per pair", SHIPPED[0],
                 f"_{kernel}_kernel", "tiles", at_most=most)
        for kernel, most in (("negatives", 20.2), ("slopes", 25.0))
    ),
)  # fmt: skip

OPERATIONS = (
    Operation(
        name="pixel_contrast_loss",
        function=loss,
        reference=reference,
        inputs=inputs,
        launch=launch,
        floor=floor,
        cases=CASES,
        shipped=SHIPPED,
        kernels=KERNELS,
        operators=tuple(f"pixel_contrast_{which}" for which in PASSES),
        goals=GOALS,
        small_launch=_SMALL,
        kept=kept,
    ),
)
