"""Registers, spills and loops of a compiled kernel, read from its machine code."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from perf.compiling.control_flow import Flow, Instruction, Loop, flow
from perf.compiling.source_loops import Line, Lines
from tritonloss._tools.resources import Resources, amd_usage, cuobjdump, nvdisasm, nvidia_usage


@dataclass(frozen=True)
class MachineCode:
    """What the assembler says about a kernel, and its loops in the order of their addresses.

    `instructions` are those that all programs run: not what finishes the sums of all of them.
    `once` are those in no loop.
    """

    registers: int
    spill_bytes: int
    instructions: int
    once: int
    loops: tuple[Loop, ...]

    def resources(self, shared_bytes: int) -> Resources:
        """What a launch of it takes, with the shared memory that Triton asks for."""
        return Resources(self.registers, self.spill_bytes, shared_bytes)


def read_cubin(cubin: bytes, ptx: str) -> MachineCode:
    """The machine code of a kernel compiled for an NVIDIA GPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = cuobjdump("--dump-resource-usage", path)
        return parse_sass(nvdisasm(["-gi", "-c"], path), usage, ptx)


def parse_sass(listing: str, resources: str, ptx: str = "") -> MachineCode:
    """The machine code of a kernel from what nvdisasm, with source lines, and cuobjdump print.

    Above an instruction are the lines that it was made of, the innermost first; the last one is
    inlined nowhere. They hold until others come. Where nvdisasm does not say what is inlined where,
    PTX says of which calls a line may be.
    """
    labels: dict[str, int] = {}
    found: list[tuple[str, tuple[Lines, ...]]] = []
    called = {} if "inlined at" in listing else _ptx_lines(ptx)
    lines: Lines = ()
    complete = True
    for line in listing.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(found)
        elif place := re.search(r'//## File "(.*?)", line (\d+)( inlined at)?', line):
            lines = (*(() if complete else lines), (place[1], int(place[2])))
            complete = not place[3]
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            known = called.get(lines[0], ()) if lines else ()
            found.append((code[1], known or ((lines,) if lines else ())))
    program = [_sass_instruction(text, labels, lines) for text, lines in found]
    return _machine_code(nvidia_usage(resources), flow(program))


def parse_amdgcn(assembly: str) -> MachineCode:
    """The machine code of a kernel from the assembly that Triton keeps for an AMD GPU."""
    text = assembly.split("\n.Lfunc_end")[0]
    labels: dict[str, int] = {}
    found: list[tuple[str, Lines]] = []
    files = _files(text)
    source: Lines = ()
    for line in text.splitlines():
        code, _, comment = line.partition(";")
        code = code.strip()
        if label := re.match(r"(\.LBB\w+):", code):
            labels[label[1]] = len(found)
        elif code.startswith(".loc"):
            source = _lines_of(comment, files)
        elif re.match(r"(s|v|ds|global|buffer|flat|scratch)_\w+", code):
            found.append((code, source))
    program = [_gcn_instruction(code, labels, source) for code, source in found]
    return _machine_code(amd_usage(assembly), flow(program))


def _machine_code(usage: tuple[int, int], found: Flow) -> MachineCode:
    return MachineCode(*usage, found.instructions, found.once, found.loops)


def _files(assembly: str) -> dict[str, str]:
    """The paths of the source files that an assembly text names, by the files' names."""
    parts = re.findall(r'^\s*\.file\s+\d+ "(.*?)"(?: "(.*?)")?', assembly, re.MULTILINE)
    paths = [f"{folder}/{name}" if name else folder for folder, name in parts]
    return {path.rpartition("/")[2]: path for path in paths}


def _lines_of(comment: str, files: Mapping[str, str]) -> Lines:
    """The lines that LLVM writes behind a .loc."""
    places = re.findall(r"([\w.-]+):(\d+):\d+", comment)
    return tuple((files.get(name, name), int(number)) for name, number in places)


def _ptx_lines(ptx: str) -> dict[Line, tuple[Lines, ...]]:
    """For each line of the source the lines of all calls in which it was inlined."""
    files = _files(ptx)
    found: dict[Line, dict[Lines, None]] = {}
    for comment in re.findall(r"^\s*\.loc\s.*?//(.*)", ptx, re.MULTILINE):
        if lines := _lines_of(comment, files):
            found.setdefault(lines[0], {})[lines] = None
    return {line: tuple(known) for line, known in found.items()}


def _sass_instruction(
    text: str, labels: Mapping[str, int], lines: tuple[Lines, ...]
) -> Instruction:
    predicate, opcode, operands = re.findall(r"^(@!?U?P\w+\s+)?(\S+)\s*(.*)", text)[0]
    # A branch may also be conditional on a predicate among its operands: BRA.U UP0, 0x900.
    always = not predicate and not re.search(r"\bU?P\d", operands)
    jump = None
    if opcode.startswith("BRA") and (label := re.search(r"`\((\.L\w+)\)", operands)):
        jump = labels.get(label[1])
    ends = opcode.split(".")[0] in ("BRA", "EXIT", "RET", "BRX", "JMP")
    return Instruction(opcode, jump, not (ends and always), lines)


def _gcn_instruction(code: str, labels: Mapping[str, int], lines: Lines) -> Instruction:
    opcode, _, operands = code.partition(" ")
    jump = labels.get(operands.strip()) if "branch" in opcode else None
    ends = opcode in ("s_branch", "s_endpgm")
    return Instruction(opcode, jump, not ends, (lines,) if lines else ())
