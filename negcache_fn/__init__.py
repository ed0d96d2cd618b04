"""Negative cache for training retrieval models: pure functions on an explicit state."""

from negcache_fn.chunking import chunked
from negcache_fn.filling import prefill, reset, resize
from negcache_fn.mining import top_negatives
from negcache_fn.objective import exact_loss, loss
from negcache_fn.sampling import Draw, merge_draws, sample_gumbel
from negcache_fn.scoring import score
from negcache_fn.state import init_cache, occupancy, stalest, take
from negcache_fn.training import StepOutput, step, step_
from negcache_fn.updating import update, update_

__version__ = "0.1.0"

__all__ = [
    "Draw",
    "StepOutput",
    "chunked",
    "exact_loss",
    "init_cache",
    "loss",
    "merge_draws",
    "occupancy",
    "prefill",
    "reset",
    "resize",
    "sample_gumbel",
    "score",
    "stalest",
    "step",
    "step_",
    "take",
    "top_negatives",
    "update",
    "update_",
]
