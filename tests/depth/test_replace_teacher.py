"""What the teacher says is what transformers computes, and what it costs to say something else."""

from __future__ import annotations

import copy

import pytest
import torch
from liar_depth import build
from liar_families import probe_tokens
from torch import nn

from liar_ext.calibration import Batch
from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.depth import surgery
from liar_ext.depth.replace.loss import state_error, state_error_reference
from liar_ext.depth.replace.teacher import Teacher, read_teacher
from liar_ext.depth.replace.training import window_loss
from liar_ext.depth.surgery import layer_list
from liar_ext.models import layout


def padded(length=14):
    """Three windows, one of which ends early and one begins late."""
    ids = probe_tokens(batch=3, length=length)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 9:] = False
    mask[2, :4] = False
    return Batch(ids, mask)


def states_of(model, batch):
    """What enters every layer and leaves the last one, by hooks on the whole model."""
    layers = layer_list(model)[1]
    found = []

    def enter(module, args, kwargs):
        found.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).clone())

    def leave(module, args, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(leave))
    mask = batch.attention_mask.long()
    with torch.no_grad():
        out = model(batch.input_ids, attention_mask=mask, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return found, out.hidden_states


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3-windows", "gemma3"])
@pytest.mark.parametrize("window", [range(1, 4), range(3, 6)])
def test_states_are_those_of_the_whole_model(tmp_path, name, window):
    """Read from files as far as they are needed; behind the last layer, in front of its norm."""
    model, batch = build(name), padded()
    model.save_pretrained(tmp_path / "dense")
    reader = CheckpointReader(tmp_path / "dense")
    dense = layout.empty(reader.config)
    reader.bind(dense)
    cpu = torch.device("cpu")
    short = read_teacher(reader, dense, window, dtype=torch.float32, device=cpu)
    assert len(layer_list(short)[1]) == window.stop, "layers above are not read"
    head = short.get_output_embeddings().weight
    assert head.is_meta or head is short.get_input_embeddings().weight
    passage = Teacher(short, window, 2)(batch)
    hooked, stated = states_of(model, batch)
    valid = batch.attention_mask
    for found, at in ((passage.entering, window.start), (passage.leaving, window.stop)):
        torch.testing.assert_close(found[valid], hooked[at][valid])
        assert not found.requires_grad
    torch.testing.assert_close(passage.entering[valid], stated[window.start][valid])
    if window.stop == 6:
        assert (passage.leaving - stated[6])[valid].abs().max() > 0.1, "behind the final norm"
    # the layers, called so, are the model's
    layers = layer_list(model)[1]
    states = passage.entering
    for at, call in zip(window, passage.calls, strict=False):
        with torch.no_grad():
            states = layers[at](states, *call.args, **call.kwargs)
        states = states[0] if isinstance(states, tuple) else states
    torch.testing.assert_close(states[valid], hooked[window.start + 2][valid])


def test_layers_above_the_window_are_not_run():
    model = build("llama")

    def fail(*args, **kwargs):
        raise AssertionError("was run")

    for layer in model.model.layers[4:]:
        layer.forward = fail
    model.model.norm.forward = fail
    assert Teacher(model, range(2, 4), 1)(padded()).leaving.shape == (3, 14, 32)


def test_hooks_are_gone_when_something_breaks():
    model = build("llama")
    teacher = Teacher(model, range(2, 4), 1)
    with pytest.raises(IndexError):
        teacher(Batch(torch.full((1, 4), 10_000), torch.ones(1, 4, dtype=torch.bool)))
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in teacher.layers)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_what_stands_in_sees_nothing_that_follows(kind):
    """Called without a mask, eager attention would see all of the window."""
    model = build("llama")
    model.set_attn_implementation(kind)
    teacher = Teacher(model, range(2, 5), 1)
    ids = probe_tokens(batch=1, length=12)
    other = ids.clone()
    other[:, 8:] = (other[:, 8:] + 1) % 97
    found = []
    for tokens in (ids, other):
        passage = teacher(Batch(tokens, torch.ones_like(tokens, dtype=torch.bool)))
        call = passage.calls[0]
        with torch.no_grad():
            found.append(teacher.layers[2](passage.entering, *call.args, **call.kwargs))
    torch.testing.assert_close(found[0][:, :8], found[1][:, :8])
    assert not torch.allclose(found[0][:, 8:], found[1][:, 8:])


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_error_is_its_definition(normalised, dtype):
    generator = torch.Generator().manual_seed(0)
    found, wanted = (torch.randn(3, 7, 13, generator=generator) for _ in range(2))
    wanted[:, 0] *= 200
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, 5:] = mask[2, :3] = False
    found, wanted = found.to(dtype), wanted.to(dtype)
    # padding may hold anything
    found[~mask] = torch.inf
    valid = mask.flatten().nonzero().flatten()
    error = state_error(found, wanted, valid, normalised=normalised)
    expected = state_error_reference(found, wanted, mask, normalised=normalised)
    assert error.count == int(mask.sum()) * 13
    assert float(error.total) / error.count == pytest.approx(expected, rel=1e-5)


def test_normalised_errors_do_not_grow_with_a_token():
    """Plain, the one token with a huge state is nearly all of the loss; normalised, a share."""
    wanted = torch.randn(1, 10, 16, generator=torch.Generator().manual_seed(0))
    wanted[0, 0] *= 1000
    found = wanted * 1.1
    first, rest = (state_error(found[:, s], wanted[:, s], None) for s in (slice(1), slice(1, 10)))
    assert float(first.total) > 1000 * float(rest.total)
    first, rest = (
        state_error(found[:, s], wanted[:, s], None, normalised=True)
        for s in (slice(1), slice(1, 10))
    )
    assert float(first.total) / first.count == pytest.approx(0.01, rel=1e-3)
    assert float(rest.total) / rest.count == pytest.approx(0.01, rel=1e-3)


def test_a_state_of_zeros_is_finite():
    zero = torch.zeros(1, 2, 4)
    assert float(state_error(zero, zero, None, normalised=True).total) == 0
    assert float(state_error(zero + 1, zero, None, normalised=True).total) == 8


def test_gradients_are_of_what_stands_in_alone():
    """The same loss through the shortened model that `surgery` makes, differentiated by it."""
    model, batch = build("llama"), padded()
    teacher = Teacher(model, range(1, 4), 1)
    stand_ins = nn.ModuleList([copy.deepcopy(model.model.layers[1])])
    loss = window_loss(teacher, stand_ins)(batch)
    mine = torch.autograd.grad(loss.total / loss.count, list(stand_ins.parameters()))
    short = surgery(copy.deepcopy(model), [0, 1])
    out = short.model.layers[1].register_forward_hook(lambda m, a, o: seen.append(o))
    seen: list[torch.Tensor] = []
    short(batch.input_ids, attention_mask=batch.attention_mask.long())
    out.remove()
    wanted = states_of(model, batch)[0][4]
    valid = batch.attention_mask
    expected = (seen[0] - wanted)[valid].square().mean()
    torch.testing.assert_close(loss.total / loss.count, expected)
    theirs = torch.autograd.grad(expected, list(short.model.layers[1].parameters()))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())
