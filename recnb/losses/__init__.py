"""What is asked of the features? Losses over the model's output dict, and their weighted sum."""

from recnb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "combined": "LOSSES CELoss SupConLoss CombinedLoss",
        "pairs": "TripletLoss TripletLossV2 TripletAngularMarginLoss PairwiseCosface "
        "TriHardLoss MSMLoss EmlLoss NpairsLoss ContrastiveLoss",
        "hashing": "DSHSDLoss LCDSHLoss DCHLoss",
        "memories": "CenterLoss CrossBatchMemory ContrastiveLoss_XBM TripletAngularMarginLoss_XBM",
        "distillation": "DistillationGTCELoss DistillationDMLLoss DistillationDistanceLoss",
        "pml": "PML",
    },
)
