"""Scores of queries against the cache: their definition, and the passes that read them."""

__all__: list[str] = []
