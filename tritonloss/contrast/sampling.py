"""Which pixels are anchors: classes, counts and draws on the device, in tensors of fixed shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._core import checks
from .contrast_checks import check_maps, check_prediction

STRATEGIES = ("semi_hard", "hard", "random")
GROUPS = ("image", "class")
# The key of a pixel that has no class: after all others.
_NONE = 2**62


class Anchors(NamedTuple):
    """Embeddings of pixels and their classes."""

    embeddings: torch.Tensor  # [max_samples, D]; 0 where there is none
    labels: torch.Tensor  # int64 [max_samples]; -1 where there is none


class Runs(NamedTuple):
    """Pixels in the order of their keys, those of equal keys in a random order."""

    keys: torch.Tensor  # int64 [T], ascending
    pixels: torch.Tensor  # int64 [T]: each key's pixel

    def first_of(self, keys: torch.Tensor) -> torch.Tensor:
        """How many pixels have smaller keys."""
        return torch.searchsorted(self.keys, keys)

    def ranks(self) -> torch.Tensor:
        """Each pixel's number among those of the same key."""
        place = torch.arange(self.keys.numel(), device=self.keys.device)
        return place - self.first_of(self.keys)


def sample_anchors(
    embeddings: torch.Tensor,
    target: torch.Tensor,
    prediction: torch.Tensor,
    *,
    max_samples: int = 1024,
    max_views: int = 100,
    strategy: str = "semi_hard",
    groups: str = "image",
    ignore_index: int | None = checks.IGNORE_INDEX,
    generator: torch.Generator | None = None,
) -> Anchors:
    """Pixels of every class, right and wrong ones, for :func:`~functional.pixel_contrast_loss`.

    Pixels are in groups, of which each gives V anchors,

        V = min(max_views, max_samples // groups), at least 1

    A pixel is hard if its prediction is not its label. Nothing here waits for the device.

    Args:
        embeddings: [N, D, h, w], floating-point, any strides.
        target: integer labels [N, H, W], at any resolution: of each pixel of the embeddings the
            nearest one counts, as ``F.interpolate(mode="nearest")`` has it. A negative label says
            none.
        prediction: logits [N, C, ., .], of which the largest counts, or predicted labels, integers
            [N, ., .]; at any resolution, likewise.
        max_samples: how many anchors are returned; those that are too many say none.
        max_views: the most anchors of a group.
        strategy: "semi_hard" (default): half of a group's anchors are hard, half are not; of what
            there are fewer of than half, all, and of the other as many more. "hard": as many hard
            ones as there are. "random": any.
        groups: "image" (default), the pixels of one class in one image, if they are more than
            ``max_views``, as the released code has it; "class", those of one class in the batch,
            be they as few as they may, as the paper has it (with ``max_views=50``).
        ignore_index: a label that says none as well. Default 255.
        generator: of the random draws, on the device of the embeddings. Default None: PyTorch's.

    Returns:
        (embeddings [max_samples, D], labels int64 [max_samples]) in the order of the classes. Where
        there is no anchor the embedding is 0, without a gradient, and the label -1.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not match, or an option is out of range.

    Example:
        >>> import torch, tritonloss
        >>> embeddings = torch.nn.functional.normalize(torch.randn(2, 16, 32, 32))
        >>> target = torch.randint(0, 4, (2, 128, 128))
        >>> logits = torch.randn(2, 4, 32, 32)
        >>> anchors, labels = tritonloss.sample_anchors(embeddings, target, logits)
        >>> anchors.shape, labels.shape
        (torch.Size([1024, 16]), torch.Size([1024]))
    """
    check_maps(embeddings, target)
    check_prediction(prediction, embeddings)
    check_sampling(max_samples, max_views, strategy, groups)
    checks.check_ignore_index(ignore_index)
    images, dims, height, width = embeddings.shape
    if images * height * width == 0:
        labels = torch.full((max_samples,), -1, device=embeddings.device)
        return Anchors(embeddings.new_zeros(max_samples, dims) + 0 * embeddings.sum(), labels)
    labels = resized(target, height, width).to(torch.int64)
    found = prediction.argmax(1) if prediction.is_floating_point() else prediction
    is_easy = resized(found, height, width).to(torch.int64) == labels
    if strategy == "random":
        is_easy = torch.zeros_like(is_easy)
    keys = labels.clone()
    if groups == "image":
        image = torch.arange(images, device=keys.device).view(-1, 1, 1)
        keys = keys * images + image
    keys = torch.where(has_class(labels, ignore_index), 2 * keys + is_easy, _NONE)
    runs = shuffled_runs(keys.flatten(), generator)
    is_chosen = _chosen(runs, max_samples, max_views, strategy, groups)
    pixels, there = _compacted(runs.pixels, is_chosen, max_samples)

    row = pixels % (height * width)
    drawn = embeddings[pixels // (height * width), :, row // width, row % width]
    drawn = torch.where(there[:, None], drawn, 0)
    return Anchors(drawn, torch.where(there, labels.flatten()[pixels], -1))


def check_sampling(max_samples: int, max_views: int, strategy: str, groups: str) -> None:
    """Check the options of the draws."""
    checks.check_positive("max_samples", max_samples)
    checks.check_positive("max_views", max_views)
    checks.check_option("strategy", strategy, STRATEGIES)
    checks.check_option("groups", groups, GROUPS)


def resized(labels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The nearest labels [N, height, width] of [N, H, W]."""
    if labels.shape[1:] == (height, width):
        return labels
    row, column = (
        torch.arange(size, device=labels.device) * labels.shape[axis] // size
        for axis, size in ((1, height), (2, width))
    )
    return labels[:, row[:, None], column]


def has_class(labels: torch.Tensor, ignore_index: int | None) -> torch.Tensor:
    """Where labels name a class: not negative, not ignored, below 2^31 - 1."""
    there = (labels >= 0) & (labels < 2**31 - 1)
    return there if ignore_index is None else there & (labels != int(ignore_index))


def shuffled_runs(keys: torch.Tensor, generator: torch.Generator | None) -> Runs:
    """Pixels in the order of their keys [T], those of one key in a random order."""
    shuffle = torch.randperm(keys.numel(), generator=generator, device=keys.device)
    ordered, place = keys[shuffle].sort(stable=True)
    return Runs(ordered, shuffle[place])


def _chosen(
    runs: Runs, max_samples: int, max_views: int, strategy: str, groups: str
) -> torch.Tensor:
    """Which of the pixels in the order of their keys are anchors."""
    group = runs.keys // 2 * 2  # the key of its hard pixels; the next one is that of the others
    first, first_easy, end = (runs.first_of(group + step) for step in range(3))
    hard, easy = first_easy - first, end - first_easy
    least = max_views + 1 if groups == "image" else 1
    counts = (hard + easy >= least) & (runs.keys < _NONE)
    place = torch.arange(runs.keys.numel(), device=runs.keys.device)
    number = (counts & (place == first)).sum().clamp(min=1)
    views = (max_samples // number).clamp(1, max_views)

    if strategy == "semi_hard":
        many_hard, many_easy = 2 * hard >= views, 2 * easy >= views
        wanted = torch.where(many_easy, views // 2, views - easy)
        wanted = torch.where(many_hard, wanted, hard)
    else:
        wanted = torch.minimum(hard, views)
    # In a group of few pixels neither kind need have as many as are wanted.
    limit = torch.where(runs.keys % 2 == 1, views - wanted, wanted)
    return counts & (runs.ranks() < limit)


def _compacted(
    pixels: torch.Tensor, is_chosen: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the chosen pixels in their order [size], 0 after the last one; whether there is one)."""
    place = is_chosen.cumsum(0) - 1
    # What has no place goes to one more, which is left out.
    place = torch.where(is_chosen & (place < size), place, size)
    slots = pixels.new_zeros(size + 1).scatter_(0, place, pixels)[:size]
    return slots, torch.arange(size, device=pixels.device) < is_chosen.sum()
