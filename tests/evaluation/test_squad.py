"""SQuAD against definitions written anew: metrics, spans over windows, formats, refusals."""

import copy
import json
import re
import string

import numpy as np
import pytest
import torch
from liar_squad import articles, write_hub, write_squad
from transformers import BertConfig, BertForQuestionAnswering

from liar_ext.errors import InputError
from liar_ext.evaluation.squad import SquadMeasure, best_span
from liar_ext.evaluation.squad_metrics import normal_form, scores
from liar_ext.evaluation.squad_sets import read_squad
from liar_ext.evaluation.task import Evaluation


@pytest.fixture
def reader():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return BertForQuestionAnswering(config).eval()


def reference_form(text):
    """The official script's four steps, one after the other, letter by letter."""
    lowered = text.lower()
    bare = "".join(letter for letter in lowered if letter not in set(string.punctuation))
    without = re.sub(r"\b(a|an|the)\b", " ", bare)
    return " ".join(without.split())


def reference_scores(answer, golds, version):
    """Exact match and F1 with precision and recall, the words crossed off one by one."""
    if version == 2:
        golds = [gold for gold in golds if reference_form(gold)] or [""]
    best = [0, 0.0]
    for gold in golds:
        given, wanted = reference_form(answer).split(), reference_form(gold).split()
        best[0] = max(best[0], int(reference_form(answer) == reference_form(gold)))
        left, common = list(wanted), 0
        for word in given:
            if word in left:
                left.remove(word)
                common += 1
        if version == 2 and (not given or not wanted):
            f1 = float(given == wanted)
        elif common == 0:
            f1 = 0.0
        else:
            precision, recall = common / len(given), common / len(wanted)
            f1 = 2 * precision * recall / (precision + recall)
        best[1] = max(best[1], f1)
    return tuple(best)


@pytest.mark.parametrize("version", [1, 2])
def test_answers_are_judged_as_the_official_script_does(version):
    texts = ["The Cat!", "a cat", "cat", "", "the", "an old cat, the cat", "old-cat", "Cat’s  cat"]
    texts += ["theatre a", "U.S. Army", "us army", "1,000", "1000 the"]
    for answer in texts:
        assert normal_form(answer) == reference_form(answer)
        for first in texts:
            for golds in ([first], [first, "old cat"], *([[]] if version == 2 else [])):
                want = reference_scores(answer, golds, version)
                assert scores(answer, golds, version) == pytest.approx(want), (answer, golds)


def test_known_judgements():
    assert scores("the Denver Broncos", ["Denver Broncos"], 1) == (True, 1.0)
    exact, f1 = scores("Denver Broncos won", ["Denver Broncos", "Broncos"], 1)
    assert (exact, f1) == (False, pytest.approx(0.8))
    assert scores("", [], 2) == (True, 1.0)
    assert scores("anything", [], 2) == (False, 0.0)


