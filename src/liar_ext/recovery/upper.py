"""Partial fine-tuning: the last layers, the final norm and the head are trained, nothing below.

Source: Reassessing Layer Pruning in LLMs (2411.15558), which trains the head and the last three
remaining layers; its code the final norm as well.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn
from transformers import PreTrainedModel

from liar_ext.checkpoint.reader import tied_names
from liar_ext.depth.surgery import layer_list
from liar_ext.errors import InputError


def check_head(model: PreTrainedModel, *, head: bool, untie: bool) -> None:
    """Whether the head can be trained without the embeddings.

    Args:
        model: may be on `meta`; head: to be trained; untie: into a parameter of its own.
    Raises:
        InputError: it is the embeddings', or there is nothing to untie.
    """
    tied = bool(tied_names(model))
    if untie and not head:
        raise InputError("--untie: with --no-head the head is not trained; give one of the two")
    if untie and not tied:
        raise InputError("--untie: the head of this model is not tied to its embeddings; leave it")
    if head and tied and not untie:
        raise InputError(
            "the head of this model is tied to its embeddings, which training it would change for "
            "every layer; --untie gives it weights of its own in the result, --no-head leaves it "
            "as it is"
        )


def untied(model: PreTrainedModel) -> str:
    """Give the head a copy of the embeddings of its own, in place; the name of its weight."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    return next(name for name, p in model.named_parameters() if p is head.weight)


def first_trained(layers: int, last: int) -> int:
    """The first of the last `last` of so many layers.

    Raises:
        InputError: there are not so many.
    """
    if not 1 <= last <= layers:
        raise InputError(f"--last {last}: the model has {layers} layers; give 1 to {layers}")
    return layers - last


def upper_parameters(model: PreTrainedModel, last: int, *, head: bool) -> list[str]:
    """Names of all parameters of the last layers, of what runs behind them, and of the head.

    What runs behind the last layer (the final norm; OPT-350m's projection as well) is found by
    running the model on two tokens: what families call it does not matter.
    """
    path, layers = layer_list(model)
    first = first_trained(len(layers), last)
    names = [
        f"{path}.{index}.{name}"
        for index in range(first, len(layers))
        for name, _ in layers[index].named_parameters()
    ]
    output = model.get_output_embeddings()
    for prefix, module in _behind(model, layers[-1]).items():
        if module is not output or head:
            names += [f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)]
    return names


@torch.no_grad()
def _behind(model: PreTrainedModel, last: nn.Module) -> dict[str, nn.Module]:
    """Modules with parameters of their own that run after a layer, by name."""
    found: dict[str, nn.Module] = {}
    passed: list[bool] = []
    inside = set(last.modules())

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def note(own: nn.Module, _: object) -> None:
            if passed:
                found.setdefault(name, own)

        return module.register_forward_pre_hook(note)

    with ExitStack() as stack:
        handle = last.register_forward_hook(lambda *_: passed.append(True))
        stack.callback(handle.remove)
        for name, module in model.named_modules():
            if module not in inside and next(module.parameters(recurse=False), None) is not None:
                stack.callback(watch(name, module).remove)
        ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        model(input_ids=ids, use_cache=False)
    return found
