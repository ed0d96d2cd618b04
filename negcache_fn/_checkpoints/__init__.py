"""Files that outlive a run: complete and of this run, or rejected."""

__all__: list[str] = []
