"""It stays a fastai Learner: what people who know fastai do with one works here, on drawn images."""

import re
import runpy
import warnings
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.interpret import Interpretation
from fastai.metrics import accuracy
from PIL import Image
from torch.utils.data import DataLoader

from recnb.data.lists import own_index
from recnb.data.loaders import Loaders, over
from recnb.data.pipeline import display_image
from recnb.data.samplers import PKSampler
from recnb.gallery.curves import augmentation_figure
from recnb.losses.combined import CELoss, CombinedLoss, SupConLoss
from recnb.models.backbones import create_backbone
from recnb.models.heads import ArcMargin
from recnb.models.necks import FC
from recnb.models.recmodel import RecModel
from recnb.recipe.data import build_loaders, evaluation_images
from recnb.recipe.learner import build_learner
from recnb.recipe.model import build_model
from recnb.recipe.schema import load_config
from recnb.retrieval.metrics import retrieval_metrics
from recnb.training.evaluation import embed
from recnb.training.learner import RetrievalLearner


@pytest.fixture
def learn(config_file, tmp_path):
    cfg = load_config(config_file())
    return build_learner(cfg, build_model(cfg), build_loaders(cfg), tmp_path / "run")


CALLBACKS = (
    *(SaveModelCallback, EarlyStoppingCallback, ReduceLROnPlateau, ShowGraphCallback, MixUp, CutMix),
    *(GradientAccumulation, GradientClip, CSVLogger),
)


def weights(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


def convolutions(module) -> torch.Tensor:
    """All weights but those of batch norms, which fastai trains in frozen layers too."""
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.dim() == 4]).clone()


