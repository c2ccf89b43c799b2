"""A run on one page, made of a trained run's folder alone."""

import re
import shutil

import pytest
import yaml

from recnb.runs.report import report


@pytest.fixture(scope="module")
def run(trained_run, tmp_path_factory):
    return shutil.copytree(trained_run, tmp_path_factory.mktemp("report") / "run")


def test_the_report_says_what_the_run_knows(run):
    path = report(run)
    page = path.read_text(encoding="utf-8")
    assert path == run / "report.html" and "http:" not in page
    titles = re.findall(r'<section aria-label="(.*?)">', page)
    assert titles == [
        "Before and after",
        "Metrics",
        "Training",
        "Curves",
        "What queries find",
        "Worst identities",
        "Environment",
        "Configuration",
    ]
    assert "recall@1" in page and page.count("data:image/png") == 3 and "<article" in page


def test_a_run_without_the_queries_of_the_start_or_without_pictures_has_a_report(run, tmp_path):
    bare = shutil.copytree(run, tmp_path / "bare")
    for name in ("queries.csv", "SHA256SUMS"):
        (bare / name).unlink()
    cfg = yaml.safe_load((bare / "config.yaml").read_text())
    for part in ("Query", "Gallery"):
        cfg["DataLoader"]["Eval"][part]["dataset"]["image_root"] = str(tmp_path / "gone")
    (bare / "config.yaml").write_text(yaml.safe_dump(cfg))
    page = report(bare).read_text(encoding="utf-8")
    assert "Whether training helped is not known" in page and "Before and after" not in page
    (bare / "ladder.csv").write_text(
        "rung,what,mAP,low,high,gain,minutes,kept\n"
        "start,as it comes,0.5,0.4,0.6,0,1,False\n"
        "probe,,0.7,0.6,0.8,0.2,2,True\n"
    )
    (bare / "history.csv").write_text("epoch,lr,train_loss,mAP\n1,0.1,2.0,\n")  # a rung trained again is not judged
    assert 'aria-label="The ladder"' in report(bare).read_text(encoding="utf-8")
    assert "No pictures: the picture" in page and "<article" not in page
