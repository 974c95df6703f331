"""How tuned files are written: in one step, by one process at a time, entry by entry."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import triton

import tritonloss

from .._core import configurations

_DRAFT = ".draft"


def write_entries(path: Path, name: str, entries: dict[str, Any]) -> None:
    """Lay ``entries`` over those of the file at ``path`` and replace it in one step.

    Entries that were measured with other kernels are dropped on the way.

    Raises:
        OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent) as alone:
        if alone:
            # A process that was killed while it wrote has left its draft behind.
            for draft in path.parent.glob(f"*{_DRAFT}"):
                draft.unlink(missing_ok=True)
        _replace(path, _document(name, {**current_entries(path, name), **entries}))


def current_entries(path: Path, name: str) -> dict[str, Any]:
    """The entries of the file at ``path`` that were measured with these kernels; maybe none."""
    try:
        entries: dict[str, Any] = configurations.read_document(path, name)["entries"]
    except (FileNotFoundError, configurations.UnusableFileError):
        return {}
    return {
        entry: value for entry, value in entries.items() if not configurations.is_outdated(value)
    }


def export(source: Path, directory: Path) -> Path:
    """The path of a file for shipping, which is written from the tuned file at ``source``.

    Raises:
        FileNotFoundError: there is no such file.
        UnusableFileError: the file cannot be used, or holds no entry for these kernels.
        OSError: the folder cannot be written to.
    """
    name = source.stem
    with suppress(OSError, ValueError, AttributeError):
        # The file may have been given another name; what counts is the GPU.
        name = configurations.sanitised(
            str(json.loads(source.read_text(encoding="utf-8")).get("gpu"))
        )
    document = configurations.read_document(source, name)
    entries = {k: v for k, v in document["entries"].items() if not configurations.is_outdated(v)}
    if not entries:
        raise configurations.UnusableFileError("it holds no entry for the kernels of this version")
    path = directory / f"{name}.json"
    directory.mkdir(parents=True, exist_ok=True)
    _replace(path, {**document, "entries": dict(sorted(entries.items()))})
    return path


def _document(name: str, entries: dict[str, Any]) -> dict[str, Any]:
    """A tuned file of this version for the device called ``name``."""
    return {
        "schema": configurations.SCHEMA,
        "gpu": name,
        "triton": triton.__version__,
        "tritonloss": tritonloss.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "entries": dict(sorted(entries.items())),
    }


def _replace(path: Path, document: dict[str, Any]) -> None:
    """Write a draft beside the file, and let it take the file's place in one step."""
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=_DRAFT)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        with suppress(FileNotFoundError):  # the draft has taken the file's place already
            os.unlink(draft)
        raise


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Keep other processes from writing in the folder; yields whether that is possible."""
    if sys.platform == "win32":
        yield False  # a folder cannot be locked there: the last one to write wins
        return
    import fcntl

    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # some network file systems have no locks
            yield False
        else:
            yield True
    finally:
        os.close(handle)
