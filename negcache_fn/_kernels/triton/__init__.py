"""The Triton kernel for CUDA, in `block_logsumexp.py`, and `call.py` to call it."""

__all__: list[str] = []
