"""Cross entropy against the project's losses: a small network, real photographs, the same seeds.

Every loss gets the same initial weights, the same crops in the same order, the same first fifth of
the steps with cross entropy, and the same hyper-parameters, which were chosen once with plain cross
entropy. NeuroIoU, which is to tune trained networks, gets the last fifth only. One loss is that of
a network that stops at half the resolution, whose logits are interpolated within the loss. Two
photographs show that each loss trains; they cannot rank losses. What comes out is reported, also
where it speaks against a loss of this project.

`python -m perf train [--out DIRECTORY] [--quick] [--times] [--losses NAME ...]`
"""

from __future__ import annotations

import argparse
import functools
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas
import torch
from torch import Tensor
from torch.nn import functional

from perf import text
from perf.training.contrast import Contrast
from perf.training.network import Network
from perf.training.photographs import CLASSES, VOID, Photograph, photographs
from tritonloss import (
    CrossEntropyLoss,
    DiceLoss,
    IoUSurrogate,
    MarginOffsets,
    WeightedSum,
    count_labels,
    margin_offsets,
)
from tritonloss._core.example import Example
from tritonloss._core.progress import Progress
from tritonloss._tools.examples import examples
from tritonloss.functional import affinity_field_loss
from tritonloss.functional import cross_entropy as fused_cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """What all losses share."""

    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 250
    batch: int = 6
    crop: int = 96
    width: int = 12
    learning_rate: float = 3e-3

    @property
    def warm_up(self) -> int:
        """The first fifth of the steps, which every loss leaves to cross entropy.

        RMI alone has no gradient for a class that is absent from an image: it needs a start.
        """
        return self.steps // 5

    @property
    def fine_tuning(self) -> int:
        """The step from which on a loss trains that is made for trained networks."""
        return self.steps - self.warm_up


QUICK = Settings(seeds=(0,), steps=10, batch=4, crop=64)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The usual baseline: softmax and the logarithm, mean over valid pixels."""
    at_labels = _interpolated(logits, target.shape[1:])
    return functional.cross_entropy(at_labels, target.long(), ignore_index=VOID)


def with_affinity_field(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy and affinity fields, weighted as where the paper on contrast compares them."""
    field = affinity_field_loss(
        logits, target, edge_weight=1 / 3, non_edge_weight=1 / 3, ignore_index=VOID
    )
    return cross_entropy(logits, target) + 0.01 * field


def upsampled_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of logits of a lower resolution, which are interpolated within the loss."""
    return fused_cross_entropy(logits, target, ignore_index=VOID, upsample="bilinear")


def _interpolated(logits: Tensor, size: torch.Size) -> Tensor:
    """The logits at this size; as they are where that is their own."""
    if logits.shape[2:] == size:
        return logits
    return functional.interpolate(logits, size=size, mode="bilinear")


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """One sigmoid per class, summed over classes, mean over valid pixels: SSL without structure.

    It tells what the sigmoid does from what the structural term adds.
    """
    valid = target != VOID
    label = torch.where(valid, target, 0).long()
    one_hot = functional.one_hot(label, logits.shape[1]).movedim(-1, 1).to(logits)
    loss = functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").sum(1)
    return torch.where(valid, loss, 0).sum() / valid.sum().clamp(min=1)


@functools.cache
def _offsets() -> MarginOffsets:
    """Margin offsets from the labels of the training parts, as for any data set."""
    labels = (scene.training.label for scene in photographs())
    return margin_offsets(count_labels(labels, len(CLASSES), ignore_index=VOID))


@functools.cache
def _surrogate() -> IoUSurrogate:
    """The network that has learnt the IoU on the training parts (`python -m perf surrogate`)."""
    return IoUSurrogate.load(SURROGATE)


SURROGATE = Path(__file__).with_name("iou_surrogate.pt")
# Required options whose values come from the data set, by their names. Others are the example's.
_OF_THE_DATA: Mapping[str, Callable[[], object]] = {"offsets": _offsets, "surrogate": _surrogate}


def _with_defaults(example: Example) -> Loss:
    """A slice's loss with all of its defaults."""
    names = list(inspect.signature(example.function).parameters)[2:]

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        required = dict(zip(names, example.arguments(logits, target)[2:], strict=False))
        required |= {name: _OF_THE_DATA[name]() for name in required if name in _OF_THE_DATA}
        result = example.function(logits, target, **required, ignore_index=VOID)
        assert isinstance(result, Tensor)
        return result

    return loss


def _declared() -> Iterator[tuple[str, Loss]]:
    """Every slice's loss of several classes and labels, by the slice's name in words."""
    for example in examples():
        if example.module is not None and not example.binary:
            slice_name = example.function.__module__.rpartition(".")[2]
            yield slice_name.replace("_", " "), _with_defaults(example)


