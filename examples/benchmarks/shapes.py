"""The sizes of a problem, and which of them are measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["LARGE", "QUICK_SIZES", "SIZES", "UPDATES", "Shape", "parse_size", "sweeps"]


@dataclass(frozen=True)
class Shape:
    """Batch, slots of the cache, dimensions of an embedding, draws per query."""

    batch: int
    capacity: int
    dim: int
    samples: int = 1

    @property
    def scores(self) -> int:
        return self.batch * self.capacity

    @property
    def flops(self) -> int:
        """Of one product of the queries with the cache."""
        return 2 * self.batch * self.capacity * self.dim

    def __str__(self) -> str:
        return f"B={self.batch}, C={self.capacity}, D={self.dim}" + (f", k={self.samples}" if self.samples > 1 else "")


LARGE = Shape(256, 2**17, 128)
SIZES = (LARGE, replace(LARGE, dim=768), Shape(32, 2**14, 128))
QUICK_SIZES = (Shape(256, 2**15, 128), Shape(32, 2**14, 128))
UPDATES = replace(LARGE, capacity=2**20)


def parse_size(text: str) -> Shape:
    """`BxCxD` or `BxCxDxk`.

    Raises:
        ValueError: anything else.
    """
    numbers = [int(number) for number in text.split("x")]
    if len(numbers) not in (3, 4) or min(numbers) < 1 or numbers[0] > numbers[1]:
        raise ValueError(f"{text!r} is no size; expected BxCxD or BxCxDxk with B <= C, such as 256x131072x128")
    return Shape(*numbers)


def sweeps(*, quick: bool) -> dict[str, list[Shape]]:
    """By the name of the field that varies: shapes, ascending."""
    if quick:
        middle = QUICK_SIZES[0]
        return {"capacity": [replace(middle, capacity=2**power) for power in (12, 14, 16)]}
    return {
        "capacity": [replace(LARGE, capacity=2**power) for power in range(12, 23)],
        "batch": [replace(LARGE, batch=2**power) for power in range(4, 11)],
        "dim": [replace(LARGE, dim=dim) for dim in (64, 128, 256, 512, 768, 1024)],
        "samples": [replace(LARGE, samples=2**power) for power in range(5)],
    }
