"""Triton's interpreter: whether it can run kernels in this process, and how it runs them faster."""

from __future__ import annotations

import re
from typing import Any

import numpy
import torch
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
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


def hasten_interpreter() -> None:
    """Make Triton's interpreter four times as fast, in this process.

    What it computes stays the same. Its time goes into work that it does over and over: at every
    call of a device function it replaces triton.language, and at every operation it makes the types
    of the same few shapes.
    """
    if interpreter._get_np_dtype.__module__ == interpreter.__name__:  # not yet
        _patch_language_once()
        _remember_shapes()
        _remember_dtypes()
        _leave_what_fits()


def _patch_language_once() -> None:
    """Replace a module's triton.language by what computes on arrays once for a kernel.

    Triton does so for every device function, though the kernel around it has done so already.
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

    module: Any = interpreter
    module._patch_lang = patch_lang_once
    module.GridExecutor.__call__ = run_kernel


def _remember_shapes() -> None:
    """Make what the types and the tensors of one shape have in common once."""
    of_blocks: dict[tuple[int, ...], tuple[Any, Any, str]] = {}
    of_tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}
    block_type: Any = tl.core.block_type
    tensor: Any = tl.core.tensor
    make_block, make_tensor = block_type.__init__, tensor.__init__

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        # Sizes of another type than int are not found, and checked by Triton.
        found = of_blocks.get(tuple(getattr(shape, "values", shape)))
        if found is None:
            make_block(self, element_ty, shape)
            of_blocks[tuple(self.shape.values)] = self.shape, self.numel, str(self.shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, text = found
        self.name = f"<{text}, {element_ty}>"

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        found = of_tensors.get(key)
        if found is None:
            make_tensor(self, handle, type)
            of_tensors[key] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = found

    block_type.__init__, tensor.__init__ = init_block, init_tensor


def _remember_dtypes() -> None:
    """Look up the NumPy dtype of a type once."""
    found: dict[str, numpy.dtype[Any]] = {}
    look_up: Any = interpreter._get_np_dtype

    def numpy_dtype(dtype: Any) -> numpy.dtype[Any]:
        known = found.get(dtype.name)
        if known is None:
            known = found[dtype.name] = look_up(dtype)
        return known

    module: Any = interpreter
    module._get_np_dtype = numpy_dtype


def _leave_what_fits() -> None:
    """Return operands at once that have the shape, or the dtype, that they are to get."""
    semantic: Any = TritonSemantic
    broadcast, cast = semantic.broadcast_impl_value, semantic.cast

    def broadcast_if_needed(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block() and left.shape.values == right.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def cast_if_needed(self: Any, input: Any, dst_ty: Any, *arguments: Any, **named: Any) -> Any:
        if input.type.scalar is dst_ty:
            return input
        return cast(self, input, dst_ty, *arguments, **named)

    semantic.broadcast_impl_value, semantic.cast = broadcast_if_needed, cast_if_needed
