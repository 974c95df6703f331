"""The committed numbers of machine code and launches, and what is held against them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from perf.compiling import baseline, check
from perf.compiling.baseline import Baseline, Kept
from perf.compiling.compile_only import Job, jobs
from perf.compiling.counting import Counts, LoopFacts
from perf.compiling.facts import KernelFacts
from perf.compiling.targets import TARGETS
from perf.measuring import launches
from perf.operations.contract import operations
from tests.perf.made import NAMES, ROOT, counted, fact


def of(*facts: KernelFacts) -> Baseline:
    return baseline.of_facts(facts)


def compared(before: Baseline, now: Baseline) -> check.Comparison:
    return check.compare(before.numbers(), now.numbers())


def test_check_names_what_is_worse(tmp_path: Path) -> None:
    before = of(fact(), fact(target="sm_80"), fact(case="gone"))
    path = tmp_path / "baseline" / "triton-3.9.json"
    baseline.write(path, before)
    assert baseline.read(path) == before
    first = path.read_text()
    baseline.write(path, Baseline(dict(reversed(before.kernels.items())), before.made_of))
    assert path.read_text() == first  # nothing depends on the order

    slower = fact(counts=counted(27.0), registers=42, instructions=900)
    now = of(slower, fact(target="sm_80", spill_bytes=8), fact(case="new"))
    found = compared(before, now)
    assert not found.passed and len(found.worse) == 2
    spilling, slow = found.worse
    assert "total 27 -> 29 (+7%)" in slow and "sm_90" in slow
    assert "_gaussian_statistics_forward_kernel" in slow
    assert "spill bytes 0 -> 8 (from nothing)" in spilling and "sm_80" in spilling
    assert found.new[0].endswith(": new)") and found.gone[0].endswith(": gone)")
    lines = check.report(found, 3, path)
    assert "worse by more than 5%: 2" in lines and "check --update" in lines[-1]


def test_check_lets_small_changes_and_improvements_pass() -> None:
    before = of(fact(registers=100))
    assert compared(before, of(fact(registers=105))).passed
    assert not compared(before, of(fact(registers=106))).passed
    better = compared(before, of(fact(registers=80)))
    assert better.passed and "100 -> 80 (-20%)" in better.better[0]
    loops = (LoopFacts("a", 10.0, 10.0), LoopFacts("b", 17.0, 17.0))
    moved = Counts(1.0, loops, (("total", 28.0),))
    assert compared(before, of(fact(registers=100, counts=moved))).passed


def test_check_knows_kernels_that_nobody_reads_and_repeated_launches() -> None:
    found = of(fact(counts=Counts(), instructions=321), fact(), fact(error="fails", case="x"))
    where = ("sm_90", "gaussian_statistics: cityscapes float32 contiguous window_size=3")
    assert found.kernels == {
        (*where, "_gaussian_statistics_forward_kernel"): Kept(40, 0, 0, 321, {}),
        (*where, "_gaussian_statistics_forward_kernel 2"): Kept(
            40, 0, 0, 300, {"total": 27.0, "once": 2.0, "rows": 25.0}
        ),
    }
    code = {"registers": 40, "spill bytes": 0, "shared bytes": 0}
    assert list(found.numbers().values()) == [
        {**code, baseline.WHOLE: 321},
        {**code, baseline.WHOLE: 300, "total": 27.0},
    ]
    assert set(found.made_of) == {where}  # what does not compile is not known


def test_older_entries_are_read_compared_and_kept_as_they_are(tmp_path: Path) -> None:
    """They have some of the loops, perhaps no instructions, and no word of their source."""
    path = tmp_path / "triton-3.9.json"
    entries = '{"a": [64, 0, 16, 6.84], "b": [9, 0, 0, 7], "c": [9, 0, 0, 300, [25.0, null]]}'
    path.write_text(f'{{"targets": {{"sm_90": {{"op: case": {entries}}}}}}}')
    older = baseline.read(path)
    assert older.kernels["sm_90", "op: case", "a"] == Kept(64, 0, 16, None, loops=(6.84,))
    assert older.kernels["sm_90", "op: case", "b"] == Kept(9, 0, 0, 7)
    assert older.kernels["sm_90", "op: case", "c"] == Kept(9, 0, 0, 300, loops=(25.0, None))
    assert not older.made_of
    before, *_, last = older.numbers().values()
    assert set(before) == {"registers", "spill bytes", "shared bytes"}
    now = {**last, baseline.WHOLE: 330, "total": 27.0}
    assert check._changes(last, now)[0][0].startswith("instructions of the whole kernel 300 -> 330")
    baseline.write(path, older.joined(of(fact())))
    assert '"a": [64, 0, 16, 6.84]' in path.read_text() and '"made of"' in path.read_text()
    assert '"c": [9, 0, 0, 300, [25.0, null]]' in path.read_text()
    assert "new to it" in check.stale(older, of(fact()))


def test_check_of_a_part_leaves_the_rest_of_the_baseline_alone() -> None:
    case = operations(["gaussian_statistics"])[0].shipped[0].text
    mine = ("sm_90", f"gaussian_statistics: {case}", "kernel")
    renamed = ("sm_90", "gaussian_statistics: a case that is no more", "kernel")
    dropped = ("sm_90", "no_such_operation: case", "kernel")
    others = [("sm_80", *mine[1:]), ("sm_90", "ssim: case", "kernel")]
    places = [mine, renamed, dropped, *others]
    part = check.of_the_work(places, [("gaussian_statistics", 0, "sm_90")])
    assert set(part) == {mine, renamed, dropped}
    before = Baseline(dict.fromkeys(places, Kept(1, 0, 0, 1)), {mine[:2]: "x", others[0][:2]: "y"})
    rest = before.without(part)
    assert set(rest.kernels) == set(others) and rest.made_of == {others[0][:2]: "y"}


def test_rare_cases_are_in_the_full_table_only() -> None:
    for operation in operations():
        rare = {n for n, case in enumerate(operation.shipped) if case.rare}
        mine = [operation]
        short = {(index, target) for _, index, target in jobs(mine, short=True)}
        assert not rare & {index for index, _ in short}
        assert {(n, "sm_90") for n in range(len(operation.shipped)) if n not in rare} <= short
        full = {(index, target) for _, index, target in jobs(mine)}
        assert full == {(n, t) for n in range(len(operation.shipped)) for t in TARGETS}


def test_every_loss_is_compiled_for_wide_labels_and_in_float64() -> None:
    for operation in operations():
        assert any(case.dtype == "float64" for case in operation.shipped), operation.name
        if any(case.labels for case in operation.shipped):
            labels = {case.labels for case in operation.shipped}
            assert labels == {"uint8", "int16", "int32", "int64"}, operation.name
    shipped = operations(["rmi_loss"])[0].shipped
    unpooled = [case for case in shipped if "pooling=None" in case.text]
    for region in (1, 2, 3, 4, 5):
        mine = [case for case in unpooled if case.options["region_size"] == region]
        assert {"uint8", "int64"} <= {case.labels for case in mine}
        assert {"float32", "float64"} <= {case.dtype for case in mine}


def test_a_case_is_made_of_what_its_machine_code_depends_on() -> None:
    before = of(fact(digest="a"), fact(digest="b"))
    assert "compiles nothing" in check.stale(before, of(fact(digest="a"), fact(digest="b")))
    assert "1 of 1 cases" in check.stale(before, of(fact(digest="a"), fact(digest="c")))
    assert "(0 of them are new to it)" in check.stale(before, of(fact(digest="a")))


@pytest.mark.compile_only
def test_a_case_that_is_made_of_the_same_is_not_compiled_again() -> None:
    """A case whose launch, device code or Triton is another is not taken for it."""
    script = (
        "from dataclasses import replace\n"
        "from perf.compiling import baseline, compile_only\n"
        "from perf.operations.contract import operations\n"
        "from tritonloss._core.configurations import forced\n"
        "job = ('gaussian_statistics', 0, 'gfx942')\n"
        "compiled = compile_only.compile_case(*job)\n"
        "known = baseline.of_facts(compiled)\n"
        "(where, made), = known.made_of.items()\n"
        "asked = (*job[::2], {0: (made, known.of_case(where))})\n"
        "def refuse(*_): raise AssertionError('compiled')\n"
        "compile_only.analysis = refuse\n"
        "found = compile_only.recognise_cases(*asked)[job]\n"
        "assert [fact.text for fact in found] == [fact.text for fact in compiled]\n"
        "assert all(fact.committed for fact in found)\n"
        "assert found == [replace(f, compile_seconds=None, committed=True) for f in compiled]\n"
        "with forced('gaussian_statistics_forward', {'ROWS': 8}):\n"
        "    assert not compile_only.recognise_cases(*asked)\n"
        "version, compile_only.triton.__version__ = compile_only.triton.__version__, '9.9'\n"
        "assert not compile_only.recognise_cases(*asked)\n"
        "compile_only.triton.__version__ = version\n"
        "compile_only.source_hash = lambda name: 'other'\n"
        "assert not compile_only.recognise_cases(*asked)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)


def test_known_cases_are_compiled_when_they_are_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which ones depends on the contents of the files; sooner or later it is each of them."""
    work = jobs(short=True)
    drawn = [check.draw(work, 4, str(number)) for number in range(60)]
    assert {len(each) for each in drawn} == {(len(work) + 3) // 4}
    assert drawn[0] != drawn[1] and set().union(*drawn) == set(work)
    assert drawn[0] == check.draw(work, 4, "0") and len(check.contents()) == 64

    new, done = work[0], []

    def recognised(pool: object, asked: list[Job], known: Baseline) -> Iterator[Any]:
        assert known is baseline and not drawn[1] & set(asked)
        yield "all", {job: [fact()] for job in asked if job != new}

    def compiled(pool: object, asked: list[Job]) -> Iterator[Any]:
        done.extend(asked)
        yield from ((job, [fact()]) for job in asked)

    baseline = of(fact())
    monkeypatch.setattr(check, "contents", lambda: "1")
    monkeypatch.setattr(check, "compilers", nullcontext)
    monkeypatch.setattr(check, "recognised", recognised)
    monkeypatch.setattr(check, "compiled", compiled)
    assert len(check.facts_of(work, baseline, every=4)) == len(work)
    assert set(done) == drawn[1] | {new}
    assert f"of {len(work)} cases are compiled" in capsys.readouterr().out


def test_a_triton_without_a_baseline_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check.triton, "__version__", "9.1.2")
    monkeypatch.setattr(launches, "collect", lambda names: launches.read())
    assert check.main(["--ops", "ssim"]) == 1
    assert "no baseline for triton 9.1.2" in capsys.readouterr().out
    assert baseline.path_of("9.1.2").name == "triton-9.1.json"


