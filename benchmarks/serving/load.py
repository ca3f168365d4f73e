"""A load generator that measures itself: photographs over keep-alive connections, one process, one thread.

    python benchmarks/serving/load.py 127.0.0.1:8000 --photos DIR --connections 32 --seconds 8

prints one JSON object: answers by status, rates, latency percentiles in ms and the CPU it used. A closed loop (each
connection sends its next request when the last is answered) unless --rate asks for an open one, where latency counts
from the moment a request was due, not from when it could be sent. --polite waits as long as Retry-After says. A
connection that waits longer than --timeout is a time-out. The target is only ever a loopback address.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import heapq
import ipaddress
import itertools
import json
import resource
import selectors
import socket
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BOUNDARY = b"lawnwatch-load"


def request(path: str, picture: bytes, *, form: bool = True, headers: str = "") -> bytes:
    """One POST as the bytes that go over the wire."""
    body, kind = picture, "image/jpeg"
    if form:
        body = (
            b'--%b\r\nContent-Disposition: form-data; name="file"; filename="photo.jpg"\r\n'
            b"Content-Type: image/jpeg\r\n\r\n%b\r\n--%b--\r\n" % (BOUNDARY, picture, BOUNDARY)
        )
        kind = f"multipart/form-data; boundary={BOUNDARY.decode()}"
    lines = f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n{headers}"
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{lines}\r\n"
    return head.encode() + body


def inference(model: str, picture: bytes) -> bytes:
    """One Open Inference Protocol request whose BYTES are the picture in base64."""
    tensor = {"name": "file", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(picture).decode()]}
    body = json.dumps({"inputs": [tensor]}).encode()
    head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def base64_json(path: str, picture: bytes) -> bytes:
    """One POST of `{"file": "<base64>"}`."""
    body = json.dumps({"file": base64.b64encode(picture).decode()}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Connection:
    """One client: sends a request, reads its answer, and again."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.sock: socket.socket | None = None
        self.out = memoryview(b"")
        self.received = bytearray()
        self.began = 0.0

    def open(self) -> socket.socket:
        self.sock = socket.create_connection(self.address, timeout=10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        return self.sock


class Load:
    """Drives the connections; counts what comes back."""

    def __init__(
        self,
        address: tuple[str, int],
        requests: Sequence[bytes],
        *,
        connections: int,
        rate: float = 0.0,
        polite: bool = False,
        timeout: float = 10.0,
    ) -> None:
        self._selector = selectors.DefaultSelector()
        self._requests = itertools.cycle(requests)
        self._connections = [Connection(address) for _ in range(connections)]
        self._idle: deque[Connection] = deque(self._connections)
        self._waiting: list[tuple[float, int, Connection]] = []  # polite clients, until Retry-After is over
        self._rate, self._polite, self._timeout = rate, polite, timeout
        self.samples: list[tuple[float, float, int]] = []  # end, seconds, status; 0 a broken connection, -1 a time-out

    def run(self, seconds: float) -> None:
        """Send for so long, then wait for what is under way."""
        due = begun = time.perf_counter()
        end, checked = begun + seconds, begun
        while True:
            now = time.perf_counter()
            while self._waiting and self._waiting[0][0] <= now:
                self._idle.append(heapq.heappop(self._waiting)[2])
            if now < end:
                while self._idle and (not self._rate or due <= now):
                    self._send(self._idle.popleft(), due if self._rate else time.perf_counter())
                    due += 1 / self._rate if self._rate else 0
            elif len(self._idle) + len(self._waiting) == len(self._connections):
                return
            # With no connection free nothing can be sent, whatever is due: to look again at once would take a core.
            pause = min(0.05, max(0.0, due - now)) if self._rate and self._idle else 0.05
            for key, mask in self._selector.select(pause):
                self._serve(key.data, mask)
            if now - checked > 0.5:
                checked = now
                for one in self._connections:
                    if one.began and now - one.began > self._timeout:
                        self._done(one, -1, {}, close=True)

    def close(self) -> None:
        """Close all connections."""
        for one in self._connections:
            if one.sock is not None:
                one.sock.close()

    def _send(self, one: Connection, due: float) -> None:
        one.began = due
        one.received.clear()
        one.out = memoryview(next(self._requests))
        try:
            if one.sock is None:
                self._selector.register(one.open(), selectors.EVENT_READ, one)
            self._write(one)
        except OSError:
            self._done(one, 0, {}, close=True)

    def _write(self, one: Connection) -> None:
        assert one.sock is not None
        with contextlib.suppress(BlockingIOError):
            one.out = one.out[one.sock.send(one.out) :]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if one.out else 0)
        if self._selector.get_key(one.sock).events != wanted:
            self._selector.modify(one.sock, wanted, one)

    def _serve(self, one: Connection, mask: int) -> None:
        assert one.sock is not None
        try:
            if mask & selectors.EVENT_WRITE:
                self._write(one)
            if mask & selectors.EVENT_READ:
                piece = one.sock.recv(65536)
                if not piece:  # between two requests a server may close a connection; within one it may not
                    self._done(one, 0, {}, close=True)
                    return
                one.received += piece
        except BlockingIOError:
            return
        except OSError:
            self._done(one, 0, {}, close=True)
            return
        head, found, body = bytes(one.received).partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.split(b"\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
        if b"content-length" in headers:
            whole = len(body) >= int(headers[b"content-length"])
        else:
            whole = body.endswith(b"0\r\n\r\n")  # chunked, as some servers answer
        if whole:
            closes = headers.get(b"connection", b"").lower() == b"close" or bool(one.out)
            self._done(one, int(lines[0].split(b" ")[1]), headers, close=closes)

    def _done(self, one: Connection, status: int, headers: dict[bytes, bytes], *, close: bool) -> None:
        now = time.perf_counter()
        if one.began:
            self.samples.append((now, now - one.began, status))
        if close and one.sock is not None:
            self._selector.unregister(one.sock)
            one.sock.close()
            one.sock = None
        if one.began:
            one.began = 0.0
            if self._polite and b"retry-after" in headers:
                heapq.heappush(self._waiting, (now + float(headers[b"retry-after"]), id(one), one))
            else:
                self._idle.append(one)


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which this share of the values lies; 0 when there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def report(samples: Sequence[tuple[float, float, int]], begun: float, seconds: float, cpu: float) -> dict[str, Any]:
    """What came back within the time of sending, and how quickly."""
    counted = [one for one in samples if one[0] - begun <= seconds]
    good = [took for _, took, status in counted if status == 200]
    refused = [took for _, took, status in counted if status in (429, 503)]
    return {
        "answers": len(good),
        "rate": len(good) / seconds,
        "refused": len(refused),
        "timeouts": sum(status == -1 for *_, status in samples),
        "statuses": dict(Counter(status for *_, status in samples)),
        "p50_ms": 1000 * statistics.median(good) if good else 0.0,
        "p99_ms": 1000 * percentile(good, 0.99),
        "refused_p99_ms": 1000 * percentile(refused, 0.99),
        "cpu_seconds": cpu,
        "cpu_share": cpu / seconds,  # of one core
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="HOST:PORT on loopback")
    parser.add_argument("--path", default="/predict")
    parser.add_argument("--photos", type=Path, required=True, help="a picture, or a folder of *.jpg at any depth")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; 0 is a closed loop")
    parser.add_argument("--timeout", type=float, default=10.0)
    parser.add_argument("--polite", action="store_true", help="wait as long as Retry-After says")
    parser.add_argument("--raw", action="store_true", help="the picture is the body; otherwise a form")
    parser.add_argument("--base64", action="store_true", help="the picture is a member of a JSON body")
    parser.add_argument("--v2", default="", help="send Open Inference Protocol requests to this model instead")
    parser.add_argument("--header", action="append", default=[], help="'Name: value', for every request")
    given = parser.parse_args()
    host, _, port = given.address.rpartition(":")
    if not ipaddress.ip_address(host).is_loopback:
        parser.error(f"load is sent to loopback only; received {host}")
    files = [given.photos] if given.photos.is_file() else sorted(given.photos.rglob("*.jpg"))
    headers = "".join(f"{one}\r\n" for one in given.header)

    def sent(picture: bytes) -> bytes:
        if given.v2:
            return inference(given.v2, picture)
        if given.base64:
            return base64_json(given.path, picture)
        return request(given.path, picture, form=not given.raw, headers=headers)

    requests = [sent(file.read_bytes()) for file in files]
    load = Load(
        (host, int(port)),
        requests,
        connections=given.connections,
        rate=given.rate,
        polite=given.polite,
        timeout=given.timeout,
    )
    before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    load.run(given.seconds)
    after = resource.getrusage(resource.RUSAGE_SELF)
    load.close()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps(report(load.samples, begun, given.seconds, cpu)))


if __name__ == "__main__":
    main()
