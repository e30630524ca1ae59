"""Scores of multiple-choice options against plain calls of the model, one option at a time."""

import math
from types import SimpleNamespace

import pytest
import torch
from liar_choices import DEMO, RECORDS, write_jsonl
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from liar_ext.errors import InputError
from liar_ext.evaluation import choice_scores as module
from liar_ext.evaluation.choice_formats import Item
from liar_ext.evaluation.choice_scores import ChoiceScores, result_of, score
from liar_ext.evaluation.choice_tokens import encode
from liar_ext.evaluation.choices import ChoiceSet, read_choices

WORDS = "Return the value of a new list that maps each key to its file object"


@pytest.fixture(scope="module")
def demo():
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture
def with_bos(tokenizer):
    """[CLS] in front of a text, [SEP] nowhere."""
    return _processed(tokenizer, "[CLS] $A", [("[CLS]", 2)])


@pytest.fixture
def without_bos(tokenizer):
    return _processed(tokenizer, "$A", [])


def _processed(tokenizer, template, special):
    inner = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="[SEP]")


def items(*given):
    made = [Item(*one, where=f"item {number}") for number, one in enumerate(given)]
    return ChoiceSet("set", "plain", "", tuple(made), ())


def brute(model, front, tail):
    """Losses of a text given as tokens: of the tail, and of everything over the token count."""
    ids = [*front, *tail]
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    losses = [-float(log_p[t - 1, ids[t]]) for t in range(1, len(ids))]
    return sum(losses[len(front) - 1 :]), sum(losses) / len(ids)


def close(got, want):
    # float32 sums in another order, of a few hundred terms
    return got == pytest.approx(want, rel=2e-5, abs=1e-5)


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_one_plain_call_an_option(
    demo, demo_tokenizer, tmp_path, name, batch_size
):
    data = RECORDS[name]
    found = read_choices(write_jsonl(tmp_path / "a.jsonl", data, data))
    scores = score(demo, encode(found, demo_tokenizer, 256), batch_size)
    for number, item in enumerate(found.items):
        front = demo_tokenizer(item.context)["input_ids"]
        for option, continuation in enumerate(item.continuations()):
            whole = demo_tokenizer(item.context + continuation)["input_ids"]
            assert whole[: len(front)] == front, "the reference needs a clean cut"
            own, text = brute(demo, front, whole[len(front) :])
            assert close(float(scores.log_likelihood[number, option]), -own)
            assert close(float(scores.text_loss[number, option]), text)
            assert scores.characters[number, option] == len(continuation.strip())


def test_accuracies_and_errors_are_those_of_the_definition():
    nan = math.nan
    scores = ChoiceScores(
        text_loss=torch.tensor([[2.0, 1.0, 3.0], [1.0, 2.0, nan], [2.0, 2.0, 1.0]]).double(),
        log_likelihood=-torch.tensor([[2.0, 5.0, 3.0], [1.0, 2.0, nan], [4.0, 4.0, 5.0]]).double(),
        characters=torch.tensor([[1.0, 5.0, 2.0], [1.0, 4.0, nan], [2.0, 2.0, 2.0]]).double(),
        answers=torch.tensor([1, 0, 0]),
        seconds=0.5,
    )
    # a tie is the first option's; item 2 by length: −2, −2, −2.5
    correct = {"accuracy": [0, 1, 1], "accuracy_norm": [1, 0, 1], "accuracy_ppl": [1, 1, 0]}
    assert {name: found.tolist() for name, found in scores.correct().items()} == {
        name: list(map(bool, found)) for name, found in correct.items()
    }
    three = items(("a", ("b", "c", "d"), 1), ("a", ("b", "c"), 0), ("a", ("b", "c", "d"), 0))
    encoded = SimpleNamespace(choices=three, truncated=1)
    result = result_of(encoded, scores)
    assert result.accuracy == result.accuracy_norm == pytest.approx(200 / 3)
    # the sample deviation of 0, 1, 1 over √3
    assert result.standard_error == pytest.approx(100 * math.sqrt(1 / 3) / math.sqrt(3))
    assert result.chance == pytest.approx(100 * (1 / 3 + 1 / 2 + 1 / 3) / 3)
    assert (result.items, result.truncated, result.seconds) == (3, 1, 0.5)


def test_one_item_has_no_standard_error(demo, demo_tokenizer):
    encoded = encode(items(("Return a", ("list", "new list of"), 0)), demo_tokenizer)
    result = result_of(encoded, score(demo, encoded, 2))
    assert result.standard_error is result.standard_error_norm is result.standard_error_ppl is None


