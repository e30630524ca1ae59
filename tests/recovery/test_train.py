"""Chosen parameters are trained as AdamW's definition says, and nothing else is touched."""

from __future__ import annotations

import copy
import os
import subprocess
from pathlib import Path

import liar_training
import pytest
import torch
from liar_depth import build
from liar_families import FAMILIES, outputs
from liar_torchrun import ENVIRONMENT, LIMIT_SECONDS, torchrun
from liar_training import chosen, schedule, trained, windows
from torch import nn

from liar_ext import InputError
from liar_ext.calibration import Batch
from liar_ext.recovery import Loss, TrainingState, next_token_loss, train


def padded(length=16):
    """Three windows, one of which ends early and one begins late."""
    batch = windows(3, length)
    mask = batch.attention_mask.clone()
    mask[1, 9:] = False
    mask[2, :4] = False
    return Batch(batch.input_ids, mask)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "opt", "qwen3-windows", "gemma3"])
def test_the_loss_is_that_of_transformers(monkeypatch, name):
    """With and without logits in chunks; gradients of the head as well."""
    monkeypatch.setattr("liar_ext.ops.logits.CHUNK_LOGITS", 97 * 7)
    model = build(name)
    batch = windows(3)
    found = next_token_loss(model)(batch)
    expected = model(input_ids=batch.input_ids, labels=batch.input_ids).loss
    assert found.count == 3 * 15
    torch.testing.assert_close(found.total / found.count, expected)
    parameters = list(model.parameters())
    mine = torch.autograd.grad(found.total / found.count, parameters)
    theirs = torch.autograd.grad(expected, parameters)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_padding_predicts_nothing_and_is_not_predicted():
    model = build("llama")
    batch = padded()
    found = next_token_loss(model)(batch)
    assert found.count == 15 + 8 + 11
    rows = [batch.input_ids[:1], batch.input_ids[1:2, :9]]
    alone = [model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1) for ids in rows]
    last = next_token_loss(model)(Batch(batch.input_ids[2:], batch.attention_mask[2:]))
    torch.testing.assert_close(found.total, sum(alone) + last.total)


@pytest.mark.parametrize("name", ["bert", "headless"])
def test_a_model_that_predicts_no_next_token_is_refused(name):
    model = FAMILIES["llama-mha"].build().model if name == "headless" else build("bert")
    with pytest.raises(InputError, match="predicts no next token"):
        next_token_loss(model)


def test_updates_are_those_of_adamw():
    """The definition: one mean over all windows of a step, clipped, at the schedule's rate."""
    plan = schedule(weight_decay=0.1, clip=0.5)
    model = build("llama")
    reference = copy.deepcopy(model)
    loss = next_token_loss(model)
    train(model, chosen(model), windows(), loss, plan)
    wanted = [p for n, p in reference.named_parameters() if n in chosen(reference)]
    optimiser = torch.optim.AdamW(wanted, betas=(0.9, 0.95), weight_decay=0.1)
    order = plan.order(12)
    for step in range(plan.steps):
        rows = [row for forward in order(step) for row in forward]
        ids = windows().input_ids[rows]
        optimiser.zero_grad()
        reference(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted, 0.5)
        optimiser.param_groups[0]["lr"] = plan.rate(step)
        optimiser.step()
    before = build("llama").state_dict()
    for name, value in reference.state_dict().items():
        found = model.state_dict()[name]
        torch.testing.assert_close(found, value, rtol=0, atol=1e-5)
        assert torch.equal(found, before[name]) == (name not in chosen(model))


@pytest.mark.parametrize(
    ("name", "value"),
    [("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"), ("ACCELERATE_MIXED_PRECISION", "bf16")],
)
def test_what_a_launcher_leaves_in_the_environment_changes_nothing(monkeypatch, name, value):
    plain, expected = trained(steps=2)
    monkeypatch.setenv(name, value)
    model, told = trained(steps=2)
    assert told.log == expected.log
    for path, parameter in plain.state_dict().items():
        assert torch.equal(model.state_dict()[path], parameter), path


def test_the_same_loss_however_windows_are_cut_into_forwards():
    """Also where forwards have different numbers of tokens to predict."""
    many = padded(16)
    found = []
    for batch_size, accumulation in ((3, 1), (1, 3)):
        model = build("llama")
        plan = schedule(batch_size=batch_size, accumulation=accumulation)
        told = train(model, chosen(model), many, next_token_loss(model), plan)
        found.append((model.state_dict(), told))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=0, atol=1e-4)
    assert found[0][1].log[0]["loss"] == pytest.approx(found[1][1].log[0]["loss"], rel=1e-6)
    assert found[0][1].tokens == 6 * (16 + 9 + 12)


