"""Who computes what? The processes of one training share batches, gradients and the rows of large heads.

Nothing here knows a model or a configuration.
"""

from recnb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "processes": "processes ranks first_does gather everyone launch",
        "gradients": "AverageGradients copy_from_first share_batches",
        "rows": "PartialLogits sharded_weights step_by_rows",
    },
)
