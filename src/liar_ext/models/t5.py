"""T5 and mT5: pre-norm, an encoder and a decoder, of which each first layer makes the position
biases of all. These have one value for each head, so heads stay. Both stacks have the same FFN
width in the config. `T5EncoderModel` and the like are the encoder alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from liar_ext.models.adapter import Adapter, Decoder
from liar_ext.models.site import Producer, SiteSpec
from liar_ext.models.traced import NO_LIMIT
from liar_ext.ops.logits import PLAIN, Shape

_ENCODER_ALONE = ("EncoderModel", "ForTokenClassification")


def _ffn(place: int, gated: bool) -> SiteSpec:
    """`wo(act(wi(x)))` or `wo(act(wi_0(x)) * wi_1(x))`, the last of a block's sublayers."""
    path = f"layer.{place}.DenseReluDense"
    rows = ("wi_0", "wi_1") if gated else ("wi",)
    return SiteSpec(
        kind="ffn",
        consumer=f"{path}.wo",
        producers=tuple(Producer(f"{path}.{name}") for name in rows),
        config_fields={"d_ff": "units"},
    )


def _variant(config: PretrainedConfig) -> Mapping[str, Any]:
    gated = config.is_gated_act
    found: dict[str, Any] = {"sites": (_ffn(1, gated),)}
    names = getattr(config, "architectures", None) or [""]
    if not config.is_encoder_decoder or str(names[0]).endswith(_ENCODER_ALONE):
        return found
    # the first release of T5 divides what its output embedding is given
    scaled = Shape(scale=config.d_model**-0.5)
    return found | {
        "then": Decoder(
            path="decoder",
            layers="block",
            sites=(_ffn(2, gated),),
            between="encoder.final_layer_norm",
            across=("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
        ),
        "takes": {"use_cache": False},
        "logits": scaled if getattr(config, "scale_decoder_outputs", False) else PLAIN,
    }


T5 = Adapter(
    model_type="t5",
    layers="encoder.block",
    sites=(),
    decoder=False,
    head_dim=lambda config: config.d_kv,
    max_positions=lambda config: NO_LIMIT,
    no_sum="has attention whose heads are no Site",
    variant=_variant,
    refused={"heads": "one table of position biases has a value for each head, for all layers"},
    returns=3,
    encoder_decoder=True,
    hands_on=True,
    note="encoder and decoder, or the encoder alone; reads pairs of texts",
)

MT5 = replace(T5, model_type="mt5")
