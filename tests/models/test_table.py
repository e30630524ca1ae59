"""The README's table of families is what the registry says and what the round trips have shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from liar_families import FAMILIES, PAIRED
from liar_features import MODELS

from liar_ext.errors import InputError
from liar_ext.models import ADAPTERS, adapter_for, table

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_has_the_table_of_the_registry():
    """`python -m liar_ext.models.table README.md` writes it."""
    assert table.between(README.read_text(encoding="utf-8"))[1] == table.markdown()


def test_every_family_of_the_table_has_a_tiny_config_whose_round_trip_is_tested():
    """By `test_round_trip` and `test_encoder_decoder`, which also hold the loader against what is
    written there."""
    tested: dict[str, set[str]] = {}
    for family in (*FAMILIES.values(), *PAIRED.values()):
        model_type = adapter_for(family.build().config).model_type
        tested.setdefault(model_type, set()).update(table.NAMES[kind] for kind in family.kinds)
    found = {
        name.strip("`"): set(row[1].split(", "))
        for row in table.rows()
        for name in row[0].split(", ")
    }
    # those that read no tokens have round trips of their own, of all their Sites (`test_features`)
    others = {name for name, adapter in ADAPTERS.items() if adapter.features is not None}
    assert others == set(MODELS)
    assert {name: kinds for name, kinds in found.items() if name not in others} == tested
    assert set(found) == set(ADAPTERS)


def test_the_command_writes_between_the_markers_and_nowhere_else(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    assert table.main([str(page)]) == 0
    assert page.read_text() == f"before\n{table.BEGIN}\n{table.markdown()}\n{table.END}\nafter\n"
    assert table.main([]) == 0
    assert capsys.readouterr().out == f"{table.markdown()}\n"


@pytest.mark.parametrize(
    "text",
    ["", table.BEGIN, f"{table.END}{table.BEGIN}", f"{table.BEGIN}{table.END}{table.BEGIN}"],
    ids=["none", "no end", "turned around", "two"],
)
def test_a_page_without_one_place_for_it_is_refused_and_left(text, tmp_path, capsys):
    with pytest.raises(InputError, match="no one place between"):
        table.between(text)
    page = tmp_path / "page.md"
    page.write_text(text)
    assert table.main([str(page)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {page}: no one place")
    assert page.read_text() == text
