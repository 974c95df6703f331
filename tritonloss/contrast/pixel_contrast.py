"""Pixel contrast: anchors are pulled to keys of their class and pushed from those of others."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from kernels_reference.pixel_contrast import all_anchors
from kernels_reference.pixel_contrast import pixel_contrast_loss as pixel_contrast_reference

from .._core import checks
from .._core.backend import serves_triton
from .._core.configurations import Configuration, Launch, TuningCase
from .._core.example import Example
from .._core.operator import Operator
from .._core.process_groups import check_process_group, name_of, ranks_agree
from .contrast_checks import check_embeddings, check_labels_of, check_options
from .contrast_launch import Results, allocate, launch_backward, launch_forward
from .memory_bank import MemoryBank
from .sampling import check_sampling, sample_anchors
from .tile_launch import PASSES, Options, heuristic, tile_dtype


def _allocate_gradient(anchors: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.empty(anchors.shape, dtype=anchors.dtype, device=anchors.device)


PIXEL_CONTRAST = Operator(
    "pixel_contrast",
    forward=launch_forward,
    backward=launch_backward,
    allocate=allocate,
    results=Results,
    options=Options,
    allocate_gradient=_allocate_gradient,
)


def pixel_contrast_loss(
    anchors: torch.Tensor,
    anchor_labels: torch.Tensor,
    keys: torch.Tensor | None = None,
    key_labels: torch.Tensor | None = None,
    *,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
    hardest: float | None = None,
    precision: str = "tf32x3",
    ignore_index: int | None = checks.IGNORE_INDEX,
    process_group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Contrast of anchors with keys: the mean over the anchors that have a positive.

    An anchor's positives P are the keys of its class, its negatives N those of others. With scores
    s = anchor . key / temperature its loss is

        temperature / base_temperature * mean over p in P of softplus(ln - s_p),
        ln = log of the sum over n in N of exp(s_n)

    which is -log(exp(s_p) / (exp(s_p) + sum exp(s_n))), the positive against all negatives, and
    finite for embeddings of any length and small temperatures. Scores are never in memory.

    Args:
        anchors: [A, D], float16, bfloat16 or float32 (or float64), any number of them; D from 1 to
            512. :func:`tritonloss.sample_anchors` makes them of a map of embeddings.
        anchor_labels: integers [A]: the class, from 0; a negative number says none, so that the
            anchor is no anchor, whatever it holds. So does 2^31 - 1 and what is above.
        keys: [M, D], floating-point; they get no gradient. Default None: the anchors are the keys,
            with a gradient to both sides, and no anchor is its own positive. Keys in the order of
            their classes, as in a :class:`tritonloss.MemoryBank`, are quicker than in any other:
            most of them are looked at once.
        key_labels: integers [M], as those of the anchors.
        temperature: what scores are divided by, in [1e-4, 1e4]. Default 0.1.
        base_temperature: the loss is multiplied by temperature over this. Default 0.07.
        hardest: a share in (0, 1] of each anchor's negatives among the keys, and of its positives,
            to which the loss is restricted: the most similar negatives and the least similar
            positives, rounded up, with all that are equal to the last one. Default None: all of
            them. It needs keys, and takes 8 more passes over them.
        precision: how float32 is multiplied: "tf32x3" (default), in three products of tf32 (on
            AMD's GPUs in float32), or "bf16". Rounded as in the first, unit embeddings of 256
            dimensions had a loss off by 3e-9 of itself at a temperature of 0.1, and a gradient off
            by 2e-7 of its largest element; as in the second, by 8e-5 and 3e-3 (all of this emulated
            in float64), for a sixth of the tensor cores' time and half the bytes.
        ignore_index: a label that says none as well. Default 255.
        process_group: the ranks whose anchors are one batch with these; all of them have to call.
            Without keys all have to have the same number of anchors (labels may say none), and the
            keys are the anchors of all ranks. Keys have to be the same on all ranks, as those of a
            bank are. Default None: no others. The value is that of the whole batch; the gradient
            is, too, times the number of ranks: DistributedDataParallel takes the mean of the
            ranks' gradients, which makes it that of the whole batch.

    Returns:
        The loss in float32 (float64 for float64 anchors or keys); 0 with zero gradient where no
        anchor has a positive. The gradient has the dtype of the anchors; where the tiles have 16
        bits, what pairs add to it is rounded to these first, to 6e-4 (float16) or 5e-3 (bfloat16)
        of its largest element.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, or an option is out of range.

    Reference:
        Wang et al., "Exploring Cross-Image Pixel Contrast for Semantic Segmentation", Eq. 3.

    Example:
        >>> import torch
        >>> from tritonloss.functional import pixel_contrast_loss
        >>> anchors = torch.nn.functional.normalize(torch.randn(64, 32)).requires_grad_()
        >>> labels = torch.randint(0, 4, (64,))
        >>> pixel_contrast_loss(anchors, labels).backward()
        >>> anchors.grad.shape
        torch.Size([64, 32])
    """
    with ranks_agree(process_group, anchors):
        check_embeddings("anchors", anchors)
        check_labels_of("anchor_labels", anchor_labels, "anchors", anchors)
        if (keys is None) != (key_labels is None):
            missing, given = ("keys", "key_labels") if keys is None else ("key_labels", "keys")
            raise ValueError(f"{missing} must be given with {given}; got None")
        if keys is not None and key_labels is not None:
            check_embeddings("keys", keys, anchors)
            check_labels_of("key_labels", key_labels, "keys", keys)
            keys = keys.detach()
        elif hardest is not None:
            raise ValueError(f"hardest must be None without keys; got {hardest!r}")
        check_options(temperature, base_temperature, hardest, precision, ignore_index)
        check_process_group(process_group)
    if not serves_triton(anchors):
        return pixel_contrast_reference(
            anchors,
            anchor_labels,
            keys,
            key_labels,
            temperature=temperature,
            base_temperature=base_temperature,
            hardest=hardest,
            precision=precision,
            ignore_index=ignore_index,
            process_group=process_group,
        )
    if keys is not None:
        keys = keys.to(tile_dtype(anchors, keys, precision))
    elif process_group is not None:  # the loss of all ranks' anchors, on each of them
        anchors = all_anchors(anchors, process_group)
        anchor_labels = all_anchors(anchor_labels.to(torch.int64), process_group)
        process_group = None
    options = Options(
        float(temperature),
        float(base_temperature),
        None if hardest is None else float(hardest),
        precision,
        checks.plain_label(ignore_index),
        name_of(process_group),
    )
    (loss,) = PIXEL_CONTRAST(anchors, anchor_labels, keys, key_labels, options=options)
    return loss


