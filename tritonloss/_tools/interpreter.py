"""Triton's interpreter: whether it can run kernels in this process, and how it runs them faster."""

from __future__ import annotations

import re
from typing import Any

import numpy
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


@triton.jit
def _count_kernel(count_ptr, limit):
    """A loop up to a number that is known at run time, as nearly all kernels have."""
    count = 0
    for _ in tl.range(0, limit):
        count += 1
    tl.store(count_ptr, count)


def interpreter_problem() -> str | None:
    """What keeps Triton's interpreter from running kernels, in words; None if it runs them."""
    count = torch.zeros((), dtype=torch.int32)
    try:
        _count_kernel[(1,)](count, 3)
    except Exception as problem:  # whatever it is, no kernel can run
        reason = f"{type(problem).__name__}: {str(problem).strip()[:300]}"
    else:
        if int(count) == 3:
            return None
        reason = f"it counts to {int(count)} instead of 3"
    installed = f"Triton {triton.__version__}, numpy {numpy.__version__}"
    # It makes Python numbers of arrays with one element and an axis, which numpy has given up.
    if _version(triton.__version__) < (3, 7) and _version(numpy.__version__) >= (2, 4):
        reason = "that of Triton 3.6 needs numpy < 2.4"
    return f"Triton's interpreter cannot run here ({installed}): {reason}"


def _version(text: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def patch_language_once() -> None:
    """Make Triton's interpreter twice as fast, in this process.

    For every call of a device function it replaces all of triton.language by what computes on
    arrays, though the kernel around it has done so already. Here that is done once per kernel and
    module.
    """
    patched: set[int] | None = None  # modules, while a kernel runs
    patch_lang: Any = interpreter._patch_lang
    run: Any = interpreter.GridExecutor.__call__

    def patch_lang_once(function: Any) -> Any:
        module = id(function.__globals__)
        if patched is not None:
            if module in patched:
                return None
            patched.add(module)
        return patch_lang(function)

    def run_kernel(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal patched
        around, patched = patched, set()
        try:
            # What the kernel's own module is given is taken back in the end: it comes first, whole.
            return run(self, *arguments, **named)
        finally:
            patched = around

    if patch_lang.__name__ != patch_lang_once.__name__:
        module: Any = interpreter
        module._patch_lang = patch_lang_once
        module.GridExecutor.__call__ = run_kernel
