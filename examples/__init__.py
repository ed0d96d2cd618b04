"""Worked examples of negcache_fn, one folder each."""
