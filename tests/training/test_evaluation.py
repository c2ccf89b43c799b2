"""Embedding and judging lists of images: caching, views, post-processing, re-ranking."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from recnb.data.lists import own_index
from recnb.recipe.data import build_loaders
from recnb.recipe.learner import build_learner
from recnb.recipe.model import build_model
from recnb.recipe.objective import build_judge
from recnb.recipe.schema import load_config
from recnb.registry import ConfigError
from recnb.retrieval.metrics import ranking_metrics
from recnb.retrieval.rerank import fit_whitening, k_reciprocal
from recnb.training.evaluation import Judge, embed


@pytest.fixture
def parts(config_file):
    cfg = load_config(config_file())
    return build_model(cfg), build_loaders(cfg)


@pytest.fixture
def features(parts):
    model, loaders = parts
    return embed(model, loaders.query), embed(model, loaders.gallery)


def test_cached_features_are_read_back_and_bound_to_weights_and_files(parts, tmp_path, monkeypatch):
    model, loaders = parts
    first = embed(model, loaders.query, cache=tmp_path)
    monkeypatch.setattr("recnb.training.evaluation.views", lambda *a: pytest.fail("computed again"))
    assert torch.equal(embed(model, loaders.query, cache=tmp_path), first)
    monkeypatch.undo()
    with torch.no_grad():
        model.neck.fc.bias += 1
    assert torch.equal(embed(model, loaders.query, cache=tmp_path), embed(model, loaders.query))
    assert not torch.equal(embed(model, loaders.query, cache=tmp_path), first)
    loaders.query.dataset.paths.reverse()
    assert torch.equal(embed(model, loaders.query, cache=tmp_path), embed(model, loaders.query))


def test_flip_and_scales_average_unit_features(parts):
    model, loaders = parts
    images = torch.stack([loaders.query.dataset[i][0] for i in range(4)])
    model.eval()
    with torch.no_grad():
        both = [torch.nn.functional.normalize(model(x)["features"]) for x in (images, images.flip(-1))]
    torch.testing.assert_close(embed(model, loaders.query, flip=True)[:4], sum(both) / 2, atol=1e-5, rtol=1e-4)
    assert embed(model, loaders.query, scales=(1.0, 1.5)).shape == embed(model, loaders.query).shape


def test_bfloat16_features_are_near(parts):
    model, loaders = parts
    exact, near = embed(model, loaders.query), embed(model, loaders.query, amp=True)
    assert near.dtype == torch.float32 and torch.cosine_similarity(exact, near).min() > 0.99


def test_re_ranking_is_k_reciprocal(parts, features, config_file):
    _, loaders = parts
    query, gallery = loaders.query.dataset, loaders.gallery.dataset
    expected = ranking_metrics(
        -k_reciprocal(*features),
        query.labels,
        gallery.labels,
        query.cameras,
        gallery.cameras,
        exclude_self=own_index(query, gallery),
    )
    judge = build_judge(load_config(config_file({"Global.re_ranking": True})))
    wanted = {name: expected[name] for name in judge.names}
    assert judge(*features, query, gallery).metrics == pytest.approx(wanted, abs=1e-6)


def test_steps_of_post_process_run_in_order(parts, features, config_file):
    _, loaders = parts
    query, gallery = loaders.query.dataset, loaders.gallery.dataset
    steps = [{"Whitening": {"dimensions": 8}}, {"AlphaQueryExpansion": {"k": 2}}, {"DatabaseAugmentation": {"k": 2}}]
    judge = build_judge(load_config(config_file({"PostProcess": steps})))
    train = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    plain = Judge()(*features, query, gallery).metrics
    whitened = Judge()(*map(fit_whitening(train, 8), features), query, gallery).metrics
    result = judge(*features, query, gallery, lambda: train)
    assert result.metrics != whitened != plain and result.query is features[0]


def test_a_learner_scores_with_post_process(config_file, tmp_path):
    cfg = load_config(config_file({"PostProcess": [{"Whitening": {"dimensions": 3, "whiten": False}}]}))
    learn = build_learner(cfg, build_model(cfg), build_loaders(cfg), tmp_path)
    result = learn.evaluate()
    images = replace(learn.loaders.train.dataset, transform=learn.loaders.query.dataset.transform)
    train = embed(learn.model, DataLoader(images, 32))
    project = fit_whitening(train, 3, whiten=False)
    lists = (learn.loaders.query.dataset, learn.loaders.gallery.dataset)
    direct = Judge()(project(result.query), project(result.gallery), *lists)
    assert result.metrics == pytest.approx(direct.metrics, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PostProcess": [{"Whitenin": {}}]}, r"PostProcess\.0\.Whitenin: .*did you mean 'Whitening'"),
        ({"PostProcess": [{"Whitening": {"dim": 8}}]}, r"PostProcess\.0\.Whitening\.dim: .*no such argument"),
        ({"Global.re_ranking": "yes"}, r"Global\.re_ranking: 'yes' is a str"),
    ],
)
def test_misspelt_post_processing_is_refused(config_file, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file(changes))


def test_only_the_metrics_asked_for_are_returned_in_their_order(parts, features):
    _, loaders = parts
    names = ["mINP", "recall3", "precision@2", "mAP"]
    scores = Judge(names)(*features, loaders.query.dataset, loaders.gallery.dataset).metrics
    assert list(scores) == names and all(np.isfinite(list(scores.values())))


def test_codes_are_made_before_anything_else(parts, features, config_file):
    _, loaders = parts
    query, gallery = loaders.query.dataset, loaders.gallery.dataset
    for kind, codes in (("sign", [x.sign() for x in features]), ("round", [(x >= 0.5) * 2.0 - 1 for x in features])):
        judge = build_judge(load_config(config_file({"Global.feature_binarize": kind})))
        assert judge(*features, query, gallery).metrics == Judge()(*codes, query, gallery).metrics


def test_features_may_be_compared_as_they_are(parts, features, config_file):
    _, loaders = parts
    query, gallery = loaders.query.dataset, loaders.gallery.dataset
    stretched = features[1] * torch.linspace(0.1, 10, len(gallery))[:, None]
    plain = build_judge(load_config(config_file({"Global.feature_normalize": False})))
    wanted = ranking_values(features[0] @ stretched.T, query, gallery)
    assert plain(features[0], stretched, query, gallery).metrics == pytest.approx(wanted)
    cosine = Judge()(features[0], stretched, query, gallery).metrics
    assert cosine == pytest.approx(Judge()(*features, query, gallery).metrics)


def ranking_values(scores, query, gallery):
    """The default metrics of a matrix of scores."""
    made = ranking_metrics(
        scores, query.labels, gallery.labels, query.cameras, gallery.cameras, exclude_self=own_index(query, gallery)
    )
    return {name: made[name] for name in ("recall1", "recall5", "mAP")}


@pytest.mark.parametrize("source", ["backbone", "neck"])
def test_what_is_retrieved_with_can_be_the_backbone(config_file, source):
    cfg = load_config(config_file({"Global.retrieval_feature_from": source}))
    model, x = build_model(cfg).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        out = model(x)
    assert torch.equal(out["features"], out[source]) and (source == "neck" or out["features"].shape[1] != 16)
