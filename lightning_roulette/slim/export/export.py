"""`export`: from a trained network to files for a device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_roulette.checks import check_choice
from lightning_roulette.network.coupling.graph import tensors_in
from lightning_roulette.network.modes import evaluating
from lightning_roulette.slim.export.exported import Exported, FormatScores
from lightning_roulette.slim.export.idle import slimmed
from lightning_roulette.slim.export.operations import Program, Weighted
from lightning_roulette.slim.export.reference import finish, run
from lightning_roulette.slim.export.scoring import accuracy, scores
from lightning_roulette.slim.export.trace import trace

# each module has a function `write(program, path, *, calibration, ...)` that returns an Exported
FORMATS = {
    "c": "lightning_roulette.slim.export.c.writing",
    "tflm": "lightning_roulette.slim.export.tflm.writing",
    "executorch": "lightning_roulette.slim.export.executorch.writing",
}
# each has a function `write(model, path, *, example_input, ...)`, as it takes networks of any kind
NETWORK_FORMATS = {
    "onnx": "lightning_roulette.slim.export.onnx.writing",
    "coreml": "lightning_roulette.slim.export.coreml.writing",
}
_UNSCORED = ("coreml",)  # their files are not run here
_ROWS = 4096  # calibration inputs that are used at most
_GIVEN = ("program", "model", "path", "calibration", "example_input")


def export(
    model: nn.Module,
    path: str | PathLike[str],
    format: str,
    *,
    example_input: Any,
    calibration: Tensor | Iterable[Any] | None = None,
    validation: tuple[Tensor, Tensor] | Iterable[Any] | None = None,
    score: Callable[[Tensor, Tensor], float] = accuracy,
    **options: Any,
) -> Exported:
    """Write a trained network as files for a device, and return what they take there.

    The network is written in evaluation mode. Dead units are removed first. What a format cannot express is named
    before anything is written.

    `"c"`, `"tflm"` and `"executorch"` trace the network by `torch.export`. They know chains and residual networks of
    linear layers, convolutions, batch normalisations, ReLU, pooling and sums, with one tensor as input and one as
    output. `"onnx"` and `"coreml"` convert networks of any kind.

    Args:
        model: The network. It is not changed.
        path: Where to write.
        format: One of these:

            - `"c"`: C99 without dependencies, a source and a header. For devices without a runtime. Option:
              `values="int8"` (default; 8-bit integers as TensorFlow Lite defines them) or `values="float32"`.
            - `"tflm"`: a file for TensorFlow Lite Micro, in 8-bit integers; the device decodes pruned weights into
              memory. Use it where that runtime is on the device. Option: `max_ram`, the largest arena in bytes. Needs
              the extra `tflm`.
            - `"executorch"`: a .pte file for ExecuTorch, PyTorch's runtime for phones, through XNNPACK. Zeros gain
              nothing there, except in the package of an app, which is compressed. Option: `values="float32"` (default)
              or `values="int8"`. Needs the extra `executorch`.
            - `"onnx"`: a file for onnxruntime and others, by PyTorch's exporter, in floating point. Use it for networks
              of any kind. Dead units are removed first (option `removal=True`), and the file is checked with
              onnxruntime, which also times it. Needs the extra `onnx`.
            - `"coreml"`: a package for macOS 13, iOS 16 and later, of networks of any kind. Pruned weights are stored
              as a bit mask and values. It is not run here. Options: `values="float32"` (default) or
              `values="float16"`; `removal=True`. Needs the extra `coreml`.

        example_input: Inputs of any number, shape `(n, ...)`. For `"onnx"` and `"coreml"` also a tuple or a mapping of
            tensors.
        calibration: Some hundred inputs as in use, from which the ranges of 8-bit integers are found: a tensor, or
            batches of which the first entry is the input, such as a loader of training data. `values="int8"` and
            `"tflm"` need it. Do not pass validation data, so that it can judge.
        validation: Inputs and targets, or batches of both, which are read once. The network and what the device
            computes are scored on it. `"coreml"` refuses it.
        score: Scores outputs of the network against targets. Accuracy by default, which needs targets that are
            classes. A softmax or sigmoid at the end, which the device leaves out, is applied to its outputs first.
        **options: Options of the format.

    Returns:
        The sizes of the files in bytes, how each layer is stored, and times and scores where they are known. `print`
        shows them as a table.

    Raises:
        ImportError: If the extra of the format is not installed.
        TypeError: If an argument has the wrong type, or if the format does not have an option.
        ValueError: If an argument is not allowed, or if the network cannot be expressed.
    """
    check_choice("format", format, (*FORMATS, *NETWORK_FORMATS))
    write = import_module((FORMATS | NETWORK_FORMATS)[format]).write
    _check_options(format, write, options)
    if format in _UNSCORED and validation is not None:
        raise ValueError(
            f"validation was given, but files of format={format!r} are not run here, so they cannot be scored. Leave "
            "validation out, and score the file on the device."
        )
    exported: Exported
    if format in NETWORK_FORMATS:
        exported = write(model, Path(path), example_input=example_input, **options)
        return exported if validation is None else _scored(exported, model, example_input, validation, score)
    whole = trace(model, example_input)
    program = slimmed(whole, example_input.cpu())
    inputs = None if calibration is None else _inputs(calibration, program.input.shape)
    exported = write(program, Path(path), calibration=inputs, **options)
    exported = replace(exported, notes=(*_removed(whole, program), *exported.notes))
    if validation is None:
        return exported
    network, device = scores(_runs(whole, exported, score), validation, score, program.input.shape)
    return replace(exported, scores=FormatScores(network, device))


def _scored(
    exported: Exported, model: nn.Module, example: Any, validation: Any, score: Callable[..., float]
) -> Exported:
    """Return what was written with the scores of a network with one input, and of its file."""
    if not isinstance(example, Tensor):
        raise TypeError(
            f"validation was given, but example_input is a {type(example).__name__}. Networks are scored if they take "
            "one tensor. Leave validation out, and run the file that was written with onnxruntime."
        )
    with evaluating(model), torch.no_grad():
        found = scores([lambda x: _first(model(x)), exported.run], validation, score, tuple(example.shape[1:]))
    return replace(exported, scores=FormatScores(*found))


def _first(output: Any) -> Tensor:
    """Return the first tensor that a network returns, as the first output of its file is."""
    return tensors_in(output)[0]


def _runs(whole: Program, exported: Exported, score: Callable[..., float]) -> list[Callable[[Tensor], Tensor]]:
    """Return what computes the outputs that are scored: of the network, and of the device."""
    final = None if score is accuracy else whole.final  # accuracy needs no more than which output is largest
    return [lambda x: finish(run(whole, x), final), lambda x: finish(exported.run(x), final)]


def _removed(whole: Program, slim: Program) -> tuple[str, ...]:
    """Return a sentence about the outputs that were removed, if any were."""
    pairs = zip(whole.operations, slim.operations, strict=True)
    layers = [(one, other) for one, other in pairs if isinstance(one, Weighted) and isinstance(other, Weighted)]
    counts = [(len(one.weight) - len(other.weight), len(one.weight), one.name) for one, other in layers]
    listed = ", ".join(f"{removed} of {outputs} outputs of {name}" for removed, outputs, name in counts if removed)
    return (f"Removed, as pruning left them constant or unused: {listed}.",) if listed else ()


def _check_options(format: str, write: Callable[..., Exported], options: dict[str, Any]) -> None:
    allowed = [name for name in inspect.signature(write).parameters if name not in _GIVEN]
    for name in options:
        if name not in allowed:
            raise TypeError(f"{name} is no option of format={format!r}, which has {', '.join(allowed)}.")


def _inputs(calibration: Tensor | Iterable[Any], shape: tuple[int, ...]) -> Tensor:
    """Return calibration inputs as one tensor.

    Raises:
        TypeError: If they are neither a tensor nor batches.
        ValueError: If there are none, or if they have another shape or type than the example.
    """
    rows: list[Tensor] = []
    for batch in [calibration] if isinstance(calibration, Tensor) else calibration:
        first = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(first, Tensor):
            raise TypeError(f"calibration has a batch of type {type(first).__name__}, but inputs must be a tensor.")
        rows.append(first.detach().cpu())
        if sum(one.shape[0] if one.ndim else 1 for one in rows) >= _ROWS:
            break
    unlike = [one for one in rows if one.dtype != torch.float32 or tuple(one.shape[1:]) != shape]
    found = unlike[0] if unlike else torch.cat([torch.empty(0, *shape), *rows])[:_ROWS]
    if unlike or not len(found):
        raise ValueError(
            f"calibration has the type {found.dtype} and the shape {tuple(found.shape)}, but must be float32 of the "
            f"shape (n, {', '.join(map(str, shape))}), with at least one row."
        )
    return found
