"""Whether weights that Paddle has written give the same features here, network by network.

Two steps, since Paddle wants an environment of its own; `pip install paddlepaddle` there, then, from the project:

    PADDLE/bin/python scripts/paddle_parity.py write FOLDER
    python scripts/paddle_parity.py compare FOLDER

The first writes random weights as .pdparams with the original's names, and what its layers make of a few images; the
second reads them and prints the least cosine between the features and the largest difference of the outputs, as a part
of the largest output. `fixtures FOLDER` writes the small files that the tests read.
"""

import sys
from pathlib import Path

import numpy as np

FLAT, CLIP = {"stop": "flatten"}, ("base_patch16", "large_patch14")
# What a network is called: its options here, and the side of the images.
BACKBONES = {
    "ResNet50": (FLAT, 96),
    "ResNet50_vd": (FLAT, 96),
    "ResNet50_last_stage_stride1": (FLAT, 96),
    **{f"PPLCNet_x{width}": (FLAT, 96) for width in ("0_25", "0_35", "0_5", "0_75", "1_0", "1_5", "2_0", "2_5")},
    "PPLCNetV2_base": (FLAT, 96),
    "PPLCNetV2_base_ShiTu": (FLAT, 96),
    "MobileNetV1": (FLAT, 96),
    "MobileNetV3_large_x1_0": (FLAT, 96),
    "MobileNetV3_small_x1_0": (FLAT, 96),
    "SwinTransformer_tiny_patch4_window7_224": (FLAT, 224),
    "ViT_base_patch16_224": (FLAT, 224),
    **{f"CLIP_vit_{size}_224": ({"return_embed": True, "return_mean_embed": True}, 224) for size in CLIP},
    "AlexNet": (FLAT, 224),
    "VGG19": (FLAT, 224),
}
# Whole models: the backbone, the neck with its sizes, and the head for 7 classes.
RECMODELS = {
    "PPLCNet_x0_25 + FC + ArcMargin": ("PPLCNet_x0_25", "FC", (1280, 32), "ArcMargin"),
    "PPLCNetV2_base_ShiTu + BNNeck + FC": ("PPLCNetV2_base_ShiTu", "BNNeck", (1280, 1280), "FC"),
    "ResNet50_vd + VehicleNeck + CircleMargin": ("ResNet50_vd", "VehicleNeck", (2048, 32), "CircleMargin"),
}


def original(name):
    """Return the network of Paddle that a name stands for."""
    import paddle_networks as networks

    if name.startswith("PPLCNet_x"):
        return networks.PPLCNet(float(name.removeprefix("PPLCNet_x").replace("_", ".")))
    return {
        "ResNet50": lambda: networks.ResNet50(),
        "ResNet50_vd": lambda: networks.ResNet50(vd=True),
        "ResNet50_last_stage_stride1": lambda: networks.ResNet50(last_stride=1),
        "PPLCNetV2_base": lambda: networks.PPLCNetV2(),
        "PPLCNetV2_base_ShiTu": lambda: networks.PPLCNetV2(shitu=True),
        "MobileNetV1": lambda: networks.MobileNetV1(),
        "MobileNetV3_large_x1_0": lambda: networks.MobileNetV3(),
        "MobileNetV3_small_x1_0": lambda: networks.MobileNetV3(large=False),
        "SwinTransformer_tiny_patch4_window7_224": lambda: networks.Swin(),
        "ViT_base_patch16_224": lambda: networks.ViT(),
        "CLIP_vit_base_patch16_224": lambda: networks.ViT(clip=True, conv_bias=False),
        # The mean of the large one has the class token in it.
        "CLIP_vit_large_patch14_224": lambda: networks.ViT(14, 1024, 24, 16, clip=True, conv_bias=False, first=0),
        "AlexNet": lambda: networks.AlexNet(),
        "VGG19": lambda: networks.VGG19(),
    }[name]()


def model(backbone, neck, sizes, head):
    """Return a whole model of Paddle."""
    import paddle_networks as networks

    gear = {"FC": networks.Linear, "VehicleNeck": networks.VehicleNeck}.get(neck)
    last = networks.Linear(sizes[1], 7) if head == "FC" else networks.Cosine(sizes[1], 7)
    return networks.RecModel(original(backbone), gear(*sizes) if gear else networks.BNNeck(sizes[0]), last)


