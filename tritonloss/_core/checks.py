"""Argument checks: one place, one wording, before the choice of backend.

Every message names the argument, what is accepted and what was given. TypeError is for types and
dtypes, ValueError for values and shapes.
"""

from __future__ import annotations

import enum
import math
import numbers
import operator
import os
from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import _disable_current_modes

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_ALL_INTEGERS = (*_INTEGERS, torch.uint16, torch.uint32, torch.uint64)
_MAX_WINDOW = 31
_LOGITS = "must be a float16, bfloat16, float32 or float64 tensor of shape (N, C, H, W)"


class _Default(enum.IntEnum):
    """Defaults that a function can tell from the same number given by its caller.

    Members of an enumeration: each stays the one object it is when a module is pickled or copied,
    and torch.compile takes it for a constant.
    """

    IGNORE_INDEX = 255

    def __repr__(self) -> str:
        return str(self.value)

    __str__ = __repr__


IGNORE_INDEX = _Default.IGNORE_INDEX


def check_dense(tensor: torch.Tensor, name: str) -> None:
    """``tensor`` must lie in memory element by element, at even distances along each axis.

    Others (sparse, nested, mkldnn, quantized) are refused before anything else is asked of them: a
    nested tensor has no shape, an opaque one no data.
    """
    if tensor.is_nested:
        kind = "nested"
    elif tensor.layout is not torch.strided:
        kind = str(tensor.layout).removeprefix("torch.").removeprefix("_")
    elif tensor.is_quantized:
        kind = "quantized"
    else:
        return
    raise TypeError(f"{name} must be a dense (strided) tensor; got one that is {kind}")


def check_logits(logits: torch.Tensor, name: str = "logits") -> None:
    """``logits`` must be floating-point [N, C, H, W] with a class."""
    accepted = f"{name} {_LOGITS}"
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"{accepted}; got {_type(logits)}")
    check_dense(logits, name)
    if logits.dtype not in _FLOATING:
        raise TypeError(f"{accepted}; got {described(logits)}")
    if logits.dim() != 4 or logits.shape[1] < 1:
        raise ValueError(f"{accepted} with C of at least 1; got {described(logits)}")


