"""Counting labels, and margin offsets from the counts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

import kernels_reference
import tritonloss
from tests.oracle import LAYOUTS, as_layout
from tests.ranks import of_ranks
from tritonloss import MarginOffsets, count_labels, margin_offsets
from tritonloss.metrics import label_statistics

INTEGERS = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64,
]  # fmt: skip


def label_map(seed: int = 0, shape: tuple[int, ...] = (2, 5, 7)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, shape, generator=generator)
    return labels.where(torch.rand(shape, generator=generator) > 0.1, 100)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_integer(dtype: torch.dtype, device: torch.device) -> None:
    labels = label_map()
    counts = count_labels(labels.to(device, dtype), 6, ignore_index=100)
    assert counts.dtype == torch.int64 and counts.device.type == device.type
    expected = [int((labels == index).sum()) for index in range(6)]
    assert counts.tolist() == expected
    assert torch.equal(kernels_reference.count_labels(labels, 6, ignore_index=100), counts.cpu())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str) -> None:
    labels = as_layout(label_map(), layout)
    assert torch.equal(
        count_labels(labels, 4, ignore_index=100),
        torch.bincount(labels[labels != 100], minlength=4),
    )


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1, 1, 1)], ids=str)
def test_every_shape(shape: tuple[int, ...]) -> None:
    assert count_labels(torch.zeros(shape, dtype=torch.uint8), 2).tolist() == [math.prod(shape), 0]


def test_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = label_map(shape=(9, 11))
    expected = count_labels(labels, 4, ignore_index=100)
    monkeypatch.setattr(label_statistics, "_CHUNK", 10)
    assert torch.equal(count_labels(labels, 4, ignore_index=100), expected)
    with pytest.raises(ValueError, match=rf"got {int((labels == 100).sum())} labels outside"):
        count_labels(labels, 4, ignore_index=None)


def test_counts_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not counted one by one here: each of a few pixels is counted as 2^30."""
    bincount = torch.bincount
    monkeypatch.setattr(
        torch, "bincount", lambda labels, minlength: bincount(labels, minlength=minlength) << 30
    )
    maps = [torch.tensor([0, 1, 1]), torch.tensor([1, 1, 1])]
    assert count_labels(maps, 2).tolist() == [2**30, 5 * 2**30]


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_two_to_the_31_pixels(device: torch.device) -> None:
    labels = torch.ones(2**31 + 5, dtype=torch.uint8, device=device)
    labels[-2:] = 0
    assert count_labels(labels, 3).tolist() == [2, 2**31 + 3, 0]


def test_stream() -> None:
    """A DataLoader's batches, and a generator's maps of different sizes and dtypes."""
    maps = [label_map(seed, (4, 6)) for seed in range(5)]
    expected = sum(count_labels(labels, 4, ignore_index=100) for labels in maps)
    assert torch.equal(count_labels(DataLoader(maps, batch_size=2), 4, ignore_index=100), expected)

    def generate() -> Iterator[Tensor]:
        for position, labels in enumerate(maps):
            yield labels.to(INTEGERS[position])

    assert torch.equal(count_labels(generate(), 4, ignore_index=100), expected)
    assert count_labels([], 3).tolist() == [0, 0, 0]


class Streamed(IterableDataset[Tensor]):
    """Two label maps; a DataLoader over it has no length."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from (torch.tensor([0, 1]), torch.tensor([1, 2]))


class Indexed(Dataset[Tensor]):
    """Two label maps, and the last one for every index beyond."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([[0, 1], [1, 2]][min(index, 1)])


