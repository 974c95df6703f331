"""Batched small positive definite matrices: kernels against numpy, LAPACK and autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import tritonloss
from tests.oracle import check_three_way
from tritonloss import linalg
from tritonloss._core.configurations import forced
from tritonloss.linalg.matrices import CHOLESKY, INVERSE, LOGDET, SOLVE

ORDERS = (1, 2, 3, 4, 8, 9, 10, 16, 18, 25)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "cholesky_ex": lambda A: linalg.cholesky_ex(A)[0],
    "logdet": linalg.logdet,
    "inv": linalg.inv,
}


def matrices(
    order: int,
    *leading: int,
    condition: float = 10.0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Symmetric positive definite, with eigenvalues from 1 down to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((*leading, order, order), generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(noise)
    eigenvalues = torch.logspace(0, -numpy.log10(condition), order, dtype=torch.float64)
    result = basis * eigenvalues @ basis.mT
    return ((result + result.mT) / 2).to(device, dtype)


def symmetric(A: Tensor) -> Tensor:
    return (A + A.mT) / 2


def _of_symmetric(function: Callable[..., Tensor], A: Tensor, *others: Tensor) -> Tensor:
    return function(symmetric(A), *others)


@pytest.fixture(autouse=True)
def kernels() -> Any:
    with tritonloss.use_backend("triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", ORDERS)
def test_backward_error(order: int, dtype: torch.dtype, device: torch.device) -> None:
    """|L L^T - A| <= 10 n eps |A|, well and badly conditioned; numpy's own factor beside it."""
    epsilon = torch.finfo(dtype).eps
    for condition in (10.0, 1e4 if dtype == torch.float32 else 1e12):
        A = matrices(order, 3, condition=condition, dtype=dtype, device=device)
        factor, info = linalg.cholesky_ex(A)
        assert (info == 0).all() and info.dtype == torch.int32
        exact = A.double().tril() + A.double().tril(-1).mT
        error = (factor.double() @ factor.double().mT - exact).norm(dim=(1, 2))
        assert (error <= 10 * order * epsilon * exact.norm(dim=(1, 2))).all()
        assert (factor.triu(1) == 0).all()
        expected = numpy.linalg.cholesky(exact.cpu().numpy())
        allowed = 10 * order * epsilon * condition
        assert numpy.abs(factor.double().cpu().numpy() - expected).max() <= allowed


@pytest.mark.parametrize("order", [4, 18])
def test_badly_conditioned_solutions(order: int, device: torch.device) -> None:
    """A X = B to a small backward error, whatever the forward error is."""
    A = matrices(order, 2, condition=1e12, device=device)
    B = torch.randn((2, order, 3), dtype=torch.float64).to(device)
    X = linalg.solve(A, B)
    scale = A.norm(dim=(1, 2)) * X.norm(dim=(1, 2)) + B.norm(dim=(1, 2))
    epsilon = torch.finfo(torch.float64).eps
    assert ((A @ X - B).norm(dim=(1, 2)) <= 10 * order * epsilon * scale).all()
    expected = torch.from_numpy(numpy.linalg.slogdet(A.cpu().numpy())[1]).to(device)
    assert (linalg.logdet(A) - expected).abs().max() <= 10 * order * epsilon * 1e12


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [1, 3, 9, 10, 18])
def test_three_way(name: str, dtype: torch.dtype, order: int, device: torch.device) -> None:
    A = matrices(order, 2, 2, dtype=dtype, device=device)
    check_three_way(lambda M: FUNCTIONS[name](symmetric(M)), A, tolerance=2e-5)


@pytest.mark.parametrize("columns", [1, 4, 21])
@pytest.mark.parametrize("order", [3, 10, 18])
def test_solve(order: int, columns: int, device: torch.device) -> None:
    A = matrices(order, 2, dtype=torch.float32, device=device)
    B = torch.randn((2, order, columns), generator=torch.Generator().manual_seed(3)).to(device)
    check_three_way(lambda M, R: linalg.solve(symmetric(M), R), A, B, tolerance=2e-5)


