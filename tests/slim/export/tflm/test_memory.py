"""How much memory a model takes, and which weights are decoded within a limit."""

import pytest

from lightning_roulette.slim.export.tflm.decoding import decoding
from lightning_roulette.slim.export.tflm.flatbuffer import to_bytes
from lightning_roulette.slim.export.tflm.interpreter import arena
from lightning_roulette.slim.export.tflm.memory import alive, packed, smallest
from lightning_roulette.slim.export.tflm.model import Model, Operator, StoredTensor
from lightning_roulette.slim.export.tflm.splitting import most_parts, splitting
from tests.slim.export.tflm.running import loads, outputs_of
from tests.support.stored import chain, image, integers, sums

pytest.importorskip("tflite_micro", reason="needs the extra `tflm`")


def test_a_tensor_lives_from_its_operator_to_its_last_reader():
    sizes = {"x": 1, "a": 10, "b": 100, "c": 1000}
    steps = [("x", "a"), ("a", "b"), ("b", "c")]
    operators = [Operator("RELU", (source,), (target,)) for source, target in steps]
    operators[2] = Operator("ADD", ("a", "b"), ("c",))
    model = Model({name: StoredTensor(name, (size,)) for name, size in sizes.items()}, tuple(operators), ("x",), ("c",))
    assert alive(model) == [11, 110, 1110]
    assert alive(decoding(chain(64, 64), ["w0"])) == [64 + 4096, 64 + 4096 + 64]


MODELS = {
    "wide": chain(256, 128, 10),
    "many channels": decoding(chain(2, 3000), ["w0"]),
    "small": chain(3, 2),
    "deep": chain(*(8,) * 30),
    "deep and decoded": decoding(chain(*(8,) * 30), [f"w{number}" for number in range(29)]),
    "split": splitting(chain(20, 300), {"w0": 50}),
    "convolution": image(1000, 2, 1),
    "sums": sums(5),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_runtime_loads_in_the_arena_that_is_told(name, tmp_path):
    model = MODELS[name]
    file = to_bytes(model)
    (tmp_path / "model.tflite").write_bytes(file)
    assert loads(tmp_path / "model.tflite", arena(model, file))
    assert name != "wide" or not loads(tmp_path / "model.tflite", arena(model, file) - 256)


def test_without_a_limit_each_weight_is_encoded_that_gets_smaller():
    model = chain(256, 128, 10, 10)
    found = smallest(model, None)
    assert found.parts == {"w0": 1, "w1": 1}
    assert len(found.file) < len(to_bytes(decoding(model, ["w0"]))) < len(to_bytes(model))
    assert len(to_bytes(decoding(model, ["w0", "w1", "w2"]))) > len(found.file)


@pytest.mark.parametrize("parts", [2, 3, 11, 64])
def test_a_split_layer_computes_the_same(parts):
    model = chain(70, 128, 10)
    inputs = integers(model, 5)
    assert outputs_of(splitting(model, {"w0": parts}), inputs) == outputs_of(model, inputs)
    assert outputs_of(packed(model, {"w0": parts}).model, inputs) == outputs_of(model, inputs)


def test_a_split_convolution_computes_the_same():
    model = image(outputs=9, channels=4, size=5)
    inputs = integers(model, 5)
    assert outputs_of(splitting(model, {"w": 4}), inputs) == outputs_of(model, inputs)


def test_a_layer_is_split_into_parts_of_two_outputs_at_least():
    assert most_parts(chain(8, 9), "w0") == 4
    assert most_parts(chain(8, 1), "w0") == 1
    model = chain(8, 8)
    depthwise = Operator("DEPTHWISE_CONV_2D", *(getattr(model.operators[0], name) for name in ("inputs", "outputs")))
    assert most_parts(model.with_operators([depthwise], []), "w0") == 1
    assert most_parts(model.with_operators([*model.operators] * 2, []), "w0") == 1


@pytest.mark.parametrize("share", [1, 0.7, 0.4, 0.3, 0.1])
def test_the_memory_stays_within_the_limit(share):
    model = chain(400, 200, 100, 10)
    inputs = integers(model, 3)
    whole, plain = smallest(model, None), packed(model, {})
    limit = int(plain.arena + share * (whole.arena - plain.arena))
    found = smallest(model, limit)
    assert found.arena <= limit
    assert len(found.file) <= len(plain.file)
    assert outputs_of(found.model, inputs) == outputs_of(model, inputs)
    if share < 1:
        assert found.parts != whole.parts


def test_less_memory_makes_a_larger_file():
    model = chain(400, 200, 100, 10)
    limits = [None, 60_000, 30_000, 20_000, packed(model, {}).arena]
    sizes = [len(smallest(model, limit).file) for limit in limits]
    assert sizes == sorted(sizes)
    assert sizes[-1] == len(to_bytes(model))


def test_two_layers_of_one_size_are_both_split():
    found = smallest(chain(128, 128, 128), 14_000)
    assert all(count > 1 for count in found.parts.values())
    assert len(found.parts) == 2


def test_too_little_memory_for_the_plain_network_is_an_error_with_what_it_takes():
    model = chain(400, 200, 10)
    least = packed(model, {}).arena
    assert smallest(model, least).parts == {}
    with pytest.raises(ValueError, match=rf"max_ram={least - 1} is too little: .* takes {least} bytes .*format='c'"):
        smallest(model, least - 1)
