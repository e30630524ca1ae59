"""The cells of a grid: what is refused, what is skipped, and what is the same computation."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from liar_ext.allocation import ALLOCATIONS
from liar_ext.criteria import CRITERIA
from liar_ext.errors import InputError, unknown_choice
from liar_ext.recipe import CHOICES, Recipe
from liar_ext.reconstruction import RECONSTRUCTIONS
from liar_ext.survey import reads_of

# axis -> the Recipe's field; cells are run in this order, the last axis fastest
AXES = {
    "targets": "target",
    "allocations": "allocation",
    "sparsities": "sparsity",
    "criteria": "criterion",
    "reconstructions": "reconstruct",
    "ridges": "ridge",
    "target_signals": "target_signal",
}
_NUMBERS = ("sparsities", "ridges")
# what is no name of these is refused; what is one may still be impossible beside other values
_NAMES: dict[str, Collection[str]] = {
    "criterion": CRITERIA,
    "allocation": ALLOCATIONS,
    "reconstruct": RECONSTRUCTIONS,
    "target_signal": CHOICES["target_signal"],
}


@dataclass(frozen=True)
class Cell:
    """One recipe of a grid.

    Attributes:
        key: names the computation; cells that cannot differ in their result share it.
        variant: the reconstruction as tables name it, with those of its other coordinates that
            vary and matter.
    """

    recipe: Recipe
    key: str
    variant: str

    @property
    def coordinates(self) -> dict[str, Any]:
        """The axes' fields of the recipe, as JSON data."""
        recipe = self.recipe.to_json()
        return {field: recipe[field] for field in AXES.values()}

    @property
    def label(self) -> str:
        r = self.recipe
        return f"{','.join(r.target)} {r.allocation} {r.sparsity:g} {r.criterion} {self.variant}"


@dataclass(frozen=True)
class Grid:
    """All cells of some axes.

    Attributes:
        base: the fields that are the same in all cells; axes: values by axis.
        cells: in the order to run in; of those with one key the first is computed.
        skipped: (coordinates, reason) of combinations that no recipe can be, or that are
            impossible for the model.
    """

    base: Recipe
    axes: dict[str, tuple[Any, ...]]
    cells: tuple[Cell, ...]
    skipped: tuple[tuple[dict[str, Any], str], ...]

    def targets(self) -> tuple[str, ...]:
        """All kinds of Site that some cell prunes."""
        return tuple(dict.fromkeys(kind for cell in self.cells for kind in cell.recipe.target))

    def fixed(self) -> dict[str, Any]:
        """What all recipes have in common, as JSON data."""
        data = self.base.to_json()
        return {name: value for name, value in data.items() if name not in AXES.values()}

    def possible(self, check: Callable[[Recipe], None]) -> Grid:
        """Without the cells whose recipe `check` refuses with an InputError: they are skipped.

        Raises:
            InputError: none is left.
        """
        cells, skipped = [], []
        for cell in self.cells:
            try:
                check(cell.recipe)
            except InputError as error:
                skipped.append((cell.coordinates, str(error)))
            else:
                cells.append(cell)
        _refuse_empty(cells, skipped)
        return replace(self, cells=tuple(cells), skipped=(*self.skipped, *skipped))

    def computations(self) -> list[Cell]:
        """One cell for each key."""
        return list({cell.key: cell for cell in reversed(self.cells)}.values())[::-1]


def parse_axis(axis: str, text: str) -> tuple[Any, ...]:
    """The values of an option: separated by commas, and of targets by semicolons."""
    parts = [part.strip() for part in text.split(";" if axis == "targets" else ",")]
    if not all(parts):
        raise InputError(f"{_option(axis)} {text!r}: a value is missing; {_example(axis)}")
    if axis == "targets":
        return tuple(tuple(kind.strip() for kind in part.split(",")) for part in parts)
    return tuple(_number(part) if axis in _NUMBERS else part for part in parts)


def make_grid(base: Recipe, axes: Mapping[str, Sequence[Any]]) -> Grid:
    """Every combination of the axes; an axis that is not given has the one value of `base`.

    Raises:
        InputError: an axis has a value that no recipe can have, or one twice, or no combination is
            possible; or layers are to be left out.
    """
    if base.shortens:
        raise InputError(
            "liar compare prunes widths; leave out layers first (liar prune --depth or "
            "--drop-layers), then compare what is left"
        )
    values = {axis: tuple(axes.get(axis) or (getattr(base, AXES[axis]),)) for axis in AXES}
    for axis, wanted in values.items():
        _check_axis(axis, wanted)
    cells, skipped = [], []
    for combination in itertools.product(*values.values()):
        fields = dict(zip(AXES.values(), combination, strict=True))
        try:
            recipe = replace(base, **fields)
        except InputError as error:
            skipped.append((json.loads(json.dumps(fields)), str(error)))
            continue
        cells.append(Cell(recipe, _key(recipe), _variant(recipe, values)))
    _refuse_empty(cells, skipped)
    return Grid(base, values, tuple(cells), tuple(skipped))


def _refuse_empty(cells: Sequence[Cell], skipped: Sequence[tuple[dict[str, Any], str]]) -> None:
    if not cells:
        raise InputError(f"no combination of the axes is possible: {skipped[0][1]}")


def uses_ridge(recipe: Recipe) -> bool:
    """Whether another ridge could give another result."""
    # what sees single columns, weights or gradients only has no system to solve
    judged = "moments" in (CRITERIA[recipe.criterion].needs, reads_of(recipe))
    return RECONSTRUCTIONS[recipe.reconstruct].uses_ridge or judged


def _key(recipe: Recipe) -> str:
    data = recipe.to_json()
    data["target"] = sorted(data["target"])
    if not uses_ridge(recipe):
        del data["ridge"]
    return sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _variant(recipe: Recipe, values: Mapping[str, tuple[Any, ...]]) -> str:
    parts = [recipe.reconstruct]
    if len(values["ridges"]) > 1 and uses_ridge(recipe):
        ridge = recipe.ridge
        parts.append(f"ridge {ridge:g}" if isinstance(ridge, int | float) else f"ridge {ridge}")
    if len(values["target_signals"]) > 1:
        parts.append(recipe.target_signal)
    return ", ".join(parts)


def _check_axis(axis: str, values: tuple[Any, ...]) -> None:
    field, option = AXES[axis], _option(axis)
    seen = set()
    for value in values:
        if field in _NAMES:
            if value not in _NAMES[field]:
                raise unknown_choice(option, value, _NAMES[field])
            checked = value
        else:
            try:
                checked = getattr(Recipe(**{field: value}), field)
            except InputError as error:
                # the message of the field's own option, under the name of this one
                text = str(error).replace(f"--{field} ", f"{option} ", 1)
                raise InputError(text) from error
        same = frozenset(checked) if axis == "targets" else checked
        if same in seen:
            shown = ",".join(checked) if axis == "targets" else checked
            raise InputError(f"{option} {shown}: is given twice; every cell is computed once")
        seen.add(same)


def _number(text: str) -> Any:
    """A number if it is one; the Recipe says what else it may be."""
    try:
        return float(text)
    except ValueError:
        return text


def _option(axis: str) -> str:
    return f"--{axis.replace('_', '-')}"


def _example(axis: str) -> str:
    known = {"targets": 'e.g. "ffn;heads;ffn,heads"', "sparsities": "e.g. 0.1,0.3"}
    return known.get(axis, "give values separated by commas")
