"""Hooks see the calls of one run and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_roulette.network.hooks import Enough, run_with_hooks


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))


class CallsByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Bilinear(2, 2, 1)

    def forward(self, x):
        return self.part(x, input2=x)


def hooks_of(net):
    return [hook for part in net.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]


def test_the_hook_before_a_call_sees_positional_and_keyword_arguments():
    net, seen = CallsByName(), []
    run_with_hooks(lambda: net(torch.ones(1, 2)), [net.part], before=lambda part, *given: seen.append((part, *given)))
    ((part, positional, keywords),) = seen
    assert (part, len(positional), list(keywords)) == (net.part, 1, ["input2"])


def test_the_hook_after_a_call_may_replace_the_output(net):
    outputs = []
    run_with_hooks(lambda: outputs.append(net(torch.ones(1, 2))), [net[2]], after=lambda _, __, output: output + 1)
    assert torch.equal(outputs[0], net(torch.ones(1, 2)) + 1)


def test_both_hooks_see_every_call_in_order_and_without_gradients(net):
    seen = []
    run_with_hooks(
        lambda: net(torch.ones(1, 2)),
        [net[0], net[2]],
        before=lambda part, *_: seen.append(("before", part, torch.is_grad_enabled())),
        after=lambda part, *_: seen.append(("after", part, torch.is_grad_enabled())),
    )
    assert seen == [(when, part, False) for part in (net[0], net[2]) for when in ("before", "after")]
    assert torch.is_grad_enabled()


def test_a_hook_may_end_the_run_and_the_network_cannot_catch_it(net):
    def run():
        try:
            net(torch.ones(1, 2))
        except Exception:
            pytest.fail("the network caught it")
        pytest.fail("the run went on")

    def stop(*_):
        raise Enough

    run_with_hooks(run, [net[1]], before=stop)
    assert hooks_of(net) == []


def test_hooks_are_removed_after_an_error(net):
    with pytest.raises(RuntimeError):
        run_with_hooks(lambda: net(torch.ones(1, 5)), net, before=lambda *_: None, after=lambda *_: None)
    assert hooks_of(net) == []
    assert torch.backends.mha.get_fastpath_enabled()


def test_fused_attention_calls_the_hooks_too():
    net = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True).eval()
    seen = []
    run_with_hooks(lambda: net(torch.ones(1, 2, 4)), [net.linear1], before=lambda part, *_: seen.append(part))
    assert seen == [net.linear1]
