"""Calibration batches that run by turns give the same refit as batches that run one after the other."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
import warnings

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_roulette.refit import turns
from lightning_roulette.refit.inputs import Calibration
from lightning_roulette.refit.solvers.fastest import Fastest
from lightning_roulette.refit_settings import LeastSquares, Refit
from tests.support.limits import set_limits
from tests.support.networks import KINDS, Layers, case, known, mask_of, related, state_of


class Chain(Layers):
    """Three layers; derived classes do something around them."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(4, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 3))

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class InLowPrecision(Chain):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x.float())


class TwiceInLowPrecision(InLowPrecision):
    """Calls a layer twice, whose cast weights autocast keeps."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            h = self.b(torch.tanh(self.a(x.float())))
            return self.c(torch.tanh(self.b(torch.tanh(h))))


class WithoutGradients(Chain):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class Inferring(Chain):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        with torch.inference_mode():
            return self.c(torch.tanh(self.b(h)))


class WithDropout(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.c(self.drop(torch.tanh(self.b(self.drop(torch.tanh(self.a(x)))))))


class InPlace(Chain):
    def forward(self, x):
        h = self.a(x)
        return self.c(torch.relu_(self.b(torch.relu_(h)).add_(h)))


class Switching(Chain):
    """Sets global switches around its layers, each for itself."""

    def forward(self, x):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            h = torch.tanh(self.a(x)) + torch.ones(6)
            with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
                warnings.simplefilter("ignore")
                h = torch.tanh(self.b(h))
            return self.c(h)
        finally:
            torch.set_default_dtype(before)


class Keeping(Chain):
    """Keeps a tensor on itself between two layers."""

    def forward(self, x):
        self.kept = torch.tanh(self.a(x))
        h = torch.tanh(self.b(self.kept))
        return self.c(h + self.kept)


class ForTheLastShape(Chain):
    """Keeps a tensor for inputs of the last shape."""

    def __init__(self) -> None:
        super().__init__()
        self.place = torch.zeros(0)

    def forward(self, x):
        if len(self.place) != len(x):
            self.place = torch.linspace(-1, 1, len(x)).unsqueeze(1)
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.c(h + self.place)


class Busy(Chain):
    """Fails if it is called while it runs."""

    runs = False

    def forward(self, x):
        assert not self.runs
        self.runs = True
        try:
            return super().forward(x)
        finally:
            self.runs = False


class Locked(Chain):
    """Holds a lock while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __deepcopy__(self, memo):
        raise NotImplementedError

    def forward(self, x):
        with self.lock:
            return super().forward(x)


class Drawing(Chain):
    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)) + torch.randn(6))))


SIZES = (40, 48, 40)
TOGETHER = [InLowPrecision, TwiceInLowPrecision, WithoutGradients, Inferring, WithDropout, InPlace, Switching]


def chain_case(kind: type[Chain]):
    net = known(kind())
    if issubclass(kind, InLowPrecision):
        net.float()
    return net, [related(size, 4, seed=seed) for seed, size in enumerate(SIZES)], mask_of(net)


def counted(net: nn.Module) -> list[None]:
    runs: list[None] = []
    net.register_forward_pre_hook(lambda *_: runs.append(None))
    return runs


def alike(one, other) -> bool:
    """Bit for bit."""
    return one.undone == other.undone and all(torch.equal(one.values[name], other.values[name]) for name in one.values)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("how", [LeastSquares(), Refit()])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_by_turns_give_the_same_bits_as_one_after_the_other(kind, how, caplog):
    caplog.set_level(logging.INFO)
    net, batches, mask = case(kind)
    expected = Calibration(net, batches, cache_bytes=0).refit(mask, how)
    caplog.clear()
    before, calibration = state_of(net), Calibration(net, batches)
    assert all(alike(calibration.refit(mask, how), expected) for _ in range(2))
    assert state_of(net) == before
    assert caplog.messages == []


