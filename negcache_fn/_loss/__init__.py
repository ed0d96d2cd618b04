"""The loss: batch and cache as classes of one softmax."""

__all__: list[str] = []
