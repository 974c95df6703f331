"""The GPUs that kernels are compiled for, their limits, and the occupancy computed from these."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

_KIB = 1024


@dataclass(frozen=True)
class Target:
    """One GPU architecture. A processor is an NVIDIA SM or an AMD compute unit.

    Attributes:
        registers: 32-bit registers per lane that the resident warps of one of the processor's
            four schedulers share.
        register_step: a warp is given registers per lane in steps of this.
        warps, blocks: how many of each a processor holds at most.
        shared: bytes of a processor's shared memory.
        shared_per_block: the most shared memory a block may ask for.
        shared_reserved: what the driver takes from the processor's shared memory for every block.
        processors, lanes, clock_GHz, memory_GBps: from the data sheet of the largest of these GPUs:
            how many processors it has, for how many lanes each issues an instruction in a cycle,
            its clock and its memory's bandwidth. They are for predictions, never a measurement.
    """

    name: str
    gpus: str
    gpu: GPUTarget
    registers: int
    register_step: int
    warps: int
    blocks: int
    shared: int
    shared_per_block: int
    shared_reserved: int
    processors: int
    lanes: int
    clock_GHz: float  # noqa: N815
    memory_GBps: float  # noqa: N815

    def occupancy(self, registers: int, shared_bytes: int, num_warps: int) -> float:
        """The share of the most resident warps that a kernel reaches, limited by resources only."""
        per_lane = -(-max(registers, 1) // self.register_step) * self.register_step
        warps = min(self.warps, 4 * (self.registers // per_lane))
        blocks = min(self.blocks, warps // num_warps)
        per_block = shared_bytes + self.shared_reserved
        if per_block:
            blocks = min(blocks, self.shared // per_block)
        return blocks * num_warps / self.warps


def _nvidia(
    capability: int, gpus: str, shared_kib: int, processors: int, clock: float, memory: float
) -> Target:
    return Target(
        name=f"sm_{capability}",
        gpus=gpus,
        gpu=GPUTarget("cuda", capability, 32),
        registers=512,
        register_step=8,
        warps=64,
        blocks=32,
        shared=shared_kib * _KIB,
        shared_per_block=(shared_kib - 1) * _KIB,
        shared_reserved=1 * _KIB,
        processors=processors,
        lanes=128,
        clock_GHz=clock,
        memory_GBps=memory,
    )


_GFX942 = Target(
    name="gfx942",
    gpus="MI300",
    gpu=GPUTarget("hip", "gfx942", 64),
    registers=512,
    register_step=8,
    warps=32,
    blocks=32,
    shared=64 * _KIB,
    shared_per_block=64 * _KIB,
    shared_reserved=0,
    processors=304,
    lanes=64,
    clock_GHz=2.1,
    memory_GBps=5300,
)

TARGETS = {
    target.name: target
    for target in (
        _nvidia(80, "A100", 164, processors=108, clock=1.41, memory=2039),
        _nvidia(90, "H100, H200", 228, processors=132, clock=1.98, memory=4800),
        _nvidia(100, "B200", 228, processors=148, clock=1.965, memory=8000),
        _GFX942,
    )
}
