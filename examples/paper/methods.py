"""Our method and its peers. All prune the same trained networks and may use the same data.

- Training data may be used for gradients and calibration inputs, validation data for choices. The data that judges is
  used for nothing else.
- A peer orders the weights in its own way. The number of survivors is then chosen on the validation data: the smallest
  number on a fine grid that keeps the floor, even if a larger one does not.
- If a number of survivors takes many validations, long validations or a refit, only one in `STRIDE` points of the grid
  is tried. Then the points between the smallest that holds and the next one are tried.
- No method trains the pruned network. No peer changes the values of the survivors.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from data import Part, Task
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelPruning
from networks import as_trained, losses, predict, rmse, score, within_spread
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_roulette import (
    Calibration,
    LeastSquares,
    Mask,
    PrunedWeights,
    Scores,
    Singles,
    Tree,
    Validation,
    Wheel,
    Winner,
    prunable_parameters,
    search,
)
from lightning_roulette.judge.selection import keeps_floor
from lightning_roulette.wheel.importance import lamp

TOLERANCE = 0.005
INPUTS = {
    "lenet-5": 10_000,
    "photo-cnn": 10_000,
    "resnet-8": 2_500,
    "resnet-20": 2_500,
}  # largest number of calibration inputs
GRADIENT_BATCH = 100
NOISE = 0.03  # in units of a layer's root mean square weight
# simulated annealing: the weights that may be exchanged, as a share of the survivors on either side of the threshold;
# the share of these that a step exchanges; the first temperature, in units of the first loss
NEAR, EXCHANGED, HEAT = 0.05, 0.3, 0.002
BLOCK = 500  # validation rows of one forward pass
STRIDE = 4  # a curve shows every fourth point of the grid
SINGLES = 2_000  # training rows with a gradient of their own

Values = Mapping[str, Tensor]
Pruner = Callable[[int], Mask]


@dataclass(frozen=True)
class Size:
    """The size of the experiments.

    Attributes:
        branches: Number of candidates per level, and of draws of noise.
        tree: How levels follow one another.
        refit: How survivors are refitted.
        inputs: Largest number of calibration inputs, for any network.
        step: Factor between one point of the grid of survivors and the next.
        least: Share of the weights at which the grid ends.
    """

    branches: int = 20
    tree: Tree = field(default_factory=Tree)
    refit: LeastSquares = field(default_factory=LeastSquares)
    inputs: int = 50_000
    step: float = 0.95
    least: float = 0.005


QUICK = Size(2, Tree(pruning_rate=0.5, max_levels=2, patience=1), LeastSquares(finalists=1), 50, step=0.5, least=0.25)


@dataclass(frozen=True, eq=False)
class Found:
    """The result of a method.

    Attributes:
        left: Share of the prunable weights that is kept.
        values: The weights, zero where pruned, and every other value that differs from the dense network.
        path: `left` and `values` of other networks that the method tried, computed when they are read.
        validations: The work, in validations of one network on all validation data.
    """

    left: float
    values: Values
    path: Iterable[tuple[float, Values]]
    validations: float


class Case:
    """A trained network of a task. It can be scored with other values.

    Args:
        task: The data.
        net: The dense network, in evaluation mode. It is never changed.
        seed: Seed of all random numbers of a method.
        size: The size of the experiments.
        device: Device for the work.
    """

    def __init__(self, task: Task, net: nn.Module, seed: int, size: Size = Size(), device: str = "cpu") -> None:
        self.task, self.seed, self.size, self.net = task, seed, size, net.to(device)
        self.train, self.val, self.judge = (_moved(part, device) for part in (task.train, task.val, task.judge))
        self.weights = {name: weight.detach().clone() for name, weight in prunable_parameters(self.net).items()}
        self.total = sum(weight.numel() for weight in self.weights.values())
        self.validations = 0.0
        self._dense = {name: tensor.detach().clone() for name, tensor in self.net.state_dict().items()}
        self._lent = copy.deepcopy(self.net)

    @cached_property
    def grid(self) -> list[int]:
        """Numbers of survivors that are tried for a peer, in descending order from all weights."""
        steps = math.ceil(math.log(self.size.least) / math.log(self.size.step))
        return sorted({max(1, round(self.total * self.size.step**step)) for step in range(steps + 1)}, reverse=True)

    @cached_property
    def dense(self) -> dict[str, float | None]:
        """Validation score of the dense network, under `val`, and its judged scores."""
        return {"val": self.score({}, self.val), **self.judged({})}

    @cached_property
    def shuffled(self) -> Tensor:
        """Indices of the training rows, in an order that depends on the seed."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self.seed))
        return order.to(self.train.y.device)

    @property
    def calibration(self) -> Calibration:
        """Training inputs as the network saw them in training, without their targets."""
        inputs = min(self.size.inputs, INPUTS.get(self.task.network, self.size.inputs))
        parts, chance = self.shuffled[:inputs].split(GRADIENT_BATCH), torch.Generator().manual_seed(self.seed)
        x = torch.cat([as_trained(self.task, self.train.x[part], chance) for part in parts])
        return Calibration(self.net, [x], seed=self.seed)

    def outputs(self, values: Values, part: Part) -> Tensor:
        """Return the outputs of the network with some of its values replaced."""
        if part is self.val:
            self.validations += 1
        self._lent.load_state_dict({**self._dense, **values})
        return predict(self._lent, part.x)

    def score(self, values: Values, part: Part) -> float:
        """Return the accuracy, or the correlation of ranks. Larger is better."""
        return score(self.outputs(values, part), part.y, self.task.opinion)

    def holds(self, values: Values, floor: float) -> bool:
        """Return whether the validation score keeps the floor. For classes, stop as soon as the answer is known."""
        if self.task.opinion:
            return keeps_floor(self.score(values, self.val), floor)
        rows, missed, seen = len(self.val), 0, 0
        self._lent.load_state_dict({**self._dense, **values})
        for x, y in zip(self.val.x.split(BLOCK), self.val.y.split(BLOCK), strict=True):
            missed, seen = missed + int((predict(self._lent, x).argmax(1) != y).sum()), seen + len(y)
            if not keeps_floor((rows - missed) / rows, floor):
                break
        self.validations += seen / rows
        return keeps_floor((rows - missed) / rows, floor)

    def loss(self, values: Values, part: Part) -> float:
        """Return the mean loss over a part."""
        return float(losses(self.outputs(values, part), self.task, part.y).double().mean())

    def judged(self, values: Values) -> dict[str, float | None]:
        """Return all reported scores of a network, on the data that judges. None: does not apply to the task."""
        outputs, task = self.outputs(values, self.judge), self.task
        return {
            "judge": score(outputs, self.judge.y, task.opinion),
            "rmse": rmse(outputs, task, self.judge.y) if task.opinion else None,
            "within": within_spread(outputs, task, self.judge) if task.opinion else None,
        }

    def masked(self, mask: Mask) -> Values:
        """Return the dense weights, zero where pruned."""
        return PrunedWeights(mask, self.weights).weights


