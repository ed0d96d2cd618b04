"""Ranks: what the processes of a group send to each other."""

__all__: list[str] = []
