"""What a package of Core ML computes by the definitions of its operations, as Core ML is on Apple's systems only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_roulette.slim.export.coreml.extra import imported, quiet


def conv(x, weight, bias, strides, pad_type, pad, dilations, groups):
    assert pad_type in ("custom", "valid")
    assert pad[::2] == pad[1::2]
    return F.conv2d(x, weight, bias, strides, pad[::2] if pad_type == "custom" else 0, dilations, groups)


def max_pool(x, kernel_sizes, strides, pad_type, pad, ceil_mode):
    assert pad_type in ("custom", "valid")
    assert not any(pad)
    return F.max_pool2d(x, kernel_sizes, strides, ceil_mode=ceil_mode)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": lambda x, y: x + y,
    "cast": lambda x, dtype: x.to({"fp16": torch.float16, "fp32": torch.float32}[dtype]),
    "conv": conv,
    "linear": F.linear,
    "max_pool": max_pool,
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes, keepdim=keep_dims),
    "relu": torch.relu,
    "reshape": lambda x, shape: x.reshape(shape),
}
TENSORS = {"x", "y", "weight", "bias"}  # names of arguments; the others are numbers and words


def computed(package: Path, **inputs: Tensor) -> list[Tensor]:
    """The outputs of a package. Its files are read by coremltools, which also decodes sparse weights."""
    with quiet():
        spec = imported("coremltools").utils.load_spec(str(package))
        load = imported("coremltools.converters.mil.frontend.milproto.load").load
        program = load(spec, spec.specificationVersion, str(package / "Data/com.apple.CoreML/weights"))
    main, values = program.functions["main"], dict(inputs)

    def argument(name, variable):
        found = values.get(variable.name, variable.val)
        if isinstance(found, Tensor):
            return found
        if name in TENSORS:
            return torch.from_numpy(np.array(found))
        return found.tolist() if hasattr(found, "tolist") else found

    for one in main.operations:
        if one.op_type.startswith("constexpr"):
            values[one.outputs[0].name] = torch.from_numpy(np.array(one.materialized_val_inference()))
        elif one.op_type != "const":
            given = {name: argument(name, variable) for name, variable in one.inputs.items() if variable is not None}
            values[one.outputs[0].name] = OPERATIONS[one.op_type](**given)
    return [values[one.name] for one in main.outputs]
