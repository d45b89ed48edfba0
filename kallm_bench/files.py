"""Writing so that nothing is ever left half-written: everything is made beside its place and renamed into it."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kallm_bench.errors import KallmError

FULL = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than allowed",
}
REFUSED = FULL | {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "part of the path is a file, not a folder",
    errno.EEXIST: "something else stands there",
    errno.ENOENT: "part of the path does not exist",
    errno.EISDIR: "it is a folder",
}
"""What the system may answer to a write, in words. Any other answer is unexpected and keeps its traceback."""


class DiskError(KallmError):
    """The disk would not take a file; what stood there before is unharmed."""


@contextmanager
def explained(path: Path, only_full: bool = False) -> Iterator[None]:
    """Turns the system's refusals to write at `path`, or only those of a full disk, into one line. Others pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in (FULL if only_full else REFUSED):
            raise
        raise DiskError(f"cannot write {path}: {REFUSED[error.errno]}") from error


def write_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: beside its place, synced, renamed. An older file of that name is replaced.

    Raises:
        DiskError: the disk is full, the folder cannot be written, ...
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(path: Path, *, replace: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """Yields an empty folder beside `path` that becomes `path` when the block ends well, and is removed otherwise.

    Args:
        path: where the folder shall stand.
        replace: whether an existing one may be replaced; it stays until the new one is complete.
        needed_bytes: refused at once where the disk has less free.

    Raises:
        DiskError: `path` exists and may not be replaced; too little space; or the disk refused.
    """
    path = path.absolute()
    if path.exists() and not (replace and path.is_dir()):
        raise DiskError(f"{path} exists; pass --force to replace it, or another --out")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < needed_bytes:
            raise DiskError(
                f"cannot write {path}: it needs {needed_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free"
            )
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    try:
        with explained(path, only_full=True):
            yield temporary
        with explained(path):
            _settle(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _settle(temporary: Path, path: Path) -> None:
    """Makes a finished folder readable to all and safe on the disk, then gives it its name."""
    temporary.chmod(0o755)
    for each in temporary.rglob("*"):
        if each.is_file():
            each.chmod(0o644)
            with each.open("rb") as file:
                os.fsync(file.fileno())
    if not path.exists():
        temporary.rename(path)
        return
    old = temporary.with_suffix(".old")
    path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old)


def sha256(path: Path) -> str:
    """The file's sha256 in hex; read once as long as its size and time of change stay the same."""
    status = path.stat()
    return _sha256(path.absolute(), status.st_size, status.st_mtime_ns)


@functools.cache
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
