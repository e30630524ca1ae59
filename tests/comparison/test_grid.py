"""Axes into cells: what is refused, what is skipped, what is the same computation."""

from __future__ import annotations

import pytest

from liar_ext import InputError, Recipe
from liar_ext.comparison.grid import make_grid, parse_axis


def test_every_combination_is_a_cell_and_an_axis_not_given_has_the_base_value():
    base = Recipe(criterion="flap", samples=7)
    grid = make_grid(base, {"sparsities": (0.1, 0.3), "targets": (("ffn",), ("ffn", "heads"))})
    found = [(cell.recipe.target, cell.recipe.sparsity) for cell in grid.cells]
    assert found == [
        (("ffn",), 0.1),
        (("ffn",), 0.3),
        (("ffn", "heads"), 0.1),
        (("ffn", "heads"), 0.3),
    ]
    assert all(cell.recipe.criterion == "flap" for cell in grid.cells)
    assert grid.fixed()["samples"] == 7
    assert "sparsity" not in grid.fixed()
    assert len({cell.key for cell in grid.cells}) == 4


def test_targets_are_separated_by_semicolons_and_numbers_are_numbers():
    assert parse_axis("targets", "ffn; heads;ffn,heads") == (("ffn",), ("heads",), ("ffn", "heads"))
    assert parse_axis("sparsities", "0.1, 0.5") == (0.1, 0.5)
    assert parse_axis("criteria", "wanda,flap") == ("wanda", "flap")
    # what else a ridge may be is the Recipe's to say
    assert parse_axis("ridges", "1e-3,auto") == (1e-3, "auto")


@pytest.mark.parametrize(
    ("axis", "text", "says"),
    [
        ("criteria", "wanda,magic", "--criteria magic: choose from magnitude"),
        ("allocations", "even", "--allocations even: choose from uniform"),
        ("reconstructions", "none,glue", "--reconstructions glue: choose from none"),
        ("target_signals", "far", "--target-signals far: choose from local"),
        ("targets", "ffn;tails", "--targets tails: choose from ffn, heads"),
        ("targets", "ffn,heads;heads,ffn", "--targets heads,ffn: is given twice"),
        ("sparsities", "0.1,1", "--sparsities 1.0: must be a number above 0 and below 1"),
        ("sparsities", "0.1,half", "--sparsities 'half': must be a number"),
        ("sparsities", "0.1,0.10", "--sparsities 0.1: is given twice"),
        ("sparsities", "0.1,", "a value is missing; e.g. 0.1,0.3"),
        ("ridges", "-1", "--ridges -1.0: must be"),
        ("ridges", "1e-3,0.001", "--ridges 0.001: is given twice"),
        ("criteria", "", "--criteria '': a value is missing"),
    ],
)
def test_a_bad_value_is_refused_with_its_option_and_the_choices(axis, text, says):
    with pytest.raises(InputError) as error:
        make_grid(Recipe(), {axis: parse_axis(axis, text)})
    assert says in str(error.value)


def test_what_no_recipe_can_be_is_skipped_with_the_reason():
    axes = {"reconstructions": ("none", "bias", "liar")}
    grid = make_grid(Recipe(bias="never"), axes)
    assert [cell.recipe.reconstruct for cell in grid.cells] == ["none", "liar"]
    ((coordinates, reason),) = grid.skipped
    assert coordinates["reconstruct"] == "bias"
    assert "--bias is never" in reason
    with pytest.raises(InputError, match="no combination of the axes is possible: .*never"):
        make_grid(Recipe(bias="never"), {"reconstructions": ("bias",)})


def test_a_ridge_that_does_not_matter_makes_no_second_computation():
    axes = {"reconstructions": ("none", "bias", "liar"), "ridges": (1e-4, 1e-2)}
    grid = make_grid(Recipe(), axes)
    assert len(grid.cells) == 6
    assert [c.variant for c in grid.computations()] == [
        *("none", "bias", "liar, ridge 0.0001", "liar, ridge 0.01")
    ]
    # a criterion that inverts Moments is regularised as well
    grid = make_grid(Recipe(criterion="obs"), axes)
    assert len(grid.computations()) == 6
