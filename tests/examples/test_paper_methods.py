"""The methods of the paper's evaluation, its runs, and its tables."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_roulette import Mask, PrunedWeights
from tests.support.paper import data, methods, run, table, write


def a_part(rows, opinion, chance):
    x = torch.randn(rows, 2, 6, 6, generator=chance)
    y = x.flatten(1)[:, :3]
    return data.Part(x, y.sum(1) + 3 if opinion else y.argmax(1), torch.ones(rows) if opinion else None)


def a_case(opinion=False, seed=0, size=methods.QUICK):
    """A small convolutional network with random data."""
    chance = torch.Generator().manual_seed(seed)
    parts = [a_part(rows, opinion, chance) for rows in (250, 96, 64)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Linear(12, 1 if opinion else 3)).to(memory_format=torch.channels_last)
    return methods.Case(data.Task("tiny", opinion, "mlp", *parts, 3.0 * opinion), net.eval(), seed, size)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("peer", methods.PEERS)
def test_a_peer_keeps_the_requested_number_of_weights_and_repeats_its_mask(peer):
    case = a_case()
    pruner = methods.PEERS[peer](case)
    for survivors in (case.total, case.total - 1, 517, 100, 7, 1):
        mask = pruner(survivors)
        assert mask.survivors == survivors
        assert {name: kept.shape for name, kept in mask.items()} == {n: one.shape for n, one in case.weights.items()}
        assert pruner(survivors) == mask


@pytest.mark.parametrize(
    "peer", [one for one in methods.PEERS if one not in ("Lightning ModelPruning random", *methods.DEAR)]
)
def test_masks_of_a_deterministic_peer_are_nested(peer):
    pruner = methods.PEERS[peer](a_case())
    assert pruner(40) <= pruner(90) <= pruner(500)


def test_lightning_random_depends_on_the_seed_and_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    masks = [methods.PEERS["Lightning ModelPruning random"](a_case(seed=seed))(300) for seed in (0, 1)]
    assert masks[0] != masks[1]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_layer_wise_keeps_the_largest_of_each_layer():
    case = a_case()
    for name, kept in methods.PEERS["torch layer-wise l1"](case)(case.total // 2).items():
        weight = case.weights[name].abs()
        assert abs(int(kept.sum()) - kept.numel() / 2) <= 1
        assert weight[kept].min() > weight[~kept].max()


@pytest.mark.parametrize("by_layer", [False, True])
def test_wanda_keeps_the_same_share_of_each_output_or_layer_by_weight_times_input(by_layer):
    case = a_case(size=methods.Size())
    mask = methods.PEERS["Wanda, by layer" if by_layer else "Wanda"](case)(case.total // 2)
    inputs = case.net[:3](case.train.x)
    scores, kept = case.weights["3.weight"].abs() * inputs.square().mean(0).sqrt(), mask["3.weight"]
    for values, stays in [(scores, kept)] if by_layer else zip(scores, kept, strict=True):
        assert values[stays].min() >= values[~stays].max()
    assert all(abs(int(one.sum()) - one.numel() / 2) <= (1 if by_layer else len(one)) for one in mask.values())
    counts = [one.flatten(1).sum(1) for one in mask.values()]
    spreads = [int(one.max() - one.min()) for one in counts]
    assert spreads[1] > 1 if by_layer else max(spreads) <= 1


def lamp(weight, each):
    squares = weight.double().flatten().square()
    return torch.stack([one / squares[squares >= one].sum() for one in squares]).view(weight.shape)


DEFINITIONS = {  # the score of each weight, given the gradients of single samples
    "Lightning ModelPruning l1": lambda w, each: w.abs(),
    "LAMP": lamp,
    "gradient |g|": lambda w, each: each.mean(0).abs(),
    "gradient |w g|": lambda w, each: (w * each.mean(0)).abs(),
    "Taylor |w| mean |g|": lambda w, each: w.abs() * each.abs().mean(0),
    "OBD diagonal Fisher": lambda w, each: w.square() * each.square().mean(0),
}


@pytest.mark.parametrize("peer", DEFINITIONS)
def test_a_peer_keeps_the_largest_scores_of_its_definition_in_all_layers_together(monkeypatch, peer):
    monkeypatch.setattr(methods, "GRADIENT_BATCH", 1)
    case = a_case()
    each = {name: [] for name in case.weights}
    for x, y in zip(case.train.x.split(1), case.train.y.split(1), strict=True):
        case.net.zero_grad()
        nn.functional.cross_entropy(case.net(x), y).backward()
        for name, found in each.items():
            found.append(case.net.get_parameter(name).grad.clone())
    case.net.zero_grad()
    scores = {name: DEFINITIONS[peer](weight, torch.stack(each[name])) for name, weight in case.weights.items()}
    ordered = torch.cat([one.flatten() for one in scores.values()]).sort(descending=True).values
    mask, middle = methods.PEERS[peer](case)(200), (ordered[199] + ordered[200]) / 2
    assert mask == Mask({name: one > middle for name, one in scores.items()})


@pytest.mark.parametrize("opinion", [False, True])
def test_gradients_are_those_of_the_training_loss_and_their_squares_are_per_batch(monkeypatch, opinion):
    case = a_case(opinion)
    outputs, y = case.net(case.train.x), case.train.y
    loss = (outputs[:, 0] - (y - 3)).square().mean() if opinion else nn.functional.cross_entropy(outputs, y)
    expected = torch.autograd.grad(loss, [case.net.get_parameter(name) for name in case.weights])
    for (mean, square), gradient in zip(methods.gradients(case).values(), expected, strict=True):
        torch.testing.assert_close(mean, gradient)
        assert (square > 0).any()
    monkeypatch.setattr(methods, "GRADIENT_BATCH", 250)
    for mean, square in methods.gradients(case).values():
        torch.testing.assert_close(square, mean.square())
    assert all(parameter.grad is None for parameter in case.net.parameters())


def test_noise_keeps_the_draw_with_the_best_loss():
    losses = []
    for branches in (1, 8):
        case = a_case(size=methods.Size(branches=branches))
        pruner = methods.PEERS["Gaussian noise"](case)
        losses.append([case.loss(case.masked(pruner(survivors)), case.val) for survivors in (60, 120, 240)])
        assert case.validations == 3 * (branches + 1)
    assert all(best <= first for first, best in zip(*losses, strict=True))
    assert losses[0] != losses[1]


def test_annealing_never_ends_worse_than_magnitude():
    case = a_case(size=methods.Size(branches=10))
    for survivors in (100, 300):
        masks = [methods.PEERS[name](case)(survivors) for name in ("simulated annealing", "Lightning ModelPruning l1")]
        annealed, magnitude = (case.loss(case.masked(one), case.val) for one in masks)
        assert annealed <= magnitude
        assert masks[0] != masks[1]
    assert case.validations == 2 * (10 + 3)


def test_annealing_starts_from_the_mask_of_the_next_larger_number():
    case = a_case(size=methods.Size(branches=10))
    pruner, ordered = (methods.PEERS[peer](case) for peer in ("simulated annealing", "Lightning ModelPruning l1"))
    mask = pruner(300)
    for survivors in (299, 298):
        start = methods.Falling({name: one.abs() * mask[name] for name, one in case.weights.items()})(survivors)
        mask = pruner(survivors)
        assert case.loss(case.masked(mask), case.val) <= case.loss(case.masked(start), case.val)
    assert (mask.survivors, mask != ordered(298)) == (298, True)


def test_the_grid_falls_by_the_step_to_its_least():
    case = a_case(size=methods.Size())
    assert case.grid[:2] == [case.total, round(0.95 * case.total)]
    assert case.grid[-1] <= 0.005 * case.total < case.grid[-2]


@pytest.mark.parametrize("stride", [1, 2])
def test_the_slimmest_network_that_holds_anywhere_on_the_grid_is_found(stride):
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 3, bias=False))
    net[1].weight.data.copy_(torch.eye(3, 72))  # the class is the largest of the first three inputs
    case = methods.Case(a_case().task, net, 0, methods.Size(step=0.5, least=0.02))
    holds = {case.grid[2], case.grid[4], case.grid[5]}

    def pruner(survivors):  # all weights, or none
        kept = survivors == case.total or survivors in holds
        return Mask({name: torch.full(one.shape, kept) for name, one in case.weights.items()})

    assert case.dense["val"] - 0.5 > case.score(case.masked(pruner(1)), case.val)
    found = methods.slimmest(case, pruner, stride)
    assert found.left == case.grid[5] / case.total
    assert next(left for left, _ in found.path) == 1


@pytest.mark.parametrize("opinion", [False, True])
def test_holding_is_decided_on_as_few_rows_as_possible(monkeypatch, opinion):
    monkeypatch.setattr(methods, "BLOCK", 7)
    case = a_case(opinion)
    magnitude = methods.PEERS["Lightning ModelPruning l1"](case)
    asked = []
    for survivors in case.grid:
        values = case.masked(magnitude(survivors))
        score = case.score(values, case.val)
        for floor in (score, math.nextafter(score, 2) + 1e-5, 0.9):
            before = case.validations
            assert case.holds(values, floor) == (score >= floor)
            asked.append((score >= floor, case.validations - before))
    assert all(work == pytest.approx(1) for held, work in asked if held or opinion)
    assert opinion or any(work < 0.6 for _, work in asked)


def test_a_curve_ends_where_the_score_has_fallen():
    case = a_case()
    path = [(left, {}) for left in (1.0, 0.5, 0.25, 0.125, 0.1)]
    scores = iter([0.9, 0.4, 0.8, 0.6, 0.5])
    case.score = lambda values, part: next(scores)
    found = methods.Found(0.25, {}, path, 1.0)
    assert run.curve(case, found, 0.7) == [(1.0, 0.9), (0.5, 0.4), (0.25, 0.8), (0.125, 0.6)]


def test_no_method_changes_the_network_or_reads_the_data_that_judges():
    case = a_case()
    before = {name: one.clone() for name, one in case.net.state_dict().items()}
    case.judge = data.Part(case.judge.x * math.nan, case.judge.y)
    found = [methods.applied(case, method).left for method in methods.METHODS]
    assert all(0 < left <= 1 for left in found)
    assert all(torch.equal(before[name], one) for name, one in case.net.state_dict().items())


@pytest.mark.parametrize("opinion", [False, True])
def test_scores_on_all_folds_are_the_means_of_the_single_folds(opinion):
    case = a_case(opinion)
    evaluate, dense = methods.OnPart(case, case.val), PrunedWeights(Mask.full(case.weights), case.weights)
    whole, outcomes = evaluate.recorded(dense, range(16))
    assert whole == evaluate(dense, range(16))
    assert -whole.rank == pytest.approx(case.loss({}, case.val))
    assert whole.score == pytest.approx(case.score({}, case.val))
    assert (outcomes is None) == opinion
    losses = [evaluate(dense, [fold]).rank for fold in range(16)]
    assert sum(losses) / 16 == pytest.approx(whole.rank)
    if not opinion:
        assert float(outcomes.values.mean()) == pytest.approx(whole.score)


@pytest.fixture
def folder(tmp_path):
    """A folder with two of the files in miniature."""
    write(tmp_path, "mnist.npz", 28, 28, train=150, test=50)
    write(tmp_path, "kadid10k.npz", 5, train=150, test=50)
    return tmp_path


@pytest.mark.slow
def test_runs_of_all_methods_are_stored_and_not_repeated(folder, capsys):
    results = folder / "results" / "runs.jsonl"
    asked = ["--data", str(folder), "--networks", str(folder / "nets"), "--results", str(results), "--quick"]
    asked += ["--tasks", "mnist", "kadid10k", "--seeds", "0"]
    run.main(asked)
    rows, written = rows_of(results), results.read_bytes()
    assert [(row["task"], row["method"]) for row in rows] == [
        (task, method) for task in ("mnist", "kadid10k") for method in methods.METHODS
    ]
    for row in rows:
        assert row.keys() == a_row("", 1.0, 0.0).keys() | {"val", "dense_val", "device"}
        assert 0 < row["left"] <= 1
        assert row["judge_change"] == pytest.approx(row["judge"] - row["dense_judge"])
        assert (row["rmse"] is None) == (row["within"] is None) == (row["task"] == "mnist")
        assert row["validations"] > 1
        assert max(left for left, _ in row["curve"]) == 1
        assert any(left == row["left"] and score == row["judge"] for left, score in row["curve"])

    printed = capsys.readouterr().out
    run.main(asked)
    assert results.read_bytes() == written
    assert capsys.readouterr().out == printed
    assert printed.count("| ours |") == 2

    whole = written.splitlines(keepends=True)
    results.write_bytes(b"".join(whole[:-1]) + whole[-1][:40])  # as if it was killed while writing
    run.main(asked)
    printed = capsys.readouterr().out  # the last run took another time
    again = results.read_bytes().splitlines(keepends=True)
    assert again[:-1] == whole[:-1]
    last, before = json.loads(again[-1]), json.loads(whole[-1])
    assert {**last, "seconds": 0} == {**before, "seconds": 0}

    for name, make in (("results/runs", None), ("t", table.main)):
        if make:
            make([str(results), "--quick", "--to", str(folder / name)])
        lines = (folder / f"{name}-quick.csv").read_text().splitlines()
        assert len(lines) == 1 + 2 * len(methods.METHODS)
        assert (folder / f"{name}-quick.md").read_text() == printed
        assert (folder / f"{name}-quick.png").stat().st_size > 10_000


def test_incomplete_lines_are_dropped(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"task": "a"}\n{"task": "b", "cur\n{"task": "c"}')
    results = run.Runs(path)
    assert results.rows == [{"task": "a"}]
    results.add(task="d")
    assert rows_of(path) == [{"task": "a"}, {"task": "d"}]
    assert not results.has(task="c")
    assert results.has(task="d")


def a_row(method, left, change, **more):
    score = 0.9 + change
    return {
        "task": "mnist", "method": method, "seed": 0, "held_out": False, "quick": False, "opinion": False, "left": left,
        "judge_change": change, "val_change": 0.0, "judge": score, "dense_judge": 0.9, "rmse": None,
        "dense_rmse": None, "within": None, "dense_within": None, "validations": 10, "seconds": 1.0,
        "weights": 1000, "curve": [(1.0, 0.9), (left, score)], **more,
    }  # fmt: skip


def test_the_summary_has_means_and_ranges_with_the_slimmest_method_first_and_refuses_double_runs():
    rows = [a_row("a", 0.5, -0.01), a_row("b", 0.1, 0.0), a_row("b", 0.3, -0.02, seed=1)]
    rows.append(a_row("b", 0.0, 0, quick=True))
    b, a = table.summary(table.chosen(rows))
    assert (a["method"], b["method"]) == ("a", "b")
    assert (b["left"], b["left_min"], b["left_max"], b["seeds"]) == (pytest.approx(0.2), 0.1, 0.3, 2)
    assert (b["judge_change"], b["judge_change_min"]) == (pytest.approx(-0.01), -0.02)
    assert "| b | 20.00 (10.00 to 30.00) | -1.00 (-2.00 to +0.00) | 89.00 | 10 | 1.0 | 2 |" in table.markdown(rows[:3])
    with pytest.raises(ValueError, match="mnist, a, seed 0 is there 2 times"):
        table.summary([*rows, rows[0]])


def test_ours_is_compared_with_the_slimmest_peer_that_has_the_same_seeds_and_uses_nothing_of_ours():
    curve = [(1.0, 0.9), (0.3, 0.89), (0.2, 0.895), (0.1, 0.87)]
    rows = [a_row("ours", 0.1, -0.03, curve=curve), a_row("ours", 0.2, -0.01, curve=curve[:3], seed=1)]
    for seed in (0, 1):
        rows += [a_row("one-shot l1, our refit", 0.3, 0.0, seed=seed), a_row("Wanda", 0.6, 0.0, seed=seed)]
        rows.append(a_row("LAMP, our refit", 0.25, 0.0, seed=seed))
        rows.append(a_row("LAMP", 0.5, -0.015, curve=[(1, 0.9), (0.75, 0.885), (0.5, 0.88)], seed=seed))
    rows += [a_row("simulated annealing", 0.01, 0.0), a_row("Wanda", 0.6, 0.0, task="koniqpp")]
    head, _, *lines = table.brief(rows).splitlines()
    assert head.count("|") == 14
    assert lines == [
        "| MNIST, LeNet-300-100: accuracy, % | 1,000 | 2 | 90.00 | 15.00 (10.00 to 20.00) | -2.00 (-3.00 to -1.00) "
        "| LAMP, of 2 | 50.00 | -1.50 | 0.30 | ≤ 0.27 | 30.00 | 25.00 |"
    ]
    *_, shown = table.front(rows).splitlines()
    assert shown == "| MNIST, LeNet-300-100 | 15.00 % | 50.00 % | -2.00 / -1.50 points |"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--results", "kept.csv"], "--results is kept.csv, but the tables are written to this file"),
        (["--tasks", "mnist", "tid2013"], "tid2013.npz is not in .*remove tid2013 from --tasks"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(folder, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run.main(["--data", str(folder), *arguments])
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize(
    ("least", "left"),
    [(0.95, (1.0, True)), (0.9, (1.0, True)), (0.895, (1.0, True)), (0.89, (0.2, True)), (0.8, (0.1, False))],
)
def test_a_curve_holds_down_to_its_first_score_below(least, left):
    row = a_row("ours", 0.1, 0, curve=[(0.2, 0.895), (1.0, 0.9), (0.1, 0.87), (0.3, 0.89)])
    assert table.left_at(row, least) == left


def test_a_mean_curve_covers_the_shares_that_all_seeds_have():
    left, scores = table.curve([a_row("b", 0.1, -0.1), a_row("b", 0.01, -0.2)], points=3)
    assert left == pytest.approx([0.1, math.sqrt(0.1), 1])
    assert scores == pytest.approx([0.8, 0.85, 0.9])


def test_the_published_tables_match_the_stored_runs(tmp_path):
    project = Path(__file__).parents[2]
    rows = table.chosen(rows_of(project / "examples/paper/results.jsonl"))
    assert table.front(rows) in (project / "README.md").read_text()
    assert table.brief(rows) in (project / "docs" / "results.md").read_text()
    published = project / "examples" / "paper" / "results"
    assert published.with_suffix(".md").read_text() == table.text(rows) + "\n"
    table.write_csv(table.summary(rows), tmp_path / "results.csv")
    assert published.with_suffix(".csv").read_text() == (tmp_path / "results.csv").read_text()
