"""Cases, bytes and goals of cross entropy, binary cross entropy and the focal loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import kernels_reference
from perf.operations.contract import (
    SHAPES,
    Case,
    CodeGoal,
    Floor,
    Goal,
    KernelNotes,
    Operation,
    Outputs,
    UnknownCaseError,
    random_labels,
    random_map,
    variations,
)
from tritonloss import functional
from tritonloss.pixelwise import losses as kernels
from tritonloss.pixelwise.kernels import Options


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Logits [N, C, H, W] and labels [N, H, W]."""
    return random_map(case, device), random_labels(case, device)


def launch(name: str) -> Callable[[Case, tuple[Tensor, ...]], None]:
    """Forward and backward launchers of one of the losses."""

    def launched(case: Case, tensors: tuple[Tensor, ...]) -> None:
        logits, target = tensors
        options = Options(
            weighted=False,
            smoothing=case.options.get("label_smoothing", 0.0),
            gamma=case.options.get("gamma", 2.0),
            detached=False,
        )
        reduction = case.options.get("reduction", "mean")
        results = kernels._pixelwise_forward(
            name, logits, target, None, options, reduction, 255, save=True
        )
        upstream = torch.empty_like(results.loss)
        kernels._pixelwise_backward(name, upstream, results, logits, target, None, options, 255)

    return launched


def floor(case: Case) -> Floor:
    """Forward reads logits and labels: L + T. Backward also writes the gradient: 2 L + T."""
    logits = case.shape.elements * case.torch_dtype.itemsize
    labels = case.shape.pixels * getattr(torch, str(case.labels)).itemsize
    return Floor(forward=logits + labels, backward=2 * logits + labels)


def outputs(constants: Mapping[str, Any]) -> float:
    """Values of pixels and classes that a thread completes in one round over a block of classes."""
    return float(
        constants["TILE.pixels"]
        * constants["TILE.lanes"]
        * constants["TILE.unroll"]
        / constants["THREADS"]
    )


def torch_cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """PyTorch's own, which takes labels in int64 only: the conversion is part of its price."""
    narrow = logits.dtype in (torch.float16, torch.bfloat16)
    loss = torch_functional.cross_entropy(
        logits.float() if narrow and logits.device.type == "cpu" else logits,
        target.long(),
        ignore_index=255,
        **options,
    )
    return loss.float() if narrow else loss


def torch_binary_cross_entropy() -> Callable[..., Outputs]:
    """PyTorch's own on one-hot labels; it knows no ignored pixels, so they are selected away."""

    def binary_cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        if options or logits.size(1) == 1:
            raise UnknownCaseError("one-hot labels of several classes, mean over valid pixels only")
        valid = target != 255
        label = torch.where(valid, target, 0).long()
        one_hot = torch_functional.one_hot(label, logits.size(1)).movedim(-1, 1).to(logits)
        loss = torch_functional.binary_cross_entropy_with_logits(
            logits, one_hot, reduction="none"
        ).sum(1, dtype=torch.float32)
        return torch.where(valid, loss, 0).sum() / valid.sum()

    return binary_cross_entropy


_SHAPES = ("cityscapes", "ade20k", "coco-stuff")
BASE = Case(SHAPES["ade20k"], labels="uint8", against_compile=True)
CASES = variations(
    BASE,
    *({"shape": SHAPES[name]} for name in _SHAPES if name != "ade20k"),
    *({"shape": SHAPES[name], "dtype": "bfloat16"} for name in _SHAPES),
    *({"shape": SHAPES[name], "layout": "channels_last"} for name in _SHAPES),
    *({"shape": SHAPES[name], "layout": "channels_last", "dtype": "bfloat16"} for name in _SHAPES),
    {"shape": SHAPES["voc"], "against_compile": False},
    {"shape": SHAPES["cityscapes"], "labels": "int64", "against_compile": False},
)
BINARY = replace(BASE, shape=SHAPES["binary"], against_compile=False)

_ONCE = {"everywhere": False, "against_compile": False}
SHIPPED = variations(
    replace(BASE, everywhere=True, against_compile=False),
    {"layout": "channels_last"},
    {"shape": SHAPES["cityscapes"], **_ONCE},
    {"dtype": "bfloat16", **_ONCE},
    {"dtype": "bfloat16", "layout": "channels_last", **_ONCE},
    {"shape": SHAPES["cityscapes"], "layout": "channels_last", **_ONCE},
    {"shape": SHAPES["voc"], **_ONCE},
)
# What changes the code around the loss, whatever the loss.
AROUND = variations(
    replace(SHIPPED[0], everywhere=False),
    {"dtype": "float16"},
    {"layout": "strided"},
    {"labels": "int64"},
    {"options": {"reduction": "none"}},
    {"shape": replace(SHAPES["ade20k"], name="thousand", classes=1000)},  # more than a uint8 holds
    {"options": {"label_smoothing": 0.1}},
    {"options": {"label_smoothing": 0.1}, "layout": "channels_last"},
)[1:]


