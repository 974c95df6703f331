"""The keys of kernels in Triton's cache: they follow all device code, in whatever order."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from triton.compiler.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tritonloss._core.kernel_keys import complete_key, functions_in

SOURCE = """
import triton.language as tl

LARGE = tl.constexpr(3)

def innermost(x):
    return x + LARGE

def inner(x):
    return innermost(x)

def outer(x, RECORD: tl.constexpr):
    return inner(x)

def member(x):
    return inner(x) * 2

def itself(x):
    return itself(x)
"""
NAMES = ("innermost", "inner", "outer", "member", "itself")


class Record(NamedTuple):
    name: str
    parts: tuple[Any, ...]


class Numbers(NamedTuple):
    first: int


def module(folder: Path, source: str = SOURCE) -> Any:
    """A module of device functions, anew."""
    path = folder / "device_functions.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("device_functions", path)
    assert spec is not None and spec.loader is not None
    found: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    for name in NAMES:
        setattr(found, name, JITFunction(getattr(found, name)))
    return found


def key_of(kernel: Any, record: Any) -> str:
    complete_key(kernel, [record])
    constants = {(1,): record}
    key: str = ASTSource(kernel, {"x": "i32", "RECORD": "constexpr"}, constants).hash()
    return key


@pytest.mark.parametrize("first", ["outer", "inner", "innermost"])
def test_the_order_of_hashing_does_not_matter(first: str, tmp_path: Path) -> None:
    expected, found = module(tmp_path), module(tmp_path)
    for name in ("innermost", "inner", "outer"):
        _ = getattr(expected, name).cache_key
    complete_key(getattr(found, first), [])
    complete_key(found.outer, [])
    assert found.outer.cache_key == expected.outer.cache_key


@pytest.mark.parametrize("changed", ["x + LARGE", "tl.constexpr(3)", "inner(x) * 2"])
def test_functions_of_a_record_count(changed: str, tmp_path: Path) -> None:
    """Of their own text, of what they call, and of constants."""
    keys = set()
    for source in (SOURCE, SOURCE.replace(changed, f"{changed} + 1"), SOURCE):
        functions = module(tmp_path, source)
        # The kernel itself is the same.
        keys.add(key_of(module(tmp_path).outer, Record("loss", (functions.member, 1))))
    assert len(keys) == 2


def test_what_a_record_is_otherwise_counts_as_before(tmp_path: Path) -> None:
    functions = module(tmp_path)
    one, other = (Record(name, (functions.member,)) for name in ("one", "other"))
    assert key_of(functions.outer, one) != key_of(functions.outer, other)
    assert list(functions_in((1, one, "word"))) == [functions.member]
    assert key_of(functions.outer, Numbers(1)) != key_of(functions.outer, Numbers(2))
    assert not hasattr(Numbers, "cache_key")


def test_a_function_that_calls_itself_is_hashed(tmp_path: Path) -> None:
    complete_key(module(tmp_path).itself, [])


def test_a_bare_tuple_cannot_have_a_key(tmp_path: Path) -> None:
    functions = module(tmp_path)
    with pytest.raises(TypeError, match="NamedTuple"):
        complete_key(functions.outer, [(functions.member,)])
