"""Code search: train a dual encoder to find the function that a sentence describes.

Run ``python -m examples.code_search --help``; README.md in this folder says what happens and what to expect.
"""
