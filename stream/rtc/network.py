"""Which of this machine's addresses and UDP ports our peers use, and at which address they are announced."""

from __future__ import annotations

import asyncio
import ipaddress
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from errno import EADDRINUSE
from typing import Any

import aioice.ice
import ifaddr

from stream.rtc.ice import with_public_ip

BIND_TRIES = 256  # random ports of a range that are tried before a socket is given up
SKIPPED = ("docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "lxcbr", "lxdbr", "podman")  # interfaces


@dataclass(frozen=True, slots=True)
class Network:
    """Which of this machine's addresses and UDP ports our peers gather candidates on, and how they are announced.

    >>> with Network(ports=(50_000, 50_100)).applied():
    ...     await peer.setLocalDescription()
    """

    ports: tuple[int, int] | None = None  # first and last UDP port
    public_ip: str | None = None  # as seen from outside a one-to-one NAT (a cloud machine, a forwarded port range)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Peers that gather inside, and only they, keep to this network. Needs a running event loop."""
        _hook()
        token = _network.set(self)
        try:
            yield
        finally:
            _network.reset(token)

    def announced(self, sdp: str) -> str:
        """The answer with its host candidates at the public address; a full ICE peer finds the rest by itself."""
        return with_public_ip(sdp, self.public_ip) if self.public_ip else sdp


def host_addresses(use_ipv4: bool = True, use_ipv6: bool = True) -> list[str]:
    """This machine's addresses that others may reach: no container bridges, nothing link-local.

    Where that leaves none: every address but loopback; where there is no other: loopback.
    """
    families = {4: use_ipv4, 6: use_ipv6}
    wanted = [(name, address) for name, address in _every_address() if families[address.version]]
    reachable = [row for row in wanted if not row[1].is_loopback]
    outside = [row for row in reachable if not row[1].is_link_local and not row[0].startswith(SKIPPED)]
    return [str(address) for _, address in outside or reachable or wanted]


def _every_address() -> Iterator[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    """(interface, address), without IPv6 ones that need a scope."""
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            if isinstance(ip.ip, str):
                yield str(adapter.name), ipaddress.IPv4Address(ip.ip)
            elif ip.ip[2] == 0:
                yield str(adapter.name), ipaddress.IPv6Address(ip.ip[0])


_network: ContextVar[Network | None] = ContextVar("network", default=None)
_aioice_addresses: Callable[..., list[str]] = aioice.ice.get_host_addresses


def _hook() -> None:
    """Make aioice ask `_network`: its addresses once for all, and this loop's sockets. Everybody else is let through.

    aioice 0.13 has no setting for either; both seams are checked by tests/test_ice.py.
    """
    if aioice.ice.get_host_addresses is not _addresses:
        aioice.ice.get_host_addresses = _addresses
    loop = asyncio.get_running_loop()
    made = loop.create_datagram_endpoint
    if getattr(made, "in_range", False):
        return

    async def create_datagram_endpoint(factory: Any, local_addr: Any = None, **options: Any) -> Any:
        network = _network.get()
        if network is None or network.ports is None or local_addr is None or local_addr[1] != 0:
            return await made(factory, local_addr=local_addr, **options)
        first, last = network.ports
        for port in random.sample(range(first, last + 1), min(last + 1 - first, BIND_TRIES)):
            try:
                return await made(factory, local_addr=(local_addr[0], port), **options)
            except OSError as error:
                if error.errno != EADDRINUSE:
                    raise
        raise OSError(EADDRINUSE, f"no UDP port is free between {first} and {last}")

    create_datagram_endpoint.in_range = True  # type: ignore[attr-defined]
    loop.create_datagram_endpoint = create_datagram_endpoint  # type: ignore[method-assign,assignment]


def _addresses(use_ipv4: bool, use_ipv6: bool) -> list[str]:
    return (host_addresses if _network.get() else _aioice_addresses)(use_ipv4, use_ipv6)