_WITH_DICE = WeightedSum(
    [(1.0, CrossEntropyLoss(ignore_index=VOID)), (1.0, DiceLoss(ignore_index=VOID))]
)
BASELINE = "cross entropy"
UPSAMPLED = "cross entropy, upsampled"
SUMMED = "cross entropy and dice"  # in one read
WITH_FIELD = "cross entropy and affinity field"
# Of these the network has embeddings, too; whether they are contrasted with a bank.
CONTRASTS = {"cross entropy and contrast": False, "cross entropy and contrast, bank": True}
# It is made for networks that cross entropy has trained, at small learning rates.
FINE_TUNES = "neuro iou"
_AGAINST = f"against {BASELINE}"
_HALF = f"""
Under "{UPSAMPLED}" the network stops at half the resolution, without the last two convolutions,
and its logits are interpolated within the loss: it is another network, with another result."""
_TUNED = f"""
Under "{FINE_TUNES}" cross entropy has all but the last fifth of the steps: the loss is to tune
networks that are trained, at small steps. Where it took over after the first fifth, it ended below
25 % in every run. What its surrogate has learnt from matters: with examples of cross entropy's own
predictions alone it ended at 91.8 % (85.3 / 94.3 / 95.9); now some of them are shifted, so that
the surrogate has seen maps without a class. With shifts of ten alone it ended at 80.8 %."""
_TIMING = """
Seconds are medians over the steps after the first fifth, on this machine's CPU: they time the
reference and not the kernels. The loss's share counts its forward and backward pass."""
# What the slices declare, one of them with interpolation, and a sum of two; the baselines are
# PyTorch's own.
LOSSES: Mapping[str, Loss] = {
    **dict(_declared()),
    BASELINE: cross_entropy,
    "binary cross entropy": binary_cross_entropy,
    UPSAMPLED: upsampled_cross_entropy,
    SUMMED: _WITH_DICE,
    **dict.fromkeys(CONTRASTS, cross_entropy),
    WITH_FIELD: with_affinity_field,
}
KEPT = Path(__file__).parents[1] / "results" / "training" / "train.csv"


def compared() -> list[str]:
    """The losses of the kept table, in its order: those that are trained unless others are named.

    A loss that is newer than the table is trained when it is named. A table with that loss needs
    the other losses named, too.
    """
    return list(pandas.read_csv(KEPT)["loss"].unique())


