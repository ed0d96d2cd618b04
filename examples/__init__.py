"""Worked examples of negcache_fn, one folder each; the modules beside the folders are what they share."""
