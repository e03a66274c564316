"""The table of docs/sources.md is the one that the catalog makes."""

from contextlib import closing
from pathlib import Path

import pytest

from dla_cache.sources import SOURCES, open_source
from dla_cache.sources.table import END, markdown_table, with_table
from dla_cache.spec import LatentSpec
from dla_cache.store.layout import payload_bytes

PAGE = Path(__file__).parents[3] / "docs" / "sources.md"


def test_the_page_shows_the_catalog_as_it_is():
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "run `make docs`"


def test_the_table_has_a_row_for_every_source_with_what_it_takes_and_under_which_licence():
    rows = markdown_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(SOURCES)
    for row, entry in zip(rows, SOURCES.values(), strict=True):
        assert row.count("|") - row.count("\\|") == 10
        for text in (entry.modality.value, entry.summary, entry.size, entry.model, entry.licence):
            assert text.replace("|", "\\|") in row


@pytest.mark.parametrize("name", [name for name, entry in SOURCES.items() if not entry.model])
def test_the_catalog_says_of_a_shipped_source_what_its_recipe_says(name):
    entry = SOURCES[name]
    with closing(open_source(LatentSpec(modality=entry.modality, source=name), "cpu")) as source:
        recipe = source.recipe
    row, latent = entry.row, recipe.format
    assert (row.axes, row.space, row.view_size) == (latent.axes, latent.space, recipe.source_view_size)
    assert row.settings == recipe.parameters
    assert entry.size == f"{' x '.join(map(str, latent.shape))} {latent.dtype}"
    assert entry.bytes_per_image == payload_bytes(latent)


def test_what_stands_around_the_table_stays():
    page = PAGE.read_text(encoding="utf-8")
    emptied = page.replace(markdown_table(), "old")
    assert with_table(emptied + "\nlast words") == page + "\nlast words"
    assert page.count(END) == 1
