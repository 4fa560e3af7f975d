from __future__ import annotations

import asyncio
import threading

import pytest

from stream.mailbox import Fanout, Mailbox, MailboxClosed
from tests.fakes import PATIENCE


def test_newest_item_wins_when_the_reader_is_slow() -> None:
    drops: list[int] = []
    box = Mailbox[int](on_drop=drops.append)
    for item in range(10):
        assert box.put(item)
    assert box.get() == 9
    assert box.dropped == 9 == sum(drops)


def test_a_live_box_of_three_keeps_the_newest_three_in_order() -> None:
    box = Mailbox[int](3)
    for item in range(10):
        box.put(item)
    assert [box.get(), box.get(), box.get()] == [7, 8, 9]
    assert box.dropped == 7


def test_lossless_loses_nothing_between_a_fast_writer_and_a_slow_reader() -> None:
    box = Mailbox[int](2, lossless=True)
    writer = threading.Thread(target=lambda: [box.put(item) for item in range(500)] and box.close())
    writer.start()
    assert list(box) == list(range(500))
    writer.join(PATIENCE)
    assert box.dropped == 0


def test_many_writers_and_readers_lose_and_double_nothing() -> None:
    box = Mailbox[int](3, lossless=True)
    taken: list[int] = []
    lock = threading.Lock()

    def read() -> None:
        for item in box:
            with lock:
                taken.append(item)

    readers = [threading.Thread(target=read) for _ in range(3)]
    writers = [threading.Thread(target=lambda n=n: [box.put(n * 100 + i) for i in range(100)]) for n in range(3)]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join(PATIENCE)
    box.close()
    for thread in readers:
        thread.join(PATIENCE)
    assert sorted(taken) == list(range(300))


def test_poll_does_not_wait() -> None:
    box = Mailbox[int]()
    assert box.poll() is None
    box.put(1)
    assert box.poll() == 1


def test_get_times_out_and_tells_a_timeout_from_the_end() -> None:
    box = Mailbox[int]()
    with pytest.raises(TimeoutError):
        box.get(timeout=0)
    box.close()
    with pytest.raises(MailboxClosed):
        box.get(timeout=0)


def test_what_is_inside_a_closed_box_can_still_be_taken() -> None:
    box = Mailbox[int](2)
    box.put(1)
    box.close()
    assert not box.drained
    assert not box.put(2)
    assert box.get() == 1
    assert box.drained
    with pytest.raises(MailboxClosed):
        box.get()


def test_closing_with_discard_counts_what_was_inside() -> None:
    drops: list[int] = []
    box = Mailbox[int](2, on_drop=drops.append)
    box.put(1)
    box.put(2)
    box.close(discard=True)
    assert box.drained
    assert box.dropped == 2
    assert drops == [2]


def test_closing_wakes_every_reader_and_writer() -> None:
    empty, full = Mailbox[int](), Mailbox[int](lossless=True)
    full.put(0)
    outcomes: list[object] = []

    def read() -> None:
        try:
            empty.get()
        except MailboxClosed:
            outcomes.append("closed")

    threads = [
        threading.Thread(target=read),
        threading.Thread(target=read),
        threading.Thread(target=lambda: outcomes.append(full.put(1))),
        threading.Thread(target=lambda: outcomes.append(full.wait_room())),
    ]
    for thread in threads:
        thread.start()
    empty.close()
    full.close()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(map(str, outcomes)) == ["False", "False", "closed", "closed"]


def test_wait_room_returns_once_the_reader_took_something() -> None:
    box = Mailbox[int](lossless=True)
    box.put(1)
    assert not box.has_room()
    assert not box.wait_room(timeout=0)
    taker = threading.Thread(target=box.get)
    taker.start()
    assert box.wait_room(PATIENCE)
    taker.join(PATIENCE)


def test_every_change_is_announced_without_the_lock_held() -> None:
    seen: list[int] = []
    box = Mailbox[int](notify=lambda: seen.append(len(box)))
    box.put(1)
    box.get()
    box.close()
    assert seen == [1, 0, 0]


def test_a_box_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="room"):
        Mailbox[int](0)


def test_aget_takes_what_another_thread_puts() -> None:
    box = Mailbox[int](4, lossless=True)

    async def read() -> list[int]:
        items = []
        try:
            while True:
                items.append(await box.aget())
        except MailboxClosed:
            return items

    writer = threading.Thread(target=lambda: [box.put(item) for item in range(200)] and box.close())
    writer.start()
    assert asyncio.run(read()) == list(range(200))
    writer.join(PATIENCE)


def test_a_cancelled_aget_takes_nothing_and_leaves_no_waiter() -> None:
    box = Mailbox[int]()

    async def cancel() -> int:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(box.aget(), 0.001)
        assert box._waiters == []
        box.put(7)
        return await box.aget()

    assert asyncio.run(cancel()) == 7


def test_a_put_after_the_waiting_loop_is_gone_does_no_harm() -> None:
    box = Mailbox[int]()
    loop = asyncio.new_event_loop()
    box._waiters.append((loop, loop.create_future()))
    loop.close()
    assert box.put(1)


def test_a_slow_viewer_never_holds_up_another_subscriber() -> None:
    fanout = Fanout[int]()
    slow, file = fanout.subscribe(), fanout.subscribe(1, lossless=True)
    got = []
    for item in range(20):
        assert fanout.has_room()
        fanout.put(item)
        got.append(file.get())
    assert got == list(range(20))
    assert slow.get() == 19
    assert slow.dropped == 19


def test_a_full_file_holds_up_the_producer_but_not_the_viewer() -> None:
    fanout = Fanout[int]()
    file, viewer = fanout.subscribe(1, lossless=True), fanout.subscribe()
    fanout.put(0)
    assert not fanout.has_room()
    assert viewer.get() == 0
    producer = threading.Thread(target=fanout.put, args=(1,))
    producer.start()
    assert viewer.get(PATIENCE) == 1  # although the file's box is still full
    assert file.get() == 0
    producer.join(PATIENCE)
    assert file.get() == 1
    assert file.dropped == 0


def test_a_closed_subscriber_is_forgotten_and_a_late_one_gets_the_end() -> None:
    fanout = Fanout[int]()
    gone, stays = fanout.subscribe(lossless=True), fanout.subscribe()
    gone.close()
    fanout.put(1)
    assert len(fanout) == 1
    assert stays.get() == 1
    fanout.close()
    late = fanout.subscribe()
    assert late.drained
    assert stays.drained