class OnPart:
    """An evaluator on data in memory. It ranks by loss, and judges by the task's score. Single samples form the folds.

    Args:
        case: The network and its task.
        part: The validation data.
        folds: Number of folds.
    """

    def __init__(self, case: Case, part: Part, folds: int = 16) -> None:
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(case.seed))
        self.case, self.folds, self._part = case, folds, part.rows(order.to(part.y.device))

    def __call__(self, candidate: PrunedWeights, folds: Sequence[int]) -> Scores:
        """Return the scores of the network with the candidate's weights on adjacent folds."""
        return self._judged(candidate, folds)[0]

    def recorded(self, candidate: PrunedWeights, folds: Sequence[int]) -> tuple[Scores, Singles | None]:
        """Return the scores, and for each sample whether it was classified correctly. None for a correlation."""
        scores, outputs, part = self._judged(candidate, folds)
        hits = None if self.case.task.opinion else (outputs.argmax(1) == part.y).double()
        return scores, None if hits is None else Singles(hits, 0.0, 1.0)

    def _judged(self, candidate: PrunedWeights, folds: Sequence[int]) -> tuple[Scores, Tensor, Part]:
        size, task = len(self._part), self.case.task
        part = self._part.rows(slice(size * min(folds) // self.folds, size * (max(folds) + 1) // self.folds))
        outputs = self.case.outputs(candidate.weights, part)
        loss, floor = float(losses(outputs, task, part.y).double().mean()), score(outputs, part.y, task.opinion)
        return Scores(rank=-loss, score=floor, tiebreak=floor), outputs, part


def paper(case: Case) -> Found:
    """Run the paper's method as its abstract reads: sharpness 1, and the score both ranks and accepts."""
    return _of(
        case,
        search(
            case.weights,
            lambda mask: case.score(case.masked(mask), case.val),
            branches=case.size.branches,
            tolerance=TOLERANCE,
            wheel=Wheel(sharpness=1.0, importance="magnitude"),
            tree=case.size.tree,
            validation=Validation(confirm=0, race=False),
            seed=case.seed,
        ),
    )


def ours(case: Case, refit: bool = True, coarse: bool = True) -> Found:
    """Run `search` with its defaults, with a refit or without, with coarse levels first or without."""
    return _of(
        case,
        search(
            case.weights,
            OnPart(case, case.val),
            branches=case.size.branches,
            tolerance=TOLERANCE,
            refit=case.size.refit if refit else None,
            calibration=case.calibration if refit else None,
            tree=case.size.tree if coarse else replace(case.size.tree, coarse_rate=None),
            seed=case.seed,
        ),
    )


def _of(case: Case, winner: Winner) -> Found:
    levels = range(len(winner.report.accepted) + 1)
    path = ((winner.mask_at(level).survivors / case.total, winner.weights_at(level)) for level in levels)
    return Found(winner.mask.survivors / case.total, winner.weights, path, winner.report.validations)


def slimmest(case: Case, pruner: Pruner, stride: int = 1, pruned: Callable[[Mask], Values] | None = None) -> Found:
    """Return the slimmest network on the grid that keeps the floor.

    Args:
        case: The network.
        pruner: Function from a number of survivors to a mask.
        stride: First only every `stride`-th point of the grid is tried. Then the points between the slimmest that holds
            and the next one are tried.
        pruned: Function from a mask to the values of the network. None: the dense values, zero where pruned.
    """
    floor, before, pruned = case.dense["val"] - TOLERANCE, case.validations, pruned or case.masked

    def holding(grid: Sequence[int]) -> list[int]:
        return [survivors for survivors in grid if case.holds(pruned(pruner(survivors)), floor)]

    least = min([case.total, *holding(case.grid[::stride])])
    place = case.grid.index(least)
    least = min([least, *holding(case.grid[place + 1 : place + stride])])
    work = case.validations - before + 1  # 1 for the dense network
    shown = sorted({*case.grid[::STRIDE], least}, reverse=True)
    path = ((survivors / case.total, pruned(pruner(survivors))) for survivors in shown)
    return Found(least / case.total, pruned(pruner(least)), path, work)


def refitted_once(case: Case, importance: Callable[[Tensor], Tensor]) -> Found:
    """Prune once over all layers by an importance, then refit by our least squares: the refit without the search.

    Args:
        case: The network.
        importance: Function from a weight to its importance.
    """
    calibration = case.calibration

    def pruned(mask: Mask) -> Values:
        return {**case.masked(mask), **calibration.refit(mask, case.size.refit).values}

    return slimmest(case, Falling({name: importance(one) for name, one in case.weights.items()}), STRIDE, pruned)


class Falling:
    """A pruner that keeps the weights with the highest scores in all layers together. Ties go to the first.

    Args:
        scores: Parameter name to tensor.
    """

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self._shapes = {name: one.shape for name, one in scores.items()}
        self._order = torch.cat([one.flatten() for one in scores.values()]).argsort(descending=True, stable=True)

    def __call__(self, survivors: int) -> Mask:
        """Return the mask that keeps this number of weights."""
        return self.mask(torch.arange(len(self._order)) < survivors)

    def mask(self, kept_in_order: Tensor) -> Mask:
        """Return the mask that keeps the weights at these places in the order. Shape `(weights,)`, bool."""
        kept = torch.zeros(len(self._order), dtype=torch.bool, device=self._order.device)
        kept[self._order[kept_in_order.to(kept.device)]] = True
        parts = kept.split([shape.numel() for shape in self._shapes.values()])
        return Mask({name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)})


def lightning_pruning(case: Case, how: str) -> Pruner:
    """Return a pruner that applies Lightning's own callback once to a copy of the network, all layers together."""

    def pruner(survivors: int) -> Mask:
        module = _Holder(_copied(case.net))
        where = {name: _owner(module.net, name) for name in case.weights}
        callback = ModelPruning(how, parameters_to_prune=list(where.values()), use_lottery_ticket_hypothesis=False)
        with torch.random.fork_rng():
            torch.manual_seed(_seed(case.seed, survivors))
            callback.apply_pruning(case.total - survivors)
        return _mask_of(where)

    return pruner


def layer_wise(case: Case) -> Pruner:
    """Return a pruner that keeps the largest weights of each layer, the same share of every layer."""
    sizes = [weight.numel() for weight in case.weights.values()]
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]

    def pruner(survivors: int) -> Mask:
        net = _copied(case.net)
        where = {name: _owner(net, name) for name in case.weights}
        # weights kept in the layers up to each, so that the sum is exact
        kept = [round(survivors * end / case.total) for end in ends]
        for (layer, name), size, now, so_far in zip(where.values(), sizes, kept, [0, *kept[:-1]], strict=True):
            prune.l1_unstructured(layer, name, amount=size - (now - so_far))
        return _mask_of(where)

    return pruner


