"""Adapters to the libraries in which a cache is used, one file each; none is imported by the package itself."""

__all__: list[str] = []
