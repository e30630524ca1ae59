"""Tiny random models of every family, and folders and token files to compress them with.

Weights are large enough (std 0.2) that logits differ between tokens, and biases and norm weights
are random as well: what a round trip loses shows in the outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from liar_ext import Recipe
from liar_ext.calibration import Batch, make_batches, read
from liar_ext.calibration.pairs import pair_batches
from liar_ext.models import ADAPTERS

VOCABULARY = 97
LAYERS = 2
LENGTH = 24


@dataclass(frozen=True)
class Family:
    """Attributes:
    build: () -> the dense model, random but the same each time.
    auto: the Auto class that a user would load it with.
    decoder: it generates.
    kinds: of its Sites.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    auto: Any
    decoder: bool
    kinds: tuple[str, ...] = ("heads", "ffn")


@contextmanager
def without_adapters(*model_types: str) -> Iterator[None]:
    """As if nobody had written these; the registry is in its own order again afterwards."""
    known = dict(ADAPTERS)
    for model_type in model_types:
        ADAPTERS.pop(model_type, None)
    try:
        yield
    finally:
        ADAPTERS.clear()
        ADAPTERS.update(known)


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Random parameters: matrices and biases N(0, 0.2²), norm weights N(1, 0.2²)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parent = model.get_submodule(name.rpartition(".")[0])
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in type(parent).__name__.lower() and name.endswith("weight")
            parameter.copy_(1 + noise if is_norm else noise)
    return model.eval()


def _family(
    name: str,
    architecture: str,
    auto: Any,
    decoder: bool,
    base: dict[str, Any],
    *,
    kinds: tuple[str, ...] = ("heads", "ffn"),
    **changes: Any,
) -> Family:
    def build() -> PreTrainedModel:
        model_class = getattr(transformers, architecture)
        config = model_class.config_class(**{**base, **changes})
        config.architectures = [architecture]
        return randomise(model_class(config))

    return Family(name, build, auto, decoder, kinds)


_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GQA = {**_LLAMA, "num_attention_heads": 8, "num_key_value_heads": 4}
_MIXED = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": None,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_PLAIN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
_PLAIN_GQA = {**_PLAIN, "num_attention_heads": 8, "num_key_value_heads": 4}
_WORDS = {**_ENCODER, "pad_token_id": 1}
_FALCON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_kv_heads": 4,
    "new_decoder_architecture": True,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GPTJ = {**_GPT2, "rotary_dim": 4, "n_inner": 48}
_BLOOM = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    # the deeper one: transformers 5.23 makes a cache of as many layers as the encoder has
    "num_layers": LAYERS + 1,
    "num_decoder_layers": LAYERS,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_CAUSAL = transformers.AutoModelForCausalLM
_MASKED = transformers.AutoModelForMaskedLM


_MODERNBERT = {
    **_WORDS,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "cls_token_id": 0,
    "sep_token_id": 2,
    "local_attention": 8,
    "layer_types": ["full_attention", "sliding_attention"],
}
_GEMMA = {**_PLAIN_GQA, "head_dim": 12, "pad_token_id": 0}
# 32 is no multiple of 12; scores and logits are bounded where they are large enough to show
_GEMMA2 = {
    **_GEMMA,
    **_MIXED,
    "query_pre_attn_scalar": 12,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 2.0,
}
_GEMMA3 = {**_GEMMA, **_MIXED, "query_pre_attn_scalar": 12}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}
_BIASES = {"attention_bias": True, "mlp_bias": True}


def _vision(name: str) -> Any:
    return getattr(transformers, name)(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )


def _gemma3_nested() -> PreTrainedModel:
    config = transformers.Gemma3Config(
        vision_config=_vision("SiglipVisionConfig").to_dict(),
        text_config=transformers.Gemma3TextConfig(**_GEMMA3),
        image_token_index=VOCABULARY - 1,
        mm_tokens_per_image=4,
    )
    config.architectures = ["Gemma3ForConditionalGeneration"]
    return randomise(transformers.Gemma3ForConditionalGeneration(config))


