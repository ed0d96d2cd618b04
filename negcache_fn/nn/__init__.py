"""A cache, a step and a scale as modules."""

from negcache_fn.nn.cache import Cache
from negcache_fn.nn.loss import NegativeCacheLoss
from negcache_fn.nn.scale import Scale

__all__ = ["Cache", "NegativeCacheLoss", "Scale"]
