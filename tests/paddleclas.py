"""The 36 configurations of PaddleClas with a RecModel, as facts, and drawn miniatures of the data sets they name.

`compose(name, folder)` is one of them with only what a machine without the data must change: paths, batch sizes, worker
processes, image sizes, numbers of classes and of epochs, and the weights that would be downloaded. `run(cfg, folder)`
writes it to a file and takes that file the whole way: two steps of training, one evaluation, a run folder.
"""
import copy
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from PIL import Image

from recnb import build_learner, build_loaders, build_model, load_config

PADDLE = "https://paddle-imagenet-models-name.bj.bcebos.com/dygraph"
TORCH_WEIGHTS = f"{PADDLE}/others/resnet50-19c8e357_torch2paddle.pdparams"
SCALE, FRACTION = 0.00392157, "1.0/255.0"
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CIFAR10 = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2471, 0.2435, 0.2616]}
CIFAR100 = {"mean": [0.5071, 0.4867, 0.4408], "std": [0.2675, 0.2565, 0.2761]}
BINARY = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}


# --- Operations -------------------------------------------------------------------------------------------------------


def normalize(scale=SCALE, order="", **stats) -> dict:
    return {"NormalizeImage": {"scale": scale, **(stats or IMAGENET), "order": order}}


DECODE, FLIP = {"DecodeImage": {"to_rgb": True, "channel_first": False}}, {"RandFlipImage": {"flip_code": 1}}
RESIZE, CROP = {"ResizeImage": {"size": 224}}, {"RandCropImage": {"size": 224}}
ERASE = {"RandomErasing": {"EPSILON": 0.5, "sl": 0.02, "sh": 0.4, "r1": 0.3, "mean": [0.0, 0.0, 0.0]}}
ERASE_MEAN = {"RandomErasing": {**ERASE["RandomErasing"], "mean": IMAGENET["mean"]}}
CENTRE = [DECODE, {"ResizeImage": {"resize_short": 256}}, {"CropImage": {"size": 224}}, normalize()]
TRAIN_PLAIN, TEST_PLAIN = [DECODE, CROP, FLIP, normalize(FRACTION)], [DECODE, RESIZE, normalize()]
TEST_FRACTION = [DECODE, RESIZE, normalize(FRACTION)]
TRAIN_ERASED = [DECODE, RESIZE, FLIP, normalize(), ERASE]
TRAIN_VEHICLE = [DECODE, RESIZE, FLIP, {"AugMix": {"prob": 0.5}}, normalize(), ERASE]
TENSOR = [{"ToTensor": None}, {"Normalize": IMAGENET}]
UPRIGHT = {"size": [128, 256], "return_numpy": False, "interpolation": "bilinear", "backend": "pil"}
PADDED = [FLIP, {"Pad": {"padding": 10}}, {"RandCropImageV2": {"size": [128, 256]}}]
SQUARE = {"ResizeImage": {"size": [224, 224], "return_numpy": False, "interpolation": "bilinear", "backend": "cv2"}}
TURNED = [DECODE, SQUARE, FLIP, {"Pad": {"padding": 10, "backend": "cv2"}}, {"RandCropImageV2": {"size": [224, 224]}},
          {"RandomRotation": {"prob": 0.5, "degrees": 90, "interpolation": "bilinear"}}, SQUARE,
          normalize(FRACTION, "hwc")]
CLIP_TRAIN = [DECODE, CROP, FLIP,
              {"TimmAutoAugment": {"config_str": "rand-m7-mstd0.5-inc1", "interpolation": "bicubic", "img_size": 224}},
              {"RandomRotation": {"prob": 0.3, "degrees": 90, "interpolation": "bicubic"}}, normalize(FRACTION)]
CLIP_TEST = [DECODE, {"ResizeImage": {"size": 224, "interpolation": "bicubic"}}, normalize(FRACTION)]


# --- Sections ---------------------------------------------------------------------------------------------------------


def split(name, root, listed, ops, batch_size, workers, sampler="DistributedBatchSampler", **more) -> dict:
    """One loader; `more` with a capital or of the sampler goes there, the rest to the data set."""
    drawn = {key: more.pop(key) for key in ("sample_per_id", "num_instances", "drop_last", "shuffle", "sample_method",
                                            "id_list", "ratio", "max_iters") if key in more}
    shared = more.pop("use_shared_memory", True)
    kind = {"name": sampler} if sampler else {}
    return {"dataset": {"name": name, "image_root": root, "cls_label_path": listed, **more, "transform_ops": ops},
            "sampler": {**kind, "batch_size": batch_size, "drop_last": False, "shuffle": False, **drawn},
            "loader": {"num_workers": workers, "use_shared_memory": shared}}


def both(name, root, query, gallery, ops, batch_size, workers, others=None, **more) -> dict:
    """The sections of Eval where two lists of one kind are retrieved with; `others` are the gallery's operations."""
    return {part: split(name, root, listed, own, batch_size, workers, **more)
            for part, listed, own in (("Query", query, ops), ("Gallery", gallery, others or ops))}


def settings(epochs, shape=(3, 224, 224), mode="retrieval", **more) -> dict:
    return {"checkpoints": None, "pretrained_model": None, "output_dir": "./output/", "device": "gpu",
            "save_interval": 1, "eval_during_train": True, "eval_interval": 1, "epochs": epochs, "print_batch_step": 10,
            "use_visualdl": False, "image_shape": list(shape), "save_inference_dir": "./inference",
            **({"eval_mode": mode} if mode else {}), **more}


def recmodel(backbone, stop=None, neck=None, head=None, pretrained=True, **more) -> dict:
    """The section Arch; `more` goes to the backbone."""
    parts = {"Backbone": {"name": backbone, "pretrained": pretrained, **more},
             "BackboneStopLayer": {"name": stop} if stop else None, "Neck": neck, "Head": head}
    return {"name": "RecModel", "infer_output_key": "features", "infer_add_softmax": False,
            **{part: section for part, section in parts.items() if section}}


def linear(size, classes, **more) -> dict:
    return {"name": "FC", "embedding_size": size, "class_num": classes, **more}


def arc(classes, margin, scale) -> dict:
    return {"name": "ArcMargin", "embedding_size": 512, "class_num": classes, "margin": margin, "scale": scale}


def loss(*terms, evaluated=None) -> dict:
    return {"Train": [{name: {"weight": 1.0, **args}} for name, args in terms],
            "Eval": [{name: {"weight": 1.0, **args}} for name, args in evaluated or [("CELoss", {})]]}


