"""Features on another device, or in files: the same cache.

There is no second device in most places where tests run. So devices are shown on fake tensors, with "meta" as the name
of the accelerator (fake "cuda" tensors cannot be indexed without CUDA): shapes and devices only, every operator must
have its operands on one device, copies alone may cross. Values are compared on the CPU.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensordict import TensorDictBase
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import negcache_fn
from negcache_fn._cache.offload import memory_mapped, offload_features
from tests.support.builders import assert_same_state, same_snapshot, snapshot, unit
from tests.support.checks.steps import Tower, documents, warm
from tests.support.options import step_keywords

COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
STATM = Path("/proc/self/statm")


class OneDevice(TorchDispatchMode):
    """Raises where an operator that is no copy gets tensors of several devices; 0-d CPU tensors are numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        devices = {value.device for value in tensors if value.ndim > 0 or value.device.type != "cpu"}
        assert len(devices) < 2 or func in COPIES, f"{func} on {devices}"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake tensors on "cpu" and "meta"; there is no autocast for the latter."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def batch_on(device: str, rows: int = 3) -> dict[str, Any]:
    """Fake documents for `Tower`."""
    return {
        "words": torch.zeros(rows, 4, dtype=torch.int64, device=device),
        "extra": {"price": torch.zeros(rows, device=device)},
    }


def offloaded() -> TensorDictBase:
    """Made small on the accelerator, offloaded, then grown."""
    small = negcache_fn.init_cache(1, 6, batch_on("meta"))
    return negcache_fn.resize(offload_features(small), 40)


def encode(features: Any) -> torch.Tensor:
    """Of features on the accelerator only."""
    assert {features["words"].device.type, features["extra"]["price"].device.type} == {"meta"}
    return features["words"].float() @ torch.ones(4, 6, device="meta", requires_grad=True)


def stepped(function: Callable[..., Any], state: TensorDictBase, device: str) -> TensorDictBase:
    """A step that split_refresh, with ids, and backward."""
    queries, ids = torch.zeros(3, 6, device="meta", requires_grad=True), torch.arange(3, device="meta")
    out = function(
        state, queries, batch_on(device), encode, **step_keywords(draws_per_query=2, refresh_stalest=3, ids=ids)
    )
    out.loss.backward()
    assert {value.device.type for value in out.metrics.values()} == {"meta"}
    return out.state


def limited(state: TensorDictBase, device: str) -> TensorDictBase:
    """A step that encodes the batch before it draws."""
    limit = negcache_fn.FalseNegatives(max_score=lambda positives: positives)
    queries = torch.zeros(3, 6, device="meta", requires_grad=True)
    return negcache_fn.step(state, queries, batch_on(device), encode, false_negatives=limit).state


def updated(function: Callable[..., Any], state: TensorDictBase, device: str) -> TensorDictBase:
    """An update that split_refresh."""
    fresh = torch.zeros(3, 6, device="meta")
    return function(state, batch_on(device), fresh, refresh=(torch.arange(3, device="meta"), fresh))


CALLS: dict[str, Callable[[TensorDictBase, str], TensorDictBase]] = {
    "step": lambda state, device: stepped(negcache_fn.step, state, device),
    "step_": lambda state, device: stepped(negcache_fn.step_, state, device),
    "step, batch first": limited,
    "update": lambda state, device: updated(negcache_fn.update, state, device),
    "update_": lambda state, device: updated(negcache_fn.update_, state, device),
    "prefill": lambda state, device: negcache_fn.prefill(state, [batch_on(device)], encode),
    "resize": lambda state, _: negcache_fn.resize(state, 7),
    "reset": lambda state, _: negcache_fn.reset(state),
    "back": lambda state, device: offload_features(offload_features(state, device=device)),
}


def assert_offloaded(state: TensorDictBase) -> None:
    """Features on the CPU and all else on the accelerator."""
    for key, leaf in state.items(True, True):
        assert leaf.device.type == ("cpu" if "features" in key else "meta"), key


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CALLS)
def test_every_function_takes_offloaded_features(name: str, device: str) -> None:
    state = offloaded()
    assert_offloaded(state)
    with OneDevice():
        assert_offloaded(CALLS[name](state, device))


@pytest.mark.usefixtures("two_devices")
def test_taken_rows_are_where_the_encoder_is() -> None:
    slots = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    with OneDevice():
        taken = negcache_fn.take(offloaded(), slots)
    assert (taken["words"].device.type, taken["words"].shape) == ("meta", (2, 3, 4))


