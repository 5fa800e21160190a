"""The bytes of a TensorFlow Lite file."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_roulette.slim.export.tflm.extra import schema
from lightning_roulette.slim.export.tflm.model import Model, Operator, Scales, StoredTensor

VERSION = 3  # of the schema
IDENTIFIER = b"TFL3"
ALIGNMENT = 16  # of the data of a tensor, as the schema asks
NAMES = {"int8": "INT8", "uint8": "UINT8", "int32": "INT32"}


def to_bytes(model: Model) -> bytes:
    """The model as a TensorFlow Lite file: a FlatBuffer of schema version 3.

    Equal data of several tensors is stored once. A zero point that holds for all scales of a tensor is stored once,
    which TensorFlow Lite Micro reads.

    Raises:
        ImportError: If tflite-micro, which ships the schema, is not installed.
    """
    builder = importlib.import_module("flatbuffers").Builder(1 << 20)
    builder.Finish(_model(model).Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def _model(model: Model) -> Any:
    fb = schema()
    codes = sorted({one.code for one in model.operators})
    data = _distinct([tensor.data for tensor in model.tensors.values() if tensor.data is not None])
    root = fb.ModelT(version=VERSION, description="lightning_roulette")
    root.operatorCodes = [_code(fb, code) for code in codes]
    root.buffers = [fb.BufferT(), *(_aligned(fb)(np.frombuffer(one, np.uint8)) for one in data)]
    root.subgraphs = [_graph(fb, model, codes, {one: number + 1 for number, one in enumerate(data)})]
    return root


def _distinct(arrays: Sequence[NDArray[Any]]) -> list[bytes]:
    return list(dict.fromkeys(array.tobytes() for array in arrays))


def _aligned(fb: Any) -> Any:
    """The schema's buffer, whose generated code packs the data without the alignment that the schema asks for."""

    class Aligned(fb.BufferT):  # type: ignore[misc]
        def Pack(self, builder: Any) -> Any:
            builder.StartVector(1, len(self.data), ALIGNMENT)
            builder.head -= len(self.data)
            builder.Bytes[builder.head : builder.head + len(self.data)] = self.data.tobytes()
            data = builder.EndVector()
            fb.BufferStart(builder)
            fb.BufferAddData(builder, data)
            return fb.BufferEnd(builder)

    return Aligned


def _code(fb: Any, code: str) -> Any:
    if hasattr(fb.BuiltinOperator, code):
        number = getattr(fb.BuiltinOperator, code)
        return fb.OperatorCodeT(builtinCode=number, deprecatedBuiltinCode=min(number, 127))
    custom = fb.BuiltinOperator.CUSTOM
    return fb.OperatorCodeT(builtinCode=custom, deprecatedBuiltinCode=custom, customCode=code)


def _graph(fb: Any, model: Model, codes: list[str], buffers: dict[bytes, int]) -> Any:
    index = {name: number for number, name in enumerate(model.tensors)}
    graph = fb.SubGraphT()
    graph.tensors = [_tensor(fb, tensor, buffers) for tensor in model.tensors.values()]
    graph.operators = [_operator(fb, one, codes, index) for one in model.operators]
    graph.inputs = [index[name] for name in model.inputs]
    graph.outputs = [index[name] for name in model.outputs]
    return graph


def _tensor(fb: Any, tensor: StoredTensor, buffers: dict[bytes, int]) -> Any:
    stored = fb.TensorT(name=tensor.name, shape=list(tensor.shape), type=getattr(fb.TensorType, NAMES[tensor.kind]))
    stored.buffer = 0 if tensor.data is None else buffers[tensor.data.tobytes()]
    stored.quantization = None if tensor.scales is None else _scales(fb, tensor.scales)
    return stored


def _scales(fb: Any, scales: Scales) -> Any:
    return fb.QuantizationParametersT(
        scale=scales.values.astype(np.float32), zeroPoint=[scales.zero_point], quantizedDimension=scales.axis
    )


def _operator(fb: Any, one: Operator, codes: list[str], index: dict[str, int]) -> Any:
    stored = fb.OperatorT(opcodeIndex=codes.index(one.code))
    stored.inputs = [index[name] for name in one.inputs]
    stored.outputs = [index[name] for name in one.outputs]
    if one.kind is not None:
        stored.builtinOptionsType = getattr(fb.BuiltinOptions, f"{one.kind}Options")
        stored.builtinOptions = getattr(fb, f"{one.kind}OptionsT")(**one.options)
    return stored
