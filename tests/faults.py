"""A TCP proxy on loopback that breaks connections the way networks do."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit


@dataclass
class Fault:
    """What befalls one direction of the traffic when `after` more bytes have passed; `times` times in all.

    cut: both sides are closed. flip: the next byte arrives changed. freeze: nothing more passes.
    """

    kind: Literal["cut", "flip", "freeze"]
    after: int
    times: int = 1

    def __post_init__(self) -> None:
        self.left = self.after


class FaultProxy:
    """Pass connections on to `endpoint`; set `up` (towards it), `down`, `delay`, `rate` and `refuse` at any time."""

    def __init__(self, endpoint: str) -> None:
        address = urlsplit(endpoint)
        self._target = (address.hostname, address.port)
        self.up: Fault | None = None
        self.down: Fault | None = None
        self.delay = 0.0  # seconds before each block
        self.rate = 0.0  # bytes a second in each direction; 0: as fast as it goes
        self.refuse = False
        self.passed = {"up": 0, "down": 0}  # bytes
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self.refuse:
                    raise ConnectionRefusedError
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            self._sockets += [client, server]
            for direction, source, sink in (("up", client, server), ("down", server, client)):
                threading.Thread(target=self._pump, args=(direction, source, sink), daemon=True).start()

    def _pump(self, direction: Literal["up", "down"], source: socket.socket, sink: socket.socket) -> None:
        try:
            while block := source.recv(16_384):
                time.sleep(self.delay + (len(block) / self.rate if self.rate else 0))
                fault = self.up if direction == "up" else self.down
                if fault is not None and fault.times:
                    if len(block) > fault.left:
                        block = self._strike(fault, block, sink)
                    else:
                        fault.left -= len(block)
                sink.sendall(block)
                self.passed[direction] += len(block)
        except OSError:
            pass
        finally:
            for each in (source, sink):
                with suppress(OSError):  # close alone would not wake the other direction's recv
                    each.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _strike(fault: Fault, block: bytes, sink: socket.socket) -> bytes:
        at, fault.left = fault.left, fault.after
        fault.times -= 1
        if fault.kind == "flip":
            return block[:at] + bytes([block[at] ^ 1]) + block[at + 1 :]
        sink.sendall(block[:at])
        if fault.kind == "freeze":
            time.sleep(3600)
        raise ConnectionAbortedError
