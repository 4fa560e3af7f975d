"""Faders over UDP."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from pythonosc.osc_bundle_builder import OscBundleBuilder
from pythonosc.osc_message_builder import OscMessageBuilder
from pythonosc.udp_client import SimpleUDPClient

from accel.errors import UserError
from stream import osc
from stream.hub import Hub, LiveSettings
from tests.fakes import PATIENCE, FakeClock
from tests.serving import fake_load


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(LiveSettings(), fake_load)
    hub.open("cam")
    hub.open("other")
    yield hub
    hub.close()


def message(address: str, *values: object) -> bytes:
    builder = OscMessageBuilder(address)
    for value in values:
        builder.add_arg(value)  # type: ignore[arg-type]
    data: bytes = builder.build().dgram
    return data


def prompt(hub: Hub, name: str = "cam") -> str:
    stream = hub.get(name)
    assert stream
    return stream.params.style.prompt


def test_a_fader_changes_settings_over_udp(hub: Hub) -> None:
    async def play() -> None:
        transport, faders = await osc.listen(hub, "127.0.0.1", 0)
        client = SimpleUDPClient("127.0.0.1", transport.get_extra_info("sockname")[1])
        client.send_message("/livestyle/cam/style/prompt", "neon")
        client.send_message("/livestyle/cam/style/strength", 0.5)
        client.send_message("/livestyle/cam/style/steps", 2)
        async with asyncio.timeout(PATIENCE):
            while faders.taken < 3:
                await asyncio.sleep(0)
        transport.close()
        client._sock.close()

    asyncio.run(play())
    stream = hub.get("cam")
    assert stream
    assert (prompt(hub), stream.params.style.strength, stream.params.style.steps) == ("neon", 0.5, 2)
    assert prompt(hub, "other") != "neon"


def test_a_star_is_every_stream_and_a_bundle_is_taken_at_once(hub: Hub) -> None:
    bundle = OscBundleBuilder(int(time.time()) + 1_000_000)  # its time is days away
    for address, value in (("/livestyle/*/style/prompt", "ink"), ("/livestyle/cam/style/seed", 7)):
        builder = OscMessageBuilder(address)
        builder.add_arg(value)
        bundle.add_content(builder.build())
    osc.Osc(hub).datagram_received(bundle.build().dgram, ("127.0.0.1", 1))
    assert prompt(hub) == prompt(hub, "other") == "ink"
    stream = hub.get("cam")
    assert stream
    assert stream.params.style.seed == 7


BAD: list[bytes] = [
    b"",
    b"not osc",
    b"#bundle\x00",
    b"#bundle\x00" + b"\xff" * 40,
    b"/livestyle/cam/style/prompt\x00,s\x00\x00",
    message("/elsewhere/cam/style/prompt", "x"),
    message("/livestyle/cam", "x"),
    message("/livestyle/nobody/style/prompt", "x"),
    message("/livestyle/cam/style/prompt"),
    message("/livestyle/cam/style/prompt", "x", "y"),
    message("/livestyle/cam/style/steps", 99),
    message("/livestyle/cam/style/promt", "x"),
    message("/livestyle/cam/style/prompt", b"\xff\xfe"),
    message("/livestyle/cam/style/strength", float("nan")),
    message("/livestyle/" + "*a" * 500 + "/style/prompt", "x"),
]


@pytest.mark.parametrize("data", BAD)
def test_what_is_wrong_changes_nothing_and_is_one_line(hub: Hub, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    before = [stream.params for stream in hub.streams()]
    with caplog.at_level(logging.WARNING):
        osc.Osc(hub).datagram_received(data, ("127.0.0.1", 1))
    assert [stream.params for stream in hub.streams()] == before
    ours = [record.getMessage() for record in caplog.records if record.name == "stream.osc"]
    assert len(ours) <= 1
    assert all("\n" not in line and len(line) < 500 for line in ours)


def test_complaints_come_once_a_second(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    faders = osc.Osc(hub, clock)
    count: Callable[[], int] = lambda: len(caplog.records)  # noqa: E731
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            faders.datagram_received(b"nonsense", ("127.0.0.1", 1))
        assert count() == 1
        clock.advance(1.0)
        faders.datagram_received(b"nonsense", ("127.0.0.1", 1))
    assert count() == 2
    assert "49 more" in caplog.text


def test_a_port_that_is_taken_is_the_users_to_mend(hub: Hub) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="OSC"):
            asyncio.run(osc.listen(hub, "127.0.0.1", taken.getsockname()[1]))
