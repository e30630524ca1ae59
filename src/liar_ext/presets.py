"""Presets: recipes by what they are for, filled in for the model at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liar_ext.errors import unknown_choice

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from liar_ext.recipe import Recipe


@dataclass(frozen=True)
class Preset:
    """Attributes:
    summary: for `--help`.
    fields: of the Recipe; what they leave out has its default.
    residual: more of them, for models whose layers add to a residual stream (pre-norm).
    encoder: more of them, for encoders, whose samples are sentences and not windows.
    """

    summary: str
    fields: Mapping[str, Any]
    residual: Mapping[str, Any] = field(default_factory=dict)
    encoder: Mapping[str, Any] = field(default_factory=dict)


# measured in docs/results/README.md, which says why
PRESETS = {
    "best": Preset(
        "the least loss without training that is known here, layers of their own widths",
        {
            "criterion": "obs",
            "allocation": "level-swaps",
            "search_evaluations": 64,
            "reconstruct": "liar",
            "target_signal": "local",
        },
        residual={"target_signal": "stream"},
        encoder={"search_samples": 256},
    ),
    "fast": Preset(
        "one forward pass and one solve a Site, equal widths",
        {
            "criterion": "wanda",
            "allocation": "uniform",
            "reconstruct": "liar",
            "target_signal": "local",
        },
    ),
}


def preset_fields(
    name: str, config: PretrainedConfig, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Recipe fields of a preset for a model.

    Args:
        given: fields that will win. Where these can aim at no residual stream, neither does the
            preset.
    Raises:
        InputError: an unknown preset. UnsupportedModelError: a model without an adapter.
    """
    from liar_ext.models import adapter_for, text_config

    found = _known(name)
    adapter = adapter_for(config)
    streams = adapter.residual(text_config(config)) and _follows({**found.fields, **(given or {})})
    residual = found.residual if streams else {}
    return {**found.fields, **residual, **({} if adapter.decoder else found.encoder)}


def _known(name: str) -> Preset:
    if name not in PRESETS:
        raise unknown_choice("--preset", name, PRESETS)
    return PRESETS[name]


def _follows(fields: Mapping[str, Any]) -> bool:
    """Whether a recipe with these fields may aim at the dense path, as `Recipe` says."""
    from liar_ext.reconstruction import RECONSTRUCTIONS

    unable = [name for name, method in RECONSTRUCTIONS.items() if not method.follows]
    return fields["reconstruct"] not in unable and fields.get("statistics") != "oneshot"


def fields_for(
    name: str,
    source: str | Path,
    given: Mapping[str, Any] | None = None,
    *,
    trace: bool = False,
) -> dict[str, Any]:
    """`preset_fields` for the checkpoint in a folder or of a hub id; reads its config only.

    Args:
        trace: as `compress` will get it.
    """
    _known(name)  # before anything is fetched
    from liar_ext.checkpoint.load import resolve
    from liar_ext.checkpoint.reader import read_config
    from liar_ext.models import layout

    folder = resolve(source, config_only=True)
    data = layout.base_data(read_config(folder))
    if trace:
        from liar_ext.engine.source import with_trace

        data = with_trace(data, ())
    return preset_fields(name, layout.config_object(data), given)


def preset(name: str, source: str | Path, *, trace: bool = False, **fields: Any) -> Recipe:
    """The recipe of a preset for a checkpoint.

    Args:
        name: a key of `PRESETS`; source: folder or hub id; fields: of the Recipe, which win.
        trace: as `compress` will get it.
    Raises:
        InputError: an unknown preset or bad fields. UnsupportedModelError: an unsupported model.
    """
    from liar_ext.recipe import Recipe

    return Recipe(**{**fields_for(name, source, fields, trace=trace), **fields})
