"""From a network to a model of coremltools, with dense or with sparse weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_roulette.slim.export.coreml.extra import imported, quiet

BITS = {"float32": 32, "float16": 16}
_LEAST = 256  # entries of a tensor that is stored sparsely; two parts of a file take more room than one


def to_model(network: nn.Module, example_input: Any, values: str) -> Any:
    """Return a network as an ML program for macOS 13, iOS 16 and later. Its weights are dense.

    Args:
        network: The network, in evaluation mode and on the CPU.
        example_input: A tensor, a tuple of tensors, or a mapping of named tensors. The program takes these shapes.
        values: Type of the weights and of what is computed, "float32" or "float16".

    Raises:
        ImportError: If coremltools is not installed; the message names the extra.
        ValueError: If PyTorch's exporter or coremltools has no counterpart for a part of the network.
    """
    tools = imported("coremltools")
    arguments, named = _arguments(example_input)
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(network, arguments, kwargs=named)
    except Exception as error:  # of several classes, for what cannot be captured
        raise ValueError(_refusal(network, "PyTorch's exporter makes no graph", error)) from error
    precision = {"float32": tools.precision.FLOAT32, "float16": tools.precision.FLOAT16}[values]
    options = {"convert_to": "mlprogram", "minimum_deployment_target": tools.target.iOS16, "skip_model_load": True}
    failed: list[Exception] = []
    for source in _sources(network, program, arguments, named):
        try:
            with torch.no_grad(), quiet():
                graph, inputs = source()
                return tools.convert(graph, **inputs, compute_precision=precision, **options)
        except Exception as error:  # of several classes, for what has no counterpart in Core ML
            failed.append(error)
    raise ValueError(_refusal(network, "coremltools makes no file", failed[0])) from failed[0]


def _arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (example_input,) if isinstance(example_input, Tensor) else tuple(example_input), {}


def _sources(
    network: nn.Module, program: Any, arguments: tuple[Any, ...], named: dict[str, Any]
) -> Iterator[Callable[[], tuple[Any, dict[str, Any]]]]:
    """Return what makes a graph for coremltools, and the inputs that it must be told.

    coremltools does not know some operations of newer exported programs, such as pooling. It knows them as they are
    traced. What is traced could be exported, so it does not depend on values.
    """
    yield lambda: (program.run_decompositions({}), {})
    yield lambda: _traced(network, arguments, named)
    yield lambda: (program.run_decompositions(), {})


def _traced(network: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its function has no counterpart
    try:
        given = {"example_kwarg_inputs": named} if named else {"example_inputs": arguments}
        graph = torch.jit.trace(network, **given, check_trace=False, strict=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    order = inspect.signature(network.forward).bind(*arguments, **named).arguments
    return graph, {"inputs": [_input(name, one) for name, one in order.items()]}


def _input(name: str, one: Tensor) -> Any:
    kind = np.float32 if one.is_floating_point() else np.int32
    return imported("coremltools").TensorType(name=name, shape=tuple(one.shape), dtype=kind)


def _refusal(network: nn.Module, what: str, error: Exception) -> str:
    said = str(error).strip().splitlines() or [""]
    return (
        f"model is a {type(network).__name__} of which {what}: {type(error).__name__}: {said[0]} Its forward must not "
        "branch on values, and must consist of what Core ML has. Export a submodule for which this holds."
    )


def with_sparse_weights(model: Any, values: str) -> Any:
    """Return a model whose weights are a bit mask and values, where that takes less. No weight is changed.

    Args:
        model: What `to_model` returned.
        values: Type of its weights.
    """
    optimize = imported("coremltools.optimize.coreml")
    config = optimize.OpThresholdPrunerConfig(
        threshold=0.0, minimum_sparsity_percentile=1 / BITS[values], weight_threshold=_LEAST
    )
    with quiet():
        return optimize.prune_weights(model, optimize.OptimizationConfig(global_config=config))


def save(model: Any, path: Path) -> None:
    """Write a model as a package, which is a folder."""
    with quiet():
        model.save(str(path))
