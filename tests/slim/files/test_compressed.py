"""`save_compressed` and `load_compressed`: what comes back, how it is narrowed, and which mistakes are named."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lightning_roulette import Codebook, Mask, load_compressed, load_mask, save_compressed
from lightning_roulette.slim.files.container import MARK
from lightning_roulette.slim.files.content import Content

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OTHERS = [torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.complex64]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.lrw"


def pruned(*shape: int, density: float = 0.1, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal weights, of which a share is kept."""
    chance = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape, generator=chance)
    return weights.masked_fill(torch.rand(shape, generator=chance) >= density, 0.0).to(dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.numel() == 0 or torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def there_and_back(state, path, *args, **options) -> dict[str, torch.Tensor]:
    assert save_compressed(state, path, *args, **options) == path.stat().st_size
    found = load_compressed(path)
    assert set(found) == set(state)
    return found


@pytest.mark.parametrize("dtype", [*FLOATS, *OTHERS], ids=str)
def test_every_tensor_comes_back_bit_for_bit(path, dtype):
    wide = torch.randint(0, 255, (6, 50, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    any_bits = wide if dtype != torch.bool else wide % 2
    state = {
        "scalar": torch.tensor(3).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
        "vector": torch.arange(5).to(dtype),
        "matrix": pruned(30, 20).to(dtype),
        "strided": pruned(8, 6).to(dtype).T,
        "any bits": any_bits.view(dtype) if dtype != torch.bool else any_bits.bool(),
        "zeros": torch.zeros(9, 9).to(dtype),
        "ones": torch.ones(9, 9).to(dtype),
        "kernel": pruned(4, 3, 3, 3).to(dtype),
    }
    found = there_and_back(state, path)
    assert [name for name in state if not same_bits(found[name], state[name].contiguous())] == []


def test_zeros_below_zero_nan_and_denormal_numbers_come_back(path):
    special = torch.tensor([[0.0, -0.0, math.nan, math.inf], [-math.inf, 1e-45, -1e-45, 1.5]])
    special.view(torch.int32)[0, 2] |= 12345  # a NaN that carries something
    assert same_bits(there_and_back({"weight": special}, path)["weight"], special)


@pytest.mark.parametrize("density", [0.5, 0.2, 0.05, 0.01])
def test_the_file_is_smaller_than_the_entropy_of_positions_and_numbers_would_be(path, density):
    weights = pruned(200, 300, density=density)
    survivors = weights[weights != 0]
    _, counts = torch.frexp(survivors)[1].unique(return_counts=True)
    shares = counts / counts.sum()
    share = len(survivors) / weights.numel()
    positions = -weights.numel() * (share * math.log2(share) + (1 - share) * math.log2(1 - share))
    bound = positions + len(survivors) * (24 - float((shares * shares.log2()).sum()))
    assert save_compressed({"weight": weights}, path) < 1.02 * bound / 8 + 150


def test_a_module_is_filled_and_returned(path):
    net, other = (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)) for _ in "ab")
    net[1].num_batches_tracked += 7
    save_compressed(net, path)
    assert load_compressed(path, other) is other
    assert all(torch.equal(one, other.state_dict()[name]) for name, one in net.state_dict().items())


def test_types_and_devices_are_as_asked(path):
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    save_compressed(net, path)
    found = load_compressed(path, device="meta", dtype=torch.float16)
    assert {one.device.type for one in found.values()} == {"meta"}
    assert found["0.weight"].dtype == torch.float16
    assert found["1.num_batches_tracked"].dtype == torch.int64
    assert load_compressed(path, net, dtype=torch.float64)[0].weight.dtype == torch.float64
    with pytest.raises(TypeError, match="dtype is torch.int64, but must be a floating-point type"):
        load_compressed(path, dtype=torch.int64)


def test_tied_weights_are_stored_once(path):
    weights = pruned(100, 100, density=1)
    alone = save_compressed({"one": weights}, path)
    found = there_and_back({"one": weights, "other": weights, "turned": weights.T[:1]}, path)
    assert path.stat().st_size < alone + 600
    assert found["one"] is found["other"]
    assert torch.equal(found["turned"], weights.T[:1])


def test_survivors_that_are_zero_are_known_by_the_mask(path):
    weights = pruned(20, 30)
    kept = weights != 0
    kept[0, :3] = True
    weights[0, :3] = 0
    found = there_and_back({"weight": weights, "bias": torch.ones(3)}, path, mask=Mask({"weight": kept}))
    assert torch.equal(found["weight"], weights)
    assert load_mask(path) == Mask({"weight": kept})


def test_the_header_can_be_read(path):
    save_compressed(
        {"body.conv.weight": pruned(8, 3, 3, 3), "body.steps": torch.tensor(3), "head.bias": torch.ones(2)}, path
    )
    content = path.read_bytes()
    start = len(MARK) + 4
    header = json.loads(content[start : start + int.from_bytes(content[start - 4 : start], "little")])
    tensors = {"body": {"conv": {"weight": [8, 3, 3, 3]}, "steps": ["int64"]}, "head": {"bias": [2]}}
    assert (header["format"], header["values"], header["tensors"]) == (1, "float32", tensors)


def test_names_within_names_come_back(path):
    there_and_back({"a": torch.ones(1), "a.b": torch.ones(2), "": torch.ones(3), "..": torch.ones(4)}, path)
    there_and_back({".".join("x" * 2000): torch.ones(1)}, path)
    assert there_and_back({}, path) == {}


def test_float16_rounds_weights_alone(path):
    state = {"weight": pruned(300, 40), "bias": torch.rand(300)}
    exact = save_compressed(state, path)
    found = there_and_back(state, path, "float16")
    assert path.stat().st_size < exact - 1.5 * int((state["weight"] != 0).sum())
    assert torch.equal(found["weight"], state["weight"].half().float())
    assert torch.equal(found["bias"], state["bias"])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_rounds_to_multiples_of_a_scale_for_each_row(path, dtype):
    weights = pruned(50, 8, 3, 3, dtype=dtype)
    weights[3] = 0
    found = there_and_back({"weight": weights, "bias": torch.rand(50)}, path, "int8")["weight"]
    assert found.dtype == dtype
    largest = weights.double().abs().amax((1, 2, 3), keepdim=True)
    digits = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0)
    assert ((found.double() - weights.double()).abs() <= largest * (9 / 8 / 127 + digits)).all()
    for row in found.double().reshape(50, -1) if dtype == torch.float32 else ():
        assert len(row.unique()) <= 255


