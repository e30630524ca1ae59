"""Checkpoints of families without an adapter: what they hold that no listed family's does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from liar_families import outputs, randomise, write_tokens
from transformers import PretrainedConfig, PreTrainedModel

import liar_ext
from liar_ext import Recipe

SMALL = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def _dense(folder: Path, auto: Any, config: PretrainedConfig) -> PreTrainedModel:
    model = randomise(auto.from_config(config))
    model.save_pretrained(folder)
    return model


def _recipe(folder: Path, **changes: Any) -> Recipe:
    tokens = str(write_tokens(folder / "tokens.npy", samples=8, length=16))
    base = {"calibration": tokens, "sparsity": 0.5, "samples": 8, "seq_len": 16, "batch_size": 8}
    return Recipe(**{**base, **changes})


def test_a_config_need_not_say_whether_embeddings_are_tied(tmp_path):
    config = transformers.SplinterConfig(**SMALL)
    assert not hasattr(config, "tie_word_embeddings"), "else this shows nothing"
    _dense(tmp_path / "dense", transformers.AutoModel, config)
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", _recipe(tmp_path), trace=True)
    assert [s.units_after for s in report.sites] == [12, 12]
    small = transformers.AutoModel.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(outputs(small), outputs(liar_ext.load(tmp_path / "small")))
