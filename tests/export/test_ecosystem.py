"""A loaded pruned model is a transformers model to others: the hub, PEFT, torchao."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from liar_export import shrunk
from liar_families import FAMILIES, outputs, probe_tokens
from liar_stock import stock
from torch import nn
from transformers import PreTrainedModel

import liar_ext

PER_LAYER = [{"heads": 1, "ffn": 20}, {"heads": 3, "ffn": 33}]
UNIFORM = [{"heads": 2, "ffn": 20}] * 2
# float32 products whose sums are in another order
TOLERANCE = 1e-5


def _close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert float(expected.std()) > 1e-3, "outputs that do not vary show nothing"
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


class Hub:
    """Takes what `push_to_hub` uploads, instead of the hub."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        self.folder.mkdir()
        return type("Url", (), {"repo_id": f"me/{repo_id}"})

    def create_commit(self, repo_id: str, operations: list[Any], **options: Any) -> str:
        assert options["create_pr"]
        for operation in operations:
            path = self.folder / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(operation.path_or_fileobj, path)
        return repo_id


@pytest.mark.parametrize("name", ["llama-gqa-biases", "qwen3", "gpt2", "bert"])
@pytest.mark.parametrize("widths", [UNIFORM, PER_LAYER], ids=["uniform", "per-layer"])
def test_what_push_to_hub_uploads_is_the_model(
    name: str, widths: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub.errors import EntryNotFoundError
    from transformers.utils import hub

    def nothing_there(*_: Any, **__: Any) -> None:
        raise EntryNotFoundError("a new repository")

    family = FAMILIES[name]
    model = liar_ext.load(shrunk(family.build(), tmp_path / "small", widths))
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub, "hf_api", lambda: fake)
    monkeypatch.setattr(hub.ModelCard, "load", nothing_there)
    assert model.push_to_hub("small", create_pr=True) == "me/small"
    there = {path.name for path in fake.folder.iterdir()}
    assert there >= {"config.json", "model.safetensors", "README.md"}
    _close(outputs(liar_ext.load(fake.folder)), outputs(model))
    loads = widths is UNIFORM and name not in ("gpt2", "bert")
    if loads:
        _close(outputs(stock(family, fake.folder)), outputs(model))
    else:
        # loudly: never with weights that are made up
        with pytest.raises((ValueError, RuntimeError)):
            family.auto.from_pretrained(fake.folder)


@pytest.mark.parametrize("name", ["llama-gqa-biases", "qwen2", "gpt2"])
def test_a_lora_adapter_is_trained_saved_loaded_and_merged(name: str, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="needs peft")
    small = shrunk(FAMILIES[name].build(), tmp_path / "small", PER_LAYER)
    model = liar_ext.load(small)
    before = outputs(model)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    _close(outputs(adapted), before)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=probe_tokens(), labels=probe_tokens()).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    after = outputs(adapted.eval())
    assert float((after - before).abs().max()) > 1e-2 * float(before.abs().max())
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(liar_ext.load(small), tmp_path / "adapter").eval()
    _close(outputs(again), after)
    merged = again.merge_and_unload()
    _close(outputs(merged), after)
    merged.save_pretrained(tmp_path / "merged")
    loaded = liar_ext.load(tmp_path / "merged")
    _close(outputs(loaded), after)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        loaded.generate(probe_tokens(), **options), merged.generate(probe_tokens(), **options)
    )


def _quantised(model: PreTrainedModel) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


@pytest.mark.parametrize("name", ["llama-gqa-biases", "qwen3", "bert"])
def test_torchao_quantises_to_int8(name: str, tmp_path: Path):
    """Rows are 255 steps wide: a weight moves by half a step at most."""
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    small = shrunk(FAMILIES[name].build(), tmp_path / "small", PER_LAYER)
    model = liar_ext.load(small)
    expected = outputs(model)
    plain = copy.deepcopy(model)
    head = model.get_output_embeddings()
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, _: isinstance(module, nn.Linear) and module is not head,
    )
    noise = 0.0
    for path, linear in _quantised(plain).items():
        quantised = model.get_submodule(path).weight
        assert type(quantised) is not nn.Parameter, f"{path} was not quantised"
        restored = quantised.dequantize().float()
        moved = (restored - linear.weight).abs()
        step = linear.weight.abs().amax(1, keepdim=True) / 127
        # and the rounding of the step itself and of a product with it
        assert bool((moved <= 0.5 * step * (1 + 1e-3)).all()), path
        noise += float((restored - linear.weight).norm() / linear.weight.norm()) ** 2
        linear.weight.data.copy_(restored)
    found = outputs(model)
    # the kernel computes what the restored weights say
    _close(found, outputs(plain), 1e-4)
    # each product is off by its matrix' share, which the residual stream dilutes; independent
    # errors add up as their squares do. A softmax magnifies what is off in q and k where scores
    # are large, as random ones are: hence 2
    relative = float((found - expected).norm() / expected.norm())
    assert 0 < relative <= 2 * math.sqrt(noise)
    if model.can_generate():
        made = model.generate(probe_tokens(1, 6), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert made.shape == (1, 12)
