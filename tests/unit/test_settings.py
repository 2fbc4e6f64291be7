"""The error names every fault, and shows no secret."""

import os

import pytest

from bridge.service.settings import PREFIX, BrokerSettings, InvalidSettings, Settings, load, parse_bind, unknown_names

SECRET = "0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("BRIDGE_"):
            monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"BRIDGE_{name}", value)


def faults() -> list[str]:
    with pytest.raises(InvalidSettings) as caught:
        load(Settings)
    return caught.value.faults


@pytest.mark.contract("1.1", "1.20", "2.3", "2.28", "2.40", "2.41", "2.42", "2.43", "2.77")
def test_the_defaults_are_the_contracts(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, JWT_SECRET=SECRET)
    loaded = load(Settings)
    assert loaded.addresses == ("amqp://guest:guest@127.0.0.1:5672/",)
    assert (loaded.exchange, loaded.quarantine, loaded.schemas) == ("events", "events.invalid", "schemas")
    assert (loaded.bind, loaded.internal_bind) == ("127.0.0.1:8080", "127.0.0.1:9090")
    assert (loaded.jwt_user_claim, loaded.jwt_groups_claim) == ("sub", "groups")
    assert (loaded.cookie, loaded.query_token, loaded.allowed_origins) == ("bridge_token", False, ())
    assert (loaded.heartbeat_seconds, loaded.retry_seconds, loaded.max_age_seconds) == (15, 3, 3600)
    assert (loaded.drain_seconds, loaded.stall_seconds, loaded.broker_grace_seconds) == (10, 30, 30)
    assert (loaded.max_connections, loaded.max_connections_per_user) == (10_000, 20)
    assert (loaded.backlog_events, loaded.backlog_bytes, loaded.max_event_bytes) == (1000, 1_048_576, 65_536)


@pytest.mark.contract("2.4")
def test_without_any_key_it_does_not_start() -> None:
    assert "BRIDGE_JWT_SECRET, BRIDGE_JWKS or BRIDGE_AUTH_URL" in faults()[0]
    assert load(BrokerSettings).exchange == "events"  # Publishing needs no key.


@pytest.mark.contract("8.1")
def test_the_feed_from_the_log_needs_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, JWT_SECRET=SECRET, FEED="log", LOG="")
    assert faults() == [
        "BRIDGE_FEED: 'log' reads the event log: set BRIDGE_LOG to its name, or BRIDGE_FEED to 'queues'"
    ]
    set_all(monkeypatch, LOG="events.log")
    assert load(Settings).feed == "log"


@pytest.mark.contract("6.40")
def test_a_login_by_the_application_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, AUTH_URL="http://app:8000/bridge-login", AUTH_HEADERS="cookie, X-Tenant")
    loaded = load(Settings)
    assert (loaded.auth_url, loaded.auth_headers) == ("http://app:8000/bridge-login", ("cookie", "X-Tenant"))
    for url in ("app:8000", "ftp://app/", "http:///x", "http://app:x/", "http://app/#a"):
        set_all(monkeypatch, AUTH_URL=url)
        assert faults()[0].startswith("BRIDGE_AUTH_URL: ")
    set_all(monkeypatch, AUTH_URL="http://app/")
    for headers in ("Host", "a b", "content-length", "é"):
        set_all(monkeypatch, AUTH_HEADERS=headers)
        assert "is not a header that can be passed on" in faults()[0]


def test_all_faults_are_named_with_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(
        monkeypatch,
        HEARTBEAT_SECONDS="soon",
        MAX_CONNECTIONS="0",
        BIND="8080",
        ALLOWED_ORIGINS="https://a.example,https://b.example/path",
        EXCHANGE="amq.topic",
        DRAIN_SECONDS="nan",
        JWKS="",
    )
    found = faults()
    for name in ["HEARTBEAT_SECONDS", "MAX_CONNECTIONS", "BIND", "ALLOWED_ORIGINS", "EXCHANGE", "DRAIN_SECONDS"]:
        assert any(fault.startswith(f"BRIDGE_{name}: ") for fault in found), name
    assert any("'soon'" in fault for fault in found)
    assert any("BRIDGE_JWKS" in fault for fault in found)
    assert len(found) == 7


