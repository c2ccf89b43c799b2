"""Names of every script in figures: drawn where a font has their signs, readable where none has."""

import io
import warnings

import numpy as np
import pytest
from matplotlib.font_manager import findfont
from PIL import Image

from recnb.gallery import fonts
from recnb.gallery.curves import map_figure
from recnb.gallery.figure import gallery_figure
from recnb.retrieval.lists import rank


@pytest.fixture
def only_dejavu(monkeypatch):
    """A machine without any other font."""
    has = fonts.signs(findfont("DejaVu Sans"))
    monkeypatch.setattr(fonts, "family", lambda sign: "DejaVu Sans" if ord(sign) in has else None)


@pytest.mark.parametrize(
    "name,expected",
    [
        ("Garlic", "Garlic"),
        ("\u00d6l", "\u00d6l"),
        ("\u062b\u0648\u0645", "\u062b\u0648\u0645"),  # Arabic: DejaVu Sans has it
        ("\u5927\u849c", "name 7"),  # ideographs
        ("\u5927\u849c garlic", "garlic"),
        ("\u5927\u849c 250", "name 250"),
        ("\u30ab\u30ec\u30fc", "kare"),
        ("\U0001f34e apple", "(red apple) apple"),
    ],
)
def test_what_no_font_has_is_readable(only_dejavu, name, expected):
    assert fonts.drawn_label(7, {7: name}) == expected


def test_an_installed_font_that_has_the_signs_is_used(monkeypatch):
    monkeypatch.setattr(fonts, "family", lambda sign: "DejaVu Sans" if sign.isascii() else "A Font of Han")
    figure = map_figure(np.zeros((2, 2)), [0, 0], title="\u5927 x")
    title = figure.axes[0].get_title("left")
    texts = [text for text in figure.findobj(fonts.Text) if text.get_text() == title]
    assert title == "\u5927 x" and texts[0].get_fontfamily()[-2:] == ["A Font of Han", "DejaVu Sans"]


def test_figures_draw_every_name_without_a_warning(only_dejavu):
    labels = np.array([0, 0, 1, 1])
    names = ["\u5927\u849c \U0001f34e", "\u0939\u093f\u0928\u094d\u0926\u0940"]
    vectors = np.array([[1, 0], [0, 1], [1, 0.1], [0, 1]], np.float32)
    ranking = rank(vectors, vectors, labels, labels, exclude_self=True, k=3)
    pictures = [Image.new("RGB", (8, 8))] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gallery_figure(ranking, pictures, pictures, range(4), label_names=names).savefig(io.BytesIO(), format="png")
        drawn = map_figure(vectors, labels, groups=[0, 1], title=names[0], names=names)
        drawn.savefig(io.BytesIO(), format="png")