def _llava() -> PreTrainedModel:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**_GQA),
        image_token_id=VOCABULARY - 1,
        vision_feature_layer=-1,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    return randomise(transformers.LlavaForConditionalGeneration(config))


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _family("llama-mha", "LlamaForCausalLM", _CAUSAL, True, _LLAMA),
        _family(
            "llama-gqa-biases",
            "LlamaForCausalLM",
            _CAUSAL,
            True,
            _GQA,
            attention_bias=True,
            mlp_bias=True,
        ),
        _family("llama-tied", "LlamaForCausalLM", _CAUSAL, True, _LLAMA, tie_word_embeddings=True),
        # 32 is no multiple of 3: LlamaConfig rejects what MistralConfig accepts
        _family("llama-head-dim", "LlamaForCausalLM", _CAUSAL, True, _LLAMA, head_dim=12),
        _family("mistral-gqa", "MistralForCausalLM", _CAUSAL, True, _GQA, sliding_window=None),
        _family("mistral-sliding", "MistralForCausalLM", _CAUSAL, True, _GQA, sliding_window=8),
        _family("qwen2", "Qwen2ForCausalLM", _CAUSAL, True, _GQA),
        _family(
            "qwen2-mixed",
            "Qwen2ForCausalLM",
            _CAUSAL,
            True,
            _GQA,
            use_sliding_window=True,
            **_MIXED,
        ),
        _family("qwen3", "Qwen3ForCausalLM", _CAUSAL, True, _GQA, head_dim=12),
        _family(
            "qwen3-mixed",
            "Qwen3ForCausalLM",
            _CAUSAL,
            True,
            _GQA,
            head_dim=12,
            use_sliding_window=True,
            **_MIXED,
        ),
        _family("opt", "OPTForCausalLM", _CAUSAL, True, _OPT),
        # as OPT-350m: other width of the embeddings, no final norm
        _family(
            "opt-post-norm",
            "OPTForCausalLM",
            _CAUSAL,
            True,
            _OPT,
            do_layer_norm_before=False,
            word_embed_proj_dim=16,
        ),
        _family("gpt2", "GPT2LMHeadModel", _CAUSAL, True, _GPT2),
        _family("bert", "BertModel", transformers.AutoModel, False, _ENCODER),
        _family(
            "bert-classifier",
            "BertForSequenceClassification",
            transformers.AutoModelForSequenceClassification,
            False,
            _ENCODER,
            num_labels=3,
        ),
        _family(
            "roberta",
            "RobertaForMaskedLM",
            transformers.AutoModelForMaskedLM,
            False,
            _ENCODER,
            pad_token_id=1,
            max_position_embeddings=66,
        ),
        _family(
            "distilbert",
            "DistilBertForMaskedLM",
            transformers.AutoModelForMaskedLM,
            False,
            {
                "vocab_size": VOCABULARY,
                "dim": 32,
                "hidden_dim": 48,
                "n_layers": LAYERS,
                "n_heads": 4,
                "max_position_embeddings": 64,
            },
        ),
        Family("llava", _llava, transformers.AutoModelForImageTextToText, True),
        _family("gemma", "GemmaForCausalLM", _CAUSAL, True, _GEMMA),
        _family("gemma2-mixed", "Gemma2ForCausalLM", _CAUSAL, True, _GEMMA2),
        _family("gemma3-mixed", "Gemma3ForCausalLM", _CAUSAL, True, _GEMMA3, attention_bias=True),
        Family(
            "gemma3-nested-mixed", _gemma3_nested, transformers.AutoModelForImageTextToText, True
        ),
        _family("phi3", "Phi3ForCausalLM", _CAUSAL, True, _PLAIN_GQA, sliding_window=8),
        # as this package writes it, with a head size
        _family("phi3-head-dim", "Phi3ForCausalLM", _CAUSAL, True, _PLAIN_GQA, head_dim=12),
        _family("granite", "GraniteForCausalLM", _CAUSAL, True, _PLAIN_GQA, **_MULTIPLIERS),
        _family(
            "smollm3-mixed",
            "SmolLM3ForCausalLM",
            _CAUSAL,
            True,
            _PLAIN_GQA,
            use_sliding_window=True,
            no_rope_layers=[1, 0],
            **_MIXED,
            **_BIASES,
        ),
        _family("olmo2", "Olmo2ForCausalLM", _CAUSAL, True, _PLAIN_GQA, kinds=("ffn",)),
        _family("gpt_neox", "GPTNeoXForCausalLM", _CAUSAL, True, _PLAIN),
        _family(
            "gpt_neox-sequential",
            "GPTNeoXForCausalLM",
            _CAUSAL,
            True,
            _PLAIN,
            use_parallel_residual=False,
            attention_bias=False,
        ),
        _family("falcon", "FalconForCausalLM", _CAUSAL, True, _FALCON),
        # as Falcon-11B, and as Falcon-RW, but for its ALiBi
        _family(
            "falcon-one-norm",
            "FalconForCausalLM",
            _CAUSAL,
            True,
            _FALCON,
            num_ln_in_parallel_attn=1,
        ),
        _family(
            "falcon-sequential",
            "FalconForCausalLM",
            _CAUSAL,
            True,
            _FALCON,
            num_attention_heads=4,
            new_decoder_architecture=False,
            multi_query=False,
            parallel_attn=False,
            bias=True,
        ),
        # as Falcon-7B
        _family(
            "falcon-multi-query",
            "FalconForCausalLM",
            _CAUSAL,
            True,
            _FALCON,
            new_decoder_architecture=False,
            kinds=("ffn",),
        ),
        _family(
            "falcon-alibi", "FalconForCausalLM", _CAUSAL, True, _FALCON, alibi=True, kinds=("ffn",)
        ),
        _family("bloom", "BloomForCausalLM", _CAUSAL, True, _BLOOM, kinds=("ffn",)),
        _family(
            "xlm-roberta",
            "XLMRobertaForMaskedLM",
            _MASKED,
            False,
            _WORDS,
            max_position_embeddings=66,
        ),
        _family(
            "camembert", "CamembertForMaskedLM", _MASKED, False, _WORDS, max_position_embeddings=66
        ),
        _family("electra", "ElectraForMaskedLM", _MASKED, False, _ENCODER, embedding_size=16),
        _family(
            "t5-encoder",
            "T5EncoderModel",
            transformers.AutoModelForTextEncoding,
            False,
            _T5,
            kinds=("ffn",),
            num_layers=LAYERS,
        ),
        _family("modernbert-mixed", "ModernBertForMaskedLM", _MASKED, False, _MODERNBERT),
        _family(
            "modernbert-biases-mixed",
            "ModernBertForMaskedLM",
            _MASKED,
            False,
            _MODERNBERT,
            norm_bias=True,
            **_BIASES,
        ),
    )
}