@pytest.mark.usefixtures("two_devices")
def test_the_watcher_sees_mixed_devices() -> None:
    """Fake tensors alone let a CPU tensor be indexed from elsewhere, which raises on a device."""
    leaf, slots = torch.zeros(4, 2), torch.zeros(3, dtype=torch.int64, device="meta")
    assert leaf[slots].shape == (3, 2)
    with OneDevice(), pytest.raises(AssertionError, match=r"aten\.index"):
        leaf[slots]


@pytest.mark.no_cover
@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("name", ["take", "update_"])
def test_two_devices_compile_whole(name: str) -> None:
    """One frame over three calls. (`step_` cannot be traced on "meta", whose `new_tensor` is not fake.)"""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, state = torch.compile(getattr(negcache_fn, name), fullgraph=True, backend=counter), offloaded()
    for _ in range(3):
        if name == "take":
            assert compiled(state, torch.zeros(3, dtype=torch.int64, device="meta"))["words"].device.type == "meta"
        else:
            state = compiled(state, batch_on("cpu"), torch.zeros(3, 6, device="meta"))
            assert_offloaded(state)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("two_devices")
def test_a_third_device_is_an_error() -> None:
    state, embeddings = offloaded(), torch.zeros(3, 6, device="meta")
    with pytest.raises(ValueError, match=r"features.* is on cuda:0; expected meta, or cpu, as its features"):
        negcache_fn.update(state, batch_on("cuda"), embeddings)
    with pytest.raises(ValueError, match="embeddings is on cpu; expected meta"):
        negcache_fn.update(state, batch_on("cpu"), embeddings.to("cpu"))
    whole = negcache_fn.init_cache(4, 6, batch_on("meta"))
    with pytest.raises(ValueError, match="is on cpu; expected meta, the device of the cache"):
        negcache_fn.update(whole, batch_on("cpu"), embeddings)


def test_offloading_is_pure_and_keeps_the_value() -> None:
    state = warm(Tower(), 9, ids=True)
    before = snapshot(state)
    moved = offload_features(state)
    assert_same_state(moved, state)
    assert moved.is_locked
    negcache_fn.step_(moved, unit(3, 6, 0), documents(5, 1), Tower())
    assert same_snapshot(before, snapshot(state))


def trained(state: TensorDictBase, steps: range) -> TensorDictBase:
    """Steps in place: drawn, refreshed, replaced by id, evicted."""
    tower = Tower()
    for n in steps:
        options: dict[str, Any] = {"ids": torch.arange(4) + 3 * n, "draws_per_query": 2, "refresh_stalest": 1}
        state = negcache_fn.step_(
            state, unit(3, 6, n), documents(4, n), tower, scale=8.0, **step_keywords(**options)
        ).state
        state = negcache_fn.update_(state, documents(2, 50 + n), unit(2, 6, 50 + n))
    return state


@pytest.mark.parametrize("grown", [False, True])
def test_mapped_features_give_the_same_bits(grown: bool, tmp_path: Path) -> None:
    start = warm(Tower(), 9, ids=True)
    before = snapshot(start)
    mapped = memory_mapped(start, tmp_path, capacity=20 if grown else None)
    expected = trained(negcache_fn.resize(start, 20) if grown else start.clone().lock_(), range(12))
    places = [leaf.data_ptr() for leaf in mapped["items", "features"].values(True, True)]
    assert mapped.is_locked
    after = trained(mapped, range(12))
    assert after is mapped
    assert_same_state(after, expected)
    assert places == [leaf.data_ptr() for leaf in after["items", "features"].values(True, True)]
    assert same_snapshot(before, snapshot(start))
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["0-features-extra-price.bin", "1-features-words.bin"]
    words = torch.from_file(str(files[1]), size=(20 if grown else 9) * 4, dtype=torch.int64)
    assert torch.equal(words.view(-1, 4), expected["items", "features", "words"])


DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float16, torch.float64]


