"""Two network namespaces joined by a cable, for tests over a network that loses packets; needs root, ip and nft."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]


def missing() -> str | None:
    """What this machine lacks for `cable`, or None."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("nft"):
        return "needs root and nft"
    trial = f"livestyle-{os.getpid()}-trial"
    if subprocess.run(["ip", "netns", "add", trial], capture_output=True).returncode:
        return "needs root and nft: no network namespaces here"
    done = subprocess.run(["ip", "netns", "exec", trial, "nft", _dropping(1)], capture_output=True)
    subprocess.run(["ip", "netns", "delete", trial], check=True)
    return "needs root and nft: no random numbers in nft here" if done.returncode else None


def _dropping(percent: int) -> str:
    return f"""
        add table ip loss
        add chain ip loss incoming {{ type filter hook input priority 0; }}
        add rule ip loss incoming ip protocol udp numgen random mod 100 < {percent} drop
    """


class Namespace:
    """One end of the cable."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address

    def run(self, *command: str) -> None:
        """Run a command here and wait for it."""
        subprocess.run(["ip", "netns", "exec", self.name, *command], check=True, capture_output=True)

    def python(self, *arguments: str) -> subprocess.Popen[str]:
        """Start Python here, with its standard input and output as pipes of lines."""
        command = ["ip", "netns", "exec", self.name, sys.executable, *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)

    def lose(self, percent: int) -> None:
        """Of a hundred UDP datagrams that arrive here drop so many, each by chance."""
        self.run("nft", _dropping(percent))


@contextmanager
def cable() -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces that reach each other, and nothing else; gone afterwards."""
    ends = [Namespace(f"livestyle-{os.getpid()}-{n}", f"198.18.7.{n + 1}") for n in range(2)]
    links = [f"ls{os.getpid() % 100_000}-{n}" for n in range(2)]
    try:
        for end in ends:
            subprocess.run(["ip", "netns", "add", end.name], check=True)
        peer = ["peer", "name", links[1], "netns", ends[1].name]
        subprocess.run(["ip", "link", "add", links[0], "netns", ends[0].name, "type", "veth", *peer], check=True)
        for end, link in zip(ends, links, strict=True):
            end.run("ip", "address", "add", f"{end.address}/24", "dev", link)
            end.run("ip", "link", "set", link, "up")
            end.run("ip", "link", "set", "lo", "up")
        yield ends[0], ends[1]
    finally:
        for end in ends:
            subprocess.run(["ip", "netns", "delete", end.name], check=False)


@contextmanager
def an_address() -> Iterator[bool]:
    """An address besides 127.0.0.1, which aiortc leaves out; False where there is none and none can be made."""
    from aioice.ice import get_host_addresses

    if get_host_addresses(True, True):
        yield True
        return
    name, made = f"ls{os.getpid() % 100_000}", False
    with suppress(FileNotFoundError):
        commands = [
            ["ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}p"],
            ["ip", "address", "add", "198.18.9.1/24", "dev", name],
            ["ip", "link", "set", name, "up"],
            ["ip", "link", "set", f"{name}p", "up"],
        ]
        made = all(subprocess.run(command, capture_output=True).returncode == 0 for command in commands)
    try:
        yield made
    finally:
        if made:
            subprocess.run(["ip", "link", "delete", name], check=False)
