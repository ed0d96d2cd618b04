"""What negatives do to retrieval: every method on the same data, with the same code but for the loss."""
