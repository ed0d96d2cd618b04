"""What can be wrong with an argument, by its kind: each function makes of a valid value, or of none, an invalid one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

import negcache_fn

NAN = float("nan")
Corruption = Callable[[Any], Any]


def constant(*values: Any) -> list[Corruption]:
    return [lambda _, value=value: value for value in values]


def changed_state(change: Callable[[Any], None]) -> Corruption:
    def corrupt(state: TensorDictBase) -> TensorDictBase:
        state = state.clone()
        change(state)
        return state

    return corrupt


def of_tensor(*changes: Callable[[Tensor], Any]) -> list[Corruption]:
    """Applied to a tensor; of another value, or none, a tensor is made first."""
    return [
        lambda value, change=change: change(value.detach() if isinstance(value, Tensor) else torch.ones(7))
        for change in changes
    ]


def with_leaf(features: Any, change: Callable[[Tensor], Any]) -> Any:
    """The features with one leaf changed."""
    if isinstance(features, Tensor):
        return change(features)
    items = dict(features.items())
    key = sorted(items)[-1]
    return {**items, key: with_leaf(items[key], change)}


def of_features(change: Callable[[Tensor], Any]) -> Corruption:
    return lambda features: with_leaf(features, change)


def wider(leaf: Tensor) -> Tensor:
    return leaf[:, None].repeat(1, 2) if leaf.ndim == 1 else leaf.repeat(1, 9)


ROWS = [
    *constant([1, 2], "x", 3),
    *of_tensor(lambda x: torch.cat([x, x, x]), lambda x: x[..., None], lambda x: x[:0], lambda x: x.to("meta")),
]
EMBEDDINGS = [
    *constant(None, [[1.0]], 3),
    *of_tensor(
        lambda x: x[..., None], lambda x: torch.cat([x, x], -1), lambda x: x.to(torch.int64), lambda x: x.to("meta")
    ),
]
SIZE = constant(0, -1, 1.5, "3", True, NAN)
SCALE = [*constant("x", [1.0], True, None, 1j), *of_tensor(lambda _: torch.ones(2), lambda _: torch.tensor(2))]
IDS = [*ROWS, *of_tensor(lambda x: x.to(torch.float32), lambda x: x.to(torch.int32))]
ANY_IDS = [*IDS[:3], *IDS[4:]]  # any number of them
NUMBERS = [*ROWS, *of_tensor(lambda x: x.long())]
FLAGS = [*ROWS, *of_tensor(lambda x: x.float())]
STATE = [
    *constant(None, {}, 3, TensorDict({}, []), TensorDict({"items": torch.ones(2)}, [])),
    changed_state(lambda s: s.pop("seed")),
    changed_state(lambda s: s["items"].pop("id")),
    changed_state(lambda s: s.set("step", torch.zeros(3, dtype=torch.int64))),
    changed_state(lambda s: s["items"].set("log_weight", s["items", "log_weight"].half())),
    changed_state(lambda s: s["items"].set("embedding", s["items", "embedding"].long())),
]
ANY_ROWS = [
    *constant(3, None, "x", [[1.0]], {}),
    of_features(lambda leaf: leaf[..., None]),
    of_features(wider),
    of_features(lambda leaf: leaf.to(torch.int16)),
    of_features(lambda leaf: leaf.tolist()),
    of_features(lambda leaf: leaf[0] if leaf.ndim == 1 else leaf[0, 0]),
    lambda features: {"other": features},
]
FEATURES = [*ANY_ROWS, of_features(lambda leaf: torch.cat([leaf, leaf]))]
EXAMPLE = [*constant(3, None, "x", {}, [1.0]), *(of_features(c) for c in (Tensor.tolist, Tensor.sum, Tensor.to_sparse))]
LABELS = [
    negcache_fn.Labels(queries) for queries in (torch.ones(2), torch.ones(99).long(), torch.ones(1, 1).long(), [1])
]
KNOWN = [
    *constant(None, 3, torch.ones(2, 2, dtype=torch.int64)),
    *constant(*(negcache_fn.FalseNegatives(ids=ids) for ids in (torch.ones(2).long(), torch.ones(7, 2).long(), [1]))),
    *constant(*(negcache_fn.FalseNegatives(labels=labels) for labels in (3, torch.ones(2).long(), *LABELS))),
    *constant(*(negcache_fn.FalseNegatives(max_score=limit) for limit in ("x", torch.ones(9), torch.ones(2, 2)))),
]
ENCODE = [
    *constant(None, 3, "x"),
    *constant(lambda _: None, lambda _: 3.0, lambda _: torch.ones(2), lambda _: torch.ones(1, 77)),
]
DRAW = constant(None, 3, (1, 2), {})
CHOICE = constant("x", 3, ("mean",))

# Which kind an argument is of: by its name, or by function and name where that says more.
KINDS: dict[str, list[Corruption]] = {
    **dict.fromkeys(("state",), STATE),
    **dict.fromkeys(("queries", "documents", "negatives", "embeddings"), EMBEDDINGS),
    **dict.fromkeys(
        ("capacity", "embedding_dim", "bins", "size", "buckets", "hashes", "num_negatives", "batch_size", "n"), SIZE
    ),
    **dict.fromkeys(("num_draws", "draws_per_query", "top_k"), SIZE),
    **dict.fromkeys(("scale", "loss.scale"), SCALE),
    **dict.fromkeys(
        ("nn.Scale.scale", "nn.Scale.max_scale", "nn.NegativeCacheLoss.scale"), constant("x", 0, -1.0, NAN)
    ),
    "ids": IDS,
    **dict.fromkeys(("observe.ids", "log_frequency.ids"), ANY_IDS),
    **dict.fromkeys(("log_weights", "importance"), NUMBERS),
    **dict.fromkeys(("cacheable", "mask"), FLAGS),
    "features": FEATURES,
    "init_cache.features": EXAMPLE,
    **dict.fromkeys(("pad_features.features", "step.features", "step_.features"), ANY_ROWS),
    "encode": ENCODE,
    **dict.fromkeys(("chunked.encode", "require_finite.encode", "reembed.encode", "reembed_.encode"), ENCODE[:3]),
    "options": constant(None, {}, "x", 3),
    "false_negatives": KNOWN,
    "draw": DRAW,
    "a": DRAW,
    "b": DRAW,
    **dict.fromkeys(("reduction", "evict", "staleness_correction", "placement", "output_format"), CHOICE),
    "in_batch": constant("x", 2, None),
    "score_transform": constant(3, "x"),
    "hardness": constant("x", -1.0, NAN, None),
    **dict.fromkeys(("learnable", "learnable_scale", "share_draws", "weigh_positives"), constant("x", 1, None)),
    "refresh_stalest": constant("x", -1, 1.5, None, NAN, 10**6),
    "StepOptions.refresh_stalest": constant("x", -1, 1.5, None, NAN),
    "priorities": [*ROWS, *of_tensor(lambda x: x > 0)],
    "refresh": constant(
        3,
        torch.ones(2),
        (torch.ones(2).long(),),
        (torch.ones(2), torch.ones(2, 2)),
        (torch.ones(2, 1).long(), torch.ones(2, 2)),
        (torch.ones(3).long(), torch.ones(2, 2)),
        (None, None),
    ),
    "exclude_ids": [
        *constant([1], 3),
        *of_tensor(lambda _: torch.ones(3), lambda _: torch.ones(9, 1).long(), lambda _: torch.ones(1, 1, 1).long()),
    ],
    "seed": constant(None, 1.5, "a", 2**63, True),
    "embedding_dtype": constant(torch.int64, "float32", None, torch.float8_e4m3fn),
    "device": constant("nowhere", 3.5, [1]),
    "folder": constant(3, 1.5),
    "slots": constant(None, [1], 3, torch.tensor([1.0])),
    "states": constant(None, 3, [], [1, 2]),
    "values": constant("x", {"zz": 1}, [1]),
    "batches": constant(3, None, [3], [None]),
    "frequency": constant(None, {}, TensorDict({}, []), TensorDict({"interval": torch.ones(2, 2)}, [])),
    "rate": constant(0, 1.5, "x", True, NAN, None),
    "scores": constant(None, torch.ones(2), torch.ones(2, 6, dtype=torch.int64), torch.ones(1, 9, 1)),
    **dict.fromkeys(
        ("positives", "training_rows.negatives"),
        constant(3, torch.ones(2).long(), torch.ones(2, 2), torch.ones(99, 1).long()),
    ),
    "positive_rows": constant(3, [[0]], *(torch.ones(*shape).long() for shape in ((2,), (99, 1), (2, 1, 1)))),
    "training_rows.queries": constant(None, 3, "abcdefgh"),
    "texts": constant({}, 3),
    "range_min": constant(-1, 1.5, "x"),
    "min_score": constant("x", [1]),
    "group": constant(3, "x"),
}