def optimizer(name, lr, rate, coeff=None, momentum=True, **more) -> dict:
    return {"name": name, **({"momentum": 0.9} if name == "Momentum" else {}),
            "lr": {"name": lr, **({"learning_rate": rate} if rate else {}), **more},
            **({"regularizer": {"name": "L2", "coeff": coeff}} if coeff else {})}


CE, SUPCON, TRIPLET = ("CELoss", {}), ("SupConLoss", {"views": 2}), ("TripletLossV2", {"margin": 0.5})
SMOOTHED = ("CELoss", {"epsilon": 0.1})
RECALL, MAP, TOP = {"Recallk": {"topk": [1, 5]}}, {"mAP": {}}, {"TopkAcc": {"topk": [1, 5]}}
OFF = {"use_dali": False, "to_static": False}
PK2 = {"sampler": "PKSampler", "sample_per_id": 2, "shuffle": True}
IDENTITY4 = {"sampler": "DistributedRandomIdentitySampler", "num_instances": 4, "shuffle": True}


def config(settings, arch, loss, optimizer, train, evaluation, metrics, **more) -> dict:
    return {"Global": settings, "Arch": arch, "Loss": loss, "Optimizer": optimizer,
            "DataLoader": {"Train": train, "Eval": evaluation}, "Metric": metrics, **more}


# --- Vehicles, logos, cartoon faces, products -------------------------------------------------------------------------

VERI, COMP, ALI = "./dataset/VeRI-Wild", "./dataset/CompCars", "./dataset/Aliproduct/"
STRIDE1, EMBED = "ResNet50_last_stage_stride1", {"name": "VehicleNeck", "in_channels": 2048, "out_channels": 512}
vehicle_reid = config(
    settings(160), recmodel(STRIDE1, "avg_pool", EMBED, arc(30671, 0.15, 32)), loss(CE, SUPCON),
    optimizer("Momentum", "Cosine", 0.04, 0.0005),
    split("VeriWild", f"{VERI}/images/", f"{VERI}/train_test_split/train_list_start0.txt", TRAIN_VEHICLE, 128, 6,
          **PK2, drop_last=True),
    both("VeriWild", f"{VERI}/images", f"{VERI}/train_test_split/test_3000_id_query.txt",
         f"{VERI}/train_test_split/test_3000_id.txt", TEST_PLAIN, 64, 6), {"Eval": [RECALL, MAP]})
vehicle_lcnet = {**vehicle_reid, "Arch": recmodel("PPLCNet_x2_5", "flatten", linear(1280, 512), arc(30671, 0.15, 32),
                                                  use_ssld=True)}
comp = {"bbox_crop": True, "label_root": f"{COMP}/label/"}
vehicle_cls = config(
    settings(160, mode=None), recmodel(STRIDE1, "avg_pool", EMBED, arc(431, 0.15, 32)), loss(CE, SUPCON),
    optimizer("Momentum", "Cosine", 0.01, 0.0005),
    split("CompCars", f"{COMP}/image/", f"{COMP}/train_test_split/classification/train_label.txt", TRAIN_VEHICLE[1:],
          128, 8, **PK2, **comp),
    split("CompCars", f"{COMP}/image/", f"{COMP}/train_test_split/classification/test_label.txt", TEST_PLAIN[1:],
          128, 8, **comp), {"Train": [TOP], "Eval": [TOP]})
logos = "dataset/LogoDet-3K-crop"
logo = config(
    settings(120), recmodel(STRIDE1, "avg_pool", EMBED, {"name": "CircleMargin", "margin": 0.35, "scale": 64,
                                                         "embedding_size": 512, "class_num": 3000}),
    loss(CE, ("PairwiseCosface", {"margin": 0.35, "gamma": 64})), optimizer("Momentum", "Cosine", 0.04, 0.0001),
    split("ImageNetDataset", f"{logos}/train/", f"{logos}/train_list.txt",
          [*TRAIN_VEHICLE[:-1], {"RandomErasing": {"EPSILON": 0.5}}], 128, 6, **PK2, drop_last=True),
    {"Query": split("ImageNetDataset", f"{logos}/val/", f"{logos}/query_list.txt", TEST_PLAIN, 128, 8),
     "Gallery": split("ImageNetDataset", f"{logos}/train/", f"{logos}/train_list.txt", TEST_PLAIN, 128, 8)},
    {"Eval": [RECALL, MAP]})
faces = "./dataset/iCartoonFace"
cartoon = config(
    settings(120, infer_imgs=None, feature_normalize=True), recmodel("ResNet50", "flatten", head=linear(2048, 5013)),
    loss(CE), optimizer("Momentum", "Piecewise", 0.1, 0.0001, decay_epochs=[30, 60, 90],
                        values=[0.1, 0.01, 0.001, 0.0001]),
    split("ICartoonDataset", faces, f"{faces}/train_list.txt", [DECODE, CROP, FLIP, normalize()], 256, 6, shuffle=True),
    both("ICartoonDataset", faces, f"{faces}/query.txt", f"{faces}/gallery.txt", CENTRE, 64, 8),
    {"Train": [TOP], "Eval": [{"Recallk": {"topk": [1]}}]})
cartoon["Arch"] |= {"BackboneStopLayer": {"name": "flatten", "output_dim": 2048}, "infer_add_softmax": "false"}
aliproduct = config(
    settings(120, mode="classification", eval_interval=10),
    recmodel("ResNet50_vd", "flatten", linear(2048, 512), linear(512, 50030)), loss(CE),
    optimizer("Momentum", "Cosine", 0.05, 0.00007),
    split("ImageNetDataset", ALI, f"{ALI}train_list.txt", [DECODE, CROP, FLIP, normalize()], 64, 4, shuffle=True),
    split("ImageNetDataset", ALI, f"{ALI}val_list.txt", CENTRE, 64, 4), {"Train": [TOP], "Eval": [TOP]})
