"""The config of a folder that `liar export --format deci` wrote, which has this file beside it.

Servers read the widths of a layer as attributes, `config.block_configs[3].ffn.ffn_mult`, which JSON
objects do not have.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Block(dict[str, Any]):
    """A JSON object whose members are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError as error:
            raise AttributeError(name) from error
        return Block(value) if isinstance(value, dict) else value


class LiarDeciConfig(LlamaConfig):
    """LLaMA with `block_configs`, one for each layer."""

    model_type = "nemotron-nas"
    block_configs: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.block_configs = [Block(block) for block in self.block_configs or ()]
