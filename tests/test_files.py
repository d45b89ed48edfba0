"""What happens to files and folders when the disk is full, a process is killed, or two want the same."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kallm_bench import files
from kallm_bench.files import DiskError, check_writable, explained, new_folder, only_one, write_file


def test_what_rust_libraries_say_of_a_full_disk_is_understood(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="no space left on the disk"), explained(tmp_path, only_full=True):
        raise Exception("I/O error: No space left on device (os error 28)")
    with pytest.raises(ZeroDivisionError), explained(tmp_path):
        raise ZeroDivisionError


def test_a_tokenizer_that_finds_the_disk_full_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "new") as temporary:
            (temporary / "half").write_text("x")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskError, match="no space left"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_replaced_unasked_even_if_it_came_meanwhile(tmp_path: Path) -> None:
    def race() -> None:
        with new_folder(tmp_path / "new") as temporary:
            (temporary / "ours").write_text("ours")
            (tmp_path / "new").mkdir()
            (tmp_path / "new" / "theirs").write_text("theirs")

    with pytest.raises(DiskError, match="something else stands there"):
        race()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "theirs"]


def test_replacing_a_link_to_a_folder_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link", replace=True) as temporary:
        (temporary / "file").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"


def test_what_a_killed_process_left_is_cleared_up(tmp_path: Path) -> None:
    (tmp_path / ".new.abc.partial").mkdir()
    (tmp_path / ".new.abc.partial" / "half").write_text("x")
    with new_folder(tmp_path / "new") as temporary:
        assert [path for path in tmp_path.iterdir() if path != temporary] == []
        with new_folder(tmp_path / "new", replace=True):  # one at work is left alone
            assert temporary.is_dir()


def test_a_folder_whose_replacement_was_killed_between_two_renames_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".new.abc.old").mkdir()
    (tmp_path / ".new.abc.old" / "file").write_text("old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "new", replace=True):
        raise RuntimeError
    assert (tmp_path / "new" / "file").read_text() == "old"


def test_only_one_process_is_inside_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    lock = tmp_path / "sub" / "a.lock"
    script = (
        "import sys, time; from pathlib import Path; from kallm_bench.files import only_one\n"
        "with only_one(Path(sys.argv[1]), lambda: None): print('in', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"in\n"
    waited = []

    def wait() -> None:
        waited.append(1)
        other.kill()
        other.communicate()

    with only_one(lock, wait):
        assert waited == [1]
    assert not lock.exists()


@pytest.mark.parametrize(
    ("write", "name"),
    [(lambda path: write_file(path, b"x"), "file/below"), (check_writable, "file/below"), (check_writable, "n" * 300)],
)
def test_a_place_that_cannot_be_is_refused_in_words(tmp_path: Path, write: Callable[[Path], None], name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DiskError, match=r"cannot write .*: (something else|part of the path is a file|the name is too)"
    ):
        write(tmp_path / name)


def test_what_is_no_regular_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_file(pipe, b"text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert pipe.is_fifo()
    with pytest.raises(DiskError, match="it is a folder"):
        write_file(tmp_path, b"x")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """How often files were read to be hashed; with every file large enough to be remembered, and an empty cache."""
    reads = []

    def count(path: Path, size: int, changed_ns: int) -> str:
        reads.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setenv("KALLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "LARGE", 1)
    monkeypatch.setattr(files, "_REMEMBERED", {})
    monkeypatch.setattr(files, "_sha256", count)
    return reads


def old_file(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return hashlib.sha256(content).hexdigest()


def test_the_sha256_of_a_large_file_is_remembered_across_processes(
    hashed: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = old_file(tmp_path / "weights", b"abc")
    os.link(tmp_path / "weights", tmp_path / "link")
    assert files.sha256(tmp_path / "weights") == expected
    monkeypatch.setattr(files, "_REMEMBERED", {})  # as in a new process
    assert files.sha256(tmp_path / "weights") == files.sha256(tmp_path / "link") == expected
    assert len(hashed) == 1


def test_a_file_that_has_changed_is_hashed_anew(
    hashed: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old_file(tmp_path / "weights", b"abc")
    files.sha256(tmp_path / "weights")
    for content in (b"abd", b"abcd"):
        (tmp_path / "weights").write_bytes(content)
        monkeypatch.setattr(files, "_REMEMBERED", {})
        assert files.sha256(tmp_path / "weights") == hashlib.sha256(content).hexdigest()


def test_a_file_just_written_is_not_remembered(hashed: list[Path], tmp_path: Path) -> None:
    """Another change could come within the same tick of the disk's clock."""
    (tmp_path / "weights").write_bytes(b"abc")
    files.sha256(tmp_path / "weights")
    assert not (tmp_path / "cache" / "sha256").exists()


@pytest.mark.parametrize("note", [b"\xff\xfe", b"one two three\n", b"{key} abc\n", b"{key}"])
def test_damaged_notes_of_sha256_cost_time_alone(hashed: list[Path], note: bytes, tmp_path: Path) -> None:
    expected = old_file(tmp_path / "weights", b"abc")
    status = (tmp_path / "weights").stat()
    key = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "sha256").write_bytes(note.replace(b"{key}", key.encode()))
    assert files.sha256(tmp_path / "weights") == expected


def test_a_linked_file_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"abc")
    (tmp_path / "source").chmod(0o600)
    with new_folder(tmp_path / "folder") as temporary:
        os.link(tmp_path / "source", temporary / "link")
        (temporary / "own").write_bytes(b"abc")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "folder").iterdir()}
    assert modes == {"link": 0o600, "own": 0o644}
