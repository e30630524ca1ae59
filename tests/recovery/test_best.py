"""The best weights on held-out windows are copies, and survive an interruption."""

from __future__ import annotations

import pytest
import torch
from liar_depth import build
from liar_training import chosen, schedule, windows

from liar_ext.recovery import Loss, TrainingState, next_token_loss, train


def run(loss_of=None, state=None, best=True, **fields):
    """A training of the tiny llama, and its parameters after every look."""
    model = build("llama")
    plain = next_token_loss(model)
    seen: list[dict[str, torch.Tensor]] = []

    def loss(batch):
        found = plain(batch)
        if torch.is_grad_enabled():
            return found
        known = dict(model.named_parameters())
        seen.append({name: known[name].detach().clone() for name in chosen(model)})
        value = found.total if loss_of is None else found.total * 0 + loss_of[len(seen) - 1]
        return Loss(value, found.count)

    told = train(
        model,
        chosen(model),
        windows(),
        loss,
        schedule(evaluate_every=1, batch_size=4, **fields),
        held_out=windows(3),
        state=state,
        best=best,
    )
    return model, told, seen


def same(model, expected):
    known = dict(model.named_parameters())
    return all(torch.equal(known[name], value) for name, value in expected.items())


def test_the_best_look_is_kept_and_not_the_last():
    model, told, seen = run([9.0, 8, 5, 7, 5, 6, 7])
    assert told.kept == 2, "the first of equal ones"
    assert same(model, seen[2])
    assert not same(model, seen[6]), "a live reference would be these"


def test_training_that_only_harms_is_undone():
    model, told, seen = run([1.0, 2, 3, 4, 5, 6, 7])
    assert told.kept == 0
    assert same(model, seen[0])
    assert same(build("llama"), seen[0])


def test_the_last_are_kept_unless_asked():
    model, told, seen = run([9.0, 8, 5, 7, 5, 6, 7], best=False)
    assert told.kept == 6
    assert same(model, seen[6])


def test_the_best_survives_an_interruption(tmp_path):
    looks = [9.0, 8, 5, 7, 5, 6, 7]
    whole = run(looks)
    state = TrainingState(tmp_path / "state", {})
    save = state.save
    saved = []

    def cut(step, tensors, numbers):
        save(step, tensors, numbers)
        saved.append(step)
        if step == 4:
            raise KeyboardInterrupt

    object.__setattr__(state, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        run(looks, state, save_every=2)
    assert saved == [2, 4]
    model, told, _ = run(looks[5:], TrainingState(tmp_path / "state", {}), save_every=2)
    assert (told.resumed_at, told.kept) == (4, 2)
    assert told.held_out == whole[1].held_out
    assert same(
        model, {n: p.detach() for n, p in whole[0].named_parameters() if n in chosen(model)}
    )