def by_gradient(case: Case) -> Pruner:
    """Score `|g|`: the gradient of the training loss."""
    return Falling({name: mean.abs() for name, (mean, _) in gradients(case).items()})


def by_sensitivity(case: Case) -> Pruner:
    """Score `|w g|`: first-order change of the training loss (SNIP, Lee et al. 2019, for a trained network)."""
    return Falling({name: (case.weights[name] * mean).abs() for name, (mean, _) in gradients(case).items()})


def by_taylor(case: Case) -> Pruner:
    """Score `|w|` times the mean of `|g|` over single training rows. Such gradients do not cancel each other."""
    order = case.shuffled[:SINGLES]
    sums = {name: torch.zeros_like(weight) for name, weight in case.weights.items()}
    for found in _derived(case, order.split(1)):
        for name, one in found.items():
            sums[name] += one.abs()
    return Falling({name: (case.weights[name] * one).abs() for name, one in sums.items()})


def by_fisher(case: Case) -> Pruner:
    """Score `w ** 2` times the mean squared gradient of a batch: optimal brain damage with the diagonal Fisher."""
    return Falling({name: case.weights[name].square() * square for name, (_, square) in gradients(case).items()})


def by_lamp(case: Case) -> Pruner:
    """Score by layer-adaptive magnitude (Lee et al. 2021)."""
    return Falling({name: lamp(weight) for name, weight in case.weights.items()})