def test_no_survivor_becomes_zero_in_int8(path):
    weights = torch.tensor([[1.0, 0.003, -0.5, 0.0], [0.003, -0.002, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = there_and_back({"weight": weights}, path, "int8")["weight"]
    assert torch.equal(found.sign(), weights.sign())
    assert load_mask(path)["weight"].tolist() == (weights != 0).tolist()


@pytest.mark.parametrize("values", ["float16", "int8", Codebook(3)])
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 4e-6), (torch.float16, 3e-5), (torch.float32, 1e-30)])
def test_no_survivor_becomes_zero_among_the_smallest_numbers(path, values, dtype, largest):
    weights = (largest * pruned(20, 40)).to(dtype)
    found = there_and_back({"weight": weights}, path, values)["weight"]
    assert torch.equal(found != 0, weights != 0)
    again = there_and_back({"weight": found}, path, values)["weight"]
    assert torch.equal(again, found)


@pytest.mark.parametrize(("outputs", "inputs"), [(2, 400), (60, 60), (300, 20)])
def test_rounded_weights_take_the_smaller_form(path, outputs, inputs, monkeypatch):
    state = there_and_back({"weight": pruned(outputs, inputs)}, path, "int8")
    size, forms = save_compressed(state, path), []
    for multiples in (False, True):
        monkeypatch.setattr(Content, "_are_multiples", lambda *_, multiples=multiples: multiples)
        forms.append(save_compressed(state, path))
    assert size == min(forms) < max(forms)


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_a_codebook_has_so_many_values_and_is_near(path, bits):
    state = {"first": pruned(100, 300), "second": 10 * pruned(50, 100, seed=1), "bias": torch.rand(9)}
    found = there_and_back(state, path, Codebook(bits))
    for name in ("first", "second"):
        survivors, rounded = (one[name][state[name] != 0] for one in (state, found))
        assert len(rounded.unique()) <= 2**bits
        assert float((rounded - survivors).square().mean()) < 4 * 4.0**-bits * float(survivors.square().mean())
    assert torch.equal(found["bias"], state["bias"])
    first = path.read_bytes()
    save_compressed(state, path, Codebook(bits))
    assert path.read_bytes() == first


