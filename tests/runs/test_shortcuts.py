"""Foreground against background: drawn images whose identity is in one of the two, and a model that sees both."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from recnb.data.lists import ImageList
from recnb.registry import ConfigError
from recnb.runs import shortcuts


class Pooled(torch.nn.Module):
    """Sixteen cells' colours as features."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return {"features": torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)}


def drawn_run(folder, where):
    """Five identities, each a colour in the centre or around it, the other place in random colours."""
    rng, colours = np.random.default_rng(0), np.random.default_rng(1).integers(0, 256, (5, 3), dtype=np.uint8)
    lists = []
    for part, each in (("query", 2), ("gallery", 3)):
        labels = np.repeat(np.arange(5), each)
        for i, label in enumerate(labels):
            picture = np.empty((20, 20, 3), np.uint8)
            picture[:] = colours[label] if where == "background" else rng.integers(0, 256, 3)
            picture[4:16, 4:16] = colours[label] if where == "foreground" else rng.integers(0, 256, 3)
            (folder / part).mkdir(exist_ok=True)
            Image.fromarray(picture).save(folder / part / f"{i}.png")
        paths = [str(folder / part / f"{i}.png") for i in range(len(labels))]
        lists.append(ImageList(paths, labels, transform=lambda x: (x - 114.7) / 255))
    model = Pooled().eval()
    features = [
        torch.stack([images.transform(images.image(i)) for i in range(len(images))]).flatten(1).numpy()
        for images in lists
    ]
    cfg = {
        "Global": {"eval_mode": "retrieval"},
        "DataLoader": {"Eval": {"Query": {"dataset": {"image_root": str(folder)}}}},
    }
    return SimpleNamespace(
        cfg=cfg,
        query=lists[0],
        gallery=lists[1],
        query_features=features[0],
        gallery_features=features[1],
        exclude_self=False,
        model=lambda: model,
    )


@pytest.mark.parametrize(("where", "other"), [("foreground", "background"), ("background", "foreground")])
def test_what_the_identity_is_in_is_what_finds_it(tmp_path, where, other):
    table = shortcuts.shortcut_table(drawn_run(tmp_path, where))
    assert table.index.tolist() == ["whole image", "foreground only", "background only"]
    assert table.recall1[f"{where} only"] == 1 and table.mAP[f"{where} only"] > 0.95
    assert table.mAP[f"{other} only"] < 0.7 and (table.low <= table.mAP).all() and (table.mAP <= table.high).all()


def test_a_folder_of_masks_and_the_centre_are_the_same_where_they_mask_the_same(tmp_path):
    run, masks = drawn_run(tmp_path, "foreground"), tmp_path / "masks"
    white = np.zeros((20, 20), np.uint8)
    white[4:16, 4:16] = 255
    for images in (run.query, run.gallery):
        for path in images.paths:
            place = masks / "/".join(path.split("/")[-2:])
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(white).save(place)
    by_masks = shortcuts.shortcut_table(run, str(masks))
    pd.testing.assert_frame_equal(by_masks, shortcuts.shortcut_table(run))
    Image.fromarray(white[:10]).save(masks / "gallery" / "3.png")
    with pytest.raises(ConfigError, match=r"masks: .*3.png is \(10, 20\) and its image \(20, 20\)"):
        shortcuts.shortcut_table(run, str(masks))
    (masks / "query" / "0.png").unlink()
    with pytest.raises(ConfigError, match=r"masks: there is no .*0.png; each image needs one"):
        shortcuts.shortcut_table(run, str(masks))


def test_the_centre_is_in_the_middle_of_any_shape():
    mask = shortcuts.centre(0.5)("", torch.zeros(3, 8, 20))
    rows, columns = mask.nonzero().unbind(1)
    assert mask.shape == (8, 20) and mask.float().mean() == 0.25
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 5, 5, 14)
