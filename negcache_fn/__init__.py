"""Negative cache for training retrieval models: pure functions on an explicit state."""

from negcache_fn._cache.fill import prefill, reset, resize
from negcache_fn._cache.offload import memory_mapped, offload_features
from negcache_fn._cache.pad import pad_features
from negcache_fn._cache.reembed import reembed, reembed_
from negcache_fn._cache.select import stalest
from negcache_fn._cache.state import init_cache, occupancy
from negcache_fn._cache.take import take
from negcache_fn._cache.update import update, update_
from negcache_fn._cache.validate import validate
from negcache_fn._draws.draw import Draw
from negcache_fn._draws.merge import merge_draws, split_refresh, take_drawn
from negcache_fn._draws.sample import sample_gumbel
from negcache_fn._encoders.chunked import chunked
from negcache_fn._encoders.finite import require_finite
from negcache_fn._loss.cross_entropy import loss
from negcache_fn._loss.exact import exact_loss
from negcache_fn._monitor.ages import age_histogram
from negcache_fn._options import StepOptions
from negcache_fn._scores.definition import score
from negcache_fn._scores.exclude import FalseNegatives, Labels
from negcache_fn._scores.hardest import top_negatives
from negcache_fn._step import StepOutput, step, step_
from negcache_fn.dataset_rows import hard_negatives, training_rows
from negcache_fn.frequency import init_frequency, log_frequency, observe

__version__ = "0.1.0"

__all__ = [
    "Draw",
    "FalseNegatives",
    "Labels",
    "StepOptions",
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
    "require_finite",
    "reset",
    "resize",
    "sample_gumbel",
    "score",
    "split_refresh",
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
