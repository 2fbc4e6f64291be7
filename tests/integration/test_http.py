"""Requests and their answers before a stream begins: tokens, origins, parameters, and the document of each error."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from bridge import __version__
from deploy.local.node import free_ports
from tests.client import Stream
from tests.conftest import Eventually, OpenStream, StartService
from tests.patience import PATIENCE
from tests.rabbit import Vhost, cloudevent
from tests.service import SECRET, Service, mint

pytestmark = pytest.mark.any_rabbitmq

TOKEN = {"Authorization": f"Bearer {mint('42')}"}
APP = "https://app.example"


async def problem(service: Service, status: int, code: str, path: str = "/events", **options: Any) -> dict[str, Any]:
    response = await service.get(path, **options)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["type"] == f"urn:bridge:problem:{code}"
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    return {**document, "headers": response.headers}


@pytest.mark.contract("2.1", "2.10", "5.44")
async def test_no_token_and_bad_tokens(service: Service) -> None:
    document = await problem(service, 401, "missing-token")
    assert document["headers"]["www-authenticate"] == 'Bearer realm="bridge"'
    document = await problem(service, 401, "invalid-token", headers={"Authorization": "Bearer x.y.z"})
    assert 'error="invalid_token"' in document["headers"]["www-authenticate"]
    expired = {"Authorization": f"Bearer {mint('42', ttl=-35)}"}
    document = await problem(service, 401, "expired-token", headers=expired)
    assert re.search(r"expired \d+ s", document["detail"])
    assert "get a new one" in document["detail"]
    await problem(service, 401, "missing-token", headers={"Authorization": "Basic dTpw"})
    await problem(service, 401, "missing-token", f"/events?access_token={mint('42')}")


@pytest.mark.contract("2.1")
async def test_the_first_of_header_cookie_and_query_is_used(start: StartService) -> None:
    service = await start(QUERY_TOKEN="true", COOKIE="session")
    query = f"access_token={mint('query')}"
    cookie = {"Cookie": f"session={mint('cookie')}"}
    for headers, token, user in [
        (cookie, mint("header"), "header"),
        (cookie, None, "cookie"),
        (None, None, "query"),
        # The authentication of a proxy is ignored.
        ({"Authorization": "Basic dTpw"}, None, "query"),
    ]:
        async with Stream(service.public, token, query=query, headers=headers) as stream:
            assert (await stream.ready()).json["user"] == user
    assert mint("query")[:30] not in service.text
    assert "access_token" not in service.text


@pytest.mark.contract("2.10", "5.37")
@pytest.mark.parametrize(
    "types", ["", ",", "job.*,", "A", "job.**", "a b", "x" * 129, ",".join("abcdefghijklmnopq"), "%23.a.%23.b.%23"]
)
async def test_bad_types(service: Service, types: str) -> None:
    await problem(service, 400, "invalid-types", f"/events?types={types}", headers=TOKEN)


@pytest.mark.contract("5.38")
@pytest.mark.parametrize("name", ["named", "audience"])
async def test_a_bad_value_of_a_flag(service: Service, name: str) -> None:
    await problem(service, 400, f"invalid-{name}", f"/events?{name}=maybe", headers=TOKEN)


@pytest.mark.contract("2.10", "5.40")
@pytest.mark.parametrize("user", ["x" * 249, "x" * 300, "😀" * 75])
async def test_a_user_id_too_long_for_a_key(service: Service, user: str) -> None:
    await problem(service, 403, "id-too-long", headers={"Authorization": f"Bearer {mint(user)}"})
    await problem(service, 403, "id-too-long", headers={"Authorization": f"Bearer {mint('42', user)}"})


@pytest.mark.contract("5.37")
async def test_a_pattern_too_long_together_with_the_id(service: Service) -> None:
    token = {"Authorization": f"Bearer {mint('x' * 200)}"}
    await problem(service, 400, "invalid-types", f"/events?types={'y' * 60}", headers=token)


@pytest.mark.contract("2.10", "6.38")
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_other_methods(service: Service, method: str) -> None:
    document = await problem(service, 405, "method-not-allowed", method=method, headers=TOKEN)
    assert {"GET", "HEAD", "OPTIONS"} <= set(document["headers"]["allow"].split(", "))


@pytest.mark.contract("2.10", "6.27")
async def test_an_accept_that_does_not_admit_a_stream(service: Service, connect: OpenStream) -> None:
    for accept in ["application/json", "text/html, application/json;q=0.9", "text/event-stream;q=0"]:
        await problem(service, 406, "not-acceptable", headers={**TOKEN, "Accept": accept})
    java = "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"
    for accept in ["*/*", "text/*", "text/html, text/event-stream;q=0.1", java, "text/event-stream; charset=utf-8"]:
        assert (await service.get("/events", method="HEAD", headers={**TOKEN, "Accept": accept})).status_code == 200


async def test_two_accept_headers_are_combined(service: Service) -> None:
    accept = [*TOKEN.items(), ("Accept", "text/html"), ("Accept", "text/event-stream")]
    assert (await service.get("/events", method="HEAD", headers=accept)).status_code == 200


@pytest.mark.contract("6.25")
async def test_each_cookie_of_the_name_is_tried(service: Service) -> None:
    good = f"bridge_token={mint('42')}"
    for cookie in [
        f"bridge_token=left.over.one; {good}",
        f"bridge_token={mint('42', ttl=-35)}; {good}",
        f"bridge_token=; {good}",
        f'bridge_token="{mint("42")}"',  # RFC 6265, section 4.1.1: the quotes are not part of the value.
        f"a=\xe9; {good}; b",
    ]:
        headers = {"Cookie": cookie.encode("latin-1")}
        assert (await service.get("/events", method="HEAD", headers=headers)).status_code == 200, cookie
    lines = [("Cookie", "theme=dark"), ("Cookie", good)]  # An HTTP/2 proxy may have split it (RFC 9113, 8.2.3).
    assert (await service.get("/events", method="HEAD", headers=lines)).status_code == 200
    both = {"Cookie": f"bridge_token=x.y.z; bridge_token={mint('42', ttl=-35)}"}
    await problem(service, 401, "expired-token", headers=both)


@pytest.mark.contract("6.24", "6.26")
async def test_forms_of_the_authorization_line(start: StartService) -> None:
    service = await start(QUERY_TOKEN="true")
    for scheme in ["bearer", "BEARER", "Bearer  "]:
        headers = {"Authorization": f"{scheme} {mint('42')}"}
        assert (await service.get("/events", method="HEAD", headers=headers)).status_code == 200
    two = [("Authorization", "Basic dTpw"), ("Authorization", f"Bearer {mint('42')}")]
    assert (await service.get("/events", method="HEAD", headers=two)).status_code == 200
    # An empty bearer token is ignored, so the cookie is used. An empty query parameter is ignored, so the next is used.
    empty = {"Authorization": "Bearer", "Cookie": f"bridge_token={mint('42')}"}
    assert (await service.get("/events", method="HEAD", headers=empty)).status_code == 200
    path = f"/events?access_token=&access_token={mint('42').replace('.', '%2E')}"
    assert (await service.get(path, method="HEAD")).status_code == 200


@pytest.mark.contract("6.26")
async def test_forms_of_the_query_and_the_path(service: Service, connect: OpenStream, vhost: Vhost) -> None:
    for path in ["/events/", "/%65vents", "/events?types=job.*&types=billing.%23", "/events?types=job.*,+billing.x"]:
        assert (await service.get(path, method="HEAD", headers=TOKEN)).status_code == 200, path
    await problem(service, 400, "invalid-types", "/events?types=job.*,+", headers=TOKEN)
    stream = await connect(service, query="types=billing.%23&types=+job.completed%20")
    await vhost.publish("user.42.job.completed", cloudevent("e1"))
    assert await stream.ids(1) == ["e1"]


@pytest.mark.contract("6.28")
async def test_ports_that_a_scheme_implies(start: StartService) -> None:
    service = await start(ALLOWED_ORIGINS=f"{APP}:443")
    for origin, host in [(APP, "x"), (APP + ":443", "x"), ("https://x", "x:443"), ("http://x", "x:80"), ("", "x")]:
        headers = {**TOKEN, "Origin": origin, "Host": host}
        assert (await service.get("/events", method="HEAD", headers=headers)).status_code == 200, origin
    for origin, host in [("http://x", "x:443"), ("https://x:444", "x"), ("null", "null")]:
        await problem(service, 403, "origin-not-allowed", headers={**TOKEN, "Origin": origin, "Host": host})


@pytest.mark.contract("2.10", "6.20", "6.21")
async def test_a_token_that_leaves_groups_out_is_a_403(start: StartService) -> None:
    import jwt

    service = await start()
    claims: dict[str, Any] = {"sub": "42", "exp": 4_000_000_000, "_claim_names": {"groups": "src1"}}
    headers = {"Authorization": f"Bearer {jwt.encode(claims, SECRET, algorithm='HS256')}"}
    document = await problem(service, 403, "groups-elsewhere", headers=headers)
    assert "BRIDGE_JWT_GROUPS_CLAIM" in document["detail"]
    await service.logged("groups not in the token")
    service = await start(JWT_GROUPS_CLAIM="")
    assert (await service.get("/events", method="HEAD", headers=headers)).status_code == 200


@pytest.mark.contract("2.3")
async def test_claims_of_another_name(start: StartService, connect: OpenStream, vhost: Vhost) -> None:
    import jwt

    service = await start(JWT_USER_CLAIM="email", JWT_GROUPS_CLAIM="realm_access.roles")
    claims = {"email": "a@b.example", "realm_access": {"roles": "ops"}, "exp": 4_000_000_000}
    async with Stream(service.public, jwt.encode(claims, SECRET, algorithm="HS256")) as stream:
        assert (await stream.ready()).json["user"] == "a@b.example"
        await vhost.publish("group.ops.job.completed", cloudevent("e1"))
        assert await stream.ids(1) == ["e1"]


@pytest.mark.contract("5.44")
async def test_an_unknown_path_is_a_404(service: Service) -> None:
    await problem(service, 404, "not-found", "/nothing")
    await problem(service, 404, "not-found", "/metrics")
    await problem(service, 404, "unknown-type", "/schemas/no.such")


@pytest.mark.contract("2.13")
async def test_head_gives_the_headers_and_no_stream(service: Service, vhost: Vhost) -> None:
    response = await service.get("/events", method="HEAD", headers=TOKEN)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache, no-transform"
    assert "content-length" not in response.headers
    assert vhost.live_queues() == []
    assert (await service.get("/events", method="HEAD")).status_code == 401


@pytest.mark.contract("2.10", "2.15", "5.39")
async def test_cors_for_exactly_the_origins_allowed(start: StartService, connect: OpenStream) -> None:
    service = await start(ALLOWED_ORIGINS=f"{APP},http://localhost:3000")
    stream = await connect(service, headers={"Origin": APP})
    assert stream.headers["access-control-allow-origin"] == APP
    assert stream.headers["access-control-allow-credentials"] == "true"
    assert stream.headers["vary"] == "Origin"
    for origin in [
        "https://evil.example",
        "https://app.example.evil",
        "http://app.example",
        "null",
        APP + ":444",
        "http://[",
        "x",
    ]:
        document = await problem(service, 403, "origin-not-allowed", headers={**TOKEN, "Origin": origin})
        assert "access-control-allow-origin" not in document["headers"]
        assert "Origin" in document["headers"]["vary"]
    # An allowed page may also read the error document.
    document = await problem(service, 401, "missing-token", headers={"Origin": APP})
    assert document["headers"]["access-control-allow-origin"] == APP


@pytest.mark.contract("5.39")
async def test_a_page_of_the_bridges_own_host_needs_no_permission(service: Service, connect: OpenStream) -> None:
    stream = await connect(service, headers={"Origin": service.public})
    assert "access-control-allow-origin" not in stream.headers


async def test_a_preflight_admits_the_headers_of_fetching_clients(start: StartService) -> None:
    service = await start(ALLOWED_ORIGINS=APP)
    ask = {"Origin": APP, "Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "last-event-id"}
    response = await service.get("/events", method="OPTIONS", headers=ask)
    assert response.status_code == 204
    assert response.headers["access-control-allow-origin"] == APP
    allowed = response.headers["access-control-allow-headers"].lower()
    assert {"authorization", "last-event-id", "cache-control"} <= set(allowed.split(", "))
    assert "GET" in response.headers["access-control-allow-methods"]
    await problem(service, 403, "origin-not-allowed", method="OPTIONS", headers={**ask, "Origin": "https://evil"})


@pytest.mark.contract("2.16", "6.30")
@pytest.mark.parametrize("path", ["/events", "/schemas", "/client.js"])
async def test_a_preflight_admits_what_the_browser_asks_for(start: StartService, path: str) -> None:
    """Sentry and OpenTelemetry add headers of their own to each request of a page."""
    service = await start(ALLOWED_ORIGINS=APP)
    asked = "authorization,baggage,last-event-id,sentry-trace,traceparent,x-requested-with"
    ask = {"Origin": APP, "Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": asked}
    response = await service.get(path, method="OPTIONS", headers=ask)
    assert response.is_success
    assert response.headers["access-control-allow-origin"] == APP
    assert response.headers["access-control-allow-credentials"] == "true"
    assert set(asked.split(",")) <= set(response.headers["access-control-allow-headers"].lower().split(", "))
    varies = {name.strip().lower() for name in response.headers["vary"].split(",")}
    assert varies == {"origin", "access-control-request-headers"}
    # Another origin gets no such header.
    other = await service.get(path, method="OPTIONS", headers={**ask, "Origin": "https://evil"})
    assert not [name for name in other.headers if name.startswith("access-control-")]


@pytest.mark.contract("2.68", "2.69", "2.70")
async def test_the_catalogue_can_be_read(service: Service) -> None:
    schemas = (await service.get("/schemas")).json()
    assert {"job.started", "job.progress", "job.completed"} <= set(schemas)
    one = (await service.get("/schemas/job.completed")).json()
    assert one == schemas["job.completed"]
    assert set(one["properties"]) == {"job_id", "duration_seconds", "result_url"}
    document = (await service.get("/asyncapi.json")).json()
    assert document["asyncapi"] == "3.0.0"
    assert set(document["channels"]["events"]["messages"]) == set(schemas)


@pytest.mark.contract("2.74", "2.76")
async def test_probes_and_metrics_are_on_the_internal_port(service: Service, connect: OpenStream, vhost: Vhost) -> None:
    assert (await service.get("/livez", internal=True)).status_code == 200
    assert (await service.get("/readyz", internal=True)).status_code == 200
    assert (await service.get("/events", internal=True)).status_code == 404
    stream = await connect(service)
    await vhost.publish("user.42.job.completed", cloudevent("e1"))
    await stream.ids(1)
    for name in [
        "bridge_connections",
        "bridge_events_delivered_total",
        "bridge_delivery_seconds_count",
        "bridge_broker_connected",
        "bridge_ready",
        "bridge_log_answers",
        f'bridge_build_info{{version="{__version__}"}}',
    ]:
        assert await service.metric(name) == 1, name
    for series in [
        'bridge_events_invalid_total{reason="schema"}',
        'bridge_replays_total{outcome="gap"}',
        'bridge_streams_ended_total{reason="client"}',
    ]:
        assert await service.metric(series) == 0


@pytest.mark.contract("2.1")
async def test_a_stream_is_two_log_lines_without_a_token(
    start: StartService, connect: OpenStream, vhost: Vhost
) -> None:
    service = await start(QUERY_TOKEN="true")
    stream = await connect(service, "someone", "ops", query="types=job.*")
    await vhost.publish("user.someone.job.completed", cloudevent("e1"))
    await stream.ids(1)
    await stream.close()
    opened = await service.logged("stream opened")
    ended = await service.logged("stream ended")
    assert (opened["user"], opened["types"], opened["groups"]) == ("someone", ["job.*"], 1)
    assert (ended["reason"], ended["events"], ended["stream"]) == ("client", 1, opened["stream"])
    assert ended["seconds"] >= 0
    for bad in ["?access_token=" + mint("x"), ""]:
        await service.get("/events" + bad, headers={"Authorization": "Bearer " + mint("x", ttl=-1)})
    assert "eyJ" not in service.text
    assert "guest:guest" not in service.text


@pytest.mark.contract("2.4")
async def test_keys_from_a_jwks_file_beside_the_secret(start: StartService, tmp_path: Path) -> None:
    import jwt
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key = ed25519.Ed25519PrivateKey.generate()
    jwk = jwt.get_algorithm_by_name("EdDSA").to_jwk(key.public_key(), as_dict=True)
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [{**jwk, "kid": "k1"}]}))
    service = await start(JWKS=str(tmp_path / "keys.json"))
    token = jwt.encode({"sub": "ed", "exp": 4_000_000_000}, key, algorithm="EdDSA", headers={"kid": "k1"})
    async with Stream(service.public, token) as stream:
        assert (await stream.ready()).json["user"] == "ed"
    async with Stream(service.public, mint("hs")) as stream:
        assert (await stream.ready()).json["user"] == "hs"


@pytest.mark.contract("5.41")
async def test_a_token_that_cannot_be_verified_yet_is_busy_and_counted(start: StartService) -> None:
    import jwt
    from cryptography.hazmat.primitives.asymmetric import ed25519

    service = await start(JWKS="http://127.0.0.1:1/keys", LOG="")
    key = ed25519.Ed25519PrivateKey.generate()
    token = jwt.encode({"sub": "ed", "exp": 4_000_000_000}, key, algorithm="EdDSA", headers={"kid": "k1"})
    async with Stream(service.public, token) as stream:
        (bye,) = await stream.rest()
    assert (stream.status, bye.event, bye.json) == (200, "bridge.bye", {"reason": "busy"})
    await service.logged("token not judged")
    assert await service.metric('bridge_streams_ended_total{reason="busy"}') == 1
    assert math.isnan(await service.metric("bridge_log_answers"))  # There is no log.


@pytest.mark.contract("5.43")
async def test_an_upgrade_to_http_2_is_ignored(service: Service, vhost: Vhost) -> None:
    """Java's HttpClient and curl offer this upgrade by themselves (RFC 9110, section 7.8)."""
    upgrade = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    async with Stream(service.public, mint("42"), headers=upgrade) as stream:
        assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream")
        assert "upgrade" not in stream.headers
        await stream.ready()
        await vhost.publish("user.42.job.completed", cloudevent("e1"))
        assert await stream.ids(1) == ["e1"]
    assert (await service.get("/livez", internal=True, headers=upgrade)).json()["status"] == "alive"
    assert (await service.get("/schemas", headers={**upgrade, "Upgrade": "TLS/1.0, h2c"})).status_code == 200


