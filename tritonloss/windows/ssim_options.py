"""Options of SSIM, of the loss on labels and of the similarity of two images."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._engine.strip_launch import ignored_class
from .._engine.strips import Strip
from .ssim_moments import Similarity
from .ssim_sums import SumWindow, sum_window_of
from .ssim_values import is_exchanged

# The smallest constants for plain sums, whose error is 1e-7 for probabilities.
LEAST_C1 = 5e-5
LEAST_C2 = 5e-4
# The window sizes of plain sums. Wider windows are read tap by tap. In a window of a single pixel
# every variance has to be exactly 0.
SIZES_OF_SUMS = range(3, 12)


class Comparison(NamedTuple):
    """What the kernels are compiled for: the arithmetic and the window."""

    similarity: Similarity
    window: SumWindow


class LossOptions(NamedTuple):
    """The options of the loss, as they pass through its operator."""

    full: bool
    window_size: int
    sigma: float
    c1: float
    c2: float
    ignore_index: int | None
    group: str | None = None  # the name of a process group

    @property
    def padding(self) -> str:
        """Always "zeros": outside the image x = y = 0."""
        return "zeros"

    @property
    def mapped(self) -> bool:
        """Always False: a loss is a mean, not a map."""
        return False

    @property
    def careful(self) -> bool:
        """Whether plain sums are too wrong for the constants, or not for the window's size."""
        small = self.c2 < LEAST_C2 or (self.full and self.c1 < LEAST_C1)
        return small or self.window_size not in SIZES_OF_SUMS

    def comparison(self, x: torch.Tensor, y: torch.Tensor, strip: Strip) -> Comparison:
        """What the kernels are compiled for, given logits and labels."""
        ignored = ignored_class(self.ignore_index, x.size(1), y.dtype)
        crowded = y.dtype == torch.uint8 and x.size(1) > 255
        exchanged = not self.careful and is_exchanged(strip, self.window_size)
        similarity = Similarity(
            from_logits=True,
            full=self.full,
            c1=self.c1,
            c2=self.c2,
            ignored=ignored,
            crowded=crowded,
            exchanged=exchanged,
            careful=self.careful,
        )
        return Comparison(similarity, sum_window_of(self.window_size, self.sigma, self.padding))


class ImageOptions(NamedTuple):
    """The options of the similarity of two images, as they pass through its operator."""

    window_size: int
    sigma: float
    data_range: float
    padding: str
    mapped: bool

    @property
    def group(self) -> None:
        """Always None: images have no labels, and a mean over them divides by their size."""
        return None

    @property
    def careful(self) -> bool:
        """Whether single pixels are returned, or plain sums are not for the window's size.

        The constants do not matter: they are in proportion to the images.
        """
        return self.mapped or self.window_size not in SIZES_OF_SUMS

    def comparison(self, x: torch.Tensor, y: torch.Tensor, strip: Strip) -> Comparison:
        """What the kernels are compiled for, given two images."""
        c1, c2 = (0.01 * self.data_range) ** 2, (0.03 * self.data_range) ** 2
        similarity = Similarity(
            from_logits=False,
            full=True,
            c1=c1,
            c2=c2,
            ignored=-1,
            crowded=False,
            exchanged=False,
            careful=self.careful,
        )
        return Comparison(similarity, sum_window_of(self.window_size, self.sigma, self.padding))


Options = LossOptions | ImageOptions