hashed = [DECODE, {"ResizeImage": {"size": 256}}, {"RandCropImage": {"size": 227}}, FLIP, normalize(FRACTION, **BINARY)]
dlbhc = config(
    settings(100, mode=None, output_dir="./output_dlbhc/", feature_normalize=False, feature_binarize="round"),
    recmodel("MobileNetV3_large_x1_0", head=linear(512, 50030), class_num=512), loss(SMOOTHED),
    optimizer("Momentum", "Piecewise", 0.1, decay_epochs=[50, 150], values=[0.1, 0.01, 0.001]),
    split("ImageNetDataset", ALI, f"{ALI}train_list.txt", hashed, 128, 4, shuffle=True),
    split("ImageNetDataset", ALI, f"{ALI}val_list.txt",
          [DECODE, {"ResizeImage": {"size": 227}}, normalize(FRACTION, **BINARY)], 256, 4),
    {"Train": [TOP], "Eval": [TOP]},
    Infer={"infer_imgs": "docs/images/inference_deployment/whl_demo.jpg", "batch_size": 10,
           "transforms": [DECODE, {"ResizeImage": {"resize_short": 256}}, {"CropImage": {"size": 227}},
                          normalize(FRACTION, **BINARY), {"ToCHWImage": None}],
           "PostProcess": {"name": "Topk", "topk": 5, "class_id_map_file": "ppcls/utils/imagenet1k_label_list.txt"}})
dlbhc["Arch"]["infer_add_softmax"] = "false"
steps = {"gamma": 0.5, "verbose": False, "last_epoch": -1}
product = {"save_interval": 10, "eval_interval": 10,
           "pretrained_model": f"{PADDLE}/rec/models/pretrain/product_ResNet50_vd_Aliproduct_v1.0_pretrained.pdparams"}
inshop = config(
    settings(120, **product), recmodel("ResNet50_vd", "flatten", linear(2048, 512), arc(3997, 0.15, 30), False),
    loss(CE, TRIPLET), optimizer("Momentum", "MultiStepDecay", 0.04, 0.0005, milestones=[30, 60, 70, 80, 90, 100],
                                 **steps),
    split("ImageNetDataset", "./dataset/Inshop/", "./dataset/Inshop/train_list.txt", TRAIN_ERASED, 64, 4, **PK2,
          drop_last=True),
    both("ImageNetDataset", "./dataset/Inshop/", "./dataset/Inshop/query_list.txt", "./dataset/Inshop/gallery_list.txt",
         TEST_PLAIN, 64, 4, TEST_FRACTION), {"Eval": [RECALL]})
SOP = ("./dataset/SOP/", "./dataset/SOP/test_list.txt", "./dataset/SOP/test_list.txt")
sop = {**inshop, "Arch": recmodel("ResNet50_vd", "flatten", linear(2048, 512), arc(11319, 0.15, 30), False),
       "Optimizer": optimizer("Momentum", "MultiStepDecay", 0.01, 0.0005, milestones=[30, 60, 70, 80, 90, 100],
                              **steps),
       "DataLoader": {"Train": split("VeriWild", SOP[0], "./dataset/SOP/train_list.txt", TRAIN_ERASED, 64, 4, **PK2),
                      "Eval": both("VeriWild", *SOP, TEST_PLAIN, 32, 4)}, "Metric": {"Eval": [RECALL, MAP]}}

# --- General recognition: one product set to judge by, many sets to learn from ----------------------------------------

ALL = ("ImageNetDataset", "./dataset/", "./dataset/train_reg_all_data.txt")
aligned = both("VeriWild", ALI, f"{ALI}val_list.txt", f"{ALI}val_list.txt", TEST_PLAIN, 64, 4)
lcnet = recmodel("PPLCNet_x2_5", "flatten", linear(1280, 512), arc(185341, 0.2, 30), use_ssld=True)
warm = {"warmup_epoch": 5}
general = config(
    settings(100, **OFF), lcnet, loss(CE), optimizer("Momentum", "Cosine", 0.04, 0.00001, **warm),
    split(*ALL, TRAIN_PLAIN, 256, 4, shuffle=True), aligned, {"Eval": [RECALL, MAP]})
general_binary = {
    **general, "Global": settings(100, **OFF, feature_normalize=False, feature_binarize="sign"),
    "Arch": recmodel("PPLCNet_x2_5_Tanh", head=linear(512, 185341), use_ssld=True, class_num=512),
    "Metric": {"Eval": [RECALL]}}
pairs = {"model_name_pairs": [["Student", "Teacher"]]}
mutual = [("DistillationGTCELoss", {"key": "logits", "model_names": ["Student", "Teacher"]}),
          ("DistillationDMLLoss", {"key": "logits", **pairs})]
judged = [("DistillationGTCELoss", {"model_names": ["Student"]})]
dml = {
    **general, "Loss": loss(*mutual, evaluated=judged), "Metric": {"Eval": [RECALL]},
    "Arch": {"name": "DistillationModel", "infer_output_key": "features", "infer_add_softmax": False, "is_rec": True,
             "infer_model_name": "Student", "pretrained_list": None, "freeze_params_list": [False, False],
             "models": [{"Teacher": lcnet}, {"Student": lcnet}]},
    "Optimizer": optimizer("Momentum", "Cosine", 0.02, 0.00001, **warm),
    "DataLoader": {"Train": split(*ALL, TRAIN_PLAIN, 64, 4, shuffle=True), "Eval": aligned}}
udml = {**dml, "Loss": loss(*mutual, ("DistillationDistanceLoss", {"key": "backbone", **pairs}), evaluated=judged)}
gallery2fc = {
    "Global": {"pretrained_model": "./pretrained/general_PPLCNet_x2_5_pretrained_v1.0_quant",
               "image_shape": [3, 224, 224], "save_inference_dir": "./inference/general_PPLCNet_x2_5_quant/inference"},
    "Slim": {"quant": {"name": "pact"}},
    "Arch": {key: value for key, value in recmodel(
        "PPLCNet_x2_5", "flatten", linear(1280, 512), arc(185341, 0.2, 30), False, use_ssld=True).items()
        if not key.startswith("infer")},
    "IndexProcess": {"image_root": "./drink_dataset_v1.0/gallery/", "batch_size": 2, "delimiter": "\t",
                     "data_file": "./drink_dataset_v1.0/gallery/drink_label.txt",
                     "transform_ops": [*CENTRE[1:3], normalize(FRACTION), {"ToCHWImage": None}]}}
