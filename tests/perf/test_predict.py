"""Predictions: the model, and that nobody takes them for measurements."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from perf.compiling import predict
from perf.compiling.targets import TARGETS
from tests.perf.made import ROOT
from tritonloss._core.configurations import TuningCase


def modelled(**values: Any) -> predict.Kernel:
    common: dict[str, Any] = {
        "name": "kernel", "registers": 40, "fault": None, "occupancy": 0.5, "per_output": 100.0,
        "outputs": 10**8, "tensor_bytes": 8 * 10**8, "programs": 132 * 40, "num_warps": 4,
    }  # fmt: skip
    return predict.Kernel(**{**common, **values})


def test_the_model_takes_the_larger_of_issue_and_bytes() -> None:
    hopper = TARGETS["sm_90"]
    issue = 100 * 1e8 / (132 * 128 * 1.98e3)
    assert modelled().microseconds(hopper) == pytest.approx(issue)
    assert modelled(per_output=1.0).microseconds(hopper) == pytest.approx(8e8 / 4.8e6)
    # One warp per scheduler issues half the time; the last of 1.5 rounds is half idle.
    assert modelled(occupancy=1 / 16).microseconds(hopper) == pytest.approx(2 * issue)
    assert modelled(programs=198).microseconds(hopper) == pytest.approx(issue * 2 / 1.5)
    assert modelled(programs=100).microseconds(hopper) == pytest.approx(2 * issue * 1.32)
    assert modelled(per_output=None).microseconds(hopper) is None


def test_predictions_say_what_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hopper = TARGETS["sm_90"]
    case = TuningCase(
        "some_forward", 19, 3, torch.float32, "contiguous", lambda device: lambda: None,
        [{"ROWS": 64, "num_warps": 4}, {"ROWS": 32, "num_warps": 4}, {"ROWS": 16, "num_warps": 4}],
    )  # fmt: skip
    first, second, third = case.candidates
    predictions = (
        predict.Prediction(second, (modelled(),)),
        predict.Prediction(first, (modelled(per_output=120.0),)),
        predict.Prediction(third, (modelled(),), trouble="kernel spills 8 B"),
    )
    ranking = predict.Ranking(case, hopper, predictions)
    assert ranking.excess == pytest.approx(0.2)
    monkeypatch.setattr(predict, "cases_at_full_size", lambda *_: [case])
    monkeypatch.setattr(predict, "rankings", lambda *_, **__: [ranking])
    assert predict.main(["--target", "sm_90"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("PREDICTION, not a measurement") and "predicted us" in text
    assert re.search(r"ROWS=32 num_warps=4 +\d+ +1.00", text)
    assert re.search(r"ROWS=64 num_warps=4  \(heuristic\) +\d+ +1.20", text)
    assert "out: ROWS=16 num_warps=4: kernel spills 8 B" in text
    assert " ms" not in text
    for wrong in (["--target", "sm_1"], ["--shapes", "4x19x1024"]):
        with pytest.raises(SystemExit):
            predict.main(wrong)


@pytest.mark.thorough
@pytest.mark.compile_only
def test_heuristics_are_what_the_model_prefers() -> None:
    """No candidate with the same schedule and registers to spare is predicted 10 % faster."""
    script = (
        "from perf.compiling import predict\n"
        "from perf.compiling.targets import TARGETS\n"
        "if __name__ == '__main__':\n"
        "    target = TARGETS['sm_90']\n"
        "    cases = [case for case in predict.cases_at_full_size(target)\n"
        "             if case.key in ('gaussian_statistics_forward|c32|w11|float32|contiguous',\n"
        "                             'ssim_forward|c4|w11|float32|contiguous')]\n"
        "    assert len(cases) == 2\n"
        "    for ranking in predict.rankings(target, cases):\n"
        "        mine = ranking.heuristic\n"
        "        time = mine.microseconds(target)\n"
        "        for other in ranking.predictions:\n"
        "            spare = all(kernel.registers <= 160 for kernel in other.kernels)\n"
        "            predicted = other.microseconds(target)\n"
        "            assert not (spare and predicted and predicted < time / 1.1), (\n"
        "                ranking.case.key, other)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.py").write_text(script)
        command = [sys.executable, f"{folder}/model.py"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
