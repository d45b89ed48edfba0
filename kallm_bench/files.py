"""Writing so that nothing is ever left half-written: everything is made beside its place and renamed into it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
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
    errno.ENOTEMPTY: "something else stands there",
    errno.ENOENT: "part of the path does not exist",
    errno.EISDIR: "it is a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EBUSY: "it is in use",
    errno.ELOOP: "its links lead in a circle",
    errno.EIO: "the disk failed",
}
"""What the system may answer to a write, in words. Any other answer is unexpected and keeps its traceback."""


PARTIAL, OLD = ".partial", ".old"
"""Endings of what is being written, and of what is being replaced."""


class DiskError(KallmError):
    """The disk would not take a file; what stood there before is unharmed."""


@contextmanager
def explained(path: Path, only_full: bool = False) -> Iterator[None]:
    """Turns the system's refusals to write at `path`, or only those of a full disk, into one line. Others pass."""
    try:
        yield
    except KallmError:
        raise
    except Exception as error:  # safetensors and tokenizers raise types of their own; what is no refusal passes on
        number = _error_number(error)
        if number not in (FULL if only_full else REFUSED):
            raise
        raise DiskError(f"cannot write {path}: {REFUSED[number]}") from error


def _error_number(error: Exception) -> int:
    """The system's number for a failure; safetensors and tokenizers tell it in words, in an exception of their own."""
    if isinstance(error, OSError):
        return error.errno or 0
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else 0


def cache_folder() -> Path:
    """Where what can be made again is kept, dequantised models and tokenised data: KALLM_CACHE, else ~/.cache/kallm."""
    return Path(os.environ.get("KALLM_CACHE") or "~/.cache/kallm").expanduser()


def check_writable(folder: Path) -> None:
    """Writes a few bytes into `folder`, which is made where it is missing, and removes them. DiskError if refused."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())


def check_room(path: Path, needed_bytes: int) -> None:
    """Asks whether the disk of `path`'s folder has so much free. DiskError if not."""
    free = shutil.disk_usage(path.parent).free
    if free < needed_bytes:
        raise DiskError(
            f"cannot write {path}: it needs {needed_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free"
        )


def write_file(path: Path, content: bytes, new: bool = False) -> None:
    """Writes a file whole or not at all: beside its place, synced, renamed. An older file of that name is replaced.

    What is no regular file, such as /dev/stdout, is written to as it is.

    Args:
        new: refuse where a file of that name stands, be it since a moment ago.

    Raises:
        DiskError: the disk is full, the folder cannot be written, ...
        FileExistsError: `new`, and it is not.
    """
    with explained(path):
        if path.exists() and not path.is_file():
            with path.open("wb") as stream:
                stream.write(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            taken = new and not _given_name(temporary, path)
            if not new:
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        with _opened(path.parent, os.O_RDONLY) as folder:
            os.fsync(folder)  # the name, too, is on the disk
    if taken:
        raise FileExistsError(path)


def _given_name(temporary: Path, path: Path) -> bool:
    """Gives a finished file its name; False, and it is removed, where another has that name."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    except OSError:  # a disk without hard links
        if path.exists():
            return False
        temporary.replace(path)
        return True
    finally:
        temporary.unlink(missing_ok=True)
    return True


LEFT_SECONDS = 3600
"""Nobody writes one file for so long: what is older was left by a process that was killed."""


def sweep_partial(folder: Path) -> None:
    """Removes beginnings of files that killed processes left in `folder`."""
    for left in folder.glob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError):  # another process sweeps too
            if left.is_file() and time.time() - left.stat().st_mtime > LEFT_SECONDS:
                left.unlink()


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
    path = path.resolve()
    if path.exists() and not (replace and path.is_dir()):
        raise DiskError(f"{path} exists already")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        check_room(path, needed_bytes)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL))
    try:
        with _opened(temporary, os.O_RDONLY) as descriptor:
            _lock(descriptor)  # so that nobody sweeps it away
            with explained(path, only_full=True):
                yield temporary
            with explained(path):
                _settle(temporary, path, replace)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sweep(path: Path) -> None:
    """Clears up after a process that was killed while it made or replaced `path`: what nobody holds any more goes."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if left.suffix not in (PARTIAL, OLD) or not left.is_dir():
            continue
        with _opened(left, os.O_RDONLY) as descriptor:
            if not _lock(descriptor):
                continue
            if left.suffix == OLD and not path.exists():
                left.rename(path)  # killed between taking the old folder away and putting the new one there
            else:
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def only_one(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Lets one process at a time into the block, by a lock on the file `path`; a killed one leaves no lock behind.

    Args:
        path: made where it is missing, removed afterwards.
        wait: called again and again while another process is inside; should take its time.

    Raises:
        DiskError: the file cannot be made.
    """
    while True:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with _opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
            if _lock(descriptor) and _is_file(path, descriptor):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        wait()


def _is_file(path: Path, descriptor: int) -> bool:
    """Whether `path` still names the open file: its last holder may have removed it just now."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Takes the lock of an open file or folder, which ends with it; False where another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _settle(temporary: Path, path: Path, replace: bool) -> None:
    """Makes a finished folder readable to all and safe on the disk, then gives it its name."""
    temporary.chmod(0o755)
    for each in temporary.rglob("*"):
        if each.is_file():
            if each.stat().st_nlink == 1:  # a linked one belongs to another folder as well
                each.chmod(0o644)
            with each.open("rb") as file:
                os.fsync(file.fileno())
    if not (replace and path.exists()):
        temporary.rename(path)  # refused by the system where somebody else has put a folder there meanwhile
        return
    old = temporary.with_suffix(OLD)
    path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old)


LARGE = 2**24
"""Bytes from which on it pays to remember a file's sha256 across processes."""

SETTLED_NS = 2 * 10**9
"""How long a file must have been left alone to be remembered: a later change is sure to give it another time."""


def sha256(path: Path) -> str:
    """The file's sha256 in hex; read once as long as its size and time of change stay the same.

    Of a large file it is remembered in the cache folder, by inode, size and time of change, as git's index does: so it
    holds for its hard links too, and for later processes.
    """
    status = path.stat()
    if status.st_size < LARGE:
        return _sha256(path.absolute(), status.st_size, status.st_mtime_ns)
    key = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    if key in _REMEMBERED:
        return _REMEMBERED[key]
    notes = cache_folder() / "sha256"
    with contextlib.suppress(OSError, ValueError):
        lines = [line.split() for line in notes.read_text(encoding="ascii").splitlines()]
        _REMEMBERED.update({line[0]: line[1] for line in lines if len(line) == 2 and len(line[1]) == 64})
    if key not in _REMEMBERED:
        _REMEMBERED[key] = _sha256(path.absolute(), status.st_size, status.st_mtime_ns)
        if time.time_ns() - status.st_mtime_ns > SETTLED_NS:
            with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
                notes.parent.mkdir(parents=True, exist_ok=True)
                with notes.open("a", encoding="ascii") as file:
                    file.write(f"{key} {_REMEMBERED[key]}\n")
    return _REMEMBERED[key]


_REMEMBERED: dict[str, str] = {}


@functools.cache
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
