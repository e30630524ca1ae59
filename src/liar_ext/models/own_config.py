"""A config of which one module reads some fields otherwise.

Some modules ask the model's config for their own width in every forward (Phi-3's attention for its
number of query heads). Where layers have widths of their own, each such module gets a view: what
the view has is the module's, everything else is read from, and written to, the one shared config,
so that a choice made later (`set_attn_implementation`) reaches every layer.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# of what `SiteSpec.attributes` names
PREFIX = "config."


class OwnConfig:
    """A view of `shared` with fields of its own; attributes read and written like a config's."""

    def __init__(self, shared: Any) -> None:
        self.__dict__.update(_shared=shared, _own={})

    def __getattr__(self, name: str) -> Any:
        # asked for before there is a state (copy, pickle), or about the object and not the config
        if name.startswith("__") or "_shared" not in self.__dict__:
            raise AttributeError(name)
        own = self.__dict__["_own"]
        return own[name] if name in own else getattr(self.__dict__["_shared"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_shared"], name, value)


def set_field(module: nn.Module, name: str, value: Any) -> None:
    """Make one module read `value` as the field `name` of its config, and no other module."""
    found: Any = module.config
    own = found if isinstance(found, OwnConfig) else OwnConfig(found)
    own.__dict__["_own"][name] = value
    # a module's own attribute: nothing that torch registers
    object.__setattr__(module, "config", own)


class Asked(OwnConfig):
    """A view that remembers which fields of the config were asked for."""

    def __init__(self, shared: Any) -> None:
        super().__init__(shared)
        self.__dict__["_asked"] = {}

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        self.__dict__["_asked"][name] = None
        return value

    def fields(self) -> list[str]:
        """Names, in the order in which they were first asked for."""
        return list(self.__dict__["_asked"])
