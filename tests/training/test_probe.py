"""Training on kept features is training with a frozen backbone; each remedy against forgetting does what it says."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make
from safetensors.torch import load_file
from torch import nn

from recnb.data.lists import ImageList
from recnb.registry import ConfigError
from recnb.training.adaptor import Callback
from recnb.training.retention import imprint

PLAIN = [{"ResizeImage": {"size": 32}}, {"NormalizeImage": {}}]


@pytest.fixture
def images_decoded(monkeypatch):
    """Counts how often an image is decoded."""
    seen, decode = [], ImageList.image
    monkeypatch.setattr(ImageList, "image", lambda self, index: seen.append(index) or decode(self, index))
    return seen


def probed(tmp_path, views: int = 1, **more) -> dict:
    workers = {f"DataLoader.{part}.loader.num_workers": 0 for part in ("Train", "Eval.Query", "Eval.Gallery")}
    cache = str(tmp_path / "features")
    return {"Global.probe": views, "Global.probe_cache": cache, "Global.on_bad_image": "stop", **workers, **more}


def test_a_probe_takes_the_steps_of_a_frozen_backbone(config_file, tmp_path):
    plain = {"DataLoader.Train.dataset.transform_ops": PLAIN}
    frozen = make(config_file, tmp_path / "frozen", {**plain, "Arch.freeze": ["backbone"]})
    frozen.fit_config()
    learn = make(config_file, tmp_path / "probe", {**plain, **probed(tmp_path)})
    learn.fit_config()
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("frozen", "probe"))
    assert one.keys() == other.keys()
    for name, value in one.items():  # features are kept in half precision
        torch.testing.assert_close(other[name], value, rtol=0.05, atol=5e-3, msg=name)
    assert all(torch.equal(other[name], value) for name, value in one.items() if name.startswith("backbone"))
    assert learn.evaluate().metrics == pytest.approx(frozen.evaluate().metrics, abs=0.05)


def test_features_are_made_once(config_file, tmp_path, images_decoded):
    make(config_file, tmp_path / "a", probed(tmp_path, 2)).fit_config()
    once = len(images_decoded)
    files = sorted((tmp_path / "features").iterdir())
    learn = make(config_file, tmp_path / "b", probed(tmp_path, 2))
    learn.fit_config()
    train = learn.loaders.train.dataset
    assert len(files) == 2 + len({id(learn.loaders.query.dataset), id(learn.loaders.gallery.dataset)})
    assert len(images_decoded) == once and sorted((tmp_path / "features").iterdir()) == files
    assert [np.load(file).dtype for file in train.features.files] == [np.float16] * 2
    x, y = next(iter(learn.loaders.train))
    assert x.dtype == torch.float32 and x.shape[1:] == learn.model.backbone.out_shape and y.dtype == torch.int64
    other = make(config_file, tmp_path / "c", probed(tmp_path, 3))
    assert len(images_decoded) == once + len(train) and len(other.loaders.train.dataset.features.files) == 3


def test_a_seed_draws_the_view(config_file, tmp_path):
    images = make(config_file, tmp_path / "a", probed(tmp_path, 2)).loaders.train.dataset
    maps = [torch.from_numpy(np.load(file)).float() for file in images.features.files]
    assert not torch.equal(maps[0], maps[1])
    x, y = images.__getitems__([(3, 10), (0, 7), 5])
    assert (
        torch.equal(x, torch.stack([maps[0][3], maps[1][0], maps[0][5]]))
        and y.tolist() == images.labels[[3, 0, 5]].tolist()
    )
    assert torch.equal(images[3, 11][0], maps[1][3])


def test_a_resumed_probe_is_the_same_bytes(config_file, tmp_path):
    learn = make(config_file, tmp_path / "whole", probed(tmp_path, 2))
    learn.fit_config()

    class Stop(Callback):
        def before_epoch(self):
            if self.epoch == 1:
                raise KeyboardInterrupt

    broken = make(config_file, tmp_path / "parts", probed(tmp_path, 2))
    broken.add_cb(Stop())
    with pytest.raises(KeyboardInterrupt):
        broken.fit_config()
    make(config_file, tmp_path / "parts", probed(tmp_path, 2)).fit_config()
    for name in ("model.safetensors", "history.csv"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_a_probe_cannot_do(config_file, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"Arch.Neck: Global.probe trains a neck on frozen features; add one"):
        make(config_file, tmp_path, probed(tmp_path, **{"Arch.Neck": ...}))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(ConfigError, match=r"Global.probe_cache: .* free, and the features take"):
        make(config_file, tmp_path, probed(tmp_path))
    assert not list((tmp_path / "features").iterdir())


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def changed(before: list[torch.Tensor], module: nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_the_backbone_rests_until_it_is_thawed(config_file, tmp_path):
    learn, seen = make(config_file, tmp_path, {"Retention": {"thaw_epoch": 1}}), []
    begun = {k: v.clone() for k, v in learn.model.backbone.state_dict().items()}

    class Watch(Callback):
        order = 70

        def after_epoch(self):
            now = self.model.backbone.state_dict()
            seen.append([k for k in now if not torch.equal(now[k], begun[k])])

    learn.add_cb(Watch())
    learn.fit_config()
    assert seen[0] == [] and len(seen[1]) > len(begun) / 2  # statistics rest as well
    assert all(p.requires_grad for p in learn.model.backbone.parameters())


def test_a_pull_moves_the_weights_back_by_the_rate(config_file, tmp_path):
    learn = make(
        config_file,
        tmp_path,
        {"Retention": {"pull": 2.0}, "Optimizer": {"name": "SGD", "lr": {"name": "Constant", "learning_rate": 0.1}}},
    )
    start, seen = weights(learn.model.backbone), []

    class Watch(Callback):  # between the step and the pull
        order = -1

        def after_step(self):
            seen.append(weights(self.model.backbone))

        def after_batch(self):
            if self.training:
                self.learn.checked = [
                    torch.testing.assert_close(now.detach(), stepped - 0.1 * 2.0 * (stepped - first))
                    for now, stepped, first in zip(self.model.backbone.parameters(), seen[-1], start, strict=True)
                ]

    learn.add_cb(Watch())
    learn.fit_config()
    assert learn.checked and changed(start, learn.model.backbone)


def test_distillation_adds_the_distance_to_the_start(config_file, tmp_path):
    learn, seen = make(config_file, tmp_path, {"Retention": {"distill": 3.0}}), []
    start = make(config_file, tmp_path / "start").model.backbone.eval()

    class Watch(Callback):
        order = 5

        def after_loss(self):
            if self.training:
                with torch.no_grad():
                    apart = 1 - F.cosine_similarity(self.pred["backbone"].flatten(1), start(self.xb[0]).flatten(1))
                seen.append((self.loss_grad.item(), (self.loss + 3.0 * apart.mean()).item()))

    learn.add_cb(Watch())
    learn.fit_config()
    assert [a for a, _ in seen] == pytest.approx([b for _, b in seen], rel=1e-5) and len(seen) > 2


def test_frozen_statistics_stay_and_weights_are_trained(config_file, tmp_path):
    learn = make(config_file, tmp_path, {"Retention": {"batch_norm": "frozen"}})
    begun = {k: v.clone() for k, v in learn.model.backbone.state_dict().items()}
    learn.fit_config()
    now = learn.model.backbone.state_dict()
    same = {k for k in now if torch.equal(now[k], begun[k])}
    assert {k for k in now if "running_" in k} <= same and not {k for k in now if k.endswith("weight")} & same


def test_a_head_begins_at_the_class_means(config_file, tmp_path):
    learn = make(config_file, tmp_path)
    imprint(learn.model, learn.loaders)
    features, labels = [], learn.loaders.train.dataset.labels
    learn.model.eval()
    for i in range(len(labels)):
        with torch.no_grad():
            x = learn.loaders.query.dataset.transform(learn.loaders.train.dataset.image(i))
            features.append(F.normalize(learn.model(x[None])["features"][0], dim=0))
    for label, weight in enumerate(learn.model.head.weight.detach()):
        mean = torch.stack([f for f, own in zip(features, labels, strict=True) if own == label]).mean(0)
        torch.testing.assert_close(weight, F.normalize(mean, dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"thaw_epoch": -1}, "Retention.thaw_epoch: -1 is too small; the least is 0"),
        ({"pul": 1.0}, "Retention.pul: there is no such key; did you mean 'pull'"),
        ({"batch_norm": "off"}, "Retention.batch_norm: 'off' is not supported; there is frozen, trained"),
    ],
)
def test_what_retention_cannot_mean(config_file, section, said):
    from recnb.recipe.schema import load_config

    with pytest.raises(ConfigError, match=said):
        load_config(config_file({"Retention": section}))
