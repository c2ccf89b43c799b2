"""The report as a page: whole in one file, every text escaped, every part where it was given."""

import re

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from recnb.gallery.page import gallery_static
from recnb.gallery.report import Section, report_html
from recnb.retrieval.lists import rank

EVIL = "<img src=x onerror=alert(1)>&\ud800"


def test_the_page_stands_alone_and_shows_its_parts_in_order(tmp_path):
    vectors = np.eye(4, dtype=np.float32)
    pictures = [Image.new("RGB", (8, 8))] * 4
    pages = gallery_static(rank(vectors, vectors, [0, 0, 1, 1], [0, 0, 1, 1], exclude_self=True, k=2), *[pictures] * 2)
    sections = [
        Section("Bars", figure=Figure((2, 1)), alt="before and after"),
        Section("Numbers", "In words.", table=pd.DataFrame({"metric": ["mAP"], "value": [0.12345]})),
        Section("Gallery", gallery=pages),
        Section("Configuration", code="Global:\n  epochs: 2"),
    ]
    page = report_html("A run", sections, "4 queries", "Training helped.", tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    assert re.findall(r"<h2>(\w+)</h2>\n", page)[:2] == ["Bars", "Numbers"]
    assert page.index("Training helped.") < page.index("data:image/png") < page.index("0.123") < page.index("epochs: 2")
    assert 'alt="before and after"' in page and page.count("<article") == len(re.findall('type="radio"', page)) > 0
    for outside in ("http:", "https:", "//", "<link", "<script", "@import"):
        assert outside not in re.sub(r"base64,[\w+/=]*", "", page)


def test_no_text_of_a_report_can_run():
    table = pd.DataFrame({EVIL: [EVIL, "b"], "n": [1.0, np.nan]})
    section = Section(EVIL, EVIL, Figure((1, 1)), EVIL, table=table.rename(columns={EVIL: "name"}), code=EVIL)
    page = report_html(EVIL, [section], EVIL, EVIL)
    assert "<img src=x" not in page and page.count("&lt;img src=x onerror=alert(1)&gt;&amp;") >= 8
    assert ">-</td>" in page  # a number that is missing
    page.encode()
