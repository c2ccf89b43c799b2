"""What can be tried without data? Marks that are drawn and photographed by the program itself."""

from recnb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__, {"marks": "draw_marks design_marks draw_mark Mark", "photographs": "photograph Camera CAMERAS"}
)
