"""Names, origins, rates and sizes: what every request has to pass first."""

from __future__ import annotations

import http.client
import socket
from pathlib import Path

import pytest

from stream.server.limits import Rate
from tests.fakes import PATIENCE
from tests.serving import Serving, serving


def test_a_bucket_fills_with_time_and_no_further() -> None:
    rate = Rate(10.0)
    assert rate.take("ada", 30.0, now=0.0) == 0.0
    assert rate.take("ada", 5.0, now=0.0) == 0.5
    assert rate.take("bob", 30.0, now=0.0) == 0.0  # each his own
    assert rate.take("ada", 5.0, now=0.5) == 0.0
    assert rate.take("ada", 30.0, now=1000.0) == 0.0
    assert rate.take("ada", 1.0, now=1000.0) > 0
    assert Rate(0.0).take("ada", 1e9, now=0.0) == 0.0  # no limit


def test_buckets_are_bounded() -> None:
    rate = Rate(1.0)
    for i in range(10_000):
        rate.take(str(i), 1.0, now=0.0)
    assert len(rate._buckets) == 4096


def ask(s: Serving, method: str, path: str, body: bytes = b"", **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", int(s.url.rpartition(":")[2]), timeout=PATIENCE)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body or None, names)
    status = connection.getresponse().status
    connection.close()
    return status


def test_a_name_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        port = s.url.rpartition(":")[2]
        for host in ("localhost", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST.", "x.localhost"):
            assert ask(s, "GET", "/healthz", Host=host) == 200, host
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1.evil.example",
            "192.168.1.5",
            "",
            "localhost@x",
        ):
            assert ask(s, "GET", "/healthz", Host=host) in (400, 421), host


def test_behind_the_network_addresses_are_names_enough(tmp_path: Path) -> None:
    with serving(tmp_path, host="0.0.0.0", hosts=("video.example",), tokens={"control": "do"}) as s:
        for host in ("192.168.1.5:8787", "[fe80::1]", "video.example", socket.gethostname()):
            assert ask(s, "GET", "/healthz", Host=host) == 200, host
        assert ask(s, "GET", "/healthz", Host="evil.example") == 421


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_pages_of_other_sites_change_nothing(tmp_path: Path, method: str) -> None:
    with serving(tmp_path, origins=("https://show.example",)) as s:
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://[bad"):
            assert ask(s, method, "/api/v1/streams/cam", Origin=origin) == 403, origin
            assert ask(s, "POST", "/whip/cam", Origin=origin) == 403
        for origin in (s.url, "https://show.example"):
            assert ask(s, method, "/api/v1/streams/cam", Origin=origin) in (404, 405)
        assert ask(s, "GET", "/api/v1/streams", Origin="http://evil.example") == 200  # it cannot read the answer


def test_with_a_token_whip_is_open_to_other_sites(tmp_path: Path) -> None:
    with serving(tmp_path, tokens={"control": "do"}) as s:
        elsewhere = {"Origin": "http://studio.example", "Authorization": "Bearer do"}
        assert ask(s, "POST", "/whip/cam", b"x", **elsewhere) == 415
        assert ask(s, "DELETE", "/api/v1/streams/cam", **elsewhere) == 403


def test_a_body_that_is_too_large_is_413_whatever_it_claims(tmp_path: Path) -> None:
    with serving(tmp_path, max_body=2048) as s:
        json = {"Content_Type": "application/json"}
        assert ask(s, "POST", "/api/v1/streams", b" " * 2049, **json) == 413
        assert ask(s, "POST", "/api/v1/streams", b" " * 2048, **json) == 422
        chunks = (b" " * 1024 for _ in range(3))
        connection = http.client.HTTPConnection("127.0.0.1", int(s.url.rpartition(":")[2]), timeout=PATIENCE)
        connection.request("POST", "/api/v1/streams", chunks, {"Content-Type": "application/json"}, encode_chunked=True)
        assert connection.getresponse().status in (413, 422)
        connection.close()
        assert ask(s, "POST", "/whip/cam", b"v" * 2049, Content_Type="application/sdp") == 413


def test_too_many_requests_are_429_and_others_are_not_held_up(tmp_path: Path) -> None:
    with serving(tmp_path, rate_per_s=10) as s:
        statuses = [s.client.delete("/api/v1/streams/cam") for _ in range(12)]
        assert [answer.status_code for answer in statuses][:6] == [404] * 6
        assert statuses[-1].status_code == 429
        assert int(statuses[-1].headers["retry-after"]) >= 1


def test_answers_tell_browsers_to_be_careful(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        headers = s.client.get("/api/v1/info").headers
        assert headers["referrer-policy"] == "no-referrer"  # addresses carry tokens
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers
