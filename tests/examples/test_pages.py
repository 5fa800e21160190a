"""README and the pages in docs/: every block of code runs, every link has a target, and the front page is short."""

import copy
import inspect
import os
import re

import pytest
import torch
import yaml
from torch import nn

import lightning_roulette
from lightning_roulette import LeastSquares, RouletteWheelPruning, Tree, Validation, Wheel, search
from lightning_roulette.refit.solvers.cholesky import Cholesky
from tests.support.pages import NOT_RUN, PAGES, PROJECT, QuickTrainer, blocks, fitted, reader, run, text_of

ELSEWHERE = {
    "docs/huggingface.md",  # in test_huggingface.py, with transformers
    "docs/several_devices.md",  # in test_several_devices.py, in two processes
}
NEEDS = {  # pages whose code needs an extra
    "docs/microcontroller.md": "tflite_micro",
    "docs/removal.md": "onnxscript",
    "docs/units.md": "torch_pruning",
}
pytestmark = pytest.mark.every_case

WITH_CODE = [page for page in PAGES if blocks(page, "python") and page not in ELSEWHERE]
RESULT = [
    "",
    "Bytes: ",
    "val_acc on all validation data (half of it",
    "On the held-out half, which",
    "Stopped: ",
    "Time: ",
]


def zeros(*modules) -> int:
    """The number of zeros in the matrices of some modules."""
    matrices = (one for module in modules for one in module.parameters() if one.ndim > 1)
    return sum(int((one == 0).sum()) for one in matrices)


def of_front_page(names: dict) -> None:
    assert zeros(names["slim"]) > 0
    assert zeros(names["model"]) > 0
    assert zeros(names["network"]) > 0


def of_checkpoint(names: dict) -> None:
    loaded = names["MyModel"].load_from_checkpoint(names["pruning"].best_model_path)
    assert zeros(names["model"]) == zeros(loaded) > 0


def of_after_pruning(names: dict) -> None:
    layers = [one for one in names["adapted"].modules() if isinstance(one, names["LoRA"])]
    assert len(layers) == 2
    slim = names["MyModel"].load_from_checkpoint(names["pruning"].best_model_path)
    assert zeros(*(one.layer for one in layers)) == zeros(slim) > 0
    assert all(one.lora_B.weight.any() for one in layers)
    assert all(len(set(row.tolist())) <= 255 for weight in names["weights"].values() for row in weight)


def of_contributing(names: dict) -> None:
    chance = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 50, width, generator=chance, dtype=torch.float64) for width in (6, 4))
    (sums := names["GramSums"]()).add(x, y)
    kept, start = torch.rand(1, 4, 6, generator=chance) < 0.6, torch.zeros(1, 4, 6, dtype=torch.float64)
    ours, exact = (solver.init(sums).solve(kept, start) for solver in (names["PseudoInverse"](), Cholesky(0.0)))
    torch.testing.assert_close(ours, exact)
    found = search({"w": torch.randn(40)}, lambda mask: 1.0, policy=names["FixedNumber"](5, 3, 2))
    assert [level.survivors for level in found.report.levels] == [35, 30, 25]
    whole_rows(names)


def whole_rows(names: dict) -> None:
    """A network is pruned by the unit of the page."""
    wheel = Wheel(unit=names["Row"]())
    data = names["model"], names["train"], names["val"]
    try:
        pruning = lightning_roulette.prune(names["Trainer"](), *data, wheel=wheel, tolerance=0.5)
    finally:
        del names["FINDERS"][names["Row"]]
    assert pruning.report.winner.units < pruning.report.units == 34
    for kept in pruning.mask.values():
        assert torch.equal(kept.any(1), kept.all(1))
        assert kept.any()


def of_microcontroller(names: dict) -> None:
    assert sorted(os.listdir("firmware")) == ["digits.c", "digits.h", "digits.tflite"]
    assert names["exported"].scores is not None


def of_output(names: dict) -> None:
    assert zeros(names["model"]) == round(names["report"].levels[0].sparsity * 624) > 0


def of_vision(names: dict) -> None:
    assert names["pruned"].report.sparsity == pytest.approx(zeros(names["classifier"]) / 1528)
    loaded = copy.deepcopy(names["network"])
    nn.init.ones_(loaded[0].weight)
    loaded.load_state_dict(torch.load("slim.pt"))
    assert zeros(loaded) == zeros(names["classifier"]) > 0


def of_while_training(names: dict) -> None:
    assert zeros(names["slim"]) > 0
    for name, kept in names["pruning"].mask.items():
        assert not names["slim"].get_parameter(name)[~kept].any()


def of_plain_pytorch(names: dict) -> None:
    assert zeros(names["net"]) > 0


def of_usage(names: dict) -> None:
    assert set(lightning_roulette.prunable_parameters(names["Projection"](3, 2))) == {"weight"}


def of_units(names: dict) -> None:
    assert names["pruning"].report.units > 0
    assert zeros(names["net"]) > 0


# what is true for the names of a page after its blocks have run
AFTERWARDS = {
    "CONTRIBUTING.md": of_contributing,
    "README.md": of_front_page,
    "docs/after_pruning.md": of_after_pruning,
    "docs/checkpoint.md": of_checkpoint,
    "docs/microcontroller.md": of_microcontroller,
    "docs/output.md": of_output,
    "docs/plain_pytorch.md": of_plain_pytorch,
    "docs/units.md": of_units,
    "docs/usage.md": of_usage,
    "docs/vision.md": of_vision,
    "docs/while_training.md": of_while_training,
}