@given(
    capacity=st.integers(1, 9),
    rows=st.integers(0, 9),
    more=st.integers(0, 9),
    width=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    copied_bytes=st.sampled_from([1, 20, 2**26]),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_live_rows_are_copied_into_files_of_their_size(
    capacity: int, rows: int, more: int, width: int, dtype: torch.dtype, copied_bytes: int, tmp_path: Path
) -> None:
    features = torch.arange(capacity * (width + 1)).view(capacity, -1).to(dtype)
    state = negcache_fn.init_cache(capacity, 2, features)
    if 0 < rows <= capacity:
        state = negcache_fn.update(state, features[:rows], unit(rows, 2, 0), ids=torch.arange(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("negcache_fn._cache.offload._COPY_BYTES", copied_bytes)
        mapped = memory_mapped(state, tmp_path, capacity=capacity + more)
    assert_same_state(mapped, negcache_fn.resize(state, capacity + more))
    assert (tmp_path / "0-features.bin").stat().st_size == (capacity + more) * (width + 1) * dtype.itemsize


def test_mapping_again_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    """Into the same folder, too: the second gets files of its own."""
    first = memory_mapped(warm(Tower(), 9), tmp_path)
    before = snapshot(first)
    second = memory_mapped(first, tmp_path)
    assert_same_state(first, second)
    trained(second, range(3))
    assert same_snapshot(before, snapshot(first))


def test_a_pure_update_leaves_the_files_alone(tmp_path: Path) -> None:
    mapped = memory_mapped(warm(Tower(), 9), tmp_path)
    before = [file.read_bytes() for file in sorted(tmp_path.iterdir())]
    negcache_fn.update(mapped, documents(4, 1), unit(4, 6, 1))
    assert before == [file.read_bytes() for file in sorted(tmp_path.iterdir())]
    negcache_fn.update_(mapped, documents(4, 1), unit(4, 6, 1))
    assert before != [file.read_bytes() for file in sorted(tmp_path.iterdir())]


def test_a_run_that_was_killed_goes_on_from_a_whole_checkpoint(tmp_path: Path) -> None:
    """Bit for bit, although the files had run ahead of it; into the folder that the killed run left."""
    start = warm(Tower(), 9, ids=True)
    uncut = trained(start.clone().lock_(), range(10))
    killed = trained(memory_mapped(start, tmp_path / "features"), range(5))
    torch.save(killed, tmp_path / "checkpoint.pt")
    trained(killed, range(5, 8))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True, mmap=True)
    assert not torch.equal(saved["items", "features", "words"], killed["items", "features", "words"])
    del killed
    resumed = trained(memory_mapped(saved, tmp_path / "features"), range(5, 10))
    assert_same_state(resumed, uncut)


def resident_bytes() -> int:
    """Of this process, pages of files included."""
    return int(STATM.read_text().split()[1]) * 4096


@pytest.mark.skipif(not STATM.exists(), reason="tells memory by /proc")
def test_memory_holds_what_was_used(tmp_path: Path) -> None:
    """1 GiB of features: less than a tenth of it in memory or on the disk after three steps."""
    example, tower = torch.zeros(1, 2048, dtype=torch.int64), Tower()
    state = negcache_fn.init_cache(1, 6, example)
    before = resident_bytes()
    state = memory_mapped(state, tmp_path, capacity=2**16)
    for n in range(3):
        batch = torch.full((4, 2048), n)
        state = negcache_fn.step_(state, unit(4, 6, n), batch, lambda words: tower(words[:, :4])).state
    assert resident_bytes() - before < 2**30 / 10
    file = (tmp_path / "0-features.bin").stat()
    assert file.st_size == 2**30
    assert file.st_blocks * 512 < 2**30 / 10
    read = state["items", "features"][: 2**13].sum()  # an eighth of it
    assert resident_bytes() - before > 2**30 / 10, "resident bytes do not tell what is in memory"
    assert int(read) == 4 * 2048 * (0 + 1 + 2)


@pytest.mark.parametrize("wrong", [8, 0, 9.5, True])
def test_mapping_names_what_is_wrong(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match="capacity is"):
        memory_mapped(warm(Tower(), 9), tmp_path, capacity=wrong)
    with pytest.raises(TypeError, match="state is a dict"):
        memory_mapped({}, tmp_path)  # pyright: ignore[reportArgumentType] - wrong on purpose
    with pytest.raises(TypeError, match="state is a dict"):
        offload_features({})  # pyright: ignore[reportArgumentType] - wrong on purpose


def test_a_disk_without_room_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match=r"100 free bytes; expected 324, the size of the features"):
        memory_mapped(warm(Tower(), 9), tmp_path)
    assert not any(tmp_path.iterdir())
