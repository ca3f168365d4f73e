"""Random bytes for ids, from the system's generator, without a system call each."""

from __future__ import annotations

import os
import threading

BLOCK = 4096

_lock = threading.Lock()
_block = b""


def random_bytes(count: int) -> bytes:
    """`count` bytes, at most BLOCK, that nobody can guess.

    They are drawn by the block: a system call gives up the GIL, and in a process that predicts, another thread then
    keeps it for up to milliseconds.
    """
    global _block
    with _lock:
        if len(_block) < count:
            _block = os.urandom(BLOCK)
        drawn, _block = _block[:count], _block[count:]
    return drawn


def _forget() -> None:
    global _lock, _block
    _lock, _block = threading.Lock(), b""


os.register_at_fork(after_in_child=_forget)  # or parent and child would draw the same
