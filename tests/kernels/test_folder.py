"""Where builds lie: nobody else's code is loaded, nothing damaged either, and every user finds a folder."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

import pytest
import torch

from negcache_fn._kernels.cpu import build
from negcache_fn._kernels.cpu.folder import Folder
from tests.kernels.pretend import Machine, copied, load, without
from tests.kernels.test_cpu import needs_kernels

pytestmark = needs_kernels


def give_away(machine: Machine, *paths: Path) -> None:
    """Makes another user the owner of these files, as far as anyone can see."""
    taken, fstat = {path.stat().st_ino for path in paths}, os.fstat

    def seen(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        return os.stat_result((*status[:4], os.geteuid() + 1, *status[5:10])) if status.st_ino in taken else status

    machine.patch.setattr(os, "fstat", seen)


def change_folder(machine: Machine, how: str) -> None:
    if how == "of another user":
        give_away(machine, machine.cache)
    elif how == "a link":
        machine.cache.rename(machine.root / "elsewhere")
        machine.cache.symlink_to(machine.root / "elsewhere")
    elif how == "noexec":
        machine.patch.setattr(os, "fstatvfs", lambda _: os.statvfs_result((0,) * 8 + (os.ST_NOEXEC, 255)))
    else:
        machine.cache.chmod(int(how, 8))


@pytest.mark.parametrize("how", ["of another user", "a link", "770", "702"])
def test_a_folder_that_others_can_write_is_not_used(machine: Machine, how: str) -> None:
    """A build that waits there is not loaded, and none is put there; the user's own folder is used instead."""
    assert load() is not None
    assert machine.compilations() == 1
    change_folder(machine, how)
    before = machine.builds(machine.cache)
    assert load() is not None
    assert machine.compilations() == 2
    assert machine.builds(machine.cache) == before
    assert machine.builds(machine.root / "home" / ".cache" / "negcache_fn")


def test_a_folder_without_execution_is_not_used(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.cache.mkdir(parents=True)
    change_folder(machine, "noexec")
    assert load() is None
    assert machine.compilations() == 0
    assert "noexec" in caplog.text


@pytest.mark.parametrize("how", ["of another user", "a link", "720", "702"])
def test_a_file_that_others_can_write_is_built_anew(machine: Machine, how: str) -> None:
    assert load() is not None
    (path,) = machine.builds(machine.cache)
    if how == "of another user":
        give_away(machine, path)
    elif how == "a link":
        path.rename(machine.root / "elsewhere")
        path.symlink_to(machine.root / "elsewhere")
    else:
        path.chmod(int(how, 8))
    assert load() is not None
    assert machine.compilations() == 2
    machine.patch.undo()
    status = path.lstat()
    assert stat.S_ISREG(status.st_mode)
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (os.geteuid(), 0o700)


def test_the_folder_that_was_checked_is_the_one_that_is_read(machine: Machine) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc here")
    right = copied(machine.cache, "cpu-x", b"right")
    with Folder(machine.cache) as folder:
        machine.cache.rename(machine.root / "elsewhere")
        wrong = copied(machine.cache, "cpu-x", b"wrong")
        found = folder.find("cpu-x")
        assert found is not None
        assert found.read_bytes() == b"right"
    assert right != wrong


@pytest.mark.parametrize("damage", ["truncated", "empty", "one byte", "another library"])
def test_a_damaged_file_is_built_anew(machine: Machine, damage: str) -> None:
    assert load() is not None
    (path,) = machine.builds(machine.cache)
    whole = path.read_bytes()
    damaged = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "one byte": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
        "another library": Path(torch._C.__file__).read_bytes(),
    }
    path.unlink()  # it is mapped by this process, which would not survive the change
    path.write_bytes(damaged[damage])
    path.chmod(0o700)
    assert load() is not None
    assert machine.compilations() == 2
    assert path.read_bytes() == whole
    assert load() is not None
    assert machine.compilations() == 2


def test_a_build_is_on_the_disk_before_it_has_its_name(machine: Machine) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace
    machine.patch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor))[1])
    machine.patch.setattr(Path, "replace", lambda self, to: (events.append("replace"), replace(self, to))[1])
    assert load() is not None
    assert events == ["fsync", "replace"]


def test_a_compiler_that_stops_half_way_leaves_no_build(machine: Machine) -> None:
    machine.set_compiler('while [ "$1" != -o ]; do shift; done\necho half > "$2"\nexit 1')
    assert load() is None
    assert machine.compilations() == 1
    assert [path.suffix for path in machine.cache.iterdir()] == [".lock"]


def test_a_user_without_a_home_builds_once(machine: Machine) -> None:
    """HOME is not set and the system knows no such user, as in a container with a number for a user."""

    def unknown(_: int) -> pwd.struct_passwd:
        raise KeyError

    machine.patch.delenv("HOME")
    machine.patch.delenv("XDG_CACHE_HOME")
    machine.patch.setattr(pwd, "getpwuid", unknown)
    for _ in range(2):
        assert load() is not None
    assert machine.compilations() == 1
    (folder,) = machine.temporary.iterdir()
    assert folder.name == f"negcache_fn-{os.geteuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(machine.builds(folder)) == 1


@pytest.mark.parametrize("cache_home", ["", "relative", "nowhere/cache"])
def test_a_home_that_cannot_be_written_costs_one_build(machine: Machine, cache_home: str) -> None:
    without(machine.root / "nowhere")
    machine.patch.setenv("HOME", str(machine.root / "nowhere"))
    machine.patch.setenv("XDG_CACHE_HOME", str(machine.root / cache_home) if "/" in cache_home else cache_home)
    for _ in range(2):
        assert load() is not None
    assert machine.compilations() == 1
    assert [path.name for path in machine.temporary.iterdir()] == [f"negcache_fn-{os.geteuid()}"]
    assert not Path("relative").exists()


def test_a_read_only_folder_is_read(machine: Machine) -> None:
    """A home on a read-only disk: a build in it is loaded, a new one is put elsewhere."""
    assert load() is not None
    is_writable = Folder.is_writable
    machine.patch.setattr(Folder, "is_writable", lambda self: self.path != machine.cache and is_writable(self))
    assert load() is not None
    assert machine.compilations() == 1
    (path,) = machine.builds(machine.cache)
    path.unlink()
    assert load() is not None
    assert machine.compilations() == 2
    assert machine.builds(machine.cache) == []


def test_without_any_folder_one_warning_says_what_to_set(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    nowhere = without(machine.root / "nowhere")
    machine.patch.setenv("HOME", nowhere)
    machine.patch.setenv("XDG_CACHE_HOME", nowhere)
    machine.temporary.chmod(0o700)
    folder = machine.temporary / f"negcache_fn-{os.geteuid()}"
    folder.mkdir()
    folder.chmod(0o777)  # another user was there first
    assert build.library() is None
    assert build.library() is None
    (record,) = caplog.records
    assert f"{folder}: other users may write to it (mode 777)" in record.getMessage()
    assert "set XDG_CACHE_HOME to a folder of yours" in record.getMessage()
    assert machine.compilations() == 0
