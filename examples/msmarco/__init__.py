"""MS MARCO passage ranking: the set-up in which the negative cache was published, as a recipe to run.

Run ``python -m examples.msmarco --help``; README.md in this folder says what it takes and what to expect.
"""
