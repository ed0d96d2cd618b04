"""Draws: the cached documents that are encoded again, with their scores and noise."""

__all__: list[str] = []
