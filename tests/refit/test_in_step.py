"""Two processes that each hold half of the rows of every weight: their refit is that of one process with all rows."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from faulthandler import dump_traceback_later
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_roulette.large.communication import Communication
from lightning_roulette.large.gathered import full
from lightning_roulette.large.shards import is_sharded
from lightning_roulette.refit import layerwise
from lightning_roulette.refit.inputs import Calibration
from lightning_roulette.refit.matrices import RowSampler
from lightning_roulette.refit.refitted import Survivors
from lightning_roulette.refit_settings import LeastSquares, Refit
from tests.support.networks import KINDS, Choosy, Either, case
from tests.support.shares import assert_close
from tests.support.together import two_processes

pytestmark = pytest.mark.slow

SIZES = (48, 40, 48, 40, 56)  # the second process has one batch less
UNSHARDED = ("late", "lstm", "gru", "packed")  # FSDP2 does not support recurrent modules
CASES = {
    **{kind: (kind, LeastSquares()) for kind in KINDS if kind not in UNSHARDED},
    "chosen": ("conv", LeastSquares(choose=True)),
    "int8": ("encoder", LeastSquares(values="int8")),
    "codebook": ("mlp", LeastSquares(values={"bits": 4})),
    "statistics": ("residual", Refit()),
}


def refitted(name: str, calibration_of, net, batches, mask) -> dict:
    """One of the cases, in plain tensors: values, why some were not kept, the mask, and what a search stores."""
    found = calibration_of(net, batches).refit(mask, CASES[name][1])
    kept = found.mask_from(mask)
    stored = Survivors.of(kept, found.values)
    spread = stored.spread(kept, dict(net.named_parameters()))
    assert all(is_sharded(spread[one]) == is_sharded(value) for one, value in found.values.items())
    return {
        "values": whole(found.values),
        "undone": dict(found.undone),
        "mask": dict(kept),
        "stored": dict(stored.values),
        "spread": whole(spread),
        "alone": stored.whole(kept),
    }


def whole(tensors) -> dict:
    return {name: full(one.detach()).clone() for name, one in tensors.items()}


def sharded(net, mesh):
    """The network with its parts sharded apart, if it calls all of them on every batch, but for the last one."""
    for part in list(net.children())[:-1] if not isinstance(net, Either | Choosy) else ():
        if list(part.parameters()):
            fully_shard(part, mesh=mesh)
    return fully_shard(net, mesh=mesh)


@contextmanager
def failing(owner, name: str, here: bool):
    """A function that fails, or not in this process."""

    def fail(*_, **__):
        raise ArithmeticError("a division by zero")

    before = getattr(owner, name)
    setattr(owner, name, fail if here else before)
    try:
        yield
    finally:
        setattr(owner, name, before)


def raised(work) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@torch.no_grad()
def talks(run) -> bool:
    with Communication() as communication:
        run()
    return communication.seen


def work(rank: int, folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mesh, found = init_device_mesh("cpu", (2,)), {}

    def share(net, batches) -> Calibration:
        return Calibration(net, batches[rank::2])

    dump_traceback_later(120, exit=True)
    for name, (kind, _) in CASES.items():
        net, batches, mask = case(kind, sizes=SIZES)
        before = whole(dict(sharded(net, mesh).named_parameters()))
        found[name] = refitted(name, share, net, batches, mask)
        assert all(torch.equal(full(one.detach()), before[own]) for own, one in net.named_parameters())

    net, batches, mask = case("mlp", sizes=SIZES)
    found["no batch"] = raised(lambda: share(sharded(net, mesh), batches[:1]))
    found["talks"] = [talks(lambda: net(batches[0])), talks(lambda: distributed.all_reduce(net(batches[0])))]
    calibration = share(net, batches)
    for owner, what in ((RowSampler, "rows"), (layerwise, "fault"), (layerwise, "write_matrix")):
        with failing(owner, what, rank == 1):
            found[f"{what} fails"] = raised(lambda: calibration.refit(mask))
    found["after failures"] = whole(calibration.refit(mask).values)
    with failing(net[1], "forward", rank == 1):
        found["forward fails"] = raised(lambda: calibration.refit(mask))  # the first one waits until the second ends
    torch.save(found, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_processes(__file__, tmp_path_factory.mktemp("in_step"), {})


@pytest.mark.parametrize("name", CASES)
def test_a_refit_on_shards_is_that_of_one_process(ranks, name):
    net, batches, mask = case(CASES[name][0], sizes=SIZES)
    expected = refitted(name, Calibration, net, batches, mask)
    for found in (rank[name] for rank in ranks):
        for what in ("values", "stored", "spread", "alone"):
            assert_close(found[what], expected[what])
        assert found["undone"] == expected["undone"]
        assert all(torch.equal(kept, expected["mask"][weight]) for weight, kept in found["mask"].items())
    assert any(not torch.equal(value, whole(dict(net.named_parameters())).get(one)) for one, value in mask.items())


@pytest.mark.parametrize("what", ["rows", "fault", "write_matrix"])
def test_a_failure_in_one_process_is_one_in_both_and_the_next_refit_works(ranks, what):
    first, second = (rank[f"{what} fails"] for rank in ranks)
    assert first == "FailedElsewhere: another process failed in the same calculation. Its error says why."
    assert second == "ArithmeticError: a division by zero"
    net, batches, mask = case("mlp", sizes=SIZES)
    expected = Calibration(net, batches).refit(mask).values
    for rank in ranks:
        assert_close(rank["after failures"], expected)


def test_a_network_that_fails_in_one_process_lets_none_wait(ranks):
    first, second = (rank["forward fails"] for rank in ranks)
    assert second.startswith("OutOfStep: the network failed in a run that all processes make together (ArithmeticError")
    assert first.startswith("OutOfStep: the network failed in a run that all processes make together (")


def test_only_what_the_network_says_itself_is_communication(ranks):
    assert [rank["talks"] for rank in ranks] == [[False, True], [False, True]]


def test_a_process_without_a_batch_is_refused(ranks):
    for rank in ranks:
        assert rank["no batch"].startswith("ValueError: there are 1 batches for 2 processes, but each process that")


if __name__ == "__main__":
    multiprocessing.spawn(work, (Path(sys.argv[1]),), nprocs=2)
