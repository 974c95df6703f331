"""Sampling of anchors: counted by hand, for both rules of groups and all strategies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tritonloss
from tritonloss import sample_anchors
from tritonloss.functional import pixel_contrast_loss

pytestmark = pytest.mark.parametrize("small_tiles", ["slices"], indirect=True)

SIZE = (3, 6, 12, 14)


def maps(seed: int = 0, classes: int = 4, scale: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings that say in which pixel they are, labels with rare classes, and predictions."""
    generator = torch.Generator().manual_seed(seed)
    images, dims, height, width = SIZE
    place = torch.arange(images * height * width, dtype=torch.float32)
    embeddings = place.view(images, 1, height, width) + torch.arange(dims).view(1, -1, 1, 1) / 8
    shape = (images, height * scale, width * scale)
    target = (torch.rand(shape, generator=generator) ** 2 * classes).long()
    target[torch.rand(shape, generator=generator) < 0.1] = 255
    target[torch.rand(shape, generator=generator) < 0.1] = -3
    prediction = torch.randint(classes, (images, height, width), generator=generator)
    return embeddings, target, prediction


def expected_counts(
    labels: Tensor, is_hard: Tensor, max_samples: int, max_views: int, strategy: str, groups: str
) -> dict[tuple[int, int], tuple[int, int]]:
    """(class, image or -1) -> how many hard and other anchors there are, by the released rule."""
    sizes = {}
    for image in range(len(labels)) if groups == "image" else (-1,):
        of_image = labels[image] if image >= 0 else labels
        hard_of_image = is_hard[image] if image >= 0 else is_hard
        for c in of_image.unique().tolist():
            if c in (255, -3):
                continue
            hard = int((hard_of_image & (of_image == c)).sum())
            size = int((of_image == c).sum())
            if groups == "class" or size > max_views:
                sizes[c, image] = hard, size - hard
    views = max(1, min(max_views, max_samples // max(len(sizes), 1)))
    found = {}
    for group, (hard, easy) in sizes.items():
        if strategy != "semi_hard":
            keep = min(hard, views)
        elif hard >= views / 2 and easy >= views / 2:
            keep = views // 2
        elif hard >= views / 2:
            keep = views - easy
        else:
            keep = hard
        keep = min(keep, hard)
        found[group] = keep, min(easy, views - keep)
    return found


@pytest.mark.parametrize("groups", ["image", "class"])
@pytest.mark.parametrize("strategy", ["semi_hard", "hard", "random"])
@pytest.mark.parametrize(("max_samples", "max_views"), [(1024, 20), (60, 20), (40, 5), (1024, 200)])
def test_counts_of_every_group(
    max_samples: int, max_views: int, strategy: str, groups: str, device: torch.device
) -> None:
    for seed in range(5):
        embeddings, target, prediction = maps(seed)
        given = [x.to(device) for x in (embeddings, target, prediction)]
        anchors, labels = sample_anchors(
            *given,
            max_samples=max_samples, max_views=max_views, strategy=strategy, groups=groups,
        )  # fmt: skip
        assert anchors.shape == (max_samples, SIZE[1]) and labels.shape == (max_samples,)
        anchors, labels = anchors.cpu(), labels.cpu()
        there = labels >= 0
        count = int(there.sum())
        assert there[:count].all() and not anchors[count:].any() and (labels[count:] == -1).all()
        assert torch.equal(labels[:count], labels[:count].sort().values)
        pixels = anchors[:count, 0].long()
        assert len(pixels.unique()) == count
        assert torch.equal(anchors[:count, 5], anchors[:count, 0] + 5 / 8)
        assert torch.equal(target.flatten()[pixels], labels[:count])

        is_hard = prediction != target
        wanted = expected_counts(target, is_hard, max_samples, max_views, strategy, groups)
        image = pixels // (SIZE[2] * SIZE[3]) if groups == "image" else torch.full_like(pixels, -1)
        for (c, number), (hard, easy) in wanted.items():
            mine = pixels[(labels[:count] == c) & (image == number)]
            if strategy != "random":
                assert int(is_hard.flatten()[mine].sum()) == hard
            size = int((target == c).sum())
            assert len(mine) == min(hard + easy if strategy != "random" else max_views, size,
                                    max(max_samples // len(wanted), 1))  # fmt: skip
        assert count == sum(
            len(pixels[(labels[:count] == c) & (image == number)]) for c, number in wanted
        )


def test_a_generator_repeats_the_draw_and_every_pixel_has_its_turn(device: torch.device) -> None:
    given = [x.to(device) for x in maps()]

    def draw(seed: int, **options: Any) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return sample_anchors(*given, max_views=10, generator=generator, **options).embeddings

    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    for options in ({"strategy": "random"}, {"groups": "class"}):
        seen = torch.cat([draw(seed, **options)[:, 0] for seed in range(200)]).unique()
        present = (given[1] >= 0) & (given[1] != 255)
        if options.get("groups") is None:
            for image in range(SIZE[0]):
                for c in range(4):
                    if int((given[1][image] == c).sum()) <= 10:
                        present[image] &= given[1][image] != c
        assert len(seen) >= int(present.sum())


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_labels_and_logits_of_other_resolutions(scale: int, device: torch.device) -> None:
    embeddings, target, prediction = (x.to(device) for x in maps(scale=scale))
    near = F.interpolate(target[:, None].double(), size=SIZE[2:], mode="nearest")[:, 0].long()
    logits = F.one_hot(prediction, 4).movedim(-1, 1).float()
    logits = logits.repeat_interleave(2, 2).repeat_interleave(2, 3)
    options: dict[str, Any] = {"max_views": 20}
    draws = []
    for labels, found in ((near, prediction), (target, logits), (target.to(torch.int16), logits)):
        generator = torch.Generator(device).manual_seed(0)
        draws.append(sample_anchors(embeddings, labels, found, generator=generator, **options))
    for other in draws[1:]:
        assert torch.equal(other.embeddings, draws[0].embeddings)
        assert torch.equal(other.labels, draws[0].labels)
    assert (draws[0].labels >= 0).any()


@pytest.mark.parametrize(
    "shape", [(0, 6, 4, 5), (2, 6, 4, 5)], ids=["no image", "no pixel of a class"]
)
def test_nothing_to_sample(shape: tuple[int, ...], device: torch.device) -> None:
    embeddings = torch.randn(shape, device=device, requires_grad=True)
    target = torch.full((shape[0], 4, 5), 255, device=device)
    anchors, labels = sample_anchors(embeddings, target, target, max_samples=17)
    assert anchors.shape == (17, 6) and (labels == -1).all()
    loss = pixel_contrast_loss(anchors, labels)
    loss.backward()
    assert loss == 0 and embeddings.grad is not None and not embeddings.grad.any()


def test_an_embedding_without_a_class_has_no_part(device: torch.device) -> None:
    embeddings, target, prediction = (x.to(device) for x in maps())
    embeddings = embeddings.masked_fill(((target < 0) | (target == 255))[:, None], float("nan"))
    leaf = embeddings.requires_grad_()
    anchors, labels = sample_anchors(leaf, target, prediction, max_views=20)
    assert anchors.isfinite().all()
    anchors.square().sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert int((leaf.grad != 0).any(1).sum()) == int((labels >= 0).sum())


def test_compiled_without_a_graph_break(device: torch.device) -> None:
    torch._dynamo.reset()
    embeddings, target, prediction = (x.to(device) for x in maps())
    compiled = torch.compile(sample_anchors, fullgraph=True, backend="eager")
    with tritonloss.use_backend("triton"):
        anchors, labels = compiled(embeddings, target, prediction, max_views=20)
    assert anchors.shape == (1024, 6) and (labels >= 0).any()


def test_wrong_arguments() -> None:
    embeddings, target, prediction = maps()
    wrong: Any
    for wrong, error, message in (
        ((embeddings.long(), target, prediction), TypeError, "^embeddings must be .*got int64"),
        ((embeddings[0], target, prediction), ValueError, "^embeddings must be .*of shape .6, 12"),
        ((embeddings, target.float(), prediction), TypeError, "^target must hold integer"),
        ((embeddings, target[:2], prediction), ValueError, r"^target must hold .*\(3, H, W\)"),
        ((embeddings, target, prediction[0]), ValueError, "^prediction must hold logits"),
        ((embeddings, target, None), TypeError, "^prediction must hold logits .*; got NoneType"),
        ((embeddings, target, prediction.to("meta")), ValueError, "^prediction must be on the dev"),
    ):
        with pytest.raises(error, match=message):
            sample_anchors(*wrong)
    for options in ({"max_samples": 0}, {"max_views": 1.5}, {"strategy": "easy"}, {"groups": "x"}):
        with pytest.raises((TypeError, ValueError), match=f"^{next(iter(options))} must be"):
            sample_anchors(embeddings, target, prediction, **options)  # type: ignore[arg-type]
