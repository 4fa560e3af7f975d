"""What a viewer's offer asks for, and whether we can serve it (draft-ietf-wish-whep-03 §4.2, RFC 9725 §4.4)."""

from __future__ import annotations

from collections.abc import Sequence

import aiortc.codecs
from aiortc.rtcpeerconnection import find_common_codecs
from aiortc.rtcrtpparameters import RTCRtpCodecCapability
from aiortc.rtcrtpsender import RTCRtpSender
from aiortc.sdp import MediaDescription, SessionDescription

CODECS = {"h264": "video/h264", "vp8": "video/vp8"}  # ours, best first → as SDP names it


class Malformed(ValueError):
    """Not a session description that WebRTC can use: status 400."""


class Unusable(Exception):
    """A session description that asks for what cannot be given: status 422."""


def parse(text: str) -> SessionDescription:
    """Read a description and check that each section has what ICE and DTLS need; raises `Malformed`."""
    try:
        description = SessionDescription.parse(text)
        sections = description.media
        whole = all(
            media.ice and media.ice.usernameFragment and media.ice.password and media.dtls and media.dtls.fingerprints
            for media in sections
        )
    except Exception as error:  # noqa: BLE001 aiortc's parser raises anything at all on what strangers send
        raise Malformed(f"the session description could not be read ({type(error).__name__})") from None
    if not sections:
        raise Malformed("the session description has no media section")
    if not whole:
        raise Malformed("a media section lacks ICE credentials or a DTLS fingerprint")
    mids = [media.rtp.muxId for media in sections]
    if not all(mids) or len(set(mids)) != len(mids):
        raise Malformed("every media section needs an a=mid of its own")
    if any(media.kind in ("audio", "video") and not media.rtcp_mux for media in sections):
        raise Malformed("a media section lacks a=rtcp-mux")
    return description


def wanted(media: Sequence[MediaDescription]) -> tuple[tuple[str, ...], bool]:
    """Of a viewer's offer: the codecs it can decode, best first, and whether it takes sound.

    Raises `Unusable` rather than serve a part of it.

    >>> wanted(parse(offer).media)
    (('h264', 'vp8'), True)
    """
    kinds = [section.kind for section in media]
    if any(kind not in ("video", "audio", "application") for kind in kinds):
        raise Unusable("a viewer may ask for video, audio and a data channel, nothing else")
    if kinds.count("video") != 1 or kinds.count("audio") > 1 or kinds.count("application") > 1:
        raise Unusable("a viewer must ask for exactly one video, and at most one audio and one data section")
    for section in media:
        if not section.port:
            raise Unusable(f"the {section.kind} section is switched off (port 0)")
        if section.kind != "application" and section.direction not in ("recvonly", "sendrecv"):
            raise Unusable(f"the {section.kind} section is {section.direction}: a viewer receives")
    video = media[kinds.index("video")]
    codecs = tuple(name for name in CODECS if _common(video, CODECS[name]))
    if not codecs:
        raise Unusable("no usable video codec: offer H.264 (baseline, packetization-mode=1) or VP8")
    if "audio" in kinds and not _common(media[kinds.index("audio")], "audio/opus"):
        raise Unusable("no usable audio codec: offer Opus")
    return codecs, "audio" in kinds


def preferences(kind: str, mime: str) -> list[RTCRtpCodecCapability]:
    """Capabilities for `setCodecPreferences`: one codec, constrained baseline first, and its retransmission."""
    capabilities = RTCRtpSender.getCapabilities(kind).codecs
    chosen = [codec for codec in capabilities if codec.mimeType.lower() == mime]
    chosen.sort(key=lambda codec: str(codec.parameters.get("profile-level-id", "")), reverse=True)  # 42e01f, 42001f
    return chosen + [codec for codec in capabilities if codec.mimeType.lower() == "video/rtx"]


def _common(media: MediaDescription, mime: str) -> bool:
    common = find_common_codecs(aiortc.codecs.CODECS[media.kind], media.rtp.codecs)
    return any(codec.mimeType.lower() == mime for codec in common)
