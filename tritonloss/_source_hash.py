"""What a slice's kernels are, as a hash: a configuration tuned for other kernels is outdated."""

from __future__ import annotations

import ast
import hashlib
import re
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent


@cache
def source_hash(slice_name: str) -> str | None:
    """A hash of the device code in a slice's module and in what that imports; None without one.

    Launchers, comments and docstrings do not count.
    """
    if not slice_name.isidentifier() or not (_PACKAGE / f"{slice_name}.py").exists():
        return None
    code: dict[str, str] = {}
    pending = [slice_name]
    while pending:
        name = pending.pop()
        path = _PACKAGE / f"{name}.py"
        if name in code or not path.exists():
            continue
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        code[name] = _device_code(tree, source)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                pending += [node.module] if node.module else [alias.name for alias in node.names]
    text = "\n".join(code[name] for name in sorted(code))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _device_code(tree: ast.Module, source: str) -> str:
    """The lines of the functions that Triton compiles, without comments and docstrings."""
    lines = source.splitlines()
    kept: list[str] = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        if not any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        first = node.body[0]
        documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        docstring = range(first.lineno, (first.end_lineno or 0) + 1) if documented else range(0)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
            line = re.sub(r"\s*#.*", "", lines[number - 1]).rstrip()
            if line and number not in docstring:
                kept.append(line)
    return "\n".join(kept)
