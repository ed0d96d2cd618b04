"""A checkpoint is whole, of this run and of this state, or refused; what it is loaded into is then as it was."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

import negcache_fn
from negcache_fn import distributed
from tests.support.builders import same_snapshot, snapshot

EXAMPLE = {"tokens": torch.zeros(1, 3, dtype=torch.int64), "weight": torch.zeros(1)}


def cache(filled: float = 0.0, *, capacity: int = 1024, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    state = negcache_fn.init_cache(capacity, 4, EXAMPLE, embedding_dtype=dtype, seed=seed)
    if filled:
        features = {"tokens": torch.full((8, 3), int(filled) % 100), "weight": torch.ones(8)}
        state = negcache_fn.update(state, features, torch.full((8, 4), filled), ids=torch.arange(8))
    return state


def save(folder: Path, step: int, state: Any, **options: Any) -> Path:
    return distributed.save_checkpoint(folder, step, {"cache": distributed.checkpointable(state)}, **options)


def load(folder: Path, state: Any, **options: Any) -> int | None:
    return distributed.load_checkpoint(folder, {"cache": distributed.checkpointable(state)}, **options)


def test_the_newest_is_the_one_that_was_saved_last(tmp_path: Path) -> None:
    """Not the one of the highest step, which may be of another run; and none replaces what was just saved."""
    for step, filled in ((90, 1.0), (100, 2.0)):
        save(tmp_path, step, cache(filled))
    path = save(tmp_path, 10, cache(3.0))
    assert path.exists()
    state = cache()
    assert load(tmp_path, state) == 10
    assert bool((state == cache(3.0)).all())
    again = save(tmp_path, 10, cache(4.0))
    assert again != path
    assert load(tmp_path, state) == 10
    assert bool((state == cache(4.0)).all())
    assert {found.name for found in tmp_path.iterdir()} == {path.name, again.name}


def test_another_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    save(tmp_path, 5, cache(1.0, capacity=2048), identity={"data": "a", "sizes": (1, 2)})
    state = cache()
    before = snapshot(state)
    with pytest.raises(ValueError, match=r"identity .* step 5: data is 'b', and 'a' there; more is 1, and None there"):
        load(tmp_path, state, identity={"data": "b", "sizes": [1, 2], "more": 1})
    with pytest.raises(TypeError, match=r"identity is .*; expected numbers, strings, lists and dicts"):
        load(tmp_path, state, identity={"data": torch.zeros(1)})
    assert same_snapshot(snapshot(state), before)
    other = cache(capacity=2048)
    assert load(tmp_path, other, identity={"data": "a", "sizes": [1, 2]}) == 5
    assert load(tmp_path, other) == 5
    with pytest.raises(TypeError, match="identity is"):
        save(tmp_path, 6, other, identity={"data": torch.zeros(1)})
    with pytest.raises(ValueError, match="step is -1"):
        save(tmp_path, -1, other)


def other_capacity() -> Any:
    return {"cache": distributed.checkpointable(cache(capacity=2048))}


def further_feature() -> Any:
    example = {**EXAMPLE, "mask": torch.zeros(1, 3, dtype=torch.bool)}
    return {"cache": distributed.checkpointable(negcache_fn.init_cache(1024, 4, example))}


def fewer_features() -> Any:
    example = {"tokens": EXAMPLE["tokens"]}
    return {"cache": distributed.checkpointable(negcache_fn.init_cache(1024, 4, example))}


def other_feature_dtype() -> Any:
    example = {**EXAMPLE, "tokens": EXAMPLE["tokens"].int()}
    return {"cache": distributed.checkpointable(negcache_fn.init_cache(1024, 4, example))}


def untrained_optimizer() -> Any:
    return {"optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict()}


MISFITS = {
    other_capacity: r"cache.items.embedding has shape \(1, 1024, 4\) there, and \(2, 1024, 4\) here",
    further_feature: "it has no cache.items.features.mask",
    fewer_features: "it has cache.items.features.weight too",
    other_feature_dtype: "cache.items.features.tokens has dtype torch.int64 there, and torch.int32 here",
    untrained_optimizer: "it has optimizer.state.0.step too",
    lambda: {"nothing": 1}: "it has no nothing",
    lambda: {"number": torch.zeros(())}: "number is not a tensor there",
    lambda: {"weights": 3}: "weights is a tensor there, and here a int",
    lambda: {"weights": torch.zeros(2, device="meta")}: r"state_dict\['weights'\] is on the meta device",
}


@pytest.mark.parametrize("make", MISFITS)
def test_what_is_not_of_this_state_is_refused(make: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    saved = {"cache": distributed.checkpointable(cache(1.0)), "optimizer": optimizer.state_dict()}
    distributed.save_checkpoint(tmp_path, 1, {**saved, "number": 3, "weights": torch.ones(2)})
    given = {"other": torch.zeros(2), **make()}
    before = pickle.dumps(given) if "meta" not in MISFITS[make] else b""
    with pytest.raises(ValueError, match=MISFITS[make]):
        distributed.load_checkpoint(tmp_path, {**given, "weights": given.get("weights", torch.zeros(2))})
    assert not before or pickle.dumps(given) == before


def test_numbers_do_not_become_infinite(tmp_path: Path) -> None:
    """1e6 is infinite in float16; what fits is converted."""
    save(tmp_path, 1, cache(1e6))
    state = cache(dtype=torch.float16)
    before = snapshot(state)
    with pytest.raises(ValueError, match=r"cache.items.embedding has numbers .* that are infinite as torch.float16"):
        load(tmp_path, state)
    assert same_snapshot(snapshot(state), before)
    save(tmp_path, 2, cache(1000.0))
    assert load(tmp_path, state) == 2
    assert state["items", "embedding"][:8].tolist() == [[1000.0] * 4] * 8
    assert state["items", "id"][:8].tolist() == list(range(8))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit, anywhere."""
    content = bytearray(path.read_bytes())
    place = int(torch.randint(8 * len(content), ()))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "manifest.json"])
