"""How is a model used elsewhere? Exported graphs with their proof, an index that names images, a model card."""

from recnb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "export": "export_model ExportError",
        "index": "build_index labelled_images",
        "recognizer": "Recognizer Answer",
        "modelcard": "model_card",
    },
)
