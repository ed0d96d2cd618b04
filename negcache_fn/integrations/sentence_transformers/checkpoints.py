"""The caches of a trainer's checkpoint, restored only if complete and made with its weights and the same settings.

A save has a file for each rank. Its manifest holds the settings of each cache, the number of ranks, and a checksum of
the model's weights. `negcache_fn._checkpoints` makes it complete or absent.
"""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from tensordict import TensorDictBase
from torch import nn

from negcache_fn._cache.fill import resize
from negcache_fn._cache.state import check_state, lock, stored
from negcache_fn._checkpoints.folder import Save, saves_in
from negcache_fn._checkpoints.whole import examine, remove, write_whole
from negcache_fn._ranks.group import SHARD_MULTIPLE, ranks_of
from negcache_fn._ranks.outcomes import everywhere, of_all_ranks
from negcache_fn.distributed import shard
from negcache_fn.integrations.sentence_transformers.loss import NegativeCacheLoss, all_ranks

__all__ = ["restore_caches", "save_caches"]

Losses = Mapping[str, NegativeCacheLoss]

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


def save_caches(folder: Path, run: Path, step: int, losses: Losses, model: nn.Module | None) -> None:
    """Saves the caches of all ranks, and removes those of checkpoints that are no longer there.

    Args:
        folder: folder of the saves.
        run: folder of the checkpoints, `checkpoint-<step>`.
        step: step of the checkpoint.
        losses: the losses by name.
        model: the model whose weights the checkpoint has; None if they are not known here.
    """
    group, task = all_ranks(), "the caches were not saved"
    ranks = ranks_of(group)
    about = {
        "ranks": ranks.size,
        "weights": None if model is None else _fingerprint(model),
        "losses": {name: _settings(loss) for name, loss in losses.items()},
    }

    def write(partial: Path) -> list[str]:
        saved = {name: {"state": loss.state, "scaling": loss.scaling.state_dict()} for name, loss in losses.items()}
        name = _file(ranks.rank, ranks.size)
        everywhere(group, task, lambda: torch.save(saved, partial / name))
        return [name]

    path = write_whole(folder, step, write, about, group, task)
    if ranks.rank == 0:
        for save in saves_in(folder):
            if save.path != path and (save.step == step or not (run / f"checkpoint-{save.step}").exists()):
                remove(save.path)


def restore_caches(
    folders: Sequence[Path],
    checkpoint: Path,
    step: int,
    losses: Losses,
    model: nn.Module | None,
    device: torch.device,
) -> None:
    """Gives the losses the caches of a checkpoint; warns of each that has none there.

    Args:
        folders: where its save may be.
        checkpoint: its folder, for messages.
        step: of the checkpoint.
        losses: by name.
        model: with the weights of the checkpoint; None: not known here.
        device: of the caches.

    Raises:
        ValueError: on every rank, and no cache is changed: a cache that was made with other settings.
    """
    group, task = all_ranks(), "the caches were not restored"
    saves = of_all_ranks(group, task, lambda: [save for folder in folders for save in _of_step(folder, step)])[0]
    weights = of_all_ranks(group, task, lambda: None if model is None else _fingerprint(model))[0]
    told = [f"nothing is saved of it in {folders[0]}"]
    for save in saves:
        manifest, damaged = examine(save, group, task)
        if damaged:
            told.append(f"{save.path}: {', '.join(damaged)}")
        elif None not in (weights, manifest["about"]["weights"]) and manifest["about"]["weights"] != weights:
            told.append(f"{save.path} is of a model with other weights")
        else:
            _take(save, manifest["about"], losses, device, task)
            return
    _warn(f"the run goes on at step {step} with an empty cache: of {checkpoint}, {'; '.join(told[len(told) > 1 :])}")


def _take(save: Save, about: dict[str, Any], losses: Losses, device: torch.device, task: str) -> None:
    names = _names(list(losses), list(about["losses"]))
    for name, of_save in names.items():
        _check_settings(name, _settings(losses[name]), about["losses"][of_save], save.path)
    ranks = ranks_of(group := all_ranks())

    def read() -> dict[str, dict[str, Any]]:
        own = min(ranks.rank, about["ranks"] - 1)
        parts = {own: _load(save, own, about["ranks"])}
        found: dict[str, dict[str, Any]] = {}
        for name, of_save in names.items():
            loss, part = losses[name], parts[own][of_save]
            if loss.gather_across_devices and about["ranks"] != ranks.size:
                for rank in range(about["ranks"]):
                    parts.setdefault(rank, _load(save, rank, about["ranks"]))
                whole = _joined([parts[rank][of_save]["state"] for rank in range(about["ranks"])])
                part = {**part, "state": None if whole is None else _spread(whole, loss)}
            elif ranks.rank >= about["ranks"]:
                part = {**part, "state": None}
            if part["state"] is not None:
                _check_features(name, part["state"], loss.state, save.path)
            found[name] = part
        return found

    for name, part in everywhere(group, task, read).items():
        if part["state"] is not None:
            losses[name].state = lock(part["state"].to(device))
        losses[name].scaling.load_state_dict(part["scaling"])
    separate = [name for name in names if not losses[name].gather_across_devices]
    if separate and about["ranks"] != ranks.size:
        _warn(
            f"{save.path} has caches of {about['ranks']} ranks for {ranks.size}: further ranks begin with an empty "
            f"one, those of further caches are left out"
        )


