"""What one step of the cache costs, side by side with the alternatives."""
