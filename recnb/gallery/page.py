"""The gallery as a page: one HTML file that stands alone, made of one article per query.

It needs no network and no library: pictures are JPEG thumbnails in data URIs, signs are drawn, and without JavaScript
the file still shows every query, worst first.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path

import numpy as np

from recnb.data.images import printable
from recnb.gallery.pictures import Names, Picture, label_text, read_picture
from recnb.retrieval.lists import EXCLUDED, RIGHT, WRONG, Ranking
from recnb.storage import write_text

MISSED = "missed"
MARKS = {RIGHT: "✓", WRONG: "✗", EXCLUDED: "-", MISSED: "…"}  # seen where a viewer strips style and drawings
PATHS = {RIGHT: "M5.5 10.5l3 3 6-7", WRONG: "M6 6l8 8M14 6l-8 8", EXCLUDED: "M5.5 10h9", MISSED: "M10 5v5l3.5 2"}
MEANING = {RIGHT: "right", WRONG: "wrong", EXCLUDED: "own camera, not counted", MISSED: "right, but further down"}
EMPTY = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"  # one clear pixel


def wrapped(text: str) -> str:
    """The text escaped, free to break behind the signs that join words in a name."""
    return escape(text).replace("/", "/<wbr>").replace("_", "_<wbr>")


def sign(state: str) -> str:
    """The state's sign as inline SVG: a disc with a tick, a cross, a bar, or a clock's hands for what comes later."""
    return f'<svg class="sign {state}" viewBox="0 0 20 20" aria-hidden="true"><path d="{PATHS[state]}"/></svg>'


class Pages:
    """Each query of a ranking as an HTML article; `embed` says how a picture enters the page."""

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
        self.uri = lru_cache(maxsize=keep)(self._uri)
        self.linked: set[int] = set()  # queries that the page holds: a hit that is one of them leads there
        self.embed: Callable[[str, int], str] = lambda side, i: f'src="{self.uri(side, i)}"'

    def key(self, side: str, i: int) -> tuple[str, int]:
        """The picture's name, one for a query that is in the gallery too."""
        own = self.ranking.own[i] if side == "query" else -1
        return ("item", int(own)) if own >= 0 else (side, int(i))

    def _uri(self, side: str, i: int) -> str:
        buffer = io.BytesIO()
        read_picture(self.images[side][i], self.size).save(buffer, "JPEG", quality=82, optimize=True)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

    def picture(self, side: str, i: int, alt: str) -> str:
        return f'<img {self.embed(*self.key(side, i))} alt="{escape(alt)}">'

    def name(self, side: str, i: int) -> str:
        """Where the picture lies, its last two steps, or its number where it is no file."""
        image = self.images[side][i]
        return printable("/".join(Path(image).parts[-2:])) if isinstance(image, (str, Path)) else f"{side} {i}"

    def identity(self, side: str, i: int) -> str:
        labels = self.ranking.query_labels if side == "query" else self.ranking.gallery_labels
        return label_text(labels[i], self.label_names)

    def article(self, q: int, k: int, hits: bool = True) -> str:
        """One query with its facts and, where asked for, its first k hits and the first positives that these miss."""
        identity = self.identity("query", q)
        found = f'<div class="found">{self._hits(q, k)}{self.missed(q, k)}</div>' if hits else ""
        return (
            f'<article id="q{q}" tabindex="-1" aria-label="query {q}, {escape(identity)}"><div class="about">'
            f"<h2>{wrapped(identity)}</h2><figure>{self.picture('query', q, f'query {q}, {identity}')}"
            f"<figcaption>{wrapped(self.name('query', q))}</figcaption></figure>{self._facts(q, k)}</div>"
            f"{found}</article>"
        )

    def _hits(self, q: int, k: int) -> str:
        r = self.ranking
        hits = [self._hit(q, place) for place in range(min(k, r.ids.shape[1])) if r.ids[q, place] >= 0]
        return f"<h3>First {len(hits)}</h3><ol>{''.join(hits)}</ol>"

    def missed(self, q: int, k: int) -> str:
        """The first positives that are not among the first k, with their rank; empty where there is none."""
        tiles = [
            self._tile(item, MISSED, f"{rank} · {score:.3f}", f"rank {rank}")
            for item, rank, score in self.ranking.missed(q, k)
        ]
        return f"<h3>First positives missed, with their rank</h3><ol>{''.join(tiles)}</ol>" if tiles else ""

    def _facts(self, q: int, k: int) -> str:
        r = self.ranking
        if not r.valid[q]:
            return "<p>No positive in the gallery: this query counts in no metric.</p>"
        found = int((r.state[q, :k] == RIGHT).sum())
        facts = {"AP": f"{r.AP[q]:.3f}", "first hit": f"rank {r.first_hit[q]}", "found": f"{found} of {r.positives[q]}"}
        if r.query_cameras is not None:
            facts |= {"camera": r.query_cameras[q], "own camera": f"{r.left_out[q]} left out"}
        rows = (f"<dt>{term}</dt><dd>{escape(printable(str(value)))}</dd>" for term, value in facts.items())
        return f"<dl>{''.join(rows)}</dl>"

    def _hit(self, q: int, place: int) -> str:
        r = self.ranking
        caption = f"{r.position[q, place] or '-'} · {r.scores[q, place]:.3f}"
        return self._tile(int(r.ids[q, place]), str(r.state[q, place]), caption, f"hit {place + 1}")

    def _tile(self, item: int, state: str, caption: str, place: str) -> str:
        identity, cameras = self.identity("item", item), self.ranking.gallery_cameras
        camera = "" if cameras is None else f"<small>{escape(printable(f'camera {cameras[item]}'))}</small>"
        picture = self.picture("item", item, f"{place}: {MEANING[state]}, {identity}")
        if self.query_of.get(item) in self.linked:
            picture = f'<a href="#q{self.query_of[item]}" title="make it the query">{picture}</a>'
        title = escape(f"{MEANING[state]}: {self.name('item', item)}")
        return (
            f'<li class="{state}" title="{title}">{picture}{sign(state)}'
            f"<b><i>{MARKS[state]} </i>{caption}</b><small>{wrapped(identity)}</small>{camera}</li>"
        )


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
    """A self-contained HTML page of queries and their hits, also written to `path` where one is given.

    Queries are those of `rows`, or all by `order` ('worst' or 'best' AP first, 'index'); beyond `max_queries` the page
    says how many it leaves out. `summary` stands below the title in place of the ranking's numbers. Each picture is
    embedded once, at most `size` pixels wide. Labels and file names are escaped. FileNotFoundError or ValueError names
    a picture that cannot be read.
    """
    pages = Pages(ranking, query_images, gallery_images, label_names, size, keep=None)
    wanted = ranking.order(order).tolist() if rows is None else [int(q) for q in rows]
    shown = wanted[:max_queries]
    pages.linked, styles = set(shown), {}

    def embed(side, i):  # as a background of its class: the one way to show a picture often and hold it once
        styles[f"{side[0]}{i}"] = pages.uri(side, i)
        return f'class="{side[0]}{i}" src="{EMPTY}"'

    pages.embed = embed
    articles = "\n".join(pages.article(q, k) for q in shown)
    listed = "\n".join(_entry(pages, q, i) for i, q in enumerate(shown))
    pictures = "\n".join(f".{name}{{background-image:url({uri})}}" for name, uri in styles.items())
    choices = {} if rows is None else {"given": "as given"}
    choices |= {"worst": "worst AP first", "best": "best AP first", "index": "by number"}
    first = order if rows is None else "given"
    orders = "".join(
        f'<option value="{value}"{" selected" if value == first else ""}>{text}</option>'
        for value, text in choices.items()
    )
    which = {"worst": ", the worst by AP", "best": ", the best by AP"}.get(first, ", the first")
    cut = f"{len(shown)} of {len(wanted):,} queries are on this page{which}." if len(shown) < len(wanted) else ""
    page = PAGE.format(
        title=escape(printable(title)),
        style=STYLE + PAGE_STYLE,
        pictures=pictures,
        cut=cut,
        summary=escape(printable(summary)) or _summary(ranking),
        legend=_legend(ranking),
        orders=orders,
        entries=listed,
        articles=articles,
        script=SCRIPT,
    )
    if path is not None:
        write_text(path, page)
    return page


