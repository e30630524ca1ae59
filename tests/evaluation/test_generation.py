"""greedy: the argmax, token by token."""

import pytest
import torch

from liar_ext.errors import InputError
from liar_ext.evaluation.generation import greedy


@pytest.fixture
def prompt_tokenizer(tokenizer):
    """Without [CLS] and [SEP], as a decoder's tokenizer."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    inner = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[SEP]", unk_token="[UNK]")


def test_it_is_the_argmax_of_each_step_without_the_prompt(llama, prompt_tokenizer, recwarn, capfd):
    ids = [5, 6]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(llama(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert 3 not in ids, "the reference must not reach the end token"
    llama.generation_config.temperature = 0.3
    llama.train()
    text = greedy(llama, prompt_tokenizer, "w1 w2", 6)
    assert text == prompt_tokenizer.decode(ids[2:], skip_special_tokens=True)
    assert llama.training
    assert "temperature" not in "".join(capfd.readouterr())


def test_an_empty_prompt_and_no_tokens_are_refused(llama, prompt_tokenizer):
    with pytest.raises(InputError, match="has no tokens"):
        greedy(llama, prompt_tokenizer, "", 3)
    with pytest.raises(InputError, match="max_new_tokens 0"):
        greedy(llama, prompt_tokenizer, "w1", 0)
