"""Make multiple-choice questions of a text: which of four continuations is a paragraph's own?

    python examples/continuations.py heldout.txt questions.jsonl
    liar eval models/llama --choices questions.jsonl

For models or languages that no data set fits, and offline. Each paragraph of 20 to 60 words becomes
a question: its first two thirds are the context, the rest and the ends of three other paragraphs
the choices. The same text and seed give the same file, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

CHOICES = 4
WORDS = range(20, 61)


def questions(text: str, seed: int = 0) -> list[dict[str, object]]:
    """Records `context`, `choices`, `answer`, as `liar eval --choices` reads them.

    Raises:
        ValueError: the text has fewer than four different endings.
    """
    draw = random.Random(seed)
    halves = []
    # what separates documents in the demo's texts is no word
    for paragraph in re.split(r"\n\s*\n|<\|endoftext\|>", text):
        words = paragraph.split()
        if len(words) in WORDS:
            cut = len(words) * 2 // 3
            halves.append((" ".join(words[:cut]), " ".join(words[cut:])))
    endings = sorted({ending for _, ending in halves})
    if len(endings) < CHOICES:
        raise ValueError(f"{len(endings)} different endings; give a longer text")
    found: list[dict[str, object]] = []
    for context, ending in halves:
        others = [other for other in draw.sample(endings, CHOICES) if other != ending]
        choices = [ending, *others[: CHOICES - 1]]
        draw.shuffle(choices)
        found.append({"context": context, "choices": choices, "answer": choices.index(ending)})
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    found = questions(arguments.text.read_text(encoding="utf-8"), arguments.seed)
    lines = (json.dumps(question) + "\n" for question in found)
    arguments.out.write_text("".join(lines), encoding="utf-8")
    print(f"{len(found)} questions: {arguments.out}")


if __name__ == "__main__":
    main()
