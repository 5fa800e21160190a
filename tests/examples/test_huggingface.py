"""examples/huggingface.py: models of transformers are pruned, saved, and loaded with their zeros."""

from __future__ import annotations

import re
import shutil
import sys
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


SIZES = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
WORDS = {"vocab_size": 50, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def transformer(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A small model with a fixed initialisation, and inputs."""
    import transformers

    words = {"input_ids": torch.arange(14).reshape(2, 7)}
    images = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
    given = {
        "GPT2LMHeadModel": ({**SIZES, **WORDS, "n_positions": 32}, words),
        "LlamaForCausalLM": ({**SIZES, **WORDS, "num_key_value_heads": 2, "intermediate_size": 96}, words),
        "BertForSequenceClassification": ({**SIZES, **WORDS, "intermediate_size": 96}, words),
        "ViTForImageClassification": ({**SIZES, "image_size": 16, "patch_size": 4, "intermediate_size": 96}, images),
    }
    options, inputs = given[name]
    kind = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(kind.config_class(**options)).eval(), inputs


@pytest.mark.parametrize(
    ("name", "heads", "units"),
    [
        ("GPT2LMHeadModel", 4, {"transformer.h.0.mlp.c_fc": 192, "transformer.h.1.mlp.c_fc": 192}),
        ("LlamaForCausalLM", 2, {"model.layers.0.mlp.gate_proj": 96, "model.layers.1.mlp.gate_proj": 96}),
        ("ViTForImageClassification", 4, {"vit.layers.0.mlp.fc1": 96, "vit.layers.1.mlp.fc1": 96}),
        (
            "BertForSequenceClassification",
            4,
            {
                "bert.encoder.layer.0.intermediate.dense": 96,
                "bert.encoder.layer.1.intermediate.dense": 96,
                "bert.pooler.dense": 48,
            },
        ),
    ],
)
def test_the_neurons_and_heads_of_transformers_are_found(name, heads, units):
    from lightning_roulette.network.coupling.coupling import coupling_of

    model, inputs = transformer(name)
    groups = coupling_of(model, inputs).groups
    assert {one.name: one.size for one in groups if one.kind == "neuron"} == units
    assert [one.size for one in groups if one.kind == "head"] == [heads, heads]


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_the_peers_of_the_benchmark_of_units_cut_transformers_that_still_run(name):
    sys.path.append(str(EXAMPLES / "benchmarks"))
    import units_cases
    import units_peers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(units_cases, name)().eval()
        inputs = torch.randn(64, 3, 32, 32) if name == "vit" else torch.randint(0, 256, (64, 16))
    targets, head = (inputs if name == "gpt2" else torch.arange(64) % 10), {"vit": "classifier", "gpt2": "lm_head"}
    parts = [(inputs, targets)] * 3
    case = units_cases.Case(model, f"model.{head[name]}", *parts, lambda x, _: x, words=name == "gpt2")
    found = units_peers.to_adds(case, units_peers.PEERS["Torch-Pruning, Taylor, all layers"], 0.4, seed=0)
    assert 0.5 < units_peers.adds_of(found, inputs) / units_peers.adds_of(model, inputs) <= 0.6
    assert found(inputs).shape == model(inputs).shape
