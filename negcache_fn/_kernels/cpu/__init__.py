"""The C++ kernels for CPUs: the sources, `build.py` to compile them and `call.py` to call them."""

__all__: list[str] = []
