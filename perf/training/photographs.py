"""Two real photographs with labels, made from what scikit-image's wheel holds: no downloads.

The labels follow recipes that scikit-image publishes in its gallery:

- `coins`: "Comparing edge-based and region-based segmentation": a watershed on the Sobel
  elevation map with markers below 30 (background) and above 150 (coin), then holes filled.
  The two-pixel band along a coin's rim, where the watershed line is a guess, is void.
- `page`: "Niblack and Sauvola Thresholding": ink is what lies at or below Sauvola's threshold
  of window 25. The gallery's other recipe for this page ("Thresholding", a local threshold of
  block size 35 and offset 10) gives a second opinion; where the two disagree, the pixel is void.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

CLASSES = ("background", "coin", "ink")
VOID = 255

_HELD_OUT_SHARE = 0.4

_MISSING = (
    "python -m perf train needs scikit-image, whose wheel holds the photographs; "
    'install it with: pip install "tritonloss[dev]" (or: pip install scikit-image)'
)


@dataclass(frozen=True)
class Photograph:
    """A grey photograph and its labels.

    Attributes:
        name: the function of skimage.data that it comes from.
        image: float32 [1, H, W], between -0.5 and 0.5.
        label: uint8 [H, W], an index into CLASSES, or VOID.
    """

    name: str
    image: torch.Tensor
    label: torch.Tensor

    @property
    def training(self) -> Photograph:
        """The left part, which the network may see."""
        return self._columns(0, self._split)

    @property
    def held_out(self) -> Photograph:
        """The right part, on which predictions are measured; the network never trains on it."""
        return self._columns(self._split, self.label.shape[1])

    @property
    def _split(self) -> int:
        return round(self.label.shape[1] * (1 - _HELD_OUT_SHARE))

    def _columns(self, start: int, stop: int) -> Photograph:
        return Photograph(self.name, self.image[:, :, start:stop], self.label[:, start:stop])


def photographs() -> list[Photograph]:
    """The photographs with their labels.

    Raises:
        ModuleNotFoundError: scikit-image is not installed; the text says how to install it.
    """
    try:
        from skimage import data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_MISSING) from error
    coins, page = data.coins(), data.page()
    return [
        Photograph("coins", _as_image(coins), _coin_label(coins)),
        Photograph("page", _as_image(page), _page_label(page)),
    ]


def _as_image(grey: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(grey.astype(np.float32) / 255 - 0.5).unsqueeze(0)


def _coin_label(grey: np.ndarray) -> torch.Tensor:
    from scipy import ndimage
    from skimage.filters import sobel
    from skimage.segmentation import find_boundaries, watershed

    markers = np.zeros_like(grey)
    markers[grey < 30] = 1
    markers[grey > 150] = 2
    coin = ndimage.binary_fill_holes(watershed(sobel(grey), markers) - 1)
    return _as_label(coin, CLASSES.index("coin"), void=find_boundaries(coin, mode="thick"))


def _page_label(grey: np.ndarray) -> torch.Tensor:
    from skimage.filters import threshold_local, threshold_sauvola

    ink = grey <= threshold_sauvola(grey, window_size=25)
    second_opinion = grey <= threshold_local(grey, 35, offset=10)
    return _as_label(ink, CLASSES.index("ink"), void=ink != second_opinion)


def _as_label(foreground: np.ndarray, index: int, void: np.ndarray) -> torch.Tensor:
    label = np.where(foreground, index, CLASSES.index("background"))
    return torch.from_numpy(np.where(void, VOID, label).astype(np.uint8))
