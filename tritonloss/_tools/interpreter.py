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
    """Make Triton's interpreter ten times as fast, in this process.

    What it computes stays the same. Most of its time goes into work that is repeated. At every call
    of a device function it replaces triton.language; at every operation it works out the types of
    the same few dtypes and shapes.
    """
    if interpreter._get_np_dtype.__module__ == interpreter.__name__:  # not done yet
        _patch_language_once()
        _call_directly()
        _unwrap_less()
        _remember_types()
        _remember_dtypes()
        _remember_checks()
        _leave_what_fits()
        _leave_out_what_asserts()


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


def _call_directly() -> None:
    """Give builtin functions what they compute with, without looking whether they got it."""
    semantic: Any = interpreter.interpreter_semantic
    checking = tl.core.builtin(_call_directly).__code__  # of what calls a builtin function

    def patch_attribute(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        if getattr(member, "__code__", None) is checking:
            member = member.__wrapped__

        def call(*arguments: Any, **named: Any) -> Any:
            named["_semantic"] = semantic
            return member(*arguments, **named)

        scope.set_attr(owner, name, call)

    module: Any = interpreter
    module._patch_attr = patch_attribute


def _unwrap_less() -> None:
    """Look for a compile-time constant only in what may be one, or have one."""
    plain = {tl.core.tensor, tl.core.dtype, int, float, bool, str, type(None)}
    core: Any = tl.core
    unwrap = core._unwrap_if_constexpr

    def unwrap_if_needed(value: Any) -> Any:
        return value if type(value) in plain else unwrap(value)

    core._unwrap_if_constexpr = unwrap_if_needed


def _remember_types() -> None:
    """Work out only once what all types, and all tensors, of one name have in common.

    Two types with one name are equal.
    """
    of_blocks: dict[tuple[int, ...], tuple[Any, Any, str]] = {}
    of_tensors: dict[str, tuple[Any, Any, Any]] = {}
    of_elements: dict[tuple[str, str], Any] = {}
    block_type: Any = tl.core.block_type
    tensor: Any = tl.core.tensor
    dtype: Any = tl.core.dtype
    make_block, make_tensor = block_type.__init__, tensor.__init__
    make_with_element, equals = block_type.with_element_ty, dtype.__eq__

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
        found = of_tensors.get(type.name)
        if found is None:
            make_tensor(self, handle, type)
            of_tensors[type.name] = self.shape, self.numel, self.dtype
            return
        self.handle, self.type = handle, type
        self.shape, self.numel, self.dtype = found

    def with_element(self: Any, scalar_ty: Any) -> Any:
        key = self.name, scalar_ty.name
        found = of_elements.get(key)
        if found is None:
            found = of_elements[key] = make_with_element(self, scalar_ty)
        return found

    def equal(self: Any, other: Any) -> bool:
        return self is other or equals(self, other)

    block_type.__init__, tensor.__init__ = init_block, init_tensor
    block_type.with_element_ty, dtype.__eq__ = with_element, equal
    # The interpreter has no types of its own.
    block_type.to_ir = lambda self, builder: self


def _remember_dtypes() -> None:
    """Look up the NumPy dtype of each type, and whether an array fits a type, only once."""
    found: dict[str, numpy.dtype[Any]] = {}
    fitting: dict[tuple[int, str], bool] = {}
    look_up: Any = interpreter._get_np_dtype
    check: Any = interpreter._validate_np_data_size
    handle: Any = interpreter.TensorHandle
    make_handle = handle.__init__

    def numpy_dtype(dtype: Any) -> numpy.dtype[Any]:
        known = found.get(dtype.name)
        if known is None:
            known = found[dtype.name] = look_up(dtype)
        return known

    def fits(array: Any, dtype: Any) -> bool:
        key = array.itemsize, dtype.name
        known = fitting.get(key)
        if known is None:
            known = fitting[key] = check(array, dtype)
        return known

    def init_handle(self: Any, data: Any, dtype: Any, *attributes: Any) -> None:
        if attributes or not fitting.get((data.itemsize, dtype.name)):
            make_handle(self, data, dtype, *attributes)
            return
        self.data, self.dtype, self.attr = data, dtype, {}

    module: Any = interpreter
    module._get_np_dtype, module._validate_np_data_size = numpy_dtype, fits
    handle.__init__ = init_handle


def _remember_checks() -> None:
    """Remember which operands an operation takes as they are, and what it makes of numbers.

    That depends on types, and on the number.
    """
    semantic: Any = TritonSemantic
    check = semantic.binary_op_type_checking_impl
    tensor: Any = tl.core.tensor
    as_they_are: set[tuple[Any, ...]] = set()
    numbers: dict[tuple[Any, ...], Any] = {}

    def check_operands(self: Any, lhs: Any, rhs: Any, *allowed: Any, **named: Any) -> Any:
        flags = allowed + tuple(named.items()) if named else allowed
        left, right = isinstance(lhs, tensor), isinstance(rhs, tensor)
        if left and right:
            key = lhs.type.name, rhs.type.name, flags
            if key in as_they_are:
                return lhs, rhs
            operands = check(self, lhs, rhs, *allowed, **named)
            if operands[0] is lhs and operands[1] is rhs:
                as_they_are.add(key)
            return operands
        number = rhs if left else lhs
        if left == right or type(number) not in (int, float):
            return check(self, lhs, rhs, *allowed, **named)
        # Equal are 1 and 1.0, and zeros of both signs.
        which = type(number), number or repr(number)
        key = lhs.type.name if left else "", rhs.type.name if right else "", which, flags
        found = numbers.get(key)
        if found is not None:
            return (lhs, found) if left else (found, rhs)
        operands = check(self, lhs, rhs, *allowed, **named)
        if operands[1 - left] is (lhs if left else rhs):
            operands[left].handle.data.setflags(write=False)
            numbers[key] = operands[left]
        return operands

    semantic.binary_op_type_checking_impl = check_operands


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

    def splat(self: Any, block_type: Any, scalar: Any) -> Any:
        block = numpy.empty(block_type.shape.values, interpreter._get_np_dtype(scalar.dtype))
        block[...] = scalar.data
        return interpreter.TensorHandle(block, scalar.dtype.scalar)

    semantic.broadcast_impl_value, semantic.cast = broadcast_if_needed, cast_if_needed
    interpreter.InterpreterBuilder.create_splat = splat


def _leave_out_what_asserts() -> None:
    """Look for an overflow of integers only where it is reported, which is in a debugger's mode."""
    semantic: Any = TritonSemantic
    look = semantic.binary_op_sanitize_overflow_impl

    def look_if_reported(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        if self.builder.options.debug:
            look(self, lhs, rhs, binary_op)

    semantic.binary_op_sanitize_overflow_impl = look_if_reported
