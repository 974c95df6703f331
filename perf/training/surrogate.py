"""The network that knows the IoU, for NeuroIoU's row of `python -m perf train`.

As the paper has it, a network is trained with cross entropy, and what it gets right and wrong on
the training images makes the examples. There are two images here, so that examples are taken from
crops, and all through the training, for losses of all sizes. Each crop makes more examples, with a
number added to all logits of a class. Else the surrogate would never have seen a map that is all
background, or has none, and what it makes of those by chance is what a network that is trained with
it would find.

`python -m perf surrogate` fits it anew, and writes the network, its held-out examples and their
picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas
import torch
from torch import Tensor, nn

from perf.training import train
from perf.training.photographs import VOID, photographs
from tritonloss import IoUPairs, SurrogateFit, collect_iou_pairs, fit_iou_surrogate

# Every so many steps a batch makes examples.
_EVERY = 2
_STEPS = 120  # of a training, after which most of what there is has been learnt
_SEEDS = (100, 101)  # none that losses are trained with
# Standard deviations of what is added to logits, which are within -10 and 10 for the most part.
_SHIFTS = (3.0, 6.0)


class Shifted(nn.Module):
    """A network, to whose logits one random number for each class of each image is added."""

    def __init__(self, network: nn.Module, size: float, generator: torch.Generator) -> None:
        super().__init__()
        self.network, self.size, self.generator = network, size, generator

    def forward(self, images: Tensor) -> Tensor:
        """The logits [N, C, H, W]."""
        logits: Tensor = self.network(images)
        shifts = torch.randn(*logits.shape[:2], 1, 1, generator=self.generator)
        return logits + self.size * shifts


def fit(settings: train.Settings, progress: bool = True) -> SurrogateFit:
    """The fitted network, with its error on examples that were held out."""
    parts = [_examples(settings, seed) for seed in _SEEDS]
    pairs = IoUPairs(
        torch.cat([part.sums for part in parts]),
        torch.cat([part.counts for part in parts]),
        torch.cat([part.pixels for part in parts]),
    )
    return fit_iou_surrogate(pairs, inputs=6, progress=progress)


def _examples(settings: train.Settings, seed: int) -> IoUPairs:
    """Examples of crops that the network has not been trained with yet."""
    torch.manual_seed(seed)
    scenes = photographs()
    network = train.network_of(train.BASELINE, settings.width)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    sources = [network, *(Shifted(network, size, generator) for size in _SHIFTS)]
    found = []
    for step, batch in enumerate(train.batches(scenes, settings, seed)):
        if step % _EVERY == 0:
            for source in sources:
                found.append(collect_iou_pairs(source, [batch], ignore_index=VOID))
        train.step_of(network, optimizer, train.LOSSES[train.BASELINE], *batch)
    return IoUPairs(
        torch.cat([part.sums for part in found]),
        torch.cat([part.counts for part in found]),
        torch.cat([part.pixels for part in found]),
    )


def picture(path: Path, fitted: SurrogateFit) -> None:
    """Draw what the network makes of each held-out example against the truth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#c8c8c8", linewidth=1)
    axes.scatter(fitted.truth.numpy(), fitted.predicted.numpy(), s=8, color="#20304a", alpha=0.5)
    axes.set(
        xlabel="IoU loss of a crop and a class",
        ylabel="what the surrogate makes of it",
        title=f"{len(fitted.truth)} held-out examples, error {fitted.error:.3f}",
    )
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `python -m perf surrogate`."""
    parser = argparse.ArgumentParser(prog="python -m perf surrogate", description=__doc__)
    parser.add_argument("--out", type=Path, default=train.KEPT.parent, help="folder of the results")
    options = parser.parse_args(arguments)
    fitted = fit(train.Settings(steps=_STEPS))
    fitted.surrogate.save(train.SURROGATE)
    options.out.mkdir(parents=True, exist_ok=True)
    frame = pandas.DataFrame(
        {"iou_loss": fitted.truth.numpy(), "predicted": fitted.predicted.numpy()}
    )
    frame.to_csv(options.out / "train-surrogate.csv", index=False, float_format="%.4f")
    picture(options.out / "train-surrogate.png", fitted)
    print(f"{len(frame)} held-out examples, root of the mean squared error {fitted.error:.4f}")
    return 0