@pytest.mark.contract("2.4")
def test_no_fault_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, JWT_SECRET="short-s3cret", AMQP_URL="http://user:s3cret@host/")
    text = "\n".join(faults())
    assert "at least 32 bytes" in text
    assert "is not an AMQP address" in text
    assert "s3cret" not in text


@pytest.mark.parametrize(
    "origin",
    ["*", "https://a.example/", "a.example", "https://a b", "null", "https://a https://b", "https://a;https://b",
     "https://user@a", "https://b\u00fccher.example", "https://a:port", "https://"],
)  # fmt: skip
def test_a_text_that_is_not_an_origin_is_refused(monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    set_all(monkeypatch, JWT_SECRET=SECRET, ALLOWED_ORIGINS=origin)
    assert faults()


def test_origins_are_split_and_compared_without_case(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(
        monkeypatch, JWT_SECRET=SECRET, ALLOWED_ORIGINS="https://App.example, http://localhost:3000,http://[::1]:3000,"
    )
    assert load(Settings).allowed_origins == ("https://app.example", "http://localhost:3000", "http://[::1]:3000")


@pytest.mark.contract("6.28")
def test_a_port_that_a_scheme_implies_is_not_part_of_an_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, JWT_SECRET=SECRET, ALLOWED_ORIGINS="https://a.example:443,http://b:80,http://c:443")
    assert load(Settings).allowed_origins == ("https://a.example", "http://b", "http://c:443")


def test_other_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, JWT_SECRET=SECRET, JWT_USER_CLAIM="https://a.example/id", JWT_GROUPS_CLAIM="")
    loaded = load(Settings)
    assert (loaded.jwt_user_claim, loaded.jwt_groups_claim) == ("https://a.example/id", "")
    set_all(monkeypatch, JWT_USER_CLAIM="")
    assert faults()[0].startswith("BRIDGE_JWT_USER_CLAIM: ")


def test_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, JWT_SECRET=SECRET, AMQP_URL="amqp://u:p@a:5672/v,amqps://u:p@b/v")
    assert load(Settings).addresses == ("amqp://u:p@a:5672/v", "amqps://u:p@b/v")


def test_a_misspelt_name_is_noticed_and_kubernetes_names_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, ALLOWED_ORIGIN="x", SERVICE_HOST="10.0.0.1", PORT="tcp://", PORT_8080_TCP="x")
    assert unknown_names(Settings) == ["BRIDGE_ALLOWED_ORIGIN is not a setting; did you mean BRIDGE_ALLOWED_ORIGINS?"]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("127.0.0.1:8080", ("127.0.0.1", 8080)), ("[::]:0", ("::", 0)), ("localhost:1", ("localhost", 1))],
)
def test_a_bind_address(text: str, parsed: tuple[str, int]) -> None:
    assert parse_bind(text) == parsed


@pytest.mark.parametrize("text", ["", ":", "8080", ":8080", "::1:80", "a:b", "a:99999", "a:-1", "a:٣"])
def test_a_text_that_is_not_a_bind_address(text: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        parse_bind(text)


@pytest.mark.contract("2.19")
def test_replicas_have_one_key_for_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(**given: str) -> bytes:
        for name in ("JWT_SECRET", "JWKS", "AMQP_URL", "BIND"):
            monkeypatch.delenv(PREFIX + name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(PREFIX + name, value)
        return load(Settings).identity_key

    secret = "s" * 32
    one, two = "amqp://u:p@a/", "amqp://u:p@b/x"
    assert key(JWT_SECRET=secret, AMQP_URL=one) == key(JWT_SECRET=secret, AMQP_URL=two, BIND="0.0.0.0:80")
    assert key(JWKS="keys.json", AMQP_URL=f"{one},{two}") == key(JWKS="keys.json", AMQP_URL=f"{two},{one}")
    several = {
        key(JWT_SECRET=secret),
        key(JWT_SECRET="t" * 32),
        key(JWKS="keys.json"),
        key(JWKS="keys.json", AMQP_URL=one),
        key(JWKS="keys.json", AMQP_URL="amqp://u:q@a/"),
    }
    assert len(several) == 5