def plain_answers(model, pair_tokenizer, data, seq_len, version, threshold):
    """Window by window without padding, every pair of tokens in a loop."""
    found = []
    for question in data.questions:
        encoded = pair_tokenizer(
            question.text,
            question.context,
            truncation="only_second",
            max_length=seq_len,
            stride=seq_len // 3,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        best, text, null = -np.inf, "", np.inf
        for place, ids in enumerate(encoded["input_ids"]):
            with torch.no_grad():
                out = model(
                    input_ids=torch.tensor([ids]),
                    token_type_ids=torch.tensor([encoded["token_type_ids"][place]]),
                )
            first, last = out.start_logits[0].numpy(), out.end_logits[0].numpy()
            null = min(null, first[0] + last[0])
            sides, offsets = encoded.sequence_ids(place), encoded["offset_mapping"][place]
            top = [set(np.argsort(-each)[:20].tolist()) for each in (first, last)]
            for i in range(len(ids)):
                for j in range(i, min(i + 30, len(ids))):
                    allowed = sides[i] == sides[j] == 1 and i in top[0] and j in top[1]
                    if allowed and first[i] + last[j] > best:
                        best = first[i] + last[j]
                        text = question.context[offsets[i][0] : offsets[j][1]]
        found.append("" if version == 2 and null - best > threshold else text)
    return found


@pytest.mark.parametrize("version", ["1.1", "v2.0"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_answers_and_figures_are_those_of_plain_loops(
    tmp_path, reader, pair_tokenizer, version, batch_size
):
    spec = write_squad(tmp_path / "dev.json", articles(version=version))
    number = 2 if version == "v2.0" else 1
    threshold = -7.0
    evaluation = Evaluation(
        "squad", spec, seq_len=30, batch_size=batch_size, null_threshold=threshold
    )
    measure = SquadMeasure(evaluation, pair_tokenizer)
    assert len(measure.windows) > len(measure.data.questions), "some contexts are of many windows"
    want = plain_answers(reader, pair_tokenizer, measure.data, 30, number, threshold)
    assert measure.answers(reader) == want
    if number == 2:
        assert 0 < want.count("") < len(want), "both kinds of answers are there"
    judged = [
        reference_scores(answer, question.answers, number)
        for answer, question in zip(want, measure.data.questions, strict=True)
    ]
    result = measure(reader)
    exact, f1 = 100 * np.mean(judged, 0)
    assert result.estimates["f1"].value == pytest.approx(f1)
    assert result.estimates["exact_match"].value == pytest.approx(exact)
    found = result.to_json()
    assert (found["metric"], found["squad_version"], found["stride"]) == ("f1", number, 10)
    if number == 2:
        parts = [found[name] for name in ("has_answer", "no_answer")]
        assert sum(part["questions"] * part["f1"] for part in parts) == pytest.approx(12 * f1)


def test_a_threshold_moves_answers_to_none(tmp_path, reader, pair_tokenizer):
    spec = write_squad(tmp_path / "dev.json", articles(version="v2.0"))

    def count(threshold):
        evaluation = Evaluation("squad", spec, seq_len=30, null_threshold=threshold)
        return SquadMeasure(evaluation, pair_tokenizer).answers(reader).count("")

    assert count(-1e9) == 12 and count(1e9) == 0


def test_a_padded_side_changes_nothing(tmp_path, reader, pair_tokenizer):
    spec = write_squad(tmp_path / "dev.json", articles())
    evaluation = Evaluation("squad", spec, seq_len=48, batch_size=4)
    right = SquadMeasure(evaluation, pair_tokenizer).answers(reader)
    other = copy.deepcopy(pair_tokenizer)
    other.padding_side = "left"
    # absolute positions move with the padding, so only windows of one length are the same
    alone = Evaluation("squad", spec, seq_len=48, batch_size=1)
    assert SquadMeasure(alone, other).answers(reader) == right


def test_spans_are_short_and_forwards():
    spans = [None, *((i, i + 1) for i in range(40))]
    starts, ends = np.zeros(41), np.zeros(41)
    starts[1], ends[40] = 9, 9  # 40 tokens
    ends[5] = 8
    assert best_span(starts, ends, spans) == (17, (0, 5))
    starts, ends = np.full(41, -9.0), np.full(41, -9.0)
    starts[20], ends[3], ends[25] = 5, 5, 1
    assert best_span(starts, ends, spans) == (6, (19, 25))
    assert best_span(np.array([1.0]), np.array([1.0]), [None]) == (-np.inf, None)


@pytest.mark.parametrize("version", ["1.1", "v2.0"])
def test_the_hubs_records_are_the_same_questions(tmp_path, version):
    content = articles(version=version)
    one = read_squad(write_squad(tmp_path / "dev.json", content))
    other = read_squad(write_hub(tmp_path / "dev.jsonl", content))
    assert one.version == other.version == (2 if version == "v2.0" else 1)
    for a, b in zip(one.questions, other.questions, strict=True):
        assert (a.id, a.text, a.context, a.answers) == (b.id, b.text, b.context, b.answers)


def _without(content, field):
    found = json.loads(json.dumps(content))
    del found["data"][0]["paragraphs"][3]["qas"][0][field]
    return json.dumps(found)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("dev.json", "", "line 1: not valid JSON"),
        ("dev.json", json.dumps(articles())[:-40], "not valid JSON"),
        ("dev.json", '{"version": "1.1"}', "no list 'data' of articles (found version)"),
        ("dev.json", '{"data": []}', "no questions"),
        ("dev.json", _without(articles(), "question"), "question q3: field 'question' is None"),
        ("dev.json", _without(articles(), "answers"), "question q3: no list 'answers'"),
        (
            "dev.json",
            json.dumps(articles(version="v2.0") | {"version": "1.1"}),
            "question q0: has no answer, and the file says version 1.1",
        ),
        (
            "dev.json",
            json.dumps({"data": articles()["data"] * 2}),
            "question q0: id 'q0' is that of",
        ),
        ("dev.csv", "x", "cannot read a .csv file; give .json"),
        ("dev.jsonl", '{"id": "1", "question": "x"}', "line 1: no 'answers' with a list 'text'"),
        ("dev.jsonl", '{"id": "1"', "line 1: not valid JSON"),
    ],
)
def test_what_is_no_set_is_one_line(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        read_squad(str(tmp_path / name))
    assert says in str(caught.value)


def test_a_missing_file_is_no_hub_name(tmp_path):
    with pytest.raises(InputError, match=r"gone\.json: no such file or folder"):
        read_squad(str(tmp_path / "gone.json"))


def test_a_question_without_room_for_its_context_is_named(tmp_path, pair_tokenizer):
    content = articles()
    content["data"][0]["paragraphs"][2]["qas"][0]["question"] = "w1 " * 20
    spec = write_squad(tmp_path / "dev.json", content)
    with pytest.raises(InputError, match=r"question q2: its 20 tokens leave 7 of a window of 30"):
        SquadMeasure(Evaluation("squad", spec, seq_len=30), pair_tokenizer)
