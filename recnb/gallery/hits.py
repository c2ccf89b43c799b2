"""The hits of the gallery widget: a grid of tiles, each with a button, whose clicks reach Python."""

from collections.abc import Callable, Sequence
from itertools import islice

import ipywidgets as widgets

from recnb.gallery.page import PATHS, Hit, Pages
from recnb.retrieval.lists import EXCLUDED, RIGHT, WRONG

SIGN = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 20 20'><circle cx='10' cy='10' r='10' fill='{colour}'/>"
    "<path d='{path}' fill='none' stroke='white' stroke-width='2.2' stroke-linecap='round'/></svg>"
)
FILL = {RIGHT: "%230072B2", WRONG: "%23D55E00", EXCLUDED: "%23767676"}  # '#' escaped, as a URI wants it


class Hits(widgets.VBox):
    """A heading over a grid of places, each with a tile for every ranking shown, so that rankings read side by side.

    A click on a tile calls `pick(item)`. Tiles are used again for the next query.
    """

    def __init__(self, pages: Pages, pick: Callable[[int], None]):
        self.pages, self.pick = pages, pick
        self.places: list[list[Hit]] = []
        self.tiles: list[widgets.VBox] = []
        self.cells: list[widgets.VBox] = []
        self.title, self.style_sheet, self.row = widgets.HTML(), widgets.HTML(), widgets.Box()
        self.row.add_class("recnb-hits")
        self.key = f"recnb-{id(self)}"
        super().__init__([self.style_sheet, self.title, self.row])
        self.add_class(self.key)

    def show(self, title: str, places: Sequence[Sequence[Hit]], pickable: Callable[[int], bool]) -> None:
        """Show the hits of a query.

        Args:
            title: the heading, as HTML.
            places: for each place of the grid, the hit of each ranking there.
            pickable: gallery row -> whether it can be made the query.
        """
        self.places = [list(place) for place in places]
        hits = [hit for place in self.places for hit in place]
        while len(self.tiles) < len(hits):
            self._add_tile()
        for tile, hit in zip(self.tiles, hits, strict=False):
            button, note = tile.children
            button.disabled, name = not pickable(hit.item), self.pages.name("item", hit.item)
            button.tooltip = f"{name}: {'not among the queries' if button.disabled else 'make it the query'}"
            note.value = self.pages.show("note", hit)
        self.row.children = self._laid_out()
        self.title.value = title
        self.style_sheet.value = f"<style>{''.join(self._rule(i, hit) for i, hit in enumerate(hits))}</style>"

    def _laid_out(self) -> list[widgets.VBox]:
        """Return the tiles in their order, with several rankings those of each place in a cell."""
        tiles = iter(self.tiles)
        if max(map(len, self.places), default=1) == 1:
            return list(islice(tiles, len(self.places)))
        while len(self.cells) < len(self.places):
            self.cells.append(widgets.VBox().add_class("recnb-place"))
        cells = self.cells[: len(self.places)]
        for cell, place in zip(cells, self.places, strict=True):
            cell.children = list(islice(tiles, len(place)))
        return cells

    def _rule(self, i: int, hit: Hit) -> str:
        """Return the style of a tile's button: its sign over its picture, framed in the colour of its state."""
        layers = [(f"url({self.pages.uri('item', hit.item)})", "contain", "center")]
        if hit.state:
            sign = SIGN.format(colour=FILL[hit.state], path=PATHS[hit.state]).replace("<", "%3C").replace(">", "%3E")
            layers.insert(0, (f'url("data:image/svg+xml,{sign}")', "22px", "right 2px top 2px"))
        pictures, sizes, places = (", ".join(values) for values in zip(*layers, strict=True))
        frame = f"3px {'dashed' if hit.state == EXCLUDED else 'solid'} var(--{hit.state or 'line'})"
        return (
            f".{self.key} .h{i}.h{i} {{ background-image: {pictures}; background-size: {sizes}; "
            f"background-position: {places}; border: {frame}; }}\n"
        )

    def _add_tile(self) -> None:
        i, button = len(self.tiles), widgets.Button()
        button.add_class("recnb-hit").add_class(f"h{i}")
        button.on_click(lambda _: self.pick([hit.item for place in self.places for hit in place][i]))
        self.tiles.append(widgets.VBox([button, widgets.HTML()]).add_class("recnb-tile"))
