"""Losses of pytorch-metric-learning by name: the same values, parameters trained and kept, names that are wrong."""

import pytest
import torch

pml = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import losses, miners  # noqa: E402

from recnb.losses.pml import PML  # noqa: E402
from recnb.recipe.data import build_loaders  # noqa: E402
from recnb.recipe.learner import build_learner  # noqa: E402
from recnb.recipe.model import build_model  # noqa: E402
from recnb.recipe.schema import load_config  # noqa: E402
from recnb.registry import ConfigError  # noqa: E402


def test_it_is_the_loss_of_that_name_with_the_miner_of_that_name():
    x, y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    wanted = losses.TripletMarginLoss(margin=0.3)(x, y, miners.BatchHardMiner()(x, y))
    assert PML("TripletMarginLoss", "BatchHardMiner", margin=0.3)({"features": x}, y) == wanted


def test_proxies_are_trained_and_go_on_where_they_stopped(config_file, tmp_path):
    cfg = load_config(
        config_file(
            {
                "Loss.Train": [
                    {"PML": {"loss": "ProxyAnchorLoss", "num_classes": 15, "embedding_size": 16, "weight": 0.5}}
                ]
            }
        )
    )
    learn = build_learner(cfg, build_model(cfg), build_loaders(cfg), tmp_path)
    proxies = learn.loss_func.train_loss.losses[0].loss.proxies
    before = proxies.detach().clone()
    learn.fit_config()
    assert not torch.equal(proxies, before)
    kept = torch.load(tmp_path / "checkpoints" / "latest.pt", weights_only=True)["loss"]
    assert torch.equal(kept["losses.0.loss.proxies"], proxies)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"loss": "ProxyAnkorLoss"}, "no ProxyAnkorLoss among its losses; did you mean 'ProxyAnchorLoss'"),
        ({"loss": "ContrastiveLoss", "miner": "HardMiner"}, "no HardMiner among its miners"),
        ({"loss": "ContrastiveLoss", "positive_margin": 1}, "positive_margin"),
        ({"weight": 1.0}, "PML needs a value for 'loss'"),
    ],
    ids=["loss", "miner", "argument", "no loss"],
)
def test_what_it_has_not_is_an_error_with_its_place(config_file, tmp_path, section, message):
    cfg = load_config(config_file({"Loss.Train": [{"PML": section}]}))
    with pytest.raises(ConfigError, match=rf"Loss\.Train\.0\.PML: .*{message}"):
        build_learner(cfg, build_model(cfg), build_loaders(cfg), tmp_path)