@pytest.mark.contract("5.43")
async def test_http_2_without_tls_is_refused(service: Service) -> None:
    reader, writer = await asyncio.open_connection(*service.public.removeprefix("http://").split(":"))
    # The preface, empty SETTINGS, and complete HEADERS of GET http://x/events, encoded with the static table.
    head = bytes.fromhex("82 86 41 01 78 04 07") + b"/events"
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0")
    writer.write(len(head).to_bytes(3, "big") + b"\x01\x05\0\0\0\x01" + head)
    async with asyncio.timeout(PATIENCE):
        answer = await reader.readuntil(b"urn:bridge:problem:http-version")
    assert b"text/event-stream" not in answer
    assert b"HTTP/1.1 101" not in answer
    writer.close()
    assert await service.metric("bridge_connections") == 0


async def test_a_client_that_hangs_up_after_an_answer_leaves_no_connection(
    start: StartService, eventually: Eventually
) -> None:
    service = await start(deadlines={"service.http.entrance.KEEP_ALIVE_SECONDS": 10 * PATIENCE})
    before = len(os.listdir(f"/proc/{service.pid}/fd"))
    for read in (True, False):
        for _ in range(20):
            stream = Stream(service.public, mint("42", ttl=-1))
            await stream.open()
            assert stream.status == 401
            if read:
                await stream.body()
            await stream.close()
    await eventually(lambda: len(os.listdir(f"/proc/{service.pid}/fd")) <= before)


