"""The gallery as a widget: live in a notebook, one query at a time.

What is shown is what a `Ranking` says, so it agrees with the metrics to the item. Thumbnails are made when first looked
at, so that any size of gallery will do.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
import traitlets
from PIL import Image

from recnb.data.images import opened, printable, reason
from recnb.gallery.figure import gallery_figure
from recnb.gallery.hits import Hits
from recnb.gallery.page import ORDERS, TEMPLATES, Hit, Pages, as_uri, gallery_html, source
from recnb.gallery.pictures import Names, Picture, label_text, read_picture
from recnb.retrieval.lists import END, RIGHT, WRONG, Ranking, changed
from recnb.retrieval.neighbours import knn

ANY, NONE, SIDES = "any", "none", ("the query", "the hit")
OWN, AGREE = "an image of your own", "where two pictures agree"


def gallery_widget(
    rankings: Ranking | Mapping[str, Ranking],
    query_images: Sequence[Picture],
    gallery_images: Sequence[Picture],
    k: int = 10,
    label_names: Names = None,
    order: str = "worst",
    size: int = 112,
    embed: Callable | None = None,
    gallery_features=None,
    regions: Callable | None = None,
    export_folder: str | Path = ".",
) -> GalleryWidget:
    """Return a widget over one ranking, or over several of the same queries and gallery, of which two can be compared.

    Without a kernel a notebook shows no more of this than its last page: `gallery_static` is the form that lives on.

    Args:
        rankings: one ranking, or several by name.
        query_images: a file, image or array for each query.
        gallery_images: the same for each gallery item.
        k: how many hits are shown at first.
        label_names: from identity to text, a list or a mapping.
        order: "worst" or "best" AP first, or "index".
        size: the largest width and height of a thumbnail in pixels.
        embed: picture -> (D,), to search with images of one's own.
        gallery_features: (G, D), so that any gallery item can be made the query.
        regions: (picture, picture) -> two heats (H, W) in [0, 1], as `recnb.gallery.regions.agreement` makes them.
        export_folder: where a view is saved.
    """
    named = {"ranking": rankings} if isinstance(rankings, Ranking) else dict(rankings)
    pages = {name: Pages(ranking, query_images, gallery_images, label_names, size) for name, ranking in named.items()}
    first = next(iter(pages.values()))
    for other in pages.values():
        other.uri = first.uri  # one cache of thumbnails for all
    return GalleryWidget(pages, k, order, embed, gallery_features, regions, Path(export_folder))


def line(*controls: widgets.Widget) -> widgets.Box:
    """Return a row of controls that wraps."""
    return widgets.Box(controls).add_class("recnb-line")


class GalleryWidget(widgets.VBox):
    """A query with its hits. `query` is the row shown, and may be set; `rows` are the queries that the slider walks."""

    query = traitlets.Int(0)

    def __init__(
        self,
        pages: dict[str, Pages],
        k: int,
        order: str,
        embed: Callable | None,
        gallery_features,
        regions: Callable | None,
        export_folder: Path,
    ):
        self.pages_of, self.embed, self.features, self.regions = pages, embed, gallery_features, regions
        self.export_folder, self.rng = export_folder, np.random.default_rng(0)
        self.rows: list[int] = []
        self._make_controls(k, order)
        self.about, self.later = widgets.HTML(), widgets.HTML()
        self.hits = Hits(self.pages, self.pick)
        found = widgets.VBox([self.hits, self.later]).add_class("recnb-found")
        super().__init__(
            [
                widgets.HTML(f"<style>{source('gallery.css')}{source('widget.css')}</style>"),
                line(self.place, self.where, self.next_failure, self.random, self.failures),
                line(self.k, self.order, self.find, self.ranking, self.compare),
                *self._panels(),
                widgets.Box([self.about, found]).add_class("recnb-view"),
            ]
        )
        self.add_class("recnb")
        self._observe()
        self._choose(first=True)

    # ---- controls ----

    def _make_controls(self, k: int, order: str) -> None:
        ranking, names = self.pages.ranking, list(self.pages_of)
        depth = ranking.ids.shape[1]

        def made(kind, width: str = "auto", shown: bool = True, **options):
            layout = widgets.Layout(width=width, display=None if shown else "none")
            style = {} if kind is widgets.Button else {"style": {"description_width": "initial"}}
            return kind(layout=layout, **style, **options)

        self.place = made(widgets.IntSlider, "300px", description="query", readout=False)
        self.where, self.random = widgets.Label(), made(widgets.Button, description="random", icon="random")
        self.next_failure = made(widgets.Button, description="next failure", icon="forward")
        self.failures = made(widgets.Checkbox, description="failures only", indent=False)
        self.k = made(
            widgets.IntSlider, "220px", value=min(k, depth), min=1, max=depth, description="k", continuous_update=False
        )
        self.order = made(widgets.Dropdown, options=[(text, value) for value, text in ORDERS.items()], value=order)
        self.find = made(widgets.Text, "170px", placeholder="find a name or file")
        several = len(names) > 1
        self.ranking = made(widgets.Dropdown, shown=several, options=names, description="shown")
        self.compare = made(widgets.Dropdown, shown=several, options=[NONE, *names], description="beside it")
        identities = sorted({self.pages.identity("query", q) for q in range(len(ranking))})
        self.identity = made(
            widgets.Combobox, "220px", options=identities[:2000], placeholder=ANY, description="identity"
        )
        self.confused = made(widgets.Dropdown, "260px", options=[(ANY, ANY)], description="confused")
        cameras = [] if ranking.query_cameras is None else np.unique(ranking.query_cameras).tolist()
        self.camera = made(widgets.Dropdown, shown=bool(cameras), options=[ANY, *cameras], description="camera")
        self.change = made(widgets.Dropdown, shown=several, options=[("all", "all")], description="changed")

    def _panels(self) -> tuple[widgets.Box, widgets.Stack]:
        """Return what is looked at now and then, one panel at most open, below a row of buttons that open them."""
        panels = {"filters": line(self.identity, self.confused, self.camera, self.change)}
        self.upload, self.path = widgets.FileUpload(accept="image/*"), widgets.Text(placeholder="path of an image")
        place = {"layout": widgets.Layout(width="auto"), "style": {"description_width": "initial"}}
        self.hit, self.heat = widgets.Dropdown(description="hit", **place), widgets.HTML()
        self.as_html, self.as_png = (widgets.Button(description=text, icon="download") for text in ("HTML", "PNG"))
        self.saved = widgets.Label()
        if self.embed and self.features is not None:
            panels[OWN] = line(self.upload, self.path)
        if self.regions:
            panels[AGREE] = widgets.VBox([self.hit, self.heat])
        panels["save this view"] = line(self.as_html, self.as_png, self.saved)
        boxes = [panel.add_class("recnb-panel") for panel in panels.values()]
        self.panels = widgets.Stack(boxes, titles=tuple(panels), selected_index=None)
        self.tabs = [widgets.ToggleButton(description=title) for title in panels]
        for i, tab in enumerate(self.tabs):
            tab.observe(partial(self._open, i), "value")
        return line(*self.tabs), self.panels

    def _open(self, i: int, change: dict) -> None:
        if change["new"]:
            self.panels.selected_index = i
            for tab in self.tabs[:i] + self.tabs[i + 1 :]:
                tab.value = False
        elif self.panels.selected_index == i:
            self.panels.selected_index = None

    def _observe(self) -> None:
        for control in (self.order, self.failures, self.find, self.identity, self.confused, self.camera, self.change):
            control.observe(self._list, "value")
        for control in (self.ranking, self.compare):
            control.observe(self._choose, "value")
        self.place.observe(lambda change: self._go(change["new"]), "value")
        self.k.observe(self._show, "value")
        self.observe(self._show, "query")
        self.next_failure.on_click(lambda _: self._seek_failure())
        self.random.on_click(lambda _: self._go(int(self.rng.integers(max(len(self.rows), 1)))))
        self.hit.observe(self._show_heat, "value")
        self.panels.observe(self._show_heat, "selected_index")
        self.upload.observe(self._uploaded, "value")
        self.path.observe(self._named, "value")
        self.as_html.on_click(lambda _: self.save_html())
        self.as_png.on_click(lambda _: self.save_png())

    @property
    def pages(self) -> Pages:
        """The articles of the ranking shown."""
        return self.pages_of[self.ranking.value] if hasattr(self, "ranking") else next(iter(self.pages_of.values()))

    @property
    def shown(self) -> dict[str, Pages]:
        """The ranking shown and, where there is one, the ranking beside it."""
        names = [self.ranking.value, *([] if self.compare.value == NONE else [self.compare.value])]
        return {name: self.pages_of[name] for name in names}

    # ---- which queries ----

    def _choose(self, _=None, first: bool = False) -> None:
        """Bring the filters in step with the rankings chosen."""
        called, pairs = partial(label_text, names=self.pages.label_names), Counter(self._confusions().values())
        texts = [(f"{' taken for '.join(map(called, pair))} ({n})", pair) for pair, n in pairs.most_common(100)]
        self.confused.options = [(ANY, ANY), *texts]
        fixed, broken = self.changed()
        self.change.options = (
            [("all", "all")]
            if self.compare.value == NONE
            else [
                ("all", "all"),
                (f"fixed by {self.compare.value} ({len(fixed)})", "fixed"),
                (f"broken by {self.compare.value} ({len(broken)})", "broken"),
            ]
        )
        self._list(first=first)

    def _confusions(self) -> dict[int, tuple]:
        """Return each failed query's own identity and that of its first hit."""
        ranking = self.pages.ranking
        failed = np.flatnonzero(ranking.failed)
        first = ranking.ids[failed, (ranking.position[failed] == 1).argmax(1)]
        labels = zip(ranking.query_labels[failed].tolist(), ranking.gallery_labels[first].tolist(), strict=True)
        return dict(zip(failed.tolist(), labels, strict=True))

    def changed(self) -> tuple[list[int], list[int]]:
        """Return the queries whose first hit only the ranking beside has right, and those where only this one has."""
        if self.compare.value == NONE:
            return [], []
        fixed, broken = changed(self.pages.ranking, self.pages_of[self.compare.value].ranking)
        return fixed.tolist(), broken.tolist()

    def _list(self, _=None, first: bool = False) -> None:
        """Find the rows to walk after a change of order or filter; the query shown stays where it is one of them."""
        ranking, keep = self.pages.ranking, np.ones(len(self.pages.ranking), bool)
        if self.failures.value:
            keep &= ranking.failed
        if self.camera.value != ANY:
            keep &= ranking.query_cameras == self.camera.value
        if self.change.value != "all":
            keep &= np.isin(np.arange(len(ranking)), self.changed()[self.change.value == "broken"])
        if self.confused.value != ANY:
            keep &= np.isin(
                np.arange(len(ranking)), [q for q, pair in self._confusions().items() if pair == self.confused.value]
            )
        wanted, own = self.find.value.lower(), self.identity.value
        text = {
            q: (self.pages.identity("query", q), self.pages.name("query", q)) for q in np.flatnonzero(keep).tolist()
        }
        self.rows = [
            q
            for q in ranking.order(self.order.value).tolist()
            if q in text and own in ("", text[q][0]) and wanted in " ".join(text[q]).lower()
        ]
        if self.rows and (first or self.query not in self.rows):
            self.query = self.rows[0]
        self._show()

    def _clear_filters(self) -> None:
        for control, value in (
            (self.failures, False),
            (self.find, ""),
            (self.identity, ""),
            (self.confused, ANY),
            (self.camera, ANY),
            (self.change, "all"),
        ):
            control.value = value

    def _go(self, place: int) -> None:
        if place < len(self.rows):
            self.query = self.rows[place]

    def _seek_failure(self) -> None:
        """Go to the next failure behind the query shown, from the end on to the first."""
        here = self.rows.index(self.query) + 1 if self.query in self.rows else 0
        failures = [q for q in self.rows[here:] + self.rows[:here] if self.pages.ranking.failed[q]]
        if failures:
            self.query = failures[0]

    def pick(self, item: int) -> None:
        """Make a gallery item the query: one of the queries where it is one, otherwise by a search of its own."""
        if item in self.pages.query_of:
            self.query = self.pages.query_of[item]
        elif self.features is not None:
            labels = self.pages.ranking.gallery_labels
            self._show_found(
                self.features[item],
                self.pages.uri("item", item),
                self.pages.identity("item", item),
                np.where(labels == labels[item], RIGHT, WRONG),
                item,
            )

    # ---- what is seen ----

    def _show(self, _=None) -> None:
        if self.query not in self.rows and self.rows:  # a hit was followed out of the filters
            self._clear_filters()
        place = self.rows.index(self.query) if self.query in self.rows else 0
        with self.place.hold_trait_notifications():  # one by one, a smaller max would move the slider and the query
            self.place.max, self.place.value = max(len(self.rows) - 1, 0), place
        self.where.value = f"{place + 1:,} of {len(self.rows):,}" if self.rows else "no query is left by the filters"
        self.about.value = self.pages.show("article", self.query, self.k.value, hits=False)
        hits = [pages.hits(self.query, self.k.value) for pages in self.shown.values()]
        places = [[hit for hit in place if hit] for place in zip_longest(*hits)]
        self.hits.show(self.pages.show("heading", self.shown, self.query, len(hits[0])), places, self._pickable)
        self.later.value = f'<div class="found">{self.pages.show("missed", self.query, self.k.value)}</div>'
        self.hit.options = [(f"{i}. {self.pages.name('item', hit.item)}", hit.item) for i, hit in enumerate(hits[0], 1)]
        self.hit.value = hits[0][0].item if hits[0] else None
        self._show_heat()

    def _pickable(self, item: int) -> bool:
        return item in self.pages.query_of or self.features is not None

    def _named(self, change: dict) -> None:
        if change["new"]:  # else the field was emptied
            self._search(change["new"], change["new"])

    def _uploaded(self, change: dict) -> None:
        for file in change["new"]:
            self._search(io.BytesIO(file["content"]), file["name"])

    def _search(self, picture: str | io.BytesIO, name: str) -> None:
        """Show what an image of one's own finds; in its place a sentence where it cannot be read."""
        try:
            with opened(picture) as image:
                image = read_picture(image, 512)
        except Exception as error:  # decoders raise whatever a broken file leads them to
            self._show_own(name, note=f"{printable(name)} cannot be searched: it {reason(error)}.")
            self.hits.show("", [], self._pickable)
            return
        if self.embed is None:  # there is no panel to search from
            return
        states = np.full(len(self.pages.ranking.gallery_labels), END)
        self._show_found(np.asarray(self.embed(image)), as_uri(image), name, states)

    def _show_own(self, name: str, uri: str = "", note: str = "") -> None:
        self.about.value = TEMPLATES.get_template("own.html").render(name=printable(name), uri=uri, note=note)
        self.later.value = ""

    def _show_found(self, feature, uri: str, name: str, states: np.ndarray, own: int | None = None) -> None:
        """Show a query that is none of the ranking's: its nearest gallery items, with neither rank nor AP."""
        exclude = None if own is None else np.array([own])
        scores, ids = knn(np.asarray(feature, np.float32)[None], self.features, self.k.value, exclude=exclude)
        self._show_own(name, uri, "Searched by cosine; counts in no metric.")
        found = enumerate(zip(ids[0].tolist(), scores[0].tolist(), strict=True), 1)
        hits = [Hit(item, str(states[item]), f"{n} · {score:.3f}", f"hit {n}") for n, (item, score) in found]
        self.hits.show(f"<h3>First {len(hits)}</h3>", [[hit] for hit in hits], self._pickable)

    def _show_heat(self, _=None) -> None:
        """Show the picture of the query and of the hit chosen, each with the regions that agree with the other."""
        opened = self.panels.selected_index
        if self.regions is None or opened is None or self.panels.titles[opened] != AGREE or self.hit.value is None:
            return
        pair = [self.pages.images["query"][self.query], self.pages.images["item"][self.hit.value]]
        heats = self.regions(*pair)
        low, high = min(map(np.min, heats)), max(map(np.max, heats))
        uris = [as_uri(overlaid(x, (heat - low) / max(high - low, 1e-6))) for x, heat in zip(pair, heats, strict=True)]
        self.heat.value = TEMPLATES.get_template("heat.html").render(
            low=low, high=high, pictures=dict(zip(SIDES, uris, strict=True))
        )

    # ---- what is kept ----

    def save_html(self) -> Path:
        """Return the file of the queries listed, up to a hundred, as a page that stands alone."""
        path, pages = self.export_folder / "gallery_view.html", self.pages
        gallery_html(
            pages.ranking,
            pages.images["query"],
            pages.images["item"],
            path,
            self.rows,
            self.k.value,
            label_names=pages.label_names,
            size=pages.size,
        )
        self.saved.value = f"written: {path}"
        return path

    def save_png(self) -> Path:
        """Return the file of the query shown, as a figure."""
        path, pages = self.export_folder / f"query_{self.query}.png", self.pages
        path.parent.mkdir(parents=True, exist_ok=True)
        gallery_figure(
            pages.ranking, pages.images["query"], pages.images["item"], [self.query], self.k.value, pages.label_names
        ).savefig(path)
        self.saved.value = f"written: {path}"
        return path


def overlaid(picture: Picture, heat: np.ndarray) -> Image.Image:
    """Return the picture under its heat (H, W) in [0, 1]: the hotter, the more of the colour is seen."""
    image = read_picture(picture, 224)
    heat = np.asarray(Image.fromarray(np.asarray(heat, np.float32)).resize(image.size, Image.Resampling.BILINEAR))
    colour, share = mpl.colormaps["inferno"](heat)[..., :3] * 255, 0.75 * heat[..., None]
    return Image.fromarray(((1 - share) * np.asarray(image) + share * colour).round().astype(np.uint8))
