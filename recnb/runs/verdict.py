"""Did training help? Each query before and after training, compared, and the answer in words.

Over a few queries a metric changes by chance. "Better" and "worse" are said with 95 % confidence for other identities
of the same kind; otherwise there were too few queries to tell.
"""

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from recnb.data.lists import read_csv
from recnb.gallery.curves import before_after_figure
from recnb.registry import ConfigError
from recnb.retrieval.stats import bootstrap_interval, paired_difference
from recnb.runs import tables
from recnb.storage import resolve

BETTER, SAME, WORSE = "better", "no difference that {} could show", "worse: keep the start"
SURE = 0.05  # the largest p-value of a difference that counts
COLUMNS = ["before", "after", "difference", "low", "high", "verdict"]


@dataclass(frozen=True)
class Verdict:
    """Whether training helped: `str()` is a sentence, `table()` the numbers, `figure()` the bars.

    `rows` has a row per metric: before, before_low, before_high, the same for after, then difference, low, high and
    verdict. All intervals are of 95 %.
    """

    rows: pd.DataFrame
    queries: int  # those with a positive
    identities: int

    def __str__(self) -> str:
        better, worse = ((self.rows.verdict == said).any() for said in (BETTER, WORSE))
        head = "Training helped" if better else f"Training made {SAME.format(self.counted)}"
        if worse:
            head = "Training helped some metrics and hurt others" if better else "Training hurt, keep the start"
        return f"{head}: {', '.join(map(self._said, self.rows.index))}"

    @property
    def counted(self) -> str:
        """The number of queries and of their identities, in words."""
        return f"{_many(self.queries, 'query', 'queries')} of {_many(self.identities, 'identity', 'identities')}"

    @property
    def intervals(self) -> dict[str, dict]:
        """For each metric [low, high] before, after and of the difference, and the verdict, as metrics.json has them.

        Equal queries give equal numbers. A single identity has no interval: both bounds are None.
        """
        rows = self.rows.astype(object).where(self.rows.notna(), None).to_dict("index")
        names = {"before": "before_", "after": "after_", "difference": ""}
        return {
            metric: {name: [row[f"{part}low"], row[f"{part}high"]] for name, part in names.items()}
            | {"verdict": row["verdict"]}
            for metric, row in rows.items()
        }

    def table(self) -> pd.DataFrame:
        """Return a row per metric: before, after, difference, its interval from `low` to `high`, and the verdict."""
        return self.rows[COLUMNS]

    def figure(self) -> Figure:
        """Return the bars before and after, with their intervals."""
        return before_after_figure(self.rows.rename(index=spoken))

    def _said(self, metric) -> str:
        row = self.rows.loc[metric]
        interval = f", 95 % interval {row.low:+.3f} to {row.high:+.3f}" if np.isfinite(row.low) else ""
        return f"{spoken(metric)} {row.before:.3f} -> {row.after:.3f} ({row.difference:+.3f}{interval})"


def verdict(queries) -> Verdict:
    """Compare each query's values before and after training, by a paired bootstrap over identities.

    Args:
        queries: a run, its folder, or the content of its queries.csv: a row per query with its `label` and, for each
            metric, `<metric>_before` and `<metric>_after`, empty for a query without a positive.

    Returns:
        A metric is better or worse where the interval of its difference leaves out 0 and the randomisation test agrees
        (Smucker, Allan and Carterette, CIKM 2007): fewer than six identities can show nothing.

    Raises:
        ConfigError: The file or the columns are missing, or no query has values.
    """
    table, place = (queries, "queries") if isinstance(queries, pd.DataFrame) else _read(queries)
    metrics = [c.removesuffix("_before") for c in table if str(c).endswith("_before")]
    needed = ["label", *(f"{metric}_after" for metric in metrics)]
    missing = [column for column in needed if column not in table]
    if missing or not metrics:
        raise ConfigError(f"{place}: there is no column '{(missing or ['mAP_before'])[0]}'; 02_train writes this file")
    both = {metric: _numbers(table, metric, place) for metric in metrics}
    judged = pd.DataFrame.from_dict({metric: _row(values) for metric, values in both.items()}, orient="index")
    first = both[metrics[0]]
    return Verdict(judged.rename_axis("metric"), len(first), first.label.nunique())


def show_verdict(run) -> None:
    """Display in a notebook the sentence, the bars and the table of a run, or why there is no verdict."""
    from IPython.display import display  # imported here: the commands need no notebook

    try:
        result = verdict(run)
    except ConfigError as error:
        tables.say(str(error))
        return
    tables.say(str(result))
    display(result.figure())
    display(tables.shown(result.table(), index=True))


def spoken(metric: str) -> str:
    """Return a metric's usual name: recall@1 for recall1."""
    return re.sub(r"^(recall|top)(\d+)$", r"\1@\2", str(metric))


def _read(run) -> tuple[pd.DataFrame, str]:
    path = resolve(getattr(run, "folder", run)) / "queries.csv"
    try:
        return read_csv(path), str(path)  # a name may spell NA
    except FileNotFoundError:
        raise ConfigError(f"{path.parent}: queries.csv is missing, so whether training helped is not known") from None
    except Exception as error:  # a damaged file makes readers raise anything
        raise ConfigError(f"{path} is damaged: {error}") from error


def _numbers(table: pd.DataFrame, metric: str, place: str) -> pd.DataFrame:
    """Return the label and both values of the queries that have them."""
    try:
        columns = {name: pd.to_numeric(table[f"{metric}_{name}"].replace("", np.nan)) for name in ("before", "after")}
    except ValueError as error:
        raise ConfigError(f"{place}: {metric} has a value that is not a number: {error}") from None
    both = pd.DataFrame({"label": table.label, **columns}).dropna()
    if both.empty or not np.isfinite(both[["before", "after"]]).all(axis=None):
        raise ConfigError(f"{place}: {metric} has {'an infinite value' if len(both) else 'no query with values'}")
    return both


def _row(values: pd.DataFrame) -> dict:
    clusters = values.label.to_numpy()
    row: dict = {}
    for name in ("before", "after"):
        interval = bootstrap_interval(values[name].to_numpy(), clusters)
        row |= {name: interval["mean"], f"{name}_low": interval["low"], f"{name}_high": interval["high"]}
    change = paired_difference(values.before.to_numpy(), values.after.to_numpy(), clusters)
    sure = change["p_value"] <= SURE
    said = BETTER if sure and change["low"] > 0 else WORSE if sure and change["high"] < 0 else SAME
    return row | {
        **{key: change[key] for key in ("difference", "low", "high")},
        "verdict": said.format(_many(len(values), "query", "queries")),
    }


def _many(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"
