"""ICE: servers, candidates, trickle bodies, and the addresses and ports of this machine."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import aioice.ice
import ifaddr
import pytest
from aiortc import RTCBundlePolicy, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from stream.rtc import ice
from stream.rtc.network import Network, host_addresses
from stream.rtc.sdp import Malformed
from stream.server.settings import IceServer
from tests.whip_client import NETWORK

NOW = 1_700_000_000.0
RFC_8840 = """a=ice-ufrag:EsAw\r
a=ice-pwd:P2uYro0UCOQ4zxjKXaWCBui1\r
m=audio 9 RTP/AVP 0\r
a=mid:0\r
a=candidate:1387637174 1 udp 2122260223 192.0.2.1 61764 typ host generation 0 ufrag EsAw network-id 1\r
a=candidate:3471623853 1 udp 2122194687 198.51.100.2 61765 typ host generation 0 ufrag EsAw network-id 2\r
a=candidate:473322822 1 tcp 1518280447 192.0.2.1 9 typ host tcptype active generation 0 ufrag EsAw network-id 1\r
a=candidate:2154773085 1 tcp 1518214911 198.51.100.2 9 typ host tcptype active generation 0 ufrag EsAw network-id 2\r
a=end-of-candidates\r
"""


def test_without_servers_no_stun_server_is_asked_and_one_transport_carries_everything() -> None:
    configuration = ice.configuration([], NOW)
    assert configuration.iceServers == []
    assert configuration.bundlePolicy is RTCBundlePolicy.MAX_BUNDLE


def test_credentials_go_to_our_own_peers_and_into_link_headers() -> None:
    servers = [
        IceServer(urls=("stun:s.example",)),
        IceServer(urls=("turn:t.example:3478?transport=udp",), username='u"1', credential=SecretStr("c")),
    ]
    assert ice.configuration(servers, NOW).iceServers[1].credential == "c"
    assert ice.links(servers, NOW) == [
        '<stun:s.example>; rel="ice-server"',
        '<turn:t.example:3478?transport=udp>; rel="ice-server"; username="u\\"1"; credential="c"; '
        'credential-type="password"',
    ]


def test_a_coturn_secret_makes_credentials_that_run_out() -> None:
    server: Any = SimpleNamespace(urls=("turn:t",), username=None, credential=None, secret=SecretStr("north"))
    # the password by: printf 1700021600:livestyle | openssl dgst -sha1 -hmac north -binary | base64
    assert ice.credentials(server, NOW) == ("1700021600:livestyle", "l0TJXRnwSkOW8KZrXJYY/LOV5D0=")


def test_host_candidates_of_one_family_are_announced_at_the_public_address() -> None:
    sdp = "\r\n".join(
        [
            "m=video 5000 UDP/TLS/RTP/SAVPF 97",
            "c=IN IP4 10.0.0.4",
            "a=candidate:1 1 udp 9 10.0.0.4 5000 typ host",
            "a=candidate:2 1 udp 9 172.16.0.4 5000 typ host",
            "a=candidate:3 1 udp 9 fd00::4 5001 typ host",
            "a=candidate:4 1 udp 8 198.51.100.7 5002 typ srflx raddr 10.0.0.4 rport 5000",
            "m=audio 5000 UDP/TLS/RTP/SAVPF 96",
            "a=candidate:1 1 udp 9 10.0.0.4 5000 typ host",
            "",
        ]
    )
    assert Network(public_ip="203.0.113.9").announced(sdp).splitlines() == [
        "m=video 5000 UDP/TLS/RTP/SAVPF 97",
        "c=IN IP4 203.0.113.9",
        "a=candidate:1 1 udp 9 203.0.113.9 5000 typ host",
        "a=candidate:3 1 udp 9 fd00::4 5001 typ host",
        "a=candidate:4 1 udp 8 198.51.100.7 5002 typ srflx raddr 10.0.0.4 rport 5000",
        "m=audio 5000 UDP/TLS/RTP/SAVPF 96",
        "a=candidate:1 1 udp 9 203.0.113.9 5000 typ host",
    ]
    assert Network().announced(sdp) == sdp


@pytest.mark.parametrize(
    ("value", "usable"),
    [
        ("1 1 UDP 2122260223 192.0.2.1 61764 typ host generation 0", True),
        ("1 1 udp 1 fd00::1 1 typ srflx raddr 10.0.0.1 rport 5", True),
        ("1 1 udp 1 192.0.2.1 1 typ relay", True),
        ("1 1 tcp 1 192.0.2.1 9 typ host tcptype active", False),
        ("1 2 udp 1 192.0.2.1 9 typ host", False),
        ("1 1 udp 1 0f6dd9be-9a6e.local 9 typ host", False),
        ("1 1 udp 1 192.0.2.1 9 typ prflx", False),
        ("1 1 udp 1 192.0.2.1 0 typ host", False),
        ("1 1 udp 1 192.0.2.1 70000 typ host", False),
        ("1 1 udp 99999999999999999999 192.0.2.1 9 typ host", False),
        ("1 1 udp ٣ 192.0.2.1 9 typ host", False),
        ("1 1 udp 1 224.0.0.1 9 typ host", False),
        ("1 1 udp 1 0.0.0.0 9 typ host", False),
        ("1 1 udp 1 255.255.255.255 9 typ host", False),
        ("1 1 udp 1 fe80::1%eth0 9 typ host", False),
        ("1 1 udp 1 192.0.2.1 9 host", False),
        ("", False),
    ],
)
def test_only_candidates_worth_a_try_are_taken(value: str, usable: bool) -> None:
    assert (ice.candidate_of(value) is not None) is usable


def test_the_example_of_rfc_8840_is_read() -> None:
    fragment = ice.fragment(RFC_8840)
    assert (fragment.username, fragment.password) == ("EsAw", "P2uYro0UCOQ4zxjKXaWCBui1")
    assert [(c.ip, c.port) for c in fragment.candidates] == [("192.0.2.1", 61764), ("198.51.100.2", 61765)]


def test_a_fragment_gives_a_bounded_number_of_candidates() -> None:
    lines = [f"a=candidate:{i} 1 udp 1 192.0.2.1 {1000 + i} typ host" for i in range(500)]
    assert len(ice.fragment("\n".join(lines)).candidates) == ice.MAX_CANDIDATES


@pytest.mark.parametrize("body", ["", "\r\n", "hello", '{"candidate": ""}', "a\n", "v=0\r\n"])
def test_what_is_no_fragment_is_malformed(body: str) -> None:
    with pytest.raises(Malformed):
        ice.fragment(body)


@given(st.lists(st.sampled_from(RFC_8840.splitlines()) | st.text(max_size=40).map("a=candidate:{}".format) | st.text()))
def test_any_text_is_a_fragment_or_malformed(lines: list[str]) -> None:
    with suppress(Malformed):
        ice.fragment("\r\n".join(lines))


def test_aioice_still_has_the_seams_that_are_hooked() -> None:
    wanted = inspect.signature(aioice.ice.Connection.gather_candidates)
    assert list(wanted.parameters) == ["self"]
    assert "get_host_addresses(" in inspect.getsource(aioice.ice.Connection.gather_candidates)
    assert "create_datagram_endpoint(" in inspect.getsource(aioice.ice.Connection.get_component_candidates)


async def _ports() -> list[int]:
    """The ports that a peer gathers; it is closed again."""
    pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    pc.createDataChannel("x")
    await pc.setLocalDescription()
    lines = [line.split() for line in pc.localDescription.sdp.splitlines() if line.startswith("a=candidate:")]
    await pc.close()
    return [int(line[5]) for line in lines]


@NETWORK
def test_our_peers_and_only_they_keep_to_the_port_range() -> None:
    async def gather() -> tuple[list[int], list[int]]:
        with Network(ports=(22_310, 22_330)).applied():
            ours = await _ports()
        return ours, await _ports()

    ours, others = asyncio.run(gather())
    assert ours
    assert all(22_310 <= port <= 22_330 for port in ours)
    assert not any(22_310 <= port <= 22_330 for port in others)


@NETWORK
def test_a_range_without_a_free_port_gives_no_candidates_and_no_error() -> None:
    async def gather() -> list[int]:
        loop = asyncio.get_running_loop()
        taken = []
        for address in host_addresses():
            transport, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=(address, 42_340))
            taken.append(transport)
        with Network(ports=(42_340, 42_340)).applied():
            ports = await _ports()
        for transport in taken:
            transport.close()
        return ports

    assert asyncio.run(gather()) == []


def _adapters(**named: list[str]) -> list[Any]:
    def ip(text: str) -> Any:
        six = ":" in text
        return SimpleNamespace(ip=(text, 0, 3 if text.startswith("fe80") else 0) if six else text)

    return [SimpleNamespace(name=name.replace("_", "-"), ips=[ip(text) for text in ips]) for name, ips in named.items()]


@pytest.mark.parametrize(
    ("adapters", "chosen"),
    [
        (
            {"lo": ["127.0.0.1", "::1"], "eth0": ["192.0.2.2", "fe80::2", "fd00::2"], "docker0": ["172.17.0.1"]},
            ["192.0.2.2", "fd00::2"],
        ),
        ({"eth0": ["192.0.2.2"], "br_12": ["172.18.0.1"], "veth3": ["10.9.9.9"]}, ["192.0.2.2"]),
        ({"lo": ["127.0.0.1"], "eth0": ["169.254.3.4"]}, ["169.254.3.4"]),
        ({"lo": ["127.0.0.1"], "docker0": ["172.17.0.1"]}, ["172.17.0.1"]),
        ({"lo": ["127.0.0.1", "::1"]}, ["127.0.0.1", "::1"]),
    ],
)  # fmt: skip
def test_addresses_that_nobody_can_reach_are_left_out_unless_there_is_no_other(
    adapters: dict[str, list[str]], chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: _adapters(**adapters))
    assert host_addresses() == chosen
    assert host_addresses(use_ipv6=False) == [address for address in chosen if ":" not in address]


@NETWORK
def test_candidates_are_added_up_to_a_bound_and_their_end_is_never_told() -> None:
    async def add() -> tuple[int, bool]:
        offerer, pc = RTCPeerConnection(RTCConfiguration(iceServers=[])), RTCPeerConnection(ice.configuration([], NOW))
        offerer.addTransceiver("video", "recvonly")
        await offerer.setLocalDescription()
        sdp = "\r\n".join(
            line for line in offerer.localDescription.sdp.splitlines() if not line.startswith(("a=cand", "a=end"))
        )
        await pc.setRemoteDescription(RTCSessionDescription(sdp + "\r\n", "offer"))
        rows = [ice.candidate_of(f"{i} 1 udp 1 192.0.2.9 {1000 + i} typ host") for i in range(60)]
        for _ in range(2):
            await ice.add_candidates(pc, [row for row in rows if row])
        transport = pc.getTransceivers()[0].receiver.transport.transport
        counted = len(transport.getRemoteCandidates()), transport._connection._remote_candidates_end
        await pc.close()
        await offerer.close()
        return counted

    assert asyncio.run(add()) == (ice.MAX_CANDIDATES, False)