@pytest.mark.contract("6.4")
async def test_a_rotated_key_is_busy_until_it_is_known_and_an_unknown_key_is_refused(
    start: StartService, tmp_path: Path
) -> None:
    import jwt
    from cryptography.hazmat.primitives.asymmetric import ed25519

    old, new = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
    document = tmp_path / "keys.json"

    def show(**keys: ed25519.Ed25519PrivateKey) -> None:
        algorithm = jwt.get_algorithm_by_name("EdDSA")
        jwks = [{**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid} for kid, key in keys.items()]
        document.write_text(json.dumps({"keys": jwks}))

    def token(key: ed25519.Ed25519PrivateKey, kid: str) -> str:
        return jwt.encode({"sub": "ed", "exp": 4_000_000_000}, key, algorithm="EdDSA", headers={"kid": kid})

    show(old=old)
    service = await start(JWKS=str(document))
    other = {"Authorization": f"Bearer {token(new, 'no-such')}"}
    document_of = await problem(service, 401, "invalid-token", headers=other)
    assert "does not have key 'no-such'" in document_of["detail"]
    document.write_text("<html>under construction</html>")
    for _ in range(2):
        async with Stream(service.public, token(new, "new")) as stream:
            (bye,) = await stream.rest()
        assert (stream.status, bye.json) == (200, {"reason": "busy"})
    show(old=old, new=new)
    async with Stream(service.public, token(new, "new")) as stream:
        assert (await stream.ready()).json["user"] == "ed"
    async with Stream(service.public, token(old, "old")) as stream:
        await stream.ready()


