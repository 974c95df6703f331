"""The README's lines of other people's decoders, before and after: both take the same step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tritonloss

README = Path(__file__).parents[2] / "README.md"
CLASSES, IGNORED, SIZE = 5, 255, (32, 64)


def lines(library: str, sign: str) -> str:
    """The README's lines for a library's decoder, before ("-") or after ("+")."""
    section = README.read_text(encoding="utf-8").partition("## Straight from the decoder\n")[2]
    section = section.partition("\n## ")[0]
    words, code = section.split("```")[:-1:2], section.split("```")[1::2]
    (found,) = [
        lines.removeprefix("diff\n")
        for prose, lines in zip(words, code, strict=True)
        if library in prose.strip().split("\n\n")[-1]
    ]
    return "\n".join(line[1:] for line in found.splitlines() if line[0] in f"{sign} ")


class Decoder(nn.Module):
    """A backbone and a classifier, as torchvision's `_SimpleSegmentationModel` calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, stride=8)
        self.classifier = nn.Conv2d(4, CLASSES, 1)

    def backbone(self, image: Tensor) -> dict[str, Tensor]:
        return {"out": self.features(image)}

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        logits = self.classifier(self.backbone(image)["out"])
        size = image.shape[-2:]
        return {"out": F.interpolate(logits, size=size, mode="bilinear", align_corners=False)}


def resize(input: Tensor, size: torch.Size, mode: str, align_corners: bool) -> Tensor:
    """mmsegmentation's, without its warning."""
    return F.interpolate(input, size, None, mode, align_corners)


def loss_decode(cls_score: Tensor, label: Tensor, ignore_index: int) -> Tensor:
    """mmsegmentation's cross entropy with avg_non_ignore=True."""
    loss = F.cross_entropy(cls_score, label, reduction="none", ignore_index=ignore_index)
    return loss.sum() / (label.numel() - (label == ignore_index).sum())


def of_transformers() -> tuple[nn.Module, Callable[[nn.Module], dict[str, Any]]]:
    segformer = pytest.importorskip("transformers.models.segformer")
    configuration = segformer.SegformerConfig(
        num_labels=CLASSES,
        depths=[1, 1, 1, 1],
        hidden_sizes=[4, 4, 4, 4],
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=8,
        semantic_loss_ignore_index=IGNORED,
    )
    model = segformer.SegformerForSemanticSegmentation(configuration)
    model.decode_head.classifier.weight.data *= 50  # logits as large as trained ones
    return model, lambda model: {"model": model}


def of_torchvision() -> tuple[nn.Module, Callable[[nn.Module], dict[str, Any]]]:
    return Decoder(), lambda model: {"model": model}


def of_mmsegmentation(align_corners: bool) -> Any:
    def names(model: nn.Module) -> dict[str, Any]:
        head = SimpleNamespace(
            loss_decode=loss_decode, align_corners=align_corners, ignore_index=IGNORED
        )
        logits = model.classifier(model.backbone(image())["out"])
        return {"self": head, "seg_logits": logits, "seg_label": target().unsqueeze(1)}

    return Decoder(), names


def image() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def target() -> Tensor:
    labels = torch.randint(CLASSES, (2, *SIZE), generator=torch.Generator().manual_seed(2))
    labels[:, :3] = IGNORED
    return labels


def after_a_step(model: nn.Module, names: Callable[..., dict[str, Any]], code: str) -> list[Tensor]:
    """The weights after a step with the loss that the code computes."""
    model = copy.deepcopy(model)
    torch.manual_seed(4)  # of dropout
    common = {"tritonloss": tritonloss, "F": F, "resize": resize}
    given = {**common, "image": image(), "target": target(), **names(model)}
    exec(code, given)  # a function's comprehension would not see its own names
    given["loss"].backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("library", "make"),
    [
        ("transformers", of_transformers),
        ("mmsegmentation", lambda: of_mmsegmentation(False)),
        pytest.param("mmsegmentation", lambda: of_mmsegmentation(True), marks=pytest.mark.thorough),
        ("torchvision", of_torchvision),
    ],
    ids=["transformers", "mmsegmentation", "mmsegmentation-align_corners", "torchvision"],
)
def test_a_step_is_the_one_with_interpolated_logits(library: str, make: Callable[..., Any]) -> None:
    torch.manual_seed(3)
    model, names = make()
    before, after = lines(library, "-"), lines(library, "+")
    assert "upsample" in after and "upsample" not in before
    expected = after_a_step(model, names, before)
    found = after_a_step(model, names, after)
    moved = 0
    for start, there, here in zip(model.parameters(), expected, found, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)
        moved += not torch.equal(start, there)
    assert moved > len(expected) / 2