@pytest.fixture(scope="module")
def pruning(tmp_path_factory):
    """A callback that has pruned a small network."""
    return fitted(tmp_path_factory.mktemp("fitted"))


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A folder in which fits train on one batch of an epoch, and searches have two levels at most."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning.pytorch.Trainer", QuickTrainer)
    for searching in (RouletteWheelPruning.__init__, search):
        monkeypatch.setitem(searching.__kwdefaults__, "tree", Tree(0.2, max_levels=2))


@pytest.mark.filterwarnings("ignore")  # of lightning, for a folder of checkpoints that is not empty
@pytest.mark.parametrize("page", WITH_CODE)
def test_every_block_of_python_runs_and_prunes(quick, pruning, page):
    if page in NEEDS:
        pytest.importorskip(NEEDS[page], reason="needs an extra that `make test` installs")
    names = reader(pruning)
    for block in blocks(page, "python"):
        if block.text.startswith(NOT_RUN):
            assert block.text.splitlines()[0].removeprefix(NOT_RUN), "a block that is not run has a reason"
        else:
            run(page, block, names)
    AFTERWARDS.get(page, lambda names: None)(names)


def test_the_reports_of_the_pages_have_the_form_of_a_report(pruning):
    lines, table = str(pruning.report).split("\n\n")
    (front,), (whole,) = blocks("README.md", "text"), blocks("docs/output.md", "text")
    shown, shown_table = whole.text.split("\n\n")
    assert front.text.rstrip() == shown
    for one in (shown.splitlines(), lines.splitlines()):
        assert "prunable weights kept" in one[0]
        assert all(line.startswith(start) for line, start in zip(one, RESULT, strict=True))
    assert shown_table.splitlines()[0].split() == table.splitlines()[0].split()


def test_the_demo_ends_with_ten_lines(monkeypatch, capsys, pruning):
    monkeypatch.syspath_prepend(PROJECT / "examples")
    import quickstart

    quickstart.show(pruning, 0.75, 0.5)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert len(lines) == 10
    kept = sum(int(mask.sum()) for mask in pruning.mask.values())
    assert lines[1].split()[:3] == ["weights", "624", str(kept)]
    assert lines[4].split()[:4] == ["test", "accuracy", "75.00%", "50.00%"]
    size = os.path.getsize(pruning.best_model_path)
    assert f"{pruning.best_model_path}, {size:,} bytes" in printed


def test_the_front_page_is_short_and_lists_every_argument():
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 150
    table = lines[lines.index("| argument | default | meaning |") :]
    listed = [row[1] for line in table if (row := re.match(r"\| `(\w+)` \|", line))]
    assert listed == list(inspect.signature(RouletteWheelPruning).parameters)


def test_the_yaml_of_the_pages_builds_the_callback():
    (block,) = blocks("docs/usage.md", "yaml")
    (entry,) = yaml.safe_load(block.text)["trainer"]["callbacks"]
    arguments = entry["init_args"]
    kinds = {"refit": LeastSquares, "wheel": Wheel, "tree": Tree, "validation": Validation}
    groups = {name: kind(**arguments.pop(name)) for name, kind in kinds.items()}
    callback = RouletteWheelPruning(**arguments, **groups)
    assert (callback.branches, callback.wheel.importance, callback.tree.patience) == (20, "lamp", 3)
    assert (callback.refit.batches, callback.validation.rank_by) == (200, "val_loss")


def headings(text: str) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in found}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_into_the_project_has_a_target(page):
    path = PROJECT / page
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^):]*)\)", text):
        there, _, heading = link.partition("#")
        target = path.parent / there if there else path
        assert target.exists(), link
        assert not heading or heading in headings(target.read_text()), link


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    named = re.findall(r"(?<![\w/])(?:examples|docs|tests|lightning_roulette)/[\w./-]*\.\w+", text_of(page))
    assert [name for name in named if not (PROJECT / name).exists()] == []


def commands(page: str) -> list[str]:
    """The commands of a page: the lines of its blocks for the shell, and those in its sentences."""
    text = "".join(block.text for block in blocks(page, "sh")).replace("\\\n", " ")
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [one for one in lines if one] + re.findall(r"`((?:python|make|pip) [^`]+)`", text_of(page))


def options_of(words: list[str], capsys) -> str:
    """What the program of a command says about its options."""
    if words[:3] == ["python", "-m", "lightning_roulette"]:
        from lightning_roulette.trainer.command.main import main

        with pytest.raises(SystemExit):
            main([words[3], "--help"])
        return capsys.readouterr().out
    file = f"examples/{words[2]}/__main__.py" if words[1] == "-m" else words[1]
    source = (PROJECT / file).read_text()
    return "--config= --model= --data= --trainer=" if "LightningCLI" in source else source.replace('"', " ")


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_every_command_exists_and_has_its_options(monkeypatch, capsys, page):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    targets = re.findall(r"(?m)^([\w-]+):", (PROJECT / "Makefile").read_text())
    for command in commands(page):
        words = command.replace("...", "").split()
        if words[0] == "make":
            assert words[1] in targets, command
        if words[0] == "python":
            options = re.findall(r"--[\w-]+", command)
            known = options_of(words, capsys) if options else ""
            assert [one for one in options if not re.search(rf"{one}(?![\w-])", known)] == [], command


def test_every_page_is_in_the_index():
    linked = set(re.findall(r"\]\((\w+\.md)\)", text_of("docs/README.md")))
    assert linked == {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")} - {"README.md"}


def test_the_callback_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    RouletteWheelPruning(seed=5)
    assert torch.equal(state, torch.get_rng_state())
