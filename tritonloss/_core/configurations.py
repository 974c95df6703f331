"""Launch configurations: which block sizes and warps a kernel is launched with.

A launcher asks :func:`launch_configuration`. The answer is the first of these that there is:

1. what a caller has forced;
2. the entry in the user's own tuned file;
3. the entry in the file shipped for this GPU model;
4. an entry of either file for another number of classes, if the tuner has checked it for this one;
5. the launcher's heuristic.

No file can make a training step fail: what cannot be used is ignored with one warning that names
the file and the reason. ``python -m tritonloss tune`` (``_tools/tuner.py``) writes the user's file.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .source_hash import source_hash

Configuration = dict[str, int | str]
Launch = Callable[[], Any]
Shape = tuple[int, int, int, int]  # [N, C, H, W]

SCHEMA = 2
SHIPPED_DIRECTORY = Path(__file__).parents[1] / "tuned"

# Process-wide, not thread-local: on a GPU the backward pass is launched from autograd's own
# threads, which a thread-local or context-local override would not reach.
_forced: dict[str, Configuration] = {}
_names: dict[torch.device, str] = {}
_tables: dict[str, dict[str, dict[str, Any]]] = {}  # device name -> entries
_resolved: dict[tuple[str, torch.device, torch.dtype, int, int, str], Configuration | None] = {}
_UNKNOWN: Configuration = {}
_generation = 0  # counts the changes of the tables above


@dataclass(frozen=True)
class TuningCase:
    """One entry of a tuned file: how to run it, and the configurations worth trying.

    ``run(device)`` builds the inputs and returns a launch without arguments, which the tuner calls
    inside ``forced(operator, candidate)``; what the launch returns must not depend on the candidate
    beyond rounding. The first candidate is the heuristic's own. If ``run`` can be called with
    torch's meta device, candidates are compiled and filtered before any of them is launched.

    ``sized(shape, layout, device)`` is ``run`` for other logits in one of ``layouts``, which are
    the names by which the launcher asks. Without ``sized`` the case is tuned as it is. Where the
    heuristic depends on classes or layout, ``sized_candidates(classes, layout)`` are the candidates
    for such logits. The tuner fills in ``slice``, the ``number`` of the case in it, and ``shape``
    if it has used ``sized``.
    """

    operator: str
    classes: int
    window: int
    dtype: torch.dtype
    layout: str
    run: Callable[[torch.device], Launch]
    candidates: list[Configuration]
    sized: Callable[[Shape, str, torch.device], Launch] | None = None
    sized_candidates: Callable[[int, str], list[Configuration]] | None = None
    layouts: tuple[str, ...] = ("contiguous", "channels_last", "strided")
    slice: str = ""
    number: int = -1
    shape: Shape | None = None

    @property
    def key(self) -> str:
        return key(self.operator, self.classes, self.window, self.dtype, self.layout)


class UnusableFileError(Exception):
    """A tuned file that must be ignored; the message is the reason."""


def launch_configuration(
    operator: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    classes: int,
    window: int,
    layout: str,
    heuristic: Configuration,
) -> Configuration:
    """The configuration to launch ``operator`` with; the caller may change the returned dictionary.

    Image sizes are not asked for, so that a change of crop size never changes the answer.
    """
    if operator in _forced:
        return {**heuristic, **_forced[operator]}
    if os.environ.get("TRITONLOSS_TUNING") == "off":
        return heuristic
    signature = (operator, device, dtype, classes, window, layout)
    tuned = _resolved.get(signature, _UNKNOWN)
    if tuned is _UNKNOWN:
        entry = key(operator, classes, window, dtype, layout)
        tuned = _tuned_configuration(entry, device_name(device), heuristic)
        _resolved[signature] = tuned
    return heuristic if tuned is None else dict(tuned)


def state() -> int:
    """A number that stays the same while the answers do.

    TRITONLOSS_TUNING does not change it: a prepared launch has looked at that once.
    """
    return _generation


@contextmanager
def forced(operator: str, configuration: Configuration) -> Iterator[None]:
    """Launch ``operator`` with ``configuration``, laid over the heuristic, in the whole process."""
    global _generation
    before = _forced.get(operator)
    _forced[operator] = configuration
    _generation += 1
    try:
        yield
    finally:
        _generation += 1
        if before is None:
            del _forced[operator]
        else:
            _forced[operator] = before


def key(operator: str, classes: int, window: int, dtype: torch.dtype, layout: str) -> str:
    """The name of an entry in a tuned file; classes are rounded up to a power of two."""
    named = str(dtype).removeprefix("torch.")
    return f"{operator}|c{bucket_of(classes)}|w{window}|{named}|{layout}"


def bucket_of(classes: int) -> int:
    """Numbers of classes with the same bucket share a configuration: the next power of two."""
    return 1 << (max(classes, 1) - 1).bit_length()


def device_name(device: torch.device) -> str:
    """The device's marketing name, or else its type, safe as a file name."""
    if device not in _names:
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        elif device.type == "xpu":
            name = torch.xpu.get_device_name(device)
        else:
            name = device.type
        _names[device] = sanitised(name)
    return _names[device]


