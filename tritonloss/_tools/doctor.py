"""What ``python -m tritonloss doctor`` reports: the installation, the devices, and a self-test.

The self-test runs the examples of every slice forward and, where they have a gradient, backward. It
compares the Triton kernels with the reference in float64. The kernels run on the GPU. Without one
they run in Triton's interpreter, in a process of their own, since the interpreter must be chosen
before the import. Where the interpreter cannot run at all, the reference is tested in float32,
which the CPU uses.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import torch
import triton
import triton.knobs

import tritonloss

from .._core import configurations
from .._core.backend import INTERPRETED, Backend, serves_triton, use_backend
from .._core.example import Example
from .examples import examples
from .interpreter import hasten_interpreter, interpreter_problem

Say = Callable[[str], None]


# The largest error, relative to the largest element in float64. A wrong kernel is off by far more.
TOLERANCE = 1e-4

# Exit status of the self-test's own process where Triton's interpreter cannot run.
CANNOT_INTERPRET = 3


def doctor(say: Say, brief: bool = False) -> int:
    """The exit status of ``python -m tritonloss doctor``, which reports and tests the installation.

    ``brief`` leaves out the test.
    """
    say(f"tritonloss {tritonloss.__version__}")
    say(f"  python {platform.python_version()} on {platform.platform()}")
    say(f"  torch {torch.__version__}, triton {triton.__version__}, numpy {numpy.__version__}")
    say(f"  C compiler, which Triton needs on a GPU: {_compiler() or 'none (CC names one)'}")
    say("devices")
    devices = _devices()
    for device, description in devices:
        backend = "Triton kernels" if _served_by_triton(device) else "kernels_reference"
        say(f"  {device}: {description}, served by {backend}")
    say("caches")
    say(f"  tuned configurations: {configurations.cache_directory()}")
    say(f"  compiled kernels: {triton.knobs.cache.dir}")
    say("launch configurations")
    for device, _ in devices:
        say(f"  {device}: {_configurations_in_use(configurations.device_name(device))}")
    if brief:
        return 0
    say("self-test")
    gpus = [device for device, _ in devices if device.type != "cpu"]
    if gpus:
        status = max([self_test(device, say) for device in gpus])
    elif INTERPRETED:
        status = interpreted_self_test(say)
    else:
        status = _self_test_in_a_process(say)
    say("verdict: healthy" if status == 0 else "verdict: NOT healthy, see the self-test above")
    return status


def interpreted_self_test(say: Say) -> int:
    """The status of the self-test in this process, whose kernels run in Triton's interpreter."""
    problem = interpreter_problem()
    if problem is not None:
        say(f"  {problem}")
        return CANNOT_INTERPRET
    hasten_interpreter()
    return self_test(torch.device("cpu"), say)


def self_test(
    device: torch.device,
    say: Say,
    backend: Backend = "triton",
    chosen: Sequence[Example] | None = None,
) -> int:
    """0 if all examples (or those chosen) agree with the reference in float64, else 1."""
    place = str(device)
    if backend == "reference":
        place += ", reference"
    elif INTERPRETED:
        place += ", interpreted"
    logits, target = (tensor.to(device) for tensor in self_test_inputs(device.type))
    status = 0
    for example in examples() if chosen is None else chosen:
        try:
            error = _largest_error(example, logits, target, backend)
        except Exception as problem:  # the doctor reports whatever is wrong, and goes on
            verdict = f"FAILED: {type(problem).__name__}: {str(problem).strip()[:300]}"
            status = 1
        else:
            agrees = error <= TOLERANCE
            verdict = f"{'ok' if agrees else 'FAILED'}, relative error {error:.1e}"
            status |= not agrees
        say(f"  {example.name} on {place}: {verdict}")
    return status


def self_test_inputs(device_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, labels), some ignored; no pixel is so near SSL's threshold that rounding decides."""
    shape = (1, 2, 9, 11) if device_type == "cpu" else (2, 3, 19, 37)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).mul(3)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    target[:, :2] = 255
    return logits, target


def _largest_error(
    example: Example, logits: torch.Tensor, target: torch.Tensor, backend: Backend
) -> float:
    """The largest error of values and gradient, each relative to its largest element."""
    actual = _values_and_gradient(example, logits, target, backend)
    expected = _values_and_gradient(example, logits.double(), target, "reference")
    errors = []
    for found, truth in zip(actual, expected, strict=True):
        difference = (found.double() - truth).abs().max() / truth.abs().max()
        errors.append(float(difference.nan_to_num(nan=float("inf"))))
    return max(errors)


def _values_and_gradient(
    example: Example, logits: torch.Tensor, target: torch.Tensor, backend: Backend
) -> list[torch.Tensor]:
    leaf = logits.detach().requires_grad_()
    with use_backend(backend):
        results = example(leaf, target)
        values = [v for v in results if v.requires_grad]
        if not values:  # counts, which have no gradient
            return list(results)
        upstream = [
            torch.linspace(0.5, 1.5, value.numel()).reshape(value.shape) for value in values
        ]
        (gradient,) = torch.autograd.grad(
            values, leaf, [u.to(value) for u, value in zip(upstream, values, strict=True)]
        )
    return [*(value.detach() for value in values), gradient]


def _self_test_in_a_process(say: Say) -> int:
    """The status of the self-test in a process with Triton's interpreter, or of the reference."""
    package_parent = str(Path(tritonloss.__file__).parents[1])
    search_path = os.pathsep.join([package_parent, *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.run(
        [sys.executable, "-m", "tritonloss", "doctor", "--self-test"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        check=False,
    )
    failed = child.returncode not in (0, CANNOT_INTERPRET)
    for line in child.stdout.splitlines() + (child.stderr.splitlines()[-5:] if failed else []):
        say(line)
    if child.returncode == CANNOT_INTERPRET:
        say("  so no kernel is tested on this machine; it serves CPU tensors by the reference:")
        return self_test(torch.device("cpu"), say, "reference")
    return int(failed)


def _compiler() -> str | None:
    """The C compiler that Triton would find, or None."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def _devices() -> list[tuple[torch.device, str]]:
    """(device, description) of the CPU, and of the GPUs that torch can use."""
    devices = [(torch.device("cpu"), platform.processor() or platform.machine())]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            memory = f"{gpu.total_memory / 2**30:.0f} GiB"
            description = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}"
            devices.append((torch.device("cuda", index), description))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        for index in range(torch.xpu.device_count()):
            devices.append((torch.device("xpu", index), torch.xpu.get_device_name(index)))
    return devices


def _served_by_triton(device: torch.device) -> bool:
    return serves_triton(torch.empty(0, device=device))


def _configurations_in_use(name: str) -> str:
    """Which tuned file is used for the device called ``name``, and why others do not."""
    if os.environ.get("TRITONLOSS_TUNING") == "off":
        return "heuristic (TRITONLOSS_TUNING=off)"
    ignored = ""
    for path in configurations.tuned_files(name):
        try:
            document = configurations.read_document(path, name)
        except FileNotFoundError:
            continue
        except configurations.UnusableFileError as reason:
            ignored += f"; {path} is ignored: {reason}"
            continue
        made = f"triton {document.get('triton')}, {document.get('date')}"
        return f"{path} ({len(document['entries'])} entries, {made}), else heuristic{ignored}"
    return f"heuristic, no tuned file{ignored}"
