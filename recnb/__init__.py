"""recnb: a notebook-first kit for learning image features for retrieval.

Read the chapters in this order: registry, plain, config, files, sharding, distributed, transforms, augment, samplers,
images, datasets, layouts, loaders, photographs, marks, lint, cutting, architectures, backbones, necks, heads, losses,
pairs, hashing, memories, distillation, pml, caching, model, schedules, optim, scores, protocol, ranking, stats,
metrics, verification, search, rerank, prepare, evaluation, learner, guard, checkpoints, steps, training, gallery,
page, static, widget, regions, analysis, runs, compare, example, deploy, modelcard, inference, export, train. Importing
the package loads none of them.
"""
from importlib import import_module

__version__ = "0.2.0"
CHAPTER_OF = {"load_config": "config", "build_loaders": "loaders", "build_model": "model", "RecModel": "model",
              "build_learner": "training", "retrieval_metrics": "metrics", "open_run": "runs"}
__all__ = [*CHAPTER_OF, "__version__"]


def __getattr__(name: str):
    if name not in CHAPTER_OF:
        raise AttributeError(f"module 'recnb' has no attribute '{name}'")
    return getattr(import_module(f"recnb.{CHAPTER_OF[name]}"), name)
