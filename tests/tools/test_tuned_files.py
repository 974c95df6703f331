"""Tuned files on disk: nothing gets lost, whoever writes and whatever fails."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tools.tuned import (
    ENTRY,
    HEURISTIC,
    ROOT,
    TUNED,
    ask,
    case_of,
    entry,
    interrupted,
    named,
    offer,
    write,
)
from tritonloss import __main__
from tritonloss._core import configurations
from tritonloss._tools import tuned_files, tuner


def test_tuning_adds_to_the_file(cache: Path) -> None:
    write(cache / "cpu.json", entries={ENTRY: entry(), named(1): entry(source="0")})
    other = named(2, "other")
    tuned_files.write_entries(cache / "cpu.json", "cpu", {other: entry(configuration=HEURISTIC)})
    assert set(configurations.read_document(cache / "cpu.json", "cpu")["entries"]) == {ENTRY, other}


def test_a_failed_write_leaves_the_old_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(cache / "cpu.json")
    before = (cache / "cpu.json").read_text()
    with pytest.raises(TypeError):
        tuned_files.write_entries(cache / "cpu.json", "cpu", {"some": object()})
    assert (cache / "cpu.json").read_text() == before
    assert os.listdir(cache) == ["cpu.json"]


def test_a_process_killed_while_it_writes_leaves_the_old_file(cache: Path) -> None:
    write(cache / "cpu.json")
    script = (
        "import os; from pathlib import Path; from tritonloss._tools import tuned_files\n"
        "os.replace = lambda *paths: os._exit(9)\n"
        f"tuned_files.write_entries(Path({str(cache / 'cpu.json')!r}), 'cpu', {{}})\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert killed.returncode == 9 and len(os.listdir(cache)) == 2
    assert ask() == TUNED
    tuned_files.write_entries(cache / "cpu.json", "cpu", {})
    assert os.listdir(cache) == ["cpu.json"]  # the draft that was left is removed


def test_two_processes_write_the_same_file(cache: Path) -> None:
    """Nothing of either gets lost, and a third one that reads never sees half a file."""
    path = cache / "cpu.json"
    write(path)
    script = (
        "import json, sys; from pathlib import Path; from tritonloss._tools import tuned_files\n"
        "entry, path, who = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])\n"
        "for n in range(25):\n"
        "    key = f'some_forward|c{who}|w{2 * n + 1}|float32|contiguous'\n"
        "    tuned_files.write_entries(path, 'cpu', {key: entry})\n"
    )
    command = [sys.executable, "-c", script, json.dumps(entry()), str(path)]
    writers = [subprocess.Popen([*command, who], cwd=ROOT) for who in ("1", "2")]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        assert ENTRY in configurations.read_document(path, "cpu")["entries"]
        reads += 1
    assert [writer.returncode for writer in writers] == [0, 0] and reads > 10
    assert len(configurations.read_document(path, "cpu")["entries"]) == 1 + 2 * 25


def test_a_cache_directory_that_cannot_be_written_to(
    cache: Path, monkeypatch: pytest.MonkeyPatch, stub_gpu: None
) -> None:
    """What it holds is used, and tuning says at once that it has nowhere to write."""

    def refuse(**_: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    write(cache / "cpu.json")
    cache.chmod(0o555)
    monkeypatch.setattr(tempfile, "mkstemp", refuse)  # permissions do not stop every user
    offer(monkeypatch, replace(case_of(HEURISTIC), run=interrupted))
    said: list[str] = []
    assert ask() == TUNED
    assert tuner.tune(tuner.Request(), said.append) == 1
    assert "Read-only file system" in said[-1] and "TRITONLOSS_CACHE_DIR" in said[-1]
    cache.chmod(0o755)


def test_export_writes_what_can_be_shipped(
    cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path_factory.mktemp("shipped")
    monkeypatch.setattr(configurations, "SHIPPED_DIRECTORY", shipped)
    entries = {ENTRY: entry(), named(2): entry(source="0")}
    write(cache / "mine.json", gpu="NVIDIA_H200", entries=entries)
    assert __main__.main(["tune", "--export", str(cache / "mine.json")]) == 0
    document = configurations.read_document(shipped / "NVIDIA_H200.json", "NVIDIA_H200")
    assert list(document["entries"]) == [ENTRY]

    write(cache / "old.json", entries={ENTRY: entry(source="0")})
    (cache / "no.json").write_text("[]")
    for name in ("old.json", "no.json", "none.json"):
        assert __main__.main(["tune", "--export", str(cache / name)]) == 1
    assert os.listdir(shipped) == ["NVIDIA_H200.json"]