def test_neither_batches_nor_neighbours_matter(demo, demo_tokenizer, tmp_path):
    """Rows of 2 to 80 tokens, so that every batch is padded; a row alone is not."""
    lengths = torch.randint(1, 40, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    words = WORDS.split()
    given = [
        (" ".join(words[i % 15] for i in range(n)), (" ".join(words[: n % 7 + 1]), "value"), 0)
        for n in lengths
    ]
    together = encode(items(*given), demo_tokenizer)
    want = [score(demo, encode(items(one), demo_tokenizer), 1) for one in given]
    for batch_size in (1, 2, 5, 24, 100):
        got = score(demo, together, batch_size)
        for field in ("text_loss", "log_likelihood"):
            reference = torch.cat([getattr(one, field) for one in want])
            assert torch.allclose(getattr(got, field), reference, rtol=2e-5, atol=1e-5)


def test_chunks_of_the_loss_change_nothing(demo, demo_tokenizer, tmp_path, monkeypatch):
    found = encode(read_choices(write_jsonl(tmp_path / "a.jsonl", RECORDS["race"])), demo_tokenizer)
    whole = score(demo, found, 4)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 4096 * 4 * 3)
    cut = score(demo, found, 4)
    assert torch.allclose(cut.text_loss, whole.text_loss, rtol=1e-6)
    assert torch.allclose(cut.log_likelihood, whole.log_likelihood, rtol=1e-6)


def test_options_of_one_token_share_a_forward(demo, demo_tokenizer, tmp_path):
    other = {**RECORDS["mmlu"], "question": "What does max return?"}
    name = write_jsonl(tmp_path / "a.jsonl", RECORDS["mmlu"], other)
    encoded = encode(read_choices(name), demo_tokenizer)
    assert len(encoded.rows) == 8
    seen = []
    handle = demo.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    try:
        score(demo, encoded, 1)
    finally:
        handle.remove()
    assert seen == [1, 1]


def test_padding_is_on_the_right_and_masked(demo, demo_tokenizer):
    seen = []
    handle = demo.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    try:
        score(demo, encode(items(("Return", ("a new list", "x"), 0)), demo_tokenizer), 2)
    finally:
        handle.remove()
    (call,) = seen
    mask = call["attention_mask"]
    lengths = mask.sum(1)
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
    assert len(set(lengths.tolist())) == 2
    assert all(row.tolist() == sorted(row.tolist(), reverse=True) for row in mask)
    assert call["use_cache"] is False


def test_a_long_context_loses_its_beginning_but_not_its_special_tokens(llama, with_bos):
    words = [f"w{i}" for i in range(40)]
    found = items((" ".join(words), ("w50 w51", "w52"), 0))
    whole, cut = encode(found, with_bos), encode(found, with_bos, 8)
    assert (whole.truncated, cut.truncated) == (0, 1)
    # w0 is 4
    assert cut.rows[0].ids == (2, 39, 40, 41, 42, 43, 54, 55)
    assert cut.rows[1].ids == (2, 38, 39, 40, 41, 42, 43, 56)
    assert [row.start for row in cut.rows] == [6, 7]
    scores = score(llama, cut, 2)
    own, text = brute(llama, cut.rows[0].ids[:6], cut.rows[0].ids[6:])
    assert close(float(scores.log_likelihood[0, 0]), -own)
    assert close(float(scores.text_loss[0, 0]), text)


def test_rows_that_just_fit_are_whole(with_bos):
    found = items(("w1 w2 w3", ("w4", "w5 w6"), 0))
    assert encode(found, with_bos, 6).rows == encode(found, with_bos).rows
    assert encode(found, with_bos, 6).truncated == 0


def test_a_choice_longer_than_the_window_is_refused(with_bos, without_bos):
    found = items(("w1", ("w2 w3 w4", "w5"), 0))
    assert encode(found, with_bos, 4).rows[0].ids == (2, 6, 7, 8)
    for tokenizer in (with_bos, without_bos):
        with pytest.raises(InputError, match="item 0: a choice has 3 tokens, and the window only"):
            encode(found, tokenizer, 3)


def test_special_tokens_behind_a_text_are_left_off(tokenizer):
    """The fixture's tokenizer makes [CLS] ... [SEP]."""
    (row, _) = encode(items(("w1", ("w2", "w3"), 0)), tokenizer).rows
    assert (row.ids, row.start) == ((2, 5, 6), 2)


