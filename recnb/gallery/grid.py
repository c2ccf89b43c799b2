"""The gallery set as a grid: look through it page by page, tag what is wrong in it, prepare the data again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd

from recnb.data.images import printable
from recnb.data.lists import read_csv, write_csv
from recnb.gallery.page import Pages, source
from recnb.gallery.pictures import Names, Picture
from recnb.gallery.widget import line
from recnb.retrieval.lists import Ranking

ORDERS = [("errors first", "errors"), ("by name", "name"), ("by number", "number")]
COLUMNS = ["path", "action", "label"]


def gallery_grid(
    ranking: Ranking,
    query_images: Sequence[Picture],
    gallery_images: Sequence[Picture],
    label_names: Names = None,
    tags: str | Path = "tags.csv",
    page: int = 40,
    size: int = 96,
) -> GalleryGrid:
    """Return a widget of all images of a ranking, a page at a time, those first that mislead a query or are misled.

    Args:
        ranking: what is shown, as `recnb.retrieval.rank` judges it.
        query_images: an image file for each query; a query that is in the gallery too is shown once.
        gallery_images: the same for each gallery item.
        label_names: from identity to text, a list or a mapping.
        tags: a CSV of path, action (exclude or relabel) and label, which is read where it exists and written at every
            tag; 01_prepare reads it.
        page: how many images are on a page.
        size: the largest width and height of a thumbnail in pixels.
    """
    return GalleryGrid(Pages(ranking, query_images, gallery_images, label_names, size), Path(tags), page)


class GalleryGrid(widgets.VBox):
    """A page of images to choose from by click; `tags` maps a path to its (action, label)."""

    def __init__(self, pages: Pages, file: Path, page: int):
        self.pages, self.file, self.size = pages, file, page
        self.key = f"recnb-{id(self)}"
        self.errors, self.tags = mistakes(pages.ranking), read_tags(file)
        self.here: list[tuple[str, int]] = []  # the images of the page shown
        self.find = widgets.Text(placeholder="find a name or file")
        self.order = widgets.Dropdown(options=ORDERS, layout=widgets.Layout(width="auto"))
        self.page = widgets.IntSlider(
            description="page", min=1, max=1, continuous_update=False, style={"description_width": "initial"}
        )
        self.where, self.said = widgets.Label(), widgets.Label()
        names = sorted({pages.identity(*image) for image in self.errors})
        self.name = widgets.Combobox(options=names[:2000], placeholder="the right name")
        self.actions = {text: widgets.Button(description=text) for text in ("relabel", "exclude", "no tag")}
        self.style_sheet, self.grid = widgets.HTML(), widgets.Box().add_class("recnb-hits")
        self.tiles = [self._tile(i) for i in range(page)]
        style = widgets.HTML(f"<style>{source('gallery.css')}{source('widget.css')}</style>")
        tagging = line(widgets.Label("click on images, then"), self.name, *self.actions.values(), self.said)
        super().__init__(
            [style, self.style_sheet, line(self.page, self.where, self.order, self.find), tagging, self.grid]
        )
        self.add_class("recnb").add_class(self.key)
        self.page.observe(self._show, "value")
        for control in (self.find, self.order):
            control.observe(self._list, "value")
        for action, button in self.actions.items():
            button.on_click(lambda _, action=action: self.tag(action))
        self._list()

    def _tile(self, i: int) -> widgets.VBox:
        button = widgets.ToggleButton().add_class("recnb-hit").add_class(f"g{i}")
        return widgets.VBox([button, widgets.HTML()]).add_class("recnb-tile")

    def _text(self, image: tuple[str, int]) -> str:
        return f"{self.pages.identity(*image)} {self.pages.name(*image)}"

    def _list(self, _=None) -> None:
        """Find the images to page through, after a change of order or filter."""
        wanted = self.find.value.lower()
        self.found = [image for image in self.errors if not wanted or wanted in self._text(image).lower()]
        if self.order.value != "number":
            by_name = self.order.value == "name"
            self.found.sort(key=self._text if by_name else lambda image: -self.errors[image])
        self.page.max = max(math.ceil(len(self.found) / self.size), 1)
        self._show()

    def _show(self, _=None) -> None:
        start = (self.page.value - 1) * self.size
        self.here = self.found[start : start + self.size]
        last = start + len(self.here)
        self.where.value = f"{start + 1:,} to {last:,} of {len(self.found):,} images" if self.here else "no image"
        self.style_sheet.value = f"<style>{''.join(map(self._fill, self.tiles, self.here, range(self.size)))}</style>"
        self.grid.children = self.tiles[: len(self.here)]

    def _fill(self, tile: widgets.VBox, image: tuple[str, int], i: int) -> str:
        """Return the style of a tile that now shows the image and what is known of it."""
        button, note = tile.children
        button.value, button.tooltip = False, self.pages.name(*image)
        action, label = self.tags.get(self._path(image), ("", ""))
        note.value = self.pages.show("tag", *image, self.errors[image], action, printable(label))
        frame = "var(--wrong)" if self.errors[image] else "var(--line)"
        picture = f"background-image: url({self.pages.uri(*image)})"
        return f".{self.key} .g{i}.g{i} {{ {picture}; border: 3px solid {frame}; }}\n"

    def _path(self, image: tuple[str, int]) -> str:
        picture = self.pages.images[image[0]][image[1]]
        return str(Path(picture).absolute()) if isinstance(picture, (str, Path)) else ""

    def tag(self, action: str) -> None:
        """Tag the images chosen on this page ("relabel", "exclude", "no tag") and write the file."""
        chosen = [image for image, tile in zip(self.here, self.tiles, strict=False) if tile.children[0].value]
        paths, label = [self._path(image) for image in chosen], self.name.value.strip()
        if action == "relabel" and not label:
            self.said.value = "give the right name first"
        elif not all(paths):
            self.said.value = "only image files can be tagged"
        else:
            self.tags = {path: tag for path, tag in self.tags.items() if path not in paths}
            if action != "no tag":
                self.tags |= dict.fromkeys(paths, (action, label if action == "relabel" else ""))
            write_tags(self.file, self.tags)
            self.said.value = f"{len(self.tags):,} tagged in {self.file}"
            self._show()


def mistakes(ranking: Ranking) -> dict[tuple[str, int], int]:
    """Return (side, row) of every image with how often it comes first wrongly or finds a wrong one first."""
    failed = np.flatnonzero(ranking.failed)
    first = ranking.ids[failed, (ranking.position[failed] == 1).argmax(1)]
    wrong = np.bincount(first, minlength=len(ranking.gallery_labels))
    own, alone = ranking.own[failed], np.flatnonzero(ranking.own < 0)
    wrong[own[own >= 0]] += 1
    items = {("item", i): count for i, count in enumerate(wrong.tolist())}
    return items | {("query", int(q)): int(ranking.failed[q]) for q in alone}


def read_tags(file: Path) -> dict[str, tuple[str, str]]:
    """Return the tags of a file by path; none where there is no file."""
    if not file.is_file():
        return {}
    table = read_csv(file)
    return {path: (action, label) for path, action, label in table[COLUMNS].itertuples(index=False)}


def write_tags(file: Path, tags: dict[str, tuple[str, str]]) -> None:
    """Write the tags, a row each."""
    write_csv(pd.DataFrame([(path, *tag) for path, tag in tags.items()], columns=COLUMNS), file)
