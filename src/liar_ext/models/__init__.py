"""The model families this package prunes, by `config.model_type`.

To add one: a file beside this with an `Adapter`, a line in `ADAPTERS`, and a tiny config in
`tests/support/liar_families.py`; the round-trip tests run on it by themselves.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from liar_ext.errors import InputError, UnsupportedModelError
from liar_ext.models.adapter import Adapter, text_config
from liar_ext.models.bert import BERT
from liar_ext.models.bloom import BLOOM
from liar_ext.models.distilbert import DISTILBERT
from liar_ext.models.electra import ELECTRA
from liar_ext.models.falcon import FALCON
from liar_ext.models.gemma import GEMMA, GEMMA2, GEMMA3
from liar_ext.models.gpt2 import GPT2
from liar_ext.models.gpt_neox import GPT_NEOX
from liar_ext.models.granite import GRANITE
from liar_ext.models.llama import LLAMA
from liar_ext.models.mistral import MISTRAL
from liar_ext.models.modernbert import MODERNBERT
from liar_ext.models.olmo2 import OLMO2
from liar_ext.models.opt import OPT
from liar_ext.models.phi3 import PHI3
from liar_ext.models.qwen2 import QWEN2
from liar_ext.models.qwen3 import QWEN3
from liar_ext.models.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA
from liar_ext.models.site import Producer, Site, SiteSpec
from liar_ext.models.smollm3 import SMOLLM3
from liar_ext.models.t5 import MT5, T5
from liar_ext.models.traced import traced_family
from liar_ext.models.vit import VIT
from liar_ext.models.whisper import WHISPER

ADAPTERS: dict[str, Adapter] = {
    adapter.model_type: adapter
    for adapter in (
        *(LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, GRANITE, SMOLLM3, OLMO2),
        *(GPT_NEOX, FALCON, BLOOM, OPT, GPT2),
        *(BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, ELECTRA, DISTILBERT, MODERNBERT),
        *(T5, MT5),
        *(VIT, WHISPER),
    )
}
EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def adapter_for(config: PretrainedConfig) -> Adapter:
    """The Adapter of a config, or of its nested text config: what a trace has put into the config,
    else its family's.

    Raises:
        UnsupportedModelError: the model cannot be pruned safely; says why and what can.
    """
    text = text_config(config)
    reason = refusal(config)
    family = traced_family(config)
    adapter = known_adapter(text) if family is None else family.adapter()
    if reason is None and adapter is None:
        reason = (
            "it is not a family this version knows (`liar trace` may find its Sites, and `--trace` "
            "then prunes them)"
        )
    if reason is None and adapter is not None:
        reason = adapter.refuse(text)
    if reason is not None or adapter is None:
        supported = ", ".join(sorted(ADAPTERS))
        raise UnsupportedModelError(
            f"model type {text.model_type!r} cannot be pruned: {reason}; supported: {supported}"
        )
    return adapter


def known_adapter(text: PretrainedConfig) -> Adapter | None:
    """The Adapter of a family as this (text) config has it, also of a variant that is refused."""
    adapter = ADAPTERS.get(text.model_type)
    return None if adapter is None else adapter.of(text)


def check_reads_tokens(config: PretrainedConfig, what: str) -> None:
    """Raises InputError for a model that reads something else; it begins with `what` runs text."""
    adapter = ADAPTERS.get(text_config(config).model_type)
    if adapter is not None and adapter.features is not None:
        raise InputError(
            f"{what} runs text through the model, and {adapter.model_type} reads "
            f"{adapter.features.name}"
        )


def refusal(config: PretrainedConfig) -> str | None:
    """Why a model cannot be pruned, whatever its family, or None."""
    text = text_config(config)
    own = ADAPTERS.get(text.model_type)
    for part in (config, text):
        if getattr(part, "quantization_config", None):
            return "its weights are quantised; prune the original first, then quantise"
        if getattr(part, "is_encoder_decoder", False) and (
            own is None or not (own.part or own.encoder_decoder)
        ):
            return "it is an encoder-decoder"
    # transformers raises where such a field is asked for
    stated = getattr(text, "per_layer_attributes", None) or ()
    for name in (*EXPERT_FIELDS, "num_kv_shared_layers"):
        if name in stated:
            return f"its layers have a {name} of their own (per_layer_config)"
    for name in EXPERT_FIELDS:
        if (getattr(text, name, None) or 0) > 1:
            return f"it is a mixture of experts ({name}={getattr(text, name)})"
    if getattr(text, "num_kv_shared_layers", 0):
        return "its layers share key/value states (num_kv_shared_layers)"
    return None


__all__ = [
    "ADAPTERS",
    "Adapter",
    "Producer",
    "Site",
    "SiteSpec",
    "adapter_for",
    "check_reads_tokens",
    "known_adapter",
    "refusal",
    "text_config",
]
