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
    """Counts in a loop to a number known at run time: nearly all kernels have such a loop."""
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
    # Triton 3.6 turns arrays with one element and an axis into numbers, which numpy 2.4 refuses.
    if _version(triton.__version__) < (3, 7) and _version(numpy.__version__) >= (2, 4):
        reason = "that of Triton 3.6 needs numpy < 2.4"
    return f"Triton's interpreter cannot run here ({installed}): {reason}"


def _version(text: str) -> tuple[int, ...]:
    """(major, minor) of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def hasten_interpreter() -> None:
    """Make Triton's interpreter four times as fast, in this process.

    What it computes stays the same. Most of its time goes into work that is repeated. At every call
    of a device function it replaces triton.language; at every operation it makes the types of the
    same few shapes.
    """
    if interpreter._get_np_dtype.__module__ == interpreter.__name__:  # not done yet
        _patch_language_once()
        _remember_shapes()
        _remember_dtypes()
        _leave_what_fits()


def _patch_language_once() -> None:
    """Replace the triton.language of a module, by one that computes on arrays, once for a kernel.

    Triton replaces it at every call of a device function, though the kernel has done so already.
    """
    patched: set[int] | None = None  # ids of the modules that are replaced, while a kernel runs
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
            # The kernel's own module is replaced first, and Triton restores it at the end.
            return run(self, *arguments, **named)
        finally:
            patched = around

    module: Any = interpreter
    module._patch_lang = patch_lang_once
    module.GridExecutor.__call__ = run_kernel


def _remember_shapes() -> None:
    """Compute only once what all types, and all tensors, of one shape have in common."""
    of_blocks: dict[tuple[int, ...], tuple[Any, Any, str]] = {}
    of_tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}
    block_type: Any = tl.core.block_type
    tensor: Any = tl.core.tensor
    make_block, make_tensor = block_type.__init__, tensor.__init__

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        # A size that is not an int is not found here: Triton checks it.
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
    """Look up the NumPy dtype of each type only once."""
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
    """Return operands as they are if they have the shape, or the dtype, that they should get."""
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
