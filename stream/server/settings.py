"""What a server is told: where it listens, who may do what, what it may reach, and how much of everything."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from platformdirs import user_videos_path
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

Scope = Literal["publish", "view", "control"]
SCOPES: tuple[Scope, ...] = ("publish", "view", "control")
PORT = 8787


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Tokens(_Section):
    """A secret per scope; the one of `control` opens everything."""

    publish: SecretStr | None = None
    view: SecretStr | None = None
    control: SecretStr | None = None


class IceServer(_Section):
    """One STUN or TURN server, as in RTCIceServer."""

    urls: Annotated[tuple[str, ...], Field(min_length=1, description="stun:host:port, turn:host:port?transport=udp")]
    username: str | None = None
    credential: SecretStr | None = None
    secret: Annotated[SecretStr | None, Field(description="coturn's static-auth-secret: credentials that run out")] = (
        None
    )


class Live(_Section):
    """What every stream starts with, and how many there may be."""

    model: str = "mini"
    engine: str = "auto"
    decode: Annotated[str, Field(description="auto, software, or a device such as cuda")] = "auto"
    encoder: Annotated[str, Field(description="of H.264: auto, x264 or nvenc")] = "auto"
    box: Annotated[tuple[int, int], Field(description="width, height that pictures are fitted into")] = (512, 288)
    max_streams: Annotated[int, Field(ge=1, le=256)] = 8
    batch: Annotated[
        int | None, Field(ge=1, le=16, description="streams whose frames share a launch; by default 4 on a GPU, else 1")
    ] = None
    stall_s: Annotated[float, Field(gt=0, le=600, description="a source silent for so long is stalled")] = 3.0


class ServerSettings(_Section):
    """The `[server]` table of a settings file. Immutable.

    >>> ServerSettings(host="0.0.0.0", tokens={"control": "s3cret"}).exposed
    True
    """

    host: Annotated[str, Field(min_length=1, description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="0: any that is free")] = PORT
    hosts: Annotated[tuple[str, ...], Field(description="names this server is also called by, behind a proxy")] = ()
    origins: Annotated[tuple[str, ...], Field(description="other sites whose pages may use the API")] = ()
    trusted_proxies: Annotated[tuple[str, ...], Field(description="addresses whose X-Forwarded-… is believed")] = ()
    tokens: Tokens = Tokens()
    tls_cert: Path | None = None
    tls_key: Path | None = None

    ice_servers: tuple[IceServer, ...] = ()
    public_ip: Annotated[str | None, Field(description="address seen from outside; put into WebRTC answers")] = None
    udp_ports: Annotated[tuple[int, int] | None, Field(description="first and last UDP port for WebRTC")] = None

    streams: Annotated[dict[str, SecretStr], Field(description="NAME = SOURCE, opened at the start")] = {}
    source_schemes: tuple[str, ...] = ("demo", "test", "rtsp", "rtsps", "rtmp", "rtmps", "srt", "http", "https")
    source_hosts: Annotated[tuple[str, ...], Field(description="hosts a client may name as a source")] = ()
    output_schemes: tuple[str, ...] = (
        "virtualcam", "rtmp", "rtmps", "rtsp", "rtsps", "srt", "whip+http", "whip+https",
    )  # fmt: skip
    output_hosts: Annotated[tuple[str, ...], Field(description="hosts a client may name as an output")] = ()
    recordings: Path = Field(default_factory=lambda: user_videos_path() / "livestyle")

    max_body: Annotated[int, Field(ge=1024, description="bytes of a request")] = 131_072
    max_viewers: Annotated[int, Field(ge=1, description="viewers of all streams together")] = 32
    max_half_open: Annotated[int, Field(ge=1, description="WebRTC sessions that are not connected yet")] = 16
    max_recordings: Annotated[int, Field(ge=1, description="at a time")] = 4
    max_outputs: Annotated[int, Field(ge=1, description="at a time")] = 8
    rate_per_s: Annotated[float, Field(ge=0, description="reads per client; a write counts five; 0: any")] = 100.0

    osc_port: Annotated[int | None, Field(ge=0, le=65535)] = None
    osc_host: str = "127.0.0.1"
    live: Live = Live()

    @model_validator(mode="after")
    def _check(self) -> ServerSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        if self.udp_ports and not 1024 <= self.udp_ports[0] <= self.udp_ports[1] <= 65535:
            raise ValueError("udp_ports is first and last, 1024 to 65535")
        if self.public_ip:
            try:
                ipaddress.ip_address(self.public_ip)
            except ValueError:
                raise ValueError("public_ip is an address such as 203.0.113.9, not a name") from None
        return self

    @property
    def secure(self) -> bool:
        """Whether it speaks HTTPS itself."""
        return self.tls_cert is not None

    @property
    def exposed(self) -> bool:
        """Whether others than this machine can reach it: then every scope needs a token."""
        return not all(is_loopback(name) for name in (self.host, *self.hosts))


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine alone.

    >>> is_loopback("localhost"), is_loopback("127.0.0.2"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