@pytest.mark.parametrize("damage", [cut, flip, os.remove, lambda path: path.write_bytes(b"")])
def test_a_damaged_one_falls_back(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    torch.manual_seed(1)
    for step in (1, 2):
        save(tmp_path, step, cache(float(step)))
    damage(tmp_path / "step-2-save-2" / name)
    state = cache()
    with pytest.warns(UserWarning, match=r"step 1 was loaded, .* damaged: step-2-save-2: .*"):
        assert load(tmp_path, state) == 1
    assert bool((state == cache(1.0)).all())
    damage(tmp_path / "step-1-save-1" / name)
    before = snapshot(state)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: step-2-save-2: .*; step-1-save-1: "):
        load(tmp_path, state)
    assert same_snapshot(snapshot(state), before)


def test_every_bit_counts(tmp_path: Path) -> None:
    """A flip in any file is found: 300 random ones."""
    torch.manual_seed(0)
    save(tmp_path, 1, cache(1.0))
    path, whole = tmp_path / "step-1-save-1", tmp_path / "whole"
    shutil.copytree(path, whole)
    names = sorted(file.name for file in path.iterdir())
    for number in range(300):
        file = path / names[number % len(names)]
        flip(file)
        with pytest.raises(ValueError, match="is whole"):
            load(tmp_path, cache())
        shutil.copy(whole / file.name, file)
    assert load(tmp_path, cache()) == 1


class Malicious:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def forge(path: Path) -> None:
    """Makes the manifest agree with the files, as who wrote them can."""
    from negcache_fn._checkpoints import folder

    manifest = folder.read_manifest(path)
    (path / "manifest.json").unlink()
    partial = path.rename(path.with_name(path.name + ".partial"))
    folder.finish(partial, manifest["about"], folder.sums(partial, manifest["files"]))


def test_nothing_in_a_folder_is_run(tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    path = distributed.save_checkpoint(tmp_path / "a", 1, {"tensor": torch.ones(2)})
    (path / ".metadata").write_bytes(pickle.dumps(Malicious(evidence)))
    forge(path)
    tensor = torch.zeros(2)
    with pytest.raises(ValueError, match=r"\.metadata names posix\.mkdir, .* it was not unpickled"):
        distributed.load_checkpoint(tmp_path / "a", {"tensor": tensor})

    path = distributed.save_checkpoint(tmp_path / "b", 1, {"tensor": torch.ones(2), "value": "x" * 1000})
    with pytest.MonkeyPatch.context() as patched:  # a value that torch.load would run
        patched.setattr("torch.load", lambda *_, **__: None)
        path = distributed.save_checkpoint(tmp_path / "b", 2, {"tensor": torch.ones(2), "value": Malicious(evidence)})
    with pytest.raises(ValueError, match=r"value in .* is not a plain value; it was not unpickled"):
        distributed.load_checkpoint(tmp_path / "b", {"tensor": tensor, "value": ""})

    path = distributed.save_checkpoint(tmp_path / "c", 1, {"tensor": torch.ones(2)})
    index: Metadata = pickle.loads((path / ".metadata").read_bytes())
    next(iter(index.storage_data.values())).relative_path = "../../b/step-1-save-1/__0_0.distcp"
    (path / ".metadata").write_bytes(pickle.dumps(index))
    forge(path)
    with pytest.raises(ValueError, match=r"names the file \.\./\.\./b/.*; expected one of"):
        distributed.load_checkpoint(tmp_path / "c", {"tensor": tensor})
    assert not evidence.exists()
    assert tensor.tolist() == [0, 0]
    pickle.loads(pickle.dumps(Malicious(evidence)))
    assert evidence.exists()  # it would have


class Anything:
    """Not a plain value."""


@pytest.mark.parametrize("value", [Anything(), Anything, {"deep": [Anything()]}, lambda: None])
def test_what_could_not_be_loaded_is_not_saved(value: Any, tmp_path: Path) -> None:
    distributed.save_checkpoint(tmp_path, 1, {"value": 1})
    with pytest.raises(TypeError, match=r"state_dict has a .* as value.*; expected tensors and plain values"):
        distributed.save_checkpoint(tmp_path, 2, {"value": value})
    assert [path.name for path in tmp_path.iterdir()] == ["step-1-save-1"]


def test_values_and_keys_come_back(tmp_path: Path) -> None:
    """Momentum that is None, under numbers, beside tensors; bytes, and lists of numbers."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    parameter.sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "bytes": b"\x00\xff", "list": [1, 2.5, "x"], "module": Linear()}
    with torch.no_grad():
        state["module"].weight.fill_(3.0)
    distributed.save_checkpoint(tmp_path, 1, state)
    fresh = torch.optim.SGD([parameter], lr=0.1)
    fresh.step()
    other = {"optimizer": fresh.state_dict(), "bytes": b"", "list": [], "module": Linear()}
    assert distributed.load_checkpoint(tmp_path, other) == 1
    assert other["optimizer"] == state["optimizer"]
    assert (other["bytes"], other["list"]) == (b"\x00\xff", [1, 2.5, "x"])
    assert other["module"].weight.tolist() == [[3.0]]


class Linear(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(1, 1, bias=False)
