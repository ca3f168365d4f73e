"""How fast ingest is, against a bare asyncio loop that does the least a crawler can do.

Both fetch the same photographs (about 12 kB each, every URL with bytes of its own) from a web server on loopback that
answers after 20 ms, at concurrency 32, and put them into the same MinIO. The bare loop downloads with aiohttp (httpx
where that is not installed), decodes once with Pillow and PUTs; ours is `lawnwatch ingest` with its catalog on MariaDB,
the address guard, SHA-256, perceptual hash, brightness and sharpness on top. Web server, MinIO and MariaDB are
processes of their own on the same cores. Rounds alternate; medians are printed, with CPU seconds per image of each
client process.

    python benchmarks/ingest_throughput.py [IMAGES] [ROUNDS]

Photographs come from LAWNWATCH_TEST_PHOTOS (`<label>/*.jpg`), else samples are drawn.
"""

from __future__ import annotations

import asyncio
import io
import json
import multiprocessing
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "infra"), str(ROOT / "tests")]

CONCURRENCY = 32
LATENCY_SECONDS = 0.02
TARGET = 0.8


# --- the web --------------------------------------------------------------------------------------------------------


class Photographs(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, no more: `/N` is photograph N modulo their number, with N after its last byte."""

    photos: ClassVar[list[bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        while b"\r\n\r\n" in self.received:
            request, self.received = self.received.split(b"\r\n\r\n", 1)
            number = int(request.split(b" ", 2)[1].strip(b"/"))
            asyncio.get_running_loop().call_later(LATENCY_SECONDS, self.answer, number)

    def answer(self, number: int) -> None:
        body = self.photos[number % len(self.photos)] + number.to_bytes(8, "big")
        self.transport.write(  # type: ignore[attr-defined]
            b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )


def serve(photos: list[bytes], port: int) -> None:
    async def forever() -> None:
        Photographs.photos = photos
        server = await asyncio.get_running_loop().create_server(Photographs, "127.0.0.1", port)
        await server.serve_forever()

    asyncio.run(forever())


# --- the two clients, each in a process of its own ------------------------------------------------------------------


def bare() -> dict[str, float]:
    """Download, decode once, PUT."""
    from urllib.parse import urlsplit

    import urllib3
    from minio import Minio
    from PIL import Image

    address = urlsplit(os.environ["LAWNWATCH_STORE_ENDPOINT"]).netloc
    bucket = urlsplit(os.environ["LAWNWATCH_STORE_URL"]).netloc
    minio = Minio(
        address,
        access_key=os.environ["LAWNWATCH_STORE_ACCESS_KEY"],
        secret_key=os.environ["LAWNWATCH_STORE_SECRET_KEY"],
        secure=False,
        region="us-east-1",
        http_client=urllib3.PoolManager(maxsize=64),
    )
    minio.make_bucket(bucket)
    urls = iter(Path(os.environ["BENCHMARK_URLS"]).read_text().split())
    threads = ThreadPoolExecutor(CONCURRENCY)

    def keep(url: str, data: bytes) -> None:
        Image.open(io.BytesIO(data)).convert("RGB")
        minio.put_object(bucket, f"images/{url.rpartition('/')[2]}.jpg", io.BytesIO(data), len(data), "image/jpeg")

    async def worker(get: object) -> None:
        for url in urls:
            data = await get(url)  # type: ignore[operator]
            await asyncio.get_running_loop().run_in_executor(threads, keep, url, data)

    async def whole() -> None:
        try:
            import aiohttp
        except ImportError:
            import httpx

            async with httpx.AsyncClient(limits=httpx.Limits(max_connections=CONCURRENCY)) as client:

                async def with_httpx(url: str) -> bytes:
                    return (await client.get(url)).raise_for_status().content

                await asyncio.gather(*(worker(with_httpx) for _ in range(CONCURRENCY)))
            return
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONCURRENCY)) as session:

            async def with_aiohttp(url: str) -> bytes:
                async with session.get(url, raise_for_status=True) as response:
                    return await response.read()

            await asyncio.gather(*(worker(with_aiohttp) for _ in range(CONCURRENCY)))

    started, cpu = time.perf_counter(), time.process_time()
    asyncio.run(whole())
    return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}


def ours() -> dict[str, float]:
    """What `lawnwatch ingest` does after its start; the interpreter's start is in neither figure."""
    from lawnwatch import ingest
    from lawnwatch.catalog import Catalog
    from lawnwatch.config import get_settings
    from lawnwatch.store import open_store

    settings = get_settings()
    catalog, store = Catalog(settings), open_store(settings)
    catalog.migrate()
    catalog.import_file(Path(os.environ["BENCHMARK_URLS"]).with_suffix(".csv"))
    started, cpu = time.perf_counter(), time.process_time()
    report = ingest.run(settings, catalog, store)
    figures = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    assert report.stored == report.claimed > 0, report
    return figures


def main(images: int = 1500, rounds: int = 3) -> None:
    import conftest
    import samples
    from processes import free_port

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = os.environ.get("LAWNWATCH_TEST_PHOTOS")
        pictures = Path(given).resolve() if given else samples.draw(folder / "photos")
        photos = [file.read_bytes() for file in sorted(pictures.glob("*/*.jpg"))]
        port = free_port()
        web = multiprocessing.get_context("spawn").Process(target=serve, args=(photos, port), daemon=True)
        web.start()
        for part in ("mariadb", "minio"):
            (folder / part).mkdir()
        mariadb, minio = conftest._start_mariadb(folder / "mariadb"), conftest._start_minio(folder / "minio")
        try:
            figures: dict[str, list[dict[str, float]]] = {"bare": [], "ours": []}
            for number in range(rounds * 2):
                client = ("bare", "ours")[number % 2]
                urls = folder / f"{number}.txt"
                lines = [f"http://127.0.0.1:{port}/{number * images + each}" for each in range(images)]
                urls.write_text("\n".join(lines))
                urls.with_suffix(".csv").write_text("url,label\n" + "".join(f"{line},grass\n" for line in lines))
                environment = {
                    "LAWNWATCH_HOME": str(folder / "home"),
                    "LAWNWATCH_DATABASE_URL": mariadb.fresh(),
                    "LAWNWATCH_FETCH__ALLOW_CIDRS": '["127.0.0.0/8"]',
                    "LAWNWATCH_FETCH__CONCURRENCY": str(CONCURRENCY),
                    "LAWNWATCH_FETCH__PER_HOST": str(CONCURRENCY),
                    "BENCHMARK_URLS": str(urls),
                    **{
                        f"LAWNWATCH_{key.upper()}": value
                        for key, value in minio.settings(f"bucket-{secrets.token_hex(4)}").items()
                    },
                }
                done = subprocess.run(
                    [sys.executable, __file__, client], env=os.environ | environment, stdout=subprocess.PIPE, check=True
                )
                figures[client].append(json.loads(done.stdout))
                print(client, {key: round(value, 2) for key, value in figures[client][-1].items()}, file=sys.stderr)
        finally:
            mariadb.server.stop()
            minio.server.stop()
            web.terminate()
    sizes = statistics.median(map(len, photos))
    print(f"{images} photographs, median {sizes / 1000:.1f} kB, {rounds} rounds each, concurrency {CONCURRENCY}")
    speed = {}
    for client, each in figures.items():
        speed[client] = statistics.median(images / one["seconds"] for one in each)
        cpu = statistics.median(one["cpu"] / images for one in each)
        print(f"{client}: {speed[client]:6.1f} images/s, {cpu * 1000:.2f} ms CPU per image")
    ratio = speed["ours"] / speed["bare"]
    print(f"ours / bare = {ratio:.2f} (target {TARGET})")


if __name__ == "__main__":
    if sys.argv[1:2] in (["bare"], ["ours"]):
        print(json.dumps({"bare": bare, "ours": ours}[sys.argv[1]]()))
    else:
        main(*map(int, sys.argv[1:]))
