"""Files that outlive a run: whole, of this run, or refused."""

__all__: list[str] = []
