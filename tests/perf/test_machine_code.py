"""Machine code read: loops, registers, occupancy, and whether a kernel may ship."""

from __future__ import annotations

import ast
from dataclasses import replace
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


def test_going_through_lanes_is_no_loop_of_the_source() -> None:
    program = [
        Instruction("v_add_f32"),
        Instruction("v_readfirstlane_b32"),
        Instruction("s_cbranch_execz", jump=4),
        Instruction("buffer_store_dwordx4"),
        Instruction("s_cbranch_execnz", jump=1),
        Instruction("s_endpgm", falls_through=False),
    ]
    assert flow(program) == Flow(6, 6, ())


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
    # a loop that waits for other programs is everyone's
    lines, place = _strip(PRESENT)
    waiting = [replace(instruction, lines=(lines,)) for instruction in (program[1], program[4])]
    waiting[1] = replace(waiting[1], jump=0)
    assert flow([*waiting, program[-1]]).loops == (Loop(0, 2, place=place),)


SASS = """
        .type           kernel,@function
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R0, desc[UR4][R2] ;
        /*0020*/                   BRA.U UP0, `(.L_x_1) ;
        /*0030*/                   FMUL R0, R1, R2 ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
        /*0070*/                   NOP;
.L_x_3:
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


FILE = f"/some/tritonloss/where/{KERNELS}"  # wherever it was compiled


def _strip(caller: str) -> tuple[tuple[tuple[str, int], ...], Place]:
    """(a line of the loop over a strip's rows, that loop), called at such a line."""
    text = (source_loops.PACKAGE.parent / KERNELS).read_text()
    source = ast.parse(text)
    function = next(n for n in source.body if getattr(n, "name", "") == "_forward_strip")
    loop = next(n for n in ast.walk(function) if isinstance(n, ast.For))
    call = FILE, _line(caller)
    assert loop.end_lineno is not None
    place = Place("_forward_strip", "i", (call, (FILE, loop.lineno)), loop.end_lineno)
    return ((FILE, loop.lineno + 1), call), place


PRESENT = "_forward_strip(maps, stored, program, SAMPLING, WINDOW, STRIP, STORED, True)"
ABSENT = PRESENT.replace("True", "False")


def test_instructions_know_the_loop_of_the_source_by_their_lines() -> None:
    lines, place = _strip(PRESENT)
    inside, other = (lines,), (((FILE, 7),),)
    assert source_loops.places_of([inside, inside, inside, other, ()]) == (place,)
    assert source_loops.places_of([inside, other, other]) == ()
    assert source_loops.places_of([inside], outside=[place]) == ()
    assert source_loops.places_of([((("/elsewhere/of.py", 3),),)]) == ()


def test_calls_are_told_apart_by_what_one_of_them_does_and_by_their_order() -> None:
    (present_line, present), (absent_line, absent) = _strip(PRESENT), _strip(ABSENT)
    either, one = (present_line, absent_line), (present_line,)
    assert source_loops.places_of([either, either]) == (present, absent)
    assert source_loops.places_of([either, one]) == (present,)
    both = present, absent
    assert source_loops.told_apart([both, both, both, both]) == [present, present, absent, absent]
    assert source_loops.told_apart([(present,), both]) == [present, absent]
    assert source_loops.told_apart([(absent,), both, (), both]) == [
        absent, present, Place(), present,
    ]  # fmt: skip


def test_a_loop_lies_within_that_around_it_and_around_its_call() -> None:
    outer = Place("rows", "i", (("file", 10),), 30)
    assert Place("rows", "j", (("file", 12),), 20).is_within(outer)
    assert Place("taps", "k", (("file", 15), ("other", 3)), 5).is_within(outer)
    for other in (
        outer,
        Place("rows", "j", (("file", 31),), 40),
        Place("taps", "k", (("file", 40), ("other", 3)), 5),
    ):
        assert not other.is_within(outer) and not outer.is_within(other)


def test_lines_are_read_from_both_disassemblers() -> None:
    ((_, loop), (_, call)), place = _strip(PRESENT)
    inlined = f' inlined at "{FILE}", line {call}\n//## File "{FILE}", line {call}'
    annotated = SASS.replace(
        ".L_x_0:",
        f'//## File "{FILE}", line 3\n//## File "{FILE}", line {loop}{inlined}\n.L_x_0:',
    )
    annotated = annotated.replace(".L_x_1:", f'//## File "{FILE}", line 4\n.L_x_1:')
    code = parse_sass(annotated, "REG:40 STACK:16")
    assert [found.place for found in code.loops] == [place]

    # Older compilers leave it to the comments of PTX where a line was inlined.
    folder, _, name = FILE.rpartition("/")
    comment = f"{name}:{loop}:9 @[ {name}:{call}:17 ]"
    ptx = f'\t.file\t1 "{FILE}"\n\t.loc\t1 {loop} 9 // {comment}\n'
    code = parse_sass(annotated.replace(inlined, ""), "REG:40 STACK:16", ptx)
    assert [found.place for found in code.loops] == [place]

    assembly = (
        f'kernel:\n\t.file\t1 "{folder}" "{name}"\n.LBB0_1:\n'
        f"\t.loc\t1 {loop} 9 ; {comment}\n"
        "\tv_add_f32 v0, v1, v2\n\ts_cbranch_scc1 .LBB0_1\n\ts_endpgm\n.Lfunc_end0:\n"
        "    .private_segment_fixed_size: 0\n    .vgpr_count: 1\n    .vgpr_spill_count: 0\n"
    )
    assert [found.place for found in parse_amdgcn(assembly).loops] == [place]


def test_what_is_left_of_an_unrolled_loop_lies_beside_it() -> None:
    lines, place = _strip(PRESENT)
    load = Instruction("LDG.E", lines=(lines,))
    program = [
        load,
        load,
        Instruction("BRA", jump=0, lines=(lines,)),
        load,  # the last round, in no loop
        Instruction("LDC", lines=(lines,)),
        Instruction("LDG.E", lines=(((FILE, 7),),)),
        Instruction("EXIT", falls_through=False),
    ]
    assert flow(program).loops == (Loop(0, 3, moves=2, beside=1, place=place),)


def _machine_code(*loops: Loop, once: int = 100) -> MachineCode:
    return MachineCode(40, 0, 1000, once, loops)


def _notes(name: str, within: str, rounds: float, **others: Any) -> LoopReading:
    known = LoopReading(name, within, rounds, when=None, unroll=None, share=1.0)
    return known._replace(**others)


def _place(function: str, variable: str, *lines: int) -> Place:
    return Place(function, variable, tuple(("file", line) for line in lines))


def test_every_loop_counts_as_often_as_it_runs() -> None:
    """Classes absent and present have totals of their own; nested loops are counted, too."""
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

    def executed(rounds: float, *loops: Loop, unroll: float | None = None) -> float:
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
    # the source has said that a round is one: what is beside the loop comes before it
    assert executed(12, Loop(0, 400, moves=40, beside=20, place=place), unroll=1.0) == 12 * 400
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