def _entry(pages: Pages, q: int, i: int) -> str:
    """A query in the page's list."""
    r, identity = pages.ranking, pages.identity("query", q)
    state = (WRONG if r.failed[q] else RIGHT) if r.valid[q] else EXCLUDED
    said = {RIGHT: "first hit right", WRONG: "first hit wrong", EXCLUDED: "no positive"}[state]
    ap = f"{r.AP[q]:.3f}" if r.valid[q] else "-"
    return (
        f'<li data-q="{q}" data-place="{i}" data-ap="{np.nan_to_num(r.AP[q], nan=2):.6f}" class="{state}">'
        f'<a href="#q{q}">{pages.picture("query", q, said)}<span>{escape(identity)}<small>'
        f"{escape(pages.name('query', q))}</small></span><b>{ap}</b>{sign(state)}</a></li>"
    )


def _summary(ranking: Ranking) -> str:
    valid = ranking.valid
    first = np.mean(ranking.first_hit[valid] == 1)
    lost = f", {(~valid).sum():,} without a positive left out" if not valid.all() else ""
    return (
        f"{valid.sum():,} queries in {len(ranking.gallery_labels):,} gallery items{lost} · "
        f"mAP {ranking.AP[valid].mean():.3f} · first hit right for {first:.1%}"
    )


