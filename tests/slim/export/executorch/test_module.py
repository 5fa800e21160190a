"""A program as a module computes what the program computes."""

import pytest
import torch

from lightning_roulette.slim.export.executorch.module import ProgramModule
from lightning_roulette.slim.export.operations import Add, Conv2d, Pad, Pool2d, Program, Value
from lightning_roulette.slim.export.reference import run
from lightning_roulette.slim.export.trace import trace
from tests.support import devices


@pytest.mark.parametrize("name", ["lenet_5", "residual", "depthwise", "sequence"])
def test_networks_compute_the_same(name):
    program = trace(devices.network(name, 0.5).eval(), devices.inputs(name, 1))
    inputs = devices.inputs(name, 7)
    torch.testing.assert_close(ProgramModule(program)(inputs), run(program, inputs), rtol=0, atol=1e-6)


def test_uneven_padding_computes_the_same():
    values = [Value(name, shape) for name, shape in (("x", (2, 5, 5)), ("p", (2, 7, 6)), ("c", (3, 7, 8)))]
    top, mean = Value("m", (3, 8, 9)), Value("a", (3, 8, 9))
    weight, bias = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0)), torch.ones(3)
    steps = (
        Pad(values[0], values[1], (1, 1, 0, 1)),
        Conv2d(values[1], values[2], "w", weight, bias, padding=(0, 2, 2, 2)),
        Pool2d(values[2], top, "max", (2, 2), (1, 1), (1, 1, 1, 1)),
        Pool2d(values[2], mean, "mean", (2, 2), (1, 1), (1, 1, 1, 1)),
        Add(top, mean, Value("y", (3, 8, 9)), "relu6"),
    )
    program = Program(values[0], steps, steps[-1].output)
    inputs = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ProgramModule(program)(inputs), run(program, inputs), rtol=0, atol=1e-6)


def test_the_weights_are_its_own():
    program = trace(devices.network("lenet_5").eval(), devices.inputs("lenet_5", 1))
    module = ProgramModule(program)
    assert sum(one.numel() for one in module.buffers()) == sum(
        one.weight.numel() + one.bias.numel() for one in program.operations if hasattr(one, "weight")
    )
    module.weight0.zero_()
    assert program.operations[0].weight.any()