@pytest.mark.parametrize("progress", [False, True])
def test_data_sets(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    for labels in (Streamed(), DataLoader(Streamed()), Indexed(), DataLoader(Indexed())):
        assert count_labels(labels, 3, progress=progress).tolist() == [1, 2, 1]
    shown = capsys.readouterr().err
    assert shown.count("2 maps") == shown.count("2 of 2 [####") == (2 if progress else 0)


def test_stream_is_not_held() -> None:
    alive: list[int] = []

    def generate() -> Iterator[Tensor]:
        import weakref

        references = []
        for _ in range(4):
            labels = torch.zeros(8, dtype=torch.uint8)
            references.append(weakref.ref(labels))
            yield labels
            del labels
            alive.append(sum(reference() is not None for reference in references))

    count_labels(generate(), 2)
    assert max(alive) <= 1


def test_progress_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    maps = [torch.zeros(3, dtype=torch.uint8)] * 3
    count_labels(maps, 2)
    assert capsys.readouterr().err == ""
    count_labels(maps, 2, progress=True)
    assert "counting labels: 3 of 3 [####" in capsys.readouterr().err
    count_labels(iter(maps), 2, progress=True)
    assert "counting labels: 3 maps" in capsys.readouterr().err
    with pytest.raises(ValueError, match="labels, map 1, must"):
        count_labels([maps[0], maps[0] + 7], 2, progress=True)
    assert capsys.readouterr().err.endswith("\n")


def test_labels_outside_are_named_and_counted() -> None:
    labels = torch.tensor([0, 1, 7, 7, 255, -3])
    with pytest.raises(ValueError) as refusal:
        count_labels(labels, 2)
    assert str(refusal.value) == (
        "labels must hold labels from 0 to 1 or ignore_index=255; got 3 labels outside: "
        "-3 (1x), 7 (2x)"
    )
    with pytest.raises(ValueError, match=r"labels, map 1, must .*got 1 .*255 \(1x\)"):
        count_labels([labels[:2], labels[:2], labels[4:5]][::2] + [labels[:1]], 2, ignore_index=9)
    # An ignore label that is a class's number is not counted.
    assert count_labels(labels[:2], 2, ignore_index=1).tolist() == [1, 0]


def test_wrong_arguments() -> None:
    labels = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(TypeError, match="labels must be a tensor of integers; got float32"):
        count_labels(labels.float(), 2)
    with pytest.raises(TypeError, match="labels must be a tensor of integers; got bool"):
        count_labels(labels.bool(), 2)
    with pytest.raises(TypeError, match="map 1, must be a tensor of integers; got list"):
        count_labels([labels, [0]], 2)
    with pytest.raises(TypeError, match="labels must be an integer tensor or an iterable"):
        count_labels(3, 2)
    with pytest.raises(TypeError, match="labels must be .*got ndarray, of which torch.as_tensor"):
        count_labels(labels.numpy(), 2)
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup .*got int"):
        count_labels(labels, 2, process_group=-100)  # what torch has for a rank outside a group
    with pytest.raises(ValueError, match="num_classes must be .*got 0"):
        count_labels(labels, 0)
    with pytest.raises(TypeError, match="num_classes must be .*2.0"):
        count_labels(labels, 2.0)
    with pytest.raises(TypeError, match="ignore_index must be"):
        count_labels(labels, 2, ignore_index="255")
    with pytest.raises(TypeError, match="progress must be"):
        count_labels(labels, 2, progress=1)


def count_on_one_rank(rank: int) -> tuple[Tensor, list[str], Tensor]:
    group = torch.distributed.group.WORLD
    counts = count_labels(torch.full((3,), rank), 3, process_group=group)
    messages = []

    def broken() -> Iterator[Tensor]:
        yield torch.zeros(3, dtype=torch.int64)
        if rank == 1:
            raise OSError("a file is missing")

    for labels in (torch.full((3,), 9 * rank), broken(), torch.zeros(1, dtype=torch.int64)):
        try:
            again = count_labels(labels, 3, process_group=group)
        except (ValueError, OSError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return counts, messages, again


def test_process_group(tmp_path: Path) -> None:
    """The counts of all ranks; whatever goes wrong on one of them is an error on all."""
    ranks = of_ranks(2, count_on_one_rank, tmp_path)
    for counts, messages, again in ranks:
        assert counts.tolist() == [3, 3, 0] and again.tolist() == [2, 0, 0]
        assert len(messages) == 2
    assert all(m.startswith("RuntimeError: labels must be countable") for m in ranks[0][1])
    assert "9 (3x)" in ranks[1][1][0] and ranks[1][1][1] == "OSError: a file is missing"


def test_offsets_are_the_papers() -> None:
    """Algorithm 1 by hand for three classes."""
    counts = [9000, 900, 100]
    offsets = margin_offsets(torch.tensor(counts), tau=5.0, upsilon=2.0)
    assert isinstance(offsets, MarginOffsets) and offsets.own.dtype == torch.float32
    for index, n_k in enumerate(counts):
        rest = 10000 - n_k
        share = n_k / 10000
        other = 5.0 * math.sqrt(rest) / n_k
        ratio = share * math.sqrt(n_k) / (2.0 * rest - share * math.sqrt(rest))
        assert offsets.other[index].item() == pytest.approx(other, rel=1e-6)
        assert offsets.own[index].item() == pytest.approx(ratio * other, rel=1e-6)
    reference = kernels_reference.margin_offsets(torch.tensor(counts), tau=5.0, upsilon=2.0)
    torch.testing.assert_close(offsets.own.double(), reference[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(offsets.other.double(), reference[1], rtol=1e-6, atol=0)


def test_offsets_make_the_bounds_equal() -> None:
    """Eq. 14 and 15: with the paper's mu every class has the same numerator over its denominator.

    The scaled offset rho_0k N_k / sqrt(N - N_k) is tau for all of them.
    """
    counts = torch.tensor([123456, 789, 31, 5000])
    offsets = margin_offsets(counts)
    scaled = offsets.other.double() * counts / (counts.sum() - counts).double().sqrt()
    torch.testing.assert_close(scaled, torch.full_like(scaled, 10.0), rtol=1e-6, atol=0)
    assert (offsets.own > 0).all() and (offsets.own < offsets.other).all()


def test_offsets_of_the_cityscapes_order() -> None:
    """Offsets are about 2.7e-4 for the commonest class and 0.13 for the rarest, own ones 1e-9."""
    shares = torch.tensor([0.37, 0.23, 0.16, 0.24 - 1e-3, 1e-3], dtype=torch.float64)
    offsets = margin_offsets((shares * 5.6e9).long())
    assert 1e-4 < offsets.other[0].item() < 1e-3
    assert offsets.other[4].item() > 50 * offsets.other[0].item()
    assert (offsets.own < 1e-7).all()


def test_offsets_of_counts_beyond_float64() -> None:
    """One pixel beside 2^60 of the other class: their difference is 1, and not 0."""
    offsets = margin_offsets(torch.tensor([2**60, 1]), upsilon=2.0)
    assert offsets.other[0].item() == pytest.approx(10 / 2**60)
    assert offsets.own.isfinite().all() and (offsets.own > 0).all()


def test_absent_classes_are_warned_of() -> None:
    counts = torch.tensor([900, 0, 100, 0])
    with pytest.warns(UserWarning, match=r"classes \[1, 3\]"):
        offsets = margin_offsets(counts)
    present = margin_offsets(counts[[0, 2]])
    assert torch.equal(offsets.other[[0, 2]], present.other)
    assert torch.equal(offsets.own[[0, 2]], present.own)
    assert (offsets.other[[1, 3]] == present.other.max()).all()
    assert (offsets.own[[1, 3]] == 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        margin_offsets(counts[[0, 2]])


@pytest.mark.parametrize(
    ("counts", "options", "error", "message"),
    [
        ([5.0, 3.0], {}, TypeError, "label_counts must .*float32"),
        ([5], {}, ValueError, r"label_counts must .*C of 2 or more; got shape \(1,\)"),
        ([[5, 3]], {}, ValueError, r"label_counts must .*got shape \(1, 2\)"),
        ([5, -3], {}, ValueError, "label_counts must .*got -3"),
        ([0, 7, 0], {}, ValueError, r"label_counts must .*at least two .*got \[1\]"),
        ([0, 0], {}, ValueError, r"label_counts must .*at least two .*got \[\]"),
        ([5, 3], {"tau": 0.0}, ValueError, "tau must .*got 0.0"),
        ([5, 3], {"upsilon": -1.0}, ValueError, "upsilon must .*got -1.0"),
        ([5, 3], {"upsilon": 1e-3}, ValueError, "upsilon must be larger .*got 0.001"),
    ],
)
def test_counts_without_offsets(
    counts: list[float], options: dict[str, float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        margin_offsets(torch.tensor(counts), **options)


def test_from_labels_to_the_loss() -> None:
    labels = label_map(shape=(1, 12, 12)).where(label_map(shape=(1, 12, 12)) < 4, 255)
    offsets = tritonloss.margin_offsets(tritonloss.count_labels(labels, 4))
    loss = tritonloss.MarginCalibratedLoss(offsets)
    with tritonloss.use_backend("reference"):
        assert loss(torch.zeros(1, 4, 12, 12), labels).isfinite()
