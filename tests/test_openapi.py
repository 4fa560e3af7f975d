"""The OpenAPI document: complete, and nothing it allows makes the server crash or answer in another form."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import CHECKS

from tests.fakes import PATIENCE
from tests.serving import serving

EXAMPLES = 4  # of every operation
CHECKED = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")
ENDLESS = ["/stream/{name}.mjpg", "/stream/{name}.ts"]
CONTRACT = {
    "/api/v1/info": {"get"},
    "/api/v1/schema": {"get"},
    "/api/v1/styles": {"get"},
    "/api/v1/models": {"get"},
    "/api/v1/streams": {"get", "post"},
    "/api/v1/streams/{name}": {"get", "delete"},
    "/api/v1/streams/{name}/params": {"get", "patch"},
    "/api/v1/streams/{name}/source": {"put", "delete"},
    "/api/v1/streams/{name}/recordings": {"get", "post"},
    "/api/v1/streams/{name}/recordings/{id}": {"delete"},
    "/api/v1/recordings/{id}": {"get"},
    "/api/v1/streams/{name}/outputs": {"get", "post"},
    "/api/v1/streams/{name}/outputs/{id}": {"delete"},
    "/api/v1/qr": {"get"},
    "/stream/{name}.jpg": {"get"},
    "/stream/{name}.mjpg": {"get"},
    "/stream/{name}.ts": {"get"},
    "/metrics": {"get"},
    "/healthz": {"get"},
    "/readyz": {"get"},
    "/whip/{stream}": {"get", "post", "options", "head"},
    "/whep/{stream}/{secret}": {"get", "patch", "delete", "options", "head"},
}


def test_the_document_has_every_route_and_how_to_bring_a_token(tmp_path: Path) -> None:
    with serving(tmp_path) as s:
        document = s.client.get("/api/v1/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "token"}
    for path, methods in CONTRACT.items():
        assert methods <= set(document["paths"][path]), path
    ids = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(ids) == len(set(ids))


@schemathesis.serializer("application/sdp", "application/trickle-ice-sdpfrag")
def as_text(context: Any, value: Any) -> bytes:
    """Bodies of WHIP and WHEP."""
    return str(value).encode("utf-8", "surrogatepass")


def try_out(url: str, cases: Any, positive: bool, checks: Any) -> None:
    """Valid or invalid requests for one operation."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def attempt(case: schemathesis.Case) -> None:
        if positive and case.method != "DELETE" and "name" in case.path_parameters:
            case.path_parameters["name"] = "cam"  # else most are 404
        response = case.call(base_url=url, timeout=PATIENCE)
        assert response.status_code != 500, case.as_curl_command()
        if response.status_code >= 400 and case.method != "HEAD":
            assert set(response.json()) == {"error", "hint"}
        case.validate_response(response, checks=checks)

    with suppress(Unsatisfiable):  # nothing invalid can be sent where there is nothing to send
        attempt()


def test_nothing_that_it_allows_makes_the_server_crash(tmp_path: Path, caplog) -> None:  # type: ignore[no-untyped-def]
    with serving(tmp_path) as s:
        document = s.client.get("/api/v1/openapi.json").json()
    # All of schemathesis is imported before other threads run: two that compile at a time trip over gh-106905.
    schema = schemathesis.openapi.from_dict(document).exclude(path=ENDLESS)
    strategies = [
        (found.ok().as_strategy(generation_mode=mode), mode == schemathesis.GenerationMode.POSITIVE)
        for found in schema.get_all_operations()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
        if mode == schemathesis.GenerationMode.POSITIVE or found.ok().method in ("post", "put", "patch")
    ]
    checks = CHECKS.get_by_names(CHECKED)
    with serving(tmp_path, max_body=4096, live={"max_streams": 4}, max_recordings=2) as s:
        stream = s.stream("cam")
        with caplog.at_level(logging.ERROR), httpx.Client(base_url=s.url) as client:
            for cases, positive in strategies:
                try_out(s.url, cases, positive, checks)
            assert client.get("/healthz").status_code == 200
        assert stream.phase in ("live", "waiting")
        assert not [record for record in caplog.records if record.exc_info]
