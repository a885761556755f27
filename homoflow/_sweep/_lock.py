"""One writer for a store: a lock that dies with its process."""

import os
import socket
from pathlib import Path
from typing import Any


class StoreInUse(RuntimeError):
    """Another process is writing to the store."""


class Lock:
    """Held from when it is made until `release`, or until the process ends in any way.

    It is the operating system's lock of a file beside the store, which is deleted at the
    end. Where there is none (Windows) nothing is locked.
    """

    def __init__(self, store: Path):
        self._path = store.with_name(f"{store.name}.lock")
        self._file: Any = None
        try:
            import fcntl
        except ImportError:
            return
        store.parent.mkdir(parents=True, exist_ok=True)
        while self._file is None:
            file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip()
                file.close()
                raise StoreInUse(
                    f"{store} is being written by another sweep ({owner or 'unknown'}): "
                    "wait for it to end, or choose another store."
                ) from None
            if _is_same_file(file, self._path):
                self._file = file
            else:  # Its last owner has just deleted it.
                file.close()
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _is_same_file(file: Any, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
