"""The calls of a metric are recorded, and give the scores of single samples or batches."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, MeanSquaredError, MetricCollection, SumMetric
from torchmetrics.classification import (
    BinaryAccuracy,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassPrecision,
    MultilabelAccuracy,
)

from lightning_roulette.judge.outcomes import Batches, Resamples, Singles
from lightning_roulette.trainer.scores.metric_calls import batches_of, calls_of, outcomes_of

SIZES = (32, 32, 7)


def classified(classes=4, seed=0):
    """Batches of scores that often favour the true class, and the true classes."""
    chance = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (sum(SIZES),), generator=chance)
    scores = torch.randn(sum(SIZES), classes, generator=chance) + 1.5 * nn.functional.one_hot(target, classes)
    return list(zip(scores.softmax(1).split(SIZES), target.split(SIZES), strict=True))


def whole(batches):
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


GIVE = {
    "by call": lambda metric, scores, target: metric(scores, target),
    "by update": lambda metric, scores, target: metric.update(scores, target),
    "by name": lambda metric, scores, target: metric(target=target, preds=scores),
    "by name in part": lambda metric, scores, target: metric.update(scores, target=target),
}
BY_CALL = GIVE["by call"]
ways = pytest.mark.parametrize("give", GIVE.values(), ids=GIVE)


def heard(metric, batches, give=BY_CALL, module=None, given=None):
    """The calls of one validation of `module`, in which `given` gets the batches."""
    with calls_of(metric, module or nn.ModuleDict({"metric": metric}), lambda: None) as calls:
        for batch in batches:
            give(metric if given is None else given, *batch)
    return calls


def outcomes(metric, batches, give=BY_CALL, sign=1):
    calls = heard(metric, batches, give)
    return outcomes_of(metric, calls, sign, float(metric.compute()))


def right(batches, k=1):
    """1 where the true class is among the k best scores, sample by sample."""
    scores, target = whole(batches)
    return (scores.topk(k).indices == target[:, None]).any(1).double()


# ---- means over samples


def one_hot(target):
    return nn.functional.one_hot(target, 4)


MEANS = {
    "accuracy": (MulticlassAccuracy(4, average="micro"), classified(), right(classified())),
    "two best": (MulticlassAccuracy(4, average="micro", top_k=2), classified(), right(classified(), k=2)),
    "classes": (
        MulticlassAccuracy(4, average="micro"),
        [(scores.argmax(1), target) for scores, target in classified()],
        right(classified()),
    ),
    "precision": (MulticlassPrecision(4, average="micro"), classified(), right(classified())),
    **{
        f"binary, {threshold}": (
            BinaryAccuracy(threshold=threshold),
            [(scores[:, 1], (target == 1).long()) for scores, target in classified()],
            torch.cat([((scores[:, 1] > threshold) == (target == 1)).double() for scores, target in classified()]),
        )
        for threshold in (0.5, 0.8)
    },
    "multilabel": (
        MultilabelAccuracy(4, threshold=0.3, average="micro"),
        [(scores, one_hot(target)) for scores, target in classified()],
        torch.cat([((scores > 0.3) == one_hot(target)).double().mean(1) for scores, target in classified()]),
    ),
}


@ways
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", MEANS)
def test_a_mean_over_samples_has_an_outcome_for_each_sample(name, sign, give):
    metric, batches, expected = MEANS[name]
    found = outcomes(metric.clone(), batches, give, sign)
    assert isinstance(found, Singles)
    torch.testing.assert_close(found.values, sign * expected)
    assert (found.low, found.high) == ((0.0, 1.0) if sign == 1 else (-1.0, 0.0))
    assert 0 < expected.mean() < 1


# ---- other metrics


OTHERS = {
    "accuracy": (MulticlassAccuracy(4, average="macro"), classified()),
    "f1": (MulticlassF1Score(4, average="macro"), classified()),
    "auroc": (MulticlassAUROC(4), classified()),
    "ignoring": (MulticlassAccuracy(4, average="micro", ignore_index=2), classified()),
    "unbounded": (MeanSquaredError(), [(scores[:, 0], scores[:, 1]) for scores, _ in classified()]),
}


@ways
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", OTHERS)
def test_a_metric_that_is_no_mean_over_samples_is_computed_on_resamples(name, sign, give):
    metric, batches = OTHERS[name][0].clone(), OTHERS[name][1]
    found = outcomes(metric, batches, give, sign)
    scores, target = whole(batches)
    assert isinstance(found, Resamples)
    assert found.size == len(target)
    everything = torch.arange(len(target))
    again = torch.randint(len(target), (len(target),), generator=torch.Generator().manual_seed(1))
    for index in (everything, again):
        metric.reset()
        expected = sign * float(metric(scores[index], target[index]))
        assert found.score(index) == pytest.approx(expected, abs=1e-6)
    assert found.score(everything) != found.score(again)


def test_a_mean_of_one_number_a_batch_has_an_outcome_for_each_batch():
    metric, numbers, weights = MeanMetric(), [0.5, 0.25, 1.0], [32, 32, 7]
    found = outcomes(metric, list(zip(numbers, weights, strict=True)), sign=-1)
    assert isinstance(found, Batches)
    assert found.values.tolist() == [-0.5, -0.25, -1.0]
    assert found.weights.tolist() == weights
    found = outcomes(MeanMetric(), [(torch.tensor(number),) for number in numbers], give=lambda one, x: one.update(x))
    assert found.values.tolist() == numbers
    assert found.weights.tolist() == [1, 1, 1]


def test_a_mean_of_many_numbers_a_batch_is_computed_on_resamples():
    numbers = torch.rand(8)
    found = outcomes(MeanMetric(), [(part, 1.0) for part in numbers.split(4)])
    assert isinstance(found, Resamples)
    assert found.score(torch.tensor([1, 1, 6])) == pytest.approx(float(numbers[[1, 1, 6]].mean()))


@pytest.mark.parametrize("kind", [MulticlassAccuracy, MulticlassF1Score])
def test_a_macro_average_is_no_mean_over_samples_even_of_a_network_without_error(kind):
    target = torch.arange(12) % 4
    found = outcomes(kind(4, average="macro"), [(nn.functional.one_hot(target, 4).float(), target)])
    assert isinstance(found, Resamples)


@pytest.mark.parametrize(
    ("weights", "value", "known"),
    [([3.0, 1.0], 1.75, True), ([3.0, 1.0], 2.5, False), ([4.0, 0.0], 1.0, False), ([1.0, -0.5], 1.0, False)],
)
def test_batches_have_the_weights_of_the_mean_and_none_if_the_value_is_not_their_mean(weights, value, known):
    found = batches_of(torch.tensor([1.0, 4.0]), torch.tensor(weights), -1, value)
    assert (found is not None) == known
    if found is not None:
        assert found.values.tolist() == [-1.0, -4.0]
        assert found.weights.tolist() == weights


# ---- no outcomes


@pytest.mark.parametrize("metric", [MulticlassAccuracy(4, average="micro"), MulticlassF1Score(4), MeanMetric()])
def test_there_are_no_outcomes_if_the_value_does_not_follow_from_the_calls(metric):
    batches = [(0.5, 1.0)] * 3 if isinstance(metric, MeanMetric) else classified()
    metric.reset()
    calls, value = heard(metric, batches), float(metric.compute())
    assert outcomes_of(metric, calls, 1, value) is not None
    assert outcomes_of(metric, calls, 1, value + 0.001) is None
    assert outcomes_of(metric, calls[:-1], 1, value) is None or isinstance(metric, MeanMetric)
    assert outcomes_of(metric, [], 1, value) is None


def test_there_are_no_outcomes_if_an_earlier_call_was_not_recorded():
    metric, batches = MulticlassAccuracy(4, average="micro"), classified()
    metric.update(1 - batches[0][0], batches[0][1])
    assert outcomes(metric, batches) is None


class Reweighted(SumMetric):
    """Takes samples and one number for the whole batch."""

    def update(self, scores, factor):
        super().update(factor * scores)


def test_there_are_no_outcomes_if_arguments_do_not_share_their_samples():
    batches = [(scores, torch.tensor(2.0)) for scores, _ in classified()]
    assert outcomes(Reweighted(), batches) is None


# ---- recording


@pytest.mark.parametrize("full", [True, False])
@ways
def test_each_call_is_recorded_once_in_order(give, full):
    batches = classified()
    metric = type("Stateful", (MulticlassAccuracy,), {"full_state_update": full})(4, average="micro")
    calls = heard(metric, batches, give)
    assert len(calls) == len(batches)
    for call, (scores, target) in zip(calls, batches, strict=True):
        given = {**dict(zip((0, 1), (scores, target), strict=True)), "preds": scores, "target": target}
        assert len(call.arguments) == 2
        assert all(one is given[name] for name, one in call.arguments.items())


def test_a_call_holds_the_number_of_the_loader():
    metric, number = MulticlassAccuracy(4), iter([0, 0, 1])
    with calls_of(metric, nn.ModuleDict({"metric": metric}), lambda: next(number)) as calls:
        for batch in classified():
            metric(*batch)
    assert [call.loader for call in calls] == [0, 0, 1]


def test_recording_changes_neither_answers_nor_states_of_a_metric():
    batches, plain, recorded = classified(), MulticlassAccuracy(4), MulticlassAccuracy(4)
    expected = [float(plain(*batch)) for batch in batches]
    answers = []
    heard(recorded, batches, lambda metric, *batch: answers.append(float(metric(*batch))))
    assert answers == expected
    assert float(recorded.compute()) == float(plain.compute())


@pytest.mark.parametrize("error", [None, RuntimeError("in a step"), KeyboardInterrupt()])
def test_after_the_block_nothing_is_recorded(error):
    collection = MetricCollection([MulticlassAccuracy(4), MulticlassPrecision(4), MulticlassAUROC(4)])
    metrics = list(collection.values(copy_state=False))
    before = [dict(vars(one)) for one in metrics]
    met = contextlib.nullcontext() if error is None else pytest.raises(type(error))
    with met, calls_of(metrics[1], nn.ModuleDict({"all": collection}), lambda: None) as calls:
        assert all(vars(one)["update"] is not old["update"] for one, old in zip(metrics, before, strict=True))
        if error is not None:
            raise error
    for one, old in zip(metrics, before, strict=True):
        assert vars(one).keys() == old.keys()
        assert all(vars(one)[name] is old[name] for name in ("update", "compute"))
    collection.update(*classified()[0])
    assert calls == []


def test_computing_outcomes_does_not_change_the_metric():
    for metric in (MulticlassAccuracy(4, average="micro"), MulticlassF1Score(4)):
        batches = classified()
        calls, value = heard(metric, batches), float(metric.compute())
        found = outcomes_of(metric, calls, 1, value)
        if isinstance(found, Resamples):
            found.score(torch.zeros(5, dtype=torch.long))
        assert metric.update_count == len(batches)
        assert metric.update_called
        metric._computed = None
        assert float(metric.compute()) == value


# ---- collections


def collection():
    """`accuracy` and `follows` share their states, `auroc` has its own."""
    accuracy, follows = MulticlassAccuracy(4, average="micro"), MulticlassPrecision(4, average="micro")
    return MetricCollection({"accuracy": accuracy, "auroc": MulticlassAUROC(4), "follows": follows})


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("give", [BY_CALL, GIVE["by update"]])
@pytest.mark.parametrize("name", ["accuracy", "follows"])
def test_calls_in_a_collection_count_for_all_metrics_that_share_states(name, give, used):
    batches, metrics = classified(), collection()
    if used:  # from then on the first of those that share is updated alone
        metrics.update(*batches[0])
        metrics.reset()
        assert ["accuracy", "follows"] in metrics.compute_groups.values()
    metric = metrics[name]
    calls = heard(metric, batches, give, module=nn.ModuleDict({"all": metrics}), given=metrics)
    found = outcomes_of(metric, calls, 1, float(metrics.compute()[name]))
    assert isinstance(found, Singles)
    assert torch.equal(found.values, right(batches))
