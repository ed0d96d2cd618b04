"""The cache: what a state is, and every function that writes to it."""

__all__: list[str] = []