def batches(
    scenes: Sequence[Photograph], settings: Settings, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random crops of the training parts, half of them mirrored; the same ones for every loss."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.steps):
        crops = [
            _crop(scenes[index % len(scenes)].training, settings.crop, generator)
            for index in range(settings.batch)
        ]
        images, labels = zip(*crops, strict=True)
        yield torch.stack(images), torch.stack(labels)


def _crop(scene: Photograph, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    height, width = scene.label.shape
    top = int(torch.randint(height - size + 1, (), generator=generator))
    left = int(torch.randint(width - size + 1, (), generator=generator))
    window = (..., slice(top, top + size), slice(left, left + size))
    image, label = scene.image[window], scene.label[window]
    if torch.rand((), generator=generator) < 0.5:
        return image.flip(-1), label.flip(-1)
    return image, label


def network_of(name: str, width: int) -> Network:
    """A new network for a loss: of half the resolution if the loss interpolates."""
    return Network(len(CLASSES), width, half=name == UPSAMPLED, embeds=name in CONTRASTS)


def train(
    name: str, seed: int, scenes: Sequence[Photograph], settings: Settings
) -> tuple[Network, pandas.DataFrame]:
    """(a trained network, the seconds of each step and of its loss).

    The seconds leave out the steps before the loss is used.
    """
    torch.manual_seed(seed)
    network = network_of(name, settings.width)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    contrast = Contrast(seed, CONTRASTS[name]) if name in CONTRASTS else None
    start = settings.fine_tuning if name == FINE_TUNES else settings.warm_up
    seconds = []
    for step, (images, labels) in enumerate(batches(scenes, settings, seed)):
        if step < start:
            seconds.append(step_of(network, optimizer, LOSSES[BASELINE], images, labels))
        else:
            seconds.append(step_of(network, optimizer, LOSSES[name], images, labels, contrast))
        schedule.step()
    return network, pandas.DataFrame(seconds[start:], columns=["step", "loss"])


def step_of(
    network: Network,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    images: Tensor,
    labels: Tensor,
    contrast: Contrast | None = None,
) -> tuple[float, float]:
    """(seconds of a step of training, seconds of the loss in it).

    The graph is cut at the logits, and at the embeddings if they are contrasted, so that the loss
    is timed apart from the network.
    """
    start = time.perf_counter()
    features = network.features(images)
    outputs = [network.head(features)]
    if contrast is not None and network.embed is not None:
        outputs.append(functional.normalize(network.embed(features)))
    leaves = [output.detach().requires_grad_() for output in outputs]

    loss_start = time.perf_counter()
    value = loss(leaves[0], labels)
    if contrast is not None:
        value = value + contrast(leaves[1], labels, leaves[0])
    value.backward()
    loss_seconds = time.perf_counter() - loss_start

    optimizer.zero_grad()
    torch.autograd.backward(outputs, [leaf.grad for leaf in leaves])
    optimizer.step()
    if contrast is not None:
        contrast.keep(leaves[1].detach(), labels)
    return time.perf_counter() - start, loss_seconds


@torch.no_grad()
def predict(network: Network, image: Tensor) -> Tensor:
    """The most likely class at each pixel of one whole photograph, uint8 [H, W]."""
    logits = _interpolated(network(image.unsqueeze(0)), image.shape[-2:])
    return logits.argmax(1).squeeze(0).to(torch.uint8)


def intersection_over_union(predictions: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """The intersection over union of each class, over all photographs' pixels but the void ones."""
    pairs = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.float64)
    for prediction, label in zip(predictions, labels, strict=True):
        valid = label != VOID
        index = label[valid].long() * len(CLASSES) + prediction[valid].long()
        pairs += torch.bincount(index, minlength=pairs.numel()).view_as(pairs)
    both = pairs.diagonal()
    return both / (pairs.sum(0) + pairs.sum(1) - both)


def run(
    out: str | Path | None = None,
    quick: bool = False,
    losses: Sequence[str] | None = None,
    times: bool = False,
    progress: Progress | None = None,
) -> pandas.DataFrame:
    """One row per loss and seed, of every loss trained with every seed.

    Args:
        out: folder for train.csv, train.md and train.png; None writes nothing.
        quick: one seed and a few steps, to see that it works.
        losses: names out of LOSSES; None takes those that are `compared`.
        times: report seconds, too; they mean something on a machine that does nothing else.
        progress: a bar that gains one step per loss and seed; None shows one on stderr.

    `summary` and `markdown` make a table of it.
    """
    settings = QUICK if quick else Settings()
    names = compared() if losses is None else list(losses)
    unknown = [name for name in names if name not in LOSSES]
    if unknown:
        raise ValueError(f"losses must be out of {list(LOSSES)}; got {unknown}")
    scenes = photographs()
    parts = [scene.held_out for scene in scenes]
    predictions: dict[str, list[Tensor]] = {}
    rows = []
    # Seeds are the outer loop, so that a change of the machine's load meets all losses alike.
    plan = [(seed, name) for seed in settings.seeds for name in names]
    bar = progress or Progress(0)
    bar.more(len(plan))
    for seed, name in plan:
        bar.announce(f"train: {name}, seed {seed}")
        network, seconds = train(name, seed, scenes, settings)
        predicted = [predict(network, part.image) for part in parts]
        predictions.setdefault(name, predicted)
        rows.append(_row(name, seed, settings, predicted, parts, seconds if times else None))
        bar.step(f"train: {name}, seed {seed}")
    if progress is None:
        bar.close()
    frame = pandas.DataFrame(rows)
    if out is not None:
        _write(Path(out), frame, parts, predictions)
    return frame


def _row(
    name: str,
    seed: int,
    settings: Settings,
    predictions: Sequence[Tensor],
    parts: Sequence[Photograph],
    seconds: pandas.DataFrame | None,
) -> dict[str, object]:
    shares = intersection_over_union(predictions, [part.label for part in parts])
    row: dict[str, object] = {
        "loss": name,
        "seed": seed,
        "steps": settings.steps,
        "miou": float(shares.mean()),
        **{f"iou_{label}": float(share) for label, share in zip(CLASSES, shares, strict=True)},
    }
    if seconds is not None:
        row["seconds_per_step"] = seconds["step"].median()
        row["loss_share"] = (seconds["loss"] / seconds["step"]).median()
    return row


def summary(frame: pandas.DataFrame) -> pandas.DataFrame:
    """One row of text per loss: mean and standard deviation over the seeds."""
    by_seed = frame.pivot(index="seed", columns="loss", values="miou")
    baseline = by_seed.get(BASELINE)
    rows = []
    for name, runs in frame.groupby("loss", sort=False):
        row: dict[str, object] = {"loss": name, "mIoU %": _spread(runs["miou"])}
        row["by seed"] = " / ".join(f"{100 * value:.1f}" for value in runs["miou"])
        if baseline is not None:
            same = name == BASELINE
            row[_AGAINST] = "" if same else _spread(by_seed[name] - baseline, "+")
        row |= {f"{label} %": _spread(runs[f"iou_{label}"]) for label in CLASSES}
        if "seconds_per_step" in frame:
            row["seconds per step"] = f"{runs['seconds_per_step'].median():.3f}"
            row["loss's share"] = f"{runs['loss_share'].median():.1%}"
        rows.append(row)
    return pandas.DataFrame(rows)


def _spread(values: pandas.Series, sign: str = "") -> str:
    mean = f"{100 * values.mean():{sign}.2f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * values.std():.2f}"


def markdown(frame: pandas.DataFrame) -> str:
    """The table in Markdown, with what has to be known to read it."""
    return f"{text.markdown(*_cells(frame))}\n\n{_notes(frame)}\n"


def _cells(frame: pandas.DataFrame) -> tuple[list[str], list[list[str]]]:
    table = summary(frame)
    return list(table.columns), table.to_numpy().tolist()


def _notes(frame: pandas.DataFrame) -> str:
    seeds, steps = frame["seed"].unique(), frame["steps"].max()
    notes = f"""\
Mean IoU on the held-out right part (40 %) of two photographs, `skimage.data.coins()` and
`page()`, after {steps} steps on the left part; mean ± standard deviation over {len(seeds)} seed(s).

These photographs cannot rank losses. They show that each loss trains: another seed moves the
mean IoU about as far as another loss does, and there is one split of two images.

"{_AGAINST}" is the difference seed by seed: same initial weights, same crops, cross
entropy for the first fifth of the steps whatever the loss, same hyper-parameters. These were chosen
by cross entropy's own result on this held-out part with other seeds; the leaky rectifiers and the
first fifth were chosen after a first run in which rectifiers without a leak died on a rare class
under some losses. The labels come from scikit-image's published recipes; void pixels are left out.
The picture shows seed {seeds[0]}."""
    timing = [_TIMING] if "seconds_per_step" in frame else []
    names = frame["loss"].unique()
    more = [words for name, words in ((UPSAMPLED, _HALF), (FINE_TUNES, _TUNED)) if name in names]
    return "\n".join([notes, *more, *timing, *_missed_classes(frame)])


def _missed_classes(frame: pandas.DataFrame) -> Iterator[str]:
    # A run that never finds a class dominates mean and spread, so the reader has to know of it.
    for label in CLASSES:
        for _, row in frame[frame[f"iou_{label}"] < 0.01].iterrows():
            yield f"\n{row['loss'].capitalize()} with seed {row['seed']} did not learn {label}."


def picture(
    path: Path, parts: Sequence[Photograph], predictions: Mapping[str, Sequence[Tensor]]
) -> None:
    """Draw photograph, label and each loss's prediction side by side, for the first seed."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    colours = ListedColormap(["#20304a", "#f2b134", "#4fb0c6", "#c8c8c8"])  # the last one is void
    void = len(CLASSES)
    columns = 2 + len(predictions)
    figure = Figure(figsize=(2.4 * columns, 3.0 * len(parts)), layout="constrained")
    grid = figure.subplots(len(parts), columns, squeeze=False)
    for row, (axes, part) in enumerate(zip(grid, parts, strict=True)):
        maps = {"label (grey: void)": part.label} | {
            name: predicted[row] for name, predicted in predictions.items()
        }
        axes[0].imshow(part.image[0].numpy(), cmap="gray")
        axes[0].set_title(f"{part.name}, held-out part", fontsize=9)
        for axis, (name, classes) in zip(axes[1:], maps.items(), strict=True):
            axis.imshow(classes.clamp(max=void).numpy(), cmap=colours, vmin=0, vmax=void)
            axis.set_title(name, fontsize=9)
        for axis in axes:
            axis.set_axis_off()
    figure.savefig(path, dpi=120)


def _write(
    folder: Path,
    frame: pandas.DataFrame,
    parts: Sequence[Photograph],
    predictions: Mapping[str, Sequence[Tensor]],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / "train.csv", index=False)
    (folder / "train.md").write_text(markdown(frame), encoding="utf-8")
    picture(folder / "train.png", parts, predictions)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `python -m perf train`: 1 if a library is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m perf train",
        description="Cross entropy against the project's losses on real photographs.",
    )
    parser.add_argument("--out", type=Path, help="folder for train.csv, train.md and train.png")
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps")
    parser.add_argument(
        "--times", action="store_true", help="seconds per step too, on a machine that is idle"
    )
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), metavar="NAME")
    options = parser.parse_args(arguments)
    try:
        frame = run(options.out, options.quick, options.losses, options.times)
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{text.plain(*_cells(frame))}\n\n{_notes(frame)}")
    return 0
