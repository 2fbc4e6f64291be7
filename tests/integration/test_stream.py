"""GET /events as the contract describes it, over a real socket and with a real broker."""

from __future__ import annotations

import asyncio
import json
import re
import signal

import aio_pika
import pytest

from bridge import Audience
from tests.client import Stream
from tests.conftest import Eventually, OpenStream, StartService
from tests.patience import PATIENCE
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint


@pytest.mark.contract("1.2", "2.14", "2.23")
async def test_ready_then_events_of_the_users_audiences_and_no_others(
    service: Service, vhost: Vhost, connect: OpenStream
) -> None:
    stream = await connect(service, "42", "ops")
    assert stream.status == 200
    assert stream.headers["content-type"] == "text/event-stream"
    assert stream.headers["cache-control"] == "no-cache, no-transform"
    assert stream.headers["x-accel-buffering"] == "no"
    assert "origin" in stream.headers["vary"].lower()
    assert re.match(
        rb"retry: \d+\nid: [A-Za-z0-9._:~-]{1,160}\nevent: bridge\.ready\n"
        rb'data: {"user":"42","identity":"[A-Za-z0-9_-]{22}","resumed":false,"heartbeat_seconds":15}\n\n$',
        stream.raw,
    )
    await vhost.publish_all(
        [
            ("user.43.job.completed", cloudevent("other-user")),
            ("user.42.job.completed", cloudevent("mine")),
            ("group.dev.job.completed", cloudevent("other-group")),
            ("group.ops.job.completed", cloudevent("my-group")),
            ("all.job.completed", cloudevent("everybody")),
        ]
    )
    # They come through two queues, so in any order.
    assert set(await stream.ids(3)) == {"mine", "my-group", "everybody"}
    await vhost.publish("user.42.job.completed", cloudevent("last", job_id="é\n\n"))
    event = await stream.next_event()
    assert event == {
        **cloudevent("last"),
        "data": {"job_id": "é\n\n", "duration_seconds": 3.2, "result_url": None},
    }
    assert not stream.decoder.empty_blocks


@pytest.mark.contract("2.24", "2.35", "2.36")
async def test_every_id_is_a_cursor_and_every_line_ends_with_lf(
    service: Service, vhost: Vhost, connect: OpenStream
) -> None:
    stream = await connect(service)
    await vhost.publish_all([("user.42.job.completed", cloudevent(f"e{n}")) for n in range(50)])
    assert await stream.ids(50) == [f"e{n}" for n in range(50)]
    ids = re.findall(rb"^id: (.*)$", stream.raw, re.MULTILINE)
    assert len(ids) == 51
    assert all(re.fullmatch(rb"[A-Za-z0-9._:~-]{1,160}", cursor) for cursor in ids)
    assert len(set(ids)) == 51
    assert b"\r" not in stream.raw


@pytest.mark.contract("1.3")
@pytest.mark.parametrize("user", ["*", "#", "a.b", "😀", "a b", "%2A", "x" * 248, "../..", "user.42"])
async def test_any_user_id_is_one_word_of_a_routing_key(
    service: Service, vhost: Vhost, connect: OpenStream, user: str
) -> None:
    stream = await connect(service, user)
    await vhost.publish("user.bob.job.completed", cloudevent("not-mine"))
    await vhost.publish(Audience.user(user).binding_key("x"), b"not json, but it has arrived")
    await service.logged("message refused", reason="malformed")
    await vhost.publish("all.job.completed", cloudevent("end"))
    assert await stream.ids(1) == ["end"]
    assert stream.frames[0].json["user"] == user


