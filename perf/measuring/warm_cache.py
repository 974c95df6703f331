"""Triton's cache made without a GPU, for a machine that has one: `make gpu-cache`.

What `make gpu` launches is compiled on the stand-in for the driver (`stand_in.py`): the cases of
the report, the examples of the self-test, and the candidates of each operator's first tuning case.
An archive holds what launching needs and no intermediate form. Triton's key is a hash of its own
files, the compiled library among them. So an archive fits only the wheel that it was made for, and
its manifest says which that is. `python -m perf gpu-cache make | unpack | fill`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import sys
import sysconfig
import tarfile
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import cache

from perf.measuring import stand_in
from perf.measuring.trial import Trial
from perf.operations.contract import operations, scheduled
from tritonloss._core.progress import Progress
from tritonloss._tools.doctor import self_test_inputs
from tritonloss._tools.examples import examples
from tritonloss._tools.launches import offline
from tritonloss._tools.sieve import (
    Place,
    compiling_environment,
    fault_of,
    leave_interrupts,
    place_of,
)
from tritonloss._tools.stopping import ended_in_order
from tritonloss._tools.tuning_cases import tuning_cases

TARGET = GPUTarget("cuda", 90, 32)  # what the stand-in says it is
SHARED_BYTES = 232448
ARCHIVE = Path("build/gpu-cache.tar.xz")
_MANIFEST = "manifest.json"
_KEPT = (".cubin", ".json", ".so")
_ANALYSIS = ".analysis.json"  # of machine code, kept beside the kernels by perf/compiling


@dataclass(frozen=True)
class Case:
    """A case of an operation, forward and backward."""

    operation: str
    number: int

    def run(self) -> None:
        """Launch what the report's measurement launches; on the stand-in nothing is computed."""
        operation = operations([self.operation])[0]
        case = operation.cases[self.number]
        described = operation.inputs(case, torch.device("meta"))
        with scheduled(operation, case):
            trial = Trial(operation.function, case, tuple(map(_untouched, described)))
            _backward(*trial.forward())


@dataclass(frozen=True)
class SelfTest:
    """An example, as the self-test on a GPU runs it."""

    number: int

    def run(self) -> None:
        """Launch its forward and backward pass."""
        example = examples()[self.number]
        logits, target = self_test_inputs("cuda")
        _backward(example(logits.requires_grad_(), target), [logits])


@dataclass(frozen=True)
class Candidate:
    """A configuration that the tuner tries."""

    place: Place
    number: int

    def run(self) -> None:
        """Compile it, as the tuner's pool does."""
        fault_of(self.place, self.number, TARGET, SHARED_BYTES)


Job = Case | SelfTest | Candidate


def jobs(names: Sequence[str] | None = None, first: int | None = None) -> list[Job]:
    """The jobs for all that `make gpu` launches, in about its order.

    Args:
        names: only the cases of these operations, without self-test and tuning.
        first: only so many cases of each operation.
    """
    queues = [
        [Case(operation.name, number) for number in range(len(operation.cases[:first]))]
        for operation in operations(names)
    ]
    found: list[Job] = [job for turn in zip_longest(*queues) for job in turn if job is not None]
    if names is not None:
        return found
    found[:0] = [SelfTest(number) for number in range(len(examples()))]
    with offline(TARGET):
        for case in tuning_cases(first=True):
            found += [Candidate(place_of(case), n) for n in range(len(case.candidates))]
    return found


@dataclass(frozen=True)
class Manifest:
    """What an archive was made for, and what it holds."""

    key: str
    triton: str
    suffix: str  # of compiled Python modules: the C launchers are for this Python
    kernels: int
    launchers: int

    @property
    def recognised(self) -> bool:
        """Whether the Triton of this process would take its kernels for its own."""
        return self.key == hashed(cache.triton_key())

    @property
    def complete(self) -> bool:
        """Whether nothing is left to compile."""
        return self.recognised and self.launchers > 0 and self.suffix == _suffix()


