"""The stand-in for the driver, and what it counts."""

from __future__ import annotations

import pytest
import torch

from perf.measuring import host_time
from perf.measuring.memory import Tally, tally
from perf.report import markdown
from tests.perf.made import offline_report


@pytest.mark.compile_only
def test_launches_and_time_are_counted_without_a_gpu() -> None:
    rows = {row.op: row for row in host_time.collect(["cross_entropy"])}
    bare, loss = rows[host_time.BARE], rows["cross_entropy"]
    assert (bare.forward_launches, bare.backward_launches) == (1, 1)
    assert loss.forward_launches >= 1 and loss.backward_launches == 1
    assert loss.microseconds > bare.microseconds > 0
    assert loss.times_bare == pytest.approx(loss.microseconds / bare.microseconds)
    assert (bare.allocations, bare.torch_operations, bare.compilations) == (2, 0, 2)
    assert loss.allocations >= 2 and loss.compilations >= 2
    # A kernel that depended on the size of images would be compiled for each of them.
    assert loss.compilations_again == bare.compilations_again == 0


def test_allocations_views_and_computing_operations_are_told_apart() -> None:
    x = torch.ones(4)
    assert tally(lambda: x.new_empty(3)) == Tally(1, 0, 0)
    assert tally(lambda: x.view(2, 2)[0].detach()) == Tally(0, 3, 0)
    assert tally(lambda: x.zero_()) == Tally(0, 0, 1)
    assert tally(lambda: torch.zeros(3)) == Tally(1, 0, 1)
    assert tally(lambda: x.sum()).computing >= 1


def test_the_report_shows_them_per_loss() -> None:
    bare = host_time.HostTime(host_time.BARE, 1, 1, 40.0, 1.0)
    loss = host_time.HostTime("loss", 3, 2, 100.0, 2.5, 7, 9, 4, 5, 0, (5, 8))
    page = markdown.page(offline_report(host=[bare, loss]))
    assert "Host time and launches of a call" in page
    assert "| loss | 2.5 | 100 | 3 + 2 | 5 + 8 | 4 | 7 | 9 | 5 | 0 |" in page
    assert "the bare pair is an autograd.Function" in page
    assert "Host time and launches" not in markdown.page(offline_report())
