"""Strips: rows that begin anywhere, moved by neighbouring lanes; programs that fit the width."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Executor
from types import SimpleNamespace

import numpy
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.runtime import interpreter

import tritonloss
from perf.compiling.targets import TARGETS
from perf.operations.contract import operations
from tests.oracle import segmentation_case, unaligned
from tritonloss._core.backend import device_guard
from tritonloss._core.configurations import forced
from tritonloss._engine.strip_launch import _fitted, strides, strip_launch
from tritonloss._engine.strips import (
    SIZES,
    Row,
    load_columns,
    plane_of,
    row_limit,
    store_columns,
    strip_program,
)
from tritonloss._tools.launches import offline, recorded

CONFIGURATION = {"COLUMNS": 4, "LANES": 32, "ROWS": 4, "UNROLL": 1, "num_warps": 1}


@triton.jit(do_not_specialize=SIZES)
def _moved_kernel(
    x_ptr, out_ptr, x_strides, out_strides, channels, height, width, tiles_x, tiles_y,
    SHIFT: tl.constexpr, COUNT: tl.constexpr, OTHER: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Channel j of the result is x, moved by SHIFT + j columns to the left."""
    program = strip_program(channels, tiles_x, tiles_y, STRIP)
    x = plane_of(x_ptr, x_strides, program, STRIP)
    for i in tl.range(0, STRIP.rows):
        number = program.first_row + i
        row = Row(number=number, chunk=program.chunk, limit=row_limit(number, height, width))
        values, _ = load_columns(x, row, STRIP, SHIFT, COUNT + STRIP.columns - 1, "zeros", OTHER)
        for j in tl.static_range(COUNT):
            moved = ()
            for v in tl.static_range(STRIP.columns):
                moved = moved + (values[j + v],)
            out_of_j = out_ptr + j * out_strides.channel * STRIP.grain
            store_columns(plane_of(out_of_j, out_strides, program, STRIP), row, moved, STRIP)


def moved(x: Tensor, shift: int, count: int, columns: int, other: int = 0) -> Tensor:
    """What the kernel makes of maps [N, 1, H, W]: [N, count, H, W]."""
    out = torch.full((x.size(0), count, *x.shape[2:]), 111, device=x.device).to(x.dtype)
    configuration = {**CONFIGURATION, "COLUMNS": columns}
    grid, arguments = strip_launch(x.shape, configuration, "zeros", x, out)
    strip = arguments["STRIP"]
    with device_guard(x):
        _moved_kernel[grid](
            x,
            out,
            strides(x, strip),
            strides(out, strip),
            height=x.size(2),
            width=x.size(3),
            SHIFT=shift,
            COUNT=count,
            OTHER=other,
            **arguments,
        )
    return out


@pytest.mark.parity
@pytest.mark.parametrize("shift", [-5, -1, 0, 2])
@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_begin_anywhere(
    dtype: torch.dtype, columns: int, shift: int, device: torch.device
) -> None:
    """Every place of a chunk is a row's first: the rows begin an odd number of elements apart."""
    generator = torch.Generator().manual_seed(0)
    count = 3
    # Triton 3.6 interprets no constant of bfloat16 but 0.
    other = 0 if dtype == torch.bfloat16 else 7
    for width, offset in ((2, 3), (8, 1), (130, 2)):
        values = torch.randint(1, 100, (1, 1, 5, width), generator=generator).to(dtype)
        padded = F.pad(values.double(), (6, 8), value=other)
        expected = [padded[..., 6 + shift + j :][..., :width] for j in range(count)]
        x = unaligned(values.to(device), offset)
        found = moved(x, shift, count, columns, other)
        assert torch.equal(found.double().cpu(), torch.cat(expected, 1)), (width, offset)


