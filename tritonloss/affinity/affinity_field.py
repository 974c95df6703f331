"""Affinity field loss: neighbours of one class agree in their probabilities, others differ."""

from __future__ import annotations

import functools

import torch
from torch.distributed import ProcessGroup

from kernels_reference.affinity_field import affinity_field_loss as affinity_field_reference

from .._core import checks
from .._core.backend import serves_triton
from .._core.configurations import Configuration, Launch, TuningCase
from .._core.example import Example
from .._core.loss_module import LossModule
from .._core.operator import Operator
from .._core.process_groups import check_process_group, name_of, ranks_agree
from .._core.tuning_inputs import random_labels, random_map
from .affinity_field_launch import (
    Gradients,
    Options,
    Results,
    allocated,
    allocated_gradients,
    heuristic,
    launch_backward,
    launch_forward,
)

_LARGEST_SIZE = 64
# The sizes in words: torch.compile makes no text of a number that it takes for a variable.
_TEXTS = tuple(str(size) for size in range(_LARGEST_SIZE + 1))


# --- operator -------------------------------------------------------------------------------------


def _forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    edge_table: torch.Tensor | None,
    non_edge_table: torch.Tensor | None,
    options: Options,
) -> Results:
    return launch_forward(logits, target, edge_table, non_edge_table, options)


def _backward(
    grad_loss: torch.Tensor,
    scale: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    edge_table: torch.Tensor | None,
    non_edge_table: torch.Tensor | None,
    wants_logits: bool,
    wants_edge_table: bool,
    wants_non_edge_table: bool,
    options: Options,
) -> Gradients:
    wants = wants_logits, wants_edge_table, wants_non_edge_table
    tables = edge_table, non_edge_table
    return launch_backward(grad_loss, scale, logits, target, tables, wants, options)


def _allocate(
    logits: torch.Tensor,
    target: torch.Tensor,
    edge_table: torch.Tensor | None,
    non_edge_table: torch.Tensor | None,
    options: Options,
) -> Results:
    return allocated(logits, options)


def _allocate_gradients(
    logits: torch.Tensor,
    edge_table: torch.Tensor | None,
    non_edge_table: torch.Tensor | None,
    wants_logits: bool,
    wants_edge_table: bool,
    wants_non_edge_table: bool,
    **_: object,
) -> Gradients:
    wants = wants_logits, wants_edge_table, wants_non_edge_table
    return allocated_gradients(logits, (edge_table, non_edge_table), wants)


AFFINITY_FIELD = Operator(
    "affinity_field",
    forward=_forward,
    backward=_backward,
    allocate=_allocate,
    allocate_gradient=_allocate_gradients,
    results=Results,
    options=Options,
    differentiable=("logits", "edge_table", "non_edge_table"),
)


# --- tuning ---------------------------------------------------------------------------------------


def tuning_cases() -> list[TuningCase]:
    """What ``python -m tritonloss tune`` measures for this slice."""
    return [
        TuningCase(
            f"affinity_field_{direction}",
            19,
            1,
            dtype,
            layout,
            functools.partial(_tuning_pass, dtype, layout),
            _candidates(direction),
        )
        for layout in ("contiguous", "channels_last", "strided")
        for dtype in (torch.float32, torch.bfloat16)
        for direction in ("forward", "backward")
    ]


