"""Adapters go where they are meant to, with the ranks that were meant, and merge as they say."""

from __future__ import annotations

import builtins
import functools
import json

import peft
import pytest
import torch
import transformers
from liar_depth import build
from liar_families import outputs, randomise, tree_hash, write_tokens
from liar_training import schedule, windows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import liar_ext
from liar_ext import InputError
from liar_ext.cli import main
from liar_ext.models import adapter_for, layout
from liar_ext.recovery import TrainingState, next_token_loss, train
from liar_ext.recovery.adapters import (
    adapted,
    changes,
    patterns,
    peft_config,
    ranks_in,
    targets_of,
)

SIZES = [*("--steps", "4", "--lr", "1e-2", "--batch-size", "2", "--seq-len", "24")]


def twelve_layers():
    """So that there is a layer 1 and a layer 11."""
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return randomise(transformers.LlamaForCausalLM(config))


def test_layer_1_is_not_layer_11():
    """Every layer has a rank of its own, also as PEFT's own files and reader have it."""
    model = twelve_layers()
    wanted = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    with adapted(model, targets_of(model), wanted, 0) as (wrapped, names):
        found = ranks_in(model)
        assert len(found) == 12 * 7 and len(names) == 2 * 12 * 7
        for name, rank in found.items():
            assert rank == wanted[int(name.split(".")[2])], name
            assert model.get_submodule(name).scaling["default"] == 2
        budget = targets_of(twelve_layers()).parameters(wanted)
        known = dict(model.named_parameters())
        assert sum(known[name].numel() for name in names) == budget
        config = wrapped.peft_config["default"].to_dict()
    again = peft.get_peft_model(twelve_layers(), peft.LoraConfig(**json.loads(_plain(config))))
    ranks = {n: m.r["default"] for n, m in again.named_modules() if hasattr(m, "lora_A")}
    assert {n.removeprefix("base_model.model."): r for n, r in ranks.items()} == found


def _plain(config):
    kept = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
    return json.dumps(
        {k: list(v) if isinstance(v, set) else v for k, v in config.items() if k in kept}
    )


def test_patterns_are_of_whole_names():
    found = patterns("model.layers", [2, 0, 5])
    assert list(found.values()) == [2, 5]
    key = peft.utils.other.get_pattern_key
    every = {r"model\.layers\.1\..+": 1, r"model\.layers\.11\..+": 2}
    assert set(patterns("model.layers", [0, 1, *[0] * 9, 2])) == set(every)
    for name in ("model.layers.11.mlp.up_proj", "base_model.model.model.layers.11.mlp.up_proj"):
        assert every[key(every, name)] == 2
    assert key(every, "model.layers.21.mlp.up_proj") not in every
    assert key(every, "modelXlayersX1Xmlp") not in every


def test_a_layer_of_rank_0_has_no_adapter():
    model = twelve_layers()
    ranks = [0, 2, *[0] * 9, 3]
    with adapted(model, targets_of(model), ranks, 0):
        found = ranks_in(model)
    assert {int(name.split(".")[2]): rank for name, rank in found.items()} == {1: 2, 11: 3}
    with pytest.raises(InputError, match="the model has 12 layers"):
        peft_config(targets_of(model), [0] * 12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "llama-tied"])
