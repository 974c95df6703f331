"""What every operator does under the transforms of PyTorch, and which derivatives it has."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import tritonloss
from tests.oracle import segmentation_case
from tests.slices import DIFFERENTIABLE
from tritonloss._core.example import Example
from tritonloss.functional import (
    cross_entropy,
    ssim,
)

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("small_programs")]

_, TARGET = segmentation_case((1, 3, 4, 6), seed=1)


def total_of(example: Example) -> Callable[[Tensor], Tensor]:
    """A function of an example's map: a number that depends on all differentiable results."""

    def total(x: Tensor) -> Tensor:
        floating = [result for result in example(x, TARGET) if result.is_floating_point()]
        return torch.stack([result.square().sum() for result in floating]).sum()

    return total


# One example of every operator with a gradient, by the operator's name.
LOSSES = {e.operator.name: total_of(e) for e in reversed(DIFFERENTIABLE.values())}
# Under vmap, losses of many launches take long in the interpreter: these are the others.
QUICK = [
    name for name in LOSSES if name not in ("structural_similarity", "ssim_loss", "ssim", "rmi")
]


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """A loss of a float64 map, on the kernels or, inside use_backend, on the reference."""
    return LOSSES[request.param]


@pytest.fixture(params=QUICK)
def quick_loss(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    return LOSSES[request.param]


@pytest.fixture
def maps(device: torch.device) -> Tensor:
    if device.type != "cpu":
        pytest.skip("labels and offsets of this file are on the CPU")
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 1, 3, 4, 6, dtype=torch.float64, generator=generator)


