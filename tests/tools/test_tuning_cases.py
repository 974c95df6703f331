"""All there is to tune: a case for whatever a launcher looks up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

import tritonloss
from tests.slices import OF_MAPS, as_a_number, is_upsampled, one_of_each
from tests.tools.tuned import (
    CPU,
)
from tritonloss import __main__, functional, linalg
from tritonloss._core import configurations, tuning_inputs
from tritonloss._tools import tuning_cases
from tritonloss._tools.launches import recorded
from tritonloss.regions.plan import kernels_of_large_images


def test_shapes_choose_the_classes_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = tuning_cases.tuning_cases("ssim_forward", [(1, 150, 64, 64)])
    assert {case.classes for case in cases} == {150}
    assert {case.layout for case in cases} == {"contiguous"}
    assert {case.shape for case in cases} == {(1, 150, 64, 64)}
    with pytest.raises(SystemExit):
        __main__.main(["tune", "--shapes", "4x19x1024"])


def test_cases_cover_buckets_and_layouts_of_every_sized_operator() -> None:
    cases = tuning_cases.tuning_cases()
    assert len({case.key for case in cases}) == len(cases)
    stated = [case for name in tuning_cases.slices() for case in tuning_cases.own_cases(name)]
    assert {case.slice for case in cases[:3]} >= set(tuning_cases.slices()[:3])
    for case in stated:
        same = [c for c in cases if c.operator == case.operator and c.dtype == case.dtype]
        if case.sized is not None:
            buckets = {(configurations.bucket_of(c.classes), c.layout) for c in same}
            sizes = [size for size in tuning_cases.SIZES if size[1] in case.layouts]
            assert len(buckets) >= len(sizes)
    last = cases[-1]
    again = tuning_cases.same_case(last.slice, last.number, last.shape, last.layout)
    assert again.key == last.key and again.candidates == last.candidates


@contextmanager
def questions(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, configurations.Configuration]]:
    """The entries that launchers look up in the block, with their heuristics; no kernel runs."""
    asked: dict[str, configurations.Configuration] = {}

    def answer(
        operator: str,
        *,
        device: torch.device,
        heuristic: configurations.Configuration,
        **question: Any,
    ) -> configurations.Configuration:
        asked[configurations.key(operator, **question)] = dict(heuristic)
        return heuristic

    with monkeypatch.context() as patch, recorded("skip"):
        for module in [module for name, module in sys.modules.items() if "tritonloss." in name]:
            if hasattr(module, "launch_configuration"):
                patch.setattr(module, "launch_configuration", answer)
        patch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)
        yield asked


def ask_losses(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    """Forward and backward of every loss with its defaults, and with other standard options."""
    logits = tuning_inputs.random_map((1, 19, 24, 40), layout, dtype, device).requires_grad_()
    target = tuning_inputs.random_labels((1, 19, 24, 40), device)
    ways = one_of_each(OF_MAPS.values()).values()
    results = [way.function(*way.arguments(logits, target)) for way in ways]
    losses = [as_a_number([r] if isinstance(r, torch.Tensor) else r) for r in results]
    losses += [
        functional.rmi_loss(logits, target, pooling="nearest"),
        functional.rmi_loss(logits, target, pooling=None, ignore="drop"),
        functional.rmi_loss(logits, target, pooling="max", pool_size=2, region_size=2),
    ]
    losses += [functional.rmi_loss(logits, target, pooling=pooling) for pooling in ("avg", None)]
    losses += [
        functional.rmi_loss(logits, target, region_size=region, pooling=None)
        for region in (2, 4, 5)
    ]
    for window_size in (3, 5, 7, 9, 11):
        losses.append(
            functional.structural_similarity_loss(logits, target, window_size=window_size)
        )
        losses.append(tritonloss.gaussian_statistics(logits, window_size)[0].sum())
    for window_size in (7, 11):
        losses.append(functional.ssim_loss(logits, target, window_size=window_size))
    for window_size, reduction in ((7, "mean"), (11, "mean"), (11, "none")):
        images = torch.sigmoid(logits), logits.detach().sigmoid().flip(-1).requires_grad_()
        similarity = functional.ssim(*images, window_size=window_size, reduction=reduction)
        losses.append(similarity.mean())
    anchors, labels = logits.movedim(1, -1).flatten(0, -2), target.flatten()
    losses += [
        functional.pixel_contrast_loss(anchors, labels),
        functional.pixel_contrast_loss(anchors, labels, anchors, labels, hardest=0.1),
    ]
    for loss in losses:
        loss.backward()


def ask_upsampled(dtype: torch.dtype, device: torch.device) -> None:
    """Every loss that interpolates, at the ratios of most networks."""
    for ratio in (4, 8) if dtype == torch.float32 else (4,):
        logits = tuning_inputs.random_map((1, 19, 4, 6), "contiguous", dtype, device)
        target = tuning_inputs.random_labels((1, 19, 4 * ratio, 6 * ratio), device)
        for way in one_of_each(way for way in OF_MAPS.values() if is_upsampled(way)).values():
            given = logits.requires_grad_(), target, *way.arguments(logits, target)[2:]
            if way.binary:
                given = logits[:, :1], target.clamp(max=1)
            way.function(*given, upsample="bilinear").backward()


def ask_metrics(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    """The confusion matrix, and the prediction, which takes the same configurations."""
    logits = tuning_inputs.random_map((1, 19, 24, 40), layout, dtype, device)
    target = tuning_inputs.random_labels((1, 19, 24, 40), device)
    tritonloss.confusion_matrix(logits, target)
    tritonloss.predict(logits)


def ask_linalg(dtype: torch.dtype, device: torch.device) -> None:
    """Every function on matrices, and its gradient, for orders in lanes and in tiles."""
    for order in (2, 4, 8, 9, 10, 16, 32, 64):
        matrices = torch.eye(order, dtype=dtype, device=device)[None].requires_grad_()
        results = (
            linalg.cholesky_ex(matrices)[0],
            linalg.logdet(matrices),
            linalg.inv(matrices),
            linalg.solve(matrices, torch.ones_like(matrices)[..., :1]),
        )
        for result in results:
            result.sum().backward()


def test_the_tuner_has_a_case_for_whatever_a_launcher_asks(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        questions(monkeypatch) as asked,
        tritonloss.use_backend("triton"),
        kernels_of_large_images(),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("contiguous", "channels_last", "strided"):
                ask_losses(dtype, layout, device)
                ask_metrics(dtype, layout, device)
            ask_upsampled(dtype, device)
        for dtype in (torch.float32, torch.float64):
            ask_linalg(dtype, device)
    cases = {case.key: case for case in tuning_cases.tuning_cases()}
    operators = {case.operator for case in cases.values()}
    assert {name.split("|")[0] for name in asked} == operators
    assert not asked.keys() - cases.keys()
    for name, heuristic in asked.items():
        assert cases[name].candidates[0] == heuristic, name
        assert all(other.keys() == heuristic.keys() for other in cases[name].candidates), name


def test_the_default_run_is_bounded() -> None:
    """All operators have a case among the first, whatever the budget leaves out of the others."""
    cases, slices = tuning_cases.tuning_cases(), len(tuning_cases.slices())
    assert len(cases) < 62 * slices
    first = {case.operator for case in cases if case.dtype == torch.float32}
    assert first == {case.operator for case in cases[: 10 * slices] if case.dtype == torch.float32}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_tuning_inputs_have_the_layout(layout: str) -> None:
    x = tuning_inputs.random_map((2, 3, 8, 16), layout, torch.bfloat16, CPU)
    assert x.shape == (2, 3, 8, 16) and x.dtype == torch.bfloat16
    assert x.is_contiguous() == (layout == "contiguous")
    assert x.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    labels = tuning_inputs.random_labels((2, 3, 33, 40), CPU)
    assert labels.shape == (2, 33, 40) and labels.max() < 3


def test_slices_are_found_in_rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "attic").mkdir()
    (tmp_path / "attic" / "__init__.py").write_text("")
    (tmp_path / "attic" / "old_loss.py").write_text("def tuning_cases():\n    return []\n")
    before = tuning_cases.slices()
    monkeypatch.setattr(tritonloss, "__path__", [*tritonloss.__path__, str(tmp_path)])
    assert set(tuning_cases.slices()) == {*before, "attic.old_loss"}


def test_every_tuning_case_has_distinct_candidates() -> None:
    cases = tuning_cases.tuning_cases()
    assert cases
    for case in cases:
        assert case.candidates and case.slice in tuning_cases.slices()
        for candidate in case.candidates:
            assert configurations._is_configuration(candidate), (case.key, candidate)
            assert case.candidates.count(candidate) == 1, (case.key, candidate)
