"""A run on one page, to keep or to pass on: verdict, metrics, curves, gallery, worst identities, environment."""

import json
from pathlib import Path

import pandas as pd

from recnb.gallery.curves import history_figure
from recnb.gallery.page import gallery_static
from recnb.gallery.report import Section, report_html
from recnb.registry import ConfigError
from recnb.runs.analysis import Embeddings, confused, identities, judge, of_run, overview_figure
from recnb.runs.folder import Run, load_run
from recnb.runs.rungs import rungs_figure
from recnb.runs.verdict import spoken, verdict

WORST = 15  # identities


def report(folder: str | Path) -> Path:
    """Write report.html of a finished run, which needs neither network nor images to be read, and return its path.

    Raises:
        ConfigError: the folder is not that of a finished run.
        DataError: the run's query and gallery lists are not on this machine.
    """
    run = load_run(folder)
    data = of_run(run)
    metrics, arrays = judge(data)
    table = metrics.reset_index()[["metric", "mean", "low", "high"]].rename(columns={"mean": "value"})
    table["metric"] = table.metric.map(spoken)
    said, sections = judged(run)
    sections += [
        *climbed(run),
        Section("Metrics", "With their 95 % intervals, for other identities of the same kind.", table=table),
        Section("Training", figure=history_figure(run.history), alt="losses and metrics by epoch"),
        Section("Curves", figure=overview_figure(data), alt="found by rank, similarity of pairs, average precision"),
        gallery(run),
        worst(data, arrays),
        *environment(run),
    ]
    path, cfg = run.folder / "report.html", run.cfg["Global"]
    summary = f"{len(run.query):,} queries in {len(run.gallery):,} gallery images · {cfg['epochs']} epochs"
    report_html(f"{run.name}: what was learnt", sections, summary, said, path)
    return path


def judged(run: Run) -> tuple[str, list[Section]]:
    """Return a sentence on whether training helped, and its section; or why that is not known, and no section."""
    try:
        result = verdict(run)
    except ConfigError as error:
        return f"Whether training helped is not known: {error}.", []
    rows = result.table().rename(index=spoken).reset_index()
    return f"{result}.", [Section("Before and after", figure=result.figure(), alt=str(result), table=rows)]


def climbed(run: Run) -> list[Section]:
    """Return the section of the rungs that were tried, none where no ladder was climbed."""
    if not (run.folder / "ladder.csv").is_file():
        return []
    table = pd.read_csv(run.folder / "ladder.csv", index_col="rung")
    text = "What was tried, judged on validation identities; in bold what is kept."
    return [Section("The ladder", text, figure=rungs_figure(table), alt="mAP of each rung with its interval")]


def gallery(run: Run) -> Section:
    """Return the section of some queries, failures first, or a sentence where pictures are not on this machine."""
    title = "What queries find"
    try:
        pages = gallery_static(run.rank(8), run.query.pictures, run.gallery.pictures, label_names=run.query.names)
    except (FileNotFoundError, ValueError) as error:
        return Section(title, f"No pictures: {error}.")
    return Section(title, "Ten queries, those that fail first; choose one by click or arrow key.", gallery=pages)


def worst(data: Embeddings, arrays: dict) -> Section:
    """Return the section of the identities with the lowest mean AP, and what each is most often taken for."""
    table, pairs = identities(data, arrays), confused(data)
    most = pairs.drop_duplicates("identity").assign(identity=lambda x: data.text(x.identity))
    taken = dict(zip(most.identity, data.text(most.taken_for), strict=True))
    first = table.head(WORST)
    text = f"{len(first)} of {len(table):,} identities, by average precision."
    return Section("Worst identities", text, table=first.assign(**{"mostly taken for": first.label.map(taken)}))


def environment(run: Run) -> list[Section]:
    """Return the sections of what the run was made with, and of its configuration."""
    file = run.folder / "env.json"
    env = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known = {key: value for key, value in env.items() if not isinstance(value, dict)} | env.get("packages", {})
    rows = pd.DataFrame(
        [(key, str(value)) for key, value in known.items() if value is not None], columns=["what", "is"]
    )
    config = (run.folder / "config.yaml").read_text(encoding="utf-8")
    return [Section("Environment", table=rows), Section("Configuration", code=config)]
