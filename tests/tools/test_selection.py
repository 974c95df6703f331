"""The short selection of tests shows every value of every parameter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.conftest import covering


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