def _legend(ranking: Ranking) -> str:
    states = [state for state in MEANING if state != EXCLUDED or ranking.query_cameras is not None]
    return "".join(f"<span>{sign(state)} {MEANING[state]}</span>" for state in states)


STYLE = """
.recnb { --right: #0072B2; --wrong: #D55E00; --excluded: #767676; --missed: #0072B2; --mat: #8882; --line: #8884;
  font: 14px/1.4 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
:is([data-jp-theme-light=false], .vscode-dark, .vscode-high-contrast, [theme=dark]) .recnb {
  --right: #56B4E9; --wrong: #FF9A4D; --excluded: #9A9A9A; --missed: #56B4E9; }
.recnb .right { --c: var(--right); } .recnb .wrong { --c: var(--wrong); }
.recnb .excluded { --c: var(--excluded); } .recnb .missed { --c: var(--missed); }
.recnb article { display: flex; flex-wrap: wrap; gap: 8px 28px; outline: none; }
.recnb .about { flex: 1 1 168px; display: flex; flex-wrap: wrap; gap: 6px 20px; align-content: flex-start; }
.recnb .found { flex: 999 1 440px; min-width: 0; padding-right: 6px; }
.recnb h2 { flex: 1 0 100%; margin: 0 0 4px; font-size: 18px; font-weight: 600; line-height: 1.25;
  overflow-wrap: anywhere; }
.recnb h3 { margin: 3px 0 10px; font-size: 13px; font-weight: 600; opacity: .75; }
.recnb ol + h3 { margin-top: 22px; }
.recnb figure { margin: 0; width: 160px; } .recnb figcaption { font-size: 11px; opacity: .7; overflow-wrap: anywhere; }
.recnb img { display: block; box-sizing: border-box; width: 100%; aspect-ratio: 1; object-fit: contain;
  border-radius: 6px; background-color: var(--mat); background-position: center; background-size: contain;
  background-repeat: no-repeat; print-color-adjust: exact; }
.recnb figure img { border: 1px solid var(--line); }
.recnb dl { display: grid; grid-template-columns: auto auto; gap: 1px 12px; margin: 0; font-size: 13px;
  align-content: start; justify-content: start; }
.recnb .about dl :is(dt, dd) { float: none; width: auto; margin: 0; padding: 0; font-weight: 400; white-space: nowrap; }
.recnb dl { line-height: 1.5; } .recnb .about dl dt { opacity: .7; } .recnb dd { font-variant-numeric: tabular-nums; }
.recnb .found ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 14px 12px;
  margin: 0; padding: 0; list-style: none; }
.recnb .found li { position: relative; min-width: 0; margin: 0; max-width: 150px; }
.recnb .found li img { border: 3px solid var(--c); }
.recnb .found li.excluded img { border-style: dashed; opacity: .5; }
.recnb .found li.missed img { border-style: dotted; }
.recnb .found li .sign { position: absolute; top: -6px; right: -6px; }
.recnb .found li b { display: block; margin-top: 3px; font-size: 13px; font-weight: 500; text-align: center;
  font-variant-numeric: tabular-nums; }
.recnb .found li b i { display: none; }
.recnb .found li small { display: block; font-size: 11px; line-height: 1.25; text-align: center; opacity: .75;
  overflow-wrap: anywhere; }
.recnb .sign { width: 20px; height: 20px; flex: none; border-radius: 50%; background: var(--c); fill: none;
  stroke: #fff; stroke-width: 2.2; stroke-linecap: round; stroke-linejoin: round; print-color-adjust: exact; }
"""
PAGE_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --accent: #0072B2; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #e8e8e6; --accent: #56B4E9; }
  .recnb { --right: #56B4E9; --wrong: #FF9A4D; --excluded: #9A9A9A; --missed: #56B4E9; }
  .recnb .sign { stroke: #16181b; }
}
[hidden] { display: none !important; }
body { margin: 0; background: var(--paper); color: var(--ink); }
header { padding: 18px 24px 12px; border-bottom: 1px solid var(--line); }
h1 { margin: 0; font-size: 22px; } header p { margin: 2px 0 0; opacity: .8; }
.legend, .controls { display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: center; margin-top: 10px; }
.legend span, .controls label { display: inline-flex; gap: 6px; align-items: center; font-size: 13px; }
.controls :is(select, button, input) { font: inherit; font-size: 13px; color: inherit; accent-color: var(--accent); }
.controls :is(select, button, [type=search]) { padding: 3px 8px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--paper); }
.controls output { min-width: 72px; display: inline-block; text-align: center; font-variant-numeric: tabular-nums; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; border-radius: 6px; }
.sides { display: grid; grid-template-columns: 264px minmax(0, 1fr); }
nav { position: sticky; top: 0; max-height: 100vh; overflow-y: auto; border-right: 1px solid var(--line); }
nav ol { margin: 0; padding: 8px; list-style: none; }
nav a { display: flex; gap: 9px; align-items: center; padding: 4px 7px; border-radius: 8px; color: inherit;
  text-decoration: none; }
