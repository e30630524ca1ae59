"""perplexity against a direct computation, and its refusals."""

import json
import math

import pytest
import torch

from liar_ext.errors import InputError
from liar_ext.evaluation import perplexity as module
from liar_ext.evaluation.perplexity import _window_losses, perplexity, tokenize


@pytest.fixture
def ids():
    return torch.randint(0, 97, (113,), generator=torch.Generator().manual_seed(0))


def plain_losses(model, ids, seq_len):
    """The definition: one window at a time, float64, token by token."""
    means = []
    for start in range(0, len(ids) - seq_len + 1, seq_len):
        window = ids[start : start + seq_len]
        with torch.no_grad():
            log_p = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
        means.append(-sum(log_p[t, window[t + 1]] for t in range(seq_len - 1)) / (seq_len - 1))
    return torch.stack(means)


@pytest.mark.parametrize("seq_len", [2, 7, 64])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_equals_the_direct_computation(llama, ids, seq_len, batch_size):
    want = plain_losses(llama, ids, seq_len)
    got = perplexity(llama, ids, seq_len, batch_size)
    assert got.windows == len(ids) // seq_len == len(want)
    assert got.tokens == got.windows * (seq_len - 1)
    # float32 log-softmax: a relative error of about 2**-23 times the loss
    assert got.loss == pytest.approx(float(want.mean()), rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(got.loss))
    if got.windows > 1:
        assert got.standard_error == pytest.approx(float(want.std() / len(want) ** 0.5), rel=1e-4)
    else:
        assert got.standard_error is None


def test_it_is_the_loss_transformers_computes(llama, ids):
    window = ids[None, :64]
    with torch.no_grad():
        want = float(llama(input_ids=window, labels=window).loss)
    assert perplexity(llama, ids, 64).loss == pytest.approx(want, rel=1e-5)


def test_chunks_of_the_loss_change_nothing(llama, ids, monkeypatch):
    whole = perplexity(llama, ids, 16, 3)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 97 * 3 * 4)
    assert perplexity(llama, ids, 16, 3).loss == pytest.approx(whole.loss, rel=1e-6)


def test_low_precision_logits_are_scored_in_float32(llama, ids):
    low = perplexity(llama.bfloat16(), ids, 16)
    want = plain_losses(llama, ids, 16)
    assert low.loss == pytest.approx(float(want.mean()), rel=1e-5)


def test_the_last_partial_window_is_dropped(llama, ids):
    assert perplexity(llama, ids[:35], 16).loss == perplexity(llama, ids[:32], 16).loss


def test_the_training_state_of_every_module_is_restored_and_there_are_no_gradients(llama, ids):
    llama.train()
    llama.model.layers[0].eval()
    before = [m.training for m in llama.modules()]
    perplexity(llama, ids, 16)
    assert [m.training for m in llama.modules()] == before
    assert all(p.grad is None for p in llama.parameters())
    llama(input_ids=ids[None, :8], labels=ids[None, :8]).loss.backward()


def test_the_training_state_is_restored_after_an_error(llama, ids):
    llama.train()
    with torch.no_grad():
        llama.lm_head.weight[0] = math.nan
    with pytest.raises(InputError):
        perplexity(llama, ids, 16)
    assert llama.training


def test_a_text_shorter_than_a_window_is_refused_with_its_length(llama, ids):
    with pytest.raises(InputError, match=r"has 15 tokens, and one window needs 16.*--seq-len"):
        perplexity(llama, ids[:15], 16)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused_and_named(llama, ids, value):
    with torch.no_grad():
        llama.lm_head.weight[5] = value
    with pytest.raises(InputError, match=r"loss of window 0 of 7 is (nan|inf)"):
        perplexity(llama, ids, 16)


def test_ids_outside_the_vocabulary_are_refused(llama, ids):
    with pytest.raises(InputError, match="to 97 and the model's vocabulary has 97"):
        perplexity(llama, torch.cat([ids[:20], torch.tensor([97])]), 7)
    with pytest.raises(InputError, match="from -1"):
        perplexity(llama, ids - 1 - ids.min(), 16)


def test_a_window_beyond_the_models_limit_is_refused(llama, ids):
    with pytest.raises(InputError, match=r"--seq-len 65 is beyond the model's limit of 64"):
        perplexity(llama, ids, 65)


@pytest.mark.parametrize(("seq_len", "batch_size"), [(1, 1), (16, 0)])
def test_numbers_below_their_minimum_are_refused(llama, ids, seq_len, batch_size):
    with pytest.raises(InputError, match="is too small"):
        perplexity(llama, ids, seq_len, batch_size)


def test_a_hopeless_model_gives_a_number_that_json_can_hold(llama, ids):
    with torch.no_grad():
        llama.lm_head.weight.mul_(1e4)
    result = perplexity(llama, ids, 16).to_json()
    assert result["loss"] > 700
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_any_module_with_logits_will_do(ids):
    class Uniform(torch.nn.Module):
        def forward(self, input_ids):
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 97)})

    assert perplexity(Uniform(), ids, 16).perplexity == pytest.approx(97, rel=1e-5)


def test_tokenize_is_one_stream_with_special_tokens_and_no_warning(tokenizer, capfd):
    stream = tokenize(" ".join(f"w{i}" for i in range(60)), tokenizer)
    assert stream.dtype == torch.int64
    assert stream.tolist() == [2, *range(4, 64), 3]
    assert "longer than" not in "".join(capfd.readouterr())


def test_losses_of_windows_are_kept_apart(llama, ids):
    windows = ids[:48].view(3, 16)
    with torch.no_grad():
        together = _window_losses(llama, windows)
        apart = torch.cat([_window_losses(llama, w[None]) for w in windows])
    assert torch.allclose(together, apart, rtol=1e-5)
