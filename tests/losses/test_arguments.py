"""What modules refuse when they are made, and tensors that no function takes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonloss
from tritonloss import functional

LOGITS = torch.zeros(2, 3, 12, 16)
TARGET = torch.zeros(2, 12, 16, dtype=torch.int64)
OFFSETS = (torch.ones(3), torch.ones(3))
MATRIX = torch.eye(4)


def _margin_module(**options: Any) -> nn.Module:
    return tritonloss.MarginCalibratedLoss(options.pop("offsets", OFFSETS), **options)


def _margin_loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    offsets = options.pop("offsets", OFFSETS)
    return functional.margin_calibrated_loss(logits, target, offsets, **options)


# --- options --------------------------------------------------------------------------------------

_WINDOW = [{"window_size": 4}, {"window_size": 3.0}, {"sigma": 0.0}, {"sigma": "1.5"}]
_PIXELWISE = [{"reduction": "average"}, {"reduction": None}]
_IGNORE = [{"ignore_index": 1.0}, {"ignore_index": "255"}, {"ignore_index": 2**70}]
WRONG: list[tuple[Callable[..., nn.Module], Callable[..., Any], list[dict[str, Any]]]] = [
    (
        tritonloss.StructuralSimilarityLoss, functional.structural_similarity_loss,
        [*_WINDOW, {"beta": 1.0}, {"stability": 0.0}, {"bce_weight": 1.5}, {"padding": "same"},
        {"hard_mining": 1}, {"reweight": "no"}, *_IGNORE],
    ),
    (
        tritonloss.SSIMLoss, functional.ssim_loss,
        [{"form": "nonsense"}, *_WINDOW, {"c1": 0.0}, {"c2": float("nan")}, *_IGNORE],
    ),
    (
        tritonloss.RMILoss, functional.rmi_loss,
        [{"region_size": 6}, {"region_size": 3.0}, {"pooling": "median"}, {"pool_size": 9},
        {"moments": "median"}, {"epsilon": 0.0}, {"epsilon": "small"}, {"bce_weight": -0.1},
        {"ignore": "all"}, {"precision": "float16"}, {"bce_smooth": -1.0}, {"return_info": 1},
        *_IGNORE],
    ),
    (
        tritonloss.CrossEntropyLoss, functional.cross_entropy,
        [{"weight": 1.0}, {"label_smoothing": 1.1}, *_PIXELWISE, *_IGNORE],
    ),
    (
        tritonloss.BinaryCrossEntropyLoss, functional.binary_cross_entropy,
        [{"pos_weight": [1.0]}, *_PIXELWISE, *_IGNORE],
    ),
    (
        tritonloss.FocalLoss, functional.focal_loss,
        [{"gamma": -1.0}, {"alpha": -0.25}, {"alpha": "balanced"}, {"detach_weight": 0},
        *_PIXELWISE, *_IGNORE],
    ),
    (
        _margin_module, _margin_loss,
        [{"offsets": torch.ones(2, 3)}, {"variant": "paperback"}, *_PIXELWISE, *_IGNORE],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "function", "options"),
    [
        pytest.param(module, function, wrong, id=f"{function.__name__}-{wrong}")
        for module, function, every in WRONG
        for wrong in every
    ],
)
def test_a_module_refuses_what_its_function_refuses(
    module: Callable[..., nn.Module], function: Callable[..., Any], options: dict[str, Any]
) -> None:
    with pytest.raises((TypeError, ValueError)) as of_function:
        function(LOGITS, TARGET, **options)
    with pytest.raises((TypeError, ValueError)) as of_module:
        module(**options)
    (name,) = options
    assert str(of_function.value).startswith(name)
    assert of_module.type is of_function.type
    same = str(of_function.value).replace("shape (3,)", "shape (C,)")  # of classes not yet known
    assert str(of_module.value) == same


def test_every_option_is_among_the_wrong_ones() -> None:
    for module, function, every in WRONG:
        signature = module if module is not _margin_module else tritonloss.MarginCalibratedLoss
        options = set(inspect.signature(signature).parameters)
        assert options == {name for wrong in every for name in wrong}, function.__name__


# --- offsets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1.0, -1e-30, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 1])
def test_offsets_that_are_no_margins(position: int, value: float) -> None:
    offsets = [torch.ones(3), torch.ones(3)]
    offsets[position][1] = value
    name = ("own", "other")[position]
    message = rf"^offsets\.{name} must hold finite numbers of at least 0; got .* for class 1$"
    for call in (
        lambda: functional.margin_calibrated_loss(LOGITS, TARGET, tuple(offsets)),
        lambda: tritonloss.MarginCalibratedLoss(tuple(offsets)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_offsets_that_a_change_of_dtype_made_infinite() -> None:
    criterion = tritonloss.MarginCalibratedLoss((torch.ones(3), torch.full((3,), 1e5)))
    with pytest.raises(ValueError, match=r"^offsets\.other must .* got inf for class 0$"):
        criterion.half()(LOGITS, TARGET)


def test_offsets_nobody_may_look_at() -> None:
    """Under torch.compile and without data; zeros are margins, and so is what needs a gradient."""
    torch._dynamo.reset()
    own = torch.tensor([1.0, -1.0, float("nan")])
    compiled = torch.compile(_margin_loss, fullgraph=True, backend="eager")
    with tritonloss.use_backend("reference"):
        assert compiled(LOGITS, TARGET, offsets=(own, own)).isnan()
        meta = [x.to("meta") for x in (LOGITS, TARGET, own)]
        assert functional.margin_calibrated_loss(*meta[:2], (meta[2], meta[2])).is_meta
        good = torch.tensor([0.0, -0.0, 1.0], requires_grad=True)
        assert _margin_loss(LOGITS, TARGET, offsets=(good, good)).isfinite()


# --- tensors --------------------------------------------------------------------------------------


def _opaque(tensor: Tensor) -> Tensor:
    return tensor.float().to_mkldnn()


def _quantized(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8)


def _nested(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor([tensor, tensor])


def _jagged(tensor: Tensor) -> Tensor:
    tensor = tensor.reshape(-1, 1)
    return torch.nested.nested_tensor([tensor, tensor[:1]], layout=torch.jagged)


def _compressed(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dim() > 1 else tensor[None]).to_sparse_csr()


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse_coo": Tensor.to_sparse,
    "sparse_csr": _compressed,
    "nested": _nested,
    "nested, jagged": _jagged,
    "mkldnn": _opaque,
    "quantized": _quantized,
}
ARGUMENTS: dict[str, tuple[Tensor, Callable[[Tensor], Any]]] = {
    f"{name} of {function.__name__}": (
        LOGITS if name == "logits" else TARGET,
        lambda wrong, function=function, name=name: function(
            **{"logits": LOGITS, "target": TARGET, name: wrong}
        ),
    )
    for function in (
        functional.structural_similarity_loss, functional.ssim_loss, functional.rmi_loss,
        functional.cross_entropy, functional.binary_cross_entropy, functional.focal_loss,
        _margin_loss,
    )
    for name in ("logits", "target")
}  # fmt: skip
ARGUMENTS |= {
    "x of ssim": (LOGITS, lambda wrong: functional.ssim(wrong, LOGITS)),
    "y of ssim": (LOGITS, lambda wrong: functional.ssim(LOGITS, wrong)),
    "x of gaussian_statistics": (LOGITS, tritonloss.gaussian_statistics),
    "weight": (OFFSETS[0], lambda wrong: functional.cross_entropy(LOGITS, TARGET, weight=wrong)),
    "weight of the module": (OFFSETS[0], lambda wrong: tritonloss.CrossEntropyLoss(weight=wrong)),
    "pos_weight": (
        OFFSETS[0],
        lambda wrong: functional.binary_cross_entropy(LOGITS, TARGET, pos_weight=wrong),
    ),
    "alpha": (OFFSETS[0], lambda wrong: functional.focal_loss(LOGITS, TARGET, alpha=wrong)),
    "offsets.own": (
        OFFSETS[0],
        lambda wrong: functional.margin_calibrated_loss(LOGITS, TARGET, (wrong, OFFSETS[1])),
    ),
    "offsets.other of the module": (
        OFFSETS[0],
        lambda wrong: tritonloss.MarginCalibratedLoss((OFFSETS[0], wrong)),
    ),
    "label_counts": (torch.ones(3).long(), tritonloss.margin_offsets),
    "labels": (TARGET, lambda wrong: tritonloss.count_labels(wrong, 3)),
    "labels, map 1,": (TARGET, lambda wrong: tritonloss.count_labels([TARGET, wrong], 3)),
    "A of cholesky_ex": (MATRIX, tritonloss.linalg.cholesky_ex),
    "A of logdet": (MATRIX, tritonloss.linalg.logdet),
    "A of inv": (MATRIX, tritonloss.linalg.inv),
    "A of solve": (MATRIX, lambda wrong: tritonloss.linalg.solve(wrong, MATRIX)),
    "B of solve": (MATRIX, lambda wrong: tritonloss.linalg.solve(MATRIX, wrong)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_only_dense_tensors_are_taken(argument: str, kind: str) -> None:
    tensor, call = ARGUMENTS[argument]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each of them is said to be a prototype, or to be leaving
        wrong = KINDS[kind](tensor)
    name = argument.partition(" of ")[0]
    message = f"^{name} must be a dense \\(strided\\) tensor; got one that is {kind.split(',')[0]}$"
    with pytest.raises(TypeError, match=message):
        call(wrong)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool], ids=str)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_numbers_of_no_use_are_named(argument: str, dtype: torch.dtype) -> None:
    tensor, call = ARGUMENTS[argument]
    name = argument.partition(" of ")[0]
    with pytest.raises(TypeError, match=f"^{name} must .*; got {str(dtype).split('.')[1]}"):
        call(tensor.to(dtype))


@pytest.mark.parametrize(
    "argument",
    [
        name
        for name in ARGUMENTS
        if not name.startswith(("logits", "x of", "label", "A of")) and "module" not in name
    ],
)
def test_tensors_elsewhere_are_named(argument: str) -> None:
    """All tensors lie on one device, that of the first."""
    tensor, call = ARGUMENTS[argument]
    name = argument.partition(" of ")[0]
    with pytest.raises(ValueError, match=f"^{name} must be .*device.* meta$"):
        call(tensor.to("meta"))
