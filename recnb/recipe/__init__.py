"""What does a YAML file mean? The one wing where a configuration is read: sections in, objects out.

Everything in the rows below is a plain library whose parts take arguments.
"""

from recnb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "schema": "load_config",
        "parts": "use_parts",
        "reading": "read_yaml as_yaml",
        "data": "build_loaders",
        "model": "build_model",
        "objective": "build_loss build_metrics build_judge",
        "optimizer": "build_optimizer build_schedules",
        "learner": "build_learner",
        "resolved": "resolved",
    },
)
