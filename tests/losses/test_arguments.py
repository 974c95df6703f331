"""What modules refuse when they are made, and tensors that no function takes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tritonloss
from tests import slices
from tests.slices import one_of_each
from tritonloss import functional
from tritonloss._core.example import Example

LOGITS = torch.zeros(2, 3, 12, 16)
TARGET = torch.zeros(2, 12, 16, dtype=torch.int64)
LOSSES = one_of_each()


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def positional(example: Example) -> dict[str, Any]:
    """What the function is given by position, by the parameters' names."""
    names = [parameter.name for parameter in parameters(example.function)]
    return dict(zip(names, example.arguments(LOGITS, TARGET), strict=False))


class Nonsense:
    """A value that no option accepts."""

    def __repr__(self) -> str:
        return "nonsense"


NONSENSE = Nonsense()
# Wrong values by the option's name, whatever the loss, or by the names of loss and option. Options
# that are not here are given only nonsense.
WRONG: dict[str, list[Any]] = {
    "window_size": [4, 3.0],
    "sigma": [0.0, "1.5"],
    "padding": ["same"],
    "structural_similarity_loss.beta": [1.0],
    "beta": [-1.0],
    "stability": [0.0],
    "bce_weight": [1.5, -0.1],
    "hard_mining": [1],
    "reweight": ["no"],
    "form": ["nonsense"],
    "c1": [0.0],
    "c2": [float("nan")],
    "region_size": [6, 3.0],
    "pooling": ["median"],
    "pool_size": [9],
    "moments": ["median"],
    "epsilon": [0.0, "small"],
    "ignore": ["all"],
    "precision": ["float16"],
    "bce_smooth": [-1.0],
    "return_info": [1],
    "weight": [1.0],
    "label_smoothing": [1.1],
    "pos_weight": [[1.0]],
    "gamma": [-1.0],
    "alpha": [-0.25, "balanced"],
    "detach_weight": [0],
    "offsets": [torch.ones(2, 3)],
    "variant": ["paperback"],
    "activation": ["tanh"],
    "per_image": [1],
    "smooth": [-1.0],
    "classes": ["absent", (), (1, 1), (-1,)],
    "include_background": [0],
    "empty": ["one"],
    "log_loss": ["yes"],
    "reduction": ["average", None],
    "ignore_index": [1.0, "255", 2**70],
    "exact": [0],
    "bins": [1023, 2**20, 1024.0],
    "size": [0, 65, 1.0, (1, 1), (), (1, 0)],
    "margin": [-1.0, "3"],
    "edge_weight": [-1.0],
    "non_edge_weight": [float("nan")],
    "edge_table": [1.0],
    "non_edge_table": [[1.0]],
    "decay": [-0.5],
    "void": ["both", None],
}


@pytest.mark.parametrize(
    ("example", "option", "wrong"),
    [
        pytest.param(example, parameter.name, wrong, id=f"{name}-{parameter.name}={wrong}")
        for name, example in LOSSES.items()
        for parameter in parameters(example.function)[2:]
        for key in (parameter.name, f"{name}.{parameter.name}")
        for wrong in (*WRONG.get(key, ()), *([NONSENSE] if key == parameter.name else ()))
    ],
)
def test_a_module_refuses_what_its_function_refuses(
    example: Example, option: str, wrong: object
) -> None:
    assert example.module is not None
    extra = dict(list(positional(example).items())[2:])
    options = {**extra, option: wrong}
    with pytest.raises((TypeError, ValueError)) as of_function:
        example.function(LOGITS, TARGET, **options)
    with pytest.raises((TypeError, ValueError)) as of_module:
        example.module(**options)
    assert str(of_function.value).startswith(option)
    assert of_module.type is of_function.type
    same = str(of_function.value).replace("shape (3,)", "shape (C,)")  # a module knows no classes
    assert str(of_module.value) == same


def test_every_wrong_option_is_one_of_some_loss() -> None:
    known = {p.name for example in LOSSES.values() for p in parameters(example.function)[2:]}
    assert not {key.rpartition(".")[2] for key in WRONG} - known


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
    """Offsets go unchecked under torch.compile and without data.

    Zeros are margins, and so are offsets that need a gradient.
    """
    torch._dynamo.reset()
    own = torch.tensor([1.0, -1.0, float("nan")])
    loss = functional.margin_calibrated_loss
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    with tritonloss.use_backend("reference"):
        assert compiled(LOGITS, TARGET, (own, own)).isnan()
        meta = [x.to("meta") for x in (LOGITS, TARGET, own)]
        assert loss(*meta[:2], (meta[2], meta[2])).is_meta
        good = torch.tensor([0.0, -0.0, 1.0], requires_grad=True)
        assert loss(LOGITS, TARGET, (good, good)).isfinite()


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
Argument = tuple[Tensor, Callable[[Tensor], Any]]


def tensors_of(given: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among arguments, and those in their tuples, by the names of both."""
    found = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    for name, value in given.items():
        if hasattr(value, "_asdict"):
            found |= {f"{name}.{field}": tensor for field, tensor in value._asdict().items()}
    return found


def with_wrong(given: dict[str, Any], name: str, wrong: Tensor) -> dict[str, Any]:
    """The arguments, with another tensor in the place of one."""
    whole, _, field = name.partition(".")
    return {**given, whole: given[whole]._replace(**{field: wrong}) if field else wrong}


def arguments_of(example: Example) -> dict[str, Argument]:
    """Every tensor that a function takes, and its module: one that is right, and the call."""
    function, module, given = example.function, example.module, positional(example)
    rest = parameters(function)[len(given) :]
    tables = {p.name: torch.ones(3) for p in rest if "Tensor" in p.annotation}
    found: dict[str, Argument] = {
        f"{name} of {function.__name__}": (
            tensor, lambda wrong, name=name: function(**with_wrong(given, name, wrong)),
        )
        for name, tensor in {**tensors_of(given), **tables}.items()
    }  # fmt: skip
    if module is not None:
        kept = dict(list(given.items())[2:])
        found |= {
            f"{name} of the module {module.__name__}": (
                tensor, lambda wrong, name=name: module(**with_wrong(kept, name, wrong)),
            )
            for name, tensor in {**tensors_of(kept), **tables}.items()
        }  # fmt: skip
    return found


EXAMPLES = one_of_each(slices.EXAMPLES.values())
ARGUMENTS: dict[str, Argument] = {
    "label_counts": (torch.ones(3).long(), tritonloss.margin_offsets),
    "labels": (TARGET, lambda wrong: tritonloss.count_labels(wrong, 3)),
    "labels, map 1,": (TARGET, lambda wrong: tritonloss.count_labels([TARGET, wrong], 3)),
}
for _example in EXAMPLES.values():
    ARGUMENTS |= arguments_of(_example)
# All tensors lie on the device of a function's first one.
FIRST = {f"{next(iter(positional(e)))} of {name}" for name, e in EXAMPLES.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_only_dense_tensors_are_taken(argument: str, kind: str) -> None:
    tensor, call = ARGUMENTS[argument]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls each kind a prototype, or deprecated
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
        if name not in FIRST and "module" not in name and not name.startswith("label")
    ],
)
def test_tensors_elsewhere_are_named(argument: str) -> None:
    tensor, call = ARGUMENTS[argument]
    name = argument.partition(" of ")[0]
    with pytest.raises(ValueError, match=f"^{name} must be .*device.* meta$"):
        call(tensor.to("meta"))
