"""The cache as a loss of sentence-transformers, and a callback that saves it with the trainer's checkpoints."""

from negcache_fn.integrations.sentence_transformers.callback import NegativeCacheCallback
from negcache_fn.integrations.sentence_transformers.filters import FalseNegativeFilter
from negcache_fn.integrations.sentence_transformers.loss import NegativeCacheLoss

__all__ = ["FalseNegativeFilter", "NegativeCacheCallback", "NegativeCacheLoss"]
