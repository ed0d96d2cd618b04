"""Monitoring: metrics of a step, and ages of what is cached."""

__all__: list[str] = []