def test_nothing_is_recorded_below_the_first_trained_parameter():
    model = build("llama")
    seen = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(
            lambda module, args, i=index: seen.update({i: args[0].requires_grad})
        )
    loss = next_token_loss(model)

    def watched(batch):
        found = loss(batch)
        asks.append([seen[i] for i in range(6)])
        return found

    asks: list[list[bool]] = []
    train(model, chosen(model), windows(), watched, schedule(steps=1, accumulation=1))
    assert asks == [[False, False, False, False, True, True]]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_loss_falls_and_the_log_says_so():
    _, told = trained(steps=30)
    assert told.log[-1]["loss"] < 0.7 * told.log[0]["loss"]
    assert [entry["step"] for entry in told.log] == list(range(1, 31))
    assert [entry["step"] for entry in told.held_out] == list(range(0, 31, 3))
    assert told.held_out[-1]["loss"] < told.held_out[0]["loss"]
    assert told.log[0]["rate"] == pytest.approx(5e-3)
    _, told = trained(steps=250, batch_size=1, accumulation=1)
    assert [entry["step"] for entry in told.log] == [*range(3, 250, 3), 250]


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tmp_path):
    whole, expected = trained(save_every=2)
    state = TrainingState(tmp_path / "state", {"seed": 0})

    class Cut(Exception):
        pass

    model = build("llama")
    loss, calls = next_token_loss(model), []

    def fails(batch):
        calls.append(1)
        # two held-out forwards, two of a step; looks after every step
        if len(calls) > 2 + 5 * 4:
            raise Cut
        return loss(batch)

    with pytest.raises(Cut):
        train(
            *(model, chosen(model), windows(), fails, schedule(save_every=2)),
            held_out=windows(3),
            state=state,
        )
    assert state.steps() == 4
    resumed, told = trained(save_every=2, state=state)
    assert told.resumed_at == 4
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert (told.log, told.held_out, told.tokens) == (
        expected.log,
        expected.held_out,
        expected.tokens,
    )
    # only the last state is kept
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-000000004"]


def test_sixteen_bits_have_32_while_they_are_trained():
    """Steps of 1e-4 at weights of 1 are lost one by one in bfloat16, whose spacing is 8e-3."""
    model = nn.Linear(4, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    kinds = set()

    def loss(batch):
        kinds.add(model.weight.dtype)
        found = model(torch.ones(1, 4))
        kinds.add(found.dtype)
        return Loss(found.float().sum(), 1)

    plan = schedule(steps=200, learning_rate=1e-4, warmup=0, floor=1.0)
    train(model, ["weight"], windows(), loss, plan)
    assert kinds == {torch.float32, torch.bfloat16}
    assert model.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model.weight.float(), torch.full((1, 4), 0.98), rtol=0, atol=4e-3)


@pytest.mark.parametrize("name", ["llama", "qwen3-windows", "gpt2", "opt", "gemma3"])
def test_models_of_sixteen_bits_are_trained(name):
    model = build(name).to(torch.bfloat16)
    prefixes = ("transformer.h.3.", "model.decoder.layers.3.", "model.layers.3.")
    names = [n for n, _ in model.named_parameters() if n.startswith(prefixes)]
    assert names
    told = train(model, names, windows(), next_token_loss(model), schedule(steps=12))
    assert told.log[-1]["loss"] < told.log[0]["loss"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(outputs(model)).all()


def test_any_loss_and_any_parameters():
    """A layer that learns what two did; and a tied head, named twice, with the last layer."""
    model = build("llama")
    teacher = copy.deepcopy(model)
    student = model.model.layers[4]

    def imitation(batch):
        with torch.no_grad():
            states = teacher(input_ids=batch.input_ids, output_hidden_states=True).hidden_states
        rotary = model.model.rotary_emb(states[3], torch.arange(batch.input_ids.shape[1])[None])
        made = student(states[3], position_embeddings=rotary)
        return Loss((made - states[5]).square().sum(), made.numel())

    names = [f"model.layers.4.{name}" for name, _ in student.named_parameters()]
    told = train(model, names, windows(), imitation, schedule(steps=20))
    assert told.log[-1]["loss"] < 0.8 * told.log[0]["loss"]
    tied = build("llama-tied")
    names = ["lm_head.weight", "model.embed_tokens.weight", "model.layers.5.mlp.up_proj.weight"]
    before = {n: p.clone() for n, p in tied.named_parameters()}
    train(tied, names, windows(), next_token_loss(tied), schedule(steps=2))
    changed = {n for n, p in tied.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"model.embed_tokens.weight", "model.layers.5.mlp.up_proj.weight"}
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("names", "loss", "words"),
    [
        (["model.layers.9.x"], None, "has no parameter model.layers.9.x to train"),
        ([], None, "no parameter is to be trained"),
        (None, lambda b: Loss(torch.tensor(2.0), 1), "does not depend on the parameters"),
        (None, lambda b: Loss(torch.tensor(0.0), 0), "no window has a token to predict; give long"),
    ],
)
def test_what_cannot_be_trained(names, loss, words):
    model = build("llama")
    names = chosen(model) if names is None else names
    with pytest.raises(InputError, match=words):
        train(model, names, windows(), loss or next_token_loss(model), schedule())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_named(value):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(InputError, match="training, step 1: the loss is nan; lower --lr"):
        train(model, chosen(model), windows(), next_token_loss(model), schedule())
    with pytest.raises(
        InputError, match="after 0 steps the loss on held-out windows is nan; check"
    ):
        train(
            *(model, chosen(model), windows(), next_token_loss(model), schedule()),
            held_out=windows(),
        )


def test_processes_share_the_forwards_of_a_step(tmp_path):
    """Two processes, three forwards: one has two of them. The same sums, in another order."""
    path = Path(liar_training.__file__)
    found_at = [str(path.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, found_at))}
    line = torchrun(2, tmp_path, str(path), str(tmp_path))
    done = subprocess.run(line, env=environment, cwd=tmp_path, timeout=LIMIT_SECONDS)
    logs = "".join(log.read_text() for log in (tmp_path / "log").rglob("std*.log"))
    assert done.returncode == 0, logs
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in "01")
    model, told = trained(accumulation=3, save_every=2)
    for name, value in model.state_dict().items():
        assert torch.equal(first["model"][name], second["model"][name]), name
        torch.testing.assert_close(first["model"][name], value, rtol=0, atol=1e-4)
    assert first["tokens"] == told.tokens
    assert first["log"][-1]["loss"] == pytest.approx(told.log[-1]["loss"], rel=1e-4)
    assert TrainingState(tmp_path / "state", {"seed": 0}).steps() == 4
