"""Whether training helped: values made by hand, where the answer is known."""

import html
import json

import numpy as np
import pandas as pd
import pytest

from recnb.registry import ConfigError
from recnb.runs.results import save_metrics
from recnb.runs.verdict import BETTER, WORSE, show_verdict, spoken, verdict


def queries(identities=10, each=4, **changes):
    """Queries whose metrics all begin at the same random values; each change is what training adds to one of them."""
    labels = np.repeat([f"thing {i}" for i in range(identities)], each)
    before = np.random.default_rng(0).uniform(0.2, 0.8, len(labels))
    table = pd.DataFrame({"path": [f"{i}.jpg" for i in range(len(labels))], "label": labels})
    for metric, change in changes.items():
        table[f"{metric}_before"], table[f"{metric}_after"] = before, before + change
    return table


def test_each_metric_has_its_verdict():
    noise = np.tile([-0.1, 0.1], 20)
    result = verdict(queries(recall1=0.1, recall5=noise, mAP=-0.1))
    said = result.table().verdict
    assert said.to_dict() == {"recall1": BETTER, "recall5": "no difference that 40 queries could show", "mAP": WORSE}
    assert (result.queries, result.identities) == (40, 10)
    row = result.table().loc["mAP"]
    assert row.difference == pytest.approx(-0.1) and row.low <= row.difference <= row.high < 0
    before = queries(mAP=0).mAP_before
    assert row.before == pytest.approx(before.mean()) and row.after == pytest.approx(before.mean() - 0.1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mAP": 0.1}, "Training helped: mAP 0."),
        ({"mAP": -0.1}, "Training hurt, keep the start: mAP 0."),
        ({"mAP": 0}, "Training made no difference that 40 queries of 10 identities could show: mAP 0."),
        ({"recall1": 0.1, "mAP": -0.1}, "Training helped some metrics and hurt others: recall@1 0."),
        ({"recall1": 0.1, "mAP": 0}, "Training helped: recall@1 0."),
    ],
)
def test_the_sentence(change, sentence):
    text = str(verdict(queries(**change)))
    assert text.startswith(sentence) and "95 % interval" in text and "\n" not in text


@pytest.mark.parametrize("identities", [1, 5])
def test_few_identities_show_nothing_however_large_the_gain(identities):
    result = verdict(queries(identities, each=20, mAP=0.15))
    assert result.table().verdict["mAP"] == f"no difference that {identities * 20} queries could show"
    assert "nan" not in str(result) and "NaN" not in json.dumps(result.intervals)
    result.figure().canvas.draw()


def test_identities_rise_and_fall_together():
    """One identity with many queries gains: as single queries that would be sure, as identities it is not."""
    gain = np.zeros(80)
    gain[:40] = 0.5
    table = queries(20, each=4, mAP=gain).assign(label=["one"] * 40 + [f"thing {i}" for i in range(40)])
    assert verdict(table).table().verdict["mAP"].startswith("no difference")
    assert verdict(table.assign(label=range(80))).table().verdict["mAP"] == BETTER


def test_queries_without_a_positive_do_not_count():
    table = queries(mAP=0.1)
    table.loc[:3, ["mAP_before", "mAP_after"]] = np.nan
    assert (verdict(table).queries, verdict(table).identities) == (36, 9)


def test_a_run_folder_and_what_its_metrics_hold(tmp_path):
    before, after = {"mAP": 0.5}, {"mAP": 0.6}
    assert "intervals" not in save_metrics(tmp_path, before, after)
    table = queries(mAP=0.1).assign(label=np.repeat(["NA", "", *map(str, range(8))], 4))  # names, whatever they spell
    table.to_csv(tmp_path / "queries.csv", index=False)
    assert verdict(tmp_path).identities == 10
    pd.testing.assert_frame_equal(verdict(tmp_path).table(), verdict(table).table())
    content = save_metrics(tmp_path, before, after)
    assert json.loads((tmp_path / "metrics.json").read_text()) == content
    kept = content["intervals"]["mAP"]
    assert kept["before"][0] < kept["before"][1] and kept["difference"][0] > 0 and kept["verdict"] == BETTER


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "queries.csv is missing"),
        ("path,mAP_before,mAP_after\n", "there is no column 'label'"),
        ("path,label\na,b\n", "there is no column 'mAP_before'"),
        ("path,label,mAP_before\na,b,1\n", "there is no column 'mAP_after'"),
        ("path,label,mAP_before,mAP_after\na,b,1,x\n", "mAP has a value that is not a number"),
        ("path,label,mAP_before,mAP_after\na,b,,\n", "mAP has no query with values"),
        ("path,label,mAP_before,mAP_after\na,b,inf,1\n", "mAP has an infinite value"),
        ("", "is damaged"),
    ],
)
def test_what_is_wrong_with_the_file_is_said(tmp_path, content, message):
    if content is not None:
        (tmp_path / "queries.csv").write_text(content)
    with pytest.raises(ConfigError, match=message):
        verdict(tmp_path)


def test_a_notebook_shows_the_sentence_the_bars_and_the_table(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda thing, **_: shown.append(thing))
    show_verdict(tmp_path)
    assert "queries.csv is missing" in shown.pop()["text/html"]
    queries(mAP=0.1).to_csv(tmp_path / "queries.csv", index=False)
    show_verdict(tmp_path)
    sentence, bars, table = shown
    assert sentence["text/html"] == f"<p>{html.escape(str(verdict(tmp_path)))}</p>" and bars.axes
    assert "better" in table.to_html()


def test_the_bars_show_every_metric(tmp_path):
    figure = verdict(queries(recall1=0.1, mAP=-0.1)).figure()
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert [tick.split("\n")[0] for tick in ticks] == ["recall@1", "mAP"] and len(figure.axes[0].patches) == 4
    figure.savefig(tmp_path / "bars.png")


def test_metrics_as_they_are_spoken_of():
    assert [spoken(name) for name in ("recall1", "top5", "mAP", "precision@5")] == [
        "recall@1",
        "top@5",
        "mAP",
        "precision@5",
    ]
