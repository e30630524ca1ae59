"""Greedy continuation of a prompt: a look at what a model says, for the demo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from liar_ext.errors import InputError
from liar_ext.evaluation.mode import inference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def greedy(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    """The most likely next tokens, one at a time, as text without the prompt.

    Args:
        model: a transformers model with `generate`.
        max_new_tokens: fewer come back when the model ends the text.
    Raises:
        InputError: a prompt without tokens, or fewer than one new token asked for.
    """
    from transformers import GenerationConfig

    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens} is too small; give at least 1")
    with inference(model) as device:
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        ids = inputs["input_ids"]
        if not ids.numel():
            raise InputError(f"the prompt {prompt!r} has no tokens; give some text")
        end = tokenizer.eos_token_id
        # a config of our own, with the sampling settings stated: those saved with the model would
        # fill the gaps and only cause warnings
        config = GenerationConfig(
            do_sample=False,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            decoder_start_token_id=model.generation_config.decoder_start_token_id,
            pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
        out = model.generate(
            input_ids=ids, attention_mask=inputs["attention_mask"], generation_config=config
        )
        # an encoder-decoder begins with a start token and writes nothing of the prompt
        first = 1 if model.config.is_encoder_decoder else ids.shape[1]
        return str(tokenizer.decode(out[0, first:], skip_special_tokens=True))
