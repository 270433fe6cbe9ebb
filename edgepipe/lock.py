"""Let one run at a time work in a directory: a lock of the operating system on a file there.

The kernel lets go of it when the process ends, however it ends: a killed run blocks nobody, and no process id is
compared. Child processes don't inherit the file. Where a file system has no locks, runs aren't kept apart.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from edgepipe.errors import ConfigError

_TRIES = 100  # the file vanishes under our hands when its holder ends at this very moment: look again
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextlib.contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs, then remove it, and folders made for it that stayed empty.

    Raises ConfigError at once when another run holds it; `what` is how the sentence names the directory.
    """
    made = [folder for folder in path.parents if not folder.exists()]  # nearest first
    try:
        try:
            file = _take(path)
        except OSError as error:
            raise ConfigError(f"{what} can't be locked: {error.strerror} ({path}); name another place") from error
        if file is None:
            raise ConfigError(f"another run is at work in {what}: wait until it has ended, then repeat the command")
        try:
            yield
        finally:
            _let_go(file, path)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # something is in it now
                folder.rmdir()


def _take(path: Path) -> int | None:
    """Return the locked file's descriptor, or None when another run has it."""
    for _ in range(_TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its folder was removed by a run that ended
            continue
        try:
            if not _lock(file):
                os.close(file)
                return None
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # what we locked was removed meanwhile: another run may have made and locked a new one
    return None


def _let_go(file: int, path: Path) -> None:
    """Remove the file while it is still ours, then close it; Windows only removes what is closed."""
    if sys.platform == "win32":
        os.close(file)
    with contextlib.suppress(OSError):
        path.unlink()
    if sys.platform != "win32":
        os.close(file)


def _lock(file: int) -> bool:
    """Lock an open file, or say that another has it; each opening of a file is locked on its own."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        if error.errno not in _NO_LOCKS:
            raise
    return True