def _candidates(direction: str) -> list[Configuration]:
    """The heuristic and its neighbours, one setting changed at a time."""
    first = heuristic(direction)
    lanes, rows, warps = int(first["LANES"]), int(first["ROWS"]), int(first["num_warps"])
    changes: list[Configuration] = [{"ROWS": rows + step} for step in (-1, 1)]
    changes += [{"LANES": lanes // 2, "num_warps": warps // 2}]
    changes += [{"LANES": lanes // 4, "num_warps": warps // 4}]
    changes += [{"LANES": lanes * 2, "num_warps": warps * 2}]
    return [first, *({**first, **change} for change in changes)]


def _tuning_pass(dtype: torch.dtype, layout: str, device: torch.device) -> Launch:
    """A launch of both passes."""
    shape = (2, 19, 512, 512)
    logits = random_map(shape, layout, dtype, device).sub_(0.5).mul_(8)
    target = random_labels(shape, device)

    def both_passes() -> tuple[torch.Tensor, ...]:
        return AFFINITY_FIELD.both_passes(logits, target, None, None, options=Options())

    return both_passes


# --- function and module --------------------------------------------------------------------------


def affinity_field_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    size: int | tuple[int, ...] = 1,
    margin: float = 3.0,
    edge_weight: float = 1.0,
    non_edge_weight: float = 1.0,
    edge_table: torch.Tensor | None = None,
    non_edge_table: torch.Tensor | None = None,
    decay: float = 1.0,
    void: str = "triple",
    ignore_index: int | None = checks.IGNORE_INDEX,
    process_group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Affinity field loss: what neighbours' probabilities say of whether their labels agree.

    With p the softmax, of a pixel i, one of its eight neighbours j at a distance of ``size`` rows
    and columns, and a class c:

        D = p_j log(p_j / p_i) + (1 - p_j) log((1 - p_j) / (1 - p_i))

    all four numbers at least 1e-4. Where exactly one of both pixels is of the class there is an
    edge, whose entry is max(0, margin - D); elsewhere the entry is D. The loss is

        decay (edge_weight mean(entries of edges) + non_edge_weight mean(other entries))

    where the mean over no entries is 0. With several sizes it is the sum of theirs.

    Each pair of neighbours is evaluated in registers: there are no copies of the maps, and nothing
    is saved beside logits and labels. The loss is deterministic. Under an ignored pixel a logit
    that is not finite changes nothing. Elsewhere NaN makes the loss NaN, unless the pixel is in no
    pair that counts.

    Args:
        logits: [N, C, H, W] with C >= 2, float16, bfloat16 or float32 (or float64), any strides.
        target: integer labels [N, H, W], uint8 to int64.
        size: how far neighbours are apart, from 1 to 64, or a tuple of such numbers.
        margin: the divergence from which on an edge costs nothing, in [0, 100]. Default 3.
        edge_weight: of the edges' mean, in [0, 1e6]. Default 1.
        non_edge_weight: of the other entries' mean, in [0, 1e6]. Default 1.
        edge_table: a weight of the edges of each centre pixel i's class, floating-point [C], or
            [C, number of sizes]. Default None: 1. It gets a gradient if it requires one.
        non_edge_table: the same of other entries.
        decay: what the loss is multiplied by, in [0, 1e6]. Default 1. The paper trains with
            10 ** (-step / steps); of a module, set ``criterion.decay`` at every step.
        void: which pairs are left out. "triple" (default): those of which i, j or the pixel
            opposite to j, as seen from i, is void or outside the image, as in the authors' code.
            "pair": those of which i or j is.
        ignore_index: label of pixels that are void, any integer or None. Default 255, which has to
            be given where there are more than 255 classes and it is one of them. Other labels out
            of range raise on the CPU; on a GPU, where looking would synchronise, they count as void
            unless TRITONLOSS_CHECK_LABELS=1 is set.
        process_group: the ranks whose images are one batch with these; all of them have to call,
            with any number of images. Default None: no others. The value is that of the whole
            batch. The gradient is, too, times the number of ranks: DistributedDataParallel takes
            the mean of the ranks' gradients, which makes it that of the whole batch.

    Returns:
        The loss in float32 (float64 for float64 logits), 0 with zero gradient where no pair counts.
        The gradient has the dtype of the logits; of several sizes one is added to it after the
        other, and in 16 bits it is rounded as often.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, an option is out of range, or a label is (see
            ignore_index).

    Reference:
        Ke et al., "Adaptive Affinity Fields for Semantic Segmentation", Eq. 3 to 6.

    Example:
        >>> import torch
        >>> from tritonloss.functional import affinity_field_loss
        >>> logits = torch.randn(2, 19, 32, 64, requires_grad=True)
        >>> target = torch.randint(0, 19, (2, 32, 64))
        >>> affinity_field_loss(logits, target).backward()
        >>> logits.grad.shape
        torch.Size([2, 19, 32, 64])
    """
    with ranks_agree(process_group, logits):
        checks.check_logits(logits)
        checks.check_target(logits, target)
        check_options(
            size=size,
            margin=margin,
            edge_weight=edge_weight,
            non_edge_weight=non_edge_weight,
            edge_table=edge_table,
            non_edge_table=non_edge_table,
            decay=decay,
            void=void,
            ignore_index=ignore_index,
            process_group=process_group,
            logits=logits,
        )
        checks.check_classes(logits)
        checks.check_labels_in_range(target, logits.size(1), ignore_index)
    if not serves_triton(logits):
        return affinity_field_reference(
            logits,
            target,
            size=size,
            margin=margin,
            edge_weight=edge_weight,
            non_edge_weight=non_edge_weight,
            edge_table=edge_table,
            non_edge_table=non_edge_table,
            decay=decay,
            void=void,
            ignore_index=ignore_index,
            process_group=process_group,
        )
    options = Options(
        ",".join(_TEXTS[one] for one in _sizes(size)),
        float(margin),
        float(edge_weight),
        float(non_edge_weight),
        void == "triple",
        checks.plain_label(ignore_index),
        name_of(process_group),
    )
    (loss,) = AFFINITY_FIELD(logits, target, edge_table, non_edge_table, options=options)
    return loss if decay == 1 else loss * decay


def _sizes(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size,)


def check_options(
    *,
    size: int | tuple[int, ...],
    margin: float,
    edge_weight: float,
    non_edge_weight: float,
    edge_table: torch.Tensor | None,
    non_edge_table: torch.Tensor | None,
    decay: float,
    void: str,
    ignore_index: int | None,
    process_group: ProcessGroup | None,
    logits: torch.Tensor | None = None,
) -> None:
    """Check all options; without ``logits``, for any number of classes."""
    check_sizes(size)
    checks.check_range("margin", margin, 0, 100)
    checks.check_range("edge_weight", edge_weight, 0, 1e6)
    checks.check_range("non_edge_weight", non_edge_weight, 0, 1e6)
    for name, table in (("edge_table", edge_table), ("non_edge_table", non_edge_table)):
        if isinstance(table, torch.Tensor) and not table.is_nested and table.dim() == 2:
            _check_columns(name, table, len(_sizes(size)))
            table = table[:, 0]
        checks.check_class_weights(name, table, logits)
    checks.check_range("decay", decay, 0, 1e6)
    checks.check_option("void", void, ("triple", "pair"))
    checks.check_ignore_index(ignore_index, None if logits is None else logits.size(1))
    check_process_group(process_group)


def check_sizes(size: int | tuple[int, ...], name: str = "size") -> None:
    """``size`` must be one number that neighbours may be apart, or different ones."""
    if not isinstance(size, tuple):
        checks.check_integer(name, size, 1, _LARGEST_SIZE)
        return
    for one in size:
        checks.check_integer(name, one, 1, _LARGEST_SIZE)
    if not size or len(set(size)) < len(size):
        raise ValueError(f"{name} must be an integer or a tuple of different ones; got {size}")


def _check_columns(name: str, table: torch.Tensor, sizes: int) -> None:
    """A table of weights for each size must have as many columns as there are sizes."""
    checks.check_dense(table, name)
    if table.size(1) != sizes:
        raise ValueError(
            f"{name} must be a floating-point tensor of shape (C,) or (C, {sizes}), one column for "
            f"each size; got {checks.described(table)}"
        )


class AffinityFieldLoss(LossModule, function=affinity_field_loss, check=check_options):
    """:func:`tritonloss.functional.affinity_field_loss` as a module; the tables are buffers.

    Args: the keyword arguments of the function, with the same defaults.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.AffinityFieldLoss(margin=2.0)
        >>> criterion(torch.randn(2, 19, 32, 64), torch.randint(0, 19, (2, 32, 64))).shape
        torch.Size([])
    """


EXAMPLES = (
    Example(
        "affinity_field_loss", affinity_field_loss, AFFINITY_FIELD, {"void": "pair"},
        AffinityFieldLoss,
    ),
    Example(
        "affinity_field_loss, two sizes",
        affinity_field_loss,
        AFFINITY_FIELD,
        {"size": (1, 2), "void": "pair", "margin": 2.0, "decay": 0.5},
        AffinityFieldLoss,
    ),
)  # fmt: skip
