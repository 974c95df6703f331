"""Machine code read: loops, registers, occupancy, and whether a kernel may ship."""

from __future__ import annotations

import pytest

from perf.compiling.control_flow import Instruction, Loop, loops
from perf.compiling.facts import pivoted
from perf.compiling.machine_code import MachineCode, parse_amdgcn, parse_sass
from perf.compiling.targets import TARGETS
from tests.perf.made import fact


def test_loops_are_found_by_dominance() -> None:
    step = Instruction("FADD")
    program = [
        step,
        step,  # outer loop
        Instruction("BRA", jump=6),
        step,  # inner loop
        Instruction("BRA", jump=3),
        Instruction("BRA", jump=1),
        Instruction("EXIT", falls_through=False),
        step,  # rare code behind the end, reached by nobody, jumping back into the middle
        Instruction("BRA", jump=3, falls_through=False),
    ]
    assert loops(program) == (Loop(1, 5, nests=True),)
    assert loops([]) == () and loops([step]) == ()


def test_rare_code_behind_the_end_is_no_loop() -> None:
    step = Instruction("FADD")
    program = [
        Instruction("BRA", jump=4),
        step,
        step,
        Instruction("EXIT", falls_through=False),
        step,  # rare
        Instruction("BRA", jump=1, falls_through=False),
    ]
    assert loops(program) == ()


SASS = """
        code for sm_90
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
                                                               /* 0x000fe20000000800 */
        /*0010*/                   FADD R0, R1, R2 ;           /* 0x000fe20000000800 */
        /*0020*/                   BRA.U UP0, 0x50 ;           /* 0x000fe20000000800 */
        /*0030*/                   FMUL R0, R1, R2 ;           /* 0x000fe20000000800 */
        /*0040*/              @!P0 BRA 0x10 ;                  /* 0x000fe20000000800 */
        /*0050*/                   EXIT ;                      /* 0x000fe20000000800 */
        /*0060*/                   BRA 0x60;                   /* 0x000fe20000000800 */
        /*0070*/                   NOP;                        /* 0x000fe20000000800 */
"""


def test_sass() -> None:
    resources = "Function kernel:\n  REG:40 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:584"
    code = parse_sass(SASS, resources)
    assert code == MachineCode(40, 16, instructions=7, loops=(Loop(1, 4),))
    with pytest.raises(ValueError, match="register"):
        parse_sass(SASS, "nothing")


def test_amdgcn() -> None:
    assembly = """
    .text
kernel:
\ts_branch .LBB0_0
.LBB0_0:
\tv_add_f32 v0, v1, v2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tv_fma_f32 v0, v1, v2, v0
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
.Lfunc_end0:
\tv_not_code v0
    .private_segment_fixed_size: 0
    .sgpr_spill_count: 0
    .vgpr_count:     47
    .vgpr_spill_count: 3
"""
    assert parse_amdgcn(assembly) == MachineCode(47, 12, instructions=5, loops=(Loop(2, 2),))


def test_big_loops_leave_out_scans_and_remainders() -> None:
    counts = (7, 100, 130, 52, 66)
    code = MachineCode(1, 0, 400, tuple(Loop(10 * i, n) for i, n in enumerate(counts)))
    assert [loop.instructions for loop in code.big_loops(unroll=2)] == [100, 130]
    assert [loop.instructions for loop in code.big_loops(unroll=1)] == [52, 66, 100, 130]
    assert MachineCode(1, 0, 5, ()).big_loops() == ()


def test_occupancy() -> None:
    hopper, mi300 = TARGETS["sm_90"], TARGETS["gfx942"]
    assert hopper.occupancy(32, 0, num_warps=4) == 1
    assert hopper.occupancy(72, 0, num_warps=4) == 28 / 64
    assert hopper.occupancy(255, 0, num_warps=8) == 8 / 64
    assert hopper.occupancy(32, 100 * 1024, num_warps=4) == 8 / 64
    assert mi300.occupancy(128, 0, num_warps=4) == 16 / 32


def test_faults() -> None:
    assert fact().fault is None
    assert fact(spill_bytes=8).fault == "spills 8 B"
    assert fact(shared_bytes=227 * 1024).fault is None
    assert "shared" in str(fact(shared_bytes=227 * 1024 + 1).fault)
    header, cells = pivoted([fact(), fact(target="gfx942", spill_bytes=4, compile_seconds=2.0)])
    assert header == ["operation", "kernel", "case", "sm_90", "gfx942", "compile s"]
    assert cells[0][3:] == ["40 r 50% 25.0", "FAULT: spills 4 B", "2.0"]
