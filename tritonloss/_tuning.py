"""Launch configurations: which block sizes and warps a kernel is launched with.

A launcher asks :func:`launch_configuration`; the answer is, in this order, what a caller has
forced, the user's own tuned file, the file shipped for this GPU model, the launcher's heuristic. No
file can make a training step fail: what cannot be used is ignored with one warning that names the
file and the reason. ``python -m tritonloss tune`` (``_tune.py``) writes the user's file.
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

Configuration = dict[str, int | str]

SCHEMA = 1
SHIPPED_DIRECTORY = Path(__file__).parent / "tuned"

# Process-wide, not thread-local: on a GPU the backward pass is launched from autograd's own
# threads, which a thread-local or context-local override would not reach.
_forced: dict[str, Configuration] = {}
_names: dict[torch.device, str] = {}
_tables: dict[str, dict[str, Configuration]] = {}
_resolved: dict[tuple[str, torch.device, torch.dtype, int, int, str], Configuration | None] = {}


@dataclass(frozen=True)
class TuningCase:
    """One entry of a tuned file: how to run it, and the configurations worth trying.

    ``run(device)`` builds the inputs and returns a launch without arguments, which the tuner calls
    inside ``forced(operator, candidate)``; what the launch returns must not depend on the candidate
    beyond rounding. The first candidate is the heuristic's own.
    """

    operator: str
    classes: int
    window: int
    dtype: torch.dtype
    layout: str
    run: Callable[[torch.device], Callable[[], Any]]
    candidates: list[Configuration]

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

    Image sizes are no part of the question, so that a change of crop size never changes the answer.
    """
    if operator in _forced:
        return {**heuristic, **_forced[operator]}
    if os.environ.get("TRITONLOSS_TUNING") == "off":
        return heuristic
    signature = (operator, device, dtype, classes, window, layout)
    if signature not in _resolved:
        entry = key(operator, classes, window, dtype, layout)
        _resolved[signature] = _tuned_entry(entry, device_name(device), heuristic)
    tuned = _resolved[signature]
    return heuristic if tuned is None else dict(tuned)


@contextmanager
def forced(operator: str, configuration: Configuration) -> Iterator[None]:
    """Launch ``operator`` with ``configuration``, laid over the heuristic, in the whole process."""
    before = _forced.get(operator)
    _forced[operator] = configuration
    try:
        yield
    finally:
        if before is None:
            del _forced[operator]
        else:
            _forced[operator] = before


def key(operator: str, classes: int, window: int, dtype: torch.dtype, layout: str) -> str:
    """The name of an entry in a tuned file; classes are rounded up to a power of two."""
    bucket = 1 << (max(classes, 1) - 1).bit_length()
    return f"{operator}|c{bucket}|w{window}|{str(dtype).removeprefix('torch.')}|{layout}"


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
    return document


def forget() -> None:
    """Read the tuned files anew at the next launch."""
    _tables.clear()
    _resolved.clear()


def _tuned_entry(entry: str, name: str, heuristic: Configuration) -> Configuration | None:
    if name not in _tables:
        _tables[name] = _read_table(name)
    tuned = _tables[name].get(entry)
    if tuned is not None and tuned.keys() != heuristic.keys():
        _warn(
            f"the tuned entry {entry!r} for {name!r}",
            f"it sets {sorted(tuned)}, this version sets {sorted(heuristic)}",
        )
        return None
    return tuned


def _read_table(name: str) -> dict[str, Configuration]:
    table: dict[str, Configuration] = {}
    for path in reversed(tuned_files(name)):
        try:
            document = read_document(path, name)
        except FileNotFoundError:
            continue
        except UnusableFileError as error:
            _warn(f"the tuned file {path}", str(error))
            continue
        for entry, value in document["entries"].items():
            table[entry] = value["configuration"]
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


def _series(version: object) -> str:
    """Major and minor version: within one series the launchers take the same configurations."""
    return ".".join(str(version).split(".")[:2])


def _version() -> str:
    # Read late: tritonloss imports this module while it is itself being imported.
    return str(sys.modules["tritonloss"].__version__)


def _warn(what: str, reason: str) -> None:
    warnings.warn(
        f"tritonloss ignores {what}: {reason}. `python -m tritonloss tune` writes a new one.",
        stacklevel=2,
    )
