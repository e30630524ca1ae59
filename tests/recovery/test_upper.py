"""The last layers are trained and nothing else; what enters them is computed once, or each time."""

from __future__ import annotations

import pytest
import torch
from liar_depth import build
from liar_families import FAMILIES
from liar_training import schedule, windows

from liar_ext import InputError
from liar_ext.calibration import Batch
from liar_ext.checkpoint.reader import tied_names
from liar_ext.recovery import next_token_loss, train
from liar_ext.recovery.entering import Entering
from liar_ext.recovery.upper import check_head, first_trained, untied, upper_parameters

NAMES = ["llama", "gpt2", "opt", "qwen3-windows", "gemma3"]


def padded(count=9):
    """Windows that end early, and one that begins late."""
    batch = windows(count)
    mask = batch.attention_mask.clone()
    mask[1::3, 11:] = False
    mask[2, :4] = False
    return Batch(batch.input_ids, mask)


@pytest.mark.parametrize(
    ("name", "behind"),
    [
        ("llama", {"model.norm.weight", "lm_head.weight"}),
        ("gpt2", {"transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"}),
        (
            "opt",
            {
                "model.decoder.final_layer_norm.weight",
                "model.decoder.final_layer_norm.bias",
                "lm_head.weight",
            },
        ),
        ("gemma3", {"model.norm.weight", "lm_head.weight"}),
    ],
)
def test_what_is_trained(name, behind):
    """All parameters of the last layers, the final norm by whatever name, and the head."""
    model = build(name)
    found = upper_parameters(model, 2, head=True)
    assert len(found) == len(set(found))
    layers = {n for n, _ in model.named_parameters() if ".4." in n or ".5." in n}
    assert set(found) == layers | behind
    assert set(upper_parameters(model, 2, head=False)) == (layers | behind) - {"lm_head.weight"}


def test_a_projection_behind_the_last_layer():
    """As OPT-350m has one: no norm there."""
    model = FAMILIES["opt-post-norm"].build()
    found = upper_parameters(model, 1, head=False)
    assert "model.decoder.project_out.weight" in found
    assert not any("project_in" in name or "embed" in name for name in found)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_with_and_without_the_file(tmp_path, name):
    """Whatever the windows of a forward are, over three epochs; and the losses of training whole
    models, but for the rounding of larger forwards."""
    found = []
    for kind in ("whole", "each time", "kept"):
        model = build(name)
        loss = next_token_loss(model)
        names = upper_parameters(model, 2, head=not tied_names(model))
        with open(tmp_path / f"{kind}", "w+b") as file:
            entering = None
            if kind != "whole":
                entering = Entering(model, 4, file if kind == "kept" else None)
                loss = entering.under(loss)
            told = train(
                *(model, names, padded(), loss, schedule(batch_size=3, steps=5)),
                held_out=padded(4),
            )
        found.append((model.state_dict(), told))
        # nine windows and four, of which three are the same
        if kind == "kept":
            assert entering.runs == 9
            assert entering.bytes == 4 * 32 * padded().tokens + 4 * 32 * 4
        if kind == "each time":
            assert entering.runs == 5 * 6 + 4 * 6
            assert entering.bytes == 0
    (_, one), (each, other), (kept, third) = found
    for key, value in each.items():
        assert torch.equal(kept[key], value), key
    assert (other.log, other.held_out) == (third.log, third.held_out)
    for kind in ("log", "held_out"):
        mine, theirs = ([entry["loss"] for entry in getattr(t, kind)] for t in (other, one))
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_nothing_below_is_run_with_autograd_or_left_changed():
    model = build("llama")
    loss = Entering(model, 4).under(next_token_loss(model))
    names = upper_parameters(model, 2, head=True)
    seen = []
    model.model.layers[2].mlp.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    before = {n: p.clone() for n, p in model.named_parameters()}
    train(model, names, windows(), loss, schedule(steps=2))
    assert seen == [False] * 8
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in names), name
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_sixteen_bits_are_kept_as_sixteen(tmp_path):
    found = []
    for keeps in (False, True):
        model = build("llama").to(torch.bfloat16)
        with open(tmp_path / "states", "w+b") as file:
            entering = Entering(model, 4, file if keeps else None)
            names = upper_parameters(model, 2, head=True)
            loss = entering.under(next_token_loss(model))
            train(model, names, windows(), loss, schedule(steps=6))
        found.append(model.state_dict())
    assert entering.bytes == 12 * 16 * 32 * 2
    assert all(torch.equal(found[1][key], value) for key, value in found[0].items())


def test_a_head_that_is_the_embeddings():
    tied, own = build("llama-tied"), build("llama")
    check_head(own, head=True, untie=False)
    check_head(tied, head=False, untie=False)
    check_head(tied, head=True, untie=True)
    for model, head, untie, words in (
        (tied, True, False, "is tied to its embeddings.*--untie.*--no-head"),
        (own, True, True, "is not tied to its embeddings"),
        (tied, False, True, "with --no-head the head is not trained"),
    ):
        with pytest.raises(InputError, match=words):
            check_head(model, head=head, untie=untie)
    embeddings = tied.model.embed_tokens.weight
    assert untied(tied) == "lm_head.weight"
    assert tied.model.embed_tokens.weight is embeddings
    assert torch.equal(tied.lm_head.weight, embeddings)
    assert tied.lm_head.weight is not embeddings
    assert not tied.config.tie_word_embeddings


@pytest.mark.parametrize("last", [0, 7])
def test_layers_that_are_not_there(last):
    with pytest.raises(InputError, match=f"--last {last}: the model has 6 layers; give 1 to 6"):
        first_trained(6, last)
