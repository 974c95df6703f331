"""A memory of embeddings of each class, from images of the past: keys for pixel contrast."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup, all_gather
from torch.nn import functional as F

from kernels_reference.base import without_autocast

from .._core import checks
from .._core.process_groups import check_process_group, ranks_agree
from .contrast_checks import MOST_DIMS, check_maps
from .sampling import has_class, resized, shuffled_runs

_REGIONS, _PIXELS = 0, 1
_KEPT = ("_rows", "_labels", "_pointers", "_filled")


class MemoryBank(nn.Module):
    """Two queues of unit embeddings for each class: of regions and of single pixels.

    A region is the mean over the pixels of one class in one image. The queues are rings: new
    embeddings take the places of the oldest ones. What holds nothing yet is no key.

    ``keys`` and ``labels`` are for :func:`~functional.pixel_contrast_loss`. They lie in the order
    of their classes, of each class first the regions. Call ``update`` after the backward pass of a
    step: it writes into the keys, and autograd refuses a backward pass that would see new ones.

    Nothing here is a buffer, so that DistributedDataParallel does not overwrite a rank's memory
    with that of another. It moves with the module to devices and dtypes, and is in its state_dict.

    Args:
        classes: how many classes there are: labels 0 to classes - 1 are kept, others are not.
        size: how many regions of each class are kept.
        dim: D of the embeddings.
        pixel_size: how many pixels of each class are kept. Default None: as many as regions.
        pixels: how many pixels of one class in one image are kept, drawn at random. Default 10.
        ignore_index: a label that is not kept, though it be a class. Default 255.
        dtype: of the keys. Default float32; bfloat16 takes half the memory and a fraction of the
            loss's time.
        process_group: the ranks whose images are kept, in their order; all of them have to call
            ``update``, with the same number of images, or of ``images``. Then all banks hold the
            same. Default None: this rank alone.
        device: of the keys. Default None: PyTorch's.

    Raises:
        TypeError, ValueError: an argument has the wrong type, or is out of range.

    Reference:
        Wang et al., "Exploring Cross-Image Pixel Contrast for Semantic Segmentation".

    Example:
        >>> import torch, tritonloss
        >>> bank = tritonloss.MemoryBank(classes=4, size=50, dim=16)
        >>> embeddings = torch.nn.functional.normalize(torch.randn(2, 16, 32, 32))
        >>> target = torch.randint(0, 4, (2, 128, 128))
        >>> bank.update(embeddings, target)
        >>> bank.keys.shape, int((bank.labels == 0).sum())
        (torch.Size([400, 16]), 22)
    """

    def __init__(
        self,
        classes: int,
        size: int,
        dim: int,
        *,
        pixel_size: int | None = None,
        pixels: int = 10,
        ignore_index: int | None = checks.IGNORE_INDEX,
        dtype: torch.dtype = torch.float32,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        checks.check_positive("classes", classes)
        checks.check_positive("size", size)
        checks.check_integer("dim", dim, 1, MOST_DIMS)
        pixel_size = size if pixel_size is None else pixel_size
        checks.check_positive("pixel_size", pixel_size)
        checks.check_positive("pixels", pixels)
        checks.check_ignore_index(ignore_index, classes)
        if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(
                f"dtype must be float16, bfloat16, float32 or float64 of torch; got {dtype!r}"
            )
        check_process_group(process_group)
        self.classes, self.size, self.dim = classes, size, dim
        self.pixel_size, self.pixels = pixel_size, pixels
        self.ignore_index = ignore_index
        self.process_group = process_group
        slots = classes * (size + pixel_size)
        # One more row, for what is not kept.
        self._rows = torch.zeros(slots + 1, dim, dtype=dtype, device=device)
        self._labels = torch.full((slots,), -1, dtype=torch.int32, device=device)
        self._pointers = torch.zeros(2, classes, dtype=torch.int64, device=device)
        self._filled = torch.zeros(2, classes, dtype=torch.int64, device=device)

    @property
    def keys(self) -> torch.Tensor:
        """All embeddings, [classes * (size + pixel_size), dim]; 0 where nothing is kept yet."""
        return self._rows[:-1]

    @property
    def labels(self) -> torch.Tensor:
        """The class of each key, int32; -1 where nothing is kept yet."""
        return self._labels

    @torch.no_grad()
    def update(
        self,
        embeddings: torch.Tensor,
        target: torch.Tensor,
        *,
        images: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Keep a batch's regions, and pixels of them drawn at random; nothing waits for the device.

        Pixels whose embeddings are not finite are left out.

        Args:
            embeddings: [N, dim, h, w], floating-point, on the device of the bank.
            target: integer labels [N, H, W], at any resolution: of each pixel of the embeddings
                the nearest one counts.
            images: the most images that a rank of the process group has, the same on all of them:
                a rank with fewer sends as many more without a label. Default None: all have N.
            generator: of the random draws, on the device of the bank. Default None: PyTorch's.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: shapes or devices do not match, or there are more than ``images``.
        """
        with ranks_agree(self.process_group, embeddings):
            self._check_batch(embeddings, target, images)
        labels = resized(target, *embeddings.shape[2:]).to(torch.int64)
        there = has_class(labels, self.ignore_index) & (labels < self.classes)
        labels = torch.where(there & embeddings.isfinite().all(1), labels, -1)
        with without_autocast(embeddings):
            regions = self._regions_of(embeddings, labels)
            pixels, drawn = self._pixels_of(embeddings, labels, generator)
        counts = (labels.flatten(1)[:, None] == self._class_numbers()[:, None]).any(2)
        rows = torch.cat((regions[:, :, None], pixels), 2)
        rows = F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
        kept = torch.cat((counts[:, :, None], drawn), 2) & rows.isfinite().all(-1)
        rows, kept = (self._of_all_ranks(own, images) for own in (rows.to(self._rows.dtype), kept))
        self._insert(_REGIONS, rows[:, :, 0], kept[:, :, 0])
        self._insert(_PIXELS, *(x[:, :, 1:].transpose(1, 2).flatten(0, 1) for x in (rows, kept)))
        self._rows[-1] = 0
        self._labels = self._labels_of_filled()

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        names = ("classes", "size", "dim", "pixel_size", "pixels")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        """What the state_dict holds: all that is kept."""
        return {name.removeprefix("_"): getattr(self, name) for name in _KEPT}

    def set_extra_state(self, state: Any) -> None:
        """Take what another bank of the same sizes has kept."""
        for name in _KEPT:
            own, other = getattr(self, name), state[name.removeprefix("_")]
            if own.shape != other.shape:
                raise ValueError(
                    f"a bank's {name.removeprefix('_')} must have the shape {tuple(own.shape)}; "
                    f"got {tuple(other.shape)}"
                )
        for name in _KEPT:
            own = getattr(self, name)
            setattr(self, name, state[name.removeprefix("_")].to(own, copy=True))

    def _apply(self, fn: Any, recurse: bool = True) -> MemoryBank:
        for name in _KEPT:
            setattr(self, name, fn(getattr(self, name)))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _check_batch(
        self, embeddings: torch.Tensor, target: torch.Tensor, images: int | None
    ) -> None:
        check_maps(embeddings, target)
        if embeddings.size(1) != self.dim:
            raise ValueError(
                f"embeddings must have D of {self.dim}, as the bank; "
                f"got {checks.described(embeddings)}"
            )
        checks.check_same_device(self._rows, "the bank", embeddings, "embeddings")
        if images is not None:
            checks.check_integer("images", images, embeddings.size(0), 2**31 - 1)

    def _class_numbers(self) -> torch.Tensor:
        return torch.arange(self.classes, device=self._rows.device)

    def _regions_of(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum over each class's pixels in each image, [N, classes, dim]: a mean's direction."""
        sums = []
        for embedding, label in zip(embeddings.flatten(2), labels.flatten(1), strict=True):
            embedding = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
            embedding = torch.where(label >= 0, embedding, 0)
            is_class = (label == self._class_numbers()[:, None]).to(embedding.dtype)
            sums.append(is_class @ embedding.T)
        empty = embeddings.new_zeros(0, self.classes, self.dim)
        return torch.stack(sums) if sums else empty

    def _pixels_of(
        self, embeddings: torch.Tensor, labels: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Random pixels of each class in each image, [N, classes, pixels, dim]; which are there."""
        images, _, height, width = embeddings.shape
        size = images * self.classes * self.pixels
        image = torch.arange(images, device=labels.device).view(-1, 1, 1)
        keys = torch.where(labels >= 0, image * self.classes + labels, images * self.classes)
        runs = shuffled_runs(keys.flatten(), generator)
        rank = runs.ranks()
        drawn = (rank < self.pixels) & (runs.keys < images * self.classes)
        place = torch.where(drawn, runs.keys * self.pixels + rank, size)
        slots = torch.full((size + 1,), -1, device=labels.device)
        slots = slots.scatter_(0, place, runs.pixels)[:-1].view(images, self.classes, self.pixels)
        pixel = slots.clamp(min=0)
        row = pixel % max(height * width, 1)
        image = pixel // max(height * width, 1)
        return embeddings[image, :, row // max(width, 1), row % max(width, 1)], slots >= 0

    def _of_all_ranks(self, own: torch.Tensor, images: int | None) -> torch.Tensor:
        """What all ranks have, in their order; those with less than so many images have zeros."""
        if self.process_group is None:
            return own
        if images is not None:
            own = torch.cat((own, own.new_zeros(images - own.size(0), *own.shape[1:])))
        own = own.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.process_group.size())]
        all_gather(parts, own, group=self.process_group)
        return torch.cat(parts)

    def _insert(self, queue: int, rows: torch.Tensor, kept: torch.Tensor) -> None:
        """Put rows [K, classes, dim], of which some are kept, into a queue, in their order."""
        size, first = ((self.size, 0), (self.pixel_size, self.size))[queue]
        number, total = kept.cumsum(0) - 1, kept.sum(0)
        kept = kept & (number >= total - size)  # of more than there is room for the last ones
        slot = (self._pointers[queue] + number) % size
        slot = self._class_numbers() * (self.size + self.pixel_size) + first + slot
        slot = torch.where(kept, slot, len(self._rows) - 1)
        self._rows.index_copy_(0, slot.flatten(), rows.flatten(0, 1))
        self._pointers[queue] = (self._pointers[queue] + total) % size
        self._filled[queue] = (self._filled[queue] + total).clamp(max=size)

    def _labels_of_filled(self) -> torch.Tensor:
        """The class of each slot that is filled, -1 of others."""
        slot = torch.arange(self.size + self.pixel_size, device=self._rows.device)
        regions, pixels = self._filled[:, :, None]
        filled = torch.where(slot < self.size, slot < regions, slot - self.size < pixels)
        labels = torch.where(filled, self._class_numbers()[:, None], -1)
        return labels.flatten().to(torch.int32)
