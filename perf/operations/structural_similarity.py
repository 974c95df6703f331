"""Cases, bytes and goals of the structural similarity loss."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_reference import largest_difference, structural_difference
from kernels_reference import structural_similarity_loss as reference
from perf.operations.contract import (
    SHAPES,
    Case,
    CodeGoal,
    Floor,
    Given,
    Goal,
    KernelNotes,
    LoopNotes,
    Operation,
    random_labels,
    random_map,
    rarely,
    share_of_the_map,
    strip_loop,
    strip_loops,
    strip_outputs,
    variations,
)
from tritonloss import functional
from tritonloss.windows import structural_similarity_launch as kernels

_DEFAULTS = kernels.Options()


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Logits [N, C, H, W] and labels [N, H, W]."""
    return random_map(case, device), random_labels(case, device)


def launch(case: Case, tensors: tuple[Tensor, ...]) -> None:
    """Run the forward and backward launchers, in the schedule that the configuration asks for."""
    logits, target = tensors
    options = _DEFAULTS._replace(**case.options)
    options = options._replace(store=kernels.stores_differences(logits, options.window_size))
    loss, statistics, stored, found = kernels.forward_pass(logits, target, options)
    gradient_arguments = (loss, statistics, logits, target)
    if stored.dim() == logits.dim():
        kernels.stored_pass(*gradient_arguments, stored, options.ignore_index)
    else:
        kernels.backward_pass(*gradient_arguments, found, options)


def floor(case: Case) -> Floor:
    """Forward reads logits and labels: L + T. Backward also writes the gradient: 2 L + T."""
    logits = case.shape.elements * case.torch_dtype.itemsize
    labels = case.shape.pixels * getattr(torch, str(case.labels)).itemsize
    return Floor(forward=logits + labels, backward=2 * logits + labels)


def near_threshold(case: Case, tensors: tuple[Tensor, ...]) -> Tensor:
    """Pixels where e is so close to beta e_max that rounding decides whether they count."""
    options = _DEFAULTS._replace(**case.options)
    largest = largest_difference(options.window_size, options.sigma, options.stability)
    e = structural_difference(
        *tensors,
        window_size=options.window_size,
        sigma=options.sigma,
        stability=options.stability,
        padding=options.padding,
        ignore_index=options.ignore_index,
    )
    near = (e - options.beta * largest).abs() < 1e-4 * largest
    margin = (tensors[0].size(-1) - near.size(-1)) // 2  # padding "valid" leaves out a frame
    return torch.nn.functional.pad(near, (margin,) * 4)


BASE = Case(SHAPES["cityscapes"], labels="uint8", options={"window_size": 3}, against_compile=True)
CASES = variations(
    BASE,
    {"options": {"window_size": 11}},
    {"dtype": "bfloat16"},
    *(
        {"shape": SHAPES[name], "against_compile": False}
        for name in ("voc", "ade20k", "coco-stuff", "binary")
    ),
    {"labels": "int64", "against_compile": False},
    {"layout": "channels_last", "against_compile": False},
    *({"options": {"window_size": window}, "against_compile": False} for window in (5, 7)),
    # Both schedules where the choice between them is open.
    {"schedule": "stored", "against_compile": False},
    {"schedule": "recompute", "options": {"window_size": 11}, "against_compile": False},
)

# One case for each way a kernel is built: every window and schedule, and what else changes code.
SHIPPED = variations(
    Case(SHAPES["cityscapes"], labels="uint8", options={"window_size": 3}, everywhere=True),
    {"options": {"window_size": 11}},
    *({"options": {"window_size": window}, "everywhere": False} for window in (1, 5, 7, 9, 15, 31)),
    *({"dtype": dtype, "everywhere": False} for dtype in ("bfloat16", "float16")),
    {"labels": "int64", "everywhere": False},
    *({"layout": layout, "everywhere": False} for layout in ("channels_last", "strided")),
    # Rows that begin anywhere.
    *(
        {"shape": SHAPES["voc"], "options": {"window_size": window}, "everywhere": False}
        for window in (3, 7, 11)
    ),
    *(
        {"options": {"padding": padding}, "everywhere": False}
        for padding in ("reflect", "replicate", "valid")
    ),
    {"options": {"reweight": False}, "everywhere": False},
    {"schedule": "stored", "everywhere": False},
    *(
        {"schedule": "recompute", "options": {"window_size": window}, "everywhere": False}
        for window in (7, 11)
    ),
    {"options": {"window_size": 11}, "dtype": "bfloat16", "everywhere": False},
    {"dtype": "float64", "everywhere": False},
)
_WINDOWS = (5, 7, 9, 11, 15)
RARE = rarely(
    SHIPPED[0],
    *({"labels": "int64", "options": {"window_size": window}} for window in _WINDOWS),
    *({"dtype": "float64", "options": {"window_size": window}} for window in _WINDOWS),
    *(
        {"labels": "int64", "schedule": "recompute", "options": {"window_size": window}}
        for window in (7, 11)
    ),
    *({"labels": labels} for labels in ("int16", "int32")),
    *(
        {"shape": SHAPES["voc"], "schedule": "recompute", "options": {"window_size": window}}
        for window in (7, 11)
    ),
    *({"shape": SHAPES["voc"], "dtype": dtype} for dtype in ("bfloat16", "float64")),
    *({"shape": SHAPES["voc"], "labels": labels} for labels in ("int16", "int64")),
)