@pytest.mark.contract("2.75", "6.10")
@pytest.mark.parametrize(
    "first", [b"404 Not Found\r\n\r\n", b"200 OK\r\n\r\n<html>", b'200 OK\r\n\r\n{"keys": []}', None]
)
async def test_not_ready_before_a_key_set_was_read_once(start: StartService, first: bytes | None) -> None:
    """With a wrong address of the key set (None: no server), a rollout must not succeed."""
    import jwt
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key = ed25519.Ed25519PrivateKey.generate()
    jwk = jwt.get_algorithm_by_name("EdDSA").to_jwk(key.public_key(), as_dict=True)
    good = b"200 OK\r\n\r\n" + json.dumps({"keys": [jwk]}).encode()
    response = first

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 " + (response or b""))
        writer.close()

    (port,) = free_ports(1)
    server = await asyncio.start_server(answer, "127.0.0.1", port) if first else None
    url = f"http://127.0.0.1:{port}/keys"
    service = await start(
        JWKS=f"http://me:hidden@127.0.0.1:{port}/keys", deadlines={"service.http.keys.FIRST_READ_EVERY_SECONDS": 0.1}
    )
    for path in ("/readyz", "/readyz?exclude=broker&exclude=connections"):
        ready = await service.get(path, internal=True)
        assert ready.status_code == 503
        assert url.replace("//", "//***@") in ready.json()["reason"]
    assert await service.metric("bridge_ready") == 0
    assert (await service.get("/livez", internal=True)).status_code == 200
    response = good
    server = server or await asyncio.start_server(answer, "127.0.0.1", port)
    await service.logged("key set read")
    assert (await service.get("/readyz", internal=True)).status_code == 200
    # A key set that was read once stays in use, even if its endpoint fails.
    response = b"503 Service Unavailable\r\n\r\n"
    failures = sum(line["event"] == "key set not read" for line in service.lines)
    other = jwt.encode({"sub": "ed", "exp": 4_000_000_000}, ed25519.Ed25519PrivateKey.generate(), algorithm="EdDSA")
    await service.get("/events", headers={"Authorization": f"Bearer {other}"})
    await service.logged("key set not read", count=failures + 1)
    assert (await service.get("/readyz", internal=True)).status_code == 200
    assert "hidden" not in service.text
    server.close()


