"""A network as an ONNX model, and a session of onnxruntime that computes it."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_MISSING = (
    "format='onnx' needs the packages onnx, onnxscript and onnxruntime, which write and check its files. "
    "Install the extra: pip install 'lightning-roulette[onnx]'."
)
_LARGEST = 2**31 - 1  # bytes of a file without a second one for its weights


class Session:
    """What onnxruntime computes with a model, on the CPU with one thread.

    Args:
        model: The bytes of the file.
    """

    def __init__(self, model: bytes) -> None:
        runtime = _imported("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are raised, too
        self._session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the first output for the inputs, in the order of the file."""
        return self.outputs(inputs)[0]

    def takes(self, inputs: tuple[Tensor, ...]) -> bool:
        """Return whether it computes outputs for the inputs; it may be made for another size of a batch."""
        try:
            self.outputs(inputs)
        except Exception:  # of onnxruntime, which has several classes for it
            return False
        return True

    def outputs(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Return all outputs."""
        names = [one.name for one in self._session.get_inputs()]
        given = {name: one.detach().cpu().numpy() for name, one in zip(names, inputs, strict=True)}
        return [torch.from_numpy(one) for one in self._session.run(None, given)]


def to_onnx(network: nn.Module, example_input: Any) -> bytes:
    """The bytes of an ONNX model of a network in evaluation mode, for batches of any size if the network takes them.

    Args:
        network: The network, on the CPU, in evaluation mode.
        example_input: A tensor, a tuple of arguments, or a mapping of named arguments, with two samples or more if
            batches of any size are wanted.

    Raises:
        ImportError: If a package is missing; the message names the extra.
        ValueError: If the exporter has no counterpart for a part of the network, or if the file is too large.
    """
    for package in ("onnx", "onnxscript"):
        _imported(package)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the outputs of the file are compared with those of the network
        try:
            return _bytes(_exported(network, example_input, any_batch=True))
        except Exception:  # a network may be written for one size of a batch
            return _bytes(_exported_or_refused(network, example_input))


def _exported_or_refused(network: nn.Module, example_input: Any) -> Any:
    try:
        return _exported(network, example_input, any_batch=False)
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"model is a {type(network).__name__} of which PyTorch's exporter makes no ONNX file: "
            f"{type(error).__name__}: {said[0]} Its forward must not branch on values. Export a submodule for which "
            "this holds."
        ) from error


def _exported(network: nn.Module, example_input: Any, any_batch: bool) -> Any:
    named = isinstance(example_input, Mapping)
    arguments = () if named else (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    shapes = _shapes(example_input if named else arguments) if any_batch else None
    words = dict(example_input) if named else None
    return torch.onnx.export(network, arguments, kwargs=words, dynamo=True, dynamic_shapes=shapes, verbose=False)


def _shapes(given: Any) -> Any:
    """Which dimensions may have any size: the first of each tensor."""
    batch = torch.export.Dim("batch")
    if isinstance(given, Mapping):
        return {name: {0: batch} if isinstance(one, Tensor) else None for name, one in given.items()}
    return tuple({0: batch} if isinstance(one, Tensor) else None for one in given)


def _bytes(program: Any) -> bytes:
    model = program.model_proto
    if model.ByteSize() > _LARGEST:
        raise ValueError(
            f"The ONNX file would have {model.ByteSize():,} bytes, but one file has at most {_LARGEST:,}. "
            "Use torch.onnx.export(..., external_data=True) with the network that remove_dead returns."
        )
    return bytes(model.SerializeToString())


def _imported(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(_MISSING) from error
