"""The gallery as plain HTML: the articles of `recnb.page` in a notebook that is only read, paged by style alone.

No kernel, no script and no network: each query is a radio button, drawn as a thumbnail, and the article that follows
the checked one is shown. Where a viewer strips style and buttons, every article is shown, one below the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import count
from zlib import crc32

from IPython.display import HTML

from recnb.gallery.page import STYLE, Pages, sign
from recnb.gallery.pictures import Names, Picture
from recnb.retrieval.lists import EXCLUDED, RIGHT, WRONG, Ranking, choose_rows

CALLS = count()
STATIC_STYLE = """
.recnb.pages { display: flex; flex-wrap: wrap; gap: 10px; padding: 8px 6px 6px; color: inherit; }
.recnb.pages > input { position: absolute; width: 1px; height: 1px; margin: 0; opacity: 0; }
.recnb.pages > label { position: relative; width: 52px; margin: 0; padding: 3px; border-radius: 8px; cursor: pointer;
  font-size: 11px; text-align: center; font-variant-numeric: tabular-nums; }
.recnb.pages > label .sign { position: absolute; top: -4px; right: -4px; width: 16px; height: 16px; }
.recnb.pages > :checked + label { background: var(--mat); box-shadow: 0 0 0 2px var(--right); }
.recnb.pages > :focus-visible + label { box-shadow: 0 0 0 4px var(--right); }
.recnb.pages > article { order: 1; flex: 1 0 100%; min-width: 0; margin-top: 8px; padding-top: 14px;
  border-top: 1px solid var(--line); }
.recnb.pages > input:not(:checked) + label + article { display: none; }
@media print { .recnb.pages > input + label + article { display: flex !important; break-inside: avoid; }
  .recnb.pages > label { display: none; } }
"""


def gallery_static(
    ranking: Ranking,
    query_images: Sequence[Picture],
    gallery_images: Sequence[Picture],
    rows: Sequence[int] | None = None,
    k: int = 8,
    label_names: Names = None,
    size: int = 80,
) -> HTML:
    """Ready pages for a saved notebook and for what nbconvert makes of it, chosen by click or arrow key.

    rows: the queries, by default ten of `choose_rows`. Every page is stored in the notebook: about 40 KB each.
    """
    pages = Pages(ranking, query_images, gallery_images, label_names, size)
    rows = choose_rows(ranking, 10).tolist() if rows is None else [int(q) for q in rows]
    articles = [pages.article(q, k) for q in rows]
    name = f"pages-{next(CALLS)}-{crc32(''.join(articles).encode()):08x}"  # a page may hold several galleries
    parts = [
        _choice(pages, q, f"{name}-{i}", name, "" if i else " checked")
        + article.replace(f'id="q{q}" tabindex="-1"', f'id="{name}-q{q}"', 1)
        for i, (q, article) in enumerate(zip(rows, articles, strict=True))
    ]
    return HTML(
        f"<style>{STYLE}{STATIC_STYLE}</style>"
        f'<div class="recnb pages" role="group" aria-label="queries">{"".join(parts)}</div>'
    )


def _choice(pages: Pages, q: int, key: str, group: str, checked: str) -> str:
    """A query's radio button with its label: picture, AP, and whether the first hit is right."""
    r, identity = pages.ranking, pages.identity("query", q)
    state = (WRONG if r.failed[q] else RIGHT) if r.valid[q] else EXCLUDED
    said = {RIGHT: "first hit right", WRONG: "first hit wrong", EXCLUDED: "no positive"}[state]
    ap = f"{r.AP[q]:.3f}" if r.valid[q] else "-"
    own_keys = 'data-lm-suppress-shortcuts="true"'  # else JupyterLab takes the arrow keys to walk its cells
    return (
        f'<input type="radio" id="{key}" name="{group}" aria-label="{escape(identity)}, AP {ap}, {said}"{checked}'
        f" {own_keys}>"
        f'<label for="{key}" title="{escape(identity)}: {said}">{pages.picture("query", q, said)}{sign(state)}{ap}'
        "</label>"
    )
