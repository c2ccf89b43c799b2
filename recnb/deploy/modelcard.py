"""The model card of an export folder: what the model is, what it was made of, how good it is, what nobody has tried.

After Mitchell et al., "Model Cards for Model Reporting" (https://arxiv.org/abs/1810.03993). Everything that a run knows
is filled in; what only people can know, licences above all, is a field that says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recnb.data.images import DataError
from recnb.data.lists import ImageList
from recnb.recipe.data import training_images
from recnb.recipe.reading import as_yaml
from recnb.recipe.schema import architectures, items, lookup
from recnb.runs.folder import Run
from recnb.storage import ROOT

FILL_IN = "**fill in**"
NOT_TESTED = """- Images of other sources than those of the lists above: other cameras, places, seasons or sizes.
- Images that are turned, blurred, dark or partly hidden more than those of the lists are; images made to deceive.
- Groups: no figure here is split by who or what is shown. Where people or their property are, split before use.
- Unknown identities other than those of the lists: their rate above comes from taking known ones out of the gallery.
- Other runtimes than onnxruntime's CPU provider, and graphics cards."""


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table in Markdown; floats with three decimals."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in line)} |" for line in lines
    )


def list_row(name: str, images: ImageList) -> list:
    """Name, source, images, identities and cameras of a list."""
    cameras = "unknown" if images.cameras is None else len(np.unique(images.cameras))
    return [name, Path(images.source).name, f"{len(images):,}", f"{len(np.unique(images.labels)):,}", cameras]


def data_section(run: Run) -> str:
    """The lists that the model was trained and judged on, as far as they are on this machine."""
    rows = [list_row("queries", run.query), list_row("gallery", run.gallery)]
    try:
        rows.insert(0, list_row("training", training_images(run.cfg)))
    except DataError:
        rows.insert(0, ["training", "not on the machine that exported", "", "", ""])
    return (
        f"{table(('list', 'file', 'images', 'identities', 'cameras'), rows)}\n\n"
        f"Where the images come from, how they were chosen, whose consent there is: {FILL_IN}"
    )


def preprocessing_section(meta: dict) -> str:
    """What happens to an image before the graph and inside it."""
    steps = [
        ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in step.items()) for step in meta["preprocess"]
    ] or ["no resizing"]
    inside = meta["inside"]
    order = ", turns them into BGR" * (inside["channel_order"] == "BGR")
    return (
        f"Before the graph, as `example.py` does it: decoding, EXIF rotation, RGB; {'; '.join(steps)} "
        f"(sizes are [height, width]).\n\nThe graph takes these bytes, uint8 (B, H, W, 3) in RGB{order}, divides "
        f"by 255, subtracts {inside['mean']} and divides by {inside['std']}. `inference.yml` says the same to "
        "programs."
    )


def output_section(meta: dict, run: Run) -> str:
    """What comes out, and what the run's own evaluation did behind it."""
    output = meta["output"]
    form = (
        "at length 1: compare by dot product, which is the cosine"
        if output["normalised"]
        else (f"as it comes; the evaluation compares by {meta['compare']}")
    )
    if output["name"] == "logits":
        form = ("as probabilities" if output["softmax"] else "as the head gives them") + (
            "; a head with a margin gives cosines without their scale, so that probabilities are all alike"
        )
    behind = [name for _, name, _ in items(run.cfg, "PostProcess")]
    behind += [key for key in ("re_ranking", "feature_binarize") if run.cfg["Global"][key]]
    note = f" The run's evaluation used {', '.join(behind)} behind it, which is no part of this folder." * bool(behind)
    return f"float32 (B, {output['embedding_size']}), the {output['name']}, {form}.{note}"


def results_section(info: dict | None, run: Run) -> str:
    """Metrics with intervals, and the thresholds; without an index, what training has measured."""
    if info is None:
        return table(("metric", "value"), [(k, v) for k, v in run.metrics.items() if isinstance(v, float)])
    metrics = table(
        ("metric", "value", "95 % interval"),
        [(name, row["mean"], f"{row['low']:.3f} to {row['high']:.3f}") for name, row in info["metrics"].items()],
    )
    rates = table(
        (
            "false-match rate of pairs",
            "threshold",
            "pairs of one identity accepted",
            "known, named rightly",
            "known, named wrongly",
            "known, called unknown",
            "unknown, named all the same",
        ),
        [(f"{row['false_match_rate']:g}", *list(row.values())[1:]) for row in info["calibration"]],
    )
    return (
        f"Of the exported model, from image files on: {len(run.query):,} queries in {len(run.gallery):,} gallery "
        "images. An image never finds itself, and images of its identity from its own camera do not count. The "
        f"interval is a bootstrap over identities.\n\n{metrics}\n\nThe threshold in `index/` is "
        f"{info['threshold']:.4f}, at a false-match rate of {info['false_match_rate']:g}. That is a rate of pairs; "
        "a search compares with every item, and the last column says how many images get a name though their "
        f"identity is not in the gallery.\n\n{rates}"
    )


