"""A tiny checkpoint with a tokenizer and texts, to run the command line on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = "the a list dict returns value of object string new with and is to key map file open"


@dataclass(frozen=True)
class Inputs:
    """Attributes: `llama` and `bert` folders, `text` and `other` for decoders, `stsb` CSV."""

    llama: Path
    bert: Path
    text: Path
    other: Path
    stsb: Path


def _sentences(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    words = WORDS.split()
    picks = torch.randint(len(words), (count, 12), generator=generator)
    return [" ".join(words[i] for i in row) for row in picks.tolist()]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    root = tmp_path_factory.mktemp("inputs")
    made = Inputs(*(root / n for n in ("llama", "bert", "text.txt", "other.txt", "stsb.csv")))
    made.text.write_text("\n".join(_sentences(300, 1)))
    made.other.write_text("\n".join(_sentences(100, 2)))
    pairs = _sentences(60, 3)
    rows = [
        f"{a},{b},{i % 6}.0" for i, (a, b) in enumerate(zip(pairs[::2], pairs[1::2], strict=True))
    ]
    made.stsb.write_text("\n".join(rows) + "\n")
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator([WORDS], trainers.WordLevelTrainer(special_tokens=special))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    torch.manual_seed(0)
    sizes = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes)).save_pretrained(made.llama)
    BertModel(BertConfig(**sizes)).save_pretrained(made.bert)
    for folder in (made.llama, made.bert):
        fast.save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["model_type"] in ("llama", "bert")
    return made
