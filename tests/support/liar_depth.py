"""Tiny random models of six layers, of the families whose configs are keyed by layers."""

from __future__ import annotations

import transformers
from liar_families import randomise

_BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
_WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}
MODELS = {
    "llama": ("LlamaForCausalLM", _BASE),
    "llama-tied": ("LlamaForCausalLM", _BASE | {"tie_word_embeddings": True}),
    "qwen3-windows": ("Qwen3ForCausalLM", _BASE | _WINDOW),
    # windows and rotations of two kinds
    "gemma3": ("Gemma3ForCausalLM", _BASE | {"sliding_window": 6, "sliding_window_pattern": 3}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64}
        | {"bos_token_id": 1, "eos_token_id": None},
    ),
    "opt": (
        "OPTForCausalLM",
        {k: v for k, v in _BASE.items() if k not in ("intermediate_size", "head_dim")}
        | {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1, "bos_token_id": 2},
    ),
    "smollm3": (
        "SmolLM3ForCausalLM",
        _BASE
        | {"use_sliding_window": True, "sliding_window": 6, "no_rope_layers": [1, 1, 0, 0, 1, 1]},
    ),
    "granite": (
        "GraniteForCausalLM",
        {k: v for k, v in _BASE.items() if k != "head_dim"}
        | {"residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    ),
    # heads are counted by its config, per layer where they differ
    "phi3": ("Phi3ForCausalLM", _BASE | {"sliding_window": 6}),
    # fused head by head; its head size is hidden size / heads
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {k: v for k, v in _BASE.items() if k not in ("num_key_value_heads", "head_dim")},
    ),
    # no adapter: the one list of as many layers
    "gptj": (
        "GPTJForCausalLM",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64}
        | {"rotary_dim": 4, "n_inner": 48, "bos_token_id": 1, "eos_token_id": None},
    ),
    "bert": ("BertForMaskedLM", {k: v for k, v in _BASE.items() if k != "head_dim"}),
}
# heads that cannot be pruned
BLOOM = (
    "BloomForCausalLM",
    {"vocab_size": 97, "hidden_size": 32, "n_layer": 6, "n_head": 4}
    | {"bos_token_id": 1, "eos_token_id": None},
)


def build(name):
    architecture, values = BLOOM if name == "bloom" else MODELS[name]
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**values)
    config.architectures = [architecture]
    return randomise(model_class(config))
