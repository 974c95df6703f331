"""Every operator inside PyTorch: compile, opcheck, autocast, processes, CUDA graphs."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tritonloss
from tests.oracle import as_layout, segmentation_case
from tests.ranks import of_ranks
from tests.slices import OF_MAPS, as_a_number, is_pixelwise, is_upsampled
from tritonloss._core import backend, configurations
from tritonloss._core.example import Example, logits_and_target
from tritonloss._tools.interpreter import hasten_interpreter
from tritonloss._tools.tuning_cases import tuning_cases
from tritonloss.functional import (
    rmi_loss,
    ssim_loss,
    structural_similarity_loss,
)


class Loss:
    """An example as a loss: one number that depends on all of its differentiable results."""

    def __init__(self, example: Example) -> None:
        self.example = example
        self.__name__ = example.name

    def __deepcopy__(self, memo: dict[int, Any]) -> Loss:
        return self

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        # Softmax losses need two classes.
        scores = logits if logits.size(1) > 1 else torch.cat((logits, -logits), 1)
        return as_a_number(self.example(scores, target))


LOSSES = {name: Loss(example) for name, example in OF_MAPS.items()}
PIXELWISE = [
    loss
    for loss in LOSSES.values()
    if is_pixelwise(loss.example) and not is_upsampled(loss.example)
]


@contextmanager
def served_by_kernels(loss: Loss) -> Iterator[None]:
    with tritonloss.use_backend("triton"):
        yield


def value_and_gradient(loss: Loss, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    with served_by_kernels(loss):
        value = loss(leaf, target)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> Loss:
    return LOSSES[request.param]


def test_compile_without_a_graph_break(loss: Loss, device: torch.device) -> None:
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for height in (4, 6):
        logits, target = segmentation_case((1, 2, height, 4), device=device)
        expected = value_and_gradient(loss, logits, target)
        leaf = logits.requires_grad_()
        with served_by_kernels(loss):
            value = compiled(leaf, target)
        (gradient,) = torch.autograd.grad(value, leaf)
        torch.testing.assert_close(value.detach(), expected[0])
        torch.testing.assert_close(gradient, expected[1], rtol=1e-5, atol=1e-7)


class Recorded(TorchDispatchMode):
    """The calls of the package's own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "tritonloss":
            copies = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
            self.calls.append((func, copies, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def test_opcheck(loss: Loss, device: torch.device) -> None:
    """The custom operators are sound, and the tuner knows what configurations they ask for."""
    logits, target = segmentation_case((1, 2, 3, 4), device=device)
    configurations.forget()
    with served_by_kernels(loss), Recorded() as recorded:
        leaf = logits.requires_grad_()
        loss(leaf, target).backward()
    names = [func.name() for func, _, _ in recorded.calls]
    assert any(name.endswith("forward") for name in names), names
    asked = {signature[0] for signature in configurations._resolved}
    assert asked <= {case.operator for case in tuning_cases()}
    with served_by_kernels(loss):
        for func, arguments, options in recorded.calls:
            if func.name().endswith("forward"):
                arguments[0].requires_grad_()
            tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
            # The stored schedule's backward writes over an output of the forward, as it must to use
            # one buffer; a compiled graph never asks for it, so it need not be traceable.
            if "stored" not in loss.__name__:
                tests.append("test_aot_dispatch_dynamic")
            torch.library.opcheck(func, arguments, options, test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(loss: Loss, dtype: torch.dtype, device: torch.device) -> None:
    for logit_dtype in (torch.float32, dtype):
        logits, target = segmentation_case((1, 1, 4, 5), dtype=logit_dtype, device=device)
        expected = value_and_gradient(loss, logits, target)
        with torch.autocast(device.type, dtype):
            value, gradient = value_and_gradient(loss, logits, target)
        assert value.dtype == torch.float32 and gradient.dtype == logit_dtype
        assert torch.equal(value, expected[0]) and torch.equal(gradient, expected[1])


class Network(nn.Module):
    """One layer and a criterion: what a training step differentiates."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1)
        self.loss = loss

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.layer(image), target)


def test_functional_call(loss: Loss, device: torch.device) -> None:
    _, target = segmentation_case((1, 1, 3, 4), device=device)
    image = torch.rand(1, 3, 3, 4, device=device)
    network = Network(loss).to(device)
    other = {name: torch.rand_like(p).requires_grad_() for name, p in network.named_parameters()}
    with served_by_kernels(loss):
        value = torch.func.functional_call(network, other, (image, target))
        value.backward()
        twin = copy.deepcopy(network)
        twin.load_state_dict({name: p.detach() for name, p in other.items()})
        expected = twin(image, target)
        expected.backward()
    assert torch.equal(value, expected)
    for name, parameter in twin.named_parameters():
        assert torch.equal(parameter.grad, other[name].grad)


def gradients_on_one_rank(rank: int, device: str) -> dict[str, list[list[Tensor]]]:
    if device == "cpu":  # a process of its own, which conftest.py has not seen
        hasten_interpreter()
    gradients = {}
    for loss in LOSSES.values():
        torch.manual_seed(0)
        network = Network(loss).to(device)
        _, target = segmentation_case((1, 1, 3, 4), seed=rank, device=device)
        image = torch.rand(1, 3, 3, 4, generator=torch.Generator().manual_seed(rank)).to(device)
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(network))
        with served_by_kernels(loss):
            parallel(image, target).backward()
            network(image, target).backward()
        gradients[loss.__name__] = [
            [p.grad.cpu() for p in n.parameters()] for n in (parallel, network)
        ]
    return gradients


def test_two_processes(device: torch.device, tmp_path: Path) -> None:
    """DistributedDataParallel averages what each process has computed for itself."""
    ranks = of_ranks(2, gradients_on_one_rank, tmp_path, device.type)
    for name in ranks[0]:
        for position in range(2):
            shared = [rank[name][0][position] for rank in ranks]
            own = [rank[name][1][position] for rank in ranks]
            assert torch.equal(*shared)
            assert not torch.equal(*own)
            torch.testing.assert_close(shared[0], (own[0] + own[1]) / 2)


def shipped_configurations() -> list[Any]:
    """(operator, window size, configuration) of every tuned file, each once."""
    found = {}
    for path in sorted(configurations.SHIPPED_DIRECTORY.glob("*.json")):
        for key, entry in json.loads(path.read_text())["entries"].items():
            operator, _, window, *_ = key.split("|")
            settings = {k: v for k, v in entry["configuration"].items() if k != "num_warps"}
            name = f"{operator}-{window}-" + "-".join(f"{k}{v}" for k, v in settings.items())
            found[name] = (operator, int(window[1:]), entry["configuration"])
    return [pytest.param(*case, id=name) for name, case in sorted(found.items())]


@pytest.mark.parametrize(("operator", "window_size", "configuration"), shipped_configurations())
def test_same_bits_in_every_shipped_configuration(
    operator: str, window_size: int, configuration: dict[str, Any], device: torch.device
) -> None:
    logits, target = segmentation_case((1, 2, 5, 12), device=device)

    def run() -> tuple[Tensor, ...]:
        leaf = logits.clone().requires_grad_()
        if operator.startswith("gaussian"):
            values = tritonloss.gaussian_statistics(leaf, window_size)
        elif operator.startswith("structural"):
            values = (structural_similarity_loss(leaf, target, window_size=window_size),)
        else:
            values = (ssim_loss(leaf, target, window_size=window_size),)
        gradients = torch.autograd.grad(values, leaf, [torch.ones_like(v) for v in values])
        return (*values, *gradients)

    with ExitStack() as stack:
        stack.enter_context(tritonloss.use_backend("triton"))
        if operator == "structural_similarity_stored":
            schedule = {"schedule": "stored"}
            stack.enter_context(configurations.forced("structural_similarity_forward", schedule))
        stack.enter_context(configurations.forced(operator, configuration))
        first, second = run(), run()
    with tritonloss.use_backend("reference"):
        expected = run()
    for left, right, reference in zip(first, second, expected, strict=True):
        assert torch.equal(left, right)
        torch.testing.assert_close(left, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed"])
def test_no_hidden_copy(loss: Loss, layout: str, device: torch.device) -> None:
    if loss.example.arguments is not logits_and_target:
        pytest.skip("makes some of its arguments itself")
    logits, target = segmentation_case((1, 2, 8, 12), device=device)
    logits, target = as_layout(logits, layout), as_layout(target, layout)
    with torch.profiler.profile(record_shapes=True) as profile:
        value_and_gradient(loss, logits, target)
    copies = [
        event
        for event in profile.events()
        if event.name in ("aten::clone", "aten::_to_copy", "aten::cat", "aten::index")
        and any(torch.Size(s).numel() >= logits.numel() for s in event.input_shapes if s)
    ]
    assert not copies, [(event.name, event.input_shapes) for event in copies]


def test_the_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1, 1, 4, 4)
    with pytest.raises(ValueError, match="backend must be .*'eager'"):
        tritonloss.use_backend("eager").__enter__()
    monkeypatch.setattr(backend, "INTERPRETED", False)
    assert not backend.serves_triton(x)
    with tritonloss.use_backend("triton"):
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
            tritonloss.gaussian_statistics(x)
        with tritonloss.use_backend("reference"):
            assert not backend.serves_triton(x)
        with pytest.raises(RuntimeError):
            backend.serves_triton(x)
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert backend.serves_triton(x)


@pytest.mark.gpu
def test_cuda_graph_without_synchronisation(loss: Loss, device: torch.device) -> None:
    logits, target = segmentation_case((2, 3, 33, 65), device=device)
    leaf = logits.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        value = loss(leaf, target)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    with served_by_kernels(loss):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
    with torch.no_grad():
        leaf.mul_(-0.5)
    graph.replay()
    expected = value_and_gradient(loss, -0.5 * logits, target)
    assert torch.equal(captured[0], expected[0]) and torch.equal(captured[1], expected[1])


@pytest.mark.gpu
def test_extra_memory_of_a_training_step(device: torch.device) -> None:
    """It is the gradient, two pooled maps where there are such, and a little more."""
    logits, target = segmentation_case((2, 19, 512, 1024), device=device)
    for loss, most in (
        (LOSSES["structural_similarity_loss"], 1.01),
        (LOSSES["structural_similarity_loss, stored"], 1.01),
        (rmi_loss, 1 + 2 / 16 + 0.01),
        (functools.partial(rmi_loss, pooling=None), 1.05),
    ):
        value_and_gradient(loss, logits, target)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value_and_gradient(loss, logits, target)
        extra = torch.cuda.max_memory_allocated() - before
        assert extra <= most * logits.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("loss", PIXELWISE, ids=lambda loss: loss.__name__)
def test_extra_memory_of_a_pixelwise_step(loss: Loss, layout: str, device: torch.device) -> None:
    """It is the gradient, 4 or 8 bytes per pixel, and 8 more where the loss is a map."""
    logits, target = segmentation_case((2, 19, 512, 1024), device=device)
    logits = as_layout(logits, layout)
    value_and_gradient(loss, logits, target)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value_and_gradient(loss, logits, target)
    extra = torch.cuda.max_memory_allocated() - before
    per_pixel = 8 if loss.example.operator.name == "margin_calibrated" else 4
    per_pixel += 8 if loss.example.options.get("reduction") == "none" else 0
    assert extra <= logits.nbytes + per_pixel * target.numel() + 2**21


@pytest.mark.gpu
def test_labels_are_checked_on_the_gpu_only_when_asked(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target = segmentation_case((1, 3, 8, 9), device=device)
    target[0, 0, 0] = 7
    structural_similarity_loss(logits, target)
    monkeypatch.setenv("TRITONLOSS_CHECK_LABELS", "1")
    with pytest.raises(ValueError, match=r"target .*7 \(1x\)"):
        structural_similarity_loss(logits, target)
