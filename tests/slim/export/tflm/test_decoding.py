"""The encoding of pruned weights, and that the runtime decodes it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_roulette.slim.export.tflm.decoding import COST, decoding, encoded, encoded_size, gets_smaller
from lightning_roulette.slim.export.tflm.model import StoredTensor


def decoded(bitmap, table, count):
    """The values by the definition of the encoding, bit by bit."""
    values = iter(table[16:].view(np.int8).tolist())
    return [next(values) if bitmap[at // 8] >> (7 - at % 8) & 1 else 0 for at in range(count)]


def test_the_bitmap_has_the_first_value_in_the_most_significant_bit():
    bitmap, table = encoded(np.array([[5, 0, 0, 0, 0], [0, 0, -1, 0, 7]], np.int8))
    assert bitmap.tolist() == [0b10000001, 0b01000000]
    assert table.tolist() == [2, 1, 0, 0, 1, *[0] * 11, 5, 255, 7]


@given(st.lists(st.sampled_from([0, 0, 0, 1, -127, 127]), min_size=1, max_size=40))
def test_what_is_encoded_decodes_to_the_same_values(values):
    bitmap, table = encoded(np.array(values, np.int8))
    assert decoded(bitmap, table, len(values)) == values
    assert len(bitmap) + len(table) + COST == encoded_size(np.array(values, np.int8))


def test_a_tensor_gets_smaller_where_bitmap_values_and_their_operator_take_less():
    values = np.zeros(8000, np.int8)
    values[: 7000 - 16 - COST] = 1
    assert not gets_smaller(StoredTensor("w", values.shape, data=values))
    values[0] = 0
    assert gets_smaller(StoredTensor("w", values.shape, data=values))
    assert not gets_smaller(StoredTensor("w", values.shape, data=values), parts=2)
    assert not gets_smaller(StoredTensor("w", values.shape, "int32", values.astype(np.int32)))
    assert not gets_smaller(StoredTensor("w", values.shape))


class TestInTheRuntime:
    @pytest.fixture(autouse=True)
    def _needs_the_runtime(self):
        pytest.importorskip("tflite_micro", reason="needs the extra `tflm`")

    @settings(max_examples=10, deadline=None)
    @given(seed=st.integers(0, 99), sparsity=st.floats(0, 1), outputs=st.integers(1, 9))
    def test_a_decoded_layer_computes_the_same(self, seed, sparsity, outputs):
        from tests.slim.export.tflm.running import outputs_of
        from tests.support import stored

        model = stored.chain(13, outputs, 5, sparsity=sparsity, seed=seed)
        inputs = stored.integers(model, 5)
        assert outputs_of(model, inputs) == outputs_of(decoding(model, ["w0", "w1"]), inputs)

    def test_a_decoded_layer_may_be_read_by_two_operators(self):
        from tests.slim.export.tflm.running import outputs_of
        from tests.support import stored

        model = stored.chain(8, 8, 8)
        first, second = model.operators
        shared = model.with_operators(
            [first, type(second)(second.code, ("v1", "w0", "w0:bias"), ("v2",), second.kind)], []
        )
        inputs = stored.integers(model, 5)
        assert outputs_of(shared, inputs) == outputs_of(decoding(shared, ["w0"]), inputs)
        assert [one.code for one in decoding(shared, ["w0"]).operators] == ["TFLM_DECODE", "FULLY_CONNECTED"] * 2
