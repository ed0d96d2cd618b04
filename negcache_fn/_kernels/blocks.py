"""The sizes of the tree over the slots: the only place of both numbers. The kernels are compiled with `BLOCK`."""

__all__ = ["BLOCK", "GROUP"]

BLOCK = 64  # consecutive slots whose scores are reduced to one number
GROUP = 1024  # consecutive slots, 16 blocks: the top level of a draw; a group lies on one rank
