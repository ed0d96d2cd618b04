"""Kernels behind the streaming passes, one file each. None is required: plain torch computes the same."""

__all__: list[str] = []
