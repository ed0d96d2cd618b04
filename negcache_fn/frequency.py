"""How often a document is in a batch: streaming estimates in hash tables of a fixed size, for log-Q correction.

A frequency is an immutable TensorDict, as the cache is. H tables of K buckets, each table with a hash function of its
own; a bucket keeps the mean number of steps between two batches that hold one of its documents:

| key         | shape  | dtype   | meaning and invariant                                                            |
| ----------- | ------ | ------- | -------------------------------------------------------------------------------- |
| `interval`  | [H, K] | float32 | mean number of steps from one batch to the next; at least 1 where `sightings` is |
| `seen_at`   | [H, K] | int64   | step of the last of these batches; 0: none                                       |
| `sightings` | [H, K] | int64   | number of these batches                                                          |
| `step`      | []     | int64   | number of batches observed                                                       |

One call of `observe` is one batch: a document that is in it several times is in it. The estimate is one over the
largest interval of a document's buckets, because documents that share a bucket make its interval shorter.

The n-th interval enters the mean with weight `max(rate, 1 / n)`, the first counted from step 0. So the mean is a plain
one until there are `1 / rate` intervals, then an exponential one, and no initial value is ever part of it: where
batches are independent, the first interval is distributed like the others, and the mean is unbiased from it on.

Source: Yi et al., *Sampling-bias-corrected neural modeling for large corpus item recommendations*, RecSys 2019,
section 4; the weights of the first intervals are not theirs.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from negcache_fn._cache.ids import named
from negcache_fn._cache.state import lock, scalar
from negcache_fn._checks import check_rows, check_size, check_slots, device_named
from negcache_fn._ranks.agree import check_ranks_agree, checking_arguments
from negcache_fn._ranks.group import ranks_of
from negcache_fn.random import philox

__all__ = ["init_frequency", "log_frequency", "observe"]

_KEYS = {"interval", "seen_at", "sightings", "step"}
_WORD = 0xFFFFFFFF
_KEY = (0x6E656763, 0x61636865)  # of the hash functions: any constants, the same everywhere


def init_frequency(buckets: int, *, hashes: int = 4, device: torch.device | str | None = None) -> TensorDictBase:
    """A frequency that has observed nothing.

    It takes 20 bytes for each bucket of each table, for any number of documents. With 4 hashes and as many buckets as
    documents, 16 % of the documents share all their buckets with others; with four times as many buckets, 0.2 %.

    Args:
        buckets: K, of each table.
        hashes: H, the number of tables.
        device: device of the tables.

    Returns:
        The frequency, a locked TensorDict (see the module's schema).

    Raises:
        ValueError, TypeError: sizes that are not positive integers.

    Examples:
        >>> init_frequency(1000)["interval"].shape
        torch.Size([4, 1000])

    Reference: Yi et al., RecSys 2019, algorithm 3.
    """
    check_size("buckets", buckets)
    check_size("hashes", hashes)
    device = None if device is None else device_named("device", device)
    none = torch.zeros(hashes, buckets, dtype=torch.int64, device=device)
    tables = {"interval": torch.zeros_like(none, dtype=torch.float32), "seen_at": none, "sightings": none.clone()}
    step = torch.zeros((), dtype=torch.int64, device=device)
    return lock(TensorDict({**tables, "step": step}, batch_size=[]))


def observe(
    frequency: TensorDictBase,
    ids: Tensor,
    *,
    rate: float = 0.05,
    mask: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> TensorDictBase:
    """The frequency after one more batch.

    For the bucket `b` of every distinct id, in every table: `interval[b] += max(rate, 1 / n) * (t - seen_at[b] -
    interval[b])`, where this is its n-th batch, at step t; then `seen_at[b] = t`.

    Args:
        frequency: H tables of K buckets.
        ids: [N] int64 ids of the documents of the batch, N >= 1. Anonymous ones, -1, are not observed.
        rate: weight of a new interval in the mean, in (0, 1]. The mean is as noisy as one of the last `2 / rate - 1`
            intervals: a smaller rate has less noise and follows a change of the stream more slowly.
        mask: [N] bool, False for documents that are not observed.
        group: ranks whose ids, in the same number, make one batch; each has the same frequency before and after.

    Returns:
        The new frequency, its `step` one further, even if the batch has no ids. The given one is unchanged.

    Raises:
        ValueError, TypeError: a `rate` outside (0, 1]; invalid shapes, dtypes or devices.

    Examples:
        >>> frequency = init_frequency(1000)
        >>> for ids in ([7, 8], [7, 9], [7, 7], [7, 8]):
        ...     frequency = observe(frequency, torch.tensor(ids))
        >>> log_frequency(frequency, torch.tensor([7, 8])).exp()
        tensor([1.0000, 0.5000])

    Reference: Yi et al., RecSys 2019, algorithm 3 and equation 6.
    """
    ranks = ranks_of(group)
    with checking_arguments(ranks):
        _check_frequency(frequency)
        _check_ids(frequency, ids)
        _check_rate(rate)
        if mask is not None:
            check_rows("mask", mask, torch.bool, ids.shape[0], ids.device)
    ids = ids if mask is None else torch.where(mask, ids, -1)
    hashes, buckets = _table(frequency, "interval").shape
    column, _ = check_ranks_agree(
        ranks,
        ids[:, None],
        0,
        function="observe",
        name="ids",
        seed_and_step=(torch.zeros_like(ids[0]), scalar(frequency, "step")),
        numbers={"documents": ids.shape[0], "buckets": buckets, "hashes": hashes},
        choices={"rate": rate},
    )
    ids = ranks.gather(column.squeeze(1))
    # Rows that are not observed repeat one that is; if there is none, all write back what they read.
    observed = named(ids)
    some = observed.any()
    places = _places(torch.where(observed, ids, ids.gather(0, observed.int().argmax(0, keepdim=True))), hashes, buckets)
    step = scalar(frequency, "step") + 1
    names = ("interval", "seen_at", "sightings")
    interval, seen_at, sightings = before = [_table(frequency, name).gather(1, places) for name in names]
    weight = torch.clamp(1.0 / (sightings + 1).to(interval.dtype), min=rate)
    longer = (step - seen_at).to(interval.dtype) - interval
    after = (interval + weight * longer, step.expand_as(seen_at), sightings + 1)
    tables = {
        name: _table(frequency, name).scatter(1, places, torch.where(some, new, old))
        for name, new, old in zip(names, after, before, strict=True)
    }
    new_frequency = TensorDict({**tables, "step": step}, batch_size=[])
    return lock(new_frequency) if frequency.is_locked else new_frequency


def log_frequency(frequency: TensorDictBase, ids: Tensor) -> Tensor:
    """Log of the estimated probability that a document is in a batch.

    `-log(max(interval[h, bucket_h(id)] for every hash h))`, at most 0. An id whose buckets are unused counts as if its
    first batch were the next one: `-log(step + 1)`. Minus this is the log-weight of log-Q correction:
    `log_weights=-log_frequency(frequency, ids)`, which is larger for rarer documents.

    Args:
        frequency: the result of `observe`, which has also seen the batch of these ids.
        ids: [N] int64, N >= 1.

    Returns:
        [N] float32; 0, so no correction, for anonymous ids.

    Raises:
        ValueError, TypeError: ids that are not [N] int64 on the device of the frequency.

    Examples:
        >>> frequency = observe(init_frequency(1000), torch.tensor([7, 8]))
        >>> frequency = observe(frequency, torch.tensor([7, 9]))
        >>> log_frequency(frequency, torch.tensor([7, 9, 1, -1])).exp()
        tensor([1.0000, 0.5000, 0.3333, 1.0000])

    Reference: Yi et al., RecSys 2019, algorithm 3, line 7.
    """
    _check_frequency(frequency)
    _check_ids(frequency, ids)
    hashes, buckets = _table(frequency, "interval").shape
    places = _places(ids, hashes, buckets)
    interval, sightings = (_table(frequency, name).gather(1, places) for name in ("interval", "sightings"))
    longest = torch.where(sightings > 0, interval, scalar(frequency, "step") + 1).amax(0)
    return torch.where(named(ids), -longest.log(), 0.0)


def _places(ids: Tensor, hashes: int, buckets: int) -> Tensor:
    """[H, N] the bucket of each id in each table: a word of Philox, of which a call gives four."""
    call = torch.arange((hashes + 3) // 4, device=ids.device)[:, None]
    zero = torch.zeros_like(call)
    words = philox((ids & _WORD, (ids >> 32) & _WORD, call, zero), (zero + _KEY[0], zero + _KEY[1]))
    return torch.stack(words, 1).flatten(0, 1)[:hashes] % buckets


def _table(frequency: TensorDictBase, name: str) -> Tensor:
    """The table `name`, [H, K]."""
    return cast(Tensor, frequency[name])


def _check_frequency(frequency: Any) -> None:
    if not isinstance(frequency, TensorDictBase):
        raise TypeError(
            f"frequency is a {type(frequency).__name__}; expected a TensorDict made by negcache_fn.init_frequency(...)"
        )
    keys = set(cast("Iterable[str]", frequency.keys()))
    if keys != _KEYS:
        raise ValueError(f"frequency has keys {sorted(keys)}; expected {sorted(_KEYS)}, as made by init_frequency(...)")


def _check_ids(frequency: TensorDictBase, ids: Any) -> None:
    check_slots("ids", ids, _table(frequency, "interval").device)
    if ids.ndim != 1 or ids.shape[0] < 1:
        raise ValueError(f"ids has shape {tuple(ids.shape)}; expected [N], at least one id")


def _check_rate(rate: Any) -> None:
    if isinstance(rate, bool) or not isinstance(rate, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"rate is a {type(rate).__name__}; expected a number")
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}; expected a number in (0, 1]")
