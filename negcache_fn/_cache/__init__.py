"""The cache: the definition of a state, and every function that writes to it."""

__all__: list[str] = []