def test_an_empty_context_is_scored_behind_bos_or_else_eos(llama, with_bos, without_bos):
    found = items(("", ("w1 w2", "w3"), 0))
    rows = encode(found, with_bos).rows
    assert [(row.ids, row.start) for row in rows] == [((2, 5, 6), 1), ((2, 7), 1)]
    rows = encode(found, without_bos).rows
    assert [(row.ids, row.start) for row in rows] == [((3, 5, 6), 1), ((3, 7), 1)]
    assert encode(items(("w0", ("w1", "w3"), 0)), without_bos).rows[0].ids == (4, 5)
    bare = PreTrainedTokenizerFast(tokenizer_object=without_bos.backend_tokenizer)
    with pytest.raises(InputError, match="item 0: nothing is in front of a choice"):
        encode(found, bare)
    scores = score(llama, encode(found, with_bos), 4)
    assert close(float(scores.log_likelihood[0, 1]), -brute(llama, [2], [7])[0])


def test_a_token_across_the_joint_belongs_to_the_choice(demo_tokenizer):
    """Without a space between them the tokenizer cuts "ret" + "urn" otherwise than "ret"."""
    found = ChoiceSet("set", "plain", "", (Item("ret", ("urn", "x"), 0, "", ""),), ())
    row, other = encode(found, demo_tokenizer).rows
    assert demo_tokenizer.decode(row.ids[row.start :]).endswith("urn")
    assert demo_tokenizer.decode(row.ids) in ("return", "<|endoftext|>return")
    assert row.start < len(row.ids)
    assert demo_tokenizer.decode(other.ids[other.start :]) == "x"


def test_white_space_at_the_end_of_a_context_is_the_continuations(demo_tokenizer):
    spaced = ChoiceSet("set", "plain", "", (Item("Return a ", ("list", "new"), 0, "", ""),), ())
    plain = ChoiceSet("set", "plain", "", (Item("Return a", ("list", "new"), 0),), ())
    assert encode(spaced, demo_tokenizer).rows == encode(plain, demo_tokenizer).rows


def test_a_choice_without_tokens_is_refused(without_bos):
    inner = without_bos.backend_tokenizer
    from tokenizers import normalizers

    inner.normalizer = normalizers.Replace("gone", "")
    with pytest.raises(InputError, match="item 0: a choice has no tokens of its own"):
        encode(items(("w1", ("w2", "gone"), 0)), without_bos)


def test_bfloat16_logits_are_scored_in_float32(llama, with_bos):
    low = llama.bfloat16()
    encoded = encode(items(("w1 w2", ("w3 w4", "w5"), 0)), with_bos)
    scores = score(low, encoded, 1)
    assert close(float(scores.text_loss[0, 0]), brute(low, [2, 5, 6], [7, 8])[1])


def test_the_training_state_is_restored(llama, with_bos):
    llama.train()
    score(llama, encode(items(("w1", ("w2", "w3"), 0)), with_bos), 1)
    assert llama.training
    assert all(parameter.grad is None for parameter in llama.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_is_refused_with_the_item(llama, with_bos, value):
    with torch.no_grad():
        llama.lm_head.weight[0] = value
    given = items(("w1", ("w2", "w3"), 0), ("w1 w2", ("w2", "w3"), 0))
    with pytest.raises(InputError, match=r"item 0: the loss of an option is (nan|inf)"):
        score(llama, encode(given, with_bos), 2)


def test_what_padding_gives_may_be_no_number(llama, with_bos):
    """Some attention kernels leave NaN where a row sees nothing; nothing of it reaches a sum."""

    class Poisoned(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            out = llama(input_ids=input_ids, attention_mask=attention_mask)
            out.logits[attention_mask == 0] = math.nan
            return out

    encoded = encode(items(("w1", ("w2 w3 w4", "w5"), 0)), with_bos)
    want, got = score(llama, encoded, 2), score(Poisoned(), encoded, 2)
    assert torch.equal(got.text_loss, want.text_loss)


def test_what_a_model_cannot_take_is_refused(llama, bert, with_bos):
    encoded = encode(items((" ".join(["w1"] * 70), ("w2", "w3"), 0)), with_bos)
    with pytest.raises(InputError, match="72 tokens, beyond the model's limit of 64 positions"):
        score(llama, encoded, 1)
    encoded = encode(items(("w1", ("w2", "w3"), 0)), with_bos)
    with pytest.raises(InputError, match="BertModel has no logits"):
        score(bert, encoded, 1)
    with pytest.raises(InputError, match="--batch-size 0"):
        score(llama, encoded, 0)
    llama.resize_token_embeddings(6)
    with pytest.raises(InputError, match="the model's vocabulary has 6"):
        score(llama, encoded, 1)