def test_weights_with_no_more_values_than_a_codebook_stay_as_they_are(path):
    weights = torch.tensor([math.pi, -math.e, 0.0, 1 / 3])[torch.arange(400).reshape(20, 20) % 4]
    assert torch.equal(there_and_back({"weight": weights}, path, Codebook(3))["weight"], weights)


def test_narrower_values_give_smaller_files(path):
    weights = {"weight": pruned(300, 300)}
    values = ["float32", "float16", "int8", Codebook(5), Codebook(4), Codebook(3)]
    sizes = [save_compressed(weights, path, one) for one in values]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


def test_what_is_read_can_be_written_again(path):
    for values in ("float16", "int8", Codebook(4)):
        found = there_and_back({"weight": pruned(100, 100)}, path, values)
        size = path.stat().st_size
        assert torch.equal(there_and_back(found, path)["weight"], found["weight"])
        assert abs(path.stat().st_size - size) < 20


def test_weights_that_cannot_be_rounded_are_named_and_nothing_is_written(path):
    for values, weight in (("int8", math.nan), (Codebook(3), math.inf), ("float16", 1e5), ("int8", 1e300)):
        weights = torch.full((3, 3), weight, dtype=torch.float64)
        with pytest.raises(ValueError, match="layer.weight has weights .* Pass values='float32'"):
            save_compressed({"layer.weight": weights}, path, values)
    assert not path.exists()


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"a": 3, "b": torch.ones(2)}, TypeError, "has a int for 'a', but only tensors can be stored"),
        ([torch.ones(2)], TypeError, "model is of type list, but must be a module or a state dict"),
        ({"a": 3}, TypeError, "holds no state dict"),
        ({"a": torch.ones(2, device="meta")}, ValueError, "a has no values, but must be a dense tensor"),
        ({"a": torch.ones(2, 2).to_sparse()}, ValueError, "a has the layout torch.sparse_coo"),
        (
            {"a": torch.ones(2).to(torch.float8_e4m3fnuz)},
            TypeError,
            "a has the type torch.float8_e4m3fnuz, which cannot be",
        ),
    ],
)
def test_what_cannot_be_stored_is_named(path, state, error, message):
    with pytest.raises(error, match=message):
        save_compressed(state, path)
    assert not path.exists()


@pytest.mark.parametrize(("values", "error"), [("float8", ValueError), (4, TypeError), (None, TypeError)])
def test_other_values_are_refused(path, values, error):
    with pytest.raises(error, match=r"values is .*, but must be one of .*Codebook\("):
        save_compressed({}, path, values)


def test_a_mask_of_another_network_is_refused(path):
    weights = {"weight": pruned(5, 4, density=1)}
    for mask, message in (
        ({"other": torch.ones(5, 4, dtype=torch.bool)}, "mask has 'other', which is no tensor of the network"),
        ({"weight": torch.ones(4, 5, dtype=torch.bool)}, "mask has 'weight', which must be bool tensors of the same"),
        ({"weight": torch.zeros(5, 4, dtype=torch.bool)}, "mask prunes weights of weight that are not zero"),
    ):
        with pytest.raises(ValueError, match=message):
            save_compressed(weights, path, mask=mask)


