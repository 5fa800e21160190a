"""The shapes and names that operations derive."""

import torch

from lightning_roulette.slim.export.operations import Add, Conv2d, Program, Value, inputs_of


def test_a_convolution_knows_its_kernel_and_whether_it_is_depthwise():
    image, out = Value("x", (4, 5, 6)), Value("y", (8, 5, 4))
    conv = Conv2d(image, out, "conv.weight", torch.zeros(8, 1, 1, 3), torch.zeros(8), groups=4)
    assert conv.kernel == (1, 3)
    assert conv.depthwise
    assert not Conv2d(image, out, "conv.weight", torch.zeros(8, 2, 1, 3), torch.zeros(8), groups=2).depthwise


def test_a_program_lists_its_values_by_name():
    x, y, z = (Value(name, (3,)) for name in "xyz")
    program = Program(x, (Add(x, x, y), Add(x, y, z)), z)
    assert program.values == {"x": x, "y": y, "z": z}
    assert inputs_of(program.operations[1]) == (x, y)
    assert Value("image", (4, 5, 6)).size == 120
