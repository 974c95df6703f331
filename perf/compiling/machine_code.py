"""Registers, spills and loops of a compiled kernel, read from its machine code."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from perf.compiling.control_flow import (
    Instruction,
    Loop,
    instructions_of_everyone,
    loops,
)
from tritonloss._tools.resources import Resources, amd_usage, cuobjdump, nvidia_usage


@dataclass(frozen=True)
class MachineCode:
    """What the assembler says about a kernel, and its loops in the order of their addresses.

    `instructions` are those that all programs run: not what finishes the sums of all of them.
    """

    registers: int
    spill_bytes: int
    instructions: int
    loops: tuple[Loop, ...]

    def resources(self, shared_bytes: int) -> Resources:
        """What a launch of it takes, with the shared memory that Triton asks for."""
        return Resources(self.registers, self.spill_bytes, shared_bytes)

    def big_loops(self, unroll: int = 1) -> tuple[Loop, ...]:
        """The loops that matter, the smallest first.

        Left out is what is much smaller than the biggest: a look at the labels, say, and the
        remainder of an unrolled loop, which is that loop over again at a share of 1 / unroll. So is
        what finishes the sums of all programs: few of them run it.
        """
        everyones = [loop for loop in self.loops if not loop.takes_tickets]
        biggest = max((loop.instructions for loop in everyones), default=0)
        least = 0.25 if unroll == 1 else max(0.25, 1.3 / unroll)
        big = [loop for loop in everyones if loop.instructions >= least * biggest]
        return tuple(sorted(big, key=lambda loop: loop.instructions))


def read_cubin(cubin: bytes) -> MachineCode:
    """Analyse a kernel compiled for an NVIDIA GPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return parse_sass(cuobjdump("-sass", path), cuobjdump("--dump-resource-usage", path))


def parse_sass(listing: str, resources: str) -> MachineCode:
    """Analyse what cuobjdump prints about one kernel."""
    registers, spilled = nvidia_usage(resources)
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", listing, re.MULTILINE)
    index = {int(address, 16): position for position, (address, _) in enumerate(lines)}
    program = [_sass_instruction(text, index) for _, text in lines]
    length = instructions_of_everyone(program)
    return MachineCode(registers, spilled, length, loops(program))


def parse_amdgcn(assembly: str) -> MachineCode:
    """Analyse the assembly text that Triton keeps of a kernel compiled for an AMD GPU."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in assembly.split("\n.Lfunc_end")[0].splitlines():
        code = line.split(";")[0].strip()
        if label := re.match(r"(\.LBB\w+):", code):
            labels[label[1]] = len(lines)
        elif re.match(r"(s|v|ds|global|buffer|flat|scratch)_\w+", code):
            lines.append(code)
    program = [_gcn_instruction(line, labels) for line in lines]
    return MachineCode(
        *amd_usage(assembly), instructions=instructions_of_everyone(program), loops=loops(program)
    )


def _sass_instruction(text: str, index: Mapping[int, int]) -> Instruction:
    predicate, opcode, operands = re.findall(r"^(@!?U?P\w+\s+)?(\S+)\s*(.*)", text)[0]
    # A branch may also be conditional on a predicate among its operands: BRA.U UP0, 0x900.
    always = not predicate and not re.search(r"\bU?P\d", operands)
    jump = None
    if opcode.startswith("BRA") and (address := re.search(r"0x([0-9a-f]+)", operands)):
        jump = index.get(int(address[1], 16))
    ends = opcode.split(".")[0] in ("BRA", "EXIT", "RET", "BRX", "JMP")
    return Instruction(opcode, jump, falls_through=not (ends and always))


def _gcn_instruction(code: str, labels: Mapping[str, int]) -> Instruction:
    opcode, _, operands = code.partition(" ")
    jump = labels.get(operands.strip()) if "branch" in opcode else None
    return Instruction(opcode, jump, falls_through=opcode not in ("s_branch", "s_endpgm"))
