"""What Triton finds a compiled kernel by, on disk: a key, which has to depend on all device code.

It is a hash of the kernel's source and of the functions that this calls by name. Two things are
missing from it.

- Functions that come in a record, as those of a loss do, are in it by their names alone. After an
  update of the package Triton would launch what it had compiled for the functions of before. Here a
  record has a key of its own, made of theirs.
- Triton 3.6 has the constants of those called functions in it that were hashed before their
  caller. So the key depends on what else the process has compiled, and the next process may have
  to compile again. Here all functions are hashed before those that call them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from triton.runtime.jit import JITCallable


def complete_key(kernel: JITCallable, arguments: Iterable[Any]) -> None:
    """Have the key of a kernel depend on all device code that it is compiled of.

    Args:
        kernel: the kernel.
        arguments: what it is compiled for; device functions in tuples are in NamedTuples.

    Raises:
        TypeError: device functions are in a bare tuple, which cannot have a key.
    """
    _hash(kernel)
    for argument in arguments:
        found = list(functions_in(argument))
        for function in found:
            _hash(function)
        record: Any = type(argument)
        if found and record is tuple:
            raise TypeError(f"device functions must be in a NamedTuple; got {argument!r}")
        if found and not hasattr(record, "cache_key"):
            record.cache_key = property(_key_of)


def functions_in(value: Any) -> Iterator[JITCallable]:
    """The device functions that are in a tuple, and in tuples in it, or the one that it is."""
    if isinstance(value, JITCallable):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from functions_in(part)


def _key_of(record: tuple[Any, ...]) -> str:
    return f"{record} {[function.cache_key for function in functions_in(record)]}"


def _hash(function: Any, pending: tuple[Any, ...] = ()) -> None:
    """Hash a function, after those that it calls."""
    if function.hash is not None or function in pending:
        return
    for called in _called_by(function):
        _hash(called, (*pending, function))
    _ = function.cache_key


def _called_by(function: Any) -> Iterator[JITCallable]:
    """The functions that a function names, of its own module or as members of others."""
    names = function.fn.__code__.co_names
    for name in names:
        value = function.fn.__globals__.get(name)
        members = (getattr(value, n, None) for n in names) if isinstance(value, ModuleType) else ()
        yield from (found for found in (value, *members) if isinstance(found, JITCallable))
