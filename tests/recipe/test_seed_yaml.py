"""The documented file, word for word: where it contradicts itself, and that once mended it trains, evaluates, saves."""

import pandas as pd
import pytest
import torch

from recnb import build_learner, build_loaders, build_model, load_config
from recnb.recipe.reading import read_yaml
from recnb.recipe.settings import GLOBAL
from recnb.registry import ConfigError

LITERAL = """
Global:
  # 如为null则从头开始训练。若指定中间训练保存的状态地址,则继续训练
  checkpoints: null
  # pretrained model路径或者 bool类型
  pretrained_model: null
  # 模型保存路径
  output_dir: "./output/"
  device: "gpu"
  class_num: 30671
  # 保存模型的粒度,每个epoch保存一次
  save_interval: 1
  eval_during_train: True
  eval_interval: 1
  # 训练的epoch数
  epochs: 160
  # log输出频率
  print_batch_step: 10
  # 是否使用visualdl库
  use_visualdl: False
  # used for static mode and model export
  image_shape: [3, 224, 224]
  save_inference_dir: "./inference"
  # 使用retrival的方式进行评测
  eval_mode: "retrieval"
DataLoader:
  Train:
    dataset:
      # 具体使用的Dataset的的名称
      name: "VeriWild"
      # 使用此数据集的具体参数
      image_root: "./dataset/VeRI-Wild/images/"
      cls_label_path: "./dataset/VeRI-Wild/train_test_split/train_list_start0.txt"
      # 图像增广策略:ResizeImage、RandFlipImage等
      transform_ops:
        - ResizeImage:
            size: 224
        - RandFlipImage:
            flip_code: 1
        - AugMix:
            prob: 0.5
        - NormalizeImage:
            scale: 0.00392157
            mean: [0.485, 0.456, 0.406]
            std: [0.229, 0.224, 0.225]
            order: ''
        - RandomErasing:
            EPSILON: 0.5
            sl: 0.02
            sh: 0.4
            r1: 0.3
            mean: [0., 0., 0.]
    sampler:
      name: DistributedRandomIdentitySampler
      batch_size: 128
      num_instances: 2
      drop_last: False
      shuffle: True
    loader:
      num_workers: 6
      use_shared_memory: False
Arch:
  # 使用RecModel模式进行训练
  name: "RecModel"
  # 导出inference model的具体配置
  infer_output_key: "features"
  infer_add_softmax: False
  # 使用的Backbone
  Backbone:
    name: "ResNet50"
    pretrained: True
  # 使用此层作为Backbone的feature输出,name为ResNet50的full_name
  BackboneStopLayer:
    name: "adaptive_avg_pool2d_0"
  # Backbone的基础上,新增网络层。此模型添加1x1的卷积层(embedding)
  Neck:
    name: "VehicleNeck"
    in_channels: 2048
    out_channels: 512
  # 增加ArcMargin, 即ArcLoss的具体实现
  Head:
    name: "ArcMargin"
    embedding_size: 512
    class_num: 431
    margin: 0.15
    scale: 32
Loss:
  Train:
    - CELoss:
        weight: 1.0
    - SupConLoss:
        weight: 1.0
        # SupConLoss的具体参数
        views: 2
  Eval:
    - CELoss:
        weight: 1.0
Optimizer:
  # 使用的优化器名称
  name: Momentum
  # 优化器具体参数
  momentum: 0.9
  lr:
    # 使用的学习率调节具体名称
    name: MultiStepDecay
    # 学习率调节算法具体参数
    learning_rate: 0.01
    milestones: [30, 60, 70, 80, 90, 100, 120, 140]
    gamma: 0.5
    verbose: False
    last_epoch: -1
  regularizer:
    name: 'L2'
    coeff: 0.0005
Metric:
  Eval:
    # 使用Recallk和mAP两种评价指标
    - Recallk:
        topk: [1, 5]
    - mAP: {}
"""


def evaluation(size: int) -> dict:
    """The Eval block that the text describes in words: as for training, but for the augmentation."""
    ops = [{"ResizeImage": {"size": size}}, {"NormalizeImage": {"scale": 0.00392157, "order": ""}}]
    return {
        part: {
            "dataset": {
                "name": "VeriWild",
                "image_root": "./dataset/VeRI-Wild/images/",
                "cls_label_path": f"./dataset/VeRI-Wild/train_test_split/test_3000_{name}.txt",
                "transform_ops": ops,
            },
            "sampler": {"name": "DistributedBatchSampler", "batch_size": 64},
            "loader": {"num_workers": 0, "use_shared_memory": False},
        }
        for part, name in (("Query", "query"), ("Gallery", "gallery"))
    }


