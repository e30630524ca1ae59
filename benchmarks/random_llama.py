"""A LLaMA of random weights and a file of random tokens: an end-to-end measurement offline.

    python benchmarks/random_llama.py FOLDER [--hidden 4096] [--ffn 11008] [--layers 4]

Writes `FOLDER/model` and `FOLDER/tokens.npy`. Time and memory of a compression do not depend on
what the weights are; quality does, so this model says nothing about it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HEAD = 128


def make(
    folder: Path,
    *,
    hidden: int,
    ffn: int,
    layers: int,
    vocabulary: int,
    tokens: int,
    dtype: torch.dtype,
    shard: str = "500MB",
    key_value_heads: int | None = None,
) -> Path:
    """The model's folder. Hidden sizes are multiples of `HEAD` unless smaller."""
    torch.manual_seed(0)
    head = min(HEAD, hidden)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=hidden // head,
        num_key_value_heads=key_value_heads or hidden // head,
        head_dim=head,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    # made where it is fast: random numbers for a billion weights take a CPU half a minute
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model", max_shard_size=shard)
    stream = np.random.default_rng(0).integers(0, vocabulary, tokens, dtype=np.int64)
    np.save(folder / "tokens.npy", stream)
    return folder / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--key-value-heads", type=int)
    parser.add_argument("--shard", default="500MB", help="largest weight file")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    options = vars(arguments)
    folder = options.pop("folder")
    folder.mkdir(parents=True, exist_ok=True)
    print(make(folder, **options | {"dtype": getattr(torch, arguments.dtype)}))


if __name__ == "__main__":
    main()
