"""An offer before any peer is made for it: read, checked, and brought into the form that aiortc takes."""

from __future__ import annotations

from dataclasses import dataclass

from aiortc import RTCIceCandidate
from aiortc.codecs import CODECS
from aiortc.rtcpeerconnection import find_common_codecs
from aiortc.sdp import DIRECTIONS, MediaDescription

from stream.rtc.ice import MAX_CANDIDATES, candidate_of
from stream.rtc.sdp import Malformed, Unusable, parse

MAX_LINES = 2000  # a browser with every codec sends about 300; aiortc's parser is quadratic in some of them

TAKEN_OUT = ("a=candidate:", "a=end-of-candidates", "a=group:BUNDLE")


@dataclass(frozen=True, slots=True)
class Offer:
    """An offer that was read; what it wants is not judged yet."""

    sdp: str  # for aiortc: without candidates and BUNDLE, each section with its direction
    username: str  # ICE ufrag of its session
    candidates: tuple[RTCIceCandidate, ...]  # those of any use
    media: tuple[MediaDescription, ...]

    def publishes(self) -> None:
        """Raise Unusable unless it is one video, and at most one audio and one data section, sent to us."""
        kinds = [media.kind for media in self.media]
        if any(kind not in ("audio", "video", "application") for kind in kinds):
            raise Unusable("a publisher may offer video, audio and a data channel, nothing else")
        if kinds.count("video") != 1 or kinds.count("audio") > 1 or kinds.count("application") > 1:
            raise Unusable("a publisher must offer exactly one video, and at most one audio and one data section")
        for media in self.media:
            if not media.port:
                raise Unusable(f"the {media.kind} section is switched off (port 0)")
            if media.kind != "application":
                _check_media(media)
            elif media.fmt != ["webrtc-datachannel"] or not media.sctp_port:
                raise Unusable("the data section must be webrtc-datachannel with a=sctp-port")


def read(text: str) -> Offer:
    """Read an offer; raises Malformed, or Unusable where its sections are not on one transport.

    Candidates are taken out, their end too: aiortc hears of them afterwards, and only of those worth a try. So is the
    BUNDLE group: our peers have one transport anyhow, and aiortc 1.16 stops it where the group's first section is not
    the one that it was made for.

    >>> read(text).publishes()
    """
    lines = text.splitlines()
    if not lines or lines[0].strip() != "v=0":
        raise Malformed("not a session description: it does not begin with v=0")
    if len(lines) > MAX_LINES:
        raise Malformed(f"a session description of more than {MAX_LINES} lines")
    session, *sections = _sections(lines)
    found = [candidate_of(line[12:]) for line in lines if line.startswith("a=candidate:")]
    plain = [*session, *(line for section in sections for line in _directed(section))]
    sdp = "\r\n".join(line for line in plain if not line.startswith(TAKEN_OUT)) + "\r\n"
    media = tuple(parse(sdp).media)
    bundled = next((line.split()[1:] for line in session if line.startswith("a=group:BUNDLE ")), [])
    if len(media) > 1 and {section.rtp.muxId for section in media} != set(bundled):
        raise Unusable("all sections must be bundled on one transport (a=group:BUNDLE)")
    for section in media:
        _common(section)
    usable = [candidate for candidate in found if candidate is not None]
    ice = media[0].ice
    assert ice is not None  # `parse` has looked
    return Offer(sdp, str(ice.usernameFragment), tuple(usable[:MAX_CANDIDATES]), media)


def _sections(lines: list[str]) -> list[list[str]]:
    """The session's lines, then those of each media section."""
    sections: list[list[str]] = [[]]
    for line in lines:
        if line.startswith("m="):
            sections.append([])
        sections[-1].append(line)
    return sections


def _directed(section: list[str]) -> list[str]:
    """A media section that says its direction: sendrecv where it does not (RFC 8866 §6.7)."""
    if section[0].startswith("m=application") or any(line[2:] in DIRECTIONS for line in section):
        return section
    return [*section, "a=sendrecv"]


def _check_media(media: MediaDescription) -> None:
    if media.direction not in ("sendonly", "sendrecv"):
        raise Unusable(f"the {media.kind} section is {media.direction}: a publisher sends")
    if not media.profile.endswith("TLS/RTP/SAVPF"):
        raise Unusable(f"the {media.kind} section must be UDP/TLS/RTP/SAVPF")
    if not _common(media):
        known = "H.264 baseline or VP8" if media.kind == "video" else "Opus"
        raise Unusable(f"no usable {media.kind} codec: offer {known}")


def _common(media: MediaDescription) -> int:
    """How many of our codecs are in a section; raises Malformed."""
    try:
        return len(find_common_codecs(CODECS.get(media.kind, []), media.rtp.codecs))
    except Exception as error:  # noqa: BLE001 aiortc looks at a stranger's parameters as if they were all well
        raise Malformed(f"a codec of the {media.kind} section could not be read ({type(error).__name__})") from None
