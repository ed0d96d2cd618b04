"""Negative cache for training retrieval models: pure functions on an explicit state."""

from negcache_fn.caches import merge_draws, refreshes, take_drawn
from negcache_fn.chunking import chunked
from negcache_fn.export import hard_negatives, training_rows
from negcache_fn.false_negatives import FalseNegatives
from negcache_fn.features import pad_features
from negcache_fn.filling import prefill, reset, resize
from negcache_fn.frequency import init_frequency, log_frequency, observe
from negcache_fn.freshness import reembed, reembed_
from negcache_fn.guards import require_finite, validate
from negcache_fn.mining import top_negatives
from negcache_fn.monitoring import age_histogram
from negcache_fn.objective import exact_loss, loss
from negcache_fn.sampling import Draw, sample_gumbel
from negcache_fn.scoring import score
from negcache_fn.state import init_cache, occupancy, stalest, take
from negcache_fn.storage import memory_mapped, offload_features
from negcache_fn.training import StepOutput, step, step_
from negcache_fn.updating import update, update_

__version__ = "0.1.0"

__all__ = [
    "Draw",
    "FalseNegatives",
    "StepOutput",
    "age_histogram",
    "chunked",
    "exact_loss",
    "hard_negatives",
    "init_cache",
    "init_frequency",
    "log_frequency",
    "loss",
    "memory_mapped",
    "merge_draws",
    "observe",
    "occupancy",
    "offload_features",
    "pad_features",
    "prefill",
    "reembed",
    "reembed_",
    "refreshes",
    "require_finite",
    "reset",
    "resize",
    "sample_gumbel",
    "score",
    "stalest",
    "step",
    "step_",
    "take",
    "take_drawn",
    "top_negatives",
    "training_rows",
    "update",
    "update_",
    "validate",
]
