"""The steps of every optimizer are seen, also of those that torch's own hooks do not see."""

from __future__ import annotations

import torch

from lightning_roulette.network.steps import watch_loads, watch_steps, with_inner


class Bare:
    """Not an optimizer of torch."""

    def step(self):
        seen.append("step")
        return 5


class Slots:
    __slots__ = ("inner",)

    def step(self):
        pass


class NeverInitialised(torch.optim.Optimizer):
    def __init__(self, **attributes) -> None:
        vars(self).update(attributes)

    def step(self, closure=None):
        seen.append("step")
        return 5


seen: list[str] = []


def sgd():
    return torch.optim.SGD([torch.zeros(2, requires_grad=True)])


def watched(optimizer):
    seen.clear()
    return watch_steps(optimizer, lambda *_: seen.append("before"), lambda *_: seen.append("after"))


def test_a_step_is_seen_until_the_end():
    for optimizer in (Bare(), NeverInitialised(), NeverInitialised(**vars(sgd()))):
        handles = watched(optimizer)
        assert optimizer.step() == 5
        assert seen == ["before", "step", "after"]
        for handle in handles:
            handle.remove()
        assert optimizer.step() == 5
        assert seen == ["before", "step", "after", "step"]
        assert "step" not in vars(optimizer)


def test_an_optimizer_of_torch_keeps_its_step():
    optimizer = sgd()
    handles = watched(optimizer)
    optimizer.step()
    assert (seen, "step" in vars(optimizer)) == (["before", "after"], False)
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert seen == ["before", "after"]


def test_a_step_that_the_object_had_comes_back():
    optimizer = Bare()
    own = optimizer.step = optimizer.step
    (handle,) = watched(optimizer)
    assert optimizer.step is not own
    handle.remove()
    assert optimizer.step is own


def test_a_step_that_another_has_wrapped_since_stays_and_is_watched_no_more():
    optimizer = Bare()
    (handle,) = watched(optimizer)
    ours = optimizer.step
    theirs = optimizer.step = lambda: ours()
    handle.remove()
    assert optimizer.step is theirs
    assert optimizer.step() == 5
    assert seen == ["step"]


def test_what_cannot_be_watched_has_no_handle():
    assert watched(Slots()) == []
    assert watch_loads(Slots(), print) == watch_loads(NeverInitialised(), print) == []


def test_loads_are_seen():
    optimizer, loaded = sgd(), []
    (handle,) = watch_loads(optimizer, loaded.append)
    optimizer.load_state_dict(optimizer.state_dict())
    handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert loaded == [optimizer]


def test_inner_optimizers_are_found_once_wherever_they_are():
    inner = [sgd() for _ in range(4)]
    first = NeverInitialised(inner=inner[0], several=inner[1:3], named={"last": inner[3]}, again=inner[0])
    outer = NeverInitialised(inner=first)
    first.outer = outer  # a cycle
    assert list(with_inner([outer, inner[0]])) == [outer, first, *inner]
    assert list(with_inner([Slots()]))
