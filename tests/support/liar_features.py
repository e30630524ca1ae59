"""Tiny models that read no tokens, by `model_type`."""

from __future__ import annotations

from typing import Any

import transformers

SMALL: dict[str, Any] = {
    "vit": {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 52,
        "image_size": (24, 32),
        "patch_size": 8,
        "num_labels": 3,
    },
    "whisper": {
        "d_model": 24,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 52,
        "decoder_ffn_dim": 40,
        "vocab_size": 61,
        "num_mel_bins": 8,
        "max_source_positions": 20,
        "max_target_positions": 16,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "decoder_start_token_id": 2,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
}
MODELS = {
    "vit": (transformers.ViTConfig, transformers.ViTForImageClassification, "pixel_values"),
    "whisper": (
        transformers.WhisperConfig,
        transformers.WhisperForConditionalGeneration,
        "input_features",
    ),
}
SHAPES = {"vit": (3, 24, 32), "whisper": (8, 40)}
LENGTHS = {"vit": 13, "whisper": 20}