def wanda(case: Case) -> Pruner:
    """Score `|w|` times the root mean square of its input, compared within each output (Sun et al. 2024).

    As in the source, every output keeps the same share of its weights, up to one weight. There are two differences from
    the source. All layers are pruned, as by every other method here; the source keeps embeddings and the head dense.
    The inputs are those of the dense network; the source uses the inputs from the pruned layers before.
    """
    return _within_groups(case, groups=len)


def wanda_by_layer(case: Case) -> Pruner:
    """Score as `wanda`, compared within each layer. Units that training has left dead can then be removed."""
    return _within_groups(case, groups=lambda weight: 1)


def _within_groups(case: Case, groups: Callable[[Tensor], int]) -> Pruner:
    scales = case.calibration.scales("activation", Mask.full(case.weights), {})
    shares = {}
    for name, weight in case.weights.items():
        scores = (weight.abs() * scales[name]).reshape(groups(weight), -1)
        place = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        shares[name] = (-(place + 0.5) / scores.shape[1]).view(weight.shape)
    return Falling(shares)


def noisy(case: Case) -> Pruner:
    """Prune by magnitude after Gaussian noise. Keep the draw with the best validation loss at each size.

    Source: the first step of Avendano Munoz, Cohen and Omidvar, "Stochastic Pruning" (IJCNN 2025), without evolution.
    """
    best: dict[int, int] = {}

    def drawn(survivors: int, draw: int) -> Mask:
        chance = torch.Generator().manual_seed(_seed(case.seed, survivors, draw))
        noise = {name: torch.randn(one.shape, generator=chance).to(one) for name, one in case.weights.items()}
        return _largest(
            {name: one + NOISE * one.square().mean().sqrt() * noise[name] for name, one in case.weights.items()},
            survivors,
        )

    def pruner(survivors: int) -> Mask:
        if survivors not in best:
            draws = range(case.size.branches)
            tried = {draw: case.loss(case.masked(drawn(survivors, draw)), case.val) for draw in draws}
            best[survivors] = min(tried, key=lambda draw: math.inf if math.isnan(tried[draw]) else tried[draw])
        return drawn(survivors, best[survivors])

    return pruner