@pytest.mark.parametrize("kind", TOGETHER)
def test_what_a_forward_sets_for_itself_stays_its_own(kind, caplog):
    net, batches, mask = chain_case(kind)
    net.train()
    expected = Calibration(net, batches, cache_bytes=0).refit(mask)
    filters, dtype = list(warnings.filters), torch.get_default_dtype()
    caplog.set_level(logging.INFO)
    caplog.clear()  # of what was logged if an earlier test has set the level
    before, runs, calibration = state_of(net), counted(net), Calibration(net, batches)
    calibration.others(mask, LeastSquares())
    assert len(runs) == len(batches)
    calibration.refit(mask)
    runs.clear()
    assert alike(calibration.refit(mask), expected)
    assert len(runs) == len(batches) * (2 if kind is TwiceInLowPrecision else 1)
    assert caplog.messages == []
    net._forward_pre_hooks.clear()
    assert state_of(net) == before
    assert (list(warnings.filters), torch.get_default_dtype()) == (filters, dtype)
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.parametrize("modes", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode])
def test_a_run_has_the_modes_of_the_caller(modes):
    net, batches, mask = chain_case(Chain)
    net, batches = net.float(), [batch.float() for batch in batches]
    seen = set()
    net.b.register_forward_hook(lambda _, __, output: seen.add((output.dtype, output.is_inference())))
    found = []
    for memory in (0, 2**31):
        with modes():
            found.append(Calibration(net, batches, cache_bytes=memory).refit(mask))
    assert len(seen) == 1
    assert alike(*found)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Keeping, "RuntimeError: The size of tensor a (40) must match the size of tensor b (48)"),
        (Drawing, "the inputs of b.weight change then"),
        (Busy, "AssertionError"),
        (Locked, "TimeoutError: a forward that waited did not go on within 0 s"),
    ],
)
def test_a_network_that_cannot_be_run_by_turns_is_refitted_layer_by_layer(kind, why, caplog, monkeypatch):
    if kind is Locked:
        monkeypatch.setattr(turns, "_LEAST_SECONDS", 0.2)
        monkeypatch.setattr(turns, "_PATIENCE", 0)
    net, batches, mask = chain_case(kind)
    torch.manual_seed(3)
    runs, calibration = counted(net), Calibration(net, batches)
    caplog.set_level(logging.INFO)
    calibration.refit(mask)
    (message,) = caplog.messages
    assert message.startswith("the calibration batches run anew for each layer, because they cannot run by turns (")
    assert why in message
    runs.clear()
    found = calibration.refit(mask)
    assert len(runs) == 2 * len(batches)
    assert caplog.messages == [message]
    if kind is not Drawing:
        chain = {Keeping: Keeping}.get(kind, Chain)
        other, _, _ = chain_case(chain)
        assert alike(found, Calibration(other, batches, cache_bytes=0).refit(mask))


@pytest.mark.parametrize("sizes", [(40, 40, 40, 48), (48, 40, 40, 40)])
def test_a_trial_has_batches_of_two_shapes(sizes, caplog):
    batches = [related(size, 4, seed=seed) for seed, size in enumerate(sizes)]
    caplog.set_level(logging.INFO)
    found = []
    for memory in (0, 2**31):
        net = known(ForTheLastShape())
        caplog.clear()
        found.append(Calibration(net, batches, cache_bytes=memory).refit(mask_of(net)))
    assert alike(*found)
    (message,) = caplog.messages
    assert "because they cannot run by turns (RuntimeError: The size of tensor" in message


def test_statistics_alone_need_no_first_run_of_their_own(caplog):
    net, batches, mask = case("conv")
    expected = Calibration(net, batches).refit(mask, "batch_norm")
    runs, calibration = counted(net), Calibration(net, batches)
    calibration.refit(mask)
    runs.clear()
    found = calibration.refit(mask, "batch_norm")
    assert alike(found, expected)
    assert found.values.keys() == expected.values.keys()
    assert calibration.others(mask, Refit()).keys() == expected.values.keys() - mask.keys()
    assert len(runs) == len(batches)


def test_a_network_without_layers_to_refit_does_not_run():
    net, batches, mask = chain_case(Chain)
    runs, calibration = counted(net), Calibration(net, batches)
    assert calibration.others(mask, Refit()) == {}
    assert calibration.refit(mask, Refit()).values.keys() == mask.keys()
    assert runs == []


class Solver:
    """Solves a few layers and then raises."""

    def __init__(self, layers: int, error: type[BaseException]) -> None:
        self._left, self._error, self._solver = layers, error, Fastest(1e-3)

    def init(self, sums):
        self._left -= 1
        if self._left < 0:
            raise self._error("no more")
        return self._solver.init(sums)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("layers", range(3))
def test_an_error_of_the_solver_ends_all_threads(layers, error, monkeypatch):
    net, batches, mask = chain_case(Chain)
    before, threads, calibration = state_of(net), threading.active_count(), Calibration(net, batches)
    expected = calibration.refit(mask)
    with monkeypatch.context() as patched:
        solver = Solver(layers, error)
        patched.setattr("lightning_roulette.refit.fitting.Fastest", lambda _: solver)
        with pytest.raises(error, match="no more"):
            calibration.refit(mask)
    assert threading.active_count() == threads
    assert state_of(net) == before
    assert alike(calibration.refit(mask), expected)


