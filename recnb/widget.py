"""The gallery as widgets: the articles of `recnb.page` live in a notebook, or kept in one that has no kernel."""
from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as widgets
import traitlets

from recnb.gallery import Names, Picture, Ranking, choose_rows
from recnb.page import STYLE, Pages

ORDERS = [("worst AP first", "worst"), ("best AP first", "best"), ("by number", "index")]


def gallery_widget(ranking: Ranking, query_images: Sequence[Picture], gallery_images: Sequence[Picture], k: int = 10,
                   label_names: Names = None, order: str = "worst", size: int = 112) -> GalleryWidget:
    """A widget that shows one query at a time; thumbnails are made when first shown, so any gallery size will do.

    Without a kernel it shows its last page and no more: `gallery_pages` is the form that lives on in a saved notebook.
    """
    return GalleryWidget(Pages(ranking, query_images, gallery_images, label_names, size), k, order)


class GalleryWidget(widgets.VBox):
    "A query with its hits. `query` is the row shown, and may be set; `rows` are the queries that the slider walks."

    query = traitlets.Int(0)

    def __init__(self, pages: Pages, k: int = 10, order: str = "worst"):
        wide, depth = widgets.Layout(width="auto"), pages.ranking.ids.shape[1]
        self.pages, self.rows = pages, []
        self.place = widgets.IntSlider(description="query", readout=False, layout=widgets.Layout(width="340px"))
        self.where = widgets.Label()
        self.order = widgets.Dropdown(options=ORDERS, value=order, layout=wide)
        self.failures = widgets.Checkbox(description="failures only", indent=False,
                                         layout=widgets.Layout(width="auto", margin="2px 2px 2px 12px"))
        self.next_failure = widgets.Button(description="next failure", icon="forward", layout=wide)
        self.k = widgets.IntSlider(min(k, depth), 1, depth, description="k", continuous_update=False)
        self.hit = widgets.Dropdown(options=[("", -1)], layout=widgets.Layout(width="auto", max_width="320px"))
        self.page = widgets.HTML()
        row = {"layout": widgets.Layout(flex_flow="row wrap", align_items="center")}
        super().__init__([widgets.HTML(f"<style>{STYLE}</style>"),
                          widgets.HBox([self.place, self.where, self.next_failure, self.failures], **row),
                          widgets.HBox([self.k, self.order, self.hit], **row), self.page])
        for control in (self.order, self.failures):
            control.observe(self._list, "value")
        self.place.observe(lambda change: self._go(change["new"]), "value")
        self.k.observe(self._show, "value")
        self.hit.observe(lambda change: self._follow(change["new"]), "value")
        self.next_failure.on_click(lambda _: self._seek_failure())
        self.observe(self._show, "query")
        self._list(first=True)

    def _list(self, _=None, first: bool = False) -> None:
        "The rows to walk, after a change of order or filter; the query shown stays where it is one of them."
        ranking = self.pages.ranking
        order = ranking.order(self.order.value)
        self.rows = order[ranking.failed[order]].tolist() if self.failures.value else order.tolist()
        if self.rows and (first or self.query not in self.rows):
            self.query = self.rows[0]
        self._show()

    def _go(self, place: int) -> None:
        if place < len(self.rows):
            self.query = self.rows[place]

    def _follow(self, query: int) -> None:
        if query >= 0:
            self.query = query

    def _seek_failure(self) -> None:
        "Goes to the next failure behind the query shown, from the end on to the first."
        here = self.rows.index(self.query) + 1 if self.query in self.rows else 0
        failures = [q for q in self.rows[here:] + self.rows[:here] if self.pages.ranking.failed[q]]
        if failures:
            self.query = failures[0]

    def _show(self, _=None) -> None:
        if self.query not in self.rows and self.rows:  # a hit was followed out of the filter
            self.failures.value = False
        place = self.rows.index(self.query) if self.query in self.rows else 0
        with self.place.hold_trait_notifications():  # one by one, a smaller max would move the slider and the query
            self.place.max, self.place.value = max(len(self.rows) - 1, 0), place
        self.where.value = f"{place + 1:,} of {len(self.rows):,}" if self.rows else "no query fails"
        self.page.value = self.pages.block(self.query, self.k.value)
        self.hit.options = [("make a hit the query", -1), *self._hits_among_queries()]

    def _hits_among_queries(self) -> list[tuple[str, int]]:
        ranking, query_of = self.pages.ranking, self.pages.query_of
        items = [int(item) for item in ranking.ids[self.query, :self.k.value] if item in query_of]
        return [(f"{self.pages.name('item', item)} ({self.pages.identity('item', item)})", query_of[item])
                for item in items]


def gallery_pages(ranking: Ranking, query_images: Sequence[Picture], gallery_images: Sequence[Picture],
                  rows: Sequence[int] | None = None, k: int = 8, label_names: Names = None,
                  size: int = 80) -> widgets.VBox:
    """A box of ready pages that can be paged without a kernel, in a saved notebook and in what nbconvert makes of it.

    rows: the queries, by default ten of `choose_rows`. Every page is stored in the notebook: about 40 KB each.
    """
    pages = Pages(ranking, query_images, gallery_images, label_names, size)
    rows = choose_rows(ranking, 10).tolist() if rows is None else [int(q) for q in rows]
    full = widgets.Layout(width="100%")
    stack = widgets.Stack([widgets.HTML(pages.block(q, k), layout=full) for q in rows], selected_index=0, layout=full)
    names = [f"{i + 1}. {pages.identity('query', q)}, AP {ranking.AP[q]:.3f}" for i, q in enumerate(rows)]
    choice = widgets.Dropdown(options=names, index=0, description="query", layout=widgets.Layout(width="auto"))
    slider = widgets.IntSlider(0, 0, len(rows) - 1, readout=False)
    for control in ((choice, "index"), (slider, "value")):  # linked in the browser: Python would end with the kernel
        widgets.jslink(control, (stack, "selected_index"))
    return widgets.VBox([widgets.HTML(f"<style>{STYLE}</style>"), widgets.HBox([choice, slider]), stack])
