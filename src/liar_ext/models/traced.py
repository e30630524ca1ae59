"""An adapter that was found by running a layer, as JSON data under `liar_ext_trace` of a config.

It travels with `config.json`, so that a pruned folder can be loaded and evaluated without tracing
again. Stock transformers do not look at the key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from liar_ext.errors import InputError
from liar_ext.models.adapter import Adapter
from liar_ext.models.site import Producer, SiteSpec

KEY = "liar_ext_trace"
VERSION = 1
# a config that states no longest sequence sets no limit
NO_LIMIT = 1 << 31


@dataclasses.dataclass(frozen=True)
class TracedFamily:
    """What a trace says of a family; all of it is data.

    Attributes:
        model_type, layers, decoder, returns, takes: as `Adapter` has them.
        head_dim, max_positions: of this config.
        residual: layers are sums, see `Adapter`.
        plain_head: logits are the output embedding of the last hidden states.
        explicit: config fields to state before the number of heads changes.
        sites: in the order of a forward.
        refused: consumer -> why it is no Site.
        transformers: the release whose code was run.
    """

    model_type: str
    layers: str
    decoder: bool
    head_dim: int
    max_positions: int
    residual: bool
    plain_head: bool
    returns: int
    takes: dict[str, bool]
    explicit: dict[str, Any]
    sites: tuple[SiteSpec, ...]
    refused: dict[str, str]
    transformers: str

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **_plain(dataclasses.asdict(self))}

    @classmethod
    def from_json(cls, data: Any) -> TracedFamily:
        """Raises InputError for another version or malformed data."""
        version = data.get("version") if isinstance(data, Mapping) else data
        if not isinstance(data, Mapping) or version != VERSION:
            raise InputError(
                f"config.json: {KEY} version {version!r}; this release reads {VERSION}"
            )
        values = {name: value for name, value in data.items() if name != "version"}
        try:
            sites = tuple(_site(entry) for entry in values.pop("sites"))
            return cls(**values, sites=sites)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"config.json: {KEY} is malformed ({error})") from error

    def adapter(self) -> Adapter:
        return Adapter(
            model_type=self.model_type,
            layers=self.layers,
            sites=self.sites,
            decoder=self.decoder,
            head_dim=lambda config: self.head_dim,
            max_positions=lambda config: self.max_positions,
            explicit=lambda config: dict(self.explicit),
            residual=lambda config: self.residual,
            returns=self.returns,
            takes=dict(self.takes),
            plain_head=self.plain_head,
            traced=True,
        )


def traced_family(config: PretrainedConfig) -> TracedFamily | None:
    """What the config says of a trace, if anything."""
    data = getattr(config, KEY, None)
    return None if data is None else TracedFamily.from_json(data)


def _site(data: Mapping[str, Any]) -> SiteSpec:
    values = dict(data)
    values["producers"] = tuple(Producer(**entry) for entry in values["producers"])
    values["attributes"] = tuple((path, name, what) for path, name, what in values["attributes"])
    values["bias_filler"] = tuple(values["bias_filler"])
    return SiteSpec(**values)


def _plain(value: Any) -> Any:
    """JSON data: tuples are lists, as they come back."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
