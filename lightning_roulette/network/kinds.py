"""Classes of layers that are not torch's own: affine maps on the last dimension of their input."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_Class = TypeVar("_Class", bound=type[nn.Module])


@dataclass(frozen=True)
class AffineKind:
    """How the modules of a class hold an affine map `y = W x + b` on the last dimension of their input.

    Attributes:
        kind: The class.
        weight: Name of the parameter that holds `W`, in a module.
        bias: Name of the parameter that holds `b`; None if there is none.
        transposed: Whether the weight has the shape `(inputs, outputs)` instead of `(outputs, inputs)`.
    """

    kind: type[nn.Module]
    weight: str = "weight"
    bias: str | None = "bias"
    transposed: bool = False

    def matrix(self, weight: Tensor) -> Tensor:
        """A view of a weight with the shape `(outputs, inputs)`."""
        return weight.mT if self.transposed else weight

    @property
    def argument(self) -> str:
        """Name of the first argument of the class's `forward`."""
        return next(iter(list(inspect.signature(self.kind.forward).parameters)[1:]), "input")


_registered: dict[type[nn.Module], AffineKind] = {}


@overload
def register_layer(kind: _Class, *, weight: str = ..., bias: str | None = ..., transposed: bool = ...) -> _Class: ...


@overload
def register_layer(
    kind: None = None, *, weight: str = ..., bias: str | None = ..., transposed: bool = ...
) -> Callable[[_Class], _Class]: ...


def register_layer(
    kind: Any = None, *, weight: str = "weight", bias: str | None = "bias", transposed: bool = False
) -> Any:
    """Make the weights of a class of layers prunable by default, and let a refit adapt them.

    The modules of the class must compute the affine map `y = W x + b` on the last dimension of their first argument, as
    `nn.Linear` does. They must be called, not only read. Subclasses count too; one that overrides `forward` is pruned,
    but not refitted. The class of transformers with the name `Conv1D` need not be registered.

    Call it before `fit`, in every process. A second call for the same class replaces the first.

    Args:
        kind: The class. None: return a decorator.
        weight: Name of the parameter that holds `W`.
        bias: Name of the parameter that holds `b`. None: there is no bias.
        transposed: Whether the weight has the shape `(inputs, outputs)`. `nn.Linear` has `(outputs, inputs)`.

    Returns:
        The class, or a decorator.

    Raises:
        TypeError: If `kind` is not a class of modules, or another argument has the wrong type.
        ValueError: If `kind` is a class of torch.

    Examples:
        >>> @register_layer(transposed=True)
        ... class Projection(nn.Module):
        ...     def __init__(self, inputs, outputs):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.randn(inputs, outputs))
        ...         self.bias = nn.Parameter(torch.zeros(outputs))
        ...
        ...     def forward(self, x):
        ...         return x @ self.weight + self.bias
    """
    _check_names(weight, bias, transposed)

    def register(one: _Class) -> _Class:
        _check_class(one)
        _registered[one] = AffineKind(one, weight, bias, transposed)
        return one

    return register if kind is None else register(kind)


def affine_kind_of(module: nn.Module) -> AffineKind | None:
    """How a module of a registered class, or of transformers' `Conv1D`, holds its map; None for any other module.

    Raises:
        ValueError: If the parameters of the module are not as its class was registered.
    """
    for one in type(module).__mro__:
        if (found := _registered.get(one)) is not None:
            _check_module(found, module)
            return found
        if one.__name__ == "Conv1D" and _is_transposed_linear(module):
            return AffineKind(one, transposed=True)
    return None


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module has the attributes of transformers' `Conv1D`. The package is not imported for this."""
    weight, bias, outputs = (
        module._parameters.get("weight"),
        module._parameters.get("bias"),
        getattr(module, "nf", None),
    )
    if weight is None or is_lazy(weight):
        return False
    fits = weight.dim() == 2 and weight.shape[1] == outputs
    return bool(fits and (bias is None or bias.shape == (outputs,)))


def _check_names(weight: Any, bias: Any, transposed: Any) -> None:
    if not isinstance(weight, str) or not weight:
        raise TypeError(f"weight is {weight!r}, but must be the name of a parameter.")
    if bias is not None and (not isinstance(bias, str) or not bias):
        raise TypeError(f"bias is {bias!r}, but must be the name of a parameter, or None if there is no bias.")
    if not isinstance(transposed, bool):
        raise TypeError(f"transposed is {transposed!r}, but must be True or False.")
    if weight == bias:
        raise ValueError(f"weight and bias are both {weight!r}, but must be two parameters. Pass bias=None.")


def _check_class(kind: Any) -> None:
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise TypeError(
            f"kind is {kind!r}, but must be a class derived from torch.nn.Module. Pass the class, not a module."
        )
    if kind.__module__.partition(".")[0] == "torch":
        raise ValueError(
            f"kind is torch's {kind.__name__}, but must be a class of your own. The layers of torch that are prunable "
            "by default are known already; name parameters of others with include."
        )


def _check_module(known: AffineKind, module: nn.Module) -> None:
    """Raise if a module does not hold its map as its class was registered."""
    kind = type(module).__name__
    for argument, name in (("weight", known.weight), ("bias", known.bias)):
        if name not in (None, "bias") and not hasattr(module, name):
            own = ", ".join(repr(one) for one in module._parameters) or "none"
            raise ValueError(
                f"{kind} was registered with {argument}={name!r}, but a module of this class has no attribute of this "
                f"name. Its parameters: {own}. Pass one of them to register_layer."
            )
    weight = module._parameters.get(known.weight)
    if weight is None or is_lazy(weight):
        return
    if weight.dim() != 2:
        raise ValueError(
            f"{kind} was registered with the weight {known.weight!r}, which has shape {tuple(weight.shape)}, but must "
            "be a matrix. Do not register this class; name its weight with include."
        )
    bias = module._parameters.get(known.bias or "")
    if bias is not None and bias.shape != known.matrix(weight).shape[:1]:
        raise ValueError(
            f"{kind} was registered with transposed={known.transposed}, so its weight of shape {tuple(weight.shape)} "
            f"has {known.matrix(weight).shape[0]} outputs, but its bias has shape {tuple(bias.shape)}. "
            f"Pass transposed={not known.transposed} to register_layer, or another bias."
        )
