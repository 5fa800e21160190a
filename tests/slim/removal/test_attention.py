"""An attention without some of its heads computes what torch's computes with zeros in their place."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_roulette.network.coupling.coupling import coupling_of
from lightning_roulette.network.coupling.narrow_attention import NarrowAttention
from lightning_roulette.network.multiply_adds import multiply_adds
from lightning_roulette.slim.removal.removal import remove_dead
from tests.support.networks import Layers, known, numbers

HEADS, SIZE, DEAD = 4, 3, (1, 2)
WIDTH = HEADS * SIZE


class Looks(Layers):
    """Attention of rows to themselves or, with other widths, to two others."""

    def forward(self, *rows):
        return self.look(*(rows if len(rows) > 1 else rows * 3), need_weights=False)[0]


def pair(**options) -> tuple[nn.MultiheadAttention, NarrowAttention]:
    """The attention with two dead heads, and the one without them."""
    model = known(Looks(look=nn.MultiheadAttention(WIDTH, HEADS, **options))).eval()
    with torch.no_grad():
        model.look.out_proj.weight.unflatten(1, (HEADS, SIZE))[:, DEAD] = 0
    widths = WIDTH, options.get("kdim", WIDTH), options.get("vdim", WIDTH)
    slim = remove_dead(model, tuple(numbers(2, 5, width) for width in widths))
    assert isinstance(slim.look, NarrowAttention)
    assert slim.look.out_proj.weight.shape == (WIDTH, (HEADS - len(DEAD)) * SIZE)
    return model.look, slim.look


BATCH, QUERIES, KEYS = 2, 5, 7
PADDING = torch.tensor([[False] * 6 + [True], [False] * 7])
FLAGS = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(3)
EACH = numbers(BATCH * HEADS, QUERIES, KEYS)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 4, "vdim": 6},
        {"add_bias_kv": True, "add_zero_attn": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"key_padding_mask": PADDING},
        {"attn_mask": FLAGS, "key_padding_mask": PADDING},
        {"attn_mask": numbers(QUERIES, KEYS)},
        {"attn_mask": EACH, "key_padding_mask": torch.zeros(BATCH, KEYS).double()},
    ],
    ids=lambda masks: "+".join(masks) or "none",
)
@torch.no_grad()
def test_outputs_are_those_of_the_attention_with_zeros(batch_first, options, masks):
    wide, narrow = pair(batch_first=batch_first, **options)
    rows = [numbers(BATCH, QUERIES, WIDTH)] + [
        numbers(BATCH, KEYS, options.get(one, WIDTH), seed=9) for one in ("kdim", "vdim")
    ]
    rows = rows if batch_first else [one.transpose(0, 1) for one in rows]
    expected, found = (
        wide(*rows, **masks, average_attn_weights=False),
        narrow(*rows, **masks, average_attn_weights=False),
    )
    assert (found[0] - expected[0]).abs().max() < 1e-12
    assert (found[1] - expected[1][:, [0, 3]]).abs().max() < 1e-12


@torch.no_grad()
def test_a_single_sample_may_come_without_a_batch():
    wide, narrow = pair()
    rows = numbers(QUERIES, WIDTH)
    for padding in (None, torch.tensor([False] * 4 + [True])):
        expected, found = (one(rows, rows, rows, key_padding_mask=padding) for one in (wide, narrow))
        assert found[0].shape == (QUERIES, WIDTH)
        assert found[1].shape == (QUERIES, QUERIES)
        assert (found[0] - expected[0]).abs().max() < 1e-12


def test_a_causal_hint_without_its_mask_is_refused():
    _, narrow = pair()
    rows = numbers(QUERIES, WIDTH)
    with pytest.raises(RuntimeError, match="Pass the causal mask"):
        narrow(rows, rows, rows, is_causal=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@torch.no_grad()
def test_torchs_encoder_takes_it_with_padding_and_without_gradients():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=True), 2)
    model = known(encoder).eval()
    for layer in model.layers:
        layer.self_attn.out_proj.weight.unflatten(1, (HEADS, SIZE))[:, DEAD] = 0
    rows = numbers(BATCH, KEYS, WIDTH)
    slim = remove_dead(model, rows)
    assert [layer.self_attn.num_heads for layer in slim.layers] == [2, 2]
    expected, found = (one(rows, src_key_padding_mask=PADDING) for one in (model, slim))
    assert (found - expected)[~PADDING].abs().max() < 1e-12


def test_what_is_known_about_attention_holds_for_a_narrow_one():
    wide, narrow = pair(batch_first=True)
    rows = numbers(1, QUERIES, WIDTH)
    adds = [multiply_adds(one, lambda one=one: one(rows, rows, rows)).dense for one in (wide, narrow)]
    assert adds[1] * 2 == adds[0] == 4 * WIDTH * WIDTH * QUERIES
    (group,) = coupling_of(Looks(look=narrow), (rows,)).groups
    assert group.size == 2
    assert narrow.heads_left == [0, 3]
    assert math.isclose(narrow.head_dim, SIZE)


class Masked(Layers):
    """Attention to rows of which some are padding."""

    need_weights = False

    def forward(self, x, padding):
        keys = x * 1.0  # for the same tensor, torch has other code without gradients, which gives NaN
        return self.last(self.look(x, keys, keys, key_padding_mask=padding, need_weights=self.need_weights)[0])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_sample_that_is_all_padding_gets_what_it_got_before(need_weights, gradients):
    model = known(Masked(look=nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), last=nn.Linear(WIDTH, 2))).eval()
    model.need_weights = need_weights
    with torch.no_grad():
        model.look.out_proj.weight.unflatten(1, (HEADS, SIZE))[:, DEAD] = 0
    x, padding = numbers(3, 5, WIDTH), torch.zeros(3, 5, dtype=torch.bool)
    slim = remove_dead(model, (x, padding))
    assert isinstance(slim.look, NarrowAttention)
    padding[1] = True
    with torch.set_grad_enabled(gradients):
        expected, found = model(x, padding), slim(x, padding)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, equal_nan=True)
    assert bool(expected.isfinite().all()) != need_weights
    if gradients:
        for one in (model, slim):
            one(x, padding)[0].sum().backward()
        finite = [all(bool(w.grad.isfinite().all()) for w in one.parameters()) for one in (model, slim)]
        assert finite == [not need_weights] * 2