def _shipped(window: int, schedule: str | None) -> Case:
    options = {"window_size": window}
    return next(c for c in SHIPPED if c.options == options and c.schedule == schedule)


_L_MIB = BASE.shape.elements * 4 / 2**20
GOALS: tuple[Goal | CodeGoal, ...] = (
    # By the model of predict.py the time goes into issuing instructions: the stable variance costs
    # some, and leaving out the absent classes saves some.
    Goal("SSL, window 3: share of the copy bandwidth", CASES[0], "share_of_copy", at_least=0.40),
    Goal("SSL, window 3: speed against eager", CASES[0], "speedup_vs_eager", at_least=10),
    Goal("SSL, window 3: speed against torch.compile", CASES[0], "speedup_vs_compile", at_least=3),
    # L are the bytes of the logits: eager needs about 17 L, torch.compile about 9 L. The kernels
    # need the gradient, which is one L.
    Goal(
        "SSL, window 3: extra MiB, 1.02 times the logits",
        CASES[0],
        "peak_delta_MiB",
        at_most=1.02 * _L_MIB,
    ),
    Goal("SSL, window 11: share of the copy bandwidth", CASES[1], "share_of_copy", at_least=0.20),
    # Instructions per pixel and class. The look is a kernel of its own and is counted per label:
    # all classes share it, so that each of 19 classes has at most two instructions of it.
    CodeGoal(
        text="SSL, window 3: instructions of the look per label",
        case=SHIPPED[0],
        kernel="_label_look_kernel",
        loop="rows",
        at_most=38,
    ),
    *(
        CodeGoal(
            text=f"SSL, window {window}, {direction}: instructions where the {loop}",
            case=_shipped(window, schedule),
            kernel=f"_structural_similarity_{direction}_kernel",
            loop=loop,
            at_most=instructions,
        )
        for window, schedule, direction, loop, instructions in (
            (3, None, "forward", "class absent", 93),
            (3, None, "forward", "class present", 109),
            (3, None, "backward", "class absent", 76),
            (3, None, "backward", "class present", 96),
            (7, None, "forward", "class present", 183),
            (7, "recompute", "backward", "class present", 178),
            (11, None, "forward", "class present", 328),
            (11, "recompute", "backward", "class present", 346),
        )
    ),
)


def _strips(direction: str) -> KernelNotes:
    loops = strip_loops(
        strip_loop("class present", f"_{direction}_strip.i", "class present"),
        strip_loop("class absent", f"_{direction}_strip.i", "class absent"),
    )
    return KernelNotes(strip_outputs, loops)


def _label_rounds(given: Given) -> float:
    """Rounds over a patch's rows and those of half a window above and below, several in each."""
    return -(-(given["STRIP.rows"] + 2 * given["RADIUS"]) // given["STRIP.unroll"])


_LOOK = KernelNotes(share_of_the_map, (LoopNotes("rows", ".i", _label_rounds),))
_STORED = LoopNotes("rows", ".i", lambda given: given["STRIP.rows"])
OPERATIONS = (
    Operation(
        name="structural_similarity_loss",
        function=functional.structural_similarity_loss,
        reference=reference,
        inputs=inputs,
        launch=launch,
        floor=floor,
        cases=CASES,
        shipped=(*SHIPPED, *RARE),
        kernels={
            "_label_look_kernel": _LOOK,
            "_structural_similarity_forward_kernel": _strips("forward"),
            "_structural_similarity_backward_kernel": _strips("backward"),
            "_structural_similarity_stored_kernel": KernelNotes(strip_outputs, (_STORED,)),
        },
        operators=(
            "structural_similarity_forward",
            "structural_similarity_backward",
            "structural_similarity_stored",
        ),
        goals=GOALS,
        excused=near_threshold,
    ),
)
