"""A hash of a slice's kernels, by which a configuration tuned for other kernels is outdated."""

from __future__ import annotations

import ast
import hashlib
import re
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_ROOT = "tritonloss."


@cache
def source_hash(slice_name: str) -> str | None:
    """A hash of the device code in a slice's module and in what that imports; None without one.

    The constants of device code count, and its named tuples; launchers, comments, docstrings and
    modules without device code do not.
    """
    code = {}
    for name in source_modules(slice_name):
        source = _read(name)
        code[name] = _device_code(ast.parse(source), source)
    if not code:
        return None
    text = "\n".join(code[name] for name in sorted(code) if code[name])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def source_modules(slice_name: str) -> list[str]:
    """A slice's module and those of the package that it imports, near and far; empty without one.

    Modules are called by their names below the package: "ssim", "windows.ssim".
    """
    found: list[str] = []
    pending = [slice_name]
    while pending:
        name = pending.pop()
        if name in found or _file_of(name) is None:
            continue
        found.append(name)
        pending += _imported_by(name)
    return found


def _file_of(name: str) -> Path | None:
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    path = _PACKAGE.joinpath(*parts)
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _read(name: str) -> str:
    path = _file_of(name)
    return "" if path is None else path.read_text(encoding="utf-8")


def _imported_by(name: str) -> list[str]:
    """The names that a module imports from this package; some are functions and not modules."""
    path = _file_of(name)
    package = name.split(".") if path and path.stem == "__init__" else name.split(".")[:-1]
    found: list[str] = []
    for node in ast.walk(ast.parse(_read(name))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith(_ROOT)]
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                module = [*package[: len(package) + 1 - node.level], *module]
            elif module[0] != _ROOT.rstrip("."):
                continue
            else:
                module = module[1:]
            found.append(".".join(module))
            found += [".".join((*module, alias.name)) for alias in node.names]
    return [imported.removeprefix(_ROOT) for imported in found if imported]


def _device_code(tree: ast.Module, source: str) -> str:
    """The lines of what Triton compiles: functions, constants and named tuples, without texts."""
    lines = source.splitlines()
    kept: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and "NamedTuple" in map(ast.unparse, node.bases):
            kept += [node.name, *(ast.unparse(part) for part in node.body if not _is_text(part))]
        if isinstance(node, ast.Assign) and "constexpr(" in ast.unparse(node):
            kept.append(ast.unparse(node))
        if not isinstance(node, ast.FunctionDef):
            continue
        if not any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        first = node.body[0]
        docstring = (
            range(first.lineno, (first.end_lineno or 0) + 1) if _is_text(first) else range(0)
        )
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
            line = re.sub(r"\s*#.*", "", lines[number - 1]).rstrip()
            if line and number not in docstring:
                kept.append(line)
    return "\n".join(kept)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
