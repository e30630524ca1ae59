"""Multiple-choice records as the data sets on the hub have them, and files of them."""

from __future__ import annotations

import json
from pathlib import Path

import liar_ext.demo

DEMO = Path(liar_ext.demo.__file__).parent / "model"

# one record of each format, with all fields of its data set
RECORDS = {
    "piqa": {
        "goal": "To open a file,",
        "sol1": "call open with its name.",
        "sol2": "call close with its name.",
        "label": 0,
    },
    "hellaswag": {
        "ind": 24,
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "ctx": "A man is sitting on a roof. he",
        "endings": ["is using wrap.", "is ripping tiles off.", "holds a cube.", "starts it."],
        "source_id": "activitynet~v_-JhWjGDPHMY",
        "split": "val",
        "split_type": "indomain",
        "label": "3",
    },
    "winogrande": {
        "sentence": "The list fits in the string because the _ is short.",
        "option1": "list",
        "option2": "string",
        "answer": "2",
    },
    "race": {
        "example_id": "high19432.txt",
        "article": "Last week I read a file. It was long.",
        "answer": "C",
        "question": "What was long?",
        "options": ["The week", "The book", "The file", "The day"],
    },
    "commonsense_qa": {
        "id": "1afa02df02c908a558b4036e80242fac",
        "question": "Where does a value go?",
        "question_concept": "value",
        "choices": {
            "label": ["A", "B", "C", "D", "E"],
            "text": ["list", "file", "map", "key", "door"],
        },
        "answerKey": "B",
    },
    "arc": {
        "id": "MCAS_2000_4_6",
        "question": "Which object is mutable?",
        "choices": {"text": ["list", "string", "number"], "label": ["1", "2", "3"]},
        "answerKey": "1",
    },
    "openbookqa": {
        "id": "7-980",
        "question_stem": "The file is read by",
        "choices": {"text": ["open", "close", "map", "key"], "label": ["A", "B", "C", "D"]},
        "answerKey": "D",
    },
    "boolq": {
        "question": "is a list mutable",
        "answer": True,
        "passage": "A list is a mutable sequence.",
    },
    "mmlu": {
        "question": "What does len return?",
        "subject": "college_computer_science",
        "choices": ["a list", "a number", "a file", "a map"],
        "answer": 1,
    },
    "plain": {
        "context": "Return a new",
        "choices": ["list with the values.", "of the and is.", "string"],
        "answer": 0,
    },
}


def write_jsonl(path: Path, *records: object) -> str:
    """A file of one record a line; gives its name back, for command lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)
