"""The gallery as HTML: a file of its own, and pages to choose from in a saved notebook.

Neither needs the network: pictures are JPEG thumbnails in data URIs, and signs are drawings. Without JavaScript the
file still shows every query, worst first. The HTML, CSS and JavaScript are in `templates/`.
"""

import base64
import io
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from IPython.display import HTML
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from recnb.data.images import printable
from recnb.gallery.pictures import Names, Picture, label_text, read_picture
from recnb.retrieval.lists import EXCLUDED, RIGHT, WRONG, Ranking, choose_rows
from recnb.storage import write_text

MISSED = "missed"
MARKS = {RIGHT: "✓", WRONG: "✗", EXCLUDED: "-", MISSED: "…"}  # for viewers that remove style and drawings
PATHS = {RIGHT: "M5.5 10.5l3 3 6-7", WRONG: "M6 6l8 8M14 6l-8 8", EXCLUDED: "M5.5 10h9", MISSED: "M10 5v5l3.5 2"}
MEANING = {RIGHT: "right", WRONG: "wrong", EXCLUDED: "own camera, not counted", MISSED: "right, but further down"}
ORDERS = {"worst": "worst AP first", "best": "best AP first", "index": "by number"}
EMPTY = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"  # one clear pixel
CALLS = count()
FOLDER = Path(__file__).with_name("templates")


def wrapped(text: str) -> Markup:
    """Return the text escaped, with places to break lines: after / and _, and by a soft hyphen in long words."""
    return (
        escape(re.sub(r"([^\W\d_]{11})(?=[^\W\d_]{4})", "\\1\u00ad", text))
        .replace("/", Markup("/<wbr>"))
        .replace("_", Markup("_<wbr>"))
    )


TEMPLATES = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
)
TEMPLATES.filters["wrapped"] = wrapped
TEMPLATES.globals |= {"MARKS": MARKS, "PATHS": PATHS, "MEANING": MEANING}


def source(name: str) -> str:
    """Return a file of `templates/` as it stands."""
    return (FOLDER / name).read_text(encoding="utf-8")


class Hit(NamedTuple):
    """A gallery item as a query finds it."""

    item: int  # row of the gallery
    state: str
    caption: str
    place: str  # where it stands, in words


class Pages:
    """What the templates show of a ranking; `embed(side, row)` gives the attributes of a picture's element."""

    def __init__(
        self,
        ranking: Ranking,
        query_images: Sequence[Picture],
        gallery_images: Sequence[Picture],
        label_names: Names = None,
        size: int = 112,
        keep: int | None = 4096,
    ):
        if len(query_images) != len(ranking) or len(gallery_images) != len(ranking.gallery_labels):
            raise ValueError(
                f"the ranking has {len(ranking)} queries and {len(ranking.gallery_labels)} gallery items, "
                f"but there are {len(query_images)} and {len(gallery_images)} pictures"
            )
        self.ranking, self.label_names, self.size = ranking, label_names, size
        self.images = {"query": query_images, "item": gallery_images}
        self.query_of = {own: q for q, own in enumerate(ranking.own.tolist()) if own >= 0}
        self.uri = lru_cache(maxsize=keep)(lambda side, i: as_uri(read_picture(self.images[side][i], self.size)))
        self.linked: set[int] = set()  # queries that the page holds: a hit that is one of them leads there
        self.embed: Callable[[str, int], str] = lambda side, i: f'src="{self.uri(side, i)}"'

    def key(self, side: str, i: int) -> tuple[str, int]:
        """Return the side and row of a picture: those of the gallery for a query that is in it too."""
        own = self.ranking.own[i] if side == "query" else -1
        return ("item", int(own)) if own >= 0 else (side, int(i))

    def source(self, side: str, i: int) -> Markup:
        """Return the attributes of an image element that shows the picture."""
        return Markup(self.embed(*self.key(side, i)))  # made of numbers and base64 alone

    def page_of(self, item: int) -> int | None:
        """Return the query that is this gallery item, where the page holds it."""
        query = self.query_of.get(item)
        return query if query in self.linked else None

    def name(self, side: str, i: int) -> str:
        """Return the last two parts of the picture's path, or its number where it is no file."""
        image = self.images[side][i]
        return printable("/".join(Path(image).parts[-2:])) if isinstance(image, (str, Path)) else f"{side} {i}"

    def identity(self, side: str, i: int) -> str:
        """Return what the identity of a query or of a gallery item is called."""
        labels = self.ranking.query_labels if side == "query" else self.ranking.gallery_labels
        return label_text(labels[i], self.label_names)

    def camera(self, item: int) -> list[str]:
        """Return a line about the item's camera, where cameras are known."""
        cameras = self.ranking.gallery_cameras
        return [] if cameras is None else [printable(f"camera {cameras[item]}")]

    @property
    def scale(self) -> str:
        """A sentence on what the scores mean where they are no similarities."""
        scores = self.ranking.scores
        distances = (scores < 0).any() and not (scores > 0).any()
        return "Scores are minus a distance: the nearer to 0, the more alike." if distances else ""

    def hits(self, q: int, k: int) -> list[Hit]:
        """Return the first k hits of a query; fewer where its list ends."""
        r = self.ranking
        found = enumerate(zip(r.ids[q, :k], r.state[q], r.position[q], r.scores[q], strict=False), 1)
        return [
            Hit(int(item), str(state), f"{position or '-'} · {score:.3f}", f"hit {n}")
            for n, (item, state, position, score) in found
            if item >= 0
        ]

    def missed(self, q: int, k: int) -> list[Hit]:
        """Return the first positives that are not among the first k hits."""
        missed = self.ranking.missed(q, k)
        return [Hit(int(item), MISSED, f"{rank} · {score:.3f}", f"rank {rank}") for item, rank, score in missed]

    def facts(self, q: int, k: int) -> dict[str, str]:
        """Return the facts about a query by name; none where it counts in no metric."""
        r = self.ranking
        if not r.valid[q]:
            return {}
        found = int((r.state[q, :k] == RIGHT).sum())
        facts = {"AP": f"{r.AP[q]:.3f}", "first hit": f"rank {r.first_hit[q]}", "found": f"{found} of {r.positives[q]}"}
        if r.query_cameras is not None:
            facts |= {"camera": printable(str(r.query_cameras[q])), "own camera": f"{r.left_out[q]} left out"}
        return facts

    def first(self, q: int) -> dict[str, str]:
        """Return a query's entry in a list: `state` and `text` of its first hit, its `AP`, and a `key` to sort by."""
        r = self.ranking
        if not r.valid[q]:
            return {"state": EXCLUDED, "text": "no positive", "AP": "-", "key": "2"}  # sorted last
        state = WRONG if r.failed[q] else RIGHT
        said = {"state": state, "text": f"first hit {MEANING[state]}"}
        return said | {"AP": f"{r.AP[q]:.3f}", "key": f"{r.AP[q]:.6f}"}

    def show(self, macro: str, *args, **kwargs) -> Markup:
        """Return the output of a macro of `templates/parts.html` for these pages."""
        return getattr(TEMPLATES.get_template("parts.html").module, macro)(self, *args, **kwargs)