def annealed(case: Case) -> Pruner:
    """Search masks by simulated annealing. Keep the mask with the best validation loss at each size.

    It starts from the mask of the next larger number of survivors without its smallest weights, and at first from all
    weights. A step exchanges some survivors for the same number of pruned weights. They are drawn among the weights
    whose magnitude is close to the threshold. The number of steps is the number of candidates of a branch, so the
    number of validations equals that of a search without a race.
    """
    known = {case.total: torch.ones(case.total, dtype=torch.bool)}  # in order of descending magnitude
    ordered = Falling({name: one.abs() for name, one in case.weights.items()})

    def pruner(survivors: int) -> Mask:
        if survivors not in known:
            larger = known[min(size for size in known if size > survivors)]
            start = torch.zeros_like(larger)
            start[larger.nonzero().flatten()[:survivors]] = True
            known[survivors] = _anneal(case, ordered, survivors, start)
        return ordered.mask(known[survivors])

    return pruner


def _anneal(case: Case, ordered: Falling, survivors: int, kept: Tensor) -> Tensor:
    near = min(round(NEAR * survivors), case.total - survivors)
    if not near:
        return kept
    chance = torch.Generator().manual_seed(_seed(case.seed, survivors))
    best = now = case.loss(case.masked(ordered.mask(kept)), case.val)
    found, hottest = kept, HEAT * max(now, 1e-12)
    for step in range(case.size.branches):
        proposed, middle = kept.clone(), slice(survivors - near, survivors + near)
        sides = [(kept[middle] == side).nonzero().flatten() + middle.start for side in (True, False)]
        number = min(math.ceil(EXCHANGED * near), *map(len, sides))
        for side, there in zip((True, False), sides, strict=True):
            proposed[there[torch.randperm(len(there), generator=chance)[:number]]] = not side
        loss = case.loss(case.masked(ordered.mask(proposed)), case.val)
        heat = hottest * (1 - step / case.size.branches)
        if loss <= now or float(torch.rand((), generator=chance)) < math.exp((now - loss) / heat):
            kept, now = proposed, loss
        if loss < best:
            found, best = proposed, loss
    return found


