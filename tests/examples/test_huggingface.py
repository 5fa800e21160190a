"""examples/huggingface.py: models of transformers are pruned, saved, and loaded with their zeros."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

pytest.importorskip("transformers", reason="needs the extra `huggingface`; `make test` runs it on its own")


def zeros(tensors: dict[str, torch.Tensor]) -> int:
    """Zeros in all matrices except embeddings, whose rows for padding are zero from the start."""
    return sum(int((one == 0).sum()) for name, one in tensors.items() if one.ndim == 2 and not is_embedding(name))


def is_embedding(name: str) -> bool:
    return any(part in name for part in ("embeddings", "wte", "wpe", "lm_head"))


@pytest.mark.slow
def test_from_pretrained_loads_the_zeros_and_gives_the_same_logits(monkeypatch, tmp_path, capsys):
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    import huggingface
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    models = huggingface.main("here")
    printed = capsys.readouterr().out
    kinds = {"classifier": AutoModelForSequenceClassification, "language_model": AutoModelForCausalLM}
    words = torch.stack([one["input_ids"] for one in huggingface.topics(8, 3)])
    for model, (name, kind) in zip(models, kinds.items(), strict=True):
        loaded = kind.from_pretrained(f"here/{name}").eval()
        weights = {
            one: value for one, value in loaded.state_dict().items() if value.ndim == 2 and not is_embedding(one)
        }
        size = sum(one.numel() for one in weights.values())
        assert zeros(weights) == zeros(load_file(f"here/{name}/model.safetensors")) == round(0.7 * size)
        assert f"{size - zeros(weights):,} of {size:,} prunable weights kept (30.00%)" in printed
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=words).logits, model.eval()(input_ids=words).logits)
    assert "model.transformer.wte.weight (weight of Embedding, also named model.lm_head.weight)" in printed
    assert printed.count("after from_pretrained: sparsity 70.00%") == 2

    first, second = re.findall(r"```python\n(.*?)```", (ROOT / "docs/huggingface.md").read_text(), re.DOTALL)
    shutil.copytree("here/classifier", "my_model")
    names = {"train": DataLoader(huggingface.topics(100, 1), 50), "val": DataLoader(huggingface.topics(300, 2), 100)}
    exec(first.replace("tolerance=0.01", "tolerance=0.1, branches=2, target_sparsity=0.2, refit=None"), names)
    exec(second, names)
    assert names["pruning"].report.sparsity == pytest.approx(0.2, abs=1e-3)
    assert zeros(load_file("my_slim_model/model.safetensors")) > 0