@pytest.mark.queues
@pytest.mark.contract("1.16", "2.6")
async def test_the_broker_filters_types_by_the_bindings(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    stream = await connect(service, "42", "ops", query="types=job.*,billing.%23")
    live = [key for queue, key in vhost.bindings() if queue.startswith("bridge.live.")]
    assert live == ["user.42.billing.#", "user.42.job.*"]
    await vhost.publish_all(
        [
            ("user.42.notification", cloudevent("n1", "notification", title="x")),
            ("group.ops.notification", cloudevent("n2", "notification", title="x")),
            ("all.notification", cloudevent("n3", "notification", title="x")),
            ("group.ops.job.completed", cloudevent("j1")),
            ("all.billing.notice", cloudevent("b1", "billing.notice", kind="quota_warning")),
        ]
    )
    assert await stream.ids(2) == ["j1", "b1"]


@pytest.mark.contract("2.8")
async def test_unnamed_events_reach_a_plain_onmessage(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    stream = await connect(service, query="named=false")
    await vhost.publish("user.42.job.completed", cloudevent("e1"))
    frame = await stream.next()
    assert frame.event == "message"
    assert frame.json["type"] == "job.completed"


@pytest.mark.contract("2.9")
async def test_each_event_names_its_audience(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    """Live and from the log, with and without the `event:` line; ids of any characters."""
    user = 'ö "x"\\.#'
    word = "%C3%B6%20%22x%22%5C%2E%23"
    published = [
        (f"user.{word}.job.completed", cloudevent("u1"), f"user:{user}"),
        ("group.ops.job.completed", cloudevent("g1"), "group:ops"),
        ("all.billing.notice", cloudevent("a1", "billing.notice", kind="quota_warning"), "all"),
    ]
    stream = await connect(service, user, "ops", query="audience=true")
    begin = str(stream.frames[0].id)
    for key, body, audience in published:
        await vhost.publish(key, body)
        frame = await stream.next()
        assert (frame.event, frame.json["audience"]) == (frame.json["type"], audience)
        assert frame.json.items() >= {name: value for name, value in body.items() if name != "data"}.items()
    again = await connect(service, user, "ops", query="audience=true&named=false", headers={"Last-Event-ID": begin})
    for _, _, audience in published:
        frame = await again.next()
        assert (frame.event, frame.json["audience"]) == ("message", audience)


@pytest.mark.contract("1.10")
async def test_two_sources_may_use_the_same_ids(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    stream = await connect(service)
    begin = stream.frames[0].id
    workers = [{**cloudevent("1", job_id=worker), "source": f"/workers/{worker}"} for worker in ("a", "b")]
    for body in (*workers, *workers, cloudevent("end")):
        await vhost.publish("user.42.job.completed", body)

    both = ["/workers/a", "/workers/b"]
    frames = [await stream.next() for _ in both]
    assert [frame.json["source"] for frame in frames] == both
    assert await stream.ids(1) == ["end"]
    await stream.close()
    # By a cursor that names both events, and by one that names none.
    for cursor, expected in ((frames[1].id, []), (begin, both)):
        again = await connect(service, headers={"Last-Event-ID": cursor})
        assert [(await again.next_event())["source"] for _ in expected] == expected
        assert await again.ids(1) == ["end"]
        await again.close()


@pytest.mark.contract("1.10")
async def test_the_same_id_is_the_same_event(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    stream = await connect(service, "42", "ops", "dev")
    again = cloudevent("again")
    await vhost.publish_all(
        [
            ("user.42.job.completed", again),
            ("user.42.job.completed", again),
            ("user.42.job.completed", cloudevent("e2")),
        ]
    )
    assert await stream.ids(2) == ["again", "e2"]
    # And one event for two audiences of the same user.
    both = cloudevent("both")
    await vhost.publish_all([("group.ops.job.completed", both), ("group.dev.job.completed", both)])
    await vhost.publish("group.dev.job.completed", cloudevent("e3"))
    assert await stream.ids(2) == ["both", "e3"]


@pytest.mark.queues
@pytest.mark.contract("5.13")
async def test_a_copy_is_only_for_the_audience_of_the_routing_key(
    service: Service, vhost: Vhost, connect: OpenStream
) -> None:
    """RabbitMQ routes by the keys in a `CC` header too, and delivers with the first key."""
    named, copied = await connect(service, "42"), await connect(service, "43")
    same_name = await connect(service, "44", "42")  # In a group with the same name as the user.
    connection = await aio_pika.connect(vhost.url)
    async with connection:
        exchange = await (await connection.channel()).get_exchange("events", ensure=False)
        headers: aio_pika.abc.HeadersType = {"CC": ["user.43.job.completed", "all.job.completed"]}
        body = json.dumps(cloudevent("copied")).encode()
        await exchange.publish(aio_pika.Message(body, headers=headers), "user.42.job.completed")
        await exchange.publish(
            aio_pika.Message(body.replace(b"copied", b"shared"), headers=headers), "group.42.job.completed"
        )
    await vhost.publish("all.job.completed", cloudevent("last"))
    assert set(await named.ids(2)) == {"copied", "last"}
    assert await same_name.ids(2) == ["shared", "last"]
    assert await copied.ids(1) == ["last"]
    await service.logged("copy dropped", routing_key="user.42.job.completed")


@pytest.mark.contract("1.17")
async def test_a_broadcast_is_one_delivery_per_process(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    streams = [await connect(service, str(n), "ops") for n in range(5)]
    await vhost.publish("all.job.completed", cloudevent("a"))
    await vhost.publish("group.ops.job.completed", cloudevent("g"))
    for stream in streams:
        assert await stream.ids(2) == ["a", "g"]
    assert await service.metric("bridge_events_received_total") == 2
    assert await service.metric("bridge_events_delivered_total") == 10


@pytest.mark.queues
@pytest.mark.contract("1.17")
async def test_a_group_is_bound_with_its_first_member_and_unbound_with_its_last(
    service: Service, vhost: Vhost, connect: OpenStream, eventually: Eventually
) -> None:
    def groups() -> list[str]:
        return [key for queue, key in vhost.bindings() if queue.startswith("bridge.shared.")]

    one = await connect(service, "1", "ops")
    two = await connect(service, "2", "ops", "a.b")
    assert groups() == ["all.#", "group.a%2Eb.#", "group.ops.#"]
    await one.close()
    await eventually(lambda: len(vhost.live_queues()) == 1)
    assert groups() == ["all.#", "group.a%2Eb.#", "group.ops.#"]
    await two.close()
    await eventually(lambda: groups() == ["all.#"])
    assert vhost.live_queues() == []


@pytest.mark.queues
async def test_queues_are_exclusive_and_never_named_after_a_user(
    service: Service, vhost: Vhost, connect: OpenStream
) -> None:
    await connect(service, "alice-in-person")
    kinds = sorted(name.split(".")[1] for name in vhost.queues())
    assert kinds == ["dropped", "invalid", "live", "log", "shared"]
    assert not [name for name in vhost.queues() if "alice" in name]


@pytest.mark.contract("2.28")
async def test_a_heartbeat_is_a_colon_and_one_line_feed(start: StartService, connect: OpenStream) -> None:
    service = await start(HEARTBEAT_SECONDS="0.2")
    stream = await connect(service)
    assert stream.frames[0].json["heartbeat_seconds"] == 0.2
    before = len(stream.raw)
    await stream.comments(3)
    heartbeats = stream.raw[before:]
    assert heartbeats == b":\n" * (len(heartbeats) // 2)


@pytest.mark.contract("2.53")
async def test_a_stream_rotates_and_says_when_to_return(start: StartService, connect: OpenStream) -> None:
    service = await start(MAX_AGE_SECONDS="1.5", RETRY_SECONDS="2")
    stream = await connect(service)
    (bye,) = await stream.rest()
    assert (bye.event, bye.json) == ("bridge.bye", {"reason": "rotate"})
    assert bye.retry is not None
    assert 1000 <= bye.retry <= 3000
    ended = await service.logged("stream ended", reason="rotate")
    assert ended["seconds"] >= 1.2, "at least 0.8 of the maximum age"


@pytest.mark.contract("2.53")
async def test_a_stream_never_outlives_its_token(service: Service) -> None:
    for ttl in (2, 10, 50):  # On a slow machine a token may have expired before the bridge reads it.
        async with Stream(service.public, mint("42", ttl=ttl)) as stream:
            if stream.status == 401:
                continue
            await stream.ready()
            (bye,) = await stream.rest()
            assert bye.json == {"reason": "expired"}
            return
    raise AssertionError("each token expired before the bridge read it")


@pytest.mark.contract("2.12", "2.40", "2.41", "5.57")
async def test_too_many_streams_are_busy_with_a_status_that_lets_browsers_return(
    start: StartService, connect: OpenStream
) -> None:
    service = await start(MAX_CONNECTIONS="3", MAX_CONNECTIONS_PER_USER="2")
    first = await connect(service, "1")
    await connect(service, "1")
    await assert_busy(await connect(service, "1", ready=False))
    await connect(service, "2")
    await assert_busy(await connect(service, "3", ready=False))
    # A client that returns and is refused must keep its cursor.
    cursor = first.frames[0].id
    back = await connect(service, "3", ready=False, headers={"Last-Event-ID": cursor})
    await assert_busy(back)
    assert back.frames[0].id == cursor
    assert (await service.get("/readyz", internal=True)).status_code == 503
    assert (await service.get("/readyz?exclude=broker&exclude=connections", internal=True)).status_code == 200
    misspelt = await service.get("/readyz?exclude=conections", internal=True)
    assert (misspelt.status_code, misspelt.json()["reason"]) == (
        400, "exclude=conections is not a check: use broker or connections"
    )  # fmt: skip
    assert await service.metric("bridge_ready") == 0
    await first.close()
    await service.logged("stream ended")
    await connect(service, "3")
    assert await service.metric('bridge_streams_ended_total{reason="busy"}') == 3


async def assert_busy(stream: Stream) -> None:
    assert stream.status == 200
    assert stream.headers["content-type"] == "text/event-stream"
    (bye,) = await stream.rest()
    assert (bye.event, bye.json) == ("bridge.bye", {"reason": "busy"})
    assert bye.retry is not None
    assert 5000 <= bye.retry <= 15_000
    assert stream.ended


@pytest.mark.contract("2.42")
async def test_a_client_that_falls_behind_ends_as_slow(start: StartService, vhost: Vhost, connect: OpenStream) -> None:
    service = await start(BACKLOG_EVENTS="50")
    stream = await connect(service, receive_buffer=4096)
    other = await connect(service, "43")
    # More than fits into the sockets' buffers and the backlog together.
    await vhost.publish_all([("user.42.job.completed", cloudevent(f"e{n}", result_url="x" * 2000)) for n in range(500)])
    await vhost.publish("user.43.job.completed", cloudevent("unharmed"))
    assert await other.ids(1) == ["unharmed"]
    frames = await stream.rest()
    assert frames[-1].json == {"reason": "slow"}
    await service.logged("stream ended", reason="slow")


@pytest.mark.contract("2.43")
async def test_a_client_that_reads_nothing_is_disconnected(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    service = await start(STALL_SECONDS="1", BACKLOG_EVENTS="100000", BACKLOG_BYTES="100000000")
    await connect(service, receive_buffer=4096)
    await vhost.publish_all([("user.42.job.completed", cloudevent(f"e{n}", result_url="x" * 2000)) for n in range(500)])
    ended = await service.logged("stream ended")
    assert ended["reason"] == "stalled"
    assert await service.metric("bridge_connections") == 0


@pytest.mark.contract("2.7", "2.11")
@pytest.mark.parametrize("last_event_id", ["garbage", "é", "x" * 8000, "2.0.AAAAAA."])
@pytest.mark.parametrize("by", ["header", "query"])
async def test_an_unknown_cursor_is_a_gap_and_no_error(
    service: Service, connect: OpenStream, last_event_id: str, by: str
) -> None:
    if by == "header":
        stream = await connect(service, headers={"Last-Event-ID": last_event_id})
    else:
        stream = await connect(service, query=f"lastEventId={last_event_id}".replace("é", "%C3%A9"))
    gap = await stream.next()
    assert (gap.event, gap.json) == ("bridge.gap", {"reason": "unknown"})


@pytest.mark.contract("2.7")
async def test_the_header_wins_over_the_query(service: Service, connect: OpenStream) -> None:
    cursor = (await connect(service)).frames[0].id
    stream = await connect(service, query="lastEventId=garbage", headers={"Last-Event-ID": cursor}, ready=False)
    assert (await stream.ready()).json["resumed"] is True


@pytest.mark.contract("1.21", "1.22", "1.23", "5.24")
@pytest.mark.parametrize(
    ("reason", "key", "body"),
    [
        ("malformed", "user.42.job.completed", b"not json"),
        ("malformed", "user.42.job.completed", b"\xff\xfe\x00"),
        ("malformed", "user.42.job.completed", b"\xef\xbb\xbf" + json.dumps(cloudevent("bom")).encode()),
        ("malformed", "user.42.job.completed", b""),
        ("malformed", "user.42.job.completed", json.dumps(cloudevent("nan")).encode().replace(b"3.2", b"NaN")),
        ("malformed", "user.42.job.completed", b"[" * 30_000 + b"]" * 30_000),
        ("malformed", "user.42.job.completed", json.dumps(cloudevent("s")).encode().replace(b"r-7", rb"\ud800")),
        ("malformed", "user.42.job.completed", json.dumps(cloudevent("d")).encode().replace(b'"id"', b'"id":"x","id"')),
        ("not-a-cloudevent", "user.42.job.completed", b'["hello"]'),
        ("unknown-type", "user.42.no.such.type", json.dumps(cloudevent("u", "no.such.type")).encode()),
        ("schema", "user.42.job.completed", json.dumps(cloudevent("s", duration_seconds="long")).encode()),
        ("type-mismatch", "user.42.job.failed", json.dumps(cloudevent("m")).encode()),
        ("too-large", "user.42.job.completed", json.dumps(cloudevent("l", job_id="x" * 66_000)).encode()),
    ],
    ids=lambda value: value if isinstance(value, str) and "." not in value else "",
)
async def test_a_refused_message_is_quarantined_and_the_stream_continues(
    service: Service, vhost: Vhost, connect: OpenStream, reason: str, key: str, body: bytes
) -> None:
    # Three streams of the user: the process gets the message three times and quarantines it once.
    streams = [await connect(service) for _ in range(3)]
    await vhost.publish(key, body)
    await vhost.publish("user.42.job.completed", cloudevent("next"))
    for stream in streams:
        assert await stream.ids(1) == ["next"]
    messages: list[aio_pika.abc.AbstractIncomingMessage] = []
    async with asyncio.timeout(PATIENCE):
        while not messages:
            messages = await vhost.take("events.invalid")
    (message,) = messages
    assert message.body == body
    assert message.headers["x-reason"] == reason
    assert message.headers["x-routing-key"] == key
    assert 0 < len(str(message.headers["x-detail"])) <= 1000
    assert await service.metric(f'bridge_events_invalid_total{{reason="{reason}"}}') == 1
    # Published again, it is quarantined again.
    await vhost.publish(key, body)
    async with asyncio.timeout(PATIENCE):
        while not await vhost.take("events.invalid"):
            pass


@pytest.mark.parametrize(
    "text",
    ["a\nb", "\r\n\r\n", "data: x\n\nevent: evil\ndata: y\n\n", "\0", "\ufeff", "\u2028", "😀" * 50, ":\n", "<script>"],
)
async def test_no_text_breaks_the_framing(service: Service, vhost: Vhost, connect: OpenStream, text: str) -> None:
    stream = await connect(service)
    await vhost.publish("user.42.job.completed", cloudevent("e1", job_id=text))
    await vhost.publish("user.42.job.completed", cloudevent("e2"))
    assert (await stream.next_event())["data"]["job_id"] == text
    assert await stream.ids(1) == ["e2"]
    assert [frame.event for frame in stream.frames] == ["bridge.ready", "job.completed", "job.completed"]


@pytest.mark.contract("1.7")
async def test_an_event_of_the_largest_size_streams(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    stream = await connect(service)
    event = cloudevent("big", "notification", title="x", body="")
    spare = 65_536 - len(json.dumps(event).encode())
    # The model allows 5,000 characters; an undeclared member fills the rest.
    event["data"]["padding"] = "x" * (spare - len('"padding": "", '))
    assert len(json.dumps(event).encode()) == 65_536
    await vhost.publish("user.42.notification", event)
    assert await stream.ids(1) == ["big"]
    assert b"padding" not in stream.raw


async def open_raw(
    service: Service, request_line: str, rest: bytes = b""
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = service.public.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"{request_line}\r\nHost: {host}\r\nAuthorization: Bearer {mint('42')}\r\n\r\n"
    writer.write(head.encode() + rest)
    return reader, writer


async def test_http_1_0_gets_the_events_without_chunks(service: Service, vhost: Vhost) -> None:
    reader, writer = await open_raw(service, "GET /events HTTP/1.0")
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"200" in head.splitlines()[0]
    assert b"transfer-encoding" not in head.lower()
    assert (await reader.readuntil(b"\n\n")).startswith(b"retry: ")
    await vhost.publish("user.42.job.completed", cloudevent("e1"))
    frame = await reader.readuntil(b"\n\n")
    assert frame.startswith(b"id: ")
    assert b'"id":"e1"' in frame
    service.signal(signal.SIGTERM)
    assert b"bridge.bye" in await reader.read(), "the body ends with the connection"
    writer.close()


@pytest.mark.contract("5.42")
async def test_bytes_after_the_request_change_nothing(service: Service, vhost: Vhost, eventually: Eventually) -> None:
    """Hypercorn stops reading at a second request, and would never notice that the client closes."""
    second = b"GET /schemas HTTP/1.1\r\nHost: x\r\n\r\n"
    reader, writer = await open_raw(service, "GET /events HTTP/1.1", second)
    assert b"connection: close" in (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readuntil(b"bridge.ready")
    writer.write(b"x" * 300_000)
    await vhost.publish("user.42.job.completed", cloudevent("e1"))
    await reader.readuntil(b'"id":"e1"')
    writer.close()
    await eventually(lambda: vhost.live_queues() == [])
    assert (await service.logged("stream ended"))["reason"] == "client"
