"""What every test relies on: the interpreter where there is no GPU, and poisoned allocations."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Tests run side by side in many processes, which start others: each has one thread.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

if not HAS_GPU:
    # Triton replaces its own library's functions at import: after that the setting does nothing.
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"

    from tritonloss._tools.interpreter import hasten_interpreter

    hasten_interpreter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part",
        choices=("short", "rest"),
        help="of every test as many cases as show each value of each of its parameters once, or "
        "only the others",
    )
    parser.addoption(
        "--share", metavar="I/N", help="of the tests that are selected the I-th of N shares, from 0"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "shipped_sizes: with programs of the size that ships")
    config.addinivalue_line("markers", "thorough: too slow for the short part")
    config.addinivalue_line("markers", "large: takes tens of GiB of a GPU's memory")


@pytest.hookimpl(trylast=True)  # after -m and -k: what they leave is shared out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("--part")
    if part is not None:
        short = covering([item for item in items if not item.get_closest_marker("thorough")])
        config.hook.pytest_deselected(items=[i for i in items if (i in short) != (part == "short")])
        items[:] = [item for item in items if (item in short) == (part == "short")]
    share = config.getoption("--share")
    if share is not None:
        mine = share_of(items, *map(int, share.split("/")))
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:] = mine
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU; none is here"))


def share_of(items: list[pytest.Item], index: int, count: int) -> list[pytest.Item]:
    """The tests of one process of many. Only the first three processes have large ones."""
    large = [item for item in items if item.get_closest_marker("large")]
    small = [item for item in items if item not in large]
    return large[index :: min(3, count)] * (index < 3) + small[count - 1 - index :: count]


def covering(items: list[pytest.Item]) -> set[pytest.Item]:
    """At least one case of every test, and together each value of each parameter.

    A value that one test has shown, for example a layout, need not be shown again by another test
    with a parameter of the same name.
    """
    cases_of: dict[str, dict[pytest.Item, set[tuple[str, str]]]] = {}
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        values = {(name, repr(value)) for name, value in parameters.items()}
        cases_of.setdefault(item.nodeid.split("[")[0], {})[item] = values
    missing = set().union(*(values for cases in cases_of.values() for values in cases.values()))
    kept = set()
    for cases in cases_of.values():
        best = max(cases, key=lambda case: len(cases[case] & missing))
        while best not in kept:
            kept.add(best)
            missing -= cases[best]
            candidate = max(cases, key=lambda case: len(cases[case] & missing))
            if cases[candidate] & missing:
                best = candidate
    return kept


@pytest.fixture(scope="session")
def compiler() -> Iterator[Executor]:
    """A process without the interpreter, in which all tests that ask compile."""
    from tritonloss._tools.sieve import compiling_environment, leave_interrupts

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, leave_interrupts) as pool:
        with compiling_environment():
            pool.submit(os.getpid).result()
        yield pool


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def small_programs(request: pytest.FixtureRequest) -> Iterator[dict[str, int]]:
    """Programs of 64 columns and 8 rows: quick in the interpreter, and small images need several.

    Yields what is forced on every operator: nothing where a test is marked shipped_sizes.
    """
    from tests.slices import operators_with
    from tritonloss._core.configurations import forced

    size = {"COLUMNS": 2, "LANES": 32, "ROWS": 8, "num_warps": 1}
    if request.node.get_closest_marker("shipped_sizes"):
        size = {}
    with ExitStack() as stack:
        for operator in operators_with("COLUMNS"):
            stack.enter_context(forced(operator, size))
        yield size


@pytest.fixture
def small_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Programs of 64 pixels and blocks of 4 classes, unless a test wants what ships."""
    from tests.slices import operators_with
    from tritonloss._core.configurations import forced

    size = {"PIXELS": 64, "CLASS_LANES": 4, "UNROLL": 4, "num_warps": 1}
    if request.node.get_closest_marker("shipped_sizes"):
        size = {}
    with ExitStack() as stack:
        for operator in operators_with("PIXELS"):
            stack.enter_context(forced(operator, size))
        yield


@pytest.fixture(autouse=True)
def the_same_random_numbers() -> None:
    """Whichever tests have run in the process before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that the package allocates holds NaN (or -77) until a kernel writes it."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    yield


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller == "tritonloss" or caller.startswith("tritonloss."):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -77)
        return tensor

    return allocate_poisoned
