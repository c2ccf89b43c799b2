"""How good is a ranking? Embeddings, labels and cameras in, metrics, intervals and neighbours out.

Plain arrays and lists; nothing here knows a model, an image or a configuration. `metrics` holds the definitions of
recall@k, mAP and their family, `protocol` says which gallery items count for a query.
"""

from recnb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "metrics": "retrieval_metrics ranking_metrics per_class cmc",
        "lists": "Ranking rank choose_rows changed",
        "verification": "verification_metrics pair_metrics roc_metrics",
        "stats": "bootstrap_interval paired_difference",
        "spread": "effective_rank uniformity",
        "neighbours": "knn",
        "search": "Index plan",
        "rerank": "k_reciprocal KReciprocal alpha_query_expansion database_augmentation Whitening fit_whitening",
        "protocol": "Protocol make_protocol",
    },
)
