"""How are the features learnt? A fastai Learner, its callbacks, checkpoints that resume to the same bits."""

from recnb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "learner": "RetrievalLearner",
        "plan": "Plan Schedule Keeping Watching FitState",
        "callbacks": "RetrievalEvaluation History",
        "fit": "fit_config",
        "optim": "OPTIMIZERS",
        "schedules": "SCHEDULES",
        "evaluation": "METRICS POST_PROCESS Evaluation Judge embed",
        "checkpoints": "Checkpoints resume",
        "guard": "TrainingError",
    },
)