@pytest.mark.contract("2.17", "2.18", "2.20", "2.21")
async def test_the_identity_names_what_the_stream_may_show(start: StartService, connect: OpenStream) -> None:
    service = await start(ALLOWED_ORIGINS=APP)

    async def identity(user: str, *groups: str) -> str:
        headers = {"Authorization": f"Bearer {mint(user, *groups)}", "Origin": APP}
        response = await service.get("/events", method="HEAD", headers=headers)
        exposed = response.headers["access-control-expose-headers"]
        assert {"bridge-identity", "retry-after"} <= {name.strip().lower() for name in exposed.split(",")}
        return response.headers["bridge-identity"]

    mine = await identity("42", "ops", "dev")
    assert mine == await identity("42", "dev", "ops")
    assert len({mine, await identity("42"), await identity("42", "ops"), await identity("43", "ops", "dev")}) == 4
    stream = await connect(service, "42", "ops", "dev")
    assert stream.headers["bridge-identity"] == mine
    assert stream.frames[0].json["identity"] == mine
    refused = await service.get("/events", headers={"Origin": APP})
    assert "bridge-identity" not in refused.headers


@pytest.mark.contract("2.21")
async def test_a_token_that_is_not_valid_yet_has_no_identity(service: Service) -> None:
    now = int(time.time())
    # The token becomes valid later; until then the answer is `busy`.
    token = jwt.encode({"sub": "42", "exp": now + 9000, "nbf": now + 250}, SECRET, algorithm="HS256")
    answer = await service.get("/events", method="HEAD", headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 200
    assert answer.headers["bridge-identity"] == "unknown"
