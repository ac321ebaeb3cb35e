"""Pruning that no rescaling can fool: criteria, selections, masks, and what a mask costs (mathematics §6)."""

from pathlift.pruning import arguments as arguments
from pathlift.pruning.api import PrunedTensor, PruneReport, WeightUpdate, prune
from pathlift.pruning.catalogue import CRITERIA, Criterion
from pathlift.pruning.criteria import Batch
from pathlift.pruning.finetuning import MaskHandle, keep_masks
from pathlift.pruning.masks import (
    ScorePruning,
    apply_masks,
    from_torch_prune,
    importance_scores,
    load_masks,
    save_masks,
    to_torch_prune,
)
from pathlift.pruning.removal import ChannelsLeft, ShrinkReport, ShrunkLayer, shrink
from pathlift.pruning.selection import SELECTIONS, NofM
from pathlift.pruning.semi_structured import to_semi_structured

__all__ = [
    "CRITERIA",
    "SELECTIONS",
    "Batch",
    "ChannelsLeft",
    "Criterion",
    "MaskHandle",
    "NofM",
    "PruneReport",
    "PrunedTensor",
    "ScorePruning",
    "ShrinkReport",
    "ShrunkLayer",
    "WeightUpdate",
    "apply_masks",
    "from_torch_prune",
    "importance_scores",
    "keep_masks",
    "load_masks",
    "prune",
    "save_masks",
    "shrink",
    "to_semi_structured",
    "to_torch_prune",
]
