"""Training a model of sentence-transformers with the cache and without, on what is on every machine."""
