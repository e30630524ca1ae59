"""Which class loads an output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# the most specific first: a BERT head is also in the mapping of causal language models
AUTO_CLASSES = (
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    ("AutoModelForMultipleChoice", "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES"),
    ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForPreTraining", "MODEL_FOR_PRETRAINING_MAPPING_NAMES"),
    ("AutoModel", "MODEL_MAPPING_NAMES"),
    ("AutoModelForTextEncoding", "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES"),
)


def auto_class(config: Mapping[str, Any]) -> str:
    """The `transformers.Auto…` class that loads `config` with its head, by `architectures`."""
    # imported here: a card is also read where transformers is not needed yet
    from transformers.models.auto import modeling_auto

    from liar_ext.models import ADAPTERS
    from liar_ext.models.traced import KEY

    names = set(config.get("architectures") or ())
    for auto, mapping_name in AUTO_CLASSES:
        known: set[str] = set()
        for value in getattr(modeling_auto, mapping_name, {}).values():
            known.update((value,) if isinstance(value, str) else value)
        if names & known:
            return auto
    adapter = ADAPTERS.get(config.get("model_type", ""))
    decoder = adapter is not None and adapter.decoder
    if KEY in config:
        decoder = bool(config[KEY]["decoder"])
    return "AutoModelForCausalLM" if decoder else "AutoModel"


def base_model_type(config: Mapping[str, Any]) -> str:
    """The family the layers belong to, also where `model_type` is `liar_ext`."""
    own = config.get("liar_ext")
    return str(own["base_model_type"] if isinstance(own, dict) else config["model_type"])
