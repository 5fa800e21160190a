"""What a command line and its configurations say about the classes and the checkpoint, before they are parsed."""

from __future__ import annotations

import inspect
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

PARTS = ("model", "data")


@dataclass(frozen=True)
class Given:
    """A command line, and what is needed to parse it.

    Attributes:
        args: The command line.
        classes: Import path of the class of the module ("model") and of the data module ("data"), where one is given.
        hyperparameters: Those in the checkpoint.
        nameless: Parts whose arguments are in a configuration, but whose class is given nowhere.
    """

    args: Sequence[str]
    classes: dict[str, str]
    hyperparameters: dict[str, Any]
    nameless: tuple[str, ...]

    @classmethod
    def on(cls, args: Sequence[str]) -> Given:
        """Return what a command line gives."""
        given, _ = _scout().parse_known_args(args)
        configs = [_in_yaml(path) for path in given.config]
        config = {name: one for each in configs for name, one in each.items()}
        path = given.ckpt_path or config.get("ckpt_path")
        hyperparameters = _hyperparameters_in(path, str(given.weights_only).lower() != "false") if path else {}
        classes, nameless = {}, []
        for part in PARTS:
            section = _section(part, configs)
            saved = hyperparameters.get("_class_path") if part == "model" else None
            found = getattr(given, part) or section.get("class_path") or saved
            if found:
                classes[part] = found
            elif section and not any(one.startswith(f"--{part}") for one in args):
                nameless.append(part)
        return cls(args, classes, hyperparameters, tuple(nameless))

    @property
    def in_order(self) -> list[str]:
        """The command line, with the classes first: a configuration may have the arguments without the class.

        The hyperparameters of the checkpoint come with the class. All that follows overrides them.
        """
        first = []
        for part, path in self.classes.items():
            known = _arguments_of(path) if part == "model" else set()
            arguments = {name: one for name, one in self.hyperparameters.items() if name in known and _is_plain(one)}
            section = yaml.safe_dump({"class_path": path, "init_args": arguments}, default_flow_style=True, width=10**6)
            first += [f"--{part}", section.strip() if arguments else path]
        return [*first, *self.args]


def _scout() -> ArgumentParser:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    for name in (*PARTS, "ckpt_path", "weights_only"):
        parser.add_argument(f"--{name}")
    return parser


def _in_yaml(path: str) -> dict[str, Any]:
    """Return what is in a configuration; nothing if it cannot be read, which its parser says better."""
    try:
        found = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _section(part: str, configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what configurations say of a part. A later one may name some arguments alone, or the class alone."""
    found: dict[str, Any] = {}
    for one in (config[part] for config in configs if part in config):
        found |= {"class_path": one} if isinstance(one, str) else one if isinstance(one, dict) else {}
    return found


def _hyperparameters_in(path: str, weights_only: bool) -> dict[str, Any]:
    """Return the hyperparameters in a checkpoint; none if it cannot be read, which is said where it is loaded."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    except Exception:
        return {}
    if not isinstance(contents, dict) or contents.get("hparams_name") not in (None, "kwargs"):
        return {}
    found = contents.get("hyper_parameters")
    return dict(found) if isinstance(found, dict) else {}


def _arguments_of(path: str) -> set[str]:
    """Return the names of the arguments of a class, those that it hands on by `**kwargs` included."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return set()
    return set(_names(found))


def _names(found: type) -> Iterator[str]:
    for one in inspect.getmro(found):
        if "__init__" in vars(one):
            parameters = inspect.signature(one.__init__).parameters.values()  # type: ignore[misc]
            yield from (each.name for each in parameters)
            if not any(each.kind is each.VAR_KEYWORD for each in parameters):
                return


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(one) for name, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return type(value) in (bool, int, float, str, type(None))