def gradients(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, for each weight, the means over training batches of the loss's gradient and of its square."""
    sums = {name: (torch.zeros_like(one), torch.zeros_like(one)) for name, one in case.weights.items()}
    batches = case.shuffled.split(GRADIENT_BATCH)
    for batch, found in zip(batches, _derived(case, batches), strict=True):
        for name, one in found.items():
            sums[name][0].add_(one, alpha=len(batch) / len(case.train))
            sums[name][1].addcmul_(one, one, value=1 / len(batches))
    return sums


def _derived(case: Case, batches: Iterable[Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the gradient of the loss for each batch of training rows."""
    net = copy.deepcopy(case.net)
    weights = prunable_parameters(net)
    for batch in batches:
        loss = losses(net(case.train.x[batch]), case.task, case.train.y[batch]).mean()
        yield dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


PEERS: dict[str, Callable[[Case], Pruner]] = {
    "Lightning ModelPruning l1": lambda case: lightning_pruning(case, "l1_unstructured"),
    "Lightning ModelPruning random": lambda case: lightning_pruning(case, "random_unstructured"),
    "torch layer-wise l1": layer_wise,
    "gradient |w g|": by_sensitivity,
    "gradient |g|": by_gradient,
    "Taylor |w| mean |g|": by_taylor,
    "LAMP": by_lamp,
    "OBD diagonal Fisher": by_fisher,
    "Wanda": wanda,
    "Wanda, by layer": wanda_by_layer,
    "Gaussian noise": noisy,
    "simulated annealing": annealed,
}
DEAR = ("Gaussian noise", "simulated annealing")  # they need many validations for each number of survivors
LONG = ("photo-cnn",)  # long validations that need all rows, because ranks depend on all rows
OURS: dict[str, Callable[[Case], Found]] = {
    "ours, paper": paper,
    "ours, no refit": lambda case: ours(case, refit=False),
    "ours": ours,
    "ours, no coarse levels": lambda case: ours(case, coarse=False),
    "one-shot l1, our refit": lambda case: refitted_once(case, torch.abs),
    "LAMP, our refit": lambda case: refitted_once(case, lamp),
}
METHODS = (*OURS, *PEERS)


def applied(case: Case, method: str) -> Found:
    """Return the result of a method for a network."""
    if method in OURS:
        return OURS[method](case)
    stride = STRIDE if method in DEAR or case.task.network in LONG else 1
    return slimmest(case, PEERS[method](case), stride)


def _seed(*numbers: int) -> int:
    """Return a seed of 32 bits: torch's generator on the CPU ignores further bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class _Holder(LightningModule):
    """A module for Lightning's callback."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def _copied(net: nn.Module) -> nn.Module:
    """Return a copy for torch's pruning, which does not accept weights with channels last in memory."""
    return copy.deepcopy(net).to(memory_format=torch.contiguous_format)


def _owner(net: nn.Module, name: str) -> tuple[nn.Module, str]:
    layer, _, attribute = name.rpartition(".")
    return net.get_submodule(layer), attribute


def _mask_of(where: Mapping[str, tuple[nn.Module, str]]) -> Mask:
    """Return the mask of the weights that torch's pruning keeps."""
    return Mask({name: getattr(layer, f"{attribute}_mask").bool() for name, (layer, attribute) in where.items()})


def _largest(weights: Mapping[str, Tensor], survivors: int) -> Mask:
    return Falling({name: weight.abs() for name, weight in weights.items()})(survivors)


def _moved(part: Part, device: str) -> Part:
    return Part(part.x.to(device), part.y.to(device), None if part.spread is None else part.spread.to(device))
