"""Draws: which cached documents are encoded again, and what is known of them."""

__all__: list[str] = []
