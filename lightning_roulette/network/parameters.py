"""The prunable parameters of a module, and the reasons why the others are not prunable."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from lightning_roulette.checks import check_words
from lightning_roulette.network.kinds import affine_kind_of
from lightning_roulette.network.ties import Tie, shared_with_buffers, ties_of

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LINEAR_MAPS = (nn.Linear, *CONVOLUTIONS)  # each output is computed from one row of the weight
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

Patterns = Sequence[str]


def prunable_parameters(
    module: nn.Module, *, include: Patterns | None = None, exclude: Patterns | None = None
) -> dict[str, nn.Parameter]:
    """The parameters whose weights may be pruned, by their names in `module.named_parameters()`.

    By default these are the weights of

    - Linear, Conv1d to Conv3d and their transposed forms,
    - attention projections,
    - recurrent layers,
    - transformers' `Conv1D`, and layers of your own that `register_layer` names.

    The following are never prunable by default:

    - biases, normalisation layers, embeddings and weights tied to an embedding,
    - frozen parameters.

    The following are never prunable, even if `include` names them:

    - quantised, complex, parametrised, lazy, meta or empty parameters,
    - parameters of networks inside metrics,
    - parameters that share a part of their memory with another parameter.

    A tied weight is listed once, under its first name. Different parameters over the same memory, such as a weight and
    its transpose, are tied too: the first that covers the others is listed.

    Args:
        module: Any module.
        include: Glob patterns over parameter names that replace the default choice.
        exclude: Glob patterns over parameter names to leave out.

    Returns:
        Name to parameter, in the module's order.

    Raises:
        TypeError: If `include` or `exclude` is not a list of patterns.
        ValueError: If a pattern matches no parameter, or a layer is not as its class was registered.

    Examples:
        >>> list(prunable_parameters(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1)), exclude=["2.*"]))
        ['0.weight']
    """
    parameters, reasons = dict(module.named_parameters()), _reasons(module, include, exclude)
    return {name: parameters[name] for name in parameters if reasons[name] is None}


def skipped_parameters(
    module: nn.Module, *, include: Patterns | None = None, exclude: Patterns | None = None
) -> dict[str, str]:
    """The parameters that `prunable_parameters` leaves out.

    A search also leaves out weights that validation does not use, which is known only after training.

    Args:
        module: Any module.
        include: Glob patterns over parameter names that replace the default choice.
        exclude: Glob patterns over parameter names to leave out.

    Returns:
        Name to the reason why the parameter is left out.

    Raises:
        TypeError: If `include` or `exclude` is not a list of patterns.
        ValueError: If a pattern matches no parameter, or a layer is not as its class was registered.
    """
    return {n: reason for n, reason in _reasons(module, include, exclude).items() if reason is not None}


def aliases(module: nn.Module) -> dict[str, list[str]]:
    """All names of every parameter, by its first name. A tied parameter has several names."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    names: dict[str, list[str]] = {name: [] for name in first.values()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[first[id(parameter)]].append(name)
    return names


def parameters_like(module: nn.Module, patterns: Patterns, argument: str) -> set[str]:
    """All names of the parameters that glob patterns match.

    Args:
        module: Any module.
        patterns: Glob patterns over parameter names.
        argument: The argument that has the patterns, for the error.

    Raises:
        TypeError: If `patterns` is not a list of patterns.
        ValueError: If a pattern matches no parameter.
    """
    names = aliases(module)
    _check_patterns(argument, patterns, names)
    return {alias for each in names.values() if _matches(each, patterns) for alias in each}


def has_lazy_parameters(module: nn.Module) -> bool:
    """Whether a parameter has no shape before the first forward."""
    return any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters())


