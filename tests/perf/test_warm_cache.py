"""A cache of kernels made without a GPU: what a process that unpacks it still has to compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import triton
from triton.runtime import cache

from perf.measuring import warm_cache
from tests.perf.made import ROOT

ONE_CASE = ("--ops", "focal_loss", "--first", "1", "--workers", "1")
SECOND = """
import sys
from pathlib import Path
from perf.measuring import warm_cache
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import build

compiled = []

def counting(original):
    return lambda *args, **named: (compiled.append(args), original(*args, **named))[1]

CUDABackend.make_cubin = counting(CUDABackend.make_cubin)
build._build = counting(build._build)
print(warm_cache.described(warm_cache.unpack(Path(sys.argv[1]), Path(sys.argv[2]))))
warm_cache._start(None, Path(sys.argv[2]))
for job in warm_cache.jobs(["focal_loss"], 1):
    job.run()
print("compiled", len(compiled), "launched", warm_cache.stand_in.launches())
"""


def ran(folder: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.thorough
@pytest.mark.compile_only
def test_a_second_process_with_the_unpacked_cache_compiles_nothing(tmp_path: Path) -> None:
    archive, script = tmp_path / "cache.tar.xz", tmp_path / "second.py"
    script.write_text(SECOND)
    made = ran(
        tmp_path / "unused", "-m", "perf", "gpu-cache", "make", *ONE_CASE,
        "--cache", str(tmp_path / "made"), "--archive", str(archive),
    )  # fmt: skip
    assert "kernels" in made and not (tmp_path / "unused").exists()
    for path in (tmp_path / "made").rglob("*.cubin"):
        path.unlink()  # the second process must find kernels in the archive only
    second = tmp_path / "second"
    said = ran(second, str(script), str(archive), str(second))
    assert "the wheel's key matches" in said
    compiled, launched = said.split()[-3], said.split()[-1]
    assert compiled == "0" and int(launched) >= 2
    assert not list(second.rglob("*.ttir")) and list(second.rglob("*.cubin"))
    said = ran(second, "-m", "perf", "gpu-cache", "fill", *ONE_CASE)
    assert said.startswith("0 kernels were compiled")


def test_another_wheels_cache_is_left_alone(tmp_path: Path) -> None:
    made, archive = tmp_path / "made", tmp_path / "cache.tar.xz"
    (made / "kernel").mkdir(parents=True)
    for name in ("kernel.cubin", "kernel.json", "kernel.ptx", "kernel.analysis.json", "module.so"):
        (made / "kernel" / name).write_text("{}")
    own = warm_cache.pack(made, archive)
    assert own.recognised and (own.kernels, own.launchers) == (1, 1)
    assert warm_cache.unpack(archive, tmp_path / "here") == own
    names = {path.name for path in (tmp_path / "here" / "kernel").iterdir()}
    assert names == {"kernel.cubin", "kernel.json", "module.so"}
    assert "1 C modules" in warm_cache.described(own)
    assert "compiled here" in warm_cache.described(replace(own, suffix=".cpython-399.so"))

    other = warm_cache.pack(made, archive, key="another wheel's")
    assert not other.recognised and other.launchers == 0
    assert warm_cache.unpack(archive, tmp_path / "there") == other
    assert not (tmp_path / "there").exists()
    assert "left alone" in warm_cache.described(other)


def test_a_groups_files_are_those_that_are_there(tmp_path: Path) -> None:
    made, archive = tmp_path / "made", tmp_path / "cache.tar.xz"
    made.mkdir()
    (made / "kernel.cubin").write_text("")
    group = made / "__grp__kernel.json"
    group.write_text('{"child_paths": {"kernel.cubin": "/made/there", "kernel.ptx": "/made/too"}}')
    warm_cache.pack(made, archive)
    warm_cache.unpack(archive, tmp_path / "here")
    here = tmp_path / "here" / "kernel.cubin"
    found = json.loads((tmp_path / "here" / group.name).read_text())
    assert found == {"child_paths": {"kernel.cubin": str(here)}}


def test_the_key_of_a_wheel_for_another_python(tmp_path: Path) -> None:
    package, wheel = Path(triton.__file__).parent, tmp_path / "triton.whl"
    source = (package / "compiler" / "compiler.py").read_bytes()
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("triton/compiler/compiler.py", source)
        file.writestr("triton/_C/libtriton.so", b"compiled for another Python")
    key = warm_cache.key_of_wheel(wheel)
    own = cache.triton_key()
    assert key != own and len(key) == len(own)
    assert sum(a != b for a, b in zip(key.split("-"), own.split("-"), strict=True)) == 1
    with zipfile.ZipFile(wheel, "a") as file:
        file.writestr("triton/compiler/other.py", b"")
    with pytest.raises(ValueError, match="is not the Triton that is installed"):
        warm_cache.key_of_wheel(wheel)
