"""Values that are needed at one time never share memory."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_roulette.slim.export.c.memory import plan
from lightning_roulette.slim.export.operations import inputs_of
from lightning_roulette.slim.export.trace import trace
from tests.slim.export.test_trace import Forward
from tests.support.devices import NETWORKS, inputs, network


def needed_together(program, same):
    """At each operation, what it uses, what it makes, and what is used later."""
    made = {same[program.input.name]}
    for index, one in enumerate(program.operations):
        made.add(same[one.output.name])
        later = {same[v.name] for other in program.operations[index:] for v in inputs_of(other)}
        yield made & (later | {same[one.output.name], same[program.output.name]})


def twice(layer, x):
    y = layer(x)
    return F.max_pool2d(y.relu(), 2) + F.max_pool2d(y, 2)


CASES = {name: (network(name), inputs(name)) for name in NETWORKS}
CASES["twice"] = (Forward(nn.Conv2d(2, 3, 3), twice), torch.randn(2, 2, 8, 6))


@pytest.mark.parametrize("name", CASES)
def test_what_is_needed_at_one_time_does_not_overlap(name):
    program = trace(*CASES[name])
    found = plan(program)
    sizes = {key: value.size for key, value in program.values.items()}
    for together in needed_together(program, found.same):
        places = sorted(
            (found.offsets[one], found.offsets[one] + sizes[one]) for one in together & found.offsets.keys()
        )
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))
        assert all(end <= found.size for _, end in places)


def test_a_chain_takes_its_two_largest_neighbours():
    program = trace(network("lenet_5"), inputs("lenet_5"))
    assert plan(program).size == 20 * 24 * 24 + 20 * 12 * 12


def test_input_and_output_are_not_in_the_arena():
    program = trace(network("perceptron"), inputs("perceptron"))
    assert plan(program).offsets.keys() == {one.output.name for one in program.operations[:-1]}