V2 = (*ALL[:2], "./dataset/train_reg_all_data_v2.txt")
SHITU = "./dataset/ppshitu_traindata/Aliproduct"
clip_base = config(
    settings(20, **OFF, save_interval=5),
    recmodel("CLIP_vit_base_patch16_224", "flatten", linear(512, 512), arc(192613, 0.2, 30), return_embed=True,
             return_mean_embed=True), loss(CE), optimizer("Momentum", "Cosine", 0.02, 0.00002, warmup_epoch=1),
    split(*V2, CLIP_TRAIN, 64, 8, shuffle=True),
    both("VeriWild", SHITU, f"{SHITU}/val_list.txt", f"{SHITU}/val_list.txt", CLIP_TEST, 32, 12),
    {"Eval": [RECALL, MAP]},
    AMP={"use_amp": False, "use_fp16_test": False, "scale_loss": 128.0, "use_dynamic_loss_scaling": True,
         "use_promote": False, "level": "O1"})
clip_large = {**clip_base, "Global": settings(10, **OFF, save_interval=5),
              "Arch": recmodel("CLIP_vit_large_patch14_224", "flatten", linear(512, 512), arc(192613, 0.2, 30),
                               return_embed=True, return_mean_embed=True),
              "Optimizer": optimizer("Momentum", "Cosine", 0.0025, 0.00002, warmup_epoch=1),
              "DataLoader": {**clip_base["DataLoader"], "Train": split(*V2, CLIP_TRAIN, 32, 4, shuffle=True)}}
ONES, ZEROS = ({"initializer": {"name": "Constant", "value": value}} for value in (1.0, 0.0))
bnneck = {"name": "BNNeck", "num_features": 512, "weight_attr": ONES, "bias_attr": {**ZEROS, "learning_rate": 1e-20}}
bare = {"weight_attr": {"initializer": {"name": "Normal", "std": 0.001}}, "bias_attr": False}
lcnet_v2 = config(
    settings(100, output_dir="./output", print_batch_step=20, use_dali=False, retrieval_feature_from="features",
             re_ranking=False),
    recmodel("PPLCNetV2_base_ShiTu", "flatten", bnneck, linear(512, 192612, **bare), use_ssld=True, class_expand=512),
    loss(SMOOTHED, ("TripletAngularMarginLoss", {
        "feature_from": "features", "margin": 0.5, "reduction": "mean", "add_absolute": True, "ap_value": 0.8,
        "absolute_loss_weight": 0.1, "normalize_feature": True, "an_value": 0.4})),
    optimizer("Momentum", "Cosine", 0.06, 0.00001, **warm),
    split(*V2, TURNED, 256, 4, "PKSampler", relabel=True, sample_per_id=4, shuffle=True, sample_method="id_avg_prob",
          id_list=[50030, 80700, 92019, 96015], ratio=[4, 4]),
    both("VeriWild", ALI, f"{ALI}val_list.txt", f"{ALI}val_list.txt", [DECODE, SQUARE, normalize(FRACTION, "hwc")],
         64, 4),
    {"Eval": [RECALL, MAP]}, AMP={"scale_loss": 65536, "use_dynamic_loss_scaling": True, "level": "O1"})

# --- Persons ----------------------------------------------------------------------------------------------------------

MARKET = ("Market1501", "./dataset/")
PIL = {"backend": "pil"}
person = settings(120, (3, 256, 128), save_interval=40, eval_interval=10, print_batch_step=20, re_ranking=False)
torchlike = {"initializer": {"name": "KaimingUniform", "fan_in": 12288}}
hard = ("TripletLossV2", {"margin": 0.3, "normalize_feature": False, "feature_from": "backbone"})
tenfold = [0.00035, 0.000035, 0.0000035]
baseline = config(
    {**person, "retrieval_feature_from": "backbone"},
    recmodel("ResNet50", "flatten", None, linear(2048, 751, weight_attr=torchlike, bias_attr=torchlike), TORCH_WEIGHTS,
             stem_act=None), loss(CE, hard),
    optimizer("Adam", "Piecewise", None, 0.0005, decay_epochs=[40, 70], values=tenfold, by_epoch=True, last_epoch=0),
    split(*MARKET, "bounding_box_train", [{"ResizeImage": UPRIGHT}, *PADDED, *TENSOR], 64, 4, **IDENTITY4, **PIL),
    both(*MARKET, "query", "bounding_box_test", [{"ResizeImage": UPRIGHT}, *TENSOR], 128, 4, **PIL),
    {"Eval": [RECALL, MAP]})
warmed = {"warmup_epoch": 10, "warmup_start_lr": 0.0000035, "by_epoch": True, "last_epoch": 0}
strong = {
    **baseline, "Global": {**person, "retrieval_feature_from": "features"},
    "Arch": recmodel(STRIDE1, "flatten", {**bnneck, "num_features": 2048}, linear(2048, 751, **bare), TORCH_WEIGHTS,
                     stem_act=None), "Loss": loss(SMOOTHED, hard),
    "Optimizer": optimizer("Adam", "Piecewise", None, 0.0005, decay_epochs=[30, 60], values=tenfold, **warmed),
    "DataLoader": {**baseline["DataLoader"], "Train": split(
        *MARKET, "bounding_box_train", [{"ResizeImage": UPRIGHT}, *PADDED, *TENSOR, ERASE_MEAN], 64, 4, **IDENTITY4,
        **PIL)}}


def entry(section, scope) -> dict:
    """A section as an entry of a list of optimizers."""
    return {section["name"]: {"scope": scope, **{key: value for key, value in section.items() if key != "name"}}}


centred = {
    **strong, "Loss": loss(SMOOTHED, hard, ("CenterLoss", {
        "weight": 0.0005, "num_classes": 751, "feat_dim": 2048, "feature_from": "backbone"})),
    "Optimizer": [entry(strong["Optimizer"], "RecModel"),
                  entry(optimizer("SGD", "ConstLR", 1000.0), "CenterLoss")]}
BICUBIC = {"ResizeImage": {"size": [128, 256], "interpolation": "bicubic", "backend": "pil"}}
ureid_norm = {"NormalizeImage": {**IMAGENET, "order": ""}}
ureid = config(
    settings(120, (3, 128, 256), save_interval=10, eval_interval=10),
    recmodel(STRIDE1, "avg_pool", {"name": "BNNeck", "num_features": 2048}, linear(2048, 751), stem_act=None),
    loss(CE, SUPCON), optimizer("Momentum", "Cosine", 0.04, 0.0005),
    split("Market1501", "./dataset", "bounding_box_train",
          [BICUBIC, FLIP, {"Pad": {"padding": 10, "fill": 0}},
           {"RandomCrop": {"size": [128, 256], "pad_if_needed": False}}, ureid_norm, ERASE_MEAN], 16, 6, "PKSampler",
          sample_per_id=4, drop_last=True, shuffle=True),
    both("Market1501", "./dataset", "query", "bounding_box_test", [BICUBIC, ureid_norm], 128, 6),
    {"Eval": [RECALL, MAP]})