def _reasons(module: nn.Module, include: Patterns | None, exclude: Patterns | None) -> dict[str, str | None]:
    """The reason why each parameter is not prunable, by name; None if it is prunable. Tied ones are listed once."""
    parameters, names = dict(module.named_parameters()), aliases(module)
    _check_patterns("include", include, names)
    _check_patterns("exclude", exclude, names)
    owners = owners_of(module)
    inside_metrics = {id(one) for part in parts_of_metrics(module) for one in part.parameters(recurse=False)}
    ties = {name: tie for tie in ties_of(module) for name in tie.names}
    in_buffers = shared_with_buffers(module)

    def reason(name: str) -> str | None:
        tie = ties.get(name, Tie((name,), name))
        if tie.whole != name:
            return _tied(name, tie)
        ours = [parameters[one] for one in tie.names]
        if any(id(one) in inside_metrics for one in ours):
            return "belongs to a metric"
        if name in in_buffers:
            return f"shares memory with the buffer {in_buffers[name]}"
        unfit = (_unfit(one, *owners[own]) for one, own in zip(ours, tie.names, strict=True))
        if (why := next(filter(None, unfit), None)) is not None:
            return why
        known = [alias for one in tie.names for alias in names[one]]
        if exclude is not None and _matches(known, exclude):
            return "excluded"
        if include is not None:
            return None if _matches(known, include) else "not included"
        if not all(one.requires_grad for one in ours):
            return "frozen"
        return next(filter(None, (_kind(*owners[alias]) for alias in known)), None)

    return {name: reason(name) for name in parameters}


def _tied(name: str, tie: Tie) -> str:
    """The reason why a parameter that shares memory with others is not prunable itself."""
    if tie.whole is not None:
        return f"tied to {tie.whole}"
    return f"shares a part of its memory with {next(one for one in tie.names if one != name)}"


def _unfit(parameter: nn.Parameter, owner: nn.Module, own: str) -> str | None:
    """The reason why a parameter is not prunable even if `include` names it."""
    checks = (
        (isinstance(parameter, UninitializedParameter), "lazy: it has no shape yet"),
        (parameter.is_meta, "on the meta device: it has no values"),
        (isinstance(owner, parametrize.ParametrizationList), "parametrised: another tensor is computed from it"),
        (
            _is_source(owner, own),
            "torch computes another tensor from it: remove prune, weight_norm or spectral_norm",
        ),
        (parameter.dtype not in _DTYPES, "quantised or complex"),
    )
    found = next((why for holds, why in checks if holds), None)
    return "empty" if found is None and parameter.numel() == 0 else found


def _is_source(owner: nn.Module, own: str) -> bool:
    """Whether a hook of an older torch utility computes an attribute of the owner from this parameter."""
    stems = [own.removesuffix(tail) for tail in ("_orig", "_g", "_v") if own.endswith(tail)]
    return any(stem not in owner._parameters and hasattr(owner, stem) for stem in stems)


def owners_of(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The owner of every parameter and its name in the owner, by every name of the parameter."""
    return {
        f"{prefix}.{own}" if prefix else own: (owner, own)
        for prefix, owner in module.named_modules(remove_duplicate=False)
        for own, parameter in owner._parameters.items()
        if parameter is not None
    }


def _kind(owner: nn.Module, own: str) -> str | None:
    """None if the owner makes the parameter prunable by default, else a description of the parameter."""
    weight = own == "weight" and isinstance(owner, (*LINEAR_MAPS, *TRANSPOSED))
    projection = own in _ATTENTION_PROJECTIONS and isinstance(owner, nn.MultiheadAttention)
    recurrent = own.startswith("weight_") and isinstance(owner, nn.RNNBase | nn.RNNCellBase)
    affine = (kind := affine_kind_of(owner)) is not None and own == kind.weight
    return None if weight or projection or recurrent or affine else f"{own} of {type(owner).__name__}"


def parts_of_metrics(module: nn.Module) -> set[nn.Module]:
    """All modules inside the torchmetrics objects of a module."""
    # torchmetrics is not imported here: if it is not loaded, there is no metric
    metric = getattr(sys.modules.get("torchmetrics"), "Metric", None)
    metrics = [part for part in module.modules() if metric is not None and isinstance(part, metric)]
    return {part for one in metrics for part in one.modules()}


def _matches(names: Sequence[str], patterns: Patterns) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_patterns(argument: str, patterns: Patterns | None, names: dict[str, list[str]]) -> None:
    if patterns is not None:
        check_words(argument, patterns, "patterns over parameter names")
    everything = [alias for each in names.values() for alias in each]
    for pattern in patterns or ():
        if not _matches(everything, [pattern]):
            raise ValueError(
                f"{argument} has the pattern {pattern!r}, which matches no parameter name. "
                f"Names like it: {', '.join(_closest(pattern, everything)) or 'none'}."
            )


def _closest(pattern: str, names: Sequence[str]) -> Iterator[str]:
    close = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3) or names[:5]
    return (repr(name) for name in close)
