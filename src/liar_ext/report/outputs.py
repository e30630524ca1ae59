"""What a page is about: output folders of liar-ext, of whatever kind, read and described."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from liar_ext.errors import InputError
from liar_ext.evaluation.task import DECODER, ENCODER, ENCODER_DECODER
from liar_ext.report.schema import (
    CONVOLUTIONS,
    EXPORTED,
    FILE,
    LAYERS,
    RECOVERED,
    VERSION,
    Report,
    read_data,
)
from liar_ext.report.text import layers, short_name

PRUNED = "pruned"


@dataclass(frozen=True)
class Output:
    """One output folder.

    Attributes:
        folder: where it is; None of a report in memory. label: what the page calls it.
        data: its report, as JSON data; report: the same of a folder that was pruned Site by Site,
            None of another kind.
    """

    folder: Path | None
    label: str
    data: dict[str, Any]
    report: Report | None

    @property
    def kind(self) -> str:
        return str(self.data.get("kind", PRUNED))

    @property
    def source(self) -> str:
        return str(self.data["source"])

    @property
    def base(self) -> str:
        """What `source` is called."""
        return short_name(self.source)

    @property
    def totals(self) -> dict[str, Any]:
        return dict(self.data.get("totals", {}))

    @property
    def seconds(self) -> float | None:
        """Wall clock of the whole command."""
        seconds = self.data.get("seconds")
        return seconds.get("total") if isinstance(seconds, dict) else seconds

    @property
    def environment(self) -> dict[str, Any]:
        return dict(self.data.get("environment", {}))

    @property
    def stock(self) -> bool:
        """Whether stock transformers loads it."""
        if self.report is not None:
            return self.report.layout.startswith("stock")
        return self.data.get("config", {}).get("model_type") != "liar_ext"

    @property
    def model_kind(self) -> str:
        """As what it is evaluated (`task`); a decoder where the config does not say."""
        config = self.data.get("config", {})
        names = " ".join(config.get("architectures") or ())
        if config.get("is_encoder_decoder") and "ForConditionalGeneration" in names:
            return ENCODER_DECODER
        return ENCODER if names and "CausalLM" not in names and "LMHead" not in names else DECODER

    def is_of(self, source: str) -> bool:
        """Whether a path or an id, as another command stated it, means this folder."""
        return self.folder is not None and same(source, str(self.folder))

    def from_source(self, source: str) -> bool:
        """Whether it means what this was made from."""
        return same(source, self.source)

    def lacks(self, error: KeyError) -> InputError:
        """The error of a report without something that its kind has."""
        return InputError(
            f"{self.label}: its report has no {error}; it is of another release, or was edited"
        )

    def done(self) -> str:
        """One line: what became of the source."""
        return _DONE[self.kind](self.data)


def read(folders: Sequence[str | Path]) -> list[Output]:
    """The outputs in these folders, with labels that tell them apart.

    Raises:
        InputError: a folder without a report, with one of another release, or given twice.
    """
    found: list[Output] = []
    for each in folders:
        folder = Path(each)
        data = read_data(folder)
        if not isinstance(data, dict) or data.get("version") != VERSION:
            version = data.get("version") if isinstance(data, dict) else None
            raise InputError(f"{folder / FILE}: version {version!r}; this release reads {VERSION}")
        kind = data.get("kind", PRUNED)
        if kind == EXPORTED:
            raise InputError(
                f"{folder}: was exported for another engine; give the folder that it was made from "
                f"({data.get('source')})"
            )
        if kind not in _DONE:
            raise InputError(f"{folder / FILE}: of a kind {kind!r} that this release does not know")
        if any(other.is_of(str(folder)) for other in found):
            raise InputError(f"{folder}: is given twice")
        report = Report.from_json(data, str(folder / FILE)) if kind == PRUNED else None
        try:
            output = Output(folder, folder.resolve().name, data, report)
            # what every kind has; a file that was edited may not
            _ = output.source, output.totals["parameters_after"], output.done()
        except KeyError as error:
            raise output.lacks(error) from error
        found.append(output)
    labels = _labels([Path(each).resolve().parts[1:] for each in folders])
    return [replace(output, label=label) for output, label in zip(found, labels, strict=True)]


def _labels(folders: Sequence[tuple[str, ...]]) -> list[str]:
    """Of the parts of each path as many, from its end, as tell it from the others: pages are sent
    to others, who need not learn where these folders are."""
    found = []
    for parts in folders:
        others = [other for other in folders if other != parts]
        count = 1
        while any(other[-count:] == parts[-count:] for other in others):
            count += 1
        found.append("/".join(parts[-count:]))
    return found


def same(one: str, other: str) -> bool:
    """Whether two paths, or ids, mean one model. Nothing is the same as no path."""
    if not one or not other:
        return False
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def _pruned(data: dict[str, Any]) -> str:
    recipe, parts = data["recipe"], []
    if gone := data.get("layers", {}).get("dropped"):
        parts.append(f"{_layers(len(gone))} left out ({layers(gone)})")
    if recipe.get("sparsity", 1):
        kinds = {"ffn": "FFN neurons", "heads": "attention heads"}
        equal = recipe["allocation"] == "uniform"
        target = " and ".join(kinds.get(kind, kind) for kind in recipe["target"])
        parts.append(
            f"{target} removed by {recipe['criterion']}, "
            f"{'equal widths' if equal else 'widths by ' + recipe['allocation']}, "
            f"repaired by {recipe['reconstruct']}"
        )
    return "; ".join(parts) or "nothing was changed"


def _whole_layers(data: dict[str, Any]) -> str:
    of = data["layers"]
    if "inserted" in of:
        more = _layers(len(of["inserted"]))
        return f"{more} inserted by {data['growth']['predictor']} (now {layers(of['inserted'])})"
    if "replaced" in of:
        first, last = of["replaced"]
        stand = f"{_layers(len(of['trained']))} that {'were' if len(of['trained']) > 1 else 'was'}"
        return f"layers {first} to {last} replaced by {stand} trained"
    if "merged" in of:
        return f"{_layers(len(of['dropped']))} merged into those before ({layers(of['dropped'])})"
    return f"{_layers(len(of['dropped']))} left out ({layers(of['dropped'])}), nothing repaired"


def _recovered(data: dict[str, Any]) -> str:
    method = {"partial": "the last layers", "lora": "low-rank adapters"}
    how = method.get(data["recovery"]["method"], data["recovery"]["method"])
    return f"trained a little: {how}, {data['training']['steps']} updates"


def _convolutions(data: dict[str, Any]) -> str:
    net = data["network"]
    return (
        f"{net['convolutions_before']} convolutions made {net['convolutions_after']}, "
        f"{net['activations_before']} activations {net['activations_after']}"
    )


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"


_DONE = {
    PRUNED: _pruned,
    LAYERS: _whole_layers,
    RECOVERED: _recovered,
    CONVOLUTIONS: _convolutions,
}