def proof_section(report: dict) -> str:
    """Each file against the trained model."""
    rows = [
        (name, size.replace("_", " "), row)
        for name, sizes in report["model_parity"].items()
        for size, row in sizes.items()
    ]
    rows += [(name, "image files", row) for name, row in report["pipeline_parity"].items()]
    count, trained = report["images"], report["trained"]
    return table(
        ("file", "given", "least cosine", "largest difference", "same first hit", "recall1", "mAP"),
        [
            ("trained", "", "", "", "", trained["recall1"], trained["mAP"]),
            *(
                (
                    name,
                    given,
                    f"{row['cosine_least']:.6f}",
                    f"{row['difference_largest']:.1e}",
                    row["same_first_hit"],
                    row["recall1"],
                    row["mAP"],
                )
                for name, given, row in rows
            ),
        ],
    ) + (
        f"\n\nOn {count['query']:,} queries and {count['gallery']:,} gallery images; all numbers are in `parity.json`."
    )


def config_section(run: Run) -> str:
    """The parts of the configuration that make the model."""
    kept = {
        "Global": {key: run.cfg["Global"][key] for key in ("epochs", "seed", "image_shape")},
        "transform_ops": lookup(run.cfg, "DataLoader.Train.dataset.transform_ops"),
        "sampler": lookup(run.cfg, "DataLoader.Train.sampler"),
        **{key: run.cfg[key] for key in ("Arch", "Loss", "Optimizer")},
    }
    return f"```yaml\n{as_yaml(kept).replace(f'{ROOT}/', '')}```"


def model_card(run: Run, meta: dict, report: dict, info: dict | None, files: Sequence[str]) -> str:
    """The text of README.md: `meta` as in inference.yml, `report` as in parity.json, `info` as in the index."""
    file = run.folder / "env.json"
    env = json.loads(file.read_text()) if file.is_file() else {}
    backbones = [section["Backbone"] for _, section in architectures(run.cfg)]
    begun = [f"{backbone['name']}: {FILL_IN}" for backbone in backbones if backbone.get("pretrained")]
    made = (
        f"{', '.join(backbone['name'] for backbone in backbones)}, trained by recnb for "
        f"{run.cfg['Global']['epochs']} epochs (commit {env.get('commit') or 'unknown'}, torch "
        f"{env.get('packages', {}).get('torch', 'unknown')}, on {env.get('device', 'an unknown device')})."
    )
    use = (
        "```\npython example.py IMAGE        # needs onnxruntime, numpy and pillow, nothing else\n```\n\n"
        "With recnb, an image's name, or 'unknown':\n\n```python\nfrom recnb.deploy.recognizer import Recognizer\n\n"
        'Recognizer("export").identify("image.jpg")\n```'
        if info
        else "```\npython example.py IMAGE\n```"
    )
    parts = {
        "Use": f"{use}\n\nFiles: {', '.join(f'`{name}`' for name in files)}.\n\nIntended for: {FILL_IN}",
        "Preprocessing": preprocessing_section(meta),
        "Output": output_section(meta, run),
        "Results": results_section(info, run),
        "The same as the trained model": proof_section(report),
        "Data": data_section(run),
        "Config": config_section(run),
        "Licence": f"- These weights: {FILL_IN}\n- The training images: {FILL_IN}\n- Weights that training began "
        f"from: {'; '.join(begun) or 'none'}\n- Whom to ask: {FILL_IN}",
        "Not tested on": NOT_TESTED,
    }
    head = (
        "---\nlicense: other  # fill in\nlibrary_name: onnx\npipeline_tag: image-feature-extraction\n"
        f"tags: [image-retrieval, metric-learning]\n---\n\n# {run.name}\n\n{made}"
    )
    return "\n\n".join([head, *(f"## {title}\n\n{text}" for title, text in parts.items())]) + "\n"
