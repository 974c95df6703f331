"""Contrast of the pixels' embeddings, beside cross entropy of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from perf.training.network import EMBEDDED
from perf.training.photographs import CLASSES, VOID
from tritonloss import MemoryBank, PixelContrastLoss

_SHARE = 0.1  # of the contrast in the loss, as its authors' code has it
_KEPT = 100  # regions, and pixels, of each class in a bank


class Contrast:
    """The contrast in one training: with the other anchors of a batch, or with a bank."""

    def __init__(self, seed: int, banked: bool) -> None:
        self.criterion = PixelContrastLoss(ignore_index=VOID)
        self.generator = torch.Generator().manual_seed(seed)
        self.bank: MemoryBank | None = None
        if banked:
            self.bank = MemoryBank(len(CLASSES), _KEPT, EMBEDDED, ignore_index=VOID)

    def __call__(self, embeddings: Tensor, target: Tensor, logits: Tensor) -> Tensor:
        """Its part of the loss; the gradient goes to the embeddings."""
        contrast = self.criterion(
            embeddings, target, logits.detach(), self.bank, generator=self.generator
        )
        return _SHARE * contrast

    def keep(self, embeddings: Tensor, target: Tensor) -> None:
        """Put a batch into the bank, after its backward pass."""
        if self.bank is not None:
            self.bank.update(embeddings, target, generator=self.generator)