def fill(
    folder: Path,
    work: Sequence[Job],
    key: str | None = None,
    workers: int | None = None,
    seconds: float | None = None,
) -> list[str]:
    """What went wrong, a line for each job, in filling a cache folder with what it lacks.

    Args:
        folder: Triton's cache.
        work: the jobs.
        key: Triton's key, if it is to be another wheel's.
        workers: processes.
        seconds: nothing is waited for after so long.
    """
    end = None if seconds is None else time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    bar = Progress(len(work), budget_s=seconds)
    troubles = []
    with compiling_environment():
        pool = ProcessPoolExecutor(workers or os.cpu_count(), context, _start, (key, folder))
        try:
            pending = {pool.submit(_run, job) for job in work}
            while pending and (end is None or time.monotonic() < end):
                left = None if end is None else max(0.0, end - time.monotonic())
                done, pending = wait(pending, left, FIRST_COMPLETED)
                for future in done:
                    name, trouble = future.result()
                    troubles += [f"{name}: {trouble}"] if trouble else []
                    bar.step(name)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            bar.close()
    return troubles


def pack(folder: Path, archive: Path, key: str | None = None) -> Manifest:
    """The manifest of an archive that is written, of what launching needs.

    For another wheel, whose key is given, it holds kernels alone.
    """
    kept = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_needed(path)]
    if key is not None:  # the launchers here are compiled for the Python here
        kept = [path for path in kept if path.suffix != ".so"]
    manifest = Manifest(
        key=hashed(key or cache.triton_key()),
        triton=triton.__version__,
        suffix=_suffix(),
        kernels=sum(path.suffix == ".cubin" for path in kept),
        launchers=sum(path.suffix == ".so" for path in kept),
    )
    archive.parent.mkdir(parents=True, exist_ok=True)
    draft = archive.with_name(f".{archive.name}.draft")
    with tarfile.open(draft, "w:xz") as file:
        text = json.dumps(asdict(manifest)).encode()
        entry = tarfile.TarInfo(_MANIFEST)
        entry.size = len(text)
        file.addfile(entry, io.BytesIO(text))
        for path in kept:
            file.add(path, str(path.relative_to(folder)))
    draft.replace(archive)
    return manifest


def unpack(archive: Path, folder: Path) -> Manifest:
    """The manifest of an archive, whose files go into a cache folder if they fit this Triton.

    Raises:
        ValueError: the archive has no manifest.
    """
    with tarfile.open(archive) as file:
        first = file.next()
        text = file.extractfile(first) if first and first.name == _MANIFEST else None
        if text is None:
            raise ValueError(f"{archive} is no cache of kernels: it begins without a manifest")
        manifest = Manifest(**json.load(text))
        if manifest.recognised:
            folder.mkdir(parents=True, exist_ok=True)
            file.extractall(folder, filter="data")
            (folder / _MANIFEST).unlink()
            for group in folder.rglob("__grp__*.json"):
                _list_what_is_there(group)
    return manifest


def key_of_wheel(wheel: Path) -> str:
    """Triton's key in another build of the version that is installed, for another Python.

    Raises:
        ValueError: the wheel differs in more than its compiled library, or this Triton's key is not
            made of the library's hash.
    """
    package = Path(triton.__file__).parent
    library = "_C/libtriton.so"
    with zipfile.ZipFile(wheel) as file:
        for name in file.namelist():
            inside = name.removeprefix("triton/")
            if name.startswith("triton/") and name.endswith(".py"):
                mine = package / inside
                if not mine.exists() or mine.read_bytes() != file.read(name):
                    raise ValueError(f"{wheel.name} is not the Triton that is installed: {name}")
        theirs = hashlib.sha256(file.read(f"triton/{library}")).hexdigest()
    mine = hashlib.sha256((package / library).read_bytes()).hexdigest()
    key = str(cache.triton_key())
    if mine not in key:
        raise ValueError("this Triton's key is not made of its library's hash")
    return key.replace(mine, theirs)


def hashed(key: str) -> str:
    """One hash of a key that is made of many."""
    return hashlib.sha256(key.encode()).hexdigest()


def _start(key: str | None, folder: Path) -> None:
    """Prepare a process of the pool, before anything asks for Triton's driver."""
    leave_interrupts()
    triton.knobs.cache.dir = str(folder)
    if key is not None:
        cache.triton_key = lambda: key
    torch.set_num_threads(1)
    stand_in.install()
    stand_in.adopt()


def _run(job: Job) -> tuple[str, str | None]:
    """(the job, what went wrong), in a process of the pool."""
    try:
        job.run()
    except Exception as error:  # the rest is wanted all the same
        return str(job), f"{type(error).__name__}: {str(error).strip()[:300]}"
    return str(job), None


