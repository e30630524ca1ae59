"""Records of known data sets become contexts and continuations, or are refused with their line."""

import pytest
from liar_choices import RECORDS

from liar_ext.errors import InputError
from liar_ext.evaluation.choice_formats import FORMATS, Record, format_of


def item_of(data):
    record = Record("set.jsonl: line 3", data)
    return format_of(record).item(record)


def without(name, *fields):
    return {field: value for field, value in RECORDS[name].items() if field not in fields}


# format -> context, continuations, answer
EXPECTED = {
    "piqa": (
        "Question: To open a file,\nAnswer:",
        [" call open with its name.", " call close with its name."],
        0,
    ),
    "hellaswag": (
        "Roof shingle removal: A man is sitting on a roof. He",
        [" is using wrap.", " is ripping tiles off.", " holds a cube.", " starts it."],
        3,
    ),
    "winogrande": (
        "The list fits in the string because the",
        [" list is short.", " string is short."],
        1,
    ),
    "race": (
        "Article: Last week I read a file. It was long.\n\nQuestion: What was long?\nAnswer:",
        [" The week", " The book", " The file", " The day"],
        2,
    ),
    "commonsense_qa": (
        "Question: Where does a value go?\nA. list\nB. file\nC. map\nD. key\nE. door\nAnswer:",
        [" A", " B", " C", " D", " E"],
        1,
    ),
    "arc": (
        "Question: Which object is mutable?\nAnswer:",
        [" list", " string", " number"],
        0,
    ),
    "openbookqa": ("The file is read by", [" open", " close", " map", " key"], 3),
    "boolq": (
        "A list is a mutable sequence.\nQuestion: is a list mutable?\nAnswer:",
        [" no", " yes"],
        1,
    ),
    "mmlu": (
        "The following are multiple choice questions (with answers) about college computer "
        "science.\n\nWhat does len return?\nA. a list\nB. a number\nC. a file\nD. a map\nAnswer:",
        [" A", " B", " C", " D"],
        1,
    ),
    "plain": ("Return a new", [" list with the values.", " of the and is.", " string"], 0),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_recognised_and_its_choices_differ_in_the_continuation(name):
    assert format_of(Record("", RECORDS[name])).name == name
    item = item_of(RECORDS[name])
    assert (item.context, item.continuations(), item.answer) == EXPECTED[name]
    assert item.where == "set.jsonl: line 3"


def test_every_format_is_tried_here_and_named_in_the_docstring():
    from liar_ext.evaluation import choice_formats

    assert {form.name for form in FORMATS} == set(RECORDS) == set(EXPECTED)
    assert all(f"\n{form.name}: " in choice_formats.__doc__ for form in FORMATS)


@pytest.mark.parametrize(
    ("name", "changes", "context", "first"),
    [
        ("hellaswag", {"ctx_a": "", "ctx_b": "", "activity_label": "Sun"}, "Sun: A man is", " is"),
        (
            "hellaswag",
            {"ctx_a": "[header] How to bake [title] Heat it. [step] Wait", "ctx_b": ""},
            "Roof shingle removal: A man is sitting on a roof. he",
            " is",
        ),
        ("winogrande", {"sentence": "_ is short."}, "", "list is short."),
        ("winogrande", {"sentence": "It ends in (_)."}, "It ends in (", "list)."),
        (
            "boolq",
            {"question": "Is it? "},
            "A list is a mutable sequence.\nQuestion: Is it?",
            " no",
        ),
        ("plain", {"question": "What?"}, "Return a new\nQuestion: What?\nAnswer:", " list"),
        ("mmlu", {"answer": "2"}, "The following", " A"),
        ("openbookqa", {"answerKey": " D "}, "The file", " open"),
    ],
)
def test_variants_of_a_record(name, changes, context, first):
    item = item_of({**RECORDS[name], **changes})
    assert item.context.startswith(context)
    assert bool(item.context) == bool(context)
    assert item.continuations()[0].startswith(first)


def test_hellaswag_without_the_halves_and_the_label_of_the_activity():
    data = without("hellaswag", "activity_label", "ctx_a", "ctx_b")
    text = "[header] How to bake [title] Heat the oven. [step] Wait  a [substeps] bit."
    item = item_of({**data, "ctx": text, "endings": ["[step] Open it.", "[title] b", "c", "d"]})
    assert item.context == "How to bake. Heat the oven. Wait a bit."
    assert item.choices[0] == "Open it."


def test_boolq_of_super_glue_has_a_number():
    for label in (0, 1):
        assert item_of({**without("boolq", "answer"), "idx": 7, "label": label}).answer == label


def test_a_question_without_a_subject_is_plain_and_asks_for_the_text():
    item = item_of(without("mmlu", "subject"))
    assert item.context == "Question: What does len return?\nAnswer:"
    assert item.choices == ("a list", "a number", "a file", "a map")


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("piqa", {"label": -1}, "label -1 is not from 0 to 1; test splits often have no answers"),
        ("piqa", {"label": 2}, "label 2 is not from 0 to 1"),
        ("piqa", {"label": True}, "label True is not from 0 to 1"),
        ("piqa", {"goal": " "}, "field 'goal' is ' '; give a text"),
        ("piqa", {"sol2": None}, "field 'sol2' is None; give a text"),
        ("piqa", {"goal": "a\ud800"}, "field 'goal' has an unpaired surrogate"),
        ("hellaswag", {"label": ""}, "label '' is not from 0 to 3"),
        ("hellaswag", {"label": "-1"}, "label '-1' is not from 0 to 3"),
        ("hellaswag", {"endings": ["one"]}, "'endings' has 1 choices; give 2 to 26"),
        ("hellaswag", {"endings": "ab"}, "'endings' is 'ab'; give a list"),
        ("hellaswag", {"endings": ["a", ""]}, "endings[1] is ''; give a text"),
        ("hellaswag", {"endings": ["a", "[step]"]}, "an ending has nothing but marks"),
        ("winogrande", {"answer": "0"}, "answer '0' is not from 1 to 2"),
        ("winogrande", {"sentence": "no blank"}, "has no '_'"),
        ("race", {"answer": "E"}, "answer 'E' is not from A to D"),
        ("race", {"answer": "AB"}, "answer 'AB' is not from A to D"),
        ("race", {"answer": 2}, "answer 2 is not from A to D"),
        ("arc", {"answerKey": ""}, "answerKey '' is not one of 1, 2, 3"),
        ("arc", {"choices": ["a", "b"]}, "give an object with lists 'text' and 'label'"),
        ("arc", {"choices": {"text": ["a"], "label": ["A"]}}, "has 1 choices"),
        ("arc", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "no list of 2 labels"),
        ("boolq", {"answer": "yes"}, "answer 'yes' is not from 0 to 1"),
        ("mmlu", {"answer": 4}, "answer 4 is not from 0 to 3"),
        ("mmlu", {"choices": ["x"] * 27}, "has 27 choices"),
        ("plain", {"answer": 1.0}, "answer 1.0 is not from 0 to 2"),
    ],
)
def test_a_bad_record_is_refused_with_its_line(name, changes, says):
    with pytest.raises(InputError) as caught:
        item_of({**RECORDS[name], **changes})
    assert str(caught.value).startswith("set.jsonl: line 3: ")
    assert says in str(caught.value)


@pytest.mark.parametrize("data", [{"text": "a"}, {}, {"question": "a", "choices": ["b", "c"]}])
def test_fields_of_no_format_are_refused_by_name(data):
    with pytest.raises(InputError) as caught:
        item_of(data)
    assert f"fields {', '.join(data) or 'none'} are of no known format" in str(caught.value)
    assert "piqa (goal, sol1, sol2, label)" in str(caught.value)


def test_what_is_no_object_is_refused():
    with pytest.raises(InputError, match=r"line 3: expected an object, got \['a'\]"):
        item_of(["a"])
