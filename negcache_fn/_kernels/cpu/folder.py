"""Folders for builds, owned by this user, so that no other user's code is ever loaded.

A build is found only if this user owns the folder and the file, nobody else may write to either, and the file still
has the checksum that its name ends in. Writing a build is one rename, so nobody finds half of one.
"""

import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

__all__ = ["Folder", "candidates"]


def candidates() -> Iterator[Path]:
    """Where builds may lie, best first: the user's cache, or else a folder of the user's among temporary files."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if cache_home.is_absolute():
        yield cache_home / "negcache_fn"
    try:
        home = Path.home()
    except RuntimeError:  # HOME is not set, and the system does not know this user
        home = Path()
    if home.is_absolute():
        yield home / ".cache" / "negcache_fn"
    yield Path(tempfile.gettempdir()) / f"negcache_fn-{os.geteuid()}"


class Folder:
    """A private folder, created if missing. OSError if it cannot be created or is not safe to load code from."""

    def __init__(self, path: Path) -> None:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _check_private(os.fstat(self._descriptor))
            if os.fstatvfs(self._descriptor).f_flag & getattr(os, "ST_NOEXEC", 0):
                raise PermissionError("it is on a file system that code cannot be loaded from (noexec)")
        except OSError:
            os.close(self._descriptor)
            raise
        # The folder that was checked, even if another has taken its name since.
        checked = Path(f"/proc/self/fd/{self._descriptor}")
        self.inside = checked if checked.is_dir() else path

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._descriptor)

    def is_writable(self) -> bool:
        """Whether a build can be stored here."""
        return os.access(self.inside, os.W_OK | os.X_OK)

    def find(self, name: str) -> Path | None:
        """The build of this name; None if there is none, or if it has changed since it was stored."""
        return next((path for path in sorted(self.inside.glob(f"{name}-*.so")) if _is_as_stored(path)), None)

    def store(self, built: Path, name: str) -> Path:
        """Moves a file here, as the build of this name."""
        with built.open("rb") as file:
            checksum = _checksum(file.read())
            os.fchmod(file.fileno(), 0o700)
            os.fsync(file.fileno())  # else a crash could leave the name without the content
        return built.replace(self.inside / f"{name}-{checksum}.so")

    @contextmanager
    def locked(self, name: str, deadline: float) -> Generator[None]:
        """Keeps other processes from building this name. TimeoutError if one still does at the deadline."""
        import fcntl  # not on Windows, where nothing is built

        with (self.inside / f"{name}.lock").open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise TimeoutError("another process was still building them when the time was up") from None
                    time.sleep(0.05)
                except OSError:  # a file system without locks: every process builds for itself
                    break
            yield


def _check_private(status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise PermissionError(f"it belongs to user {status.st_uid}, not to this user, {os.geteuid()}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"other users may write to it (mode {stat.S_IMODE(status.st_mode):o})")


def _is_as_stored(path: Path) -> bool:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            _check_private(os.fstat(file.fileno()))
            return path.stem.endswith(f"-{_checksum(file.read())}")
    except OSError:
        return False


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