def sanitised(name: str) -> str:
    """``name`` as a file name: at most 100 letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("._-")[:100] or "unnamed"


def cache_directory() -> Path:
    """The user's tuned files: in ``TRITONLOSS_CACHE_DIR``, or the platform's cache directory."""
    override = os.environ.get("TRITONLOSS_CACHE_DIR")
    if override:
        return Path(override)
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        parent = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        parent = home / "Library" / "Caches"
    else:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return parent / "tritonloss"


def tuned_files(name: str) -> list[Path]:
    """The files for the device called ``name``, in order of precedence; they need not exist."""
    return [directory / f"{name}.json" for directory in (cache_directory(), SHIPPED_DIRECTORY)]


def read_document(path: Path, name: str) -> dict[str, Any]:
    """A tuned file for the device called ``name``, checked.

    Raises:
        FileNotFoundError: there is no such file.
        UnusableFileError: the file is unreadable, corrupt, foreign or outdated.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UnusableFileError(f"it cannot be read ({error})") from error
    if not isinstance(document, dict) or not isinstance(document.get("entries"), dict):
        raise UnusableFileError("it is not a tuned file of tritonloss")
    if document.get("schema") != SCHEMA:
        raise UnusableFileError(f"its schema is {document.get('schema')!r}, not {SCHEMA}")
    if document.get("gpu") != name:
        raise UnusableFileError(f"it was tuned on {document.get('gpu')!r}, not on {name!r}")
    if _series(document.get("tritonloss")) != _series(_version()):
        raise UnusableFileError(
            f"it was tuned with tritonloss {document.get('tritonloss')!r}, this is {_version()!r}"
        )
    for entry, value in document["entries"].items():
        if not isinstance(value, dict) or not _is_configuration(value.get("configuration")):
            raise UnusableFileError(f"its entry {entry!r} holds no valid configuration")
        if not _is_reach(value.get("checked", [])):
            raise UnusableFileError(f"its entry {entry!r} does not say what it was checked for")
    return document


def target_changed() -> None:
    """Prepare all launches anew: another GPU has taken the place of the one they are for."""
    global _generation
    _generation += 1


def forget() -> None:
    """Read the tuned files anew at the next launch."""
    global _generation
    _generation += 1
    _tables.clear()
    _resolved.clear()


def is_outdated(entry: dict[str, Any]) -> bool:
    """Whether an entry of a tuned file was measured with other kernels than these."""
    return entry.get("source") is None or entry["source"] != source_hash(str(entry.get("slice")))


def _tuned_configuration(entry: str, name: str, heuristic: Configuration) -> Configuration | None:
    """The configuration tuned for an entry or a neighbour of it; None if there is none to use."""
    if name not in _tables:
        _tables[name] = _read_table(name)
    table = _tables[name]
    tuned: Configuration
    if entry in table:
        tuned = table[entry]["configuration"]
        if tuned.keys() == heuristic.keys():
            return tuned
        _warn(
            f"the tuned entry {entry!r} for {name!r}",
            f"it sets {sorted(tuned)}, this version sets {sorted(heuristic)}",
        )
    for other in _neighbours(entry, table):
        tuned = table[other]["configuration"]
        if tuned.keys() == heuristic.keys():
            return tuned
    return None


def _neighbours(entry: str, table: dict[str, dict[str, Any]]) -> list[str]:
    """Entries for other numbers of classes that were checked for this one too, nearest first."""
    operator, bucket, rest = _parts(entry)
    found = []
    for other, value in table.items():
        parts = _parts(other)
        reach = value.get("checked") or [0]
        same = parts[::2] == (operator, rest) and parts[1] != bucket
        if same and min(reach) <= bucket <= max(reach):
            distance = abs(parts[1].bit_length() - bucket.bit_length())
            found.append((distance, parts[1], other))
    return [other for _, _, other in sorted(found)]


def _parts(entry: str) -> tuple[str, int, str]:
    """(operator, bucket of classes, the rest) of an entry's key; bucket 0 if it is no key."""
    parts = re.fullmatch(r"([^|]*)\|c(\d{1,9})\|(.*)", entry)
    return (parts[1], int(parts[2]), parts[3]) if parts else (entry, 0, "")


def _read_table(name: str) -> dict[str, dict[str, Any]]:
    """The entries, by name, of a device's files; the user's go before the shipped ones."""
    table: dict[str, dict[str, Any]] = {}
    for path in reversed(tuned_files(name)):
        try:
            document = read_document(path, name)
        except FileNotFoundError:
            continue
        except UnusableFileError as error:
            _warn(f"the tuned file {path}", str(error))
            continue
        entries = document["entries"]
        current = {entry: value for entry, value in entries.items() if not is_outdated(value)}
        if len(current) < len(entries):
            outdated = [entry for entry in entries if entry not in current]
            _warn(
                f"{len(outdated)} of {len(entries)} entries of the tuned file {path}",
                f"they were measured with kernels that this version does not have ({outdated[0]})",
            )
        table |= current
    return table


def _is_configuration(value: object) -> bool:
    """Whether a launcher could take ``value``: names to positive integers or words, whole warps."""
    if not isinstance(value, dict) or not value:
        return False
    for setting in value.values():
        if isinstance(setting, bool) or not isinstance(setting, (int, str)):
            return False
        if isinstance(setting, int) and setting < 1:
            return False
    return value.get("num_warps") in (1, 2, 4, 8, 16, 32)


def _is_reach(value: object) -> bool:
    """Whether ``value`` is a list of buckets of classes."""
    return isinstance(value, list) and all(type(bucket) is int for bucket in value)


def _series(version: object) -> str:
    """Major and minor version: within one series the launchers take the same configurations."""
    return ".".join(str(version).split(".")[:2])


def _version() -> str:
    # Read late: tritonloss imports this module while it is itself being imported.
    return str(sys.modules["tritonloss"].__version__)


def _warn(what: str, reason: str) -> None:
    """Warn that something of a tuned file is ignored, and why."""
    warnings.warn(
        f"tritonloss ignores {what}: {reason}. `python -m tritonloss tune` writes a new one.",
        stacklevel=2,
    )
