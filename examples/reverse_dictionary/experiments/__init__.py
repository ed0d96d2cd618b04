"""The comparison of losses: the same pretrained encoder and trainer, equal time."""
