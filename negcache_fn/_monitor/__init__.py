"""Monitoring: metrics of a step, and ages of the cached embeddings."""

__all__: list[str] = []
