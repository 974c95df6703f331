"""Machine code read: loops, registers, occupancy, and whether a kernel may ship."""

from __future__ import annotations

from typing import Any

import pytest

from perf.compiling import source_loops
from perf.compiling.control_flow import Flow, Instruction, Loop, flow
from perf.compiling.counting import (
    Counts,
    LoopFacts,
    LoopReading,
    Reading,
    counts,
    from_numbers,
)
from perf.compiling.facts import pivoted
from perf.compiling.machine_code import MachineCode, parse_amdgcn, parse_sass
from perf.compiling.source_loops import Place
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
    assert flow(program) == Flow(9, 4, (Loop(1, 3), Loop(3, 2, around=1)))
    assert flow([]).loops == () and flow([step]) == Flow(1, 1, ())


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
    assert flow(program).loops == ()


def test_what_the_last_program_does_is_nobodys() -> None:
    step = Instruction("FADD")
    program = [
        step,
        Instruction("ATOMG.E.ADD"),  # takes tickets, level by level
        step,
        Instruction("BRA", jump=2),
        Instruction("BRA", jump=1),
        step,  # finishes the sums
        Instruction("BRA", jump=5),
        Instruction("EXIT", falls_through=False),
    ]
    assert flow(program) == Flow(1, 1, ())


SASS = """
        code for sm_90
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
                                                               /* 0x000fe20000000800 */
        /*0010*/                   LDG.E R0, desc[UR4][R2] ;   /* 0x000fe20000000800 */
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
    assert code == MachineCode(40, 16, instructions=7, once=3, loops=(Loop(1, 4, moves=1),))
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
\tglobal_load_dword v0, v1, s[2:3]
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
.Lfunc_end0:
\tv_not_code v0
    .private_segment_fixed_size: 0
    .sgpr_spill_count: 0
    .vgpr_count:     47
    .vgpr_spill_count: 3
"""
    loop = Loop(2, 2, moves=1)
    assert parse_amdgcn(assembly) == MachineCode(47, 12, 5, once=3, loops=(loop,))


KERNELS = "tritonloss/windows/structural_similarity_kernels.py"


def _line(text: str) -> int:
    """The number of the first line of the kernels' file that holds a text."""
    lines = (source_loops.PACKAGE.parent / KERNELS).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def test_instructions_know_the_loop_of_the_source_by_their_lines() -> None:
    """Wherever the copy of the package is that they were compiled from."""
    file = f"/some/tritonloss/where/{KERNELS}"
    call, other = (file, _line("found = _forward_strip(")), (file, 7)
    loop = _line("for i in tl.range(0, rows, loop_unroll_factor=UNROLL)")
    inside = [((file, loop + number), call) for number in (0, 1, 2)]
    place = source_loops.place_of([*inside, (other,), ()])
    assert place == Place("_forward_strip", "i", (call, (file, loop)))
    assert source_loops.place_of([*inside, (other,), (other,), (other,)]) == Place()
    assert source_loops.place_of(inside, outside=[place]) == Place()
    assert source_loops.place_of([(("/elsewhere/of.py", 3),)]) == Place()


def test_lines_are_read_from_both_disassemblers() -> None:
    file = f"/some/where/{KERNELS}"
    call, loop = _line("found = _forward_strip("), _line("for i in tl.range(0, rows, loop_un")
    place = Place("_forward_strip", "i", ((file, call), (file, loop)))
    annotated = (
        f'//## File "{file}", line {loop} inlined at "{file}", line {call}\n'
        f'//## File "{file}", line {call}\n'
        "        /*0010*/                   LDG.E R0, desc[UR4][R2] ;\n"
        "        /*0020*/                   BRA.U UP0, 0x50 ;\n"
        "        /*0030*/                   FMUL R0, R1, R2 ;\n"
        f'//## File "{file}", line 3\n'
        f'//## File "{file}", line 4\n'
        "        /*0040*/              @!P0 BRA 0x10 ;\n"
        "        /*0010*/ \t.byte\t0xff\n"
    )
    code = parse_sass(SASS, "REG:40 STACK:16", annotated)
    assert [found.place for found in code.loops] == [place]
    folder, _, name = file.rpartition("/")
    assembly = (
        f'kernel:\n\t.file\t1 "{folder}" "{name}"\n.LBB0_1:\n'
        f"\t.loc\t1 {loop} 9 ; {name}:{loop}:9 @[ {name}:{call}:17 ]\n"
        "\tv_add_f32 v0, v1, v2\n\ts_cbranch_scc1 .LBB0_1\n\ts_endpgm\n.Lfunc_end0:\n"
        "    .private_segment_fixed_size: 0\n    .vgpr_count: 1\n    .vgpr_spill_count: 0\n"
    )
    assert [found.place for found in parse_amdgcn(assembly).loops] == [place]


