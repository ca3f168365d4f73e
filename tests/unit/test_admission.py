"""Who gets a place and whose turn it is, without sockets."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from concurrent.futures import Future

import pytest

from lawnwatch.errors import Overloaded
from lawnwatch.serving.admission import UNWATCHED, Admission, Sender, admit, in_thread
from lawnwatch.serving.problems import ClientGone
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
    admission = Admission(threads=1, places=4, max_wait=4.0)
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
    admission = Admission(threads=1, places=2, max_wait=4.0)
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


async def bodies(admission: Admission, client: str, count: int, *, size: int, slow: bool = False) -> list[Sender]:
    """Senders whose bodies are on their way, `size` bytes of each already here."""
    senders = [Sender(admission, client) for _ in range(count)]
    for sender in senders:
        sender.enter()
        sender.clock = asyncio.timeout(30)
        await sender.clock.__aenter__()
        if slow:
            sender._is_slow()
        sender.hold(size)
    return senders


async def ended(senders: list[Sender]) -> None:
    """What the requests of these senders do at their end; their clocks are this task's, which they interrupt."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0.01)
    for sender in senders:
        sender.leave()


async def test_10_who_holds_most_memory_loses_its_newest_body_to_one_who_holds_less() -> None:
    admission = Admission(threads=1, places=100, max_wait=4.0)
    flood = await bodies(admission, "flood", 12, size=20_000_000)
    guest = Sender(admission, "guest")
    guest.enter()
    guest.hold(16_000_000)
    assert not any(sender.pushed_out for sender in flood)
    guest.hold(11_000)
    assert [sender.pushed_out for sender in flood] == [False] * 11 + [True]
    assert admission.held == 11 * 20_000_000 + 16_011_000
    with pytest.raises(Overloaded):
        flood[-1].hold(1)  # a piece that was on its way
    other = Sender(admission, "flood")
    other.enter()
    with pytest.raises(Overloaded, match="large bodies"):
        other.hold(20_000_000)
    assert sum(sender.pushed_out for sender in flood) == 1
    await ended([*flood, guest, other])
    assert (admission.held, admission.taken) == (0, 0)


async def test_10_slow_senders_share_half_of_the_memory() -> None:
    admission = Admission(threads=1, places=100, max_wait=4.0)
    flood = await bodies(admission, "flood", 6, size=20_000_000, slow=True)
    assert admission.slow == 6 and admission.taken == 0
    with pytest.raises(Overloaded, match="large bodies"):
        flood[0].hold(20_000_000)
    stranger = await bodies(admission, "stranger", 1, size=20_000_000, slow=True)
    assert [sender.pushed_out for sender in flood] == [False] * 5 + [True] and admission.slow == 6
    fast = await bodies(admission, "flood", 1, size=100_000_000)
    fast[0]._is_slow()  # with all that it brought
    assert fast[0].pushed_out and admission.held == 120_000_000
    await ended([*flood, *stranger, *fast])
    assert (admission.held, admission.taken, admission.slow) == (0, 0, 0)


async def test_12_a_batch_is_not_cut_in_pieces_with_one_thread_either() -> None:
    admission = Admission(threads=1, places=2, max_wait=4.0)
    batch, single, guest = Sender(admission, "flood"), Sender(admission, "flood"), Sender(admission, "guest")
    single.enter()
    batch.enter()
    batch.whole_only = True
    jobs: list[Future[None]] = [Future(), Future()]
    batch.waits(jobs[0])  # the newest, and the first of many
    single.waits(jobs[1])
    guest.enter()
    assert (batch.pushed_out, single.pushed_out) == (False, True) and not jobs[0].cancelled()
    for sender in (batch, single, guest):
        sender.leave()


async def test_12_a_body_whose_time_is_over_is_not_pushed_out_too() -> None:
    admission = Admission(threads=1, places=2, max_wait=4.0)
    senders = [Sender(admission, "flood") for _ in range(2)]
    guest = Sender(admission, "guest")
    refused = asyncio.Event()

    async def arrive(sender: Sender) -> None:
        async with asyncio.timeout(0) as sender.clock:
            try:
                await asyncio.sleep(30)
            finally:  # the time-out is under way: it cannot be moved any more
                with contextlib.suppress(Overloaded):
                    guest.enter()
                refused.set()

    for sender in senders:
        sender.enter()
    with pytest.raises(TimeoutError):
        await arrive(senders[1])
    assert refused.is_set() and not senders[1].pushed_out
    for sender in (*senders, guest):
        sender.leave()
    assert admission.taken == 0


async def test_12_a_body_that_is_whole_when_it_is_pushed_out_is_refused() -> None:
    admission = Admission(threads=1, places=2, max_wait=4.0)
    first, second, guest = Sender(admission, "flood"), Sender(admission, "flood"), Sender(admission, "guest")
    first.enter()
    second.enter()
    async with asyncio.timeout(30) as second.clock:
        guest.enter()  # and in the same tick its last piece is there
    second.clock = None
    assert second.pushed_out
    with pytest.raises(Overloaded, match="others have less"):
        second.whole()
    for sender in (first, second, guest):
        sender.leave()
    assert admission.taken == 0


async def test_work_that_waits_too_long_or_for_nobody_is_counted() -> None:
    admission, pool, gate = Admission(threads=1, places=9, max_wait=4.0), FairPool(1), threading.Event()
    running = begun(pool, gate)

    async def work(seconds_left: float, seconds_here: float) -> None:
        sender = Sender(admission, "one")
        admit(sender)

        async def receive() -> dict[str, object]:
            await asyncio.sleep(seconds_here)
            return {"type": "http.disconnect"}

        await in_thread(pool, receive, asyncio.get_running_loop().time() + seconds_left, gate.wait)

    with pytest.raises(Overloaded, match="in time"):
        await work(0.01, 30)
    with pytest.raises(ClientGone):
        await work(30, 0.01)
    counted = {reason: admission.metrics.refused.labels(reason)._value.get() for reason in ("deadline", "gone")}
    assert counted == {"deadline": 1, "gone": 1}
    gate.set()
    assert running.result(10)
    pool.shutdown()


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
