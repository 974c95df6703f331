"""An operator declared once, from its launchers: gradient, transforms and torch.compile follow.

Outside torch.compile an operator is a ``torch.autograd.Function`` around its launchers. Where
tensors hold no data, in torch.compile, torch.export and under fake tensors, it is a pair of custom
operators, ``tritonloss::<name>_forward`` and ``tritonloss::<name>_backward``.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NoReturn

import torch
from torch import Tensor

from .custom_operators import custom_operator, filled, several, signed

_WANTS = "wants_"
_GRAD = "grad_"


class Operator:
    """An operator, made of a launcher for each direction.

    What the operator takes and keeps is read from the launchers' signatures:

    - ``forward(*inputs, options, save) -> results``: its tensors are the operator's inputs. It is
      given ``options``, and ``save`` (whether a backward pass may follow), if it has parameters of
      these names.
    - ``backward(...)``: ``grad_<result>`` is an upstream gradient; a parameter that is called like
      an input or a result is saved for it; ``wants_<input>`` says whether that input needs a
      gradient; ``options`` as above. It returns the gradient, or a tuple if there are several.

    Args:
        name: the name of the custom operators, and of the operator in messages.
        forward: the launcher of the forward pass. A result may be None: to custom operators, empty.
        backward: the launcher of the backward pass, or None if no result has a gradient.
        allocate: like ``forward``, but only dtype and shape of its results count.
        results: a NamedTuple of the tensors that ``forward`` returns.
        options: a NamedTuple of numbers, strings and flags, or None if there is none.
        returned: how many results a caller gets; the others are for the backward pass.
        differentiable: names of the inputs with a gradient, in the order of ``backward``.
        allocate_gradient: like ``backward``; by default the gradient is like the first input.
        reuse: like ``backward``, but it writes the gradient into a saved tensor: called for a
            graph's first backward pass only. It returns None to leave the work to ``backward``.
        batched: whether every tensor has leading batch dimensions, to which vmap may add one. Where
            it has not, a mapped operator is launched for one element of the batch after the other.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: Callable[..., Any],
        backward: Callable[..., Any] | None,
        allocate: Callable[..., Any],
        results: type[Any],
        options: type[Any] | None = None,
        returned: int = 1,
        differentiable: tuple[str, ...] | None = None,
        allocate_gradient: Callable[..., Any] | None = None,
        reuse: Callable[..., Tensor | None] | None = None,
        batched: bool = False,
    ) -> None:
        self.name = name
        self.options = options
        self.returned = returned
        self.batched = batched
        self.results = tuple(results._fields)
        self._forward, self._reuse = forward, reuse
        self._backward: Any = backward
        forward_names = list(inspect.signature(forward).parameters)
        self._saves = "save" in forward_names
        self.inputs = tuple(n for n in forward_names if n not in ("options", "save"))
        self._for_forward = _picker(forward_names, (*self.inputs, "options", "save"))
        self.differentiable = differentiable or (self.inputs[:1] if backward else ())
        self._positions = tuple(self.inputs.index(name) for name in self.differentiable)

        names = list(inspect.signature(backward).parameters) if backward else []
        known = (*self.inputs, *self.results)
        self.grads = tuple(n for n in names if n.startswith(_GRAD))
        self.saved = tuple(n for n in names if n in known)
        reused = list(inspect.signature(reuse).parameters) if reuse is not None else []
        self.reused = tuple(n for n in reused if n in known and n not in self.saved)
        self.wants = tuple(n for n in names if n.startswith(_WANTS))
        self._grad_positions = [self.results.index(n.removeprefix(_GRAD)) for n in self.grads]
        self._want_positions = [self.inputs.index(n.removeprefix(_WANTS)) for n in self.wants]
        self._given: tuple[str, ...] = (*self.grads, *self.saved, *self.wants)
        strangers = set(names) - {*self._given, "options"}
        if strangers:
            raise TypeError(f"backward of {name} asks for {sorted(strangers)}, which is not there")
        self._for_backward = _picker(names, (*self._given, "options"))
        self._for_reuse = _picker(reused, (*self._given, "options", *self.reused))
        self._of_saved = _picker((*self.saved, *self.reused), known)

        # Every operator has classes of its own, for the names that autograd shows.
        title = "".join(part.capitalize() for part in name.split("_"))
        self.function: Any = type(title, (_Forward,), {})
        self.transformed_function: Any = type(title, (_TransformedForward,), {})
        self.gradient_function: Any = type(f"{title}Gradient", (_Gradient,), {})
        self._declare(allocate, allocate_gradient or self._like_the_input)

    def __call__(self, *tensors: Tensor | None, options: Any = ()) -> tuple[Tensor, ...]:
        """The results that a caller gets."""
        save = torch.is_grad_enabled() and self._is_differentiated(tensors)
        if is_transformed():
            results = _apply(self.transformed_function, self, True, options, *tensors)
        elif torch.compiler.is_compiling():
            results = self.forward(*tensors, *((save,) if self._saves else ()), *options)
        else:
            found: tuple[Tensor, ...] = self.function.apply(self, save, options, *tensors)
            return found
        return tuple(results[: self.returned])

    def _is_differentiated(self, tensors: Sequence[Tensor | None]) -> bool:
        for position in self._positions:
            tensor = tensors[position]
            if tensor is not None and tensor.requires_grad:
                return True
        return False

    def run_forward(
        self, tensors: Sequence[Tensor | None], options: Any, save: bool
    ) -> tuple[tuple[Any, ...], bool]:
        """All results, and whether they are the launcher's; if it sees no data, the operator's."""
        if _holds_data(tensors):
            return tuple(self._forward(*self._for_forward((*tensors, options, save)))), True
        return tuple(self.forward(*tensors, *((save,) if self._saves else ()), *options)), False

    def run_backward(
        self,
        grads: Sequence[Tensor],
        saved: Sequence[Tensor | None],
        wants: Sequence[bool],
        options: Any,
        *,
        reuse: bool = False,
        launched: bool = False,
    ) -> tuple[Tensor, ...]:
        """The gradients, likewise; ``saved`` hold data if the forward pass was launched."""
        count = len(self.saved)
        tensors = (*grads, *saved[:count])
        if not _holds_data(grads if launched else tensors):
            return self._tupled(self.backward(*tensors, *wants, *options))
        given = (*tensors, *wants, options)
        found = None
        if reuse and self._reuse is not None:
            found = self._reuse(*self._for_reuse((*given, *saved[count:])))
        if found is None:
            found = self._backward(*self._for_backward(given))
        return self._tupled(found)

    def both_passes(self, *tensors: Tensor | None, options: Any = ()) -> tuple[Tensor, ...]:
        """(*returned results, *gradients) for upstream gradients of 1, without autograd."""
        results, _ = self.run_forward(tensors, options, True)
        grads = [torch.ones_like(results[position]) for position in self._grad_positions]
        wants = [True] * len(self.wants)
        gradients = self.run_backward(grads, self.of_saved(tensors, results), wants, options)
        return (*results[: self.returned], *gradients)

    def of_saved(
        self, tensors: Sequence[Tensor | None], results: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """The inputs and results that the backward pass asks for."""
        return self._of_saved((*tensors, *results))

    def of_grads(self, grads: Sequence[Tensor | None]) -> list[Tensor] | None:
        """The upstream gradients that the backward pass asks for; None if there is none at all.

        Where one of several results is used and another is not, they have one shape. The gradient
        of the unused one is zeros that take no memory.
        """
        wanted = [grads[position] for position in self._grad_positions]
        there = [grad for grad in wanted if grad is not None]
        if len(there) in (0, len(wanted)):
            return there or None
        zeros = there[0].new_zeros(()).expand_as(there[0])
        return [zeros if grad is None else grad for grad in wanted]

    def placed(
        self, gradients: Sequence[Tensor], needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """A gradient or None for every input."""
        places: list[Tensor | None] = [None] * len(self.inputs)
        for position, gradient in zip(self._positions, gradients, strict=True):
            if needed[position]:
                places[position] = gradient
        return tuple(places)

    def of_wants(self, needed: Sequence[bool]) -> list[bool]:
        """The flags that the backward pass asks for: whether an input needs a gradient."""
        return [needed[position] for position in self._want_positions]

    def not_differentiable(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Those of the first results that no gradient comes back from."""
        return [r for i, r in enumerate(results) if i not in self._grad_positions]

    def _extras(self, options: Any, save: bool | None = None) -> dict[str, Any]:
        extras = {} if self.options is None else {"options": options}
        return extras if save is None or not self._saves else extras | {"save": save}

    def _tupled(self, gradients: Any) -> tuple[Tensor, ...]:
        return gradients if isinstance(gradients, tuple) else (gradients,)

    def _like_the_input(self, **given: Any) -> Tensor:
        return torch.empty_like(given[self.inputs[0]])

    def _declare(self, allocate: Callable[..., Any], allocate_gradient: Callable[..., Any]) -> None:
        """Declare the custom operators, for tensors without data."""
        fields = typing.get_type_hints(self.options) if self.options is not None else {}
        hints = typing.get_type_hints(self._forward)
        tensors = {name: hints.get(name, Tensor) for name in self.inputs}
        saved = {name: tensors.get(name, Tensor) for name in self.saved}
        made = self.options or tuple

        def forward(*arguments: Any) -> tuple[Tensor, ...]:
            return filled(self._forward(**forward_arguments(arguments)))

        def forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
            return filled(allocate(**forward_arguments(arguments)))

        def backward(*arguments: Any) -> Any:
            return self._returned(self._backward(**backward_arguments(arguments)))

        def backward_fake(*arguments: Any) -> Any:
            return self._returned(allocate_gradient(**backward_arguments(arguments)))

        def forward_arguments(arguments: tuple[Any, ...]) -> dict[str, Any]:
            count = len(self.inputs)
            rest = arguments[count + self._saves :]
            given = dict(zip(self.inputs, arguments, strict=False))
            return given | self._extras(made(*rest), bool(self._saves and arguments[count]))

        def backward_arguments(arguments: tuple[Any, ...]) -> dict[str, Any]:
            given = dict(zip(self._given, arguments, strict=False))
            return given | self._extras(made(*arguments[len(self._given) :]))

        save = {"save": bool} if self._saves else {}
        signed(forward, tensors | save | fields, several(len(self.results)))
        self.forward = custom_operator(f"{self.name}_forward", forward, forward_fake)
        count = len(self.differentiable)
        if not count:
            return
        upstream = dict.fromkeys(self.grads, Tensor)
        wants = dict.fromkeys(self.wants, bool)
        signed(backward, upstream | saved | wants | fields, several(count) if count > 1 else Tensor)
        self.backward = custom_operator(f"{self.name}_backward", backward, backward_fake)
        self._differentiate(len(save) + len(fields), made)

    def _differentiate(self, extras: int, options: Callable[..., Any]) -> None:
        """Declare the custom operators' gradient; ``extras`` arguments come after the inputs."""
        count = len(self.inputs)
        first_option = count + self._saves

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            _keep(ctx, self, inputs[:count], output, options(*inputs[first_option:]), output)

        def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            return (*_gradients_of(ctx, grads, 0), *(None,) * extras)

        def gradient_of_gradient(ctx: Any, *_: Any) -> NoReturn:
            _first_order_only(self)

        self.forward.register_autograd(gradient, setup_context=setup_context)
        self.backward.register_autograd(gradient_of_gradient)

    def _returned(self, gradients: Any) -> Any:
        """The gradients as the custom operator's schema has them: a tuple, or a single tensor."""
        gradients = self._tupled(gradients)
        return gradients if len(gradients) > 1 else gradients[0]


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work, which hides whether a tensor needs a gradient.

    PyTorch has no public function that tells, neither here nor for what _holds_data asks.
    """
    return bool(torch._C._are_functorch_transforms_active())


def can_reuse(tensor: Tensor) -> bool:
    """Whether a backward pass may follow that may write into what the forward pass has saved."""
    if torch.compiler.is_compiling() or is_transformed() or not _holds_data((tensor,)):
        return False
    return tensor.requires_grad and torch.is_grad_enabled()


def _apply_eagerly(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)


# Not to be traced, not even where torch.compile has left the caller itself uncompiled. This is
# torch.compiler.disable, but torch.compile, whose import takes a second, is not imported yet.
_apply: Any = torch._disable_dynamo(_apply_eagerly)  # type: ignore[attr-defined]
_apply._torchdynamo_disable = True
_apply._torchdynamo_disable_msg = (
    "tritonloss: transforms of torch.func cannot be compiled around a loss; use torch.compile "
    "inside of torch.func.grad, vjp or vmap, not around them"
)


def _holds_data(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a launcher would see the tensors' data, and no dispatch mode wants to see the call.

    The imaginary part of a conjugate is a tensor whose data lacks the sign (``is_neg``): PyTorch
    puts the sign in on the way to a custom operator.
    """
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.is_neg() or _is_batched(tensor):
            return False
    return True


_PLAIN = (Tensor, torch.nn.Parameter)
# Whether a tensor is what autograd's is_grads_batched makes of upstream gradients.
_is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


# --- autograd -------------------------------------------------------------------------------------


class _Forward(torch.autograd.Function):
    """The operator in autograd. Arguments: operator, save, options, *inputs."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, save: bool, options: Any, *tensors: Any) -> Any:
        results, launched = operator.run_forward(tensors, options, save)
        returned = results[: operator.returned]
        _keep(ctx, operator, tensors, results, options, returned, save)
        ctx.launched = launched
        return returned

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return (None, None, None, *_gradients_of(ctx, grads, 3))

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        _reverse_mode_only(ctx.operator)


class _TransformedForward(_Forward):
    """_Forward for the transforms of torch.func; it takes the host several times longer."""

    @staticmethod
    def forward(  # type: ignore[override]
        operator: Operator, save: bool, options: Any, *tensors: Any
    ) -> Any:
        return filled(operator.run_forward(tensors, options, save)[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        operator, save, options, *tensors = inputs
        _keep(ctx, operator, tensors, output, options, output, save)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        operator, save, options, *tensors = arguments
        apply = operator.transformed_function.apply
        function = functools.partial(apply, operator, save, options)
        return _mapped(operator, function, info.batch_size, in_dims[3:], tensors)


class _Gradient(torch.autograd.Function):
    """The backward pass, for those who differentiate or map it. Arguments as in run_backward."""

    @staticmethod
    def forward(operator: Operator, options: Any, wants: Any, *tensors: Tensor | None) -> Any:
        count = len(operator.grads)
        grads: Any = tensors[:count]
        return operator.run_backward(grads, tensors[count:], wants, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.operator = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        _first_order_only(ctx.operator)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        operator, options, wants, *tensors = arguments
        function = functools.partial(operator.gradient_function.apply, operator, options, wants)
        return _mapped(operator, function, info.batch_size, in_dims[3:], tensors)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        _reverse_mode_only(ctx.operator)


def _keep(
    ctx: Any,
    operator: Operator,
    tensors: Sequence[Tensor | None],
    results: Sequence[Tensor],
    options: Any,
    outputs: Sequence[Tensor],
    save: bool = True,
) -> None:
    """Keep in ``ctx`` what the backward pass needs.

    ``outputs`` are the results that autograd is told of, each of which costs the host time. No
    zeros are made as gradients of results that nobody used.
    """
    ctx.set_materialize_grads(False)
    others = operator.not_differentiable(outputs)
    if others:
        ctx.mark_non_differentiable(*others)
    ctx.operator, ctx.options, ctx.is_first, ctx.launched = operator, options, True, False
    if save:
        ctx.save_for_backward(*operator.of_saved(tensors, results))


def _gradients_of(ctx: Any, grads: Sequence[Tensor | None], skipped: int) -> tuple[Any, ...]:
    """A gradient or None for every input; ``skipped`` arguments come before the inputs."""
    operator: Operator = ctx.operator
    upstream = operator.of_grads(grads)
    if upstream is None:
        return (None,) * len(operator.inputs)
    needed = ctx.needs_input_grad[skipped:]
    wants = operator.of_wants(needed)
    saved = ctx.saved_tensors
    if torch.is_grad_enabled() or is_transformed():
        function = operator.gradient_function
        gradients = _apply(function, operator, ctx.options, wants, *upstream, *saved)
    else:
        reuse, ctx.is_first = ctx.is_first, False
        gradients = operator.run_backward(
            upstream, saved, wants, ctx.options, reuse=reuse, launched=ctx.launched
        )
    return operator.placed(gradients, needed)


def _mapped(
    operator: Operator,
    function: Callable[..., Any],
    batch: int,
    dims: Sequence[int | None],
    tensors: Sequence[Any],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """(results of all slices of the batch, their batch dimensions: the first of each)."""
    given = list(zip(tensors, dims, strict=True))
    if operator.batched:
        results = function(
            *(t.expand(batch, *t.shape) if d is None else t.movedim(d, 0) for t, d in given)
        )
    else:
        slices = [
            function(*(t if d is None else t.select(d, i) for t, d in given)) for i in range(batch)
        ]
        results = tuple(torch.stack(parts) for parts in zip(*slices, strict=True))
    return results, (0,) * len(results)


def _first_order_only(operator: Operator) -> NoReturn:
    raise RuntimeError(
        f"tritonloss: {operator.name} is first order only: its gradient has no derivative on the "
        'Triton kernels. tritonloss.use_backend("reference") has derivatives of any order.'
    )


def _reverse_mode_only(operator: Operator) -> NoReturn:
    raise RuntimeError(
        f"tritonloss: {operator.name} has no forward-mode derivative on the Triton kernels. Use "
        "reverse mode (backward, torch.func.grad, vjp or jacrev), or "
        'tritonloss.use_backend("reference"), which has both.'
    )


def _picker(names: Sequence[str], known: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """Gives the values of ``names``, in their order, of a tuple of those of ``known``."""
    at = [known.index(name) for name in names]
    return itemgetter(*at) if len(at) > 1 else lambda values: tuple([values[i] for i in at])