def test_a_merged_model_says_what_the_adapters_say(name):
    """And nothing is left of them in the model, nor changed in it."""
    model = build(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    targets = targets_of(model)
    with adapted(model, targets, [2, 1, 3, 2, 1, 4], 0) as (_, names):
        torch.testing.assert_close(outputs(model), outputs(build(name)))
        told = train(model, names, windows(), next_token_loss(model), schedule(steps=8))
        wanted, added = outputs(model), changes(model)
    assert told.log[-1]["loss"] < told.log[0]["loss"]
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == set()
    assert all(p.requires_grad for p in model.parameters())
    merged = build(name)
    with torch.no_grad():
        for key, change in added.items():
            merged.get_parameter(key).add_(change)
    assert not torch.allclose(wanted, outputs(model), atol=1e-3)
    torch.testing.assert_close(outputs(merged), wanted, rtol=1e-4, atol=1e-4)


def test_the_start_depends_on_the_seed_alone():
    found = []
    for seed in (0, 0, 1):
        model = build("llama").to(torch.bfloat16)
        torch.manual_seed(len(found))
        with adapted(model, targets_of(model), [2] * 6, seed) as (_, names):
            found.append([model.get_parameter(name).clone() for name in names])
        assert {p.dtype for p in found[-1]} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


def test_adapters_of_a_model_of_sixteen_bits_have_32():
    """Its forwards are under autocast, its own weights stay as they are."""
    model = build("llama").to(torch.bfloat16)
    before = {n: p.clone() for n, p in model.named_parameters()}
    kinds = set()
    with adapted(model, targets_of(model), [2] * 6, 0) as (_, names):
        module = model.model.layers[0].mlp.up_proj
        module.register_forward_hook(lambda *_: kinds.add(torch.is_autocast_enabled("cpu")))
        told = train(model, names, windows(), next_token_loss(model), schedule(steps=8))
        assert {model.get_parameter(name).dtype for name in names} == {torch.float32}
        assert {change.dtype for change in changes(model).values()} == {torch.float32}
    assert kinds == {True}
    assert told.log[-1]["loss"] < told.log[0]["loss"]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_state_of_other_ranks_is_not_gone_on_from(tmp_path):
    state = TrainingState(tmp_path / "state", {})
    model, plan = build("llama"), schedule(steps=4, save_every=2)
    for ranks, words in (([2] * 6, None), ([2, 3, 1, 2, 2, 2], "has another shape than the state")):
        with adapted(model, targets_of(model), ranks, 0) as (_, names):
            go = functools.partial(
                train, model, names, windows(), next_token_loss(model), plan, state=state
            )
            if words is None:
                go()
                assert state.steps() == 2
            else:
                with pytest.raises(InputError, match=words):
                    go()


@pytest.fixture
def tokens(tmp_path):
    return str(write_tokens(tmp_path / "tokens.npy", samples=30))


def test_the_adapter_beside_loads_with_peft(tmp_path, tokens, capsys):
    build("llama").save_pretrained(tmp_path / "dense")
    before = tree_hash(tmp_path / "dense")
    out = tmp_path / "out"
    command = ["recover", str(tmp_path / "dense"), "--out", str(out), "--train", tokens, *SIZES]
    assert main([*command, "--method", "lora", "--rank", "2", "--keep-adapter", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["training"]["ranks"] == [2] * 6
    assert tree_hash(tmp_path / "dense") == before
    merged, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not any("lora" in name for name in load_file(out / "model.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    dense = outputs(base)
    wrapped = peft.PeftModel.from_pretrained(base, out / "adapter")
    found = outputs(wrapped)
    torch.testing.assert_close(outputs(merged), found, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(dense, found, atol=1e-3)
    changed = {
        name
        for name, value in load_file(out / "model.safetensors").items()
        if not torch.equal(value, load_file(tmp_path / "dense" / "model.safetensors")[name])
    }
    linears = {f"{name}.weight" for own in targets_of(build("llama")).linears for name in own}
    assert changed == linears
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "tokens.npy", "out"}


def test_a_folder_with_widths_of_its_own(tmp_path, tokens):
    """Layers of different widths, which `liar_ext.load` alone loads; as does the result."""
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    recipe = liar_ext.Recipe(
        sparsity=0.5, calibration=tokens, samples=24, seq_len=24, layers=(0, 3), target=("ffn",)
    )
    liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["model_type"] == "liar_ext"
    out = tmp_path / "out"
    command = ["recover", str(tmp_path / "small"), "--out", str(out), "--train", tokens, *SIZES]
    assert main([*command, "--method", "lora", "--keep-adapter"]) == 0
    found = liar_ext.load(out, dtype=torch.float32)
    assert found.model.layers[0].mlp.up_proj.weight.shape[0] == 24
    assert json.loads((out / "config.json").read_text()) == config
    small = liar_ext.load(tmp_path / "small", dtype=torch.float32)
    before = outputs(small)
    wrapped = peft.PeftModel.from_pretrained(small, out / "adapter")
    # merged weights are rounded to bfloat16, of weights of 0.2: 4e-4 each
    difference = (outputs(found) - outputs(wrapped)).square().mean().sqrt()
    assert difference < 0.2 * (outputs(wrapped) - before).square().mean().sqrt()
    tensors = load_file(out / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}


def test_without_peft(tmp_path, tokens, capsys, monkeypatch):
    build("llama").save_pretrained(tmp_path / "dense")
    real = builtins.__import__

    def missing(name, *rest):
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    out = str(tmp_path / "out")
    command = ["recover", str(tmp_path / "dense"), "--out", out, "--train", tokens, *SIZES]
    assert main([*command, "--method", "lora"]) == 2
    assert "pip install 'liar-ext[recover]'" in capsys.readouterr().err
    assert main([*command, "--method", "partial"]) == 0


@pytest.mark.parametrize("ranks", ["uniform", "residual", "performance"])
def test_a_layer_without_any_linear_has_no_adapter(tmp_path, ranks):
    """As `liar prune --empty` leaves one; the others are trained."""
    model = build("llama")
    model.config.architectures = ["LlamaForCausalLM"]
    model.save_pretrained(tmp_path / "dense")
    data = model.config.to_dict()
    widths = layout.read(model)
    for layer in (2, 5):
        for kind in ("heads", "ffn"):
            widths[layer][kind] = 0
    short = layout.empty(layout.describe(data, adapter_for(model.config), widths, None, []))
    dense = model.state_dict()
    values = {n: dense[n] if t.numel() else torch.empty(0) for n, t in short.state_dict().items()}
    short.load_state_dict(values, assign=True)
    short.save_pretrained(tmp_path / "source")
    tokens = write_tokens(tmp_path / "tokens.npy", samples=30)
    options = {
        "uniform": [],
        "residual": ["--dense", str(tmp_path / "dense")],
        "performance": [
            *("--trial-initial", "2", "--trial-rounds", "1", "--trial-steps", "2"),
            *("--held-out", "3"),
        ],
    }
    sizes = [*SIZES, "--train", str(tokens), "--method", "lora", "--rank", "2", "--ranks", ranks]
    command = ["recover", str(tmp_path / "source"), "--out", str(tmp_path / "out"), *sizes]
    assert main([*command, *options[ranks], "--keep-adapter"]) == 0
    told = json.loads((tmp_path / "out" / "liar_report.json").read_text())["training"]
    assert len(told["ranks"]) == 6
    assert [layer for layer, rank in enumerate(told["ranks"]) if not rank] == [2, 5]
    before, after = (liar_ext.load(tmp_path / name) for name in ("source", "out"))
    assert layout.read(after) == widths
    assert not torch.equal(outputs(before), outputs(after))
