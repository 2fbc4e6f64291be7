"""The HTTP routes, with real requests on loopback: their answers before the first byte of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Set
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bridge.amqp import BrokerUnavailable
from bridge.service.broker.control import Control, Kicked, Users, UserStreams
from bridge.service.http.claims import Subscriber
from bridge.service.http.web import IDENTITY, UNKNOWN_IDENTITY, create_internal_app, problem_document
from bridge.service.metrics import Metrics
from bridge.service.revocations import Revocations
from deploy.local.node import free_ports
from tests.client import Stream
from tests.service import SECRET, mint
from tests.unit.loopback import BODY, KEY, serving, site, until

ALLOWED = "https://app.example"
ED25519 = Ed25519PrivateKey.generate()


def bearer(user: str = "42", *groups: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {mint(user, *groups)}"}


async def test_an_event_reaches_the_stream_of_its_user() -> None:
    async with site() as here, here.stream() as stream:
        ready = await stream.ready()
        assert ready.json["user"] == "42"
        assert stream.headers["content-type"] == "text/event-stream"
        assert stream.headers["cache-control"] == "no-cache, no-transform"
        assert ready.json["identity"] == stream.headers[IDENTITY.lower()]
        here.queues.made[0].on_delivery(KEY, BODY)
        assert (await stream.next_event())["id"] == "e1"


async def test_a_head_request_opens_no_stream() -> None:
    async with site() as here:
        answer = await here.client.head("/events", headers=bearer())
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream")
        assert here.queues.made == []


@pytest.mark.parametrize(
    ("path", "headers", "status", "code"),
    [
        ("/events", {}, 401, "missing-token"),
        ("/events", {"Authorization": "Bearer x.y.z"}, 401, "invalid-token"),
        ("/events", {**bearer(), "Accept": "text/html"}, 406, "not-acceptable"),
        ("/events", {**bearer(), "Origin": "https://evil.example"}, 403, "origin-not-allowed"),
        ("/events", {**bearer(), "Origin": "null"}, 403, "origin-not-allowed"),
        ("/events?types=a..b", bearer(), 400, "invalid-types"),
        ("/events?named=maybe", bearer(), 400, "invalid-named"),
        ("/events?audience=1", bearer(), 400, "invalid-audience"),
        ("/events?types=" + "a" * 200, bearer("u" * 100), 400, "invalid-types"),
        ("/events", bearer("u" * 300), 403, "id-too-long"),
        ("/events", bearer("42", "g" * 300), 403, "id-too-long"),
        ("/schemas/none.such", {}, 404, "unknown-type"),
        ("/nothing", {}, 404, "not-found"),
        ("/console/none.js", {}, 404, "not-found"),
    ],
)
async def test_a_refusal_is_a_status_with_a_problem_document(
    path: str, headers: dict[str, str], status: int, code: str
) -> None:
    async with site(console="true") as here:
        answer = await here.client.get(path, headers=headers)
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.json()["type"] == f"urn:bridge:problem:{code}"
        assert here.queues.made == [], "the broker got no request"


async def test_a_challenge_names_the_fault_of_a_token() -> None:
    async with site() as here:
        missing = await here.client.get("/events")
        assert missing.headers["www-authenticate"] == 'Bearer realm="bridge"'
        bad = await here.client.get("/events", headers={"Authorization": "Bearer x"})
        assert 'error="invalid_token"' in bad.headers["www-authenticate"]


async def test_a_token_whose_groups_are_elsewhere_is_refused_with_the_setting_to_change() -> None:
    claims = {"sub": "42", "exp": time.time() + 3600, "_claim_names": {"groups": "src1"}}
    token = jwt.encode(claims, SECRET, "HS256")
    async with site() as here:
        answer = await here.client.get("/events", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 403
        assert "BRIDGE_JWT_GROUPS_CLAIM" in answer.json()["detail"]


async def test_a_token_that_cannot_be_judged_now_gets_a_stream_that_says_busy() -> None:
    (port,) = free_ports(1)
    async with site(jwt_secret=None, jwks=f"http://127.0.0.1:{port}/keys") as here:
        token = jwt.encode({"sub": "42", "exp": time.time() + 3600}, ED25519, "EdDSA")
        async with Stream(here.url, token) as stream:
            (bye,) = await stream.rest()
            assert (bye.event, bye.json["reason"]) == ("bridge.bye", "busy")
            assert stream.headers[IDENTITY.lower()] == UNKNOWN_IDENTITY


async def test_a_page_of_an_allowed_origin_may_read_answers_and_errors() -> None:
    async with site(allowed_origins=ALLOWED) as here:
        refused = await here.client.get("/events", headers={"Origin": ALLOWED})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == ALLOWED
        preflight = await here.client.options(
            "/events", headers={"Origin": ALLOWED, "Access-Control-Request-Headers": "authorization"}
        )
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-methods"] == "GET, HEAD"
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        other = await here.client.options("/events", headers={"Origin": "https://evil.example"})
        assert other.status_code == 403
        assert "access-control-allow-origin" not in other.headers


async def test_a_page_of_the_bridges_own_host_needs_no_permission() -> None:
    async with site() as here:
        answer = await here.client.get("/events", headers={"Origin": here.url})
        assert answer.status_code == 401, "the origin is allowed, the token is missing"


async def test_files_and_documents_are_served_with_validators() -> None:
    async with site(console="true") as here:
        first = await here.client.get("/client.js")
        again = await here.client.get("/client.js", headers={"If-None-Match": first.headers["etag"]})
        assert (first.status_code, again.status_code) == (200, 304)
        schemas = (await here.client.get("/schemas")).json()
        one = (await here.client.get("/schemas/job.completed")).json()
        assert schemas["job.completed"] == one
        assert (await here.client.get("/asyncapi.json")).json()["asyncapi"].startswith("3.")
        assert (await here.client.get("/openapi.json")).json()["openapi"].startswith("3.")
        page = await here.client.get("/")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert b"data-development" not in page.content
        assert (await here.client.get("/console/app.js")).headers["content-type"].startswith("text/javascript")


async def test_the_console_is_off_where_the_setting_says_so() -> None:
    async with site(console="false") as here:
        assert (await here.client.get("/")).status_code == 404
        assert (await here.client.post("/console/publish")).status_code == 404


async def test_a_method_that_a_route_does_not_have_is_named() -> None:
    async with site() as here:
        answer = await here.client.post("/events")
        assert answer.status_code == 405
        assert "GET" in answer.headers["allow"]


SAMPLE = {"to": "user:42", "type": "job.completed", "data": {"job_id": "r-7", "duration_seconds": 3.2}}


async def test_the_development_console_publishes_a_sample() -> None:
    async with site(console="development") as here:
        assert b"data-development" in (await here.client.get("/")).content
        answer = await here.client.post("/console/publish", headers=bearer(), json=SAMPLE)
        assert answer.status_code == 200
        (event,) = here.publisher.published
        assert event.id == answer.json()["id"]


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        ({"content": b"x", "headers": bearer()}, 400, "not-json"),
        ({"json": SAMPLE}, 401, "missing-token"),
        ({"json": [], "headers": bearer()}, 400, "bad-sample"),
        ({"json": {**SAMPLE, "more": 1}, "headers": bearer()}, 400, "bad-sample"),
        ({"json": {**SAMPLE, "to": "nobody"}, "headers": bearer()}, 400, "bad-sample"),
        ({"json": {**SAMPLE, "data": {}}, "headers": bearer()}, 400, "bad-sample"),
        ({"json": {**SAMPLE, "type": "none.such"}, "headers": bearer()}, 400, "bad-sample"),
        ({"json": SAMPLE, "headers": {**bearer(), "Origin": ALLOWED}}, 403, "origin-not-allowed"),
        ({"json": SAMPLE, "headers": {**bearer(), "Sec-Fetch-Site": "cross-site"}}, 403, "origin-not-allowed"),
    ],
)
async def test_a_sample_that_is_not_published(options: dict[str, Any], status: int, code: str) -> None:
    async with site(console="development", allowed_origins=ALLOWED) as here:
        answer = await here.client.post("/console/publish", **options)
        assert (answer.status_code, answer.json()["type"]) == (status, f"urn:bridge:problem:{code}")
        assert here.publisher.published == []


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/console/log", 404, "no-log"),
        ("/console/log?types=a..b", 400, "bad-look-up"),
        ("/console/log?audience=nobody", 400, "bad-look-up"),
        ("/console/log?limit=0", 400, "bad-look-up"),
        ("/console/log?before=x", 400, "bad-look-up"),
        ("/console/quarantine", 503, "broker-unavailable"),
    ],
)
async def test_a_look_up_that_cannot_be_answered(path: str, status: int, code: str) -> None:
    (port,) = free_ports(1)
    async with site(console="development", amqp_url=f"amqp://127.0.0.1:{port}/") as here:
        assert (await here.client.get(path)).status_code == 401, "without a token, whatever is asked"
        answer = await here.client.get(path, headers=bearer())
        assert (answer.status_code, answer.json()["type"]) == (status, f"urn:bridge:problem:{code}")


async def test_a_request_with_a_large_body_is_refused() -> None:
    async with site(console="development") as here:
        answer = await here.client.post(
            "/console/publish", headers={**bearer(), "Content-Type": "application/json"}, content=b" " * 20_000
        )
        assert answer.status_code == 413


async def test_probes_and_metrics() -> None:
    reasons: list[str | None] = [None, "the broker is away"]
    asked: list[Set[str]] = []

    def why(exclude: Set[str]) -> str | None:
        asked.append(exclude)
        return reasons.pop(0)

    app = create_internal_app(why_not_ready=why, metrics=Metrics())
    async with serving(app, ended=[]) as (url, _), httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/livez")).json()["status"] == "alive"
        assert (await client.get("/readyz?exclude=broker&exclude=connections")).json() == {"status": "ready"}
        assert asked == [{"broker", "connections"}]
        away = await client.get("/readyz")
        assert (away.status_code, away.json()["reason"]) == (503, "the broker is away")
        unknown = await client.get("/readyz?exclude=everything")
        assert unknown.status_code == 400
        assert "is not a check" in unknown.json()["reason"]
        assert "bridge_connections " in (await client.get("/metrics")).text
        failed = await client.get("/readyz")  # The list is empty: the function raises.
        assert (failed.status_code, failed.json()["type"]) == (500, "urn:bridge:problem:internal-error")


class RevokedLater(Revocations):
    """An order arrives after this many questions whether a token is refused."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def refuses(self, user: str, issued_at: float | None) -> bool:
        self._left -= 1
        return self._left < 0


