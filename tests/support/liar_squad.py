"""Questions in SQuAD's file format, of words that the tests' tokenizer knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def articles(version: str = "1.1") -> dict[str, Any]:
    """A file's content: 12 questions; every third has no answer in version 2.0."""
    generator = np.random.default_rng(0)
    paragraphs = []
    for number in range(12):
        words = [f"w{i}" for i in generator.integers(0, 90, generator.integers(8, 60))]
        context, start = " ".join(words), int(generator.integers(len(words) - 3))
        answer = " ".join(words[start : start + 3])
        offset = len(" ".join(words[:start])) + (start > 0)
        qa: dict[str, Any] = {"id": f"q{number}", "question": f"w{number} w1"}
        if version == "v2.0" and number % 3 == 0:
            plausible = [{"text": answer, "answer_start": offset}]
            qa |= {"is_impossible": True, "answers": [], "plausible_answers": plausible}
        else:
            qa["answers"] = [
                {"text": answer, "answer_start": offset},
                {"text": words[start], "answer_start": offset},
            ]
            if version == "v2.0":
                qa["is_impossible"] = False
        paragraphs.append({"context": context, "qas": [qa]})
    return {"version": version, "data": [{"title": "Words", "paragraphs": paragraphs}]}


def write_squad(path: Path, content: dict[str, Any]) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def write_hub(path: Path, content: dict[str, Any]) -> str:
    """The same as the hub's records."""
    lines = []
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = {
                    "text": [a["text"] for a in qa["answers"]],
                    "answer_start": [a["answer_start"] for a in qa["answers"]],
                }
                record = {"id": qa["id"], "title": article["title"], "question": qa["question"]}
                record |= {"context": paragraph["context"], "answers": answers}
                lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")
    return str(path)
