"""The page about several processes: its blocks run in two processes, which find the same zeros and write one file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch

from lightning_roulette import Mask, RouletteWheelPruning, Tree
from tests.support.modules import Blobs, train_loader, trained, val_loader
from tests.support.pages import QuickTrainer, blocks, run
from tests.support.processes import full_of
from tests.support.results import nonzeros, told
from tests.support.together import two_processes

pytestmark = pytest.mark.slow

PAGE = "docs/several_devices.md"
WAYS = ("ddp", "sharded", "between epochs")


class Ready(Blobs):
    """Has learned something."""

    def __init__(self) -> None:
        super().__init__()
        self.load_state_dict(torch.load("trained.pt", weights_only=True))


class Brief(QuickTrainer):
    """Trains for two epochs, whatever the page says."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"max_epochs": 2})


def main(folder: Path) -> None:
    """What each of the processes does, which Lightning starts by running this file again."""
    torch.set_num_threads(1)
    lightning.pytorch.Trainer = Brief
    RouletteWheelPruning.__init__.__defaults__ = (3,)  # branches
    RouletteWheelPruning.__init__.__kwdefaults__["tree"] = Tree(0.2, max_levels=2)
    names = {"MyModel": Ready, "train": train_loader(), "val": val_loader(25)}
    ddp, sharded, loaded = blocks(PAGE, "python")
    run(PAGE, ddp, names)
    found = {"ddp": state_of(names)}
    run(PAGE, sharded, names)
    run(PAGE, loaded, names)
    found["sharded"] = state_of(names) | {"loaded": dict(names["slim"].state_dict())}
    names["pruning"] = RouletteWheelPruning(at_epoch=[1], tolerance=0.5)
    names["trainer"] = Brief(devices=2, strategy="ddp", callbacks=[names["pruning"]])
    names["trainer"].fit(Ready(), names["train"], names["val"])
    found["between epochs"] = state_of(names)
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")


def state_of(names: dict[str, Any]) -> dict[str, Any]:
    """What a process has after a block, in plain values."""
    pruning, module = names["pruning"], names["trainer"].lightning_module
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()
    return {
        "mask": dict(pruning.mask),
        "report": told(pruning),
        "path": str(pruning.best_model_path),
        "weights": {name: full_of(one) for name, one in module.named_parameters()},
        "sharded": any(hasattr(one, "to_local") for one in module.parameters()),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes found."""
    folder = tmp_path_factory.mktemp("page")
    return two_processes(__file__, folder, trained(Blobs(), folder))


@pytest.mark.parametrize("way", WAYS)
def test_both_processes_have_the_same_zeros_and_name_one_file_that_has_them(ranks, way):
    first, second = (rank[way] for rank in ranks)
    mask = Mask(first["mask"])
    assert mask == Mask(second["mask"])
    assert 0.1 < mask.sparsity < 0.9
    assert (first["report"], first["path"]) == (second["report"], second["path"])
    stored = torch.load(first["path"], weights_only=True)["state_dict"]
    for weights in (first["weights"], second["weights"], stored):
        assert all(torch.equal(weights[name] != 0, kept) for name, kept in mask.items())


def test_the_second_block_shards_and_its_file_loads_into_the_plain_module(ranks):
    assert [ranks[0][way]["sharded"] for way in WAYS] == [False, True, False]
    plain = Blobs()
    plain.load_state_dict(ranks[0]["sharded"]["loaded"])
    assert nonzeros(plain) == Mask(ranks[0]["sharded"]["mask"])


def test_importance_and_bytes_are_as_the_page_says(ranks):
    ddp, sharded = (ranks[0][way]["report"] for way in ("ddp", "sharded"))
    assert ddp["importance"] == "sensitivity"
    assert sharded["importance"] == "magnitude, as weights are sharded over processes"
    assert (ddp["footprint"] is None, sharded["footprint"] is None) == (False, True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
