"""Divergence and top-1 agreement against the definition, both ways of holding the dense model."""

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from liar_ext.errors import InputError
from liar_ext.evaluation import agreement as module
from liar_ext.evaluation import perplexity as windows_module
from liar_ext.evaluation.agreement import agreement, live, recorded
from liar_ext.evaluation.perplexity import window_losses


@pytest.fixture
def ids():
    return torch.randint(0, 97, (70,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pruned(llama):
    """The same with a little noise on every weight."""
    other = copy.deepcopy(llama)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return other


def definition(dense, model, ids, seq_len):
    """(windows,) KL and agreement, token by token in float64."""
    found = []
    for start in range(0, len(ids) - seq_len + 1, seq_len):
        window = ids[None, start : start + seq_len]
        with torch.no_grad():
            p, q = (
                each(input_ids=window).logits[0].double().softmax(-1) for each in (dense, model)
            )
        terms = [
            (float((p[t] * (p[t] / q[t]).log()).sum()), bool(p[t].argmax() == q[t].argmax()))
            for t in range(seq_len - 1)
        ]
        found.append(np.mean(terms, 0))
    return np.array(found).T


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("way", ["live", "recorded"])
def test_it_is_the_definition(llama, pruned, ids, batch_size, way, tmp_path, monkeypatch):
    # chunks of three positions
    monkeypatch.setattr(windows_module, "CHUNK_LOGITS", 97 * batch_size * 3)
    kl, same = definition(llama, pruned, ids, 16)
    assert kl.min() > 0.01 and 0 < same.mean() < 1
    losses = window_losses(llama, ids, 16)
    reference = live(llama) if way == "live" else recorded(llama, ids, 16, batch_size, tmp_path)
    if way == "recorded":
        with torch.no_grad():
            for layer in llama.model.layers:
                layer.mlp.down_proj.weight.zero_()  # nobody asks it again
    found = agreement(pruned, reference, ids, 16, batch_size)
    np.testing.assert_allclose(found.divergence, kl, rtol=1e-4)
    np.testing.assert_allclose(found.top1, 100 * same)
    torch.testing.assert_close(found.loss, window_losses(pruned, ids, 16))
    torch.testing.assert_close(found.reference_loss, losses)


def test_a_model_agrees_with_itself(llama, ids):
    found = agreement(llama, live(llama), ids, 16)
    assert float(found.divergence.abs().max()) < 1e-6
    assert bool((found.top1 == 100).all())


def test_what_the_dense_model_rules_out_adds_nothing(ids):
    class Fixed(torch.nn.Module):
        def __init__(self, row):
            super().__init__()
            self.row = row

        def forward(self, input_ids):
            logits = self.row.expand(*input_ids.shape, 97)
            return type("Out", (), {"logits": logits})

    flat, half = torch.zeros(97), torch.zeros(97)
    half[50:] = -torch.inf
    inside = ids.clamp(max=49)
    found = agreement(Fixed(flat), live(Fixed(half)), inside, 16)
    assert float(found.divergence.mean()) == pytest.approx(np.log(97 / 50), rel=1e-5)
    with pytest.raises(InputError, match=r"loss of window 0 of 4 is inf"):
        agreement(Fixed(half), live(Fixed(flat)), inside, 16)


def test_only_one_batch_of_logits_is_there_at_a_time(llama, pruned, ids, monkeypatch):
    seen = []
    compared = module._compared
    monkeypatch.setattr(
        module, "_compared", lambda a, b, c: seen.append(a.shape) or compared(a, b, c)
    )
    agreement(pruned, live(llama), ids, 16, 2)
    assert seen == [(2, 16, 97), (2, 16, 97)]


def test_another_vocabulary_is_refused(llama, ids):
    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    ).eval()
    with pytest.raises(InputError, match="vocabularies of 97 and 101"):
        agreement(other, live(llama), ids, 16)


def test_logits_that_the_head_does_not_make_alone_cannot_wait_on_disk(llama, ids, tmp_path):
    class Capped(LlamaForCausalLM):
        def forward(self, **arguments):
            found = super().forward(**arguments)
            found.logits = found.logits.tanh()
            return found

    capped = Capped(llama.config).eval()
    with pytest.raises(InputError, match="changes its logits behind the output embedding"):
        recorded(capped, ids, 16, 1, tmp_path)
