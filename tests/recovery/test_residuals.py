"""What a low-rank change can bring back of a layer: by hand on small models, and as ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from liar_depth import build
from liar_families import write_tokens
from liar_training import windows

from liar_ext import InputError
from liar_ext.calibration import Batch
from liar_ext.cli import main
from liar_ext.depth.surgery import surgery
from liar_ext.ops.reduced_rank import recoverable_reference
from liar_ext.recovery import residuals
from liar_ext.recovery.residuals import RIDGE, gains, kept_layers

SIZES = [*("--steps", "2", "--lr", "1e-2", "--batch-size", "2", "--seq-len", "24")]


def padded(count=24):
    batch = windows(count)
    mask = batch.attention_mask.clone()
    mask[1::3, 11:] = False
    return Batch(batch.input_ids, mask)


def without_layers(model, kept):
    pruned = surgery(model, kept)
    # and one that differs by its weights
    with torch.no_grad():
        pruned.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    return pruned


# what each kept layer stands for in the dense model's streams; in front of the first one as well
@pytest.mark.parametrize(
    ("kept", "ways"), [([0, 2, 5], [(0, 2), (2, 5), (5, 6)]), ([1, 3, 4], [(0, 3), (3, 4), (4, 6)])]
)
@pytest.mark.parametrize("group", [1, 1 << 30])
def test_gains_are_those_of_the_definition(monkeypatch, group, kept, ways):
    """Streams from transformers' own hidden states, in float64, without the padding."""
    monkeypatch.setattr(residuals, "GROUP_BYTES", group)
    dense = build("llama")
    pruned = without_layers(dense, kept)
    batch = padded()
    parts = [batch.rows(list(range(10))), batch.rows(list(range(10, 24)))]
    found = gains(dense, pruned, kept, parts, [3, 5, 40])
    assert [len(own) for own in found] == [4, 6, 41]

    def streams(model):
        states, seen = [], {}
        hooks = [
            module.register_forward_pre_hook(lambda m, args, n=name: seen.update({n: args[0]}))
            for name, module in model.named_modules()
            if name.endswith(("o_proj", "down_proj"))
        ]
        hooks.append(
            model.model.norm.register_forward_pre_hook(lambda m, args: states.append(args[0]))
        )
        with torch.no_grad():
            out = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                output_hidden_states=True,
            )
        for hook in hooks:
            hook.remove()
        every = [*out.hidden_states[:-1], states[0]]
        valid = batch.attention_mask
        return [s[valid].double() for s in every], {n: x[valid].double() for n, x in seen.items()}

    wanted, _ = streams(dense)
    have, inputs = streams(pruned)
    for layer, (start, end) in enumerate(ways):
        error = wanted[end] - wanted[start] - (have[layer + 1] - have[layer])
        curve = np.zeros(41)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            x = inputs[f"model.layers.{layer}.{name}"]
            values = recoverable_reference(error, x, RIDGE).numpy()
            reached = np.concatenate([[0.0], np.cumsum(values)])
            curve += reached[np.minimum(np.arange(41), len(reached) - 1)]
        variance = float((wanted[end] - wanted[end].mean(0)).square().sum())
        own = found[layer]
        np.testing.assert_allclose(own, curve[: len(own)] / variance, rtol=1e-4, atol=1e-7)
        assert np.all(np.diff(own) >= -1e-12)


def test_a_model_that_lost_nothing_has_nothing_to_bring_back():
    dense = build("llama")
    found = gains(dense, build("llama"), range(6), [windows()], [4] * 6)
    assert np.abs(found).max() < 1e-9


def test_the_layer_that_lost_most_gets_the_highest_rank(tmp_path, capsys):
    dense = build("llama")
    dense.save_pretrained(tmp_path / "dense")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = dense.model.layers[3].mlp.down_proj.weight
        weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
        for layer in (0, 1, 2, 4, 5):
            dense.model.layers[layer].mlp.down_proj.weight.mul_(0.999)
    dense.save_pretrained(tmp_path / "pruned")
    tokens = str(write_tokens(tmp_path / "tokens.npy", samples=60))
    out = tmp_path / "out"
    command = ["recover", str(tmp_path / "pruned"), "--out", str(out), "--train", tokens, *SIZES]
    method = ["--method", "lora", "--rank", "4", "--ranks", "residual"]
    assert main([*command, *method, "--dense", str(tmp_path / "dense"), "--json"]) == 0
    training = json.loads(capsys.readouterr().out.splitlines()[-1])["training"]
    assert training["ranks"][3] == max(training["ranks"])
    assert training["ranks"][0] < training["ranks"][3]
    assert min(training["ranks"]) >= 1
    assert training["parameters"] <= training["budget"]
    told = training["recoverable"]
    assert sum(told["at_rank"]) >= sum(told["at_uniform"])


def test_layers_that_were_left_out_are_known_from_the_report(tmp_path, capsys):
    build("llama").save_pretrained(tmp_path / "dense")
    tokens = str(write_tokens(tmp_path / "tokens.npy", samples=30))
    assert (
        main(
            ["prune", str(tmp_path / "dense"), "--out", str(tmp_path / "p"), "--drop-layers", "2,4"]
        )
        == 0
    )
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("dense", "p")]
    assert kept_layers(tmp_path / "p", *configs) == [0, 1, 3, 5]
    out = tmp_path / "out"
    command = ["recover", str(tmp_path / "p"), "--out", str(out), "--train", tokens, *SIZES]
    method = ["--method", "lora", "--ranks", "residual", "--dense", str(tmp_path / "dense")]
    assert main([*command, *method]) == 0
    # what was trained still says which they were
    assert kept_layers(out, *configs) == [0, 1, 3, 5]
    # a model of as many layers that was made from the same one is none to compare with
    other = ["prune", str(tmp_path / "dense"), "--out", str(tmp_path / "q"), "--drop-layers", "1,3"]
    assert main(other) == 0
    capsys.readouterr()
    assert main([*command, "--overwrite", *method[:-1], str(tmp_path / "q")]) == 2
    assert "was pruned itself" in capsys.readouterr().err
    (tmp_path / "p" / "liar_report.json").unlink()
    with pytest.raises(InputError, match="does not say which were left out"):
        kept_layers(tmp_path / "p", *configs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--ranks residual: compares with the model before pruning; give --dense DIR"),
        (["--dense", "narrow"], "its hidden_size is 16, and 32 in"),
        (["--dense", "nowhere/else/here"], "no such folder"),
    ],
)
def test_dense_models_that_are_none(tmp_path, capsys, monkeypatch, options, words):
    build("llama").save_pretrained(tmp_path / "dense")
    config = build("llama").config
    config.hidden_size, config.head_dim = 16, 4
    type(build("llama"))(config).save_pretrained(tmp_path / "narrow")
    monkeypatch.chdir(tmp_path)
    write_tokens(tmp_path / "tokens.npy", samples=30)
    command = ["recover", "dense", "--out", "out", "--train", "tokens.npy", *SIZES]
    assert main([*command, "--method", "lora", "--ranks", "residual", *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
