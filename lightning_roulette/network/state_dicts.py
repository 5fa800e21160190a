"""Finding a state dict in the contents of a file, and loading it into a module under the names that the module has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightning_roulette.network.lending import copy_into, named_tensors
from lightning_roulette.report.names import shortened

_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")


class WrongStateDict(Exception):
    """There is no state dict, or it does not fit the module; the message is the reason."""


def state_dict_in(contents: Any) -> dict[str, Tensor]:
    """Return the state dict in the contents of a file.

    Args:
        contents: A state dict, or a mapping that holds one under one of the keys `state_dict`, `model_state_dict`,
            `model`, `module`, `net`, `network` and `weights`.

    Raises:
        WrongStateDict: If there is none.
    """
    save = "Save the weights alone: torch.save(module.state_dict(), path)."
    if not isinstance(contents, Mapping):
        raise WrongStateDict(f"it holds an object of the class {type(contents).__name__}, and no state dict. {save}")
    # inner ones first, as some numbers beside them may be tensors
    for found in (*(contents[key] for key in _KEYS if key in contents), contents):
        if _is_state_dict(found):
            return dict(found)
    keys = ", ".join(sorted(map(repr, contents))[:8]) or "none"
    raise WrongStateDict(f"it holds no state dict. Its keys are: {keys}. {save}")


def load_under_its_names(
    module: nn.Module,
    state: Mapping[str, Tensor],
    load: Callable[[Mapping[str, Tensor], bool], object],
    strict: bool = True,
) -> str:
    """Load a state dict into a module. If its names do not fit, other prefixes of the names are tried.

    If the names or the shapes do not fit, the module has its old values back.

    Args:
        module: The module.
        state: Name to tensor.
        load: Loads a state dict into the module. The second argument says whether all names must fit; then a
            RuntimeError is raised if one does not.
        strict: Whether all names must fit.

    Returns:
        A sentence on other names and on what was not loaded; empty if everything was loaded under its own name.

    Raises:
        WrongStateDict: If it does not fit. The message names what is missing, unexpected and of another shape.
    """
    names = set(module.state_dict())
    before = {name: one.detach().clone() for name, one in named_tensors(module).items() if not _is_lazy(one)}
    try:
        load(state, strict)
        if strict or not names.isdisjoint(state):
            return _said_of(names, state) if not strict else ""
        refused = "none of its names is a name in the module"
    except RuntimeError as error:  # torch raises it for names and for shapes, after it has loaded what fits
        refused = str(error)
    _give_back(module, before)
    prefixed = [pair for pair in _prefixed(state, names) if not strict or not _matrices_beside(module, pair[0])]
    if len(prefixed) == 1 and not _of_other_shapes(module, prefixed[0][0]):
        renamed, how = prefixed[0]
        load(renamed, False)
        return f"{how} {_said_of(names, renamed)}".strip()
    raise WrongStateDict(_why_not(module, state, names, [how for _, how in prefixed], refused))


def _is_state_dict(found: Any) -> bool:
    """Whether these are tensors by name. A state dict may hold some other values, such as extra states."""
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        return False
    return 2 * sum(isinstance(one, Tensor) for one in found.values()) > len(found)


def _is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, UninitializedParameter | UninitializedBuffer)


def _give_back(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    now = named_tensors(module)
    copy_into({name: now[name] for name in before}, before)


def _prefixed(state: Mapping[str, Tensor], names: Collection[str]) -> Iterator[tuple[dict[str, Tensor], str]]:
    """Yield the state dict with another prefix before all names, if the module then has all of them; each once."""
    found: list[Collection[str]] = []
    for removed in _shared_prefixes(state):
        short = {name[len(removed) :]: one for name, one in state.items()}
        first = next(iter(short))
        for added in sorted(name.removesuffix(first) for name in names if name.endswith(first)):
            if added == removed or (added and not added.endswith(".")):
                continue
            renamed = {f"{added}{name}": one for name, one in short.items()}
            inside = {name for name in names if name.startswith(added)}
            if renamed.keys() == inside and inside not in found:
                found.append(inside)
                yield renamed, f"Its names were read {_instead(removed, added)}."


def _matrices_beside(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Return the weights in matrices that a state dict lacks. With any, it is that of a part of the network."""
    return [name for name, one in module.named_parameters() if name not in state and (_is_lazy(one) or one.dim() > 1)]


def _shared_prefixes(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the prefixes that all names share, each ending with a dot; the empty prefix first."""
    yield ""
    parts = [name.split(".")[:-1] for name in state]
    shared = ""
    for ones in zip(*parts, strict=False):
        if len(set(ones)) > 1:
            return
        shared += f"{ones[0]}."
        yield shared


def _instead(removed: str, added: str) -> str:
    if removed and added:
        return f"with {added!r} instead of {removed!r} before them"
    return f"with {added!r} before them" if added else f"without {removed!r} before them"


def _of_other_shapes(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    ours = module.state_dict()
    return [
        f"{name} (file {tuple(one.shape)}, module {tuple(ours[name].shape)})"
        for name, one in state.items()
        if isinstance(one, Tensor)
        and isinstance(ours.get(name), Tensor)
        and not _is_lazy(ours[name])
        and one.shape != ours[name].shape
    ]


def _said_of(names: Collection[str], loaded: Mapping[str, Tensor]) -> str:
    """Return a sentence about names that were not loaded, or that the module lacks."""
    kept, unknown = sorted(set(names) - loaded.keys()), sorted(loaded.keys() - set(names))
    said = [f"It does not hold {shortened(kept)}, which the module keeps as they were."] if kept else []
    if unknown:
        said.append(f"The module has no {shortened(unknown)}.")
    return " ".join(said)


def _why_not(
    module: nn.Module, state: Mapping[str, Tensor], names: Collection[str], prefixed: list[str], refused: str
) -> str:
    if len(prefixed) > 1:
        return f"its names fit several parts of the module. {' Or: '.join(prefixed)} Save them with the full names"
    missing, unknown = sorted(set(names) - state.keys()), sorted(state.keys() - set(names))
    other = _of_other_shapes(module, state)
    parts = [f"{len(missing)} of the module's names are missing ({shortened(missing)})"] if missing else []
    parts += [f"{len(unknown)} names are unknown to the module ({shortened(unknown)})"] if unknown else []
    parts += [f"the shapes of {len(other)} tensors differ: {', '.join(other[:3])}"] if other else []
    return "; ".join(parts) or refused.rstrip(".")