METABIN_SIZE = {"ResizeImage": {**UPRIGHT, "interpolation": "bicubic"}}
jitter = {"ColorJitter": {"brightness": 0.15, "contrast": 0.15, "saturation": 0.1, "hue": 0.1}}
metabin_ops = [METABIN_SIZE, *PADDED, jitter, *TENSOR]
basic = [("CELossForMetaBIN", {"epsilon": 0.1}), ("TripletLossForMetaBIN", {"margin": 0.3, "feature_from": "backbone"})]
domains = [("IntraDomainScatterLoss", {"normalize_feature": True, "feature_from": "backbone"}),
           ("InterDomainShuffleLoss", {"normalize_feature": False, "feature_from": "backbone"})]
cycle = {"epochs": 348, "step_each_epoch": 50}
metabin = config(
    settings(348, (3, 256, 128), iter_per_epoch=50, warmup_iter=10, save_interval=8, eval_interval=8, re_ranking=False,
             print_batch_step=25, retrieval_feature_from="features", train_mode="metabin"),
    recmodel("ResNet50_metabin", "flatten", {"name": "MetaBNNeck", "num_features": 2048, "use_global_stats": True},
             linear(2048, 751, bias_attr=False, weight_attr={"initializer": {
                 "name": "KaimingUniform", "negative_slope": 2.23606, "nonlinearity": "leaky_relu"}}), TORCH_WEIGHTS,
             bias_lr_factor=2.0),
    {**loss(*basic, *domains, evaluated=basic[1:]), "Basic": loss(*basic)["Train"],
     "MetaTrain": loss(*basic, *domains)["Train"], "MetaTest": loss(*basic)["Train"]},
    [entry(optimizer("Momentum", "MultiStepDecay", 0.01, 0.0005, **cycle, milestones=[145, 261], gamma=0.1,
                     warmup_epoch=29, warmup_start_lr=0.0001, by_epoch=False, last_epoch=-1),
           ".*(conv|batch_norm|instance_norm|feat_bn|fc)"),
     entry(optimizer("SGD", "Constant", 0.2, last_epoch=-1), "backbone.*gate"),
     entry(optimizer("SGD", "Cyclic", None, **cycle, base_learning_rate=0.001, max_learning_rate=0.1, warmup_epoch=0,
                     warmup_start_lr=1, step_size_up=1095, step_size_down=1095, by_epoch=False, last_epoch=0),
           "RecModel")],
    split(*MARKET, "bounding_box_train", metabin_ops, 96, 4, "NaiveIdentityBatchSampler", num_instances=4,
          drop_last=True, **PIL),
    both("DukeMTMC", "./dataset/", "query", "bounding_box_test", [METABIN_SIZE, *TENSOR], 128, 4, **PIL),
    {"Eval": [{"Recallk": {"topk": [1, 5, 10]}}, MAP]}, AMP={"scale_loss": 65536, "use_dynamic_loss_scaling": True})
metabin["DataLoader"]["Metalearning"] = {"Train": {
    **metabin["DataLoader"]["Train"], "sampler": {"name": "DomainShuffleBatchSampler", "batch_size": 96,
                                                  "num_instances": 4, "drop_last": True, "camera_to_domain": True}}}

# --- Hashing, memory, quick start -------------------------------------------------------------------------------------

CIFAR = ("ImageNetDataset", "./dataset/CIFAR10/", "./dataset/CIFAR10/train_list.txt")
hash_settings = settings(150, output_dir="./output", save_interval=15, eval_interval=15, **OFF,
                         feature_normalize=False, feature_binarize="sign")


def hashing(kind, args, optimizer, **parts) -> dict:
    term = (kind, args)
    return config(hash_settings, recmodel("AlexNet", **parts, class_num=48), loss(term, evaluated=[term]), optimizer,
                  split(*CIFAR, TEST_FRACTION, 128, 4, None, shuffle=True),
                  both(*CIFAR[:2], "./dataset/CIFAR10/test_list.txt", CIFAR[2], TEST_FRACTION, 128, 4, sampler=None),
                  {"Eval": [MAP, RECALL]})


slow_adam = {**optimizer("Adam", "Piecewise", 0.00001, decay_epochs=[200], values=[0.00001, 0.000001]),
             "beta1": 0.9, "beta2": 0.999}
dch = hashing("DCHLoss", {"gamma": 20.0, "_lambda": 0.1, "n_class": 10},
              optimizer("SGD", "Piecewise", 0.005, 0.00001, decay_epochs=[200], values=[0.005, 0.0005]))
dshsd = hashing("DSHSDLoss", {"alpha": 0.05}, slow_adam, neck={"name": "Tanh"}, head=linear(48, 10))
lcdsh = hashing("LCDSHLoss", {"_lambda": 3, "n_class": 10}, slow_adam)
LISTS = ("ImageNetDataset", "./dataset/cifar10/", "./dataset/cifar10/cifar10-2/")
vgg = config(
    settings(128, output_dir="./output", feature_normalize=False, feature_binarize="round"),
    recmodel("VGG19Sigmoid", head=linear(48, 10), class_num=48), loss(SMOOTHED),
    optimizer("Momentum", "Piecewise", 0.01, decay_epochs=[200], values=[0.01, 0.001]),
    split(*LISTS[:2], f"{LISTS[2]}train.txt", [*hashed[:2], CROP, *hashed[3:]], 128, 4, shuffle=True),
    both(*LISTS[:2], f"{LISTS[2]}test.txt", f"{LISTS[2]}database.txt",
         [DECODE, RESIZE, normalize(FRACTION, **BINARY)], 512, 4),
    {"Train": [TOP], "Eval": [{"mAP": None}, {"Precisionk": {"topk": [1, 5]}}]})
vgg["Arch"]["infer_add_softmax"] = "false"
contrast = {"margin": 0.5, "embedding_size": 128, "epsilon": 1.0e-5, "normalize_feature": True,
            "feature_from": "features"}