def test_a_module_that_does_not_fit_stays_as_it_was(path):
    save_compressed(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), path)
    other = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    before = {name: one.clone() for name, one in other.state_dict().items()}
    with pytest.raises(ValueError, match="path is .*, but its weights do not fit Sequential: the shapes of 2 tensors"):
        load_compressed(path, other)
    assert all(torch.equal(one, before[name]) for name, one in other.state_dict().items())


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    save_compressed({"weight": pruned(5, 4)}, path)
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save_compressed({"weight": pruned(5, 5)}, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_without_constriction_the_extra_is_named(path, monkeypatch):
    save_compressed({}, path)
    monkeypatch.setitem(sys.modules, "constriction", None)
    for call in (lambda: save_compressed({}, path), lambda: load_compressed(path)):
        with pytest.raises(ImportError, match=r"pip install 'lightning-roulette\[compress\]'"):
            call()


def test_two_million_weights_come_back(path):
    kept = np.random.default_rng(0).random((2000, 1000)) < 0.1
    weights = torch.from_numpy(np.where(kept, np.random.default_rng(1).normal(size=kept.shape), 0).astype(np.float32))
    save_compressed({"weight": weights}, path)
    assert torch.equal(load_compressed(path)["weight"], weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weights_that_are_multiples_of_short_scales_are_not_rounded_to_int8(path, dtype):
    chance = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (60, 20), generator=chance)
    codes[codes.abs() < 90] = 0
    codes[:20] //= 9  # the largest code is not 127
    codes[50:] *= torch.arange(20) == 3  # rows with a single weight, or none
    scales = torch.randint(8, 16, (60, 1), generator=chance) * 2.0 ** torch.randint(-9, -5, (60, 1), generator=chance)
    weights = (codes * scales).to(dtype)
    assert torch.equal(weights.float(), codes * scales)
    assert torch.equal(there_and_back({"weight": weights}, path, "int8")["weight"], weights)
    zeros = torch.zeros(3, 4, dtype=dtype)
    assert torch.equal(there_and_back({"weight": zeros}, path, "int8")["weight"], zeros)


@pytest.mark.parametrize("values", ["float16", "int8", Codebook(3)])
def test_zeros_below_zero_stay_zero_when_weights_are_rounded(path, values):
    weights = pruned(20, 30, density=1)
    mask = pruned(20, 30, seed=1) != 0
    found = there_and_back({"weight": weights * mask}, path, values)["weight"]  # half of the zeros are -0.0
    assert torch.equal(found != 0, mask)
    assert torch.equal(load_mask(path)["weight"], mask)


@pytest.mark.parametrize("values", ["int8", Codebook(3)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_does_not_leave_the_type(path, values, dtype):
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    weights = (torch.linspace(-1, 1, 400, dtype=torch.float64).reshape(20, 20) * most).clamp(-most, most).to(dtype)
    found = there_and_back({"weight": weights}, path, values)["weight"]
    assert found.isfinite().all()
    assert ((found.double() - weights.double()).abs() <= most * 0.16).all()


def test_numbers_that_torch_changes_when_they_are_read_come_back(path):
    weights = torch.randn(4, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    state = {"whole": weights, "conjugate": weights.conj(), "part": weights.conj().imag}
    found = there_and_back(state, path)
    assert all(torch.equal(found[name], one) for name, one in state.items())


def test_a_folder_that_is_missing_is_named(path):
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        save_compressed({"weight": pruned(5, 4)}, path / "below")
    with pytest.raises(IsADirectoryError, match="must be a file"):
        save_compressed({"weight": pruned(5, 4)}, path.parent)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_signs_of_zeros_take_at_most_a_bit(path, dtype):
    weights, mask = pruned(200, 300, density=1, dtype=dtype), pruned(200, 300, seed=1) != 0
    for signed, most in ((weights * mask, 54_000 / 8 + 100), (-(weights.abs() * mask), 100)):
        plain = save_compressed({"weight": signed + 0.0}, path)  # which makes -0.0 zero
        assert same_bits(there_and_back({"weight": signed}, path)["weight"], signed)
        assert torch.equal(load_mask(path)["weight"], mask)
        assert path.stat().st_size < plain + most
