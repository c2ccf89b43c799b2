"""What does a model find? Pictures of queries and their neighbours: a figure, a page, a widget.

Plain arrays and lists go in, so that the galleries serve anybody's embeddings.
"""

from recnb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "figure": "gallery_figure",
        "page": "gallery_html gallery_static",
        "widget": "gallery_widget GalleryWidget",
        "grid": "gallery_grid GalleryGrid",
        "report": "report_html Section",
        "curves": (
            "augmentation_figure history_figure histories_figure before_after_figure confusion_figure curves_figure "
            "histogram_figure ladder_figure map_figure samples_figure"
        ),
    },
)
