"""Checkpoints of a run on any number of ranks."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from negcache_fn._checkpoints.folder import made_plain, saves_in
from negcache_fn._checkpoints.tensors import read_tensors, write_tensors
from negcache_fn._checkpoints.whole import examine, remove, write_whole
from negcache_fn._checks import check_size
from negcache_fn._ranks.group import ranks_of
from negcache_fn._ranks.outcomes import check_equal, everywhere

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(
    folder: str | Path,
    step: int,
    state_dict: dict[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    keep: int = 2,
    identity: Mapping[str, Any] | None = None,
) -> Path:
    """Saves the state of all ranks, so that a run killed at any moment keeps its last complete checkpoint.

    A checkpoint is a folder with a manifest of the sizes and checksums of its files. It appears once all of its files
    are on the disk, and never replaces another checkpoint: saving the same or a lower step again makes another one. The
    newest checkpoint is the one that was saved last.

    Args:
        folder: folder of this run's checkpoints, which all ranks share.
        step: number of the step.
        state_dict: as `torch.distributed.checkpoint` saves: models, optimisers, `checkpointable(...)`, numbers. Values
            that are not sharded must be the same on every rank. The features of a cache are training data: so is the
            file.
        group: the ranks; None: this process alone.
        keep: how many of the newest checkpoints to keep.
        identity: numbers and strings that identify the run, such as its data and options: `load_checkpoint` compares
            them.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: a `step` below 0, a `keep` below 1; arguments that differ between the ranks.
        TypeError: a value of `state_dict` that could not be loaded: neither tensor nor plain value.
        OSError: on every rank, if one of them cannot write. The older checkpoints are unchanged.
    """
    task = "the checkpoint was not saved"
    ranks = ranks_of(group)

    def checked() -> dict[str, Any]:
        check_size("step", step, least=0)
        check_size("keep", keep)
        return {"step": int(step), "keep": int(keep), "identity": made_plain("identity", identity)}

    facts = everywhere(group, task, checked)
    check_equal(group, task, facts)
    about = {"step": int(step), "identity": facts["identity"]}
    path = write_whole(
        Path(folder), step, lambda partial: write_tensors(partial, state_dict, group, task), about, group, task
    )
    if ranks.rank == 0:
        for old in saves_in(Path(folder))[:-keep]:
            remove(old.path)
    return path


def load_checkpoint(
    folder: str | Path,
    state_dict: dict[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    identity: Mapping[str, Any] | None = None,
) -> int | None:
    """Loads the newest complete checkpoint into `state_dict`, in place, on any number of ranks.

    Everything is read and checked before anything is written: files against their checksums; entries, shapes and dtypes
    against those of `state_dict`. Until then, this rank's part is kept in CPU memory. If the newest checkpoint is
    damaged, the previous one is loaded, with a warning. No code in the files is run.

    Args:
        folder: as in `save_checkpoint`.
        state_dict: the same entries of this run: tensors are filled, other values replaced. It may leave out whole
            entries of the outermost dict. A floating tensor may have another floating dtype, if no number becomes
            infinite.
        group: the ranks; None: this process alone.
        identity: the identity of this run; None accepts a checkpoint of any run.

    Returns:
        The number of its step; None if there is no checkpoint, and nothing is loaded.

    Raises:
        ValueError: on every rank, with `state_dict` unchanged: a checkpoint with another identity, or with other
            entries than `state_dict`; no complete checkpoint; files that not all ranks see.
        OSError: on every rank, if one of them cannot read.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> path = save_checkpoint(folder, 7, {"weights": torch.ones(2)}, identity={"data": "a"})
        >>> state_dict = {"weights": torch.zeros(2)}
        >>> load_checkpoint(folder, state_dict, identity={"data": "a"}), state_dict["weights"]
        (7, tensor([1., 1.]))
        >>> load_checkpoint(folder, state_dict, identity={"data": "b"})
        Traceback (most recent call last):
        ...
        ValueError: identity differs from the checkpoint of step 7: data is 'b', and 'a' there; expected ...
    """
    task = "the checkpoint was not loaded"
    ranks_of(group)
    wanted = everywhere(group, task, lambda: made_plain("identity", identity))
    saves = everywhere(group, task, lambda: saves_in(Path(folder)))
    check_equal(group, task, {"identity": wanted, "what a rank finds in folder": [save.path.name for save in saves]})
    broken: list[str] = []
    for save in reversed(saves):
        manifest, told = examine(save, group, task)
        if not told:
            _check_identity(wanted, manifest["about"]["identity"], save.step)
            read_tensors(save.path, manifest["files"], state_dict, group, task)
            if broken:
                warnings.warn(
                    f"step {save.step} was loaded, as newer checkpoints in {folder} are damaged: {'; '.join(broken)}",
                    stacklevel=2,
                )
            return save.step
        broken.append(f"{save.path.name}: {', '.join(told)}")
    if broken:
        raise ValueError(f"no checkpoint in {folder} is whole: {'; '.join(broken)}")
    return None


def _check_identity(given: Any, saved: Any, step: int) -> None:
    if given is None or given == saved:
        return
    saved = saved or {}
    told = [
        f"{name} is {given.get(name)!r}, and {saved.get(name)!r} there"
        for name in dict.fromkeys([*given, *saved])
        if given.get(name) != saved.get(name)
    ]
    raise ValueError(
        f"identity differs from the checkpoint of step {step}: {'; '.join(told)}; expected that of the run that "
        f"saved it, or a folder of its own for each run"
    )
