"""Encoders: how they are called, and wrappers around them."""

__all__: list[str] = []