def _backward(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Launch the backward pass, if there is one; matrices of confusion have none."""
    outputs = [output for output in outputs if output.requires_grad]
    if outputs:
        torch.autograd.grad(outputs, leaves, [torch.empty_like(output) for output in outputs])


def _untouched(described: Tensor) -> Tensor:
    """A CPU tensor like one on the meta device; never written, its memory takes no space."""
    count = described.untyped_storage().nbytes() // described.element_size()
    storage = torch.empty(count, dtype=described.dtype)
    return storage.as_strided(described.size(), described.stride(), described.storage_offset())


def _kernels(folder: Path) -> set[Path]:
    """The files of machine code in a cache."""
    return set(folder.rglob("*.cubin"))


def _is_needed(path: Path) -> bool:
    return path.suffix in _KEPT and not path.name.endswith(_ANALYSIS)


def _list_what_is_there(group: Path) -> None:
    """Rewrite a kernel's list of files, so that it names those that are here, where they are.

    Some versions of Triton look for all files of the list, in the folder where they were made.
    """
    names = json.loads(group.read_text())["child_paths"]
    here = {name: str(group.parent / name) for name in names if (group.parent / name).exists()}
    group.write_text(json.dumps({"child_paths": here}))


def _suffix() -> str:
    """How the names of compiled Python modules end."""
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def described(manifest: Manifest) -> str:
    """One line about an archive on this machine."""
    held = f"{manifest.kernels} kernels of triton {manifest.triton}"
    if not manifest.recognised:
        return f"{held}: not for this wheel of Triton ({triton.__version__}), and left alone"
    if not manifest.complete:
        return f"{held}: the wheel's key matches; C launchers are compiled here"
    return f"{held} and {manifest.launchers} C modules: the wheel's key matches"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `python -m perf gpu-cache`: 1 if something is left to compile."""
    parser = argparse.ArgumentParser(
        prog="python -m perf gpu-cache", description=str(__doc__).split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="compile all, and write an archive")
    make.add_argument("--wheel", type=Path, help="for this wheel of the same Triton")
    make.add_argument("--cache", type=Path, default=Path("build/gpu-cache"), metavar="FOLDER")
    opened = commands.add_parser("unpack", help="lay an archive into Triton's cache")
    filled = commands.add_parser("fill", help="compile what Triton's cache does not have")
    filled.add_argument("--seconds", type=float)
    for command in (make, opened):
        command.add_argument("--archive", type=Path, default=ARCHIVE, metavar="FILE")
    for command in (make, filled):
        command.add_argument("--ops", nargs="+", metavar="OP")
        command.add_argument("--first", type=int, metavar="N", help="cases of each operation")
        command.add_argument("--workers", type=int)
    options = parser.parse_args(arguments)
    if options.command == "unpack":
        manifest = unpack(options.archive, Path(triton.knobs.cache.dir))
        print(described(manifest))
        return 0 if manifest.complete else 1
    try:
        with ended_in_order():
            troubles = _make(options) if options.command == "make" else _fill(options)
    except KeyboardInterrupt:
        print("interrupted; what was compiled stays in the cache, and is not compiled again")
        return 130
    for line in troubles:
        print(line, file=sys.stderr)
    return 1 if troubles else 0


def _fill(options: argparse.Namespace) -> list[str]:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        print("the stand-in compiles for sm_90, and this GPU is another: nothing is compiled ahead")
        return []
    here = Path(triton.knobs.cache.dir)
    work, known = jobs(options.ops, options.first), _kernels(here)
    troubles = fill(here, work, None, options.workers, options.seconds)
    compiled = len(_kernels(here) - known)
    print(f"{compiled} kernels were compiled that {here} did not have")
    return troubles


def _make(options: argparse.Namespace) -> list[str]:
    key = key_of_wheel(options.wheel) if options.wheel else None
    key = None if key == cache.triton_key() else key  # None: the wheel is the installed one
    work = jobs(options.ops, options.first)
    troubles = fill(options.cache.absolute(), work, key, options.workers)
    manifest = pack(options.cache, options.archive, key)
    size = options.archive.stat().st_size / 1e6
    print(f"{options.archive}: {manifest.kernels} kernels, {size:.1f} MB")
    return troubles
