"""Cases, bytes and goals of cross entropy, binary cross entropy and the focal loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import kernels_reference
from perf.cases import (
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
from tritonloss import pixelwise as kernels
from tritonloss._pixelwise_kernels import Options


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Logits [N, C, H, W] and labels [N, H, W]; of one class, labels 0 and 1."""
    labels = random_labels(replace(case, shape=replace(case.shape, classes=2)), device)
    if case.shape.classes > 1:
        labels = random_labels(case, device)
    return random_map(case, device), labels


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


def torch_cross_entropy() -> Callable[..., Outputs]:
    """PyTorch's own, which takes labels in int64 only: the conversion is part of its price."""

    def cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        return torch_functional.cross_entropy(
            logits.float() if logits.device.type == "cpu" else logits,
            target.long(),
            ignore_index=255,
            **options,
        ).float()

    return cross_entropy


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


def _goals(words: str, float32: float, bfloat16: float, compiled: float | None) -> tuple[Goal, ...]:
    """Shares of the copy bandwidth in both layouts, and the speed against torch.compile."""
    goals = [
        Goal(
            f"{words}, {case.shape.name}, {case.dtype}, {case.layout}: share of the copy bandwidth",
            case,
            "share_of_copy",
            at_least=float32 if case.dtype == "float32" else bfloat16,
        )
        for case in CASES
        if case.against_compile
    ]
    if compiled is not None:
        goals += [
            Goal(
                f"{words}, {case.text}: speed against torch.compile",
                case,
                "speedup_vs_compile",
                at_least=compiled,
            )
            for case in CASES
            if case.against_compile
        ]
    return tuple(goals)


def _code_goals(words: str, forward: float, backward: float) -> tuple[CodeGoal, ...]:
    """Instructions per pixel and class in the loop over blocks of classes."""
    return tuple(
        CodeGoal(
            text=f"{words}, {direction}: instructions per pixel and class",
            case=SHIPPED[0],
            kernel=f"_pixelwise_{direction}_kernel",
            loop="classes",
            at_most=instructions,
        )
        for direction, instructions in (("forward", forward), ("backward", backward))
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
        reference=kernels_reference.cross_entropy,
        inputs=inputs,
        launch=launch("cross_entropy"),
        floor=floor,
        cases=(
            *CASES,
            replace(BASE, options={"label_smoothing": 0.1}, against_compile=False),
        ),
        shipped=(*SHIPPED, *AROUND),
        kernels=KERNELS,
        operators=("cross_entropy_forward", "cross_entropy_backward"),
        # The instructions of the prototypes, and one for the difference to the largest logit,
        # without which large logits would lose their digits.
        goals=(
            *_goals("Cross entropy", 0.75, 0.65, compiled=1.0),
            _MEMORY,
            *_code_goals("Cross entropy", 7.5, 11.0),
        ),
        libraries={"torch": torch_cross_entropy},
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
            *_goals("Binary cross entropy", 0.75, 0.65, compiled=None),
            *_code_goals("Binary cross entropy", 13.0, 13.0),
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
        goals=_code_goals("Focal loss", 7.5, 11.0),
    ),
)
