"""Names in figures: where a font lacks a character, matplotlib draws a box unless it is given another font.

A browser finds such a font by itself.
"""

import unicodedata
from functools import cache

from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.text import Text

from recnb.gallery.pictures import Names, label_text

NO_TEXT = ("Last Resort", "STIX", "cm")  # how the names of fonts begin that have only boxes or formulas


@cache
def signs(path: str) -> frozenset[int]:
    """Return the code points that a font file has."""
    return frozenset(get_font(path).get_charmap())


@cache
def family(sign: str) -> str | None:
    """Return an installed font that has a character, DejaVu Sans where it does; None where none has it."""
    plain = [font for font in fontManager.ttflist if font.style == "normal" and font.weight == 400]
    fonts = sorted(plain, key=lambda font: font.name != "DejaVu Sans")
    having = (font.name for font in fonts if not font.name.startswith(NO_TEXT) and ord(sign) in signs(font.fname))
    return next(having, None)


def spelt(sign: str) -> str:
    """Return what a character is called: the sound of a letter, the name of a symbol, nothing for an ideograph."""
    name = unicodedata.name(sign, "").lower()
    if "letter " in name or "syllable " in name:
        return name.rsplit(" ", 1)[-1]
    return f"({name})" if unicodedata.category(sign) == "So" else ""


def drawn(text: str, other: str = "name") -> str:
    """Return a line with every character that no installed font has spelt out, or left out where it cannot be.

    Args:
        text: the line.
        other: what is returned where nothing is left of it.
    """
    if text.isascii() or all(map(family, text)):
        return text
    left = " ".join("".join(sign if family(sign) else spelt(sign) for sign in text).split())
    return left if any(map(str.isalpha, left)) else f"name {left}" if left else other


def drawn_label(label, names: Names = None) -> str:
    """Return what an identity is called in a figure: `label_text`, or "name 7" where no font has its characters."""
    return drawn(label_text(label, names), "name" if isinstance(label, str) else f"name {label}")


def legible(figure: Figure) -> Figure:
    """Return the figure, with fonts for every character of its texts."""
    for text in figure.findobj(Text):
        if not text.get_text().isascii():
            text.set_text("\n".join(map(drawn, text.get_text().split("\n"))))
            others = dict.fromkeys(family(sign) for sign in text.get_text() if not sign.isspace())
            text.set_fontfamily([*text.get_fontfamily(), *filter(None, others)])
    return figure
