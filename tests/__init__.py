"""Tests of negcache_fn: one file a module, oracles in `oracles.py`, checks shared with the bite tests in `checks/`."""
