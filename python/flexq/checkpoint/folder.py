"""Writing a folder so that it is whole or not there, whoever else writes or kills (docs/reference/formats.md).

A new folder is filled beside its place, under a hidden name, and takes its place in one step at the end. Where an old
checkpoint is to be replaced, the two change places at once where the system can do that; else the old one steps aside
first and comes back if anything goes wrong.
"""

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

_ASIDE, _OLD = ".flexq-new-", ".flexq-old-"
# What a checkpoint may hold beside files.
_KNOWN_FOLDERS = {"additional_chat_templates"}


def require_free(path: str | Path, overwrite: bool = False, source: str | Path | None = None) -> None:
    """Raises an OSError where writing a folder at `path` would lose something, in one line that says what to do.

    What killed runs have left of their work on it is cleaned first.

    Args:
        path: of the folder to be.
        overwrite: a FlexQ checkpoint there may be replaced, and nothing else.
        source: the folder that is read meanwhile.
    """
    path = _place(path)
    if source is not None and Path(source).exists():
        here, there = path.resolve(), Path(source).resolve()
        if here == there or there.is_relative_to(here) or here.is_relative_to(there):
            raise FileExistsError(f"{path} is, holds or lies in the source {source}; choose another output")
    _clean_leftovers(path)
    if not os.path.lexists(path):
        return _require_writable(path.parent)
    if not path.is_dir():
        what = "a link to nothing" if path.is_symlink() else "a file"
        raise FileExistsError(f"{path} is {what}, not a folder; choose another output")
    if _is_empty(path):
        return _require_writable(path)
    if not overwrite:
        raise FileExistsError(f"{path} exists and is not empty; choose another output, or overwrite it")
    reason = _not_replaceable(path)
    if reason:
        raise FileExistsError(f"{path} is not replaced: {reason}; choose another output")


def _place(path: str | Path) -> Path:
    """Where a folder is or will be: of a link to a folder, that folder."""
    path = Path(os.path.abspath(path))
    return path.resolve() if path.is_dir() else path


def _require_writable(folder: Path) -> None:
    """OSError if nothing can be made in a folder, or in the nearest one above it that exists: before hours of work."""
    while not os.path.lexists(folder):
        folder = folder.parent
    tried = tempfile.mkdtemp(prefix=_ASIDE, dir=folder)
    with contextlib.suppress(FileNotFoundError):  # another run has taken it for a leftover
        os.rmdir(tried)


def _is_empty(path: Path) -> bool:
    """But for folders that are being written in it."""
    return all(entry.name.startswith(_ASIDE) for entry in path.iterdir())


def _not_replaceable(path: Path) -> str | None:
    """Why a folder must not be replaced; None if it is a FlexQ checkpoint and no more."""
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8")).get("quantization_config")
        method = settings.get("quant_method")
    except (OSError, ValueError, AttributeError, RecursionError):
        method = None
    if method != "flexq":
        return "it is not a FlexQ checkpoint"
    folders = sorted(p.name for p in path.iterdir() if p.is_dir() and p.name not in _KNOWN_FOLDERS)
    return f"it holds a folder of its own, {folders[0]}" if folders else None


@contextlib.contextmanager
def new_folder(path: str | Path, overwrite: bool = False, source: str | Path | None = None) -> Iterator[Path]:
    """A folder to write into, which becomes `path` at the end; if anything goes wrong before, nothing is left of it.

    An empty folder that exists keeps its place (it may be a mount point, or the current folder) and is filled, its
    config.json last. What appears at `path` meanwhile stays; the finished folder then is left beside it, and the error
    says where.

    Raises:
        OSError: as `require_free`, before any work and again at the end; or what the system says.
    """
    path = _place(path)
    require_free(path, overwrite, source)
    inside = path.is_dir() and _is_empty(path)
    with _temporary(path, _ASIDE) if inside else work_folder(path) as aside:
        yield aside
        _settle(aside)
        if inside:
            _move_in(aside, path)
        else:
            _put_or_keep(aside, path, overwrite)


