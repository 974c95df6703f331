"""Every shipped kernel compiled for GPUs that are not here: it compiles, and nothing spills."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Executor
from pathlib import Path

import pytest
import triton

from perf.compiling import baseline, check, compile_only
from perf.compiling.baseline import Baseline
from perf.compiling.facts import once_per_target
from perf.compiling.targets import TARGETS
from perf.operations.contract import CodeGoal, operations

ROOT = Path(__file__).parents[2]


@pytest.mark.compile_only
def test_every_shipped_kernel_compiles_without_spills() -> None:
    """These are all cases but the rare ones for one target, and some cases for the others.

    What is made of the same as the committed numbers is known and not compiled here; `perf check`
    compiles that, too.
    """
    path = baseline.path_of(triton.__version__)
    known = baseline.read(path) if path.exists() else Baseline()
    everything = check.facts_of(compile_only.jobs(short=True), known)
    facts = once_per_target(everything)
    faults = [
        f"{fact.target} {fact.kernel} ({fact.case}): {fact.fault}" for fact in facts if fact.fault
    ]
    assert not faults, "\n".join(faults)

    for target in TARGETS.values():
        mine = [fact for fact in facts if fact.target == target.name]
        compiled = {fact.op for fact in everything if fact.target == target.name}
        assert compiled == {operation.name for operation in operations()}
        assert all(0 <= fact.shared_bytes <= target.shared_per_block for fact in mine)
        assert all(fact.registers > 0 and fact.occupancy > 0 for fact in mine)
    for operation in operations():
        # Operations of one family launch the same kernels.
        compiled = {fact.kernel for fact in everything if fact.op == operation.name}
        assert compiled == set(operation.kernels), "perf is to say how to read every kernel"
        assert compiled >= {g.kernel for g in operation.goals if isinstance(g, CodeGoal)}


@pytest.mark.compile_only
def test_instructions_are_counted_per_output(compiler: Executor) -> None:
    name = "gaussian_statistics"
    windows = {
        case.options["window_size"]: index
        for index, case in enumerate(operations([name])[0].shipped)
        if case.text.startswith("cityscapes float32 contiguous") and "padding" not in case.options
    }
    work = [(name, windows[window], "sm_90") for window in (3, 11)]
    compiled = [compiler.submit(compile_only.compile_case, *job) for job in work]
    facts = once_per_target(fact for each in compiled for fact in each.result())
    forward = [fact for fact in facts if "forward" in fact.kernel]
    small, large = (fact.counts.numbers for fact in forward)
    assert set(small) == set(large) == {"total", "once", "rows"}
    # Two maps of 3 + 3 multiply-adds at the least, and no more than a direct 3 x 3 window.
    assert 12 < small["rows"] < small["total"] < 86
    assert large["rows"] > 2 * small["rows"]


@pytest.mark.compile_only
def test_every_loop_of_a_kernel_is_counted(compiler: Executor) -> None:
    """So are the look's and those of both kinds of strips; the totals have every part."""
    name = "structural_similarity_loss"
    look, *facts = compiler.submit(compile_only.compile_case, name, 0, "sm_90").result()
    assert look.kernel == "_label_look_kernel" and look.counts.numbers["rows"] > 0
    for fact in facts:
        numbers = fact.counts.numbers
        assert {"class absent", "class present", "once"} <= set(numbers), fact.kernel
        for case in ("class absent", "class present"):
            assert numbers[f"total, {case}"] == pytest.approx(
                numbers["once"] + numbers[case], abs=0.01
            )
        assert not fact.counts.unaccounted


@pytest.mark.compile_only
def test_a_kernel_that_does_not_compile_is_a_row_and_a_failure(tmp_path: Path) -> None:
    """A broken launcher must not look like a slice without kernels."""
    script = (
        "import dataclasses, sys; from perf.compiling import compile_only\n"
        "from perf.operations import contract\n"
        "broken = contract.operations(['gaussian_statistics'])[0]\n"
        "def fail(*_): raise ValueError('first line\\nlast line')\n"
        "broken = dataclasses.replace(broken, launch=fail)\n"
        "compile_only.operations = lambda names=None: [broken]\n"
        "facts = compile_only.compile_case('gaussian_statistics', 0, 'gfx942')\n"
        "assert facts[0].fault == 'ValueError: first line ... last line', facts\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)
