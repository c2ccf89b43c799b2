"""What a ladder's rungs came to on the validation images, and which of them is kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from recnb.gallery.curves import ladder_figure
from recnb.recipe import ladder
from recnb.runs.verdict import BETTER, WORSE, Verdict, verdict


@dataclass
class Rung:
    """A rung that was climbed: its values for each validation query beside those of the start."""

    name: str
    cfg: dict
    queries: pd.DataFrame = field(repr=False)
    folder: str = ""  # in rungs/, of what was trained
    alpha: float | None = None
    minutes: float = 0.0
    way: dict[float, float] = field(default_factory=dict)  # the metric's mean by alpha, where several were tried

    @cached_property
    def verdict(self) -> Verdict:
        return verdict(self.queries)

    @property
    def what(self) -> str:
        """What the rung is, in words."""
        return ladder.RUNGS[self.name] + ("" if self.alpha is None else f", {self.alpha:g} of the way")

    @property
    def metric(self) -> str:
        """What rungs are compared by: mAP where it is measured, for it moves before recall@1 does."""
        names = [column.removesuffix("_after") for column in self.queries if column.endswith("_after")]
        return "mAP" if "mAP" in names else names[0]

    @property
    def mean(self) -> float:
        """The metric's mean over the validation queries."""
        return self.queries[f"{self.metric}_after"].mean()

    def values(self, fold: int) -> dict[str, np.ndarray]:
        """Return the rung's metrics for each query of a fold."""
        rows = self.queries[self.queries.fold == fold]
        return {c.removesuffix("_after"): rows[c].to_numpy(float) for c in rows if c.endswith("_after")}


@dataclass
class Ladder:
    """All rungs, the one that is kept, and what there is to say of it."""

    rungs: list[Rung] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    @property
    def metric(self) -> str:
        """What the rungs are compared by."""
        return self.rungs[0].metric

    @property
    def kept(self) -> Rung:
        """The best rung whose gain the validation images show."""
        return best(self.rungs, self.metric)

    def table(self) -> pd.DataFrame:
        """Return a row per rung: the metric on validation with its interval, the gain over the start, whether kept."""
        judged, kept = [(rung, rung.verdict.rows.loc[self.metric]) for rung in self.rungs], self.kept
        rows = [
            {"rung": rung.name, "what": rung.what, self.metric: row.after}
            | {"low": row.after_low, "high": row.after_high, "gain": row.difference}
            | {"gain low": row.low, "gain high": row.high, "images": len(rung.queries)}
            | {"minutes": rung.minutes, "kept": rung is kept}
            for rung, row in judged
        ]
        return pd.DataFrame(rows).set_index("rung")

    def figure(self) -> Figure:
        """Return each rung's metric with its interval, the kept one marked."""
        return rungs_figure(self.table(), next((rung.way for rung in self.rungs if rung.way), None))


def rungs_figure(table: pd.DataFrame, way: Mapping[float, float] | None = None) -> Figure:
    """Return the figure of a table of rungs.

    Args:
        table: `Ladder.table`, or what ladder.csv has of it, with the rungs as its index.
        way: the metric of the weights in between by their share, where it is known.
    """
    metric = table.columns[1]
    rows = [
        {"name": name, "value": row[metric], "low": row.low, "high": row.high, "kept": row.kept}
        | {"note": f"{row.gain:+.3f}, {row.minutes:.1f} min" if name != "start" else ""}
        for name, row in table.iterrows()
    ]
    return ladder_figure(rows, metric, way)


def best(rungs: list[Rung], metric: str) -> Rung:
    """Return the rung with the highest metric among those surely better than the start and worse in nothing."""
    sure = [rungs[0]]
    for rung in rungs[1:]:
        rows = rung.verdict.rows
        if rows.loc[metric].verdict == BETTER and not (rows.verdict == WORSE).any():
            sure.append(rung)
    return max(sure, key=lambda rung: rung.verdict.rows.loc[metric].after)
