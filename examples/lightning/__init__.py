"""A small code search, trained by Lightning with a negative cache."""
