"""How a checkpoint may name the tensors of a model, which is not always as the model does."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

# names that only old checkpoints use, and the ones modules have had since
LEGACY = ((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta"))


def candidates(name: str, prefix: str) -> list[str]:
    """How a checkpoint may call a parameter: as the model, or with or without the base prefix."""
    names = [name, f"{prefix}.{name}"]
    if name.startswith(f"{prefix}."):
        names.append(name.removeprefix(f"{prefix}."))
    for new, old in LEGACY:
        names += [n.removesuffix(new) + old for n in names if n.endswith(new)]
    return names


def library_names(
    model: PreTrainedModel, stored: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Model name -> stored name, by the rules that transformers itself applies when it loads.

    Nested models (LLaVA) are stored under the names they had before transformers 5.

    Returns:
        what is only named otherwise; and what transformers computes from what is stored, such as
        a projection that is stored fused with others (the first of them is named).
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:
        return {}, {}  # an older release: the missing names are then reported as they are
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    expected = model.state_dict()
    renamed: dict[str, str] = {}
    computed: dict[str, str] = {}
    for name in stored:
        own, converter = rename_source_key(
            name, renamings, converters, model.base_model_prefix, expected
        )
        (renamed if converter is None else computed)[own] = name
    return renamed, computed
