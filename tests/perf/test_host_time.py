"""The stand-in for the driver, and what it counts."""

from __future__ import annotations

import pytest

from perf.measuring import host_time


@pytest.mark.compile_only
def test_launches_and_time_are_counted_without_a_gpu() -> None:
    rows = {row.op: row for row in host_time.collect(["cross_entropy"])}
    bare, loss = rows[host_time.BARE], rows["cross_entropy"]
    assert (bare.forward_launches, bare.backward_launches) == (1, 1)
    assert loss.forward_launches >= 1 and loss.backward_launches == 1
    assert loss.microseconds > bare.microseconds > 0
    assert loss.times_bare == pytest.approx(loss.microseconds / bare.microseconds)
