"""Kernels behind the streaming passes and scans; `dispatch.py` chooses. None is required: plain torch does the same."""

__all__: list[str] = []
