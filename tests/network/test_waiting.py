"""A function in a thread of its own runs only when it is told to, and always ends."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from contextvars import ContextVar

import pytest
import torch

from lightning_roulette.network.hooks import Enough
from lightning_roulette.network.modes import ThreadModes, switches_put_back
from lightning_roulette.network.waiting import WaitingRun


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = threading.active_count()  # other libraries may have threads
    yield
    assert threading.active_count() == before


def waiting(work) -> WaitingRun:
    """A run of `work(run)`."""
    run = WaitingRun(lambda: work(run), ThreadModes.current())
    return run


def test_it_runs_from_one_wait_to_the_next_in_a_thread_of_its_own():
    seen = []

    def work(run):
        for number in range(3):
            seen.append((number, threading.current_thread() is not threading.main_thread()))
            run.wait()

    run = waiting(work)
    assert not seen
    for number in range(3):
        run.go_on()
        assert seen[-1] == (number, True)
        assert len(seen) == number + 1
        assert (run.waits, run.ended) == (True, False)
    run.go_on()
    assert (run.waits, run.ended) == (False, True)


def test_what_it_raises_is_raised_where_it_is_told_to_go_on():
    def work(run):
        run.wait()
        raise ValueError("no")

    run = waiting(work)
    run.go_on()
    with pytest.raises(ValueError, match="no"):
        run.go_on()
    run.close()


@pytest.mark.parametrize("begun", [False, True])
def test_closing_ends_it_where_it_waits(begun):
    seen = []

    def work(run):
        try:
            run.wait()
            seen.append("went on")
        except Exception:
            seen.append("caught")
        finally:
            seen.append("cleaned up")

    run = waiting(work)
    if begun:
        run.go_on()
    for _ in range(2):
        run.close()
    assert seen == (["cleaned up"] if begun else [])


def test_an_error_while_it_ends_is_raised_once():
    def work(run):
        try:
            run.wait()
        except Enough:
            raise ValueError("not now") from None

    run = waiting(work)
    run.go_on()
    with pytest.raises(ValueError, match="not now"):
        run.close()
    run.close()


def test_a_run_that_takes_too_long_can_still_be_closed():
    door = threading.Event()

    def work(run):
        door.wait()
        run.wait()

    run = waiting(work)
    with pytest.raises(TimeoutError, match="did not go on within 0 s"):
        run.go_on(0.05)
    door.set()
    run.close()
    assert run.ended


@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_does_not_keep_it_from_ending(presses):
    def work(run):
        for _ in range(presses):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.02)
        run.wait()

    run = waiting(work)
    with pytest.raises(KeyboardInterrupt):
        run.go_on()
    try:
        run.close()
    except KeyboardInterrupt:
        assert presses > 1
    assert run.ended


def test_it_has_the_modes_of_the_thread_that_made_it():
    chosen = ContextVar("chosen", default=0)
    chosen.set(7)
    seen = []

    def modes():
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
            torch.get_default_device(),
            torch.get_num_threads(),
            chosen.get(),
        )

    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.float16, cache_enabled=False), torch.device("meta"):
            here = modes()
            waiting(lambda run: seen.append(modes())).go_on()
        with torch.inference_mode(), torch.enable_grad():
            there = modes()
            waiting(lambda run: seen.append(modes())).go_on()
        waiting(lambda run: seen.append(modes())).go_on()
        assert seen == [here, there, modes()]
    finally:
        torch.set_num_threads(threads)
        chosen.set(0)


def test_its_default_dtype_is_its_own():
    seen = []

    def work(run):
        torch.set_default_dtype(torch.float64)
        run.wait()
        seen.append(torch.get_default_dtype())

    run = waiting(work)
    run.go_on()
    assert torch.get_default_dtype() == torch.float32
    torch.set_default_dtype(torch.bfloat16)
    try:
        run.go_on()
        assert seen == [torch.float64]
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_switches_are_put_back():
    net = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2))
    net[0].eval()
    with suppress(ValueError), switches_put_back(net):
        net.train(False)
        torch.set_default_dtype(torch.float64)
        torch.backends.cuda.enable_flash_sdp(False)
        raise ValueError
    assert [part.training for part in net.modules()] == [True, False, True]
    assert torch.get_default_dtype() == torch.float32
    assert torch.backends.cuda.flash_sdp_enabled()
