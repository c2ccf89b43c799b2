"""The grid of the whole gallery set: its pages, its filter, and the tags that 01_prepare reads."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from recnb.gallery.grid import gallery_grid, mistakes
from recnb.retrieval.lists import rank

LABELS = np.array([0, 0, 1, 1, 2, 2])
VECTORS = np.array([[1, 0, 0], [1, 0.1, 0], [0, 1, 0], [0.9, 0.2, 0], [0, 0, 1], [0, 0.1, 1]], np.float32)


@pytest.fixture
def made(tmp_path):
    """Six files of three identities, of which number 3 lies among those of identity 0; a function to the grid."""
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    ranking = rank(VECTORS, VECTORS, LABELS, LABELS, exclude_self=True, k=5)
    names = ["Garlic", "Plum", "<b>Leek</b>"]
    return lambda **options: gallery_grid(ranking, paths, paths, names, tmp_path / "tags.csv", **options)


def choose(grid, *places: int) -> None:
    for i in places:
        grid.tiles[i].children[0].value = True


def test_mistakes_are_counted_for_who_misleads_and_who_is_misled():
    queries = rank(VECTORS[[3]], VECTORS[:3], LABELS[[3]], LABELS[:3], k=3)  # finds 1 first, which is of another
    assert mistakes(queries) == {("item", 0): 0, ("item", 1): 1, ("item", 2): 0, ("query", 0): 1}


def test_the_worst_come_first_and_pages_turn(made):
    grid = made(page=4)
    assert (
        grid.here[:2] == [("item", 1), ("item", 3)] and grid.where.value == "1 to 4 of 6 images" and grid.page.max == 2
    )
    assert "error" in grid.tiles[0].children[1].value
    grid.page.value = 2
    assert len(grid.grid.children) == 2 and grid.where.value == "5 to 6 of 6 images"
    grid.find.value = "plum"
    assert grid.page.value == 1 and set(grid.here) == {("item", 2), ("item", 3)}
    grid.find.value = "none of these"
    assert grid.where.value == "no image" and grid.grid.children == ()
    grid.find.value, grid.order.value = "", "name"
    assert [grid.pages.identity(*image) for image in grid.here] == ["<b>Leek</b>"] * 2 + ["Garlic"] * 2
    assert "<b>Leek" not in grid.tiles[0].children[1].value


def test_tags_are_written_and_read_again(made, tmp_path):
    grid = made()
    choose(grid, 0)
    grid.actions["relabel"].click()
    assert grid.said.value == "give the right name first" and not (tmp_path / "tags.csv").exists()
    grid.name.value = "NA"
    grid.actions["relabel"].click()
    assert "relabel: NA" in grid.tiles[0].children[1].value and not grid.tiles[0].children[0].value
    choose(grid, 1)
    grid.actions["exclude"].click()
    first, second = (str(tmp_path / f"{i}.png") for _, i in grid.here[:2])
    table = pd.read_csv(tmp_path / "tags.csv", keep_default_na=False)
    assert table.columns.tolist() == ["path", "action", "label"]
    assert table.to_numpy().tolist() == [[first, "relabel", "NA"], [second, "exclude", ""]]
    again = made()
    assert again.tags == grid.tags
    choose(again, 0)
    again.actions["no tag"].click()
    assert pd.read_csv(tmp_path / "tags.csv").path.tolist() == [second]


def test_only_files_can_be_tagged():
    ranking = rank(VECTORS, VECTORS, LABELS, LABELS, exclude_self=True, k=5)
    arrays = [np.zeros((8, 8, 3), np.uint8)] * 6
    grid = gallery_grid(ranking, arrays, arrays)
    choose(grid, 0)
    grid.actions["exclude"].click()
    assert grid.said.value == "only image files can be tagged" and grid.tags == {}
