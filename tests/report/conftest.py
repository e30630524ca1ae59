"""A synthetic report, so that these tests need no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from liar_ext.recipe import Recipe
from liar_ext.report import Report, SiteReport

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "intermediate_size": 70}
PER_LAYER = {
    "model_type": "liar_ext",
    "architectures": ["LlamaForCausalLM"],
    "liar_ext": {"version": 1, "base_model_type": "llama", "layers": [], "added_biases": []},
}


@pytest.fixture(scope="session")
def make_report() -> Callable[..., Report]:
    """`make_report(source=..., layout=..., ...)` with any field replaced."""

    def make(**changes: Any) -> Report:
        sites = [_site(layer, kind) for layer in range(3) for kind in ("heads", "ffn")]
        values: dict[str, Any] = {
            "source": "meta-llama/Llama-2-7b-hf",
            "recipe": Recipe(sparsity=0.3, target=("ffn", "heads"), calibration="c4.txt").to_json(),
            "sites": sites,
            "totals": {
                "parameters_before": 1_000_000,
                "parameters_after": 760_000,
                "site_parameters_before": 800_000,
                "site_parameters_after": 560_000,
                "bytes_before": 2_000_000,
                "bytes_after": 1_520_000,
                "sparsity_asked": 0.3,
                "sparsity": 0.2987,
            },
            "seconds": {
                "load": 1.0,
                "forward": 8.0,
                "gram": 4.0,
                "solve": 2.0,
                "write": 0.5,
                "total": 16.0,
            },
            "calibration": {
                "source": "/home/ada/c4.txt",
                "sha256": "ab" * 32,
                "seed": 7,
                "seq_len": 2048,
                "samples": 128,
                "tokens": 262_144,
                "sample_ids": list(range(128)),
            },
            "environment": {
                "liar_ext": "0.1.0",
                "torch": "2.13.0",
                "triton": None,
                "device": "NVIDIA H200",
            },
            "layout": "stock",
            "config": LLAMA,
        }
        values |= changes
        if values["layout"] == "liar_ext" and "config" not in changes:
            values["config"] = PER_LAYER
        return Report(**values)

    return make


def _site(layer: int, kind: str) -> SiteReport:
    before, after, width = (100, 70, 1) if kind == "ffn" else (8, 6, 16)
    return SiteReport(
        layer=layer,
        kind=kind,
        name=f"model.layers.{layer}.{kind}",
        units_before=before,
        units_after=after,
        columns_before=before * width,
        columns_after=after * width,
        bias_added=False,
        relative_residual=0.01 * (layer + 1),
        ridge=1e-4,
        ridge_used=1e-4,
        condition=1e3,
        backward_error=1e-16,
        dead_columns=0,
        precision="float64",
        seconds={"gram": 0.5, "solve": 0.25},
    )


@pytest.fixture(scope="session")
def inputs_of_encoder(tmp_path_factory):
    """A tiny BERT with a tokenizer, and a file of sentences."""
    root = tmp_path_factory.mktemp("encoder")
    words = [f"word{i}" for i in range(40)]
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator([words], trainers.WordLevelTrainer(special_tokens=special))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(root / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer.get_vocab()), **sizes)).save_pretrained(
        root / "bert"
    )
    picks = torch.randint(40, (60, 8), generator=torch.Generator().manual_seed(1))
    lines = [" ".join(words[i] for i in row) for row in picks.tolist()]
    (root / "sentences.txt").write_text("\n".join(lines))
    return root / "bert", root / "sentences.txt"