class PixelContrastLoss(nn.Module):
    """Pixel contrast of maps of embeddings: anchors are sampled, and contrasted.

    Args:
        max_samples, max_views, strategy, groups: of :func:`tritonloss.sample_anchors`.
        temperature, base_temperature, hardest, precision, process_group: of
            :func:`tritonloss.functional.pixel_contrast_loss`.
        ignore_index: of both.

    Raises:
        TypeError, ValueError: as these functions.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.PixelContrastLoss()
        >>> embeddings = torch.nn.functional.normalize(torch.randn(2, 16, 32, 32))
        >>> target = torch.randint(0, 4, (2, 128, 128))
        >>> logits = torch.randn(2, 4, 32, 32)
        >>> criterion(embeddings, target, logits).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        max_samples: int = 1024,
        max_views: int = 100,
        strategy: str = "semi_hard",
        groups: str = "image",
        temperature: float = 0.1,
        base_temperature: float = 0.07,
        hardest: float | None = None,
        precision: str = "tf32x3",
        ignore_index: int | None = checks.IGNORE_INDEX,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_sampling(max_samples, max_views, strategy, groups)
        check_options(temperature, base_temperature, hardest, precision, ignore_index)
        check_process_group(process_group)
        self.ignore_index = ignore_index
        self.sampling = {
            "max_samples": max_samples,
            "max_views": max_views,
            "strategy": strategy,
            "groups": groups,
        }
        self.options = {
            "temperature": temperature,
            "base_temperature": base_temperature,
            "hardest": hardest,
            "precision": precision,
        }
        self.process_group = process_group

    def forward(
        self,
        embeddings: torch.Tensor,
        target: torch.Tensor,
        prediction: torch.Tensor,
        bank: MemoryBank | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The loss, of which the gradient goes to the embeddings.

        Args:
            embeddings: [N, D, h, w], as the network's projection gives them, of length 1.
            target: integer labels [N, H, W].
            prediction: logits [N, C, ., .] or predicted labels [N, ., .].
            bank: whose keys the anchors are contrasted with. Default None: with each other. It is
                not updated: ``bank.update(embeddings, target)`` after the backward pass does that.
            generator: of the random draws.
        """
        if bank is not None and not isinstance(bank, MemoryBank):
            raise TypeError(f"bank must be a MemoryBank or None; got {type(bank).__name__}")
        anchors, labels = sample_anchors(
            embeddings,
            target,
            prediction,
            ignore_index=self.ignore_index,
            generator=generator,
            **self.sampling,  # type: ignore[arg-type]
        )
        keys = () if bank is None else (bank.keys, bank.labels)
        return pixel_contrast_loss(
            anchors,
            labels,
            *keys,
            ignore_index=None,  # what is ignored is neither sampled nor kept
            process_group=self.process_group,
            **self.options,  # type: ignore[arg-type]
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        options = {**self.sampling, **self.options, "ignore_index": self.ignore_index}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


# --- tuning and examples --------------------------------------------------------------------------


def tuning_cases() -> list[TuningCase]:
    """What the tuner measures: each pass over 190 000 keys, or over anchors as keys."""
    return [
        TuningCase(
            operator=f"pixel_contrast_{which}",
            classes=dims,
            window=1,
            dtype=dtype,
            layout="own" if own else "keys",
            run=functools.partial(_tuning_pass, which, dims, dtype, own),
            candidates=_candidates(which, dims, dtype, own),
        )
        for dims in (256, 32)
        for dtype in (torch.bfloat16, torch.float32)
        for own in (False, True)
        for which in PASSES
        if not (own and which == "hardest")
    ]


def _candidates(which: str, dims: int, dtype: torch.dtype, own: bool) -> list[Configuration]:
    """The heuristic and its neighbours, one setting changed at a time."""
    first = heuristic(which, dims, dtype, own)
    anchors, keys, warps = (int(first[name]) for name in ("ANCHORS", "KEYS", "num_warps"))
    changes: list[Configuration] = [
        {"ANCHORS": 2 * anchors},
        {"KEYS": 2 * keys},
        {"KEYS": max(keys // 2, 16)},
        {"num_stages": 3},
        {"ANCHORS": max(anchors // 2, 16), "num_warps": warps // 2},
    ]
    return [first, *({**first, **change} for change in changes)]


def _tuning_pass(
    which: str, dims: int, dtype: torch.dtype, own: bool, device: torch.device
) -> Launch:
    """A launch of both passes, over the hardest pairs if these are what is asked for."""
    anchors, keys = (
        nn.functional.normalize(torch.rand(rows, dims, device=device) - 0.5).to(dtype)
        for rows in (1024, 190000)
    )
    labels, classes = (
        torch.arange(len(rows), device=device) * 19 // len(rows) for rows in (anchors, keys)
    )
    options = Options(hardest=0.1 if which == "hardest" else None)
    rest = (None, None) if own else (keys, classes)

    def both_passes() -> tuple[torch.Tensor, ...]:
        return PIXEL_CONTRAST.both_passes(anchors, labels, *rest, options=options)

    return both_passes


def _anchors_of_pixels(
    logits: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each pixel as an anchor, its logits as the embedding; each class in two, by turns."""
    labels = target.flatten()
    turn = torch.arange(len(labels), device=labels.device) % 2
    labels = torch.where(labels < 100, 2 * labels + turn.to(labels.dtype), labels)
    return logits.movedim(1, -1).flatten(0, -2), labels


def _with_keys(
    logits: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each pixel as an anchor, its logits as the embedding; keys of three classes."""
    anchors, labels = logits.movedim(1, -1).flatten(0, -2), target.flatten()
    place = torch.arange(24 * logits.size(1), device=logits.device)
    keys = (place.to(logits.dtype) * 0.7).sin().view(24, logits.size(1))
    key_labels = torch.arange(24, device=logits.device) // 8
    return anchors, labels, keys, key_labels


EXAMPLES = (
    Example(
        "pixel_contrast_loss",
        pixel_contrast_loss,
        PIXEL_CONTRAST,
        {"temperature": 2.0},
        arguments=_with_keys,
    ),
    Example(
        "pixel_contrast_loss, hardest keys",
        pixel_contrast_loss,
        PIXEL_CONTRAST,
        {"temperature": 2.0, "hardest": 0.3},
        arguments=_with_keys,
    ),
    Example(
        "pixel_contrast_loss, anchors as keys",
        pixel_contrast_loss,
        PIXEL_CONTRAST,
        {"temperature": 2.0},
        arguments=_anchors_of_pixels,
    ),
)
