"""Train a small T5 on WikiText-2, to see `liar prune` and `liar eval --pairs` at work on it.

    python examples/encoder_decoder.py --data DIR --out t5      # about ten minutes of one core

DIR has `wikitext2/valid.txt` and `wikitext2/test.txt`. The task is T5's own (Raffel et al. 2020,
section 3.1.4): words of a sentence are missing, and the model writes them. Written are

    t5/model            3 + 3 layers, 128 wide, FFN of 512; a byte-level tokenizer of 4,096 tokens
    t5/train.jsonl      pairs of the validation text, {"source", "target"}: for training, and for
                        calibration
    t5/test.jsonl       pairs of the test text

Then, for example:

    liar prune t5/model --out small --target ffn --sparsity 0.5 --calibration t5/train.jsonl
    liar eval small --pairs t5/test.jsonl --dense t5/model

Data, seeds and figures depend on nothing but the files and the versions of torch, transformers and
tokenizers.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    get_linear_schedule_with_warmup,
)

MISSING = tuple(f"<extra_id_{number}>" for number in range(12))
# of the words of a sentence, and words that are missing together, as T5 has it
SHARE, SPAN = 0.15, 3
WORDS = (8, 60)
SEQ_LEN = 96


def sentences(path: Path) -> list[list[str]]:
    """Words of each sentence that is neither very short nor very long."""
    lines = path.read_text(encoding="utf-8").split("\n")
    found = [
        part.split() for line in lines if not line.startswith(" =") for part in line.split(" . ")
    ]
    return [words for words in found if WORDS[0] <= len(words) <= WORDS[1]]


def gaps(words: list[str], generator: random.Random) -> tuple[str, str]:
    """A sentence with runs of words missing, and these runs."""
    count = max(1, round(SHARE * len(words) / SPAN))
    starts = sorted(generator.sample(range(0, len(words) - SPAN + 1, SPAN), count))
    source, target, place = [], [], 0
    for sign, start in zip(MISSING, starts, strict=False):
        source += [*words[place:start], sign]
        target += [sign, *words[start : start + SPAN]]
        place = start + SPAN
    return " ".join([*source, *words[place:]]), " ".join(target)


def write(path: Path, pairs: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"source": source, "target": target}) for source, target in pairs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>", *MISSING]
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=list(MISSING),
        model_max_length=512,
    )


def train(
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[list[str]],
    steps: int,
    batch_size: int,
) -> None:
    """AdamW on gaps that are drawn anew each time."""
    generator = random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    options = {"padding": True, "truncation": True, "max_length": SEQ_LEN, "return_tensors": "pt"}
    model.train()
    mean, start = 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        drawn = [gaps(generator.choice(texts), generator) for _ in range(batch_size)]
        inputs = tokenizer([source for source, _ in drawn], **options)
        labels = tokenizer([target for _, target in drawn], **options)
        wanted = labels.input_ids.masked_fill(labels.attention_mask == 0, -100)
        loss = model(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=wanted
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean = loss.item() if step == 1 else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step}: loss {mean:.3f}, {seconds:.0f} s", file=sys.stderr)
    model.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    texts, held_out = (
        sentences(arguments.data / "wikitext2" / f"{name}.txt") for name in ("valid", "test")
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    write(arguments.out / "train.jsonl", [gaps(words, generator) for words in texts])
    write(arguments.out / "test.jsonl", [gaps(words, generator) for words in held_out])
    tokenizer = tokenizer_of([" ".join(words) for words in texts])
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    train(model, tokenizer, texts, arguments.steps, arguments.batch_size)
    model.save_pretrained(arguments.out / "model")
    tokenizer.save_pretrained(arguments.out / "model")
    print(f"{arguments.out}: {len(texts)} pairs to train on, {len(held_out)} to test")
    return 0


if __name__ == "__main__":
    sys.exit(main())