def controlled(revocations: Revocations) -> Control:
    streams: Any = None
    control = Control([], exchange="c", max_age="1D", instance="a", streams=streams)
    control.revocations = revocations
    control._known.set()
    return control


@pytest.mark.contract("9.3")
async def test_a_token_that_is_revoked_is_refused() -> None:
    revocations = Revocations()
    revocations.revoke("42", time.time() + 60)
    async with site(control_with=controlled(revocations)) as here:
        answer = await here.client.get("/events", headers=bearer())
        assert (answer.status_code, answer.json()["type"]) == (401, "urn:bridge:problem:revoked-token")
        async with here.stream("43") as stream:
            await stream.ready()


@pytest.mark.contract("9.3")
async def test_a_token_that_is_revoked_while_its_stream_opens_opens_none() -> None:
    async with site(control_with=controlled(RevokedLater(1))) as here, here.stream() as stream:
        assert (await stream.next()).json == {"reason": "revoked"}
        assert (stream.status, len(here.hub)) == (200, 0)


@pytest.mark.contract("9.4")
async def test_until_the_revocations_are_read_the_answer_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.service.broker.control.WAIT_SECONDS", 0.01)
    control = controlled(Revocations())
    control._known.clear()
    async with site(control_with=control) as here, here.stream() as stream:
        assert (await stream.next()).json == {"reason": "busy"}