BASELINES = sorted(baseline.FOLDER.glob("triton-*.json"))


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_committed_baselines_are_about_what_is_here(path: Path, tmp_path: Path) -> None:
    """A case that was renamed or dropped leaves no entry, and nothing spills but in float64."""
    committed = baseline.read(path)
    known = {f"{op.name}: {case.text}" for op in operations() for case in op.shipped}
    assert {case for _, case, _ in committed.kernels} <= known
    assert {target for target, _, _ in committed.kernels} == set(TARGETS)
    spilling = [case for (_, case, _), kept in committed.kernels.items() if kept.spill_bytes]
    assert all("float64" in case for case in spilling), spilling
    baseline.write(tmp_path / "copy.json", committed)
    copy = (tmp_path / "copy.json").read_text().splitlines()
    about = 2  # what a file says about itself may be of an older format
    assert copy[about:] == path.read_text().splitlines()[about:]


def test_another_number_of_launches_fails_and_names_the_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    committed = launches.read()
    assert {name.split(":")[0] for name in committed} == set(NAMES)
    forward, backward = committed["ssim: 2x19x64x64"]
    more = {**committed, "ssim: 2x19x64x64": (forward, backward + 1)}
    monkeypatch.setattr(launches, "collect", lambda names: committed)
    assert check.main(["--launches"]) == 0
    monkeypatch.setattr(launches, "collect", lambda names: more)
    assert check.main(["--launches"]) == 1
    said = capsys.readouterr().out
    changed = f"launches {forward} + {backward + 1} kernels"
    assert changed in said and f"not {forward} + {backward};" in said and "ssim: 2x19x64x64" in said
    assert "nothing is committed" in launches.differences({}, more)[0]


def test_launches_of_a_part_leave_those_of_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "launches.json"
    launches.write({"ssim: 1x2": (1, 2), "rmi_loss: 1x2": (3, 4), "dropped: 1x2": (5, 6)}, path)
    launches.write({"ssim: 1x2": (7, 8)}, path)
    assert launches.read(path) == {"ssim: 1x2": (7, 8), "rmi_loss: 1x2": (3, 4)}


@pytest.mark.compile_only
def test_launches_are_counted_where_the_public_functions_launch() -> None:
    """That is done for small images and for large ones, which may have kernels of their own."""
    committed = launches.read()
    mine = {name: counts for name, counts in committed.items() if name.startswith("rmi_loss:")}
    assert len(mine) == 2 and launches.collect(["rmi_loss"]) == mine