def test_composed_by_hand_without_yaml(config_file, tmp_path):
    parts = build_loaders(load_config(config_file()))
    train = parts.train.dataset
    loaders = Loaders(
        DataLoader(train, batch_sampler=PKSampler(train.labels, batch_size=8, sample_per_id=2)),
        parts.query,
        parts.gallery,
    )
    backbone = create_backbone("test_resnet", stop="layer3", input_size=(3, 32, 32))
    pooled = torch.nn.Sequential(backbone, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model = RecModel(pooled, FC(backbone.out_channels, 16), ArcMargin(16, len(train.names)))
    learn = RetrievalLearner(loaders, model, CombinedLoss([(1.0, CELoss()), (0.5, SupConLoss())]), path=tmp_path)
    learn.fit_one_cycle(1, 1e-3)
    assert set(learn.evaluate().metrics) == {"recall1", "recall5", "mAP"}


def test_the_composition_by_hand_of_the_docs_runs_as_it_stands(drawn, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## Without a config\n\n```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "by_hand.py").write_text(block)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "marks").symlink_to(drawn)  # drawn once for all tests, by the same arguments
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path("by_hand.py")
    assert set(found["result"].metrics) == {"recall1", "mAP"} and found["features"].shape == (3, 128)
    torch.testing.assert_close(found["features"].cpu(), found["result"].query[:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_items_are_embedded_as_the_evaluation_embeds_its_own(learn, count):
    paths = learn.loaders.query.dataset.paths[:count]
    images = [Image.open(path) for path in paths]
    wanted = learn.evaluate().query[:count]
    found, nothing = learn.get_preds(dl=learn.dls.test_dl(paths))
    assert nothing is None and learn.watched.result is None
    for features in (found, learn.embed(images), learn.embed([np.asarray(image) for image in images])):
        torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5)


def test_as_many_items_as_there_are_evaluation_images_are_not_judged(learn):
    query, gallery = learn.loaders.query.dataset, learn.loaders.gallery.dataset
    learn.embed([*query.paths, *gallery.paths])
    assert learn.watched.result is None


def test_the_table_of_the_docs_says_what_of_fastai_works(learn):
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8").partition("## What of fastai works")[2]
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", text, re.MULTILINE))
    item = learn.loaders.query.dataset.paths[0]

    def other(**options):
        return RetrievalLearner(learn.loaders, learn.model, learn.loss_func.train_loss, **options)

    tried = {
        "learn.dls.test_dl(items)": lambda: learn.dls.test_dl([item]),
        "learn.get_preds(dl=dl)": lambda: learn.get_preds(dl=learn.dls.test_dl([item])),
        "learn.get_preds(with_input=True)": lambda: learn.get_preds(with_input=True),
        "learn.get_preds(with_loss=True)": lambda: learn.get_preds(with_loss=True),
        "Interpretation.from_learner(learn)": lambda: Interpretation.from_learner(learn),
        "learn.dls.show_batch()": lambda: learn.dls.show_batch(),
        "learn.summary()": learn.summary,
        "learn.fine_tune(1)": lambda: learn.fine_tune(1),
        "learn.fit_flat_cos(1)": lambda: learn.fit_flat_cos(1),
        "learn.fit_sgdr(1, 1)": lambda: learn.fit_sgdr(1, 1),
        **{f"{kind.__name__}()": lambda kind=kind: learn.fit(1, 1e-4, cbs=kind()) for kind in CALLBACKS},
        'CSVLogger(fname="mine.csv")': lambda: learn.fit(1, 1e-4, cbs=CSVLogger(fname="mine.csv")),
        "learn.to_bf16()": lambda: learn.to_bf16().to_fp32(),
        "learn.to_fp16()": lambda: learn.to_fp16().to_fp32(),
        "opt_func=Adam": lambda: other(opt_func=torch.optim.Adam),
        "loss_func=f": lambda: other(loss_func=torch.nn.functional.cross_entropy),
        "metrics=[accuracy]": lambda: other(metrics=[accuracy]),
        "learn.predict(item)": lambda: learn.predict(item),
        "learn.show_results()": learn.show_results,
        "learn.tta()": learn.tta,
        "learn.export()": learn.export,
    }
    assert set(rows) == {*tried, "load_learner(file)"}
    for name, try_it in tried.items():
        if rows[name].startswith("works"):
            try_it()
        else:
            with pytest.raises(TypeError) as error:
                try_it()
            assert str(error.value) == rows[name]


def test_the_table_of_an_epoch_has_a_column_for_a_loss_only_where_there_is_one(learn):
    learn.fit(1, 1e-4)
    assert learn.recorder.metric_names[:3] == ["epoch", "train_loss", "recall1"]
    assert len(learn.recorder.values[0]) == len(learn.recorder.metric_names) - 2  # without epoch and time
    learn.loss_func.eval_loss = SupConLoss()
    learn.fit(1, 1e-4)
    assert learn.recorder.metric_names[:3] == ["epoch", "train_loss", "valid_loss"]
    assert np.isfinite(learn.recorder.values[0]).all()


def test_trackers_watch_the_first_metric(learn):
    stop = EarlyStoppingCallback(min_delta=2.0)  # more than any metric can gain
    learn.fit(3, 1e-4, cbs=[stop, SaveModelCallback(fname="best")])
    assert stop.monitor == "recall1" and len(learn.recorder.values) == 2
    assert (learn.path / learn.model_dir / "best.pth").is_file()


def test_without_an_evaluation_there_is_nothing_to_watch_or_to_see_items_like(learn):
    alone = RetrievalLearner(Loaders(learn.loaders.train), learn.model, learn.loss_func.train_loss)
    with pytest.raises(ValueError, match="EarlyStoppingCallback: nothing is evaluated"):
        alone.fit(1, 1e-4, cbs=EarlyStoppingCallback())
    with pytest.raises(ValueError, match="embed: the loaders have no query and gallery"):
        alone.embed(learn.loaders.query.dataset.paths[:1])


def test_nothing_of_fastais_is_shadowed(learn):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="You are shadowing")
        learn.fit_config()
        learn.fit_config()


def test_a_learner_without_a_plan_says_what_to_do(learn):
    learn.plan = None
    with pytest.raises(ValueError, match=r"this learner has no plan; give it one \(plan=Plan\(\.\.\.\)\), or call fit"):
        learn.fit_config()


def test_head_neck_and_backbone_all_learn(learn):
    before = {name: weights(getattr(learn.model, name)) for name in ("backbone", "neck", "head")}
    learn.fit(1, 1e-2)
    for name, old in before.items():
        assert not torch.equal(old, weights(getattr(learn.model, name))), name


def test_labels_reach_the_head_only_in_training(learn):
    seen = []

    class Watch(Callback):
        order = 0

        def after_pred(self):
            seen.append((self.training, sorted(self.pred)))

    learn.fit(1, 1e-3, cbs=Watch())
    assert (True, ["backbone", "features", "logits", "neck"]) in seen
    assert all("logits" not in keys for training, keys in seen if not training)


def test_lr_find_and_fit_one_cycle(learn, tmp_path):
    before = weights(learn.model)
    found = learn.lr_find(num_it=8, show_plot=False)
    assert found.valley > 0 and torch.equal(before, weights(learn.model))
    learn.fit_one_cycle(2, 1e-3)
    rates = learn.recorder.lrs
    assert max(rates) == pytest.approx(1e-3, rel=0.05) and rates[-1] < rates[0] < max(rates)


def test_freeze_trains_neck_and_head_only_and_sliced_rates_spread(learn):
    learn.freeze()
    frozen, free = convolutions(learn.model.backbone), weights(learn.model.head)
    learn.fit(1, 1e-2)
    assert torch.equal(frozen, convolutions(learn.model.backbone))
    assert not torch.equal(free, weights(learn.model.head))
    learn.unfreeze()
    learn.fit(1, slice(1e-5, 1e-3))
    assert [group["lr"] for group in learn.opt.hypers] == pytest.approx([1e-5, 1e-3])
    assert not torch.equal(frozen, convolutions(learn.model.backbone))


def test_validate_and_get_preds(learn):
    record = learn.validate()
    names = learn.recorder.metric_names[2:-1]
    assert dict(zip(names, record, strict=True))["mAP"] == learn.evaluate().metrics["mAP"]
    embeddings, labels = learn.get_preds()
    query, gallery = learn.loaders.query.dataset, learn.loaders.gallery.dataset
    assert embeddings.shape == (len(query) + len(gallery), 16)
    assert labels.tolist() == [*query.labels, *gallery.labels]
    train, targets = learn.get_preds(ds_idx=0)
    assert train.shape == (len(learn.loaders.train.dataset), 16)
    assert targets.tolist() == learn.loaders.train.dataset.labels.tolist()


def test_scores_are_those_of_the_embeddings(learn):
    query, gallery = learn.loaders.query.dataset, learn.loaders.gallery.dataset
    result = learn.evaluate()
    direct, arrays = retrieval_metrics(
        result.query,
        result.gallery,
        query.labels,
        gallery.labels,
        query.cameras,
        gallery.cameras,
        exclude_self=own_index(query, gallery),
        per_query=True,
    )
    assert result.metrics == {k: direct[k] for k in ("recall1", "recall5", "mAP")}
    assert {k: v.tolist() for k, v in result.per_query.items()} == {k: arrays[k].tolist() for k in result.metrics}
    torch.testing.assert_close(result.query, embed(learn.model, learn.loaders.query), rtol=1e-4, atol=1e-5)


def test_a_query_without_a_positive_has_no_value(learn):
    query = learn.loaders.query.dataset
    query.labels[0] = 10**6
    result = learn.evaluate()
    for name, values in result.per_query.items():
        assert np.isnan(values).tolist() == [True, *[False] * (len(query) - 1)]
        assert result.metrics[name] == pytest.approx(np.nanmean(values))


def test_one_list_as_query_and_gallery_is_embedded_once(config_file, tmp_path, drawn):
    cfg = load_config(config_file({"DataLoader.Eval.Query.dataset.cls_label_path": str(drawn / "gallery.txt")}))
    learn = build_learner(cfg, build_model(cfg), build_loaders(cfg), tmp_path)
    assert len(learn.dls.valid.dataset) == len(learn.loaders.gallery.dataset)
    embeddings, _ = learn.get_preds()
    labels, cameras = learn.loaders.gallery.dataset.labels, learn.loaders.gallery.dataset.cameras
    direct = retrieval_metrics(embeddings, None, labels, query_cameras=cameras)
    assert learn.evaluate().metrics["mAP"] == pytest.approx(direct["mAP"], abs=1e-6)


@pytest.mark.parametrize("column", [1, 2])  # of labels and of cameras
def test_the_same_images_with_other_labels_or_cameras_are_another_list(config_file, tmp_path, drawn, column):
    rows = [line.split() for line in (drawn / "gallery.txt").read_text().splitlines()]
    for row in rows[:6]:
        row[column] = rows[-1][column] if column == 1 else "77"
    (tmp_path / "query.txt").write_text("".join(f"{' '.join(row)}\n" for row in rows))
    lists = {
        f"DataLoader.Eval.{part}.dataset.cls_label_path": str(path)
        for part, path in (("Query", tmp_path / "query.txt"), ("Gallery", drawn / "gallery.txt"))
    }
    cfg = load_config(config_file(lists))
    learn = build_learner(cfg, build_model(cfg), build_loaders(cfg), tmp_path)
    query, gallery = evaluation_images(cfg)
    result = learn.evaluate()
    direct = retrieval_metrics(
        result.query,
        result.gallery,
        query.labels,
        gallery.labels,
        query.cameras,
        gallery.cameras,
        exclude_self=np.arange(len(query)),
    )
    assert result.metrics["mAP"] == pytest.approx(direct["mAP"], abs=1e-6)


def test_the_loaders_of_the_caller_stay_as_they_are(config_file, tmp_path):
    cfg = load_config(config_file())
    loaders = build_loaders(cfg)
    gallery = loaders.gallery = over(loaders.query, replace(loaders.query.dataset))
    learn = build_learner(cfg, build_model(cfg), loaders, tmp_path)
    assert loaders.gallery is gallery and len(learn.dls.valid.dataset) == 2 * len(gallery.dataset)


def test_augmentation_is_shown_in_pairs(learn):
    figure, images = augmentation_figure(learn.loaders.train, 4), learn.loaders.train.dataset
    ((index, seed), *_) = next(iter(learn.loaders.train.batch_sampler))
    above, below = (figure.axes[i].images[0].get_array() for i in (0, 4))
    assert len(figure.axes) == 8 and figure.axes[0].get_title() == images.name(images.labels[index])
    np.testing.assert_array_equal(above, images.image(index).permute(1, 2, 0))
    np.testing.assert_array_equal(below, display_image(images[index, seed][0], images.transform))


def test_plot_loss_draws(learn):
    learn.fit(1, 1e-3)
    ax = learn.recorder.plot_loss(skip_start=0)
    assert len(ax.lines[0].get_ydata()) == len(learn.dls.train)
    plt.close("all")


def test_callbacks_of_ones_own_and_save_load(learn):
    class Count(Callback):
        steps = 0

        def after_step(self):
            Count.steps += 1

    learn.fit(1, 1e-3, cbs=Count())
    assert Count.steps == len(learn.dls.train)
    learn.save("kept")
    kept = weights(learn.model)
    learn.fit(1, 1e-1)
    learn.load("kept")
    assert torch.equal(kept, weights(learn.model))


def test_each_epoch_draws_its_own_batches(learn):
    drawn = []

    class Watch(Callback):
        def before_batch(self):
            if self.training:
                drawn.append(self.y.tolist())

    learn.fit(2, 1e-3, cbs=Watch())
    steps = len(learn.dls.train)
    assert len(drawn) == 2 * steps and drawn[:steps] != drawn[steps:]
    assert all(len(set(batch)) == 4 for batch in drawn)


def test_embed_is_ordered_and_leaves_the_mode_alone(learn):
    learn.model.train()
    first = embed(learn.model, learn.loaders.query, progress=False)
    assert learn.model.training and first.dtype == torch.float32
    learn.model.eval()
    images = torch.stack([learn.loaders.query.dataset[i][0] for i in range(3)])
    with torch.no_grad():
        np.testing.assert_allclose(first[:3], learn.model(images)["features"], atol=1e-5)