class Application:
    """Stands for the questions to the application. Its first answer is of a question from long ago."""

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def pick(self, _: object) -> list[tuple[str, str]]:
        return []

    async def ask(self, _: object, *, again: bool = False) -> Subscriber:
        self.asked.append(again)
        return Subscriber("ann", (), time.time() + 600, issued_at=time.time() if again else 1.0)


@pytest.mark.contract("9.3")
async def test_an_answer_from_before_an_order_is_asked_for_again() -> None:
    revocations, application = Revocations(), Application()
    revocations.revoke("ann", 2.0)
    async with site(control_with=controlled(revocations), login_with=application) as here:
        async with Stream(here.url, None) as stream:
            assert (await stream.ready()).json["user"] == "ann"
        assert application.asked == [False, True]


class Asked:
    """Stands for the questions to all replicas."""

    def __init__(self) -> None:
        self.kicks: list[dict[str, Any]] = []
        self.fault: Exception | None = None

    async def users(self, *, after: str, limit: int) -> Users:
        if self.fault is not None:
            raise self.fault
        return Users(["a"], [{"user": after, "streams": limit}], further=True)

    async def streams(self, user: str) -> UserStreams:
        return UserStreams(["a"], [{"session": "a.1", "user": user}])

    async def kick(self, user: str, **order: Any) -> Kicked:
        self.kicks.append({"user": user, **order})
        return Kicked({"a": 1, "b": 2})


