"""The model card of an export folder: what the model is, what it was made of, how good it is, what nobody has tried.

After Mitchell et al., "Model Cards for Model Reporting" (https://arxiv.org/abs/1810.03993). Everything that a run knows
is filled in; what only people can know, licences above all, is a field that says so. The text is `templates/card.md`.
"""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader

from recnb.data.images import DataError, printable
from recnb.data.lists import ImageList
from recnb.deploy.index import points_table, sentence
from recnb.recipe.data import training_images
from recnb.recipe.reading import as_yaml
from recnb.recipe.schema import architectures, items, lookup
from recnb.runs.folder import Run
from recnb.storage import ROOT, harmless

FILL_IN = "**fill in**"
ABSOLUTE = re.compile(r"(?<![\w.:/-])(/|[A-Za-z]:\\)([^/\\\s'\"]+[/\\])+")  # the folders of a path


def cell(value) -> str:
    """Return the text of a cell of a Markdown table: floats with three decimals, no markup, no sign that ends the cell.

    What a spreadsheet would take for a formula begins with an apostrophe.
    """
    if isinstance(value, float):
        return f"{value:.3f}"
    return html.escape(harmless(printable(str(value))), quote=False).replace("|", r"\|")


TEMPLATES = Environment(  # Markdown, not HTML: no autoescape
    loader=FileSystemLoader(Path(__file__).with_name("templates")), trim_blocks=True, lstrip_blocks=True
)
TEMPLATES.filters["cell"] = cell


def model_card(run: Run, meta: dict, report: dict, info: dict | None, files: Sequence[str]) -> str:
    """Return the text of README.md.

    Args:
        run: the run that is exported.
        meta: the content of inference.yml.
        report: the content of parity.json.
        info: what the index knows of itself; None without an index.
        files: the names in the export folder.
    """
    file = run.folder / "env.json"
    backbones = [section["Backbone"] for _, section in architectures(run.cfg)]
    data = ModelCardData(
        license="other",
        library_name="onnx",
        pipeline_tag="image-feature-extraction",
        tags=["image-retrieval", "metric-learning"],
    )
    content = TEMPLATES.get_template("card.md").render(
        card_data=data.to_yaml(),
        fill_in=FILL_IN,
        name=run.name,
        backbones=[backbone["name"] for backbone in backbones],
        begun=[backbone["name"] for backbone in backbones if backbone.get("pretrained")],
        epochs=run.cfg["Global"]["epochs"],
        env={"packages": {}} | (json.loads(file.read_text()) if file.is_file() else {}),
        files=files,
        steps=[", ".join(f"{key.replace('_', ' ')} {x}" for key, x in step.items()) for step in meta["preprocess"]],
        inside=meta["inside"],
        output=output_section(meta, run),
        info=info,
        holds=sentence(info["holds"]) if info else "",
        queries=len(run.query),
        gallery=len(run.gallery),
        report=report,
        proofs=proofs(report),
        lists=lists(run),
        config=config(run),
        **results(info, run),
    )
    return str(ModelCard(content, ignore_metadata_errors=False))


def list_row(name: str, images: ImageList) -> list:
    """Return the name, source, images, identities and cameras of a list."""
    cameras = "unknown" if images.cameras is None else len(np.unique(images.cameras))
    return [name, Path(images.source).name, f"{len(images):,}", f"{len(np.unique(images.labels)):,}", cameras]


def lists(run: Run) -> list[list]:
    """Return a row for each list that the model was trained and judged on, as far as they are on this machine."""
    rows = [list_row("queries", run.query), list_row("gallery", run.gallery)]
    try:
        return [list_row("training", training_images(run.cfg)), *rows]
    except DataError:
        return [["training", "not on the machine that exported", "", "", ""], *rows]


def output_section(meta: dict, run: Run) -> str:
    """Return what comes out, and what the run's own evaluation did behind it."""
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


def results(info: dict | None, run: Run) -> dict[str, list]:
    """Return the rows of metrics and of operating points, with intervals; without an index, what training measured."""
    if info is None:
        return {"metrics": [(k, v) for k, v in run.metrics.items() if isinstance(v, float)]}
    intervals = info["metrics"].items()
    return {
        "metrics": [(name, row["mean"], f"{row['low']:.3f} to {row['high']:.3f}") for name, row in intervals],
        "points": list(points_table(info).itertuples()),
    }


def compared(report: dict) -> list[tuple[str, str, dict]]:
    """Return each file of parity.json, what it was given, and how its vectors compare with the trained model's."""
    given = [(name, size, row) for name, sizes in report["model_parity"].items() for size, row in sizes.items()]
    return given + [(name, "image files", row) for name, row in report["pipeline_parity"].items()]


def proofs(report: dict) -> list[tuple]:
    """Return a row for each file against the trained model."""
    trained = report["trained"]
    return [("trained", "", "", "", "", trained["recall1"], trained["mAP"])] + [
        (
            name,
            size.replace("_", " "),
            f"{row['cosine_least']:.6f}",
            f"{row['difference_largest']:.1e}",
            row["same_first_hit"],
            row["recall1"],
            row["mAP"],
        )
        for name, size, row in compared(report)
    ]


def proof_section(report: dict) -> str:
    """Return the table of `proofs` in Markdown, as the card shows it."""
    tables: Any = TEMPLATES.get_template("tables.md").module
    return tables.proof(report, proofs(report))


def config(run: Run) -> str:
    """Return the parts of the configuration that make the model, as YAML, and of absolute paths the last part alone."""
    kept = {
        "Global": {key: run.cfg["Global"][key] for key in ("epochs", "seed", "image_shape")},
        "transform_ops": lookup(run.cfg, "DataLoader.Train.dataset.transform_ops"),
        "sampler": lookup(run.cfg, "DataLoader.Train.sampler"),
        **{key: run.cfg[key] for key in ("Arch", "Loss", "Optimizer")},
    }
    return ABSOLUTE.sub("", as_yaml(kept).replace(f"{ROOT}/", "")).rstrip()