def gradient_of(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def test_grad_and_vjp(loss: Callable[[Tensor], Tensor], maps: Tensor) -> None:
    x = maps[0]
    leaf = x.clone().requires_grad_()
    expected = loss(leaf)
    (gradient,) = torch.autograd.grad(expected, leaf)
    value, pullback = torch.func.vjp(loss, x)
    assert torch.equal(value, expected)
    torch.testing.assert_close(pullback(torch.full_like(value, 3.0))[0], 3 * gradient)


def test_jacobian_of_a_map(maps: Tensor) -> None:
    """jacrev finds every pixel's own gradient by a vmap over the backward pass."""
    x = maps[0]

    def values(x: Tensor) -> Tensor:
        return cross_entropy(x, TARGET, reduction="none")

    jacobian = torch.func.jacrev(values)(x)
    with tritonloss.use_backend("reference"):
        expected = torch.func.jacrev(values)(x)
    torch.testing.assert_close(jacobian, expected)


def test_vmap(quick_loss: Callable[[Tensor], Tensor], maps: Tensor) -> None:
    """vmap of values, of gradients, and under autograd."""
    expected = torch.stack([quick_loss(x) for x in maps])
    assert torch.equal(torch.vmap(quick_loss)(maps), expected)
    gradients = torch.stack([gradient_of(quick_loss, x) for x in maps])
    torch.testing.assert_close(torch.vmap(torch.func.grad(quick_loss))(maps), gradients)
    torch.testing.assert_close(
        gradient_of(lambda x: torch.vmap(quick_loss)(x).sum(), maps), gradients
    )
    moved = maps.movedim(0, 2)
    torch.testing.assert_close(torch.vmap(quick_loss, in_dims=2)(moved), expected)


def test_vmap_over_labels(maps: Tensor) -> None:
    labels = torch.stack((TARGET, TARGET.flip(-1)))
    found = torch.vmap(cross_entropy, in_dims=(None, 0))(maps[0], labels)
    expected = torch.stack([cross_entropy(maps[0], target) for target in labels])
    assert torch.equal(found, expected)
    labels[1, 0, 2, 3] = 9
    with pytest.raises(ValueError, match="got 1 labels outside"):
        torch.vmap(cross_entropy, in_dims=(None, 0))(maps[0], labels)


def test_batched_upstream_gradients(maps: Tensor) -> None:
    leaf = maps[0].clone().requires_grad_()
    mean, variance = tritonloss.gaussian_statistics(leaf)
    upstream = torch.randn(3, *mean.shape, dtype=mean.dtype)
    (batched,) = torch.autograd.grad(
        variance, leaf, upstream, is_grads_batched=True, retain_graph=True
    )
    for each, found in zip(upstream, batched, strict=True):
        (expected,) = torch.autograd.grad(variance, leaf, each, retain_graph=True)
        torch.testing.assert_close(found, expected)


def test_forward_mode_raises_in_words(loss: Callable[[Tensor], Tensor], maps: Tensor) -> None:
    """The operators have no forward-mode derivative and must never give a number for one."""
    x = maps[0]
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(loss, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            loss(dual)


def test_forward_mode_of_the_reference(loss: Callable[[Tensor], Tensor], maps: Tensor) -> None:
    x = maps[0]
    tangent = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    with tritonloss.use_backend("reference"):
        _, derivative = torch.func.jvp(loss, (x,), (tangent,))
        expected = (gradient_of(loss, x) * tangent).sum()
    torch.testing.assert_close(derivative, expected)


def test_a_second_derivative_raises_in_words(
    loss: Callable[[Tensor], Tensor], maps: Tensor
) -> None:
    leaf = maps[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="first order only"):
        torch.autograd.grad(gradient.square().sum(), leaf)


def test_second_derivatives_of_transforms_raise_in_words(maps: Tensor) -> None:
    loss = LOSSES["cross_entropy"]
    with pytest.raises(RuntimeError, match="first order only"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(maps[0])
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.hessian(loss)(maps[0])


def test_make_fx(quick_loss: Callable[[Tensor], Tensor], maps: Tensor) -> None:
    """A traced graph holds the operators, and is right for other inputs, too."""
    for function in (quick_loss, torch.func.grad(quick_loss)):
        graph = make_fx(function)(maps[0])
        assert any("tritonloss" in str(node.target) for node in graph.graph.nodes)
        torch.testing.assert_close(graph(maps[1]), function(maps[1]))


def test_fake_tensors(loss: Callable[[Tensor], Tensor], maps: Tensor) -> None:
    """Value and gradient have their shapes and dtypes without any data."""
    fake_mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    x = fake_mode.from_tensor(maps[0]).requires_grad_()
    with fake_mode:
        value = loss(x)
        (gradient,) = torch.autograd.grad(value, x)
    assert value.shape == ()
    assert gradient.shape == x.shape and gradient.dtype == x.dtype


def test_transforms_inside_torch_compile(maps: Tensor) -> None:
    """They raise an error that says what to do, or give the right result outside the graph."""
    loss = LOSSES["cross_entropy"]
    torch._dynamo.reset()
    with pytest.raises(Exception, match="use torch.compile inside of torch.func.grad"):
        torch.compile(
            lambda x: torch.func.jvp(loss, (x,), (x,)), fullgraph=True, backend="aot_eager"
        )(maps[0])
    torch._dynamo.reset()
    found = torch.compile(torch.func.grad(loss), backend="aot_eager")(maps[0])
    assert torch.equal(found, gradient_of(loss, maps[0]))


def test_a_gradient_that_nobody_asks_for(maps: Tensor) -> None:
    """Of two outputs one is used; of two images one needs no gradient."""
    for position in (0, 1):
        leaf = maps[0].clone().requires_grad_()
        tritonloss.gaussian_statistics(leaf)[position].sum().backward()
        with tritonloss.use_backend("reference"):
            other = maps[0].clone().requires_grad_()
            tritonloss.gaussian_statistics(other)[position].sum().backward()
        torch.testing.assert_close(leaf.grad, other.grad)
    for needs_x, needs_y in ((True, False), (False, True)):
        x = maps[0].clone().requires_grad_(needs_x)
        y = maps[1].clone().requires_grad_(needs_y)
        ssim(x, y, window_size=3).backward()
        assert (x.grad is None) == (not needs_x) and (y.grad is None) == (not needs_y)


def test_no_zeros_for_results_that_are_only_saved(maps: Tensor) -> None:
    """The backward pass of a loss is called with None for what it keeps, not with zeros."""
    leaf = maps[0].float().requires_grad_()
    value = cross_entropy(leaf, TARGET)
    with torch.profiler.profile() as profile:
        value.backward()
    assert not [event for event in profile.events() if event.name == "aten::zeros"]


def test_threads(maps: Tensor) -> None:
    """Two threads that differentiate losses get what one gets."""
    names = ("cross_entropy", "margin_calibrated", "gaussian_statistics")
    expected = {name: gradient_of(LOSSES[name], maps[0]) for name in names}
    wrong: list[str] = []

    def work(order: tuple[str, ...]) -> None:
        for _ in range(2):
            for name in order:
                try:
                    if not torch.equal(gradient_of(LOSSES[name], maps[0]), expected[name]):
                        wrong.append(name)
                except Exception as error:
                    wrong.append(f"{name}: {error!r}")

    threads = [threading.Thread(target=work, args=(order,)) for order in (names, names[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_sign_that_is_not_in_memory(maps: Tensor) -> None:
    """PyTorch keeps the sign of a conjugate's imaginary part in a flag of the tensor."""
    x = torch.complex(maps[0], maps[1]).conj().imag
    assert x.is_neg()
    plain = x.resolve_neg()
    value, expected = (cross_entropy(each, TARGET) for each in (x, plain))
    assert torch.equal(value, expected)
    leaf = torch.complex(maps[0], maps[1]).requires_grad_()
    LOSSES["cross_entropy"](leaf.conj().imag).backward()
    torch.testing.assert_close(leaf.grad.imag, -gradient_of(LOSSES["cross_entropy"], plain))
