"""What a prepared launch tells Triton of its arguments: kinds, not values."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from tritonloss._core.prepared_launch import _any, _are_aligned, is_aligned, kind


class Sizes(NamedTuple):
    height: int
    share: float


@pytest.mark.parametrize("value", [0, 1, 16, 2**31 - 1, -5])
def test_a_number_is_known_by_its_width(value: int) -> None:
    assert _any(value) == _any(7) != value
    assert _any(2**31) == _any(2**40) and _any(2**40) >= 2**31
    # Neither 1 nor a multiple of 16, which Triton would specialise a kernel for.
    assert all(_any(x) != 1 and _any(x) % 16 for x in (7, 2**40))


@pytest.mark.parametrize("value", [True, 1.0, None, "mean"])
def test_what_is_no_integer_stays(value: Any) -> None:
    assert _any(value) is value


def test_tuples_keep_their_form_and_names() -> None:
    found = _any((16, Sizes(1, 0.5), ()))
    assert found == (_any(7), Sizes(_any(7), 0.5), ())
    assert isinstance(found[1], Sizes)


def test_single_elements_do_not_count_as_unaligned() -> None:
    values = torch.zeros(33)
    assert is_aligned(values) and not is_aligned(values[1:])
    assert kind(values[:32]) != kind(values[1:])
    assert _are_aligned({"a": values, "b": (values[16:], values[1])})
    assert not _are_aligned({"a": values, "b": (values[1:2],)})