def as_images(
    logits: torch.Tensor, target: torch.Tensor, upsample: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, C, ...] and labels [N, ...] as images: views, where rows lie at even distances.

    For losses without a neighbourhood. What is no such pair is left as it is.
    """
    are_tensors = isinstance(logits, torch.Tensor) and isinstance(target, torch.Tensor)
    if not are_tensors or logits.is_nested or target.is_nested or logits.dim() in (0, 1, 2, 4):
        return logits, target
    expected = (logits.shape[0], *logits.shape[2:])
    if upsample is not None:
        raise ValueError(
            f"upsample must be None unless logits have the shape (N, C, H, W); got {upsample!r}, "
            f"and {described(logits)}"
        )
    if target.shape != expected:
        raise ValueError(
            f"target must hold integer labels of shape {tuple(expected)} to match logits of shape "
            f"{tuple(logits.shape)}; got {described(target)}"
        )
    if logits.dim() == 3:
        return logits.unsqueeze(2), target.unsqueeze(1)
    return logits.flatten(2, -2), target.flatten(1, -2)


def check_target(
    logits: torch.Tensor,
    target: torch.Tensor,
    upsample: str | None = None,
    *,
    can_upsample: bool = False,
) -> None:
    """``target`` must hold integers [N, H, W] that match ``logits``, on the same device.

    With ``upsample`` the labels may be as many as they like, of no fewer rows and columns than the
    logits. ``can_upsample``: whether the loss has that option, for the message.
    """
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"{_labels_accepted(logits, upsample)}; got {_type(target)}")
    check_dense(target, "target")
    if target.dtype not in _INTEGERS:
        raise TypeError(f"{_labels_accepted(logits, upsample)}; got {described(target)}")
    images, _, height, width = logits.shape
    shape = tuple(target.shape)
    if upsample is None:
        if shape != (images, height, width):
            hint = ""
            if can_upsample and _covers(shape, (images, height, width)):
                hint = '; upsample="bilinear" is for labels of a higher resolution than the logits'
            raise ValueError(f"{_labels_accepted(logits)}; got {described(target)}{hint}")
    elif not _covers(shape, (images, height, width)):
        raise ValueError(f"{_labels_accepted(logits, upsample)}; got {described(target)}")
    check_same_device(logits, "logits", target, "target")


def _covers(shape: tuple[int, ...], smallest: tuple[int, int, int]) -> bool:
    """Whether labels of this shape have no fewer rows and columns, of as many images."""
    return len(shape) == 3 and shape[0] == smallest[0] and all(map(operator.ge, shape, smallest))


def _labels_accepted(logits: torch.Tensor, upsample: str | None = None) -> str:
    images, _, height, width = logits.shape
    if upsample is None:
        shape = f"{(images, height, width)}"
    else:
        shape = f"({images}, H, W) with H of at least {height} and W of at least {width}"
    return (
        f"target must hold integer labels of shape {shape} "
        f"to match logits of shape {tuple(logits.shape)}"
    )


def check_upsample(upsample: str | None, align_corners: bool) -> None:
    """``upsample`` must be "bilinear" or None, and ``align_corners`` of that alone."""
    if upsample is None and align_corners is False:
        return
    check_option("upsample", upsample, ("bilinear",), or_none=True)
    check_flag("align_corners", align_corners)
    if align_corners and upsample is None:
        raise ValueError('align_corners must be False without upsample="bilinear"; got True')


def check_ignore_index(ignore_index: int | None, classes: int | None = None) -> None:
    """``ignore_index`` must be an integer or None, and given where the default is a class."""
    if ignore_index is not None and not _is_integer(ignore_index):
        raise TypeError(f"ignore_index must be an integer or None; got {_value(ignore_index)}")
    if ignore_index is not None and not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit 64 bits; got {ignore_index}")
    if ignore_index is IGNORE_INDEX and classes is not None and classes > 255:
        raise ValueError(
            f"ignore_index must be given for {classes} classes, of which its default is one: 255 "
            "(which ignores that class), another label or None; got none of them"
        )


def plain_label(ignore_index: int | None) -> int | None:
    """The label as operators take it: an int, or None."""
    return None if ignore_index is None else int(ignore_index)


def holds_labels(tensor: object) -> bool:
    """Whether it is a tensor of integers as labels may be."""
    return isinstance(tensor, torch.Tensor) and tensor.dtype in _INTEGERS


def check_labels_in_range(
    target: torch.Tensor, classes: int, ignore_index: int | None, name: str = "target"
) -> None:
    """Every label must lie in [0, classes) or be ``ignore_index``.

    On a GPU looking at the labels would synchronise, so it takes ``TRITONLOSS_CHECK_LABELS=1``.
    Under torch.compile, and where a tensor holds no data (meta, fake), nothing is looked at. A
    label outside that was not found in this way counts as ignored.
    """
    if not _holds_data(target):
        return
    target = _without_transforms(target.as_subclass(torch.Tensor))
    if not may_wait_for(target.device) or target.numel() == 0:
        return
    # Modes that trace the call must not see this look at the labels.
    with _disable_current_modes():
        found = _labels_outside(target, classes, ignore_index)
    if found:
        raise ValueError(labels_outside(name, classes, ignore_index, found))


def may_wait_for(device: torch.device) -> bool:
    """Whether checks may look at what is on a device, for which a GPU has to be waited for."""
    return device.type == "cpu" or os.environ.get("TRITONLOSS_CHECK_LABELS") == "1"


def _labels_outside(
    target: torch.Tensor, classes: int, ignore_index: int | None
) -> list[tuple[int, int]]:
    """[(value, count), ...] of the labels that are out of range."""
    low, high = (int(extreme) for extreme in torch.aminmax(target))
    if 0 <= low and high < classes:
        return []
    # In int64, because Python's 300 or -100 would wrap around beside a narrow label tensor.
    labels = target.to(torch.int64)
    wrong = (labels < 0) | (labels >= classes)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    values, counts = torch.unique(labels[wrong], return_counts=True)
    return list(zip(values.tolist(), counts.tolist(), strict=True))


def _without_transforms(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that torch.func's transforms have wrapped; under vmap, of the whole batch."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def check_offsets(offsets: torch.Tensor, name: str) -> None:
    """``offsets`` must be finite and not negative; only data on a CPU is looked at."""
    if offsets.device.type != "cpu" or not _holds_data(offsets):
        return
    classes = offsets.shape[-1]
    with _disable_current_modes():
        values = _without_transforms(offsets.detach()).reshape(-1)
        wrong = ~((values >= 0) & (values < math.inf))
        place = int(wrong.int().argmax()) if bool(wrong.any()) else None
    if place is not None:
        raise ValueError(
            f"{name} must hold finite numbers of at least 0; "
            f"got {float(values[place])} for class {place % classes}"
        )


def without_gradient(table: torch.Tensor) -> torch.Tensor:
    """A tensor that gets no gradient, whatever the caller does with it."""
    return table.detach() if table.requires_grad else table


def labels_of(logits: torch.Tensor) -> int:
    """The number of labels of a loss of each class against the rest: 2 for one class, else C."""
    return 2 if logits.shape[1] == 1 else logits.shape[1]


def check_labels(labels: torch.Tensor, name: str) -> None:
    """``labels`` must hold integers; the shape is free."""
    accepted = f"{name} must be a tensor of integers"
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"{accepted}; got {_type(labels)}")
    check_dense(labels, name)
    if labels.dtype not in _ALL_INTEGERS:
        raise TypeError(f"{accepted}; got {described(labels)}")


def labels_outside(
    name: str, classes: int, ignore_index: int | None, found: Sequence[tuple[int, int]]
) -> str:
    """The message about labels out of range; ``found`` holds (value, count) of each."""
    listed = ", ".join(f"{value} ({count}x)" for value, count in found[:5])
    more = ", ..." if len(found) > 5 else ""
    return (
        f"{name} must hold labels from 0 to {classes - 1} or ignore_index={ignore_index}; "
        f"got {sum(count for _, count in found)} labels outside: {listed}{more}"
    )


def check_images(x: torch.Tensor, y: torch.Tensor) -> None:
    """``x`` and ``y`` must be two image batches of one shape, dtype and device."""
    check_logits(x, name="x")
    accepted = f"y must be like x, {described(x)}"
    if not isinstance(y, torch.Tensor):
        raise TypeError(f"{accepted}; got {_type(y)}")
    check_dense(y, "y")
    if y.dtype != x.dtype:
        raise TypeError(f"{accepted}; got {described(y)}")
    if y.shape != x.shape:
        raise ValueError(f"{accepted}; got {described(y)}")
    check_same_device(x, "x", y, "y")


def check_classes(logits: torch.Tensor, high: int | None = None, instead: str = "") -> None:
    """``logits`` must have classes to compare with each other, two at the least.

    With one class the loss would always be 0, which is a trap. Logits of a binary mask, which have
    one class, are for the losses of each class against the rest, and for what ``instead`` names.
    """
    classes = logits.shape[1]
    if classes >= 2 and (high is None or classes <= high):
        return
    accepted = f"logits must have {'at least 2' if high is None else f'from 2 to {high}'} classes"
    if classes < 2:
        raise ValueError(
            f"{accepted}, which this loss compares; for a binary mask (one channel, labels 0 and "
            f"1) {instead}use binary_cross_entropy; got {described(logits)}"
        )
    raise ValueError(f"{accepted}; got {described(logits)}")


def check_class_weights(
    name: str,
    weight: torch.Tensor | None,
    logits: torch.Tensor | None,
    *,
    optional: bool = True,
    or_number: str = "",
) -> None:
    """``weight`` must hold a floating-point number for each class, or be None if it may.

    Without ``logits`` there may be any number of classes. ``or_number`` names what else the
    argument may be, for the message: a number that the caller has looked at.
    """
    if optional and weight is None:
        return
    if not isinstance(weight, torch.Tensor):
        accepted = _weights_accepted(name, logits, optional, or_number)
        raise TypeError(f"{accepted}; got {_type(weight)}")
    check_dense(weight, name)
    if weight.dtype not in _FLOATING:
        accepted = _weights_accepted(name, logits, optional, or_number)
        raise TypeError(f"{accepted}; got {described(weight)}")
    if weight.shape != (logits.shape[1],) if logits is not None else weight.dim() != 1:
        accepted = _weights_accepted(name, logits, optional, or_number)
        raise ValueError(f"{accepted}; got {described(weight)}")
    if logits is not None:
        check_same_device(logits, "logits", weight, name)


def check_class_choice(name: str, chosen: str | Sequence[int], classes: int | None) -> None:
    """``chosen`` must be "present", "all" or different classes; without ``classes``, any."""
    accepted = f"{name} must be 'present', 'all' or a tuple of different classes, 0 to C - 1"
    if isinstance(chosen, str):
        if chosen not in ("present", "all"):
            raise ValueError(f"{accepted}; got {chosen!r}")
        return
    if not isinstance(chosen, (tuple, list)) or not all(map(_is_integer, chosen)):
        raise TypeError(f"{accepted}; got {_value(chosen)}")
    outside = [c for c in chosen if c < 0 or (classes is not None and c >= classes)]
    if outside or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"{accepted}; got {chosen}")


def _weights_accepted(
    name: str, logits: torch.Tensor | None, optional: bool, or_number: str
) -> str:
    shape = "(C,)" if logits is None else (logits.shape[1],)
    or_none = " or None" if optional else ""
    return f"{name} must be {or_number}a floating-point tensor of shape {shape}{or_none}"


def check_window_size(window_size: int, name: str = "window_size") -> None:
    """``window_size`` must be odd, for a centre, and no larger than the kernels allow."""
    accepted = f"{name} must be an odd integer from 1 to {_MAX_WINDOW}"
    if not _is_integer(window_size):
        raise TypeError(f"{accepted}; got {_value(window_size)}")
    if window_size % 2 == 0 or not 1 <= window_size <= _MAX_WINDOW:
        raise ValueError(f"{accepted}; got {window_size}")


def check_sigma(sigma: float) -> None:
    """``sigma`` must be a number from 1e-3 to 1e6: beyond these a window changes no more."""
    check_range("sigma", sigma, 1e-3, 1e6)


def check_padding_fits(
    x: torch.Tensor, window_size: int, padding: str, name: str = "logits"
) -> None:
    """Images must be large enough for windows that are mirrored, or that lie inside the image."""
    if padding == "reflect":
        needed = window_size // 2 + 1
    elif padding == "valid":
        needed = window_size
    else:
        return
    height, width = x.shape[-2:]
    if height < needed or width < needed:
        raise ValueError(
            f'{name} must have height and width of at least {needed} for padding="{padding}" and '
            f"window_size={window_size}; got height {height} and width {width}"
        )


def check_integer(name: str, value: int, low: int, high: int) -> None:
    """``value`` must be an integer from ``low`` to ``high``."""
    accepted = f"{name} must be an integer from {low} to {high}"
    if not _is_integer(value):
        raise TypeError(f"{accepted}; got {_value(value)}")
    if not low <= value <= high:
        raise ValueError(f"{accepted}; got {value}")


def check_option(
    name: str, value: str | None, choices: Sequence[str], *, or_none: bool = False
) -> None:
    """``value`` must be one of ``choices``, or None if ``or_none``."""
    if (value is None and or_none) or (isinstance(value, str) and value in choices):
        return
    accepted = f"{name} must be one of {', '.join(repr(choice) for choice in choices)}"
    accepted += " or None" if or_none else ""
    if not isinstance(value, str):
        raise TypeError(f"{accepted}; got {_value(value)}")
    raise ValueError(f"{accepted}; got {value!r}")


def check_flag(name: str, value: bool) -> None:
    """``value`` must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {_value(value)}")