def _goals(words: str, float32: float, bfloat16: float) -> tuple[Goal, ...]:
    """Shares of the copy bandwidth in both layouts."""
    return tuple(
        Goal(
            f"{words}, {case.shape.name}, {case.dtype}, {case.layout}: share of the copy bandwidth",
            case,
            "share_of_copy",
            at_least=float32 if case.dtype == "float32" else bfloat16,
        )
        for case in CASES
        if case.against_compile
    )


def _code_goals(
    words: str, contiguous: tuple[float, float], channels_last: tuple[float, float]
) -> tuple[CodeGoal, ...]:
    """Instructions per pixel and class in the loop over blocks of classes: forward, backward."""
    return tuple(
        CodeGoal(
            text=f"{words}, {direction}, {case.layout}: instructions per pixel and class",
            case=case,
            kernel=f"_pixelwise_{direction}_kernel",
            loop="classes",
            at_most=instructions,
        )
        for case, limits in zip(SHIPPED[:2], (contiguous, channels_last), strict=True)
        for direction, instructions in zip(("forward", "backward"), limits, strict=True)
    )


# Limits of the loops. Contiguous: the instructions of the prototypes (6.2 and 10.0; 10.4 and 12.8)
# and, going forward, one for the difference to the largest logit, without which large logits would
# lose their digits, or two for leaving out the own class, without which confident pixels would.
# channels_last, of which there was no prototype: the first that shipped, and a twentieth.
_SOFTMAX_CODE = ((7.2, 10.0), (9.0, 12.4))
_SIGMOID_CODE = ((12.4, 12.8), (13.7, 15.5))

CROSS_ENTROPY_CASES = tuple(
    replace(case, against_compile=True)
    for case in (*CASES, replace(BASE, options={"label_smoothing": 0.1}))
)
# Eager is torch's own, and torch.compile works on that: the faster of the two is to be matched.
_AGAINST_TORCH = tuple(
    Goal(f"Cross entropy, {case.text}: speed against {rival}", case, column, at_least=1.0)
    for case in CROSS_ENTROPY_CASES
    for rival, column in (
        ("torch.nn.functional", "speedup_vs_eager"),
        ("torch.compile", "speedup_vs_compile"),
    )
)


_EXTRA = (BASE.shape.elements * 4 + 8 * BASE.shape.pixels) * 1.001 / 2**20
_MEMORY = Goal(
    "Cross entropy: extra MiB, the gradient and 8 bytes per pixel",
    CASES[0],
    "peak_delta_MiB",
    at_most=_EXTRA,
)
_CLASSES = KernelNotes(outputs, ("classes",))
KERNELS = {"_pixelwise_forward_kernel": _CLASSES, "_pixelwise_backward_kernel": _CLASSES}

OPERATIONS = (
    Operation(
        name="cross_entropy",
        function=functional.cross_entropy,
        reference=torch_cross_entropy,
        inputs=inputs,
        launch=launch("cross_entropy"),
        floor=floor,
        cases=CROSS_ENTROPY_CASES,
        shipped=(*SHIPPED, *AROUND),
        kernels=KERNELS,
        operators=("cross_entropy_forward", "cross_entropy_backward"),
        goals=(
            *_goals("Cross entropy", 0.75, 0.65),
            *_AGAINST_TORCH,
            _MEMORY,
            *_code_goals("Cross entropy", *_SOFTMAX_CODE),
        ),
        libraries={"log_softmax": lambda: kernels_reference.cross_entropy},
    ),
    Operation(
        name="binary_cross_entropy",
        function=functional.binary_cross_entropy,
        reference=kernels_reference.binary_cross_entropy,
        inputs=inputs,
        launch=launch("binary_cross_entropy"),
        floor=floor,
        cases=(*CASES, BINARY),
        shipped=(*SHIPPED, replace(BINARY, everywhere=False)),
        kernels=KERNELS,
        operators=("binary_cross_entropy_forward", "binary_cross_entropy_backward"),
        goals=(
            *_goals("Binary cross entropy", 0.75, 0.65),
            *_code_goals("Binary cross entropy", *_SIGMOID_CODE),
        ),
        libraries={"torch": torch_binary_cross_entropy},
    ),
    Operation(
        name="focal_loss",
        function=functional.focal_loss,
        reference=kernels_reference.focal_loss,
        inputs=inputs,
        launch=launch("focal"),
        floor=floor,
        cases=tuple(replace(case, against_compile=False) for case in CASES[:4]),
        shipped=SHIPPED[:3],
        kernels=KERNELS,
        operators=("focal_forward", "focal_backward"),
        goals=_code_goals("Focal loss", *_SOFTMAX_CODE),
    ),
)