@pytest.mark.parity
@pytest.mark.parametrize("lanes", [(128, 4), (256, 4)], ids=str)
def test_programs_fit_the_width(lanes: tuple[int, int]) -> None:
    """Few lanes lie beyond the last column, in programs of four warps wherever that allows it."""
    configuration = {"LANES": lanes[0], "num_warps": lanes[1]}
    smallest = lanes[0] // lanes[1]
    for needed in range(1, 3000):
        fitted, warps = _fitted(configuration, needed)
        assert fitted // warps == smallest
        total = triton.cdiv(needed, fitted) * fitted
        least = triton.cdiv(needed, smallest) * smallest
        assert least <= total <= least * 17 / 16
        assert warps in (1, 4)  # a width more would be a kernel more
        if warps == 1:
            assert triton.cdiv(needed, lanes[0]) * lanes[0] > least * 17 / 16

    configuration = {"LANES": 128, "num_warps": 4}
    assert _fitted(configuration, 513 // 4 + 1) == (32, 1)
    assert _fitted(configuration, 512) == (128, 4)
    # of two maps together: 256 + 512 lanes against 160 + 512, and 256 + 4096 against 160 + 4096
    assert _fitted(configuration, 513 // 4 + 1, 512) == (32, 1)
    assert _fitted(configuration, 513 // 4 + 1, 4096) == (128, 4)


# --- what a warp moves at a time ------------------------------------------------------------------


Move = tuple[str, int, numpy.ndarray, numpy.ndarray]  # kind, bytes, addresses, mask
Moves = list[Move]


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[Moves]:
    """Every load and store of all lanes that the interpreter executes."""
    if device.type != "cpu":
        pytest.skip("addresses are seen in the interpreter")
    seen: Moves = []
    real = interpreter._interpreter

    def note(kind: str, pointers: numpy.ndarray, mask: numpy.ndarray, size: int) -> None:
        if len(pointers) >= CONFIGURATION["LANES"]:
            seen.append((kind, size, pointers.astype("int64"), mask.copy()))

    def load(pointers, mask, other, dtype):  # type: ignore[no-untyped-def]
        note("load", pointers, mask, numpy.dtype(dtype).itemsize)
        return real.load(pointers, mask, other, dtype)

    def store(pointers, value, mask):  # type: ignore[no-untyped-def]
        note("store", pointers, mask, value.dtype.itemsize)
        return real.store(pointers, value, mask)

    names = {name: getattr(real, name) for name in dir(real) if not name.startswith("_")}
    noting = SimpleNamespace(**{**names, "load": load, "store": store})
    monkeypatch.setattr(interpreter, "_interpreter", noting)
    yield seen


def assert_neighbours_move_neighbours(moves: Moves, columns: int) -> None:
    """What the lanes of a block move at once is one run of bytes; what a lane loads is aligned.

    A lane loads 32 bits at the least: where its chunk has fewer, two lanes load the same.
    """
    for kind, size, addresses, mask in moves:
        flat = addresses.reshape(addresses.shape[0], -1)
        chunk = flat.shape[1] * size
        assert kind == "load" or flat.shape[1] == 1
        steps = set(numpy.diff(flat, axis=1).flatten()) | {size}
        assert steps == {size}, kind
        between_lanes = set(numpy.diff(flat[:, 0]))
        assert between_lanes <= {chunk} or (columns == 2 and between_lanes <= {0, chunk}), kind
        if kind == "load":
            assert not (flat[:, 0] % chunk).any()
            assert (mask.reshape(flat.shape) == mask.reshape(flat.shape)[:, :1]).all()


@pytest.mark.parity
@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("schedule", ["recompute", "stored"])
def test_every_warp_of_the_structural_similarity_loss_moves_neighbours(
    schedule: str, columns: int, moves: Moves, device: torch.device
) -> None:
    logits, target = segmentation_case((1, 2, 6, 37), device=device)
    logits, target = unaligned(logits, 1).requires_grad_(), unaligned(target, 2)
    configuration = {**CONFIGURATION, "COLUMNS": columns, "schedule": schedule}
    moves.clear()
    with (
        forced("structural_similarity_forward", configuration),
        forced("structural_similarity_backward", configuration),
        tritonloss.use_backend("triton"),
    ):
        loss = tritonloss.functional.structural_similarity_loss(logits, target, window_size=5)
        loss.backward()
    maps = [(logits, 4), (target, 1), (logits.grad, 4)]
    of_maps = [move for move in moves if any(_is_of(move, m, size) for m, size in maps)]
    assert {move[0] for move in of_maps} == {"load", "store"}
    assert_neighbours_move_neighbours(of_maps, columns)


@pytest.mark.parity
@pytest.mark.parametrize("columns", [2, 4])
def test_every_warp_of_the_statistics_moves_neighbours(
    columns: int, moves: Moves, device: torch.device
) -> None:
    x = unaligned(torch.randn(1, 2, 6, 37, device=device), 3).requires_grad_()
    configuration = {**CONFIGURATION, "COLUMNS": columns}
    moves.clear()
    with (
        forced("gaussian_statistics_forward", configuration),
        forced("gaussian_statistics_backward", configuration),
        tritonloss.use_backend("triton"),
    ):
        mean, variance = tritonloss.gaussian_statistics(x, window_size=5)
        (mean * variance).sum().backward()
    assert len(moves) > 20
    assert_neighbours_move_neighbours(moves, columns)


def _is_of(move: Move, tensor: Tensor | None, size: int) -> bool:
    """Whether a move is one of the tensor's elements, ``size`` bytes each, by what its mask takes.

    Its chunk may begin before the tensor and end behind it. A sum of float64 is none of a map's,
    wherever the allocator put it.
    """
    assert tensor is not None
    _, moved_size, addresses, mask = move
    taken = addresses.flatten()[mask.flatten()]
    if moved_size != size or taken.size == 0:
        return False
    first = tensor.untyped_storage().data_ptr()
    behind = first + tensor.untyped_storage().nbytes()
    return bool((taken >= first - 16).all() and (taken < behind + 16).all())


# --- what the compiler makes of it ----------------------------------------------------------------


def memory_instructions(name: str, case: int) -> dict[str, set[str]]:
    """Kernel -> its kinds of loads and stores for sm_90, in a process without the interpreter."""
    operation = operations([name])[0]
    shipped = operation.shipped[case]
    with offline(TARGETS["sm_90"].gpu), recorded("compile") as launches:
        operation.launch(shipped, operation.inputs(shipped, torch.device("meta")))
    found = {}
    for launch in launches:
        lines = re.findall(r"@%p\d+ ((?:ld|st)\.global[\w.]*)", launch.compiled.asm["ptx"])
        found[launch.kernel] = set(lines)
    return found


@pytest.mark.compile_only
@pytest.mark.parametrize("of_case", ["voc", "strided"])
def test_rows_that_begin_anywhere_are_loaded_in_wide_instructions(
    of_case: str, compiler: Executor
) -> None:
    """Four floats or four labels each; what is stored has been dealt to neighbouring threads."""
    words = {"ld.global.b32", "ld.global.b64"}  # of labels; of what is added up, float64
    others = {"gaussian_statistics": set(), "structural_similarity_loss": words}
    for name, allowed in others.items():
        shipped = operations([name])[0].shipped
        case = next(i for i, c in enumerate(shipped) if of_case in (c.shape.name, c.layout))
        found = compiler.submit(memory_instructions, name, case).result()
        for direction in ("forward", "backward"):
            kinds = next(kinds for kernel, kinds in found.items() if direction in kernel)
            loads = {kind for kind in kinds if kind.startswith("ld")}
            assert loads - allowed == {"ld.global.v4.b32"}
            assert kinds - loads <= {"st.global.b32", "st.global.b64"}
