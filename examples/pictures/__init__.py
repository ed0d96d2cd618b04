"""The pictures of the documentation: each is drawn from a run of the library, by ``python -m examples.pictures``."""