@pytest.mark.parametrize("order", [1, 2, 9, 10])
def test_gradcheck(order: int, device: torch.device) -> None:
    A = matrices(order, 2, device=device).requires_grad_()
    B = torch.randn((2, order, 2), dtype=torch.float64).to(device).requires_grad_()
    for function in FUNCTIONS.values():
        check = functools.partial(_of_symmetric, function)
        assert torch.autograd.gradcheck(check, A, fast_mode=True)
    check = functools.partial(_of_symmetric, linalg.solve)
    assert torch.autograd.gradcheck(check, (A, B), fast_mode=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_order_raises(name: str, device: torch.device) -> None:
    A = matrices(3, 2, device=device).requires_grad_()
    (gradient,) = torch.autograd.grad(FUNCTIONS[name](A).square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), A)


@pytest.mark.parametrize("order", [1, 3])
def test_many_columns_on_the_right(order: int, device: torch.device) -> None:
    A, B = matrices(order, device=device), torch.ones(order, 70, dtype=torch.float64, device=device)
    torch.testing.assert_close(A @ linalg.solve(A, B), B)


@pytest.mark.parametrize("order", [3, 9, 12])
def test_failed_matrices(order: int, device: torch.device) -> None:
    """info as LAPACK's, NaN for the failed matrix alone; its neighbours have their gradients."""
    A = matrices(order, 6, device=device)
    A[1, order - 1, order - 1] = -1
    A[2] = 0
    A[3, 1, 1] = float("nan")
    A[5, 0, 0] = -2
    factor, info = linalg.cholesky_ex(A)
    expected = torch.linalg.cholesky_ex(A)
    assert torch.equal(info[[0, 1, 2, 4, 5]], expected.info[[0, 1, 2, 4, 5]]) and info[3] == 2
    failed = info != 0
    assert factor[failed].isnan().all()
    torch.testing.assert_close(factor[~failed], expected.L[~failed], rtol=0, atol=1e-12)
    for name, function in FUNCTIONS.items():
        leaf = A.clone().requires_grad_()
        values = function(leaf)
        assert values[failed].isnan().all() and values[~failed].isfinite().all(), name
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        assert gradient[~failed].isfinite().all(), name
    X = linalg.solve(A, A)
    assert X[failed].isnan().all() and X[~failed].isfinite().all()
    with tritonloss.use_backend("reference"):
        assert linalg.cholesky_ex(A)[0][failed].isnan().all()


@pytest.mark.parametrize("order", [4, 11])
def test_only_the_lower_triangle_is_read(order: int, device: torch.device) -> None:
    A = matrices(order, 2, device=device)
    lower = A.tril() + torch.full_like(A, float("nan")).triu(1)
    for function in FUNCTIONS.values():
        assert torch.equal(function(lower), function(A))
    assert torch.equal(linalg.solve(lower, A), linalg.solve(A, A))


@pytest.mark.parametrize("order", [4, 10])
def test_layouts(order: int, device: torch.device) -> None:
    """Strided, transposed and expanded batches, and gradients that are expanded."""
    A = matrices(order, 2, 2, device=device)
    views = {
        "sliced": A.repeat_interleave(2, 1)[:, ::2],
        "transposed": A.mT.contiguous().mT,
        "batch last": A.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
        "expanded": A[:1].expand(2, -1, -1, -1),
    }
    for name, view in views.items():
        for function in FUNCTIONS.values():
            leaf = view.detach().requires_grad_()
            copy = view.detach().clone().contiguous().requires_grad_()
            values, expected = function(leaf), function(copy)
            assert torch.equal(values, expected), name
            values.sum().backward()
            expected.sum().backward()
            torch.testing.assert_close(leaf.grad, copy.grad)


@pytest.mark.parametrize("order", [2, 12])
def test_empty_batches(order: int, device: torch.device) -> None:
    A = torch.empty((0, 3, order, order), device=device, requires_grad=True)
    factor, info = linalg.cholesky_ex(A)
    assert factor.shape == A.shape and info.shape == (0, 3)
    assert linalg.logdet(A).shape == (0, 3) and linalg.inv(A).shape == A.shape
    assert linalg.solve(A, A[..., :1]).shape == (0, 3, order, 1)
    linalg.inv(A).sum().backward()
    assert linalg.solve(torch.eye(order), torch.empty((order, 0))).shape == (order, 0)


