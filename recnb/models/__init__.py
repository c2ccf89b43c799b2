"""What makes the features? A backbone cut at any layer, a neck, a head: together a RecModel.

Nothing here reads a list or a configuration: how many classes there are is handed in.
"""

from recnb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "cutting": "Cut cut",
        "backbones": "create_backbone list_backbones",
        "necks": "NECKS VehicleNeck BNNeck MLP GeM Tokens FRFNNeck",
        "heads": "HEADS ArcMargin CosMargin CircleMargin AdaMargin",
        "recmodel": "RecModel DistillationModel",
        "weights": "load_weights interpolate",
    },
)
