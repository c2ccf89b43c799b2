"""recnb: a notebook-first kit for learning image features for retrieval.

A folder is a question, a module is a chapter. From top to bottom, each may import those in lower rows only:

    cli           the commands
    deploy        how is it used elsewhere?
    runs          what was run, and with what result?
    recipe        what does a YAML file mean?
    training      how are the features learnt?           gallery       what does a model find?
    losses        what is asked of the features?
    models        what makes the features?               data          how do files become batches?
    distributed   who computes what?                     storage       how is a file written whole?
    retrieval     how good is a ranking?                 demo          what can be tried without data?
    registry      which parts have a name?

Importing the package loads none of them.
"""

from importlib import import_module

__version__ = "0.2.0"


def lazily(package: str, homes: dict[str, str]) -> tuple:
    """Return the `__getattr__`, `__dir__` and `__all__` of a package whose names are imported when first asked for.

    Args:
        package: the package's `__name__`.
        homes: from each module of the package (dotted for one further down) to its public names, with blanks between.
    """
    home = {name: module for module, names in homes.items() for name in names.split()}

    def get(name: str):
        if name not in home:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(f"{package}.{home[name]}"), name)

    return get, lambda: sorted(home), [*home]


__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "recipe.schema": "load_config",
        "recipe.data": "build_loaders",
        "recipe.model": "build_model",
        "recipe.learner": "build_learner",
        "models.recmodel": "RecModel",
        "retrieval.metrics": "retrieval_metrics",
        "runs.folder": "open_run",
    },
)
