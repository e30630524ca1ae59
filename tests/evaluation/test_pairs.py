"""Pairs of texts, against the loss that transformers computes itself, one pair at a time."""

import json
import math

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    T5Config,
    T5Model,
)
from transformers import T5ForConditionalGeneration as T5

from liar_ext.errors import InputError, UnsupportedModelError
from liar_ext.evaluation.beside import evaluate
from liar_ext.evaluation.generation import greedy
from liar_ext.evaluation.limits import kind_of, limits_of
from liar_ext.evaluation.pairs import PairsMeasure, read_pairs
from liar_ext.evaluation.task import Evaluation

PAIRS = [("w1 w2 w3", "w4"), ("w5", "w6 w7 w8 w9 w10"), ("w11 w12", "w13 w14"), ("w1", "w2")]


def _t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=97,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        initializer_factor=5.0,
        decoder_start_token_id=0,
    )
    return T5(config).eval()


def _bart():
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "init_std": 0.5}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(
        vocab_size=97, encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0, **sizes, **heads
    )
    return BartForConditionalGeneration(config).eval()


@pytest.fixture
def written(tmp_path):
    lines = [json.dumps({"source": source, "target": target}) for source, target in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("build", [_t5, _bart])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_loss_of_each_pair_is_the_models_own(build, batch_size, written, tokenizer):
    model = build()
    losses, right = [], []
    for source, target in PAIRS:
        inputs = tokenizer(source, return_tensors="pt", truncation=True, max_length=5)
        labels = tokenizer(target, return_tensors="pt", truncation=True, max_length=5).input_ids
        with torch.no_grad():
            found = model(
                input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=labels
            )
        losses.append(float(found.loss))
        right.append(float((found.logits.argmax(-1) == labels).float().mean()))
    measure = PairsMeasure(Evaluation("pairs", written, 5, batch_size), tokenizer)
    got = measure(model)
    mean = sum(losses) / len(losses)
    assert got.estimates["perplexity"].value == pytest.approx(math.exp(mean), rel=1e-4)
    assert got.details["loss"] == pytest.approx(mean, rel=1e-5)
    assert got.estimates["top1_accuracy"].value == pytest.approx(100 * sum(right) / len(right))
    # in the order of the file, whatever the order of the forwards
    units = got.estimates["perplexity"].units / math.exp(mean) - 1 + mean
    assert units == pytest.approx(losses, rel=1e-4)
    assert (got.unit, got.details["tokens"]) == ("targets", 3 + 5 + 4 + 3)


def test_beside_the_dense_model_differences_are_paired(written, tokenizer, tmp_path):
    for name, seed in (("dense", 0), ("other", 1)):
        model = _t5()
        torch.manual_seed(seed)
        model.encoder.block[0].layer[1].DenseReluDense.wo.weight.data.normal_()
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    asked = [Evaluation("pairs", written)]
    (found,) = evaluate(tmp_path / "other", asked, dense=tmp_path / "dense")
    assert found.difference["perplexity"].paired
    each = [found.model, found.dense]
    apart = [one.estimates["perplexity"].value for one in each]
    assert found.difference["perplexity"].value == pytest.approx(apart[0] - apart[1])
    assert abs(apart[0] - apart[1]) > 1e-3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"text": "w1"}', "no pairs of texts; give a .jsonl"),
        ('{"source": "w1", "target": " "}', "no pairs of texts"),
        ('{"source": "w1"}\n{"source": "w2", "target": "w3"}', "is no pair of texts, and others"),
    ],
    ids=["text", "blank", "mixed"],
)
def test_a_file_without_pairs_is_refused(text, says, tmp_path):
    (tmp_path / "texts.jsonl").write_text(text)
    with pytest.raises(InputError, match=says):
        read_pairs(str(tmp_path / "texts.jsonl"))


def test_models_are_measured_as_what_they_are(written, tmp_path, llama):
    _t5().save_pretrained(tmp_path / "t5")
    llama.save_pretrained(tmp_path / "llama")
    kinds = [limits_of(tmp_path / name).kind for name in ("t5", "llama")]
    assert kinds == ["encoder-decoder", "decoder"]
    with pytest.raises(InputError, match="a t5 model is evaluated with --pairs FILE.jsonl$"):
        Evaluation("text", written).check(
            tmp_path, limits_of(tmp_path / "t5"), form="{option} {form}"
        )
    with pytest.raises(InputError, match="a llama model is evaluated with --text"):
        Evaluation("pairs", written).check(
            tmp_path, limits_of(tmp_path / "llama"), form="{option} {form}"
        )
    with pytest.raises(UnsupportedModelError, match="T5Model is an encoder-decoder and cannot"):
        kind_of(T5Model(_t5().config))


def test_a_decoder_that_listens_is_no_encoder_decoder():
    """transformers lists it among sequence-to-sequence models."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text = Qwen2Config(vocab_size=97, num_attention_heads=2, num_key_value_heads=2, **sizes)
    audio = {"d_model": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 8}
    config = Qwen2AudioConfig(text_config=text.to_dict(), audio_config=audio, audio_token_index=5)
    assert kind_of(Qwen2AudioForConditionalGeneration(config)) == "decoder"


def test_what_is_written_for_a_prompt_begins_behind_the_start_token(tokenizer):
    model = _t5()
    ids = tokenizer("w1 w2", return_tensors="pt").input_ids
    written = [0]
    for _ in range(5):
        with torch.no_grad():
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor([written])).logits
        written.append(int(logits[0, -1].argmax()))
    assert 3 not in written, "the reference must not reach the end token"
    expected = tokenizer.decode(written[1:], skip_special_tokens=True)
    assert greedy(model, tokenizer, "w1 w2", 5) == expected