MENDED = {"Global.class_num": 431, "DataLoader.Eval": evaluation(224)}
SMALL = {
    "Global.class_num": 431,
    "DataLoader.Eval": evaluation(32),
    "Global.image_shape": [3, 32, 32],
    "DataLoader.Train.dataset.transform_ops.ResizeImage.size": 32,
    "DataLoader.Train.sampler.batch_size": 16,
    "DataLoader.Train.loader.num_workers": 0,
    "Arch.Backbone": {"name": "test_resnet", "pretrained": False},
    "Arch.Neck.in_channels": 96,
    "Global.epochs": 2,
}


@pytest.fixture
def literal(tmp_path):
    path = tmp_path / "feature_learning.yaml"
    path.write_text(LITERAL, encoding="utf-8")
    return path


@pytest.fixture
def veri_wild(drawn, tmp_path, monkeypatch):
    """The working directory, with drawn images in VeRI-Wild's layout below it."""
    root = tmp_path / "dataset" / "VeRI-Wild"
    (root / "train_test_split").mkdir(parents=True)
    (root / "images").symlink_to(drawn / "images")
    for name, ours in (("train_list_start0", "train"), ("test_3000_query", "query"), ("test_3000_gallery", "gallery")):
        lines = (drawn / f"{ours}.txt").read_text().splitlines()
        if ours == "train":
            lines = [line.rpartition(" ")[0] for line in lines]
        (root / "train_test_split" / f"{name}.txt").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_two_class_numbers(literal):
    with pytest.raises(ConfigError) as error:
        load_config(literal)
    assert str(error.value) == (
        "Global.class_num is 30671, but Arch.Head.class_num is 431: both count the training identities, so give the "
        "same number or leave one of them out"
    )


@pytest.mark.parametrize(
    "mended", [{"Global.class_num": 431}, {"Arch.Head.class_num": 30671}, {"Global.class_num": None}]
)
def test_the_missing_evaluation_block(literal, mended):
    with pytest.raises(ConfigError) as error:
        load_config(literal, mended)
    assert str(error.value) == (
        "DataLoader.Eval.Query: there is no such section; retrieval is evaluated with DataLoader.Eval.Query and "
        "DataLoader.Eval.Gallery (one alone serves as both): add it, or leave DataLoader.Eval out and set "
        "Global.eval_during_train: False"
    )


def test_everything_else_is_taken_as_it_stands(literal):
    cfg, content = load_config(literal, MENDED), read_yaml(literal)
    assert cfg["DataLoader"].pop("Eval") == MENDED["DataLoader.Eval"]
    assert cfg.pop("Global") == {**GLOBAL, **content.pop("Global"), "class_num": 431}
    assert cfg == content


def test_the_literal_model(literal):
    cfg = load_config(literal, {**MENDED, "Arch.Backbone.pretrained": False})
    model = build_model(cfg)
    assert model.backbone.out_shape == (2048, 1, 1)
    assert model.head.weight.shape == (431, 512)
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 224, 224))["features"].shape == (1, 512)


def test_it_trains_evaluates_and_saves(literal, veri_wild, capsys):
    cfg = load_config(literal, SMALL)
    loaders, run = build_loaders(cfg), veri_wild / "run"
    assert (
        capsys.readouterr().out
        == "class_num is 431, the training list has 15 identities: the others will never be seen\n"
    )
    learn = build_learner(cfg, build_model(cfg), loaders, run)
    learn.fit_config()
    history = pd.read_csv(run / "history.csv")
    assert history["epoch"].tolist() == [1, 2] and (history["lr"] == 0.01).all()
    assert history[["train_loss", "CELoss", "SupConLoss", "recall1", "recall5", "mAP"]].notna().all(axis=None)
    result = learn.evaluate()
    assert result.metrics.keys() == {"recall1", "recall5", "mAP"} and result.query.shape == (18, 512)
    assert {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} >= {
        "model.safetensors",
        "checkpoints/latest.pt",
        "checkpoints/best.safetensors",
        "checkpoints/epoch_1.pt",
        "checkpoints/epoch_2.pt",
    }
    assert "Loss.Eval has no value" in capsys.readouterr().out
