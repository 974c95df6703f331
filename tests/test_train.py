"""`python -m perf train`: its photographs, its measure and a short run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tritonloss import use_backend

pytest.importorskip("skimage", reason="the photographs are inside scikit-image's wheel")
pytest.importorskip("pandas")

from perf import train  # noqa: E402
from perf.photographs import CLASSES, VOID, photographs  # noqa: E402


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


@pytest.mark.parametrize("name", list(train.LOSSES))
def test_losses_ignore_void_pixels(name: str) -> None:
    _, loss = train.LOSSES[name]
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
        frame = train.run(tmp_path, quick=True, losses=names)
    assert frame["loss"].tolist() == names
    assert frame["miou"].between(0, 1).all() and frame["loss_share"].between(0, 1).all()
    assert {path.name for path in tmp_path.iterdir()} == {"train.csv", "train.md", "train.png"}
    assert "structural similarity" in (tmp_path / "train.md").read_text()


def test_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        train.run(losses=["nonsense"])