def _untied() -> PreTrainedModel:
    """As T5 1.1, whose files have an output embedding of its own and whose config ties it."""
    model = PAIRED["t5-gated"].build()
    noise = torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(5))
    model.lm_head.weight = torch.nn.Parameter(0.2 * noise)
    return model


_SEQ2SEQ = transformers.AutoModelForSeq2SeqLM
# with an encoder and a decoder
PAIRED: dict[str, Family] = {
    family.name: family
    for family in (
        _family("t5", "T5ForConditionalGeneration", _SEQ2SEQ, True, _T5, kinds=("ffn",)),
        _family(
            "t5-gated",
            "T5ForConditionalGeneration",
            _SEQ2SEQ,
            True,
            _T5,
            kinds=("ffn",),
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
        Family("t5-untied", _untied, _SEQ2SEQ, True, ("ffn",)),
        _family("mt5", "MT5ForConditionalGeneration", _SEQ2SEQ, True, _T5, kinds=("ffn",)),
    )
}


# traced, those above as if they had no adapter, by model type: for `--trace`
UNLISTED: dict[str, Family] = {
    family.name.removesuffix("-mixed"): family
    for family in (
        *(
            FAMILIES[n]
            for n in ("gpt_neox", "falcon", "electra", "xlm-roberta", "modernbert-mixed")
        ),
        # only their FFN can be pruned
        *(FAMILIES[n] for n in ("olmo2", "bloom")),
        _family("mpnet", "MPNetForMaskedLM", _MASKED, False, _WORDS),
        _family("phi", "PhiForCausalLM", _CAUSAL, True, _PLAIN),
        _family("stablelm", "StableLmForCausalLM", _CAUSAL, True, _PLAIN_GQA),
        _family("starcoder2", "Starcoder2ForCausalLM", _CAUSAL, True, _PLAIN_GQA),
        _family("olmo", "OlmoForCausalLM", _CAUSAL, True, _PLAIN_GQA),
        _family("cohere", "CohereForCausalLM", _CAUSAL, True, _PLAIN_GQA),
        _family("glm", "GlmForCausalLM", _CAUSAL, True, _PLAIN_GQA, head_dim=8),
        _family("gptj", "GPTJForCausalLM", _CAUSAL, True, _GPTJ),
    )
}
WITHOUT_HEADS = ("olmo2", "bloom", "mpnet")


def write_tokens(path: Path, *, samples: int = 24, length: int = LENGTH, seed: int = 1) -> Path:
    """A token file of `samples` windows, as `--calibration` takes it."""
    # the last id is the image token of the nested model, 0 and 1 are special
    ids = np.random.default_rng(seed).integers(3, VOCABULARY - 1, (samples, length))
    np.save(path, ids)
    return path


def batches_of(recipe: Recipe, *, decoder: bool) -> tuple[Batch, ...]:
    """What `compress` calibrates on under this recipe, for `prune`."""
    assert recipe.calibration is not None
    return make_batches(
        read(recipe.calibration),
        None,
        packed=decoder,
        samples=recipe.samples,
        seq_len=recipe.seq_len,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        vocab_size=VOCABULARY,
    ).batches


def pairs_of(recipe: Recipe) -> tuple[Batch, ...]:
    """The same for an encoder-decoder."""
    assert recipe.calibration is not None
    return pair_batches(
        read(recipe.calibration),
        None,
        samples=recipe.samples,
        seq_len=recipe.seq_len,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        vocab_size=VOCABULARY,
        start=0,
    ).batches


def probe_tokens(batch: int = 3, length: int = LENGTH) -> Tensor:
    """Token ids (batch, length) that no calibration has seen."""
    generator = torch.Generator().manual_seed(99)
    return torch.randint(3, VOCABULARY - 1, (batch, length), generator=generator)


@torch.no_grad()
def outputs(model: PreTrainedModel, ids: Tensor | None = None, **inputs: Tensor) -> Tensor:
    """Logits, or last hidden states of a headless model, in float32."""
    ids = probe_tokens() if ids is None else ids
    if model.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = ids[:, 5:12]
    result = model(input_ids=ids, **inputs)
    found = result.logits if "logits" in result else result.last_hidden_state
    return found.float()


def tree_hash(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, hidden ones included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
