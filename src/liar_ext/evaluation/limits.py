"""What a model is evaluated as, and how long its inputs may be: any model, adapter or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from liar_ext.checkpoint.reader import read_config
from liar_ext.errors import UnsupportedModelError
from liar_ext.evaluation.task import CLASSIFIER, DECODER, ENCODER, ENCODER_DECODER, READER
from liar_ext.models import Adapter, check_reads_tokens, known_adapter, layout, text_config
from liar_ext.models.traced import NO_LIMIT, traced_family


@dataclass(frozen=True)
class Limits:
    """Attributes: `model_type`; `kind`: `DECODER` (see `is_decoder`), `ENCODER` or
    `ENCODER_DECODER`; `positions`, see `max_positions`; `architecture`: its class; `head`, see
    `head_of`."""

    model_type: str
    kind: str
    positions: int | None
    architecture: str
    head: str | None

    @property
    def decoder(self) -> bool:
        return self.kind == DECODER


def limits_of(folder: Path) -> Limits:
    """Of the model in a folder, from its config alone.

    Raises:
        InputError: the config is not usable, or the model cannot be evaluated.
    """
    return limits_of_model(layout.empty(read_config(folder)))


def limits_of_model(model: PreTrainedModel) -> Limits:
    """The same of a model, with or without weights."""
    name = type(model).__name__
    model_type = text_config(model.config).model_type
    return Limits(model_type, kind_of(model), max_positions(model), name, head_of(name))


def kind_of(model: PreTrainedModel) -> str:
    """`DECODER`, `ENCODER` or `ENCODER_DECODER`.

    Raises:
        InputError: as `is_decoder`.
    """
    from transformers.models.auto import modeling_auto as auto

    # the mapping has decoders that listen, too (Qwen2-Audio)
    known = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
    if getattr(model.config, "is_encoder_decoder", False) and type(model).__name__ in known:
        return ENCODER_DECODER
    return DECODER if is_decoder(model) else ENCODER


def head_of(architecture: str) -> str | None:
    """`CLASSIFIER` or `READER` where a class of transformers is one, by its name."""
    from transformers.models.auto import modeling_auto as auto

    for head, names in (
        (CLASSIFIER, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        (READER, auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
    ):
        if architecture in names.values():
            return head
    return None


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether a model predicts the next token, each position seeing the ones before it only.

    An adapter says so. Other families are decoders where they can generate and are not among those
    that transformers lists for masked language modelling, unless the config asks for a decoder.

    Raises:
        UnsupportedModelError: it is an encoder-decoder, whose text is not one sequence, with
            another head than that of a language model.
        InputError: it reads no text.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = text_config(model.config)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder and cannot be evaluated here; give one "
            "of a class ...ForConditionalGeneration, a decoder or an encoder"
        )
    check_reads_tokens(model.config, "liar eval")
    adapter = _adapter(model.config)
    # an adapter says nothing of a variant that it refuses
    if adapter is not None and adapter.refuse(config) is None:
        return adapter.decoder
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return model.can_generate() and (not masked or bool(getattr(config, "is_decoder", False)))


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence a model takes, in tokens; None where its config states none."""
    config = text_config(model.config)
    adapter = _adapter(model.config)
    if adapter is not None:
        longest = adapter.max_positions(config)
        return None if longest == NO_LIMIT else longest
    return getattr(config, "max_position_embeddings", None)


def _adapter(config: PretrainedConfig) -> Adapter | None:
    family = traced_family(config)
    return known_adapter(text_config(config)) if family is None else family.adapter()
