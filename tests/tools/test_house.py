"""The house in order: sizes, names and directions of imports. CONTRIBUTING.md says why.

Every fault is a line that names its file, so that a failure says what to mend.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOTS = ("tritonloss", "perf", "kernels_reference")
FILE_LINES, KERNEL_LINES, FUNCTION_ARGUMENTS = 500, 100, 8
# What the rooms at the bottom must not import: perf and tests build on them.
BELOW = {"tritonloss": {"perf", "tests"}, "kernels_reference": {"perf", "tests", "tritonloss"}}

Sources = Mapping[Path, str]  # path below the root -> text


def sources(*roots: str) -> Sources:
    paths = [path for root in roots for path in sorted((ROOT / root).rglob("*.py"))]
    return {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in paths}


def device_functions(text: str) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                yield node


def long_files(found: Sources) -> Iterator[str]:
    for path, text in found.items():
        lines = len(text.splitlines())
        if lines > FILE_LINES:
            yield f"{path}: {lines} lines (at most {FILE_LINES})"


def long_kernels(found: Sources) -> Iterator[str]:
    for path, text in found.items():
        for node in device_functions(text):
            lines = (node.end_lineno or 0) - node.body[0].lineno
            if node.name.endswith("_kernel") and lines > KERNEL_LINES:
                yield f"{path}: {node.name} has {lines} lines (at most {KERNEL_LINES})"


def many_arguments(found: Sources) -> Iterator[str]:
    """Device functions with too many; a kernel may take more, as it is launched by keyword."""
    for path, text in found.items():
        for node in device_functions(text):
            count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            if not node.name.endswith("_kernel") and count > FUNCTION_ARGUMENTS:
                yield f"{path}: {node.name} takes {count} arguments (at most {FUNCTION_ARGUMENTS})"


def unnamed_places(found: Sources) -> Iterator[str]:
    """Where device code takes a part of a run-time tuple by a number: its fields have names."""
    for path, text in found.items():
        for function in device_functions(text):
            for node in ast.walk(function):
                if isinstance(node, ast.Subscript) and _is_deep(node):
                    yield f"{path}: {function.name}: unnamed {ast.unparse(node)}"


def _is_deep(node: ast.Subscript) -> bool:
    """Whether a number is the index into what is a tuple for certain.

    That is one of the tuples that walks hand to losses, or a part of a part. A plain tuple of
    columns or taps may be indexed by numbers.
    """
    inner = node.value
    counted = isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, int)
    if isinstance(inner, ast.Subscript):
        return counted and isinstance(inner.slice, ast.Constant)
    handed = ("given", "pixel", "pixels", "state", "saved")
    return counted and isinstance(inner, ast.Name) and inner.id in handed


def operators_by_string(found: Sources) -> Iterator[str]:
    for path, text in found.items():
        for name in re.findall(r"torch\.ops\.tritonloss\.\w+", text):
            yield f"{path}: {name} is called by string"


def upward_imports(found: Sources) -> Iterator[str]:
    """Imports that point upward, also by importlib, with a module's name in a string."""
    for path, text in found.items():
        forbidden = BELOW.get(path.parts[0], set())
        tree = ast.parse(text)
        names = [name for names in imported(path, tree) for name in names]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
                names += [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
        for name in dict.fromkeys(names):
            if name.split(".")[0] in forbidden:
                yield f"{path}: imports {name}"


def imported(path: Path, tree: ast.Module) -> Iterator[list[str]]:
    """For every import the names that it may mean: modules, or names in them."""
    parts = list(path.with_suffix("").parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield [base, *(f"{base}.{alias.name}" for alias in node.names)]


def circles(found: Sources) -> Iterator[str]:
    """Modules that import each other, however far around; `__init__` only hands names on."""
    modules = {
        ".".join(path.with_suffix("").parts): path for path in found if path.stem != "__init__"
    }
    arrows = {}
    for name, path in modules.items():
        names = {n for names in imported(path, ast.parse(found[path])) for n in names}
        arrows[name] = sorted(n for n in names if n in modules and n != name)
    finished: set[str] = set()

    def visit(name: str, way: list[str]) -> Iterator[str]:
        for other in arrows[name]:
            if other in way:
                yield "import circle: " + " -> ".join([*way[way.index(other) :], other])
            elif other not in finished:
                yield from visit(other, [*way, other])
        finished.add(name)

    for name in arrows:
        if name not in finished:
            yield from visit(name, [name])


RULES = {
    "files": (long_files, (*ROOTS, "tests")),
    "kernels": (long_kernels, ("tritonloss",)),
    "arguments": (many_arguments, ("tritonloss",)),
    "names": (unnamed_places, ("tritonloss",)),
    "operators": (operators_by_string, ("tritonloss",)),
    "upward": (upward_imports, ROOTS),
    "circles": (circles, ROOTS),
}


@pytest.mark.parametrize("rule", list(RULES))
def test_the_house_is_in_order(rule: str) -> None:
    check, roots = RULES[rule]
    faults = list(check(sources(*roots)))
    assert not faults, "\n".join(["", *faults])


def test_every_room_is_on_the_map() -> None:
    """CONTRIBUTING.md says what is where: rooms, and the files of those that all losses share."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawn = text.split("## The map of the house")[1].split("```")[1]
    for top in ("tritonloss", "perf"):
        rooms = {path.parent.name for path in (ROOT / top).glob("*/__init__.py")}
        missing = [room for room in sorted(rooms) if f"{room}/" not in drawn]
        assert rooms and not missing, f"{top}: {missing}"
    shared = [path for room in ("_core", "_engine", "_tools")
              for path in (ROOT / "tritonloss" / room).glob("[!_]*.py")]  # fmt: skip
    missing = [path.name for path in shared if f"`{path.name}`" not in text]
    assert shared and not missing, missing


# Each of the rules sees a fault, and lets pass what only looks like one.
JIT = "@triton.jit\ndef "
BAD = {
    "files": {"tritonloss/a.py": "x = 1\n" * 501},
    "kernels": {"tritonloss/a.py": f"{JIT}_a_kernel(x):\n" + "    y = x\n" * 102},
    "arguments": {"tritonloss/a.py": f"{JIT}add(a, b, c, d, e, f, g, h, i):\n    return a\n"},
    "names": {"tritonloss/a.py": f"{JIT}add(pixel):\n    return pixel[0]\n"},
    "operators": {"tritonloss/a.py": "torch.ops.tritonloss.loss(x)\n"},
    "upward": {"tritonloss/a.py": "def f():\n    import_module('perf.compiling')\n"},
    "circles": {
        "perf/a.py": "from perf import b\n",
        "perf/b.py": "from .room.c import name\n",
        "perf/room/c.py": "from ..a import name\n",
    },
}
GOOD = {
    "files": {"tritonloss/a.py": "x = 1\n" * 500},
    "kernels": {"tritonloss/a.py": f"{JIT}_a_kernel(x):\n" + "    y = x\n" * 100},
    "arguments": {
        "tritonloss/a.py": f"{JIT}add(a, b, c, d, e, f, g, h):\n    return a\n",
        "tritonloss/b.py": f"{JIT}_a_kernel(a, b, c, d, e, f, g, h, i):\n    return a\n",
    },
    "names": {"tritonloss/a.py": f"{JIT}add(pixel, taps):\n    return pixel.own + taps[0]\n"},
    "operators": {"tritonloss/a.py": "LOSS(x)\n"},
    "upward": {"perf/a.py": "from tritonloss import functional\n"},
    "circles": {
        "perf/a.py": "from perf import b\n",
        "perf/b.py": "import perf.room.c\n",
        "perf/room/c.py": "import torch\n",
    },
}


@pytest.mark.parametrize("rule", list(RULES))
def test_every_rule_sees_its_fault(rule: str) -> None:
    check, _ = RULES[rule]
    faulty, orderly = (
        list(check({Path(name): text for name, text in files.items()}))
        for files in (BAD[rule], GOOD[rule])
    )
    assert faulty and not orderly, (faulty, orderly)
