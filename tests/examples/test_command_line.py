"""The commands of docs/command_line.md run."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_roulette.trainer.command import main as command
from tests.support.modules import trained
from tests.support.results import load
from tests.trainer.command.test_command import Wide

PAGE = (Path(__file__).parents[2] / "docs/command_line.md").read_text()
COMMANDS = re.findall(r"^python -m lightning_roulette (prune .*)$", PAGE, re.MULTILINE)
SHORT = ["--pruning.branches=2", "--pruning.tolerance=0.3", "--pruning.refit=null", "--pruning.tree.max_levels=1"]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_of_the_page_prune(line, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    Path("my_module.py").write_text(
        "from tests.support.modules import BlobsData as Data\n"
        "from tests.trainer.command.test_command import Wide as Classifier\n"
    )
    weights = trained(Wide(32), tmp_path)
    torch.save({"state_dict": weights, "hyper_parameters": {"width": 32}}, "weights.ckpt")
    torch.save(weights, "last.ckpt")
    (config,) = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    Path("config.yaml").write_text(yaml.safe_dump(config))
    Path("plain.yaml").write_text(yaml.safe_dump({"model": config["model"]["init_args"]}))
    command.main([*shlex.split(line), *SHORT, "--trainer.enable_progress_bar=false", "--trainer.logger=false"])
    out = capsys.readouterr().out
    path = out.splitlines()[-1].removeprefix("pruned network: ")
    assert (load(path)["state_dict"]["net.0.weight"] == 0).any()


def test_the_page_has_commands():
    assert len(COMMANDS) == 3