class Pressing(Chain):
    """Presses Ctrl-C in some run, in the middle or at the end of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.late, self.again = 10**9, False, False

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if not self.late:
            self._press()
        try:
            return self.c(torch.tanh(self.b(h)))
        finally:
            if self.late:
                self._press()

    def _press(self):
        self.left -= 1
        for _ in range(1 + self.again) if self.left == 0 else ():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.05)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("left", [1, 2, 4, 5])
def test_ctrl_c_ends_all_threads_and_gives_the_network_back(left, late, again):
    net, batches, mask = chain_case(Pressing)
    before, threads, calibration = state_of(net), threading.active_count(), Calibration(net, batches)
    calibration.others(mask, LeastSquares())
    net.left, net.late, net.again = left, late, again
    with pytest.raises(KeyboardInterrupt):  # in the trial, or in the refit after it
        calibration.refit(mask)
    assert threading.active_count() == threads
    assert state_of(net) == before
    net.left = 10**9
    assert alike(calibration.refit(mask), Calibration(net, batches, cache_bytes=0).refit(mask))


class Loud(Chain):
    """Does not let a hook end its forward."""

    def forward(self, x):
        try:
            return super().forward(x)
        except BaseException as error:
            raise RuntimeError("not like this") from error


@pytest.mark.parametrize("memory", [0, 2**31])
def test_a_network_that_cannot_be_ended_raises_its_error(memory):
    net, batches, mask = chain_case(Loud)
    with pytest.raises(RuntimeError, match="not like this"):
        Calibration(net, batches, cache_bytes=memory).refit(mask)


def wide(batches: int):
    """Between its layers, a run holds an input of 200 x 64 and an output of the same size at most."""
    net = known(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)))
    return net, [related(200, 64, seed=seed) for seed in range(batches)], mask_of(net)


ONE = 200 * 64 * 8


@pytest.mark.parametrize(("room", "waiting"), [(0.5, 0), (1.5, 1), (3.5, 3), (4.5, 3), (5.5, 4), (100, 5)])
def test_only_as_many_batches_wait_as_fit(room, waiting, caplog):
    net, batches, mask = wide(5)
    expected = Calibration(net, batches, cache_bytes=0).refit(mask)
    caplog.set_level(logging.INFO)
    caplog.clear()
    # in the last three rows, outputs of the dense network take some of it
    calibration = Calibration(net, batches, rows=10**6, cache_bytes=int(room * ONE))
    runs = counted(net)
    assert alike(calibration.refit(mask), expected)
    runs.clear()
    assert alike(calibration.refit(mask), expected)
    assert len(runs) == waiting + 2 * (5 - waiting)
    if waiting == 5:
        assert caplog.messages == []
    else:
        (message,) = caplog.messages
        # nothing waits for long at the first layer, before which there is nothing to hold
        assert message.startswith(f"a calibration batch runs anew {5 - waiting} times in a refit, because all batches")
        assert f"would hold {5 * ONE:,} bytes while they wait" in message
        assert f"Pass cache_bytes={math.ceil(5 * ONE * 4 / 3)} to the refit" in message


@pytest.mark.parametrize(("room", "waiting"), [(3.5, 2), (6.5, 3), (100, 5)])
def test_what_larger_batches_hold_is_estimated_from_the_tried_ones(room, waiting, caplog):
    net, _, mask = wide(0)
    batches = [related(size, 64, seed=size) for size in (199, 200, 401, 602, 603)]  # the last two are not tried
    expected = Calibration(net, batches, rows=5, cache_bytes=0).refit(mask)
    caplog.set_level(logging.INFO)
    caplog.clear()
    calibration, runs = Calibration(net, batches, rows=5, cache_bytes=int(room * ONE)), counted(net)
    assert alike(calibration.refit(mask), expected)
    runs.clear()
    assert alike(calibration.refit(mask), expected)
    assert len(runs) == waiting + 2 * (5 - waiting)
    if waiting < 5:
        (message,) = caplog.messages
        assert f"would hold {2005 * 64 * 8:,} bytes while they wait" in message


def test_batches_that_run_anew_at_a_wide_layer_wait_at_those_after_it(caplog):
    sizes = [(4, 64), (64, 64), *[(64, 8)], *[(8, 8)] * 6]
    net = known(nn.Sequential(*[layer for size in sizes for layer in (nn.Linear(*size), nn.Tanh())]))
    batches, mask = [related(200, 4, seed=seed) for seed in range(5)], mask_of(net)
    caplog.set_level(logging.INFO)
    calibration = Calibration(net, batches, cache_bytes=2 * ONE)
    expected = Calibration(net, batches, cache_bytes=0).refit(mask)
    runs = counted(net)
    assert alike(calibration.refit(mask), expected)
    runs.clear()
    assert alike(calibration.refit(mask), expected)
    assert len(runs) == 5 + 2 * 4  # four of five run anew after each of the two wide layers
    assert any(message.startswith("a calibration batch runs anew 8 times in a refit") for message in caplog.messages)


def test_the_memory_that_is_asked_for_is_enough(caplog):
    net, batches, mask = wide(5)
    caplog.set_level(logging.INFO)
    Calibration(net, batches, cache_bytes=math.ceil(5 * ONE * 4 / 3)).refit(mask)
    assert caplog.messages == []


def test_threads_are_bounded(monkeypatch, caplog):
    net, batches, mask = wide(5)
    set_limits(monkeypatch, waiting_threads=2 * torch.get_num_threads())
    caplog.set_level(logging.INFO)
    calibration, most, threads = Calibration(net, batches), [], threading.active_count()
    net[2].register_forward_pre_hook(lambda *_: most.append(threading.active_count()))
    calibration.refit(mask)
    assert max(most) == threads + 2 + 1
    (message,) = caplog.messages
    # three do not wait at the first layer, and three at the second
    assert message == (
        "a calibration batch runs anew 6 times in a refit, because at most 2 batches may wait, each in a thread of its "
        "own."
    )