def _names(given: list[str], saved: list[str]) -> dict[str, str]:
    """For each loss that has a saved cache, its name there: the same, or both are the only ones."""
    if len(given) == len(saved) == 1:
        return {given[0]: saved[0]}
    if new := [name for name in given if name not in saved]:
        _warn(f"the checkpoint has caches of {saved}; those of {new} begin empty")
    if left := [name for name in saved if name not in given]:
        _warn(f"the checkpoint's caches of {left} are left out, as the losses are {given}")
    return {name: name for name in given if name in saved}


def _settings(loss: NegativeCacheLoss) -> dict[str, Any]:
    """The settings and the contents of a cache."""
    return {
        "cache_size": loss.cache_size,
        "embedding_dtype": str(loss.embedding_dtype),
        "seed": loss.seed,
        "similarity_fct": loss.similarity_fct.__name__,
        "document_ids": loss.document_ids,
        "gather_across_devices": loss.gather_across_devices,
        "learnable_scale": loss.scaling.logarithm is not None,
    }


def _check_settings(name: str, given: dict[str, Any], saved: dict[str, Any], path: Path) -> None:
    told = [
        f"{key} is {value!r}, and {saved.get(key)!r} there" for key, value in given.items() if saved.get(key) != value
    ]
    if told:
        raise ValueError(
            f"the loss{f' {name!r}' if name else ''} differs from the checkpoint: {'; '.join(told)}; expected "
            f"the same, or that {path} is removed, to go on with an empty cache"
        )


def _check_features(name: str, saved: TensorDictBase, current: TensorDictBase | None, path: Path) -> None:
    """Raises unless a saved cache has the features of the present one, if there is one."""
    check_state(saved)
    if current is None:
        return
    kinds = [
        {key: (leaf.shape[1:], leaf.dtype) for key, leaf in state["items"].items(True, True)}
        for state in (saved, current)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"the cache of the loss {name!r} holds {kinds[1]}, and {kinds[0]} in the checkpoint; expected the same, or "
            f"that {path} is removed, to go on without"
        )


def _fingerprint(model: nn.Module) -> int:
    """A checksum of all weights that does not depend on the device: sums of integers are exact."""
    checksum = 0
    for parameter in model.parameters():
        bits = parameter.detach().contiguous().view(-1).view(_BITS.get(parameter.element_size(), torch.uint8))
        checksum = zlib.crc32(f"{tuple(parameter.shape)} {int(bits.sum(dtype=torch.int64))}".encode(), checksum)
    return checksum


def _spread(whole: TensorDictBase, loss: NegativeCacheLoss) -> TensorDictBase:
    """A whole cache as the loss has it on this number of ranks."""
    group, capacity = loss.group, loss.cache_size
    if group is not None:
        multiple = SHARD_MULTIPLE * group.size()
        capacity = -(-capacity // multiple) * multiple
    if stored(whole, "id").shape[0] != capacity:
        whole = resize(whole, capacity)
    return whole if group is None else shard(whole, group)


def _joined(parts: list[TensorDictBase | None]) -> TensorDictBase | None:
    """A whole cache from its parts."""
    present = [part for part in parts if part is not None]
    if len(present) < len(parts):
        return None
    whole = present[0].clone()
    whole["items"] = torch.cat([part["items"] for part in present])
    return lock(whole)


def _of_step(folder: Path, step: int) -> list[Save]:
    """Newest first."""
    return [save for save in reversed(saves_in(folder)) if save.step == step]


def _file(rank: int, size: int) -> str:
    return f"{rank}-of-{size}.pt"


def _load(save: Save, rank: int, size: int) -> dict[str, Any]:
    return torch.load(save.path / _file(rank, size), map_location="cpu", weights_only=True)


def _warn(text: str) -> None:
    if ranks_of(all_ranks()).rank == 0:
        warn(text, stacklevel=2)
