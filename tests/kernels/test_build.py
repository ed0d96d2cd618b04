"""Building the CPU kernels: which inputs name a build, and machines that cannot build."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from negcache_fn._kernels import dispatch
from negcache_fn._kernels.cpu import build
from negcache_fn._kernels.cpu import call as cpu
from tests.kernels.test_cpu import library_with, needs_kernels, problem


def test_without_a_compiler_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given_problem = dispatch.Problem(*problem(1, 3, 2, torch.float32, 0, 0), None)
    build.library.cache_clear()
    monkeypatch.setenv("NEGCACHE_FN_NATIVE", "0")
    try:
        assert build.library() is None
        assert not cpu.supports(given_problem)
        with pytest.raises(RuntimeError, match="ask `supports` first"):
            cpu.block_logsumexp(given_problem)
        build.library.cache_clear()
        monkeypatch.setenv("NEGCACHE_FN_NATIVE", "1")
        monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert build.library() is None
    finally:
        monkeypatch.undo()
        build.library.cache_clear()


def test_every_source_and_flag_names_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A build of other sources or flags is never taken for this one."""
    sources = build._sources()
    assert {source.suffix for source in sources} == {".cpp", ".h"}
    for source in sources:
        shutil.copy(source, tmp_path)
    before = build._fingerprint("g++")
    monkeypatch.setattr(build, "_FOLDER", tmp_path)
    assert build._fingerprint("g++") == before
    for source in build._sources():
        text = source.read_text()
        source.write_text(text + "//\n")
        assert build._fingerprint("g++") != before, source.name
        source.write_text(text)
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
    assert build._fingerprint("g++") != before


@needs_kernels
@pytest.mark.parametrize("flag", ["-UNEGCACHE_BLOCK", "-DNEGCACHE_BLOCK=63"])
def test_the_size_of_a_block_is_checked_at_build_time(flag: str) -> None:
    assert library_with(flag) is None