@pytest.mark.contract("9.6")
async def test_the_routes_for_users_need_the_key() -> None:
    asked: Any = Asked()
    app = create_internal_app(why_not_ready=lambda _: None, metrics=Metrics(), control=asked, key="k" * 16)
    key = {"Authorization": f"Bearer {'k' * 16}"}
    async with serving(app, ended=[]) as (url, _), httpx.AsyncClient(base_url=url) as client:
        refused = await client.get("/users")
        assert (refused.status_code, refused.json()["type"]) == (401, "urn:bridge:problem:internal-key")
        assert (await client.get("/readyz")).status_code == 200, "probes need no key"
        client.headers = httpx.Headers(key)
        assert (await client.get("/users?after=x&limit=7")).json()["users"] == [{"user": "x", "streams": 7}]
        assert (await client.get("/users?limit=0")).status_code == 400
        shown = (await client.get("/users/a%2Fb%20%C3%A9/streams")).json()
        assert shown == {"replicas": ["a"], "streams": [{"session": "a.1", "user": "a/b é"}]}
        ended = await client.delete("/users/42/streams?until=5&session=a.1&reason=left")
        assert ended.json() == {"replicas": {"a": 1, "b": 2}, "ended": 3}
        (kick,) = asked.kicks
        assert (kick["user"], kick["until"], kick["session"], kick["reason"]) == ("42", 5.0, "a.1", "left")
        assert (await client.delete("/users/42/streams?until=soon")).status_code == 400
        asked.fault = BrokerUnavailable("away")
        away = await client.get("/users")
        assert (away.status_code, away.headers["retry-after"]) == (503, "5")


def test_a_problem_document_is_one_line_of_json() -> None:
    text = problem_document(418, "teapot", "a\nb")
    assert text.count("\n") == 1
    assert json.loads(text) == {
        "type": "urn:bridge:problem:teapot",
        "title": "Error",
        "status": 418,
        "detail": "a\nb",
    }


async def test_a_stream_counts_until_its_socket_is_gone() -> None:
    async with site() as here:
        async with here.stream() as stream:
            await stream.ready()
            assert len(here.hub) == 1
            assert len(here.entrance) == 0, "a stream is not a guest"
        await until(lambda: len(here.hub) == 0)
        assert here.queues.made[0].is_closed