def test_a_single_matrix(device: torch.device) -> None:
    A = matrices(5, device=device)
    factor, info = linalg.cholesky_ex(A)
    assert info.shape == () and factor.shape == (5, 5)
    torch.testing.assert_close(linalg.inv(A) @ A, torch.eye(5, dtype=A.dtype, device=device))


@pytest.mark.parametrize("order", [32, 64])
def test_large_matrices(order: int, device: torch.device) -> None:
    A = matrices(order, 2, condition=100.0, device=device)
    inverse = linalg.inv(A)
    identity = torch.eye(order, dtype=A.dtype, device=device)
    torch.testing.assert_close(inverse @ A, identity.expand(2, -1, -1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("lanes", [32, 128])
def test_configurations_agree(lanes: int, device: torch.device) -> None:
    A = matrices(4, 40, device=device)
    with forced("cholesky", {"LANES": lanes, "num_warps": 1}):
        factor, _ = linalg.cholesky_ex(A)
    assert torch.equal(factor, linalg.cholesky_ex(A)[0])
    with forced("solve", {"MATRICES": 1, "num_warps": 1}):
        inverse = linalg.inv(A[:3])
    torch.testing.assert_close(inverse, linalg.inv(A[:3]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("A", "error", "message"),
    [
        ([[1.0]], TypeError, "A must be .*list"),
        (torch.eye(3, dtype=torch.float16), TypeError, "A must be .*float16"),
        (torch.eye(3, dtype=torch.bfloat16), TypeError, "A must be .*bfloat16"),
        (torch.ones(3), ValueError, r"A must be .*\(3,\)"),
        (torch.ones(2, 3), ValueError, r"A must be .*\(2, 3\)"),
        (torch.eye(65), ValueError, r"A must be .*<= 64; got .*\(65, 65\)"),
        (torch.ones(2, 0, 0), ValueError, r"A must be .*\(2, 0, 0\)"),
    ],
)
def test_errors(A: Any, error: type[Exception], message: str, backend: Any) -> None:
    with tritonloss.use_backend(backend):
        for function in (linalg.cholesky_ex, linalg.logdet, linalg.inv):
            with pytest.raises(error, match=message):
                function(A)
        with pytest.raises(error, match=message):
            linalg.solve(A, A)


@pytest.mark.parametrize(
    ("B", "error", "message"),
    [
        (None, TypeError, "B must be .*NoneType"),
        (torch.ones(2, 3, 1).double(), TypeError, "B must be .*float64"),
        (torch.ones(2, 3), ValueError, r"B must be .*\(2, 3, m\).*got .*\(2, 3\)"),
        (torch.ones(2, 4, 1), ValueError, r"B must be .*\(2, 4, 1\)"),
    ],
)
def test_errors_on_the_right(B: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linalg.solve(torch.eye(3).repeat(2, 1, 1), B)


@pytest.mark.parametrize("order", [3, 10])
def test_operators(order: int, device: torch.device) -> None:
    A = matrices(order, 2, device=device).requires_grad_()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(CHOLESKY.forward, (A,), test_utils=checks)
    torch.library.opcheck(LOGDET.forward, (A,), test_utils=checks)
    torch.library.opcheck(SOLVE.forward, (A, A.detach()), test_utils=checks)
    torch.library.opcheck(INVERSE.forward, (A,), test_utils=checks)


def test_determinism(device: torch.device) -> None:
    A = matrices(12, 3, dtype=torch.float32, device=device)
    assert torch.equal(linalg.inv(A), linalg.inv(A))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled(name: str, device: torch.device) -> None:
    A = matrices(4, 3, device=device)
    compiled = torch.compile(
        lambda M: FUNCTIONS[name](symmetric(M)), fullgraph=True, backend="aot_eager"
    )
    leaf, copy = A.clone().requires_grad_(), A.clone().requires_grad_()
    values, expected = compiled(leaf), FUNCTIONS[name](symmetric(copy))
    assert torch.equal(values, expected)
    values.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(leaf.grad, copy.grad)