def check_positive(name: str, value: int) -> None:
    """``value`` must be an integer of at least 1."""
    accepted = f"{name} must be an integer of at least 1"
    if not _is_integer(value):
        raise TypeError(f"{accepted}; got {_value(value)}")
    if value < 1:
        raise ValueError(f"{accepted}; got {value}")


def check_pair(name: str, pair: object) -> tuple[torch.Tensor, torch.Tensor]:
    """``pair`` must be two tensors."""
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        own, other = pair
        if isinstance(own, torch.Tensor) and isinstance(other, torch.Tensor):
            return own, other
    accepted = f"{name} must be a pair of tensors (own, other)"
    if not isinstance(pair, (tuple, list)):
        raise TypeError(f"{accepted}; got {_type(pair)}")
    if len(pair) != 2:
        raise ValueError(f"{accepted}; got {len(pair)} elements")
    wrong = next(part for part in pair if not isinstance(part, torch.Tensor))
    raise TypeError(f"{accepted}; got {_type(wrong)}")


def check_range(name: str, value: float, low: float, high: float, *, interval: str = "[]") -> None:
    """``value`` must be a number from ``low`` to ``high``; a round bracket leaves that end out."""
    is_number = isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool)
    above = is_number and (value > low if interval[0] == "(" else value >= low)
    below = is_number and (value < high if interval[1] == ")" else value <= high)
    if above and below:
        return
    accepted = f"{name} must be a number in {interval[0]}{low}, {high}{interval[1]}"
    if not is_number:
        raise TypeError(f"{accepted}; got {_value(value)}")
    raise ValueError(f"{accepted}; got {value}")


def _holds_data(tensor: torch.Tensor) -> bool:
    """Whether there are values to look at: not under torch.compile, nor in meta or fake tensors."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return not type(tensor).__module__.startswith("torch._")  # PyTorch's own, without data


def check_same_device(
    first: torch.Tensor, first_name: str, second: torch.Tensor, second_name: str
) -> None:
    """``second`` must be on the device of ``first``."""
    if first.device != second.device:
        raise ValueError(
            f"{second_name} must be on the device of {first_name}, {first.device}; "
            f"got {second.device}"
        )


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, numbers.Integral)) and not isinstance(value, bool)


def _type(value: object) -> str:
    return type(value).__name__


def _value(value: object) -> str:
    return f"{value!r} of type {type(value).__name__}"


def described(tensor: torch.Tensor) -> str:
    """The dtype and the shape in words, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