def work_folder(path: str | Path) -> AbstractContextManager[Path]:
    """A hidden folder beside `path` for what is made on the way to it. It goes at the end; one whose writer was killed
    goes as `require_free` is next asked about `path`."""
    path = _place(path)
    return _temporary(path.parent, f".{path.name}{_ASIDE}")


@contextlib.contextmanager
def _temporary(parent: Path, prefix: str) -> Iterator[Path]:
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    with _locked(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Whoever finds the folder unlocked knows that its writer is gone."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _settle(folder: Path) -> None:
    """Modes as the system would have given them, and everything on disk."""
    umask = os.umask(0)
    os.umask(umask)
    for where, _, files in os.walk(folder):
        os.chmod(where, 0o777 & ~umask)  # mkdtemp makes folders private
        for name in files:
            file = os.path.join(where, name)
            os.chmod(file, 0o666 & ~umask)
            _sync(file)
        _sync(where)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


def _move_in(aside: Path, path: Path) -> None:
    """The contents of a folder into the empty one that it stands in; config.json last, without which it is no model."""
    if not _is_empty(path):
        raise FileExistsError(f"{path} was empty, and no longer is")
    moved: list[Path] = []
    try:
        for file in sorted(aside.iterdir(), key=lambda file: (file.name == "config.json", file.name)):
            file.rename(path / file.name)
            moved.append(path / file.name)
    except BaseException:
        for file in moved:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        raise
    _sync(path)


def _put_or_keep(aside: Path, path: Path, overwrite: bool) -> None:
    try:
        _put(aside, path, overwrite)
    except FileExistsError as error:
        raise FileExistsError(f"{error}; the new folder was left at {_visible(aside, path)}") from None


def _put(aside: Path, path: Path, overwrite: bool) -> None:
    require_free(path, overwrite)
    if not os.path.lexists(path):
        try:
            aside.rename(path)  # takes the place of nothing, or of an empty folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise FileExistsError(f"{path} appeared while its contents were made") from None
    elif _is_empty(path):
        aside.rename(path)
    elif not _exchange(aside, path):
        _step_aside(aside, path)
    _sync(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Two folders change names at once; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _step_aside(aside: Path, path: Path) -> None:
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}{_OLD}", dir=path.parent)) / "old"
    with _locked(old.parent):
        path.rename(old)
        try:
            aside.rename(path)
        except BaseException:
            old.rename(path)
            old.parent.rmdir()
            raise
        shutil.rmtree(old.parent, ignore_errors=True)


def _visible(aside: Path, path: Path) -> Path:
    """A finished folder that has no place, under a name that people see."""
    for number in range(1, 1000):
        other = path.with_name(f"{path.name}-{number}")
        if not os.path.lexists(other):
            aside.rename(other)
            return other
    return aside


def _clean_leftovers(path: Path) -> None:
    """What runs that were killed have left of their work on the same folder: new ones go, an old one whose place is
    empty comes back."""
    parent, name = path.parent, path.name
    if not parent.is_dir():
        return
    inside = path.glob(f"{_ASIDE}*") if path.is_dir() else ()
    for leftover in [*parent.glob(f".{glob.escape(name)}{_ASIDE}*"), *inside]:
        if leftover.is_symlink():
            leftover.unlink()  # of a version that changed places with a link
        elif _is_abandoned(leftover):
            print(f"flexq: removing {leftover}, which an interrupted run left", file=sys.stderr)
            shutil.rmtree(leftover, ignore_errors=True)
    for leftover in parent.glob(f".{glob.escape(name)}{_OLD}*"):
        if not _is_abandoned(leftover):
            continue
        if (leftover / "old").is_dir() and not os.path.lexists(path):
            print(f"flexq: {path} is restored from {leftover}, which an interrupted run left", file=sys.stderr)
            (leftover / "old").rename(path)
        shutil.rmtree(leftover, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