pil_test = [{"Resize": {"size": 256}}, {"CenterCrop": {"size": 224}}, *TENSOR]
xbm = config(
    settings(35, iter_per_epoch=1000, print_batch_step=20, retrieval_feature_from="features", re_ranking=False),
    recmodel("ResNet50_adaptive_max_pool2d", "flatten", linear(
        2048, 128, bias_attr=ZEROS, weight_attr={"initializer": {
            "name": "KaimingNormal", "fan_in": 128, "negative_slope": 0.0, "nonlinearity": "leaky_relu"}}),
        pretrained=TORCH_WEIGHTS, stem_act=None),
    loss(("ContrastiveLoss_XBM", {"xbm_size": 55000, "xbm_weight": 1.0, "start_iter": 1000, **contrast}),
         evaluated=[("ContrastiveLoss", contrast)]),
    optimizer("Adam", "ReduceOnPlateau", 0.0001, 0.0005, mode="max", factor=0.1, patience=4, threshold=0.001,
              threshold_mode="rel", cooldown=2, min_lr=0.000005, epsilon=1e-8, by_epoch=True),
    split("VeriWild", "./dataset/SOP", "./dataset/SOP/train_list.txt",
          [{"Resize": {"size": 256}}, {"RandomResizedCrop": {"scale": [0.2, 1], "size": 224}},
           {"RandomHorizontalFlip": {"prob": 0.5}}, *TENSOR], 64, 8, **IDENTITY4, max_iters=1000, **PIL),
    both("VeriWild", "./dataset/SOP", *SOP[1:], pil_test, 256, 8, **PIL), {"Eval": [RECALL, MAP]})
CUB = "./dataset/CUB_200_2011/"
quick_start = config(
    settings(50, save_interval=5),
    recmodel("MobileNetV1", "flatten", linear(1024, 512), arc(101, 0.15, 30), False), loss(CE, TRIPLET),
    optimizer("Momentum", "MultiStepDecay", 0.01, 0.0005, milestones=[20, 30, 40], **steps),
    split("VeriWild", CUB, f"{CUB}train_list.txt", TRAIN_ERASED, 64, 4, "DistributedRandomIdentitySampler",
          num_instances=2, shuffle=True),
    both("VeriWild", CUB, f"{CUB}test_list.txt", f"{CUB}test_list.txt", TEST_PLAIN, 64, 4, TEST_FRACTION),
    {"Eval": [RECALL, MAP]})

# --- Faces with a loop of their own, half-labelled images, small networks ---------------------------------------------

