"""The gallery as a widget: live in a notebook, one query at a time.

What is shown is what a `Ranking` says, so it agrees with the metrics to the item. Hits are buttons, since only a widget
can tell Python that it was clicked; thumbnails are made when first looked at, so that any size of gallery will do.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
import traitlets
from PIL import Image

from recnb.data.images import printable
from recnb.gallery.figure import gallery_figure
from recnb.gallery.page import ORDERS, PATHS, Pages, as_uri, gallery_html, source, wrapped
from recnb.gallery.pictures import Names, Picture, read_picture
from recnb.retrieval.lists import END, RIGHT, WRONG, Ranking, changed
from recnb.retrieval.search import knn

ANY, NONE, SIDES = "any", "none", ("the query", "the hit")
SIGN = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 20 20'><circle cx='10' cy='10' r='10' fill='{colour}'/>"
    "<path d='{path}' fill='none' stroke='white' stroke-width='2.2' stroke-linecap='round'/></svg>"
)
FILL = {RIGHT: "%230072B2", WRONG: "%23D55E00", "excluded": "%23767676"}  # '#' escaped, as a URI wants it


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
    """A widget over one ranking, or over several of the same queries and gallery by name, of which two can be compared.

    gallery_features (G, D): any gallery item can be made the query. embed: picture -> (D,), for images of one's own.
    regions: (picture, picture) -> two heats (H, W) in [0, 1], as `recnb.gallery.regions.agreement` makes them. Without
    a kernel a notebook shows no more of this than its last page: `gallery_static` is the form that lives on.
    """
    named = {"ranking": rankings} if isinstance(rankings, Ranking) else dict(rankings)
    pages = {name: Pages(ranking, query_images, gallery_images, label_names, size) for name, ranking in named.items()}
    first = next(iter(pages.values()))
    for other in pages.values():
        other.uri = first.uri  # one cache of thumbnails for all
    return GalleryWidget(pages, k, order, embed, gallery_features, regions, Path(export_folder))


class Hits(widgets.VBox):
    """A heading and a row of tiles, each a button with a picture and a note.

    `pick(item)` is called for the one clicked.
    """

    def __init__(self, pages: Pages, pick: Callable[[int], None]):
        self.pages, self.pick, self.items, self.tiles = pages, pick, [], []
        self.title, self.style_sheet = widgets.HTML(), widgets.HTML()
        self.row = widgets.Box(layout=widgets.Layout(flex_flow="row wrap"))
        self.key = f"recnb-{id(self)}"
        super().__init__([self.style_sheet, self.title, self.row], layout=widgets.Layout(flex="1 1 320px"))
        self.add_class(self.key)

    def show(self, title: str, tiles: list[tuple[int, str, str]], pickable: Callable[[int], bool]) -> None:
        """Show (gallery row, state, caption) tiles, whose buttons are used again for the next query."""
        self.items = [item for item, _, _ in tiles]
        while len(self.tiles) < len(tiles):
            self._add_tile()
        rules = []
        for i, (item, state, caption) in enumerate(tiles):
            button, note = self.tiles[i].children
            identity, name = self.pages.identity("item", item), self.pages.name("item", item)
            button.disabled = not pickable(item)
            button.tooltip = f"{name}: {'make it the query' if pickable(item) else 'not among the queries'}"
            cameras = self.pages.ranking.gallery_cameras
            camera = "" if cameras is None else f"<small>{escape(printable(f'camera {cameras[item]}'))}</small>"
            note.value = f'<div class="recnb-note"><b>{caption}</b><small>{wrapped(identity)}</small>{camera}</div>'
            rules.append(self._rule(i, item, state))
        self.row.children = self.tiles[: len(tiles)]
        self.title.value = f"<h3>{escape(title)}</h3>"
        self.style_sheet.value = f"<style>{''.join(rules)}</style>"

    def _rule(self, i: int, item: int, state: str) -> str:
        """The style of a tile's button: its sign over its picture, framed in the colour of its state."""
        layers = [(f"url({self.pages.uri('item', item)})", "contain", "center")]
        if state:
            sign = SIGN.format(colour=FILL[state], path=PATHS[state]).replace("<", "%3C").replace(">", "%3E")
            layers.insert(0, (f'url("data:image/svg+xml,{sign}")', "22px", "right 2px top 2px"))
        pictures, sizes, places = (", ".join(values) for values in zip(*layers, strict=True))
        frame = f"3px {'dashed' if state == 'excluded' else 'solid'} var(--{state or 'line'})"
        return (
            f".{self.key} .h{i}.h{i} {{ background-image: {pictures}; background-size: {sizes}; "
            f"background-position: {places}; border: {frame}; }}\n"
        )

    def _add_tile(self) -> None:
        i, button = len(self.tiles), widgets.Button()
        button.add_class("recnb-hit").add_class(f"h{i}")
        button.on_click(lambda _: self.pick(self.items[i]))
        self.tiles.append(widgets.VBox([button, widgets.HTML()], layout=widgets.Layout(width="116px")))


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
        self.export_folder, self.rows, self.rng = export_folder, [], np.random.default_rng(0)
        self._make_controls(k, order)
        self.about, self.later = widgets.HTML(layout=widgets.Layout(flex="1 1 190px")), widgets.HTML()
        self.hits, self.others = (Hits(self.pages, self.pick) for _ in range(2))
        room = {"flex": "999 1 320px"}
        own = widgets.VBox([self.hits, self.later], layout=widgets.Layout(**room))
        found = widgets.Box([own, self.others], layout=widgets.Layout(flex_flow="row wrap", **room))
        line = {"layout": widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="4px 12px")}
        super().__init__(
            [
                widgets.HTML(f"<style>{source('gallery.css')}{source('widget.css')}</style>"),
                widgets.HBox([self.place, self.where, self.next_failure, self.random, self.failures], **line),
                widgets.HBox([self.k, self.order, self.find, self.ranking, self.compare], **line),
                self._panels(),
                widgets.Box(
                    [self.about, found],
                    layout=widgets.Layout(flex_flow="row wrap", grid_gap="8px 24px", margin="10px 0 0 0"),
                ),
            ]
        )
        self.add_class("recnb")
        self._observe()
        self._choose(first=True)

    # ---- controls ----

    def _make_controls(self, k: int, order: str) -> None:
        ranking, names, plain = self.pages.ranking, list(self.pages_of), {"description_width": "initial"}
        wide, depth = widgets.Layout(width="auto"), ranking.ids.shape[1]
        self.place = widgets.IntSlider(
            description="query", readout=False, style=plain, layout=widgets.Layout(width="300px")
        )
        self.where, self.random = widgets.Label(), widgets.Button(description="random", icon="random", layout=wide)
        self.next_failure = widgets.Button(description="next failure", icon="forward", layout=wide)
        self.failures = widgets.Checkbox(description="failures only", indent=False, layout=wide)
        self.k = widgets.IntSlider(
            min(k, depth),
            1,
            depth,
            description="k",
            continuous_update=False,
            style=plain,
            layout=widgets.Layout(width="220px"),
        )
        self.order = widgets.Dropdown(
            options=[(text, value) for value, text in ORDERS.items()], value=order, layout=wide
        )
        self.find = widgets.Text(placeholder="find a name or file", layout=widgets.Layout(width="170px"))
        several = widgets.Layout(width="auto", display="flex" if len(names) > 1 else "none")
        self.ranking = widgets.Dropdown(options=names, description="shown", style=plain, layout=several)
        self.compare = widgets.Dropdown(options=[NONE, *names], description="beside it", style=plain, layout=several)
        identities = sorted({self.pages.identity("query", q) for q in range(len(ranking))})
        self.identity = widgets.Combobox(
            options=identities[:2000], placeholder=ANY, style=plain, description="identity"
        )
        self.confused = widgets.Dropdown(options=[(ANY, ANY)], description="confused", style=plain, layout=wide)
        cameras = [] if ranking.query_cameras is None else np.unique(ranking.query_cameras).tolist()
        self.camera = widgets.Dropdown(options=[ANY, *cameras], description="camera", style=plain, layout=wide)
        self.change = widgets.Dropdown(options=[("all", "all")], description="changed", style=plain, layout=wide)

    def _panels(self) -> widgets.Accordion:
        """What is looked at now and then: filters, an image of one's own, the heat map, the export."""
        row = {"layout": widgets.Layout(flex_flow="row wrap", grid_gap="4px 12px")}
        panels = {"filters": widgets.HBox([self.identity, self.confused, self.camera, self.change], **row)}
        self.upload, self.path = widgets.FileUpload(accept="image/*"), widgets.Text(placeholder="path of an image")
        self.hit, self.heat = widgets.Dropdown(description="hit", layout=widgets.Layout(width="auto")), widgets.HTML()
        self.as_html, self.as_png = (widgets.Button(description=text, icon="download") for text in ("HTML", "PNG"))
        self.said = widgets.HTML()
        if self.embed and self.features is not None:
            panels["an image of your own"] = widgets.HBox([self.upload, self.path, self.said], **row)
        if self.regions:
            panels["where two pictures agree"] = widgets.VBox([self.hit, self.heat])
        self.saved = widgets.Label()
        panels["save this view"] = widgets.HBox([self.as_html, self.as_png, self.saved], **row)
        self.panels = widgets.Accordion(list(panels.values()), titles=tuple(panels), selected_index=None)
        return self.panels

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
        self.upload.observe(lambda change: self._search(*(io.BytesIO(f["content"]) for f in change["new"])), "value")
        self.path.observe(lambda change: self._search(*filter(None, [change["new"]])), "value")
        self.as_html.on_click(lambda _: self.save_html())
        self.as_png.on_click(lambda _: self.save_png())

    @property
    def pages(self) -> Pages:
        """The articles of the ranking shown."""
        return self.pages_of[self.ranking.value] if hasattr(self, "ranking") else next(iter(self.pages_of.values()))

    # ---- which queries ----

    def _choose(self, _=None, first: bool = False) -> None:
        """Brings the filters in step with the rankings chosen."""
        confusions = self._confusions()
        example = {pair: q for q, pair in confusions.items()}
        self.confused.options = [
            (ANY, ANY),
            *(
                (f"{' taken for '.join(self._texts(example[pair]))} ({n})", pair)
                for pair, n in Counter(confusions.values()).most_common(100)
            ),
        ]
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
        """Each failed query's own identity and that of its first hit."""
        ranking = self.pages.ranking
        failed = np.flatnonzero(ranking.failed)
        first = ranking.ids[failed, (ranking.position[failed] == 1).argmax(1)]
        labels = zip(ranking.query_labels[failed].tolist(), ranking.gallery_labels[first].tolist(), strict=True)
        return dict(zip(failed.tolist(), labels, strict=True))

    def _texts(self, q: int) -> list[str]:
        """What a failed query's identity and that of its first hit are called."""
        ranking = self.pages.ranking
        return [
            self.pages.identity("query", q),
            self.pages.identity("item", ranking.ids[q, (ranking.position[q] == 1).argmax()]),
        ]

    def changed(self) -> tuple[list[int], list[int]]:
        """The queries whose first hit the ranking beside has right and this one wrong, and the other way round."""
        if self.compare.value == NONE:
            return [], []
        return tuple(rows.tolist() for rows in changed(self.pages.ranking, self.pages_of[self.compare.value].ranking))

    def _list(self, _=None, first: bool = False) -> None:
        """The rows to walk, after a change of order or filter; the query shown stays where it is one of them."""
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
        """Goes to the next failure behind the query shown, from the end on to the first."""
        here = self.rows.index(self.query) + 1 if self.query in self.rows else 0
        failures = [q for q in self.rows[here:] + self.rows[:here] if self.pages.ranking.failed[q]]
        if failures:
            self.query = failures[0]

    def pick(self, item: int) -> None:
        """Makes a gallery item the query: one of the queries where it is one, otherwise by a search of its own."""
        if item in self.pages.query_of:
            self.query = self.pages.query_of[item]
        elif self.features is not None:
            labels = self.pages.ranking.gallery_labels
            self._show_found(
                self.features[item],
                self.pages.show("picture", "item", item, "the query"),
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
        beside = None if self.compare.value == NONE else self.pages_of[self.compare.value]
        self._show_hits(self.hits, self.pages, self.ranking.value if beside else "")
        self.later.value = f'<div class="found">{self.pages.show("missed", self.query, self.k.value)}</div>'
        self.others.layout.display = "flex" if beside else "none"
        if beside:
            self._show_hits(self.others, beside, self.compare.value)
        shown = self.hits.items
        self.hit.options = [(f"{i + 1}. {self.pages.name('item', item)}", item) for i, item in enumerate(shown)]
        self.hit.value = shown[0] if shown else None
        self._show_heat()

    def _show_hits(self, hits: Hits, pages: Pages, name: str) -> None:
        r, q = pages.ranking, self.query
        tiles = [
            (int(item), str(state), f"{position or '-'} · {score:.3f}")
            for item, state, position, score in zip(r.ids[q], r.state[q], r.position[q], r.scores[q], strict=True)
            if item >= 0
        ][: self.k.value]
        ap = f"{name}, AP {r.AP[q]:.3f}: " if name and r.valid[q] else f"{name}: " if name else ""
        hits.show(f"{ap}first {len(tiles)}", tiles, self._pickable)

    def _pickable(self, item: int) -> bool:
        return item in self.pages.query_of or self.features is not None

    def _search(self, picture: str | io.BytesIO | None = None) -> None:
        """Shows what an image of one's own finds; a sentence where it cannot be read."""
        if picture is None:  # the field was emptied
            return
        try:
            image = read_picture(Image.open(picture) if isinstance(picture, io.BytesIO) else picture, 512)
        except Exception as error:  # decoders raise whatever a broken file leads them to
            self.said.value = escape(f"{error}")
            return
        self.said.value = ""
        states = np.full(len(self.pages.ranking.gallery_labels), END)
        self._show_found(
            np.asarray(self.embed(image)), f'<img src="{as_uri(image)}" alt="your image">', "your image", states
        )

    def _show_found(self, feature, picture: str, name: str, states: np.ndarray, own: int | None = None) -> None:
        """A query that is none of the ranking's: its nearest gallery items, with neither rank nor AP."""
        exclude = None if own is None else np.array([own])
        scores, ids = knn(np.asarray(feature, np.float32)[None], self.features, self.k.value, exclude=exclude)
        self.about.value = (
            f'<article><div class="about"><h2>{wrapped(name)}</h2><figure>{picture}</figure>'
            "<p>Searched by cosine; counts in no metric.</p></div></article>"
        )
        found = enumerate(zip(ids[0].tolist(), scores[0].tolist(), strict=True), 1)
        tiles = [(item, str(states[item]), f"{n} · {score:.3f}") for n, (item, score) in found]
        self.hits.show(f"first {len(tiles)}", tiles, self._pickable)
        self.later.value, self.others.layout.display = "", "none"

    def _show_heat(self, _=None) -> None:
        """The picture of the query and of the hit chosen, each with the regions that agree with the other."""
        opened = self.panels.selected_index
        if opened is None or self.panels.titles[opened] != "where two pictures agree" or self.hit.value is None:
            return
        pair = [self.pages.images["query"][self.query], self.pages.images["item"][self.hit.value]]
        heats = self.regions(*pair)
        low, high = min(map(np.min, heats)), max(map(np.max, heats))
        figures = "".join(
            f'<figure><img src="{as_uri(overlaid(picture, (heat - low) / max(high - low, 1e-6)))}" alt="agreement">'
            f"<figcaption>{side}</figcaption></figure>"
            for picture, heat, side in zip(pair, heats, SIDES, strict=True)
        )
        self.heat.value = (
            f'<div class="recnb-heat">{figures}</div><p>cosine with the other picture as a whole: '
            f"{low:.2f} where darkest, {high:.2f} where brightest</p>"
        )

    # ---- what is kept ----

    def save_html(self) -> Path:
        """The file of the queries listed, up to a hundred, as a page that stands alone."""
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
        """The file of the query shown, as a figure."""
        path, pages = self.export_folder / f"query_{self.query}.png", self.pages
        path.parent.mkdir(parents=True, exist_ok=True)
        gallery_figure(
            pages.ranking, pages.images["query"], pages.images["item"], [self.query], self.k.value, pages.label_names
        ).savefig(path)
        self.saved.value = f"written: {path}"
        return path


def overlaid(picture: Picture, heat: np.ndarray) -> Image.Image:
    """The picture under its heat (H, W) in [0, 1]: the hotter, the more of the colour is seen."""
    image = read_picture(picture, 224)
    heat = np.asarray(Image.fromarray(np.asarray(heat, np.float32)).resize(image.size, Image.Resampling.BILINEAR))
    colour, share = mpl.colormaps["inferno"](heat)[..., :3] * 255, 0.75 * heat[..., None]
    return Image.fromarray(((1 - share) * np.asarray(image) + share * colour).round().astype(np.uint8))