def gallery_html(
    ranking: Ranking,
    query_images: Sequence[Picture],
    gallery_images: Sequence[Picture],
    path: str | Path | None = None,
    rows: Sequence[int] | None = None,
    k: int = 10,
    order: str = "worst",
    label_names: Names = None,
    title: str = "Gallery",
    max_queries: int = 100,
    size: int = 112,
    summary: str = "",
) -> str:
    """Return a self-contained HTML page of queries and their hits.

    Args:
        ranking: what is shown, as `recnb.retrieval.rank` judges it.
        query_images: a file, image or array for each query.
        gallery_images: the same for each gallery item.
        path: where the page is also written.
        rows: the queries to show; without it all, by `order`.
        k: how many hits of each query.
        order: "worst" or "best" AP first, or "index".
        label_names: from identity to text, a list or a mapping.
        title: the heading.
        max_queries: beyond it, the page says how many it leaves out.
        size: the largest width and height of a picture in pixels; each is embedded once.
        summary: stands below the title in place of the ranking's numbers.

    Raises:
        FileNotFoundError: a picture does not exist.
        ValueError: a picture cannot be read.
    """
    pages = Pages(ranking, query_images, gallery_images, label_names, size, keep=None)
    wanted = ranking.order(order).tolist() if rows is None else [int(q) for q in rows]
    shown, pictures = wanted[:max_queries], {}
    pages.linked = set(shown)

    def embed(side: str, i: int) -> str:  # a class with the picture as background: the page holds it once
        pictures[f"{side[0]}{i}"] = Markup(pages.uri(side, i))
        return f'class="{side[0]}{i}" src="{EMPTY}"'

    pages.embed = embed
    page = TEMPLATES.get_template("page.html").render(
        pages=pages,
        k=k,
        shown=shown,
        wanted=len(wanted),
        which={"worst": "worst by AP", "best": "best by AP"}.get(order if rows is None else "", "first"),
        order=order if rows is None else "given",
        orders=({} if rows is None else {"given": "as given"}) | ORDERS,
        title=printable(title),
        summary=printable(summary) or _summary(ranking),
        states=[state for state in MEANING if state != EXCLUDED or ranking.query_cameras is not None],
        pictures=pictures,
    )
    if path is not None:
        write_text(path, page)
    return page


def _summary(ranking: Ranking) -> str:
    valid = ranking.valid
    first = np.mean(ranking.first_hit[valid] == 1)
    lost = f", {(~valid).sum():,} without a positive left out" if not valid.all() else ""
    return (
        f"{valid.sum():,} queries in {len(ranking.gallery_labels):,} gallery items{lost} · "
        f"mAP {ranking.AP[valid].mean():.3f} · first hit right for {first:.1%}"
    )


def gallery_static(
    ranking: Ranking,
    query_images: Sequence[Picture],
    gallery_images: Sequence[Picture],
    rows: Sequence[int] | None = None,
    k: int = 8,
    label_names: Names = None,
    size: int = 80,
) -> HTML:
    """Return a page for each query, which work without a kernel, also in what nbconvert makes of a notebook.

    A click or an arrow key chooses the page. Viewers that remove style and buttons show all pages, one below the other.
    Each takes about 40 KB of the notebook.

    Args:
        ranking: what is shown, as `recnb.retrieval.rank` judges it.
        query_images: a file, image or array for each query.
        gallery_images: the same for each gallery item.
        rows: the queries, by default ten of `choose_rows`.
        k: how many hits of each query.
        label_names: from identity to text, a list or a mapping.
        size: the largest width and height of a picture in pixels.
    """
    pages = Pages(ranking, query_images, gallery_images, label_names, size)
    shown = choose_rows(ranking, 10).tolist() if rows is None else [int(q) for q in rows]
    name = f"pages-{next(CALLS)}-{crc32(ranking.scores.tobytes()):08x}"  # one for each gallery of a page
    return HTML(TEMPLATES.get_template("static.html").render(pages=pages, shown=shown, k=k, name=name))


def as_uri(image: Image.Image) -> str:
    """Return the image as a JPEG in a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
