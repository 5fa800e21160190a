"""The two packages of Lightning, `lightning.pytorch` and `pytorch_lightning`, which have equal names for other classes.

A Trainer works only with loops, connectors and modules of its own package. The files of this folder import everything
from `lightning.pytorch`, and ask here for what has the same name in the package of a Trainer. `lightning` depends on
`pytorch_lightning`, so that usually both are installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lightning.__version__ import version
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning_utilities.core import rank_zero

_T = TypeVar("_T")
_FOLDERS = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


def _minor(number: str) -> list[str]:
    return number.split(".")[:2]


def _standalone() -> Any:
    """Return the package `pytorch_lightning`; None if there is none of the version of `lightning`."""
    try:
        found = importlib.metadata.version("pytorch-lightning")
    except importlib.metadata.PackageNotFoundError:
        return None
    if _minor(found) != _minor(version):
        return None
    # both packages log and warn through this module, and the import replaces its logger and its kind of warning
    logger, category = rank_zero.log, rank_zero.rank_zero_deprecation_category
    package = importlib.import_module("pytorch_lightning")
    rank_zero.log, rank_zero.rank_zero_deprecation_category = logger, category
    return package


_STANDALONE = _standalone()

# Either Trainer asks whether a callback is of its own class, for a single callback and in a YAML file.
if TYPE_CHECKING or _STANDALONE is None:
    EitherCallback = Callback
else:
    EitherCallback = type(
        "EitherCallback", (Callback, _STANDALONE.Callback), {"__doc__": "A callback of both packages."}
    )


def refuse_foreign_trainer(trainer: Any) -> None:
    """Raise for what is not a Trainer of either package.

    Raises:
        TypeError: If it is none, or if its package has another version than `lightning`.
    """
    if isinstance(trainer, in_both(Trainer)):
        return
    package = type(trainer).__module__.split(".")[0]
    remedy = "Write `from lightning.pytorch import Trainer` (and LightningModule)"
    if package == "pytorch_lightning":
        wanted = ".".join(_minor(version))
        remedy = f"Install pytorch-lightning {wanted}, the version of lightning. Or write{remedy.removeprefix('Write')}"
    raise TypeError(
        f"the Trainer is a {type(trainer).__name__} from {package!r}, but must be from lightning.pytorch, or from "
        f"pytorch_lightning of the same version. {remedy}."
    )


def in_package_of(trainer: Trainer, thing: _T) -> _T:
    """Return the class or function with the name of `thing` in the package of a Trainer.

    Args:
        trainer: A Trainer of either package.
        thing: A class or function of `lightning.pytorch` or `lightning.fabric`.
    """
    return thing if isinstance(trainer, Trainer) else _twin(thing)


def refuse_mixed_packages(trainer: Trainer, **others: Any) -> None:
    """Raise if a module or data module is of the other package than the Trainer.

    Args:
        trainer: A Trainer of either package.
        others: Modules and data modules by the names of their arguments.

    Raises:
        TypeError: If one is of the other package.
    """
    for name, one in others.items():
        for kind in (LightningModule, LightningDataModule):
            if isinstance(one, in_both(kind)) and not isinstance(one, in_package_of(trainer, kind)):
                theirs, own = ("pytorch_lightning", "lightning.pytorch")[:: 1 if isinstance(trainer, Trainer) else -1]
                raise TypeError(
                    f"{name} is a {kind.__name__} of {theirs}, but the Trainer is of {own}. Import both from {own}."
                )


def in_both(*kinds: type[_T]) -> tuple[type[_T], ...]:
    """Return classes of `lightning.pytorch` and those with their names in `pytorch_lightning`, for `isinstance`."""
    return kinds if _STANDALONE is None else (*kinds, *(_twin(kind) for kind in kinds))


def built_for(trainer: Trainer, kind: type[_T], base: type[Any]) -> type[_T]:
    """Return a class that adds `kind` to a base class of a Trainer's package.

    Args:
        trainer: A Trainer of either package.
        kind: What is added. It has no base class of Lightning itself.
        base: The base class in `lightning.pytorch`.
    """
    return cast("type[_T]", _joined(cast("Any", kind), cast("Any", in_package_of(trainer, base))))


def _twin(thing: _T) -> _T:
    named = cast("Any", thing)
    folder = ".".join(named.__module__.split(".")[:2])
    module = importlib.import_module(named.__module__.replace(folder, _FOLDERS[folder], 1))
    return cast("_T", getattr(module, named.__qualname__))


@functools.cache
def _joined(kind: Any, base: Any) -> Any:
    parts = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce_ex__": _reduced}
    return type(kind.__name__, (kind, base), parts)


def _reduced(made: Any, protocol: int) -> tuple[Any, ...]:
    """Return how an object of a joined class is pickled. Its class has no name of its own in any module."""
    return _blank, type(made).__bases__, vars(made)


def _blank(kind: Any, base: Any) -> Any:
    joined = _joined(kind, base)
    return joined.__new__(joined)