def _machine_code(*loops: Loop, once: int = 100) -> MachineCode:
    return MachineCode(40, 0, 1000, once, loops)


def _notes(name: str, within: str, rounds: float, **others: Any) -> LoopReading:
    known = LoopReading(name, within, rounds, when=None, unroll=1.0, share=1.0)
    return known._replace(**others)


def _place(function: str, variable: str, *lines: int) -> Place:
    return Place(function, variable, tuple(("file", line) for line in lines))


def test_every_loop_counts_as_often_as_it_runs() -> None:
    """For a class that is absent and for one that is present; small loops and nested ones too."""
    code = _machine_code(
        Loop(0, 20, place=_place("look", "i", 1)),
        Loop(100, 300, place=_place("strip", "i", 5)),
        Loop(200, 40, around=100, place=_place("row", "distance", 5, 9)),
        Loop(300, 200, place=_place("strip", "i", 7)),
    )
    read = Reading(
        outputs=100,
        loops=(
            _notes("look", "look", 50),
            _notes("class present", "strip.i", 60, when="class present"),
            _notes("class absent", "strip.i", 60, when="class absent"),
            _notes("taps", ".distance", 600),
        ),
    )
    found = counts(read, code)
    assert found.numbers == {
        "total, class present": 1 + 10 + 180 + 240,
        "total, class absent": 1 + 10 + 120,
        "once": 1,
        "look": 10,
        "class present": 180,
        "taps, class present": 240,
        "class absent": 120,
    }
    assert from_numbers(found.numbers, read) == found
    assert counts(None, code) == Counts()


def test_rounds_of_an_unrolled_loop_and_what_is_left_of_them() -> None:
    place = _place("strip", "i", 5)

    def executed(rounds: float, *loops: Loop, unroll: float = 1.0) -> float:
        read = Reading(1.0, (_notes("rows", "strip", rounds, unroll=unroll),))
        (found,) = counts(read, _machine_code(*loops)).loops
        return found.executed

    whole, rest = Loop(0, 400, moves=40, place=place), Loop(9, 110, moves=10, place=place)
    assert executed(11, whole, rest) == 2 * 400 + 3 * 110
    assert executed(11, rest) == 11 * 110
    # the source asks for it, and what is left is in no loop
    assert executed(12, whole, unroll=4.0) == 3 * 400
    # the compiler has done it, and what is left is in no loop
    assert executed(12, Loop(0, 400, moves=40, beside=30, place=place)) == 3 * 400
    assert executed(12, Loop(0, 400, moves=40, beside=7, place=place)) == 12 * 400
    # two versions of a loop, of which one runs
    assert executed(12, whole, Loop(9, 380, moves=40, place=place)) == 12 * 400


def test_a_loop_that_no_notes_are_about_must_not_ship() -> None:
    code = _machine_code(Loop(0, 20, place=_place("new", "i", 1)), Loop(50, 7))
    found = counts(Reading(1.0, (_notes("rows", "strip", 3),)), code)
    assert found.unaccounted == ("new", "unknown source")
    faulty = fact(counts=found)
    assert faulty.fault == "nobody counts the loops of new, unknown source"
    assert faulty.text == f"FAULT: {faulty.fault}"


def test_what_a_loop_completes_is_told_apart_from_its_share() -> None:
    read = Reading(150.0, (_notes("classes", "blocks", 18, share=144 / 150),))
    (found,) = counts(read, _machine_code(Loop(0, 80, place=_place("blocks", "start", 1)))).loops
    assert found == LoopFacts("classes", 9.6, 10.0)


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
    assert fact(spill_bytes=8, double=True).fault is None
    assert fact(spill_bytes=8, double=True).text.endswith("(2.0 once, 25.0 rows) spills 8 B")
    header, cells = pivoted([fact(), fact(target="gfx942", spill_bytes=4, compile_seconds=2.0)])
    assert header == ["operation", "kernel", "case", "sm_90", "gfx942", "compile s"]
    assert cells[0][3:] == ["40 r 50% 27.0 (2.0 once, 25.0 rows)", "FAULT: spills 4 B", "2.0"]
