"""`python -m perf train`: its photographs, its measure and a short run."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.slices import OF_LABELS
from tritonloss import IoUSurrogate, collect_iou_pairs, use_backend

pytest.importorskip("skimage", reason="the photographs are inside scikit-image's wheel")
pandas = pytest.importorskip("pandas")

from perf.training import train  # noqa: E402
from perf.training.photographs import CLASSES, VOID, photographs  # noqa: E402


def test_every_part_of_a_photograph_has_its_classes_and_some_void() -> None:
    for scene, foreground in zip(photographs(), ("coin", "ink"), strict=True):
        for part in (scene.training, scene.held_out):
            assert part.image.shape[1:] == part.label.shape
            assert set(part.label.unique().tolist()) == {0, CLASSES.index(foreground), VOID}
        assert (scene.label == VOID).float().mean() < 0.06
        widths = scene.training.label.shape[1] + scene.held_out.label.shape[1]
        assert widths == scene.label.shape[1]


def test_intersection_over_union_by_hand() -> None:
    label = torch.tensor([[0, 0, 1], [2, 2, VOID]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 1], [2, 0, 2]], dtype=torch.uint8)
    shares = train.intersection_over_union([prediction], [label])
    assert shares.tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 2])


def test_every_loss_sees_the_same_crops_and_weights() -> None:
    scenes = photographs()
    for first, second in zip(
        *(train.batches(scenes, train.QUICK, seed=3) for _ in "ab"), strict=True
    ):
        assert all(map(torch.equal, first, second))
    networks = []
    for channels in (3, 5):
        torch.manual_seed(3)
        networks.append(train.Network(channels, width=4))
    bodies = [
        [value for name, value in network.state_dict().items() if not name.startswith("head")]
        for network in networks
    ]
    assert all(map(torch.equal, *bodies))


def test_every_loss_has_the_same_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first fifth of the steps has cross entropy: each loss takes over the same network."""
    settings = train.Settings(steps=5, batch=2, crop=24, width=4)
    assert train.Settings().warm_up == train.Settings().steps // 5 and settings.warm_up == 1
    scenes = photographs()
    taken_over = []
    baseline = train.LOSSES[train.BASELINE]
    at_labels = [name for name in train.LOSSES if name != train.UPSAMPLED]
    for name in [name for name in at_labels if name != train.BASELINE]:
        called: list[tuple[str, torch.Tensor]] = []

        def recorded(label: str, function: train.Loss, calls: list = called) -> train.Loss:
            def call(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
                calls.append((label, logits.detach().clone()))
                return function(logits, target)

            return call

        with monkeypatch.context() as patch, use_backend("reference"):
            own = recorded("own", train.LOSSES[name])
            both = {train.BASELINE: recorded("first", baseline), name: own}
            patch.setattr(train, "LOSSES", both)
            _, seconds = train.train(name, 0, scenes, settings)
        first = 4 if name == train.FINE_TUNES else 1
        assert [label for label, _ in called] == ["first"] * first + ["own"] * (5 - first)
        assert len(seconds) == 5 - first  # the first steps are not timed as the loss's own
        taken_over.append(called[1][1])
    assert all(torch.equal(logits, taken_over[0]) for logits in taken_over)


@pytest.mark.parametrize("name", list(train.LOSSES))
def test_units_that_are_negative_everywhere_still_learn(name: str) -> None:
    """With rectifiers that do not leak, such units and all below them would get no gradient."""
    loss = train.LOSSES[name]
    torch.manual_seed(0)
    network = train.network_of(name, width=4)
    for block in (*network.down, *network.up):
        torch.nn.init.constant_(block[-2].bias, -10.0)  # before the last rectifier
    images, labels = next(train.batches(photographs(), train.QUICK, seed=0))
    with use_backend("reference"):
        loss(network(images), labels).backward()
    for parameter_name, parameter in network.named_parameters():
        if not parameter_name.startswith("embed"):  # which a loss of logits knows nothing of
            assert parameter.grad is not None and (parameter.grad != 0).any(), parameter_name


@pytest.mark.parametrize("name", list(train.CONTRASTS))
def test_contrast_trains_the_embeddings(name: str) -> None:
    """With a bank from the second step on: before the first it holds nothing."""
    torch.manual_seed(0)
    network = train.network_of(name, width=4)
    assert network.embed is not None
    before = network.embed.weight.detach().clone()
    contrast = train.Contrast(0, train.CONTRASTS[name])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    steps = train.batches(photographs(), train.Settings(batch=2, crop=32, width=4), seed=0)
    with use_backend("reference"):
        for number in (1, 2):
            train.step_of(network, optimizer, train.LOSSES[name], *next(steps), contrast)
            has_keys = number == 2 or contrast.bank is None
            assert torch.equal(network.embed.weight, before) != has_keys


@pytest.mark.parametrize("name", list(train.LOSSES))
def test_losses_ignore_void_pixels(name: str) -> None:
    loss = train.LOSSES[name]
    row = torch.tensor([0, 1, 2, VOID], dtype=torch.uint8).repeat_interleave(4)
    target = row.expand(1, 12, 16)
    logits = torch.zeros(1, 3, 12, 16, requires_grad=True)
    with use_backend("reference"):
        loss(logits, target).backward()
    assert logits.grad is not None
    assert (logits.grad[..., 12:] == 0).all() and (logits.grad[..., :12] != 0).any()


def test_quick_run_writes_table_and_picture(tmp_path: Path) -> None:
    names = [train.BASELINE, "structural similarity"]
    with use_backend("reference"):
        frame = train.run(tmp_path, quick=True, losses=names, times=True)
    assert frame["loss"].tolist() == names
    assert frame["miou"].between(0, 1).all() and frame["loss_share"].between(0, 1).all()
    assert {path.name for path in tmp_path.iterdir()} == {"train.csv", "train.md", "train.png"}
    text = (tmp_path / "train.md").read_text()
    assert "structural similarity" in text and "cannot rank losses" in text
    assert "seconds per step" in text and "Seconds are medians" in text
    untimed = train.markdown(frame.drop(columns=["seconds_per_step", "loss_share"]))
    assert "econds" not in untimed and "share" not in untimed


def test_the_kept_table_is_what_the_tool_writes() -> None:
    """It has no times, which a machine that others use, too, cannot give."""
    frame = pandas.read_csv(train.KEPT)
    assert train.compared()[0] == train.BASELINE and set(train.compared()) <= set(train.LOSSES)
    assert len(frame) == len(train.compared()) * len(train.Settings().seeds)
    kept = train.KEPT.with_suffix(".md").read_text(encoding="utf-8")
    assert kept == train.markdown(frame)


@pytest.mark.parametrize("size", [1.0, 8.0])
def test_the_kept_surrogate_knows_maps_of_one_class(size: float) -> None:
    """A surrogate that has never seen any may rate "all background" well."""
    surrogate = IoUSurrogate.load(train.SURROGATE)
    for scene, chosen in itertools.product(photographs(), range(len(CLASSES))):
        target = scene.held_out.label[None, :96, :96]
        logits = torch.zeros(1, len(CLASSES), 96, 96)
        logits[:, chosen] = size
        pairs = collect_iou_pairs([(logits, target)], ignore_index=VOID)
        features = surrogate.features(pairs.sums, pairs.counts, pairs.pixels.unsqueeze(1))
        predicted = surrogate.of_features(features)
        torch.testing.assert_close(predicted, pairs.iou_loss(), rtol=0, atol=0.1)


def test_every_loss_that_a_slice_declares_can_be_trained() -> None:
    declared = {example.function for example in OF_LABELS.values() if not example.binary}
    slices = {function.__module__.rpartition(".")[2].replace("_", " ") for function in declared}
    assert len(slices) == len(declared)
    assert set(train.LOSSES) == {
        *slices, train.UPSAMPLED, train.SUMMED, train.WITH_FIELD, *train.CONTRASTS
    }  # fmt: skip


def test_a_network_of_half_the_resolution_is_trained_with_interpolation() -> None:
    """What it has in common with the others starts the same, and the warm-up's loss is its own."""
    networks = []
    for name in (train.BASELINE, train.UPSAMPLED):
        torch.manual_seed(3)
        networks.append(train.network_of(name, width=4).state_dict())
    whole, half = networks
    common = [name for name in half if not name.startswith("head")]
    assert len(common) < len(whole) - 2  # the head has two tensors
    assert all(torch.equal(whole[name], half[name]) for name in common)

    network = train.network_of(train.UPSAMPLED, width=4)
    images, labels = next(train.batches(photographs(), train.QUICK, seed=0))
    logits = network(images)
    assert logits.shape[2:] == (train.QUICK.crop // 2, train.QUICK.crop // 2)
    with use_backend("reference"):
        fused = train.LOSSES[train.UPSAMPLED](logits, labels)
    torch.testing.assert_close(fused, train.LOSSES[train.BASELINE](logits, labels))
    assert train.predict(network, images[0]).shape == labels.shape[1:]


def test_a_new_loss_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but its example tells the tool of it."""

    def new_loss(logits: torch.Tensor, target: torch.Tensor, **options: int) -> torch.Tensor:
        return logits.square().mean() + options["ignore_index"]

    new_loss.__module__ = "tritonloss.pixelwise.new_squares"
    new = replace(next(iter(OF_LABELS.values())), function=new_loss)
    monkeypatch.setattr(train, "examples", lambda: [new])
    found = dict(train._declared())
    assert list(found) == ["new squares"]
    assert found["new squares"](torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4)) == VOID


def test_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        train.run(losses=["nonsense"])
