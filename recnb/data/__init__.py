"""How do files become batches? Lists of images, their transforms, samplers and loaders.

The way of an image: `images` decodes, `transforms` and `augment` change it, `pipeline` splits the work between workers
and the device, `loaders` makes the batches. `layouts` reads data sets as they are distributed;
`prepare`, `audit` and `splits` turn one's own photographs into lists.
"""

import pandas as pd

from recnb import lazily

pd.set_option("mode.string_storage", "python")  # names of files may hold bytes that are no text: pyarrow refuses these

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "images": "DataError read_rgb",
        "lists": "DATASETS ImageList VeriWild ImageNetDataset number_alike seeded own_index",
        "layouts": (
            "ImageFolder Market1501 DukeMTMC MSMT17 CompCars ICartoonDataset LogoDataset Cifar10 Cifar100 Torchvision"
        ),
        "transforms": "TRANSFORMS",
        "augment": "BATCH_TRANSFORMS AugMix",
        "pipeline": "Pipeline display_image",
        "samplers": "SAMPLERS PKSampler DistributedRandomIdentitySampler DistributedBatchSampler",
        "loaders": "ImageLoader Loaders batch_size images_per_second",
    },
)
