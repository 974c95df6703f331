"""The hash of device code: it follows what is compiled, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tritonloss._core import source_hash as hashing
from tritonloss._core.source_hash import source_hash
from tritonloss._tools import tuning_cases

ROOT = Path(__file__).parents[2]


def test_source_hash_follows_device_code_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = (
        "from . import helpers\n\n\n@triton.jit\ndef kernel(x):\n"
        '    """Text."""\n    y = x  # why\n    return y\n\n\ndef launch():\n    pass\n'
    )
    monkeypatch.setattr(hashing, "_PACKAGE", tmp_path)

    def hashed(text: str, helper: str = "") -> str | None:
        (tmp_path / "loss.py").write_text(text)
        (tmp_path / "helpers.py").write_text(helper)
        source_hash.cache_clear()
        return source_hash("loss")

    (tmp_path / "words.py").write_text('WORDS = ("mean", "sum")\n')
    try:
        before = hashed(kernel)
        assert before == hashed(kernel.replace("import helpers", "import helpers, words"))
        assert before == hashed(kernel.replace("Text", "Other text").replace("why", "so"))
        assert before == hashed(kernel.replace("pass", "return 1"))
        assert before != hashed(kernel.replace("y = x", "y = x + 1"))
        assert before != hashed(f"LARGE = tl.constexpr(1e30)\n{kernel}")
        assert before == hashed(f"LARGE = 1e30\n{kernel}")
        state = 'class State(NamedTuple):\n    """Text."""\n\n    first: int\n    last: int = 0\n'
        of_state = hashed(f"{state}{kernel}")
        assert before != of_state == hashed(f"{state.replace('Text', 'Other')}{kernel}")
        assert of_state != hashed(f"{state.replace('= 0', '= 1')}{kernel}")
        assert before == hashed(f"{state.replace('NamedTuple', 'Plan')}{kernel}")
        assert before != hashed(kernel, "@triton.jit\ndef helper():\n    return 1\n")
        assert source_hash("no_such_slice") is None and source_hash("../loss") is None
    finally:
        source_hash.cache_clear()


@pytest.mark.parametrize(
    "line",
    [
        "from ..engine import helpers",
        "from ..engine.helpers import helper",
        "from .. import engine",
        "from tritonloss.engine.helpers import helper",
        "import tritonloss.engine.helpers",
    ],
)
def test_source_hash_follows_imports_into_rooms(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine in a folder of its own counts as one beside the slice does."""
    monkeypatch.setattr(hashing, "_PACKAGE", tmp_path)
    for room in ("windows", "engine"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("")
    (tmp_path / "engine" / "__init__.py").write_text("from . import helpers\n")
    (tmp_path / "windows" / "loss.py").write_text(f"{line}\n")

    def hashed(number: int) -> str | None:
        helper = f"@triton.jit\ndef helper():\n    return {number}\n"
        (tmp_path / "engine" / "helpers.py").write_text(helper)
        source_hash.cache_clear()
        return source_hash("windows.loss")

    try:
        first = hashed(1)
        assert first is not None and first == hashed(1) != hashed(2)
    finally:
        source_hash.cache_clear()


def test_every_module_with_device_code_counts_for_a_slice() -> None:
    package = ROOT / "tritonloss"
    reached = {name for one in tuning_cases.slices() for name in hashing.source_modules(one)}
    for path in package.rglob("*.py"):
        if "triton.jit" in path.read_text() and path.stem != "interpreter":  # the doctor's trial
            assert ".".join(path.relative_to(package).with_suffix("").parts) in reached
