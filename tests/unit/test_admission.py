"""Who gets a place and whose turn it is, without sockets."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from concurrent.futures import Future

import pytest

from lawnwatch.errors import Overloaded
from lawnwatch.serving.admission import UNWATCHED, Admission, Sender, in_thread
from lawnwatch.serving.turns import FairPool, current_client

pytestmark = pytest.mark.unit


def test_the_queue_is_as_long_as_the_measured_speed_allows() -> None:
    admission = Admission(threads=2, places=258, max_wait=1.0)
    admission.service_seconds = 0.01
    assert admission.limit == 202
    for _ in range(400):
        admission.worked(0.1)
    assert admission.limit == pytest.approx(22, abs=1)
    for _ in range(400):
        admission.worked(0.0001)
    assert admission.limit == 258


async def test_12_a_newcomer_takes_the_newest_place_of_who_has_most() -> None:
    admission = Admission(threads=1, places=4)
    flood = [Sender(admission, "flood") for _ in range(4)]
    for sender in flood:
        sender.enter()
    jobs: list[Future[None]] = [Future() for _ in flood]
    for sender, job in zip(flood, jobs, strict=True):
        sender.waits(job)
    jobs[3].set_running_or_notify_cancel()  # has begun: not to be taken any more
    with pytest.raises(Overloaded):
        Sender(admission, "flood").enter()
    guest, second, third = (Sender(admission, "guest") for _ in range(3))
    guest.enter()
    assert [sender.pushed_out for sender in flood] == [False, False, True, False]
    assert jobs[2].cancelled() and admission.taken == 4
    second.enter()
    with pytest.raises(Overloaded):  # two each: nobody has more than the others
        third.enter()
    for sender in (*flood, guest, second, third):
        sender.leave()
    assert admission.taken == 0 and not admission._holders


async def test_12_a_body_on_its_way_can_be_pushed_out() -> None:
    admission = Admission(threads=1, places=2)
    first, second, guest = Sender(admission, "flood"), Sender(admission, "flood"), Sender(admission, "guest")
    first.enter()
    second.enter()

    async def arrive() -> None:
        async with asyncio.timeout(30) as second.clock:
            await asyncio.sleep(30)

    arriving = asyncio.create_task(arrive())
    await asyncio.sleep(0)
    guest.enter()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(arriving, 5)
    assert second.pushed_out and not first.pushed_out and admission.taken == 2


def submitted(pool: FairPool, client: str, done: list[str], seconds: float = 0.0) -> Future[None]:
    def work() -> None:
        time.sleep(seconds)
        done.append(client)

    token = current_client.set(client)
    try:
        return pool.submit(work)
    finally:
        current_client.reset(token)


def test_a_free_thread_works_for_who_had_least_of_it() -> None:
    pool, done, gate = FairPool(1), [], threading.Event()
    pool.submit(gate.wait)
    work = [submitted(pool, "flood", done, 0.002) for _ in range(20)]
    work += [submitted(pool, "guest", done, 0.002) for _ in range(3)]
    gate.set()
    for each in work:
        each.result(10)
    assert done.index("guest") <= 1
    assert done[:8].count("guest") == 3, done


def test_work_that_was_given_up_is_not_done_and_faults_reach_who_waits() -> None:
    pool, done, gate = FairPool(1), [], threading.Event()
    pool.submit(gate.wait)
    given_up, wanted = submitted(pool, "one", done), submitted(pool, "two", done)
    broken = pool.submit(lambda: 1 / 0)
    assert given_up.cancel()
    gate.set()
    wanted.result(10)
    with pytest.raises(ZeroDivisionError):
        broken.result(10)
    pool.shutdown()
    assert done == ["two"] and not pool._used


def begun(pool: FairPool, gate: threading.Event) -> Future[bool]:
    """A job that a thread works on until the gate opens."""
    job = pool.submit(gate.wait)
    while not job.running():
        time.sleep(0.001)
    return job


def test_13_work_that_was_given_up_keeps_no_picture() -> None:
    class Picture:
        pass

    pool, gate = FairPool(1), threading.Event()
    running = begun(pool, gate)
    picture = Picture()
    kept = weakref.ref(picture)
    current_client.set("one")
    job = pool.submit(lambda held: held, picture)
    current_client.set("")
    del picture
    assert pool.waiting == 1 and kept() is not None
    assert job.cancel() and job.cancel()
    assert kept() is None and pool.waiting == 0  # at once, though the only thread is busy
    assert "one" not in pool._used
    gate.set()
    running.result(10)
    assert pool.submit(lambda: 5).result(10) == 5
    pool.submit(gate.wait).result(10)
    pool.shutdown()


def test_a_pool_that_ends_without_its_work_cancels_it() -> None:
    pool, gate = FairPool(1), threading.Event()
    running = begun(pool, gate)
    waiting = [pool.submit(gate.wait) for _ in range(3)]
    pool.shutdown(wait=False, cancel_futures=True)
    assert all(job.cancelled() for job in waiting)
    gate.set()
    assert running.result(10)
    pool.shutdown()


async def test_13_a_request_that_is_cancelled_takes_its_work_along() -> None:
    pool, gate = FairPool(1), threading.Event()
    running = begun(pool, gate)

    async def receive() -> dict[str, object]:
        await asyncio.sleep(30)
        return {"type": "http.disconnect"}

    for wait in (0.01, 2 * UNWATCHED):  # before anybody looks whether the client is still there, and after
        request = asyncio.create_task(in_thread(pool, receive, asyncio.get_running_loop().time() + 30, gate.wait))
        await asyncio.sleep(wait)
        assert pool.waiting == 1
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert pool.waiting == 0
    gate.set()
    assert running.result(10)
    pool.shutdown()
