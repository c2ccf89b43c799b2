"""What was run, and with what result? Run folders: written, read back, analysed, compared."""

from recnb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "folder": "Run open_run resolve_run load_run embed_picture model_input",
        "results": "save_metrics save_results",
        "verdict": "Verdict verdict show_verdict",
        "experiment": "train",
        "compare": "leaderboard load_runs find_runs unpaired",
    },
)
