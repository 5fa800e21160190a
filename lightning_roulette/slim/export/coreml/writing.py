"""`export(..., format="coreml")`: a package for Apple's devices, with sparse weights and without dead units."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_roulette.checks import check_choice
from lightning_roulette.network.containers import rebuilt
from lightning_roulette.slim.export.coreml.extra import imported
from lightning_roulette.slim.export.coreml.model import BITS, save, to_model, with_sparse_weights
from lightning_roulette.slim.export.coreml.reading import Stored, bytes_of, weights_of
from lightning_roulette.slim.export.exported import Exported, StoredLayer
from lightning_roulette.slim.removal.removal import DeadCount, removal_of

SUFFIX = ".mlpackage"
Values = Literal["float32", "float16"]


def write(
    model: nn.Module, path: Path, *, example_input: Any, removal: bool = True, values: Values = "float32"
) -> Exported:
    """Write a network as a package of Core ML for inputs of the example's shapes.

    Args:
        model: The network. It is not changed. Its copy is converted in float32, whatever type it has.
        path: Where. A package is a folder whose name ends in .mlpackage. One that is there is replaced.
        example_input: What its forward is called with: a tensor, a tuple of tensors, or a mapping of named tensors.
        removal: Whether to remove dead units first, as `remove_dead` does, which needs the extra `units`.
        values: Type of weights and values: "float32", or "float16", which Apple's Neural Engine needs.

    Raises:
        ImportError: If a package is missing; the message names the extra.
        TypeError: If `example_input` is none of these.
        ValueError: In one of these cases:

            - `path` does not end in .mlpackage, or is not a package; or `values` is unknown.
            - The network has numbers that are too large for `values`.
            - PyTorch's exporter or coremltools has no counterpart for a part of the network.
            - The sparse weights that are read back from the package are not the dense ones.
    """
    check_choice("values", values, tuple(BITS))
    _check_path(path)
    _check_range(model, values)
    imported("coremltools")
    whole, example = copy.deepcopy(model).cpu().float().eval(), _in_float32(example_input)
    found = removal_of(whole, example) if removal else None
    slim = whole if found is None else found.model
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        dense, first, sparse = (Path(folder) / f"{name}{SUFFIX}" for name in ("dense", "first", "sparse"))
        save(program := to_model(slim, example, values), dense)
        save(program if slim is whole else to_model(whole, example, values), first)
        save(with_sparse_weights(program, values), sparse)
        weights, sizes = weights_of(sparse), (bytes_of(sparse), bytes_of(dense), bytes_of(first))
        _check(weights, weights_of(dense))
        if path.exists():
            shutil.rmtree(path)
        shutil.move(sparse, path)
    names = _names(weights, slim, values)
    return Exported(
        format="coreml",
        values=values,
        files=(path,),
        flash=sizes[0],
        dense_flash=sizes[2],
        ram=None,
        layers=tuple(_layer(one, names) for one in weights.values() if one.values.ndim > 1),
        run=_not_here,
        notes=_notes(None if found is None else found.count, sizes, len(weights) - len(names)),
    )


def _check_range(model: nn.Module, values: Values) -> None:
    """Check that the type of the package holds all numbers of a network."""
    most = torch.finfo(getattr(torch, values)).max
    for name, one in model.state_dict().items():
        if isinstance(one, Tensor) and one.is_floating_point() and bool((one.isfinite() & (one.abs() > most)).any()):
            raise ValueError(f"{name} has numbers above {most:g}, the limit of {values}. Pass values='float32'.")


def _check_path(path: Path) -> None:
    if path.suffix != SUFFIX:
        raise ValueError(f"path is {str(path)!r}, but the name of a package of Core ML must end in {SUFFIX}.")
    if path.exists() and not (path / "Manifest.json").is_file():
        raise ValueError(f"path is {str(path)!r}, which exists and is no package of Core ML. Choose another path.")


def _in_float32(example_input: Any) -> Any:
    """Return an example on the CPU, whose floating-point numbers have the type that the network is converted in."""
    given = rebuilt(example_input, copies=True)
    if isinstance(given, Mapping):
        return {name: _plain(one) for name, one in given.items()}
    return _plain(given) if isinstance(given, Tensor) else tuple(_plain(one) for one in given)


def _plain(one: Any) -> Any:
    if not isinstance(one, Tensor):
        return one
    return one.detach().to("cpu", torch.float32 if one.is_floating_point() else one.dtype)


def _check(found: Mapping[str, Stored], dense: Mapping[str, Stored]) -> None:
    wrong = [one for one in dense if one not in found or not np.array_equal(found[one].values, dense[one].values)]
    if wrong:
        raise ValueError(
            f"The sparse weights {', '.join(wrong)} of the package are not the dense ones. Nothing was written. "
            "Convert the network with coremltools, and look for the part that differs."
        )


def _names(found: Mapping[str, Stored], network: nn.Module, values: Values) -> dict[str, str]:
    """Return names of weights in the network, by those in the package. Weights that differ in a bit are left out."""
    kind = torch.float16 if values == "float16" else torch.float32
    known: dict[bytes, str] = {}
    for name, weight in network.named_parameters():
        stored = weight.detach().to(kind)
        for one in (stored, stored.movedim(0, -1)):  # coremltools may transpose a matrix
            known.setdefault(_bits(one.contiguous().numpy()), name)
    by_bits = {name: known.get(_bits(one.values)) for name, one in found.items()}
    return {name: inside for name, inside in by_bits.items() if inside is not None}


def _bits(weight: NDArray[Any]) -> bytes:
    """Return the bits of a tensor, in which every zero is positive."""
    return bytes((weight + 0.0).tobytes())


def _layer(one: Stored, names: Mapping[str, str]) -> StoredLayer:
    survivors, shape = int(np.count_nonzero(one.values)), one.values.shape
    return StoredLayer(names.get(one.name, one.name), shape, survivors, one.form, one.stored, one.values.nbytes)


def _notes(count: DeadCount | None, sizes: tuple[int, int, int], unnamed: int) -> tuple[str, ...]:
    removed = [one for one in count.groups if one.dead] if count is not None else []
    listed = ", ".join(f"{one.dead:,} of {one.units:,} units of {one.name}" for one in removed)
    found = [f"Removed, as nothing reads them or they are constant: {listed}."] if listed else []
    if listed:
        found.append(f"With all zeros and without dead units the package has {sizes[1]:,} bytes.")
    if unnamed:
        found.append(
            f"{unnamed:,} of its tensors are no weights of the network: coremltools computed them, for example from "
            "those of a convolution and its batch normalisation."
        )
    found.append("The weights were read back from the package. It was not run: Core ML is on Apple's systems only.")
    return tuple(found)


def _not_here(*inputs: Tensor) -> Tensor:
    raise RuntimeError(
        "A package of Core ML is not run here. Load it on macOS with coremltools.models.MLModel, or in an app."
    )