nav a:hover { background: var(--mat); }
nav a[aria-current] { background: var(--mat); box-shadow: inset 3px 0 var(--accent); }
nav img { width: 38px !important; flex: none; } nav span { flex: 1; min-width: 0; line-height: 1.2; font-size: 13px; }
nav span, nav small { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
nav small { display: block; opacity: .65; font-size: 11px; }
nav b { font-size: 12px; font-weight: 500; font-variant-numeric: tabular-nums; }
nav .sign { width: 16px; height: 16px; }
main { padding: 20px 24px 40px; } main article + article { margin-top: 26px; padding-top: 24px;
  border-top: 1px solid var(--line); }
.js main article { display: none; margin: 0 !important; padding: 0 !important; border: 0 !important; }
.js main article.now { display: flex; }
@media (max-width: 900px) { .sides { grid-template-columns: 216px minmax(0, 1fr); }
  nav small { display: none; } .controls [type=search] { width: 120px; }
  main { padding: 16px; } header { padding: 14px 16px 10px; } }
@media (max-width: 600px) { .sides { display: block; } nav { position: static; max-height: 30vh; border-right: 0;
  border-bottom: 1px solid var(--line); } }
@media print { nav, .controls { display: none !important; } .sides { display: block; }
  .js main article { display: flex !important; break-inside: avoid; } }
"""
SCRIPT = """
document.documentElement.classList.add("js");
const at = id => document.getElementById(id), list = at("queries"), all = [...list.children];
const keys = {given: li => +li.dataset.place, index: li => +li.dataset.q, worst: li => +li.dataset.ap,
              best: li => li.dataset.ap > 1 ? 2 : -li.dataset.ap};
const article = li => at("q" + li.dataset.q);
let shown = all, now = 0;

function go(i) {
  now = Math.max(0, Math.min(i, shown.length - 1));
  for (const li of all) {
    const on = li === shown[now], link = li.firstElementChild;
    article(li).classList.toggle("now", on);
    if (on) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
  }
  at("count").textContent = shown.length ? `${now + 1} of ${shown.length}` : "none";
  at("prev").disabled = now <= 0;
  at("next").disabled = now >= shown.length - 1;
  const nav = list.parentElement, frame = nav.getBoundingClientRect(), box = shown[now]?.getBoundingClientRect();
  if (box && (box.top < frame.top || box.bottom > frame.bottom))
    nav.scrollTop += box.top - frame.top - frame.height / 3;
}

function update() {
  const current = shown[now], find = at("find").value.toLowerCase(), key = keys[at("order").value];
  shown = all.filter(li => (!at("failed").checked || li.className === "wrong")
                           && li.textContent.toLowerCase().includes(find));
  shown.sort((a, b) => key(a) - key(b) || a.dataset.place - b.dataset.place);
  for (const li of all) li.hidden = !shown.includes(li);
  list.append(...shown);
  go(shown.indexOf(current));
}

function follow() {
  const target = all.find(li => "#q" + li.dataset.q === location.hash);
  if (!target) return;
  if (!shown.includes(target)) { at("failed").checked = false; at("find").value = ""; update(); }
  go(shown.indexOf(target));
}

function step(by) {
  go(now + by);
  if (shown.length) history.replaceState(null, "", "#q" + shown[now].dataset.q);
}

addEventListener("popstate", follow);
addEventListener("click", event => {
  const link = event.target.closest('a[href^="#q"]');
  if (!link) return;
  event.preventDefault();
  history.pushState(null, "", link.getAttribute("href"));
  follow();
  if (!link.closest("nav")) article(shown[now]).focus({preventScroll: true});
});
addEventListener("keydown", event => {
  const by = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!by || event.altKey || event.ctrlKey || event.metaKey || event.target.matches("select, [type=search]")) return;
  event.preventDefault();
  step(by);
});
at("prev").onclick = () => step(-1);
at("next").onclick = () => step(1);
for (const id of ["order", "failed", "find"]) at(id).oninput = update;
at("controls").hidden = false;
update();
follow();
if (!location.hash && shown.length) history.replaceState(null, "", "#q" + shown[now].dataset.q);
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<style>
{pictures}
</style></head>
<body class="recnb">
<header><h1>{title}</h1>
<p>{summary}</p>
<p class="cut">{cut}</p>
<div class="legend">{legend}</div>
<div class="controls" id="controls" hidden>
<label>Order <select id="order">{orders}</select></label>
<label><input type="checkbox" id="failed"> failures only (first hit wrong)</label>
<label>Find <input type="search" id="find" placeholder="name or file"></label>
<span><button id="prev" aria-label="previous query">&larr;</button> <output id="count"></output>
<button id="next" aria-label="next query">&rarr;</button></span></div></header>
<div class="sides">
<nav aria-label="queries"><ol id="queries">
{entries}
</ol></nav>
<main>
{articles}
</main></div>
<script>{script}</script>
</body></html>
"""