def shaken(network, seed):
    """Return a network whose norms, biases and statistics are not those of a fresh one, in evaluation mode."""
    import paddle

    paddle.seed(seed)
    for name, tensor in network.state_dict().items():
        if name.endswith("_variance") or (name.endswith("weight") and tensor.ndim == 1):
            tensor.set_value(paddle.uniform(tensor.shape, min=0.5, max=1.5))
        elif tensor.ndim == 1:
            tensor.set_value(paddle.randn(tensor.shape) * 0.1)
    network.eval()
    return network


def write(folder):
    """Write the weights of every network, and what it makes of a few images."""
    import paddle

    folder.mkdir(parents=True, exist_ok=True)
    makers = {name: (lambda name=name: original(name), size) for name, (_, size) in BACKBONES.items()}
    makers |= {name: (lambda parts=parts: model(*parts), 96) for name, parts in RECMODELS.items()}
    for seed, (name, (make, size)) in enumerate(makers.items()):
        network = shaken(make(), seed)
        images = np.random.default_rng(seed).standard_normal((4, 3, size, size), np.float32)
        with paddle.no_grad():
            features, outputs = (f(paddle.to_tensor(images)).numpy() for f in (network.features, network))
        paddle.save(network.state_dict(), str(folder / f"{name}.pdparams"))
        np.savez(folder / f"{name}.npz", images=images, features=features, outputs=outputs)
        print(name, features.shape, flush=True)


def fixtures(folder):
    """Write a few layers in both layouts of paddle.save, with what they give."""
    import paddle
    from paddle_networks import BNNeck, ConvBN, RecModel

    paddle.seed(0)
    network = shaken(RecModel(paddle.nn.Sequential(ConvBN(3, 4, 3)), BNNeck(4), paddle.nn.Linear(4, 5)), 0)
    folder.mkdir(parents=True, exist_ok=True)
    paddle.save(network.state_dict(), str(folder / "arrays.pdparams"))
    paddle.save({"model": network.state_dict()}, str(folder / "pairs.pdparams"))
    paddle.save(network.state_dict(), str(folder / "protocol2.pdparams"), protocol=2)


def ours(folder, name):
    """Return this package's features and outputs of a network's images, with the weights that Paddle wrote."""
    import torch

    from recnb.models import RecModel, create_backbone
    from recnb.models.heads import HEADS
    from recnb.models.necks import NECKS
    from recnb.models.weights import load_weights

    data, path = np.load(folder / f"{name}.npz"), folder / f"{name}.pdparams"
    images = torch.from_numpy(data["images"])
    with torch.inference_mode():
        if name in BACKBONES:
            options, size = BACKBONES[name]
            more = {"pretrained": path, "input_size": (3, size, size)}
            features = create_backbone(name, **options, **more).eval()(images)
            return features, features if options != FLAT else create_backbone(name, class_num=1000, **more).eval()(
                images
            )
        backbone, neck, sizes, head = RECMODELS[name]
        section = {"name": head, "embedding_size": sizes[1], "class_num": 7}
        section |= {"margin": 0.35, "scale": 64.0} if head == "CircleMargin" else {}
        keys = {"FC": ("embedding_size", "class_num"), "VehicleNeck": ("in_channels", "out_channels")}
        gear = dict(zip(keys.get(neck, ("num_features",)), sizes, strict=False))
        parts = NECKS.build({"name": neck, **gear}, "neck"), HEADS.build(section, "head")
        whole = RecModel(create_backbone(backbone, stop="flatten", input_size=(3, 96, 96)), *parts).eval()
        load_weights(whole, path)
        features = whole(images)["features"]
        return features, whole.head(features)


def compare(folder):
    """Print a row for each network; exit with 1 where the features differ."""
    lowest = 1.0
    for name in sorted((path.stem for path in folder.glob("*.pdparams")), key=[*BACKBONES, *RECMODELS].index):
        data = np.load(folder / f"{name}.npz")
        features, outputs = (value.double().numpy() for value in ours(folder, name))
        theirs = data["features"].astype(np.float64)
        cosines = (features * theirs).sum(1) / np.linalg.norm(features, axis=1) / np.linalg.norm(theirs, axis=1)
        off = np.abs(outputs - data["outputs"]).max() / np.abs(data["outputs"]).max()
        print(f"| {name} | {cosines.min():.8f} | {off:.1e} |", flush=True)
        lowest = min(lowest, cosines.min())
    return int(lowest < 0.99999)


if __name__ == "__main__":
    sys.exit({"write": write, "compare": compare, "fixtures": fixtures}[sys.argv[1]](Path(sys.argv[2])))