HALVES = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
face_ops = [{"CropWithPadding": {"prob": 0.2, "padding_num": 0, "size": [112, 112], "scale": [0.2, 1.0],
                                 "ratio": [0.75, 1.3333333333333333]}}, {"RandomInterpolationAugment": {"prob": 0.2}},
            {"ColorJitter": {"prob": 0.2, "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0}},
            {"RandomHorizontalFlip": None}, {"ToTensor": None}, {"Normalize": HALVES}]
adaface = config(
    settings(26, (3, 112, 112), "adaface"),
    {"name": "RecModel", "infer_output_key": "features", "infer_add_softmax": False,
     "Backbone": {"name": "AdaFace_IR_18", "input_size": [112, 112]},
     "Head": {"name": "AdaMargin", "embedding_size": 512, "class_num": 70722, "m": 0.4, "s": 64, "h": 0.333,
              "t_alpha": 0.01}},
    {"Train": loss(CE)["Train"]},
    optimizer("Momentum", "Piecewise", 0.1, 0.0005, decay_epochs=[12, 20, 24], values=[0.1, 0.01, 0.001, 0.0001]),
    {"dataset": {"name": "AdaFaceDataset", "root_dir": "dataset/face/", "transform": face_ops,
                 "label_path": "dataset/face/train_filter_label.txt"},
     "sampler": {"name": "DistributedBatchSampler", "batch_size": 256, "drop_last": False, "shuffle": True},
     "loader": {"num_workers": 6, "use_shared_memory": True}},
    {"dataset": {"name": "FiveValidationDataset", "val_data_path": "dataset/face/faces_emore",
                 "concat_mem_file_name": "dataset/face/faces_emore/concat_validation_memfile"},
     "sampler": {"name": "BatchSampler", "batch_size": 256, "drop_last": False, "shuffle": True},
     "loader": {"num_workers": 6, "use_shared_memory": True}}, {"Train": [TOP]})


def ccssl(name, classes, width, size, per_label, batch, unlabelled, crop, stats, strong_stats) -> dict:
    weak = [FLIP, {"Pad_paddle_vision": {"padding": 4, "padding_mode": "reflect"}},
            {"RandCropImageV2": {"size": [32, 32]}}]
    last = normalize(FRACTION, "hwc", **stats)
    data = {"name": name, "data_file": None, "mode": "train", "download": True, "backend": "pil"}
    loader = {"num_workers": 4, "use_shared_memory": True}

    def part(batch_size, drop_last, **dataset) -> dict:
        return {"dataset": {**data, **dataset}, "loader": loader,
                "sampler": {"name": "DistributedBatchSampler", "batch_size": batch_size, "drop_last": drop_last,
                            "shuffle": True}}

    return {
        "Global": settings(1024, (3, 32, 32), None, output_dir="./output", save_interval=-1, iter_per_epoch=1024,
                           print_batch_step=20, use_dali=False, train_mode="fixmatch_ccssl"),
        "SSL": {"T": 1, "threshold": 0.95}, "EMA": {"decay": 0.999},
        "Arch": {"name": "RecModel", "infer_output_key": "logits", "infer_add_softmax": False, "use_sync_bn": True,
                 "head_feature_from": "backbone",
                 "Backbone": {"name": "WideResNet", "widen_factor": width, "depth": 28, "dropout": 0, "low_dim": 64,
                              "num_classes": classes, "proj": False, "proj_after": False},
                 "BackboneStopLayer": {"name": "bn1"},
                 "Neck": {"name": "FRFNNeck", "num_features": size, "low_dim": 64}, "Head": linear(size, classes)},
        "Loss": loss(("CELoss", {"reduction": "mean"})),
        "UnLabelLoss": {"Train": loss(("CCSSLCELoss", {}), ("SoftSupConLoss", {"temperature": 0.07}))["Train"]},
        "Optimizer": {"name": "Momentum", "momentum": 0.9, "use_nesterov": True, "weight_decay": 0.001,
                      "lr": {"name": "CosineFixmatch", "learning_rate": 0.03, "num_warmup_steps": 0}},
        "DataLoader": {
            **stats, "Train": part(batch, True, sample_per_label=per_label, expand_labels=1,
                                   transform_ops=[*weak, last]),
            "UnLabelTrain": part(unlabelled, True, transform_ops_weak=[*weak, last], transform_ops_strong=[
                *weak, {"RandAugment": {"num_layers": 2, "magnitude": 10}}, last], transform_ops_strong2=[
                {crop: {"size": [32, 32]}}, FLIP, {"RandomApply": {"transforms": [{"RawColorJitter": {
                    "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}}], "p": 1.0}},
                {"RandomGrayscale": {"p": 0.2}}, normalize(FRACTION, "hwc", **strong_stats)]),
            "Eval": part(batch, False, mode="test", transform_ops=[last])},
        "Metric": {"Eval": [TOP]}}


def slimmed(base, epochs, rate, slim, batch_size, weights=None, **more) -> dict:
    """A configuration as slim/ has it: fine-tuned from `weights`, pruned or quantised."""
    cfg = copy.deepcopy({**base, "Slim": slim})
    cfg["Global"] |= {"epochs": epochs, **({"pretrained_model": f"{PADDLE}/rec/models/pretrain/{weights}.pdparams"}
                                           if weights else {}), **more}
    cfg["Optimizer"]["lr"]["learning_rate"] = rate
    cfg["DataLoader"]["Train"]["sampler"] |= {"batch_size": batch_size, "drop_last": False}
    return cfg


PRUNE, QUANT = {"prune": {"name": "fpgm", "pruned_ratio": 0.3}}, {"quant": {"name": "pact"}}
CLS, REID = "vehicle_cls_ResNet50_CompCars_v1.2_pretrained", "vehicle_reid_ResNet50_VERIWild_v1.1_pretrained"
general_quantized = slimmed(general, 30, 0.002, QUANT, 128, "general_PPLCNet_x2_5_pretrained_v1.0")
general_quantized["Arch"]["Backbone"]["pretrained"] = False
general_quantized["Metric"] = {"Eval": [RECALL]}

CONFIGS = {
    "Cartoonface/ResNet50_icartoon": cartoon,
    "DeepHash/DCH": dch,
    "DeepHash/DSHSD": dshsd,
    "DeepHash/LCDSH": lcdsh,
    "GeneralRecognition/Gallery2FC_PPLCNet_x2_5": gallery2fc,
    "GeneralRecognition/GeneralRecognition_PPLCNet_x2_5": general,
    "GeneralRecognition/GeneralRecognition_PPLCNet_x2_5_binary": general_binary,
    "GeneralRecognition/GeneralRecognition_PPLCNet_x2_5_dml": dml,
    "GeneralRecognition/GeneralRecognition_PPLCNet_x2_5_udml": udml,
    "GeneralRecognitionV2/GeneralRecognitionV2_CLIP_vit_base": clip_base,
    "GeneralRecognitionV2/GeneralRecognitionV2_CLIP_vit_large": clip_large,
    "GeneralRecognitionV2/GeneralRecognitionV2_PPLCNetV2_base": lcnet_v2,
    "Logo/ResNet50_ReID": logo,
    "Products/MV3_Large_1x_Aliproduct_DLBHC": dlbhc,
    "Products/ResNet50_vd_Aliproduct": aliproduct,
    "Products/ResNet50_vd_Inshop": inshop,
    "Products/ResNet50_vd_SOP": sop,
    "ResNet50_UReID_infer": ureid,
    "Vehicle/PPLCNet_2.5x_ReID": vehicle_lcnet,
    "Vehicle/ResNet50": vehicle_cls,
    "Vehicle/ResNet50_ReID": vehicle_reid,
    "metric_learning/adaface_ir18": adaface,
    "metric_learning/xbm_resnet50": xbm,
    "quick_start/MobileNetV1_retrieval": quick_start,
    "quick_start/professional/VGG19_CIFAR10_DeepHash": vgg,
    "reid/MetaBIN_ResNet50_cross_domain": metabin,
    "reid/strong_baseline/baseline": baseline,
    "reid/strong_baseline/softmax_triplet": strong,
    "reid/strong_baseline/softmax_triplet_with_center": centred,
    "slim/GeneralRecognition_PPLCNet_x2_5_quantization": general_quantized,
    "slim/ResNet50_vehicle_cls_prune": slimmed(vehicle_cls, 160, 0.01, PRUNE, 128, CLS),
    "slim/ResNet50_vehicle_cls_quantization": slimmed(vehicle_cls, 80, 0.001, QUANT, 64, CLS),
    "slim/ResNet50_vehicle_reid_prune": slimmed(vehicle_reid, 160, 0.01, PRUNE, 128, REID),
    "slim/ResNet50_vehicle_reid_quantization": slimmed(vehicle_reid, 40, 0.001, QUANT, 64, REID),
    "ssl/CCSSL/FixMatchCCSSL_cifar100_10000_4gpu": ccssl(
        "Cifar100", 100, 8, 512, 100, 16, 112, "RandomResizedCrop", CIFAR100,
        {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}),
    "ssl/CCSSL/FixMatchCCSSL_cifar10_4000_4gpu": ccssl(
        "Cifar10", 10, 2, 128, 400, 64, 448, "RandCropImageV2", CIFAR10, CIFAR10),
}


# --- Made small -------------------------------------------------------------------------------------------------------

CLASSES = 4
SMALL = {"epochs": 1, "iter_per_epoch": 2, "max_iters": 2, "batch_size": 8, "num_workers": 0, "num_classes": CLASSES,
         "id_list": [0, 1, 2, 3], "pretrained": False, "pretrained_model": None}
SIDES = {}  # of networks that take no smaller images
SIZES = ("size", "resize_short", "img_size", "image_shape")


def compose(name: str, folder: Path) -> dict:
    """The configuration of that name over a miniature of its data set, drawn below `folder`."""
    return over_miniature(CONFIGS[name], folder)


def over_miniature(cfg: dict, folder: Path, **more) -> dict:
    """A copy that costs seconds: small (SMALL and `more` by key), and over drawn images in its data set's layout."""
    largest = SIDES.get(cfg["Arch"].get("Backbone", {}).get("name"), 64)
    small = shrunk(cfg, {**SMALL, **more}, largest / max(cfg["Global"]["image_shape"][1:]))
    for place, part in parts(small):
        section = place["dataset"]
        place["dataset"] = {**section, **miniature(section["name"], folder)[part]}
    return small


def shrunk(node, small: dict, factor: float, key: str = ""):
    """A copy of a part of a configuration, small by key, and image sizes multiplied by `factor`."""
    if key in small:
        return small[key]
    if isinstance(node, dict):
        classes = {"class_num": CLASSES} if key == "Head" and "class_num" in node else {}
        return {k: shrunk(v, small, factor, k) for k, v in node.items()} | classes
    if key in SIZES and isinstance(node, int):
        return node if node == 3 else round(node * factor)
    if key in ("num_instances", "sample_per_id"):
        return min(node, 4)
    return [shrunk(v, small, factor, key) for v in node] if isinstance(node, list) else node


def parts(cfg: dict):
    """(the section of a loader, the part of a miniature that stands for its images) of each loader."""
    train, evaluation = cfg["DataLoader"]["Train"], cfg["DataLoader"]["Eval"]
    places = {"query": evaluation.get("Query"), "gallery": evaluation.get("Gallery")}
    files = {part: listed(place) for part, place in places.items() if place}
    yield train, "train"
    for part, place in places.items():
        if place:
            same = "test" if files["query"] == files["gallery"] else part
            yield place, "train" if listed(place) == listed(train) else same
    if "dataset" in evaluation:
        yield evaluation, "test"


def listed(place: dict) -> str:
    """What tells the images of a loader from those of another: a list file, a folder, or the part of a set."""
    return place["dataset"].get("cls_label_path") or place["dataset"].get("mode")


def metric_names(cfg: dict) -> list[str]:
    """The columns that Metric.Eval of a configuration announces."""
    forms = {"Recallk": "recall{}", "Precisionk": "precision@{}", "TopkAcc": "top{}"}
    return [forms[name].format(k) if name in forms else name for section in cfg["Metric"]["Eval"]
            for name, args in section.items() for k in (args or {}).get("topk", [0])]


# --- Data sets drawn in the layouts that they come in -----------------------------------------------------------------

PARTS = {"train": range(4), "query": range(4, 5), "gallery": range(5, 8), "test": range(4, 8)}  # images of an identity
FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}


def picture(identity: int, number: int) -> Image.Image:
    """A drawing that is mostly its identity's, of a size of its own."""
    rng = np.random.default_rng(identity)
    pattern = rng.integers(0, 255, (4, 4, 3)) + np.random.default_rng([identity, number]).normal(0, 20, (4, 4, 3))
    return Image.fromarray(pattern.clip(0, 255).astype(np.uint8)).resize((60 + number, 80), Image.BILINEAR)


def miniature(layout: str, folder: Path) -> dict[str, dict]:
    """Four identities x eight images below `folder` in the layout of a data set, drawn once.

    By part (train, query, gallery, and test, which is both), the arguments by which the data set finds it.
    """
    return MINIATURES.get(layout, lists)(folder / layout, layout)


def lists(root: Path, layout: str) -> dict[str, dict]:
    """List files: white space and a third column for VeriWild, one blank for ImageNetDataset, tabs for iCartoonFace."""
    tab = "\t" if layout == "ICartoonDataset" else " "
    for part, numbers in PARTS.items():
        lines = []
        for identity in range(4):
            for number in numbers:
                save(picture(identity, number), root / f"{identity}" / f"{number}.jpg")
                camera = f" {number}" if layout == "VeriWild" and part != "train" else ""
                lines.append(f"{identity}/{number}.jpg{tab}{identity}{camera}")
        (root / f"{part}.txt").write_text("\n".join(lines))
    return {part: {"image_root": str(root), "cls_label_path": str(root / f"{part}.txt")} for part in PARTS}


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def persons(root: Path, layout: str) -> dict[str, dict]:
    """Folders as Market-1501 and DukeMTMC-reID have them: identity and camera stand in the names of the files."""
    below = {"Market1501": "market1501/Market-1501-v15.09.15", "DukeMTMC": "dukemtmc/DukeMTMC-reID"}[layout]
    for part, name in FOLDERS.items():
        for identity in range(4):
            for number in PARTS[part]:
                file = {"Market1501": f"{identity + 2:04}_c{number % 3 + 1}s1_{number:06}_00.jpg",
                        "DukeMTMC": f"{identity + 2:04}_c{number % 3 + 1}_f{number:07}.jpg"}[layout]
                save(picture(identity, number), root / below / name / file)
    return {part: {"image_root": str(root), "cls_label_path": name} for part, name in FOLDERS.items()}


def cars(root: Path, layout: str) -> dict[str, dict]:
    """CompCars: a list, images, and beside each a label file whose third line is the box of the car."""
    found = lists(root / "image", layout)
    for image in (root / "image").rglob("*.jpg"):
        label = root / "label" / image.relative_to(root / "image").with_suffix(".txt")
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("1\n1\n5 6 50 70\n")
    return {part: {**section, "label_root": str(root / "label")} for part, section in found.items()}


def cifar(root: Path, layout: str) -> dict[str, dict]:
    """CIFAR-10's own archive, unpacked: pickled batches of flat images, and the names of the classes.

    torchvision compares their checksums with those of the set: the test has to replace them.
    """
    folder, batches = root / "cifar-10-batches-py", {"data_batch_1": PARTS["train"], "test_batch": PARTS["test"]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in batches.items():
        labels = [identity for identity in range(4) for _ in numbers]
        images = [picture(identity, number).resize((32, 32)) for identity in range(4) for number in numbers]
        data = np.stack([np.asarray(image).transpose(2, 0, 1).reshape(-1) for image in images])
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcd")}))
    modes = {part: "train" if part == "train" else "test" for part in PARTS}
    return {part: {"image_root": str(root), "mode": mode} for part, mode in modes.items()}


MINIATURES = {"Market1501": persons, "DukeMTMC": persons, "CompCars": cars, "Cifar10": cifar}


# --- The whole way ----------------------------------------------------------------------------------------------------


def written(cfg: dict, folder: Path) -> dict:
    """The checked configuration of the file that says `cfg`."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(cfg, sort_keys=False), encoding="utf-8")
    return load_config(path)


def run(cfg: dict, folder: Path) -> tuple[pd.DataFrame, dict[str, bool]]:
    """Train and evaluate `cfg` into `folder`: the history, and which parts' weights have changed."""
    cfg = written(cfg, folder)
    loaders, model = build_loaders(cfg), build_model(cfg)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    learn = build_learner(cfg, model, loaders, folder / "run")
    learn.fit_config()
    after, moved = dict(learn.model.named_parameters()), {}
    for name, weight in before.items():
        part = name.split(".")[0]
        moved[part] = moved.get(part, False) or not torch.equal(weight, after[name].cpu())
    return pd.read_csv(folder / "run" / "history.csv"), moved
