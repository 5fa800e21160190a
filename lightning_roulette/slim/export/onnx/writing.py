"""`export(..., format="onnx")`: a file for any runtime that reads ONNX, without the dead units of the network."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.network.calling import caller_of
from lightning_roulette.network.containers import rebuilt
from lightning_roulette.network.coupling.check import outputs_of
from lightning_roulette.slim.export.exported import Exported, StoredLayer
from lightning_roulette.slim.export.onnx.model import Session, to_onnx
from lightning_roulette.slim.files.container import write_whole
from lightning_roulette.slim.measuring.timing import Latency, latencies
from lightning_roulette.slim.removal.examples import inputs_like, is_close
from lightning_roulette.slim.removal.removal import DeadCount, removal_of

_CLOSE = 1e-4  # allowed difference from the network, relative to the larger of one and the largest output


def write(model: nn.Module, path: Path, *, example_input: Any, removal: bool = True) -> Exported:
    """Write a network as an ONNX file, in floating point.

    Args:
        model: The network. It is not changed.
        path: Where.
        example_input: What its forward is called with: a tensor, a tuple of tensors, or a mapping of named tensors,
            with at least one sample.
        removal: Whether to remove dead units first, as `remove_dead` does, which needs the extra `units`.

    Raises:
        ImportError: If a package is missing; the message names the extra.
        TypeError: If `example_input` is none of these.
        ValueError: In one of these cases:

            - The exporter has no counterpart for a part of the network.
            - The outputs of the file differ from those of the network by more than 1e-4, relative to the larger of one
              and the largest output, on the example or on random inputs like it. Whole numbers must be equal, and
              the same numbers must be finite.
    """
    whole, example = copy.deepcopy(model).cpu().eval(), _on_cpu(example_input)
    count, slim = None, whole
    if removal:
        found = removal_of(whole, example)
        count, slim = found.count, found.model
    files = [to_onnx(one, example) for one in ([whole] if slim is whole else [whole, slim])]
    file = files[-1]
    session = Session(file)
    for given in inputs_like(whole, example):
        _check(outputs_of(caller_of(whole, given)(None)), session.outputs(_tensors(given)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda opened: opened.write(file))
    before, after = _times([Session(one) for one in files], _tensors(example))
    return Exported(
        format="onnx",
        values=_type_of(slim),
        files=(path,),
        flash=len(file),
        dense_flash=len(files[0]),
        ram=None,
        layers=tuple(_layers(whole, slim)),
        run=session,
        latency=after,
        dense_latency=before,
        notes=_notes(count, session, _tensors(example)),
    )


def _on_cpu(example_input: Any) -> Any:
    """An example with two samples at least, as the exporter takes a single one for a fixed size."""
    given = rebuilt(example_input, copies=True)
    if isinstance(given, Mapping):
        return {name: _doubled(one) for name, one in given.items()}
    return _doubled(given) if isinstance(given, Tensor) else tuple(_doubled(one) for one in given)


def _doubled(one: Any) -> Any:
    if not isinstance(one, Tensor):
        return one
    one = one.detach().cpu()
    return torch.cat([one, one]) if one.dim() and len(one) == 1 else one


def _tensors(given: Any) -> tuple[Tensor, ...]:
    if isinstance(given, Tensor):
        return (given,)
    return tuple(one for one in (given.values() if isinstance(given, Mapping) else given) if isinstance(one, Tensor))


def _type_of(network: nn.Module) -> str:
    """Return the type of the weights, such as "float32"."""
    types = dict.fromkeys(str(one.dtype).removeprefix("torch.") for one in network.parameters())
    return " and ".join(types) or "float32"


def _check(expected: list[Tensor], found: list[Tensor]) -> None:
    if len(found) != len(expected):
        raise ValueError(
            f"The file has {len(found)} outputs, but the network returns {len(expected)} tensors. The file was not "
            "written. Return a tensor, or a tuple or mapping of tensors."
        )
    for one, other in zip(expected, found, strict=True):
        if not is_close(one, other.to(one.dtype), _CLOSE):
            difference = float((one.double() - other).abs().max()) if one.shape == other.shape else float("nan")
            raise ValueError(
                f"onnxruntime computes outputs that differ from those of the network by {difference:g}. The file was "
                "not written. Export the network with torch.onnx.export, and look for the part that differs."
            )


def _times(sessions: list[Session], inputs: tuple[Tensor, ...]) -> tuple[Latency, Latency]:
    times = latencies({str(place): partial(one.outputs, inputs) for place, one in enumerate(sessions)})
    return times["0"], times[str(len(sessions) - 1)]


def _layers(whole: nn.Module, slim: nn.Module) -> list[StoredLayer]:
    dense = dict(whole.named_parameters())
    return [
        StoredLayer(name, tuple(one.shape), int(one.count_nonzero()), "dense", one.nbytes, dense[name].nbytes)
        for name, one in slim.named_parameters()
        if one.dim() > 1
    ]


def _notes(count: DeadCount | None, session: Session, inputs: tuple[Tensor, ...]) -> tuple[str, ...]:
    removed = [one for one in count.groups if one.dead] if count is not None else []
    listed = ", ".join(f"{one.dead:,} of {one.units:,} units of {one.name}" for one in removed)
    found = [f"Removed, as nothing reads them or they are constant: {listed}."] if listed else []
    if not session.takes(tuple(torch.cat([one, one[:1]]) for one in inputs)):
        found.append(f"It takes batches of {len(inputs[0])} samples only, as the network is written for this size.")
    return (*found, "ONNX stores zeros like other weights: those that are left gain nothing.")
