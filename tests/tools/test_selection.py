"""The short selection of tests shows every value of every parameter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.conftest import covering, share_of


def case(test: str, **parameters: Any) -> Any:
    item = SimpleNamespace(nodeid=f"{test}[{sorted(parameters.items())}]")
    if parameters:
        item.callspec = SimpleNamespace(params=parameters)

    class Item(SimpleNamespace):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

    return Item(**vars(item))


def test_every_value_of_every_parameter_is_shown_with_few_cases() -> None:
    product = [case("one", size=size, dtype=dtype) for size in range(4) for dtype in "abc"]
    alone = case("two")
    kept = covering([*product, alone])
    assert alone in kept
    shown = [item.callspec.params for item in kept if item is not alone]
    assert {each["size"] for each in shown} == set(range(4))
    assert {each["dtype"] for each in shown} == set("abc")
    assert len(shown) == 4


def test_shares_are_all_tests_and_large_ones_are_never_many_at_a_time() -> None:
    def item(number: int) -> Any:
        marked = number < 8
        return SimpleNamespace(number=number, get_closest_marker=lambda name: marked or None)

    items = [item(number) for number in range(50)]
    shares = [share_of(items, index, 10) for index in range(10)]
    assert sorted(one.number for share in shares for one in share) == list(range(50))
    assert [any(one.number < 8 for one in share) for share in shares] == [True] * 3 + [False] * 7
    assert all(4 <= len(share) <= 8 for share in shares)
    assert share_of(items, 0, 1) == items
