"""The settings. No other module reads the environment.

Every setting is an environment variable with the prefix `BRIDGE_`; a test compares docs/settings.md with this file. All
faults are found and reported together, before anything starts.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from bridge import amqp
from bridge.event import MAX_EVENT_BYTES
from bridge.service.http.headers import normal_origin

PREFIX = "BRIDGE_"
MIN_SECRET_BYTES = 32

_NAME = re.compile(r"[A-Za-z0-9_.:@#,/ -]{1,127}")


@dataclass(frozen=True, slots=True)
class LogSettings:
    """The log's stream. `max_age` has RabbitMQ's form, for example 1h. `max_bytes` limits its size."""

    name: str
    max_age: str
    max_bytes: int


class InvalidSettings(Exception):
    """The settings cannot be used. `faults` has one line for each fault. No line contains a secret."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("; ".join(faults))


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _check_addresses(value: SecretStr) -> SecretStr:
    amqp.parse_urls(value.get_secret_value())
    return value


def _check_name(value: str) -> str:
    if not _NAME.fullmatch(value) or value.startswith("amq."):
        raise ValueError(
            "must be 1 to 127 characters of A-Z a-z 0-9 _ - . : @ # , / and space, not beginning with 'amq.'"
        )
    return value


def _check_bind(value: str) -> str:
    parse_bind(value)
    return value


def parse_bind(value: str) -> tuple[str, int]:
    """Returns the host and the port of `127.0.0.1:8080` or `[::]:8080`. With port 0 the system chooses a port.

    Raises:
        ValueError: the value has neither form.
    """
    host, colon, port = value.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("must be host:port, for example 127.0.0.1:8080, 0.0.0.0:8080 or [::]:8080")
    return host, int(port)


Name = Annotated[str, AfterValidator(_check_name)]
LogName = Annotated[str, AfterValidator(lambda value: _check_name(value) if value else value)]
Bind = Annotated[str, AfterValidator(_check_bind)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class BrokerSettings(BaseSettings):
    """The settings that `bridge publish`, `schemas diff`, `quarantine`, `kick`, `who` and `check --sample` read."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", env_ignore_empty=False, frozen=True)

    amqp_url: Annotated[SecretStr, AfterValidator(_check_addresses)] = Field(
        SecretStr("amqp://guest:guest@127.0.0.1:5672/"),
        description="address of RabbitMQ; for a cluster, the nodes' addresses joined by commas",
    )
    exchange: Name = Field("events", description="durable topic exchange that events are published to")
    quarantine: Name = Field("events.invalid", description="queue for refused messages")
    log: LogName = Field("events.log", description="stream that clients resume from; empty = no log")
    log_max_age: Annotated[str, Field(pattern=r"^[1-9][0-9]*[YMDhms]$")] = Field(
        "1h", description="how long the log keeps events: a number and Y, M, D, h, m or s"
    )
    log_max_bytes: Annotated[int, Field(ge=1_000_000)] = Field(
        1_000_000_000, description="the log's size limit in bytes"
    )
    feed: Annotated[Literal["queues", "log"], BeforeValidator(_lower)] = Field(
        "queues", description="where live events come from: a queue for each stream, or the log, read once a process"
    )
    schemas: str = Field("schemas", min_length=1, description="package of the event catalogue")
    max_event_bytes: Annotated[int, Field(ge=1024)] = Field(
        MAX_EVENT_BYTES, description="largest message body, in bytes"
    )

    control: LogName = Field(
        "bridge.control", description="exchange, and stream, for orders to all replicas; empty = no control"
    )

    @property
    def max_kept_bytes(self) -> int:
        """A refused body up to this size is kept whole: it can be published again once the limit is larger."""
        return 2 * self.max_event_bytes

    @property
    def log_stream(self) -> LogSettings | None:
        return LogSettings(self.log, self.log_max_age, self.log_max_bytes) if self.log else None

    @property
    def addresses(self) -> tuple[str, ...]:
        return amqp.parse_urls(self.amqp_url.get_secret_value())


class PublicSettings(BrokerSettings):
    """The settings that describe the HTTP side (`bridge schemas export --format openapi`)."""

    cookie: Annotated[str, Field(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")] = Field(
        "bridge_token", description="cookie that may hold the token"
    )
    query_token: bool = Field(False, description="whether `?access_token=` is accepted")
    console: Annotated[Literal["false", "true", "development"], BeforeValidator(_lower)] = Field(
        "false",
        description="a page at `/` that shows events live; `development` also publishes, and shows everyone's events",
    )


_ORIGIN_HOST = re.compile(r"(?:[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
"""The host of an origin as a browser writes it: a name in ASCII (IDNA), or an address; then a port."""

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_CONNECTION_HEADERS = {
    *("connection", "content-length", "host", "keep-alive", "proxy-authorization", "proxy-connection", "te"),
    *("trailer", "transfer-encoding", "upgrade"),
}
"""Headers of the connection, not of the user's request (RFC 9110, section 7.6.1)."""


class Settings(PublicSettings):
    """All settings of the service."""

    bind: Bind = Field("127.0.0.1:8080", description="public address")
    internal_bind: Bind = Field("127.0.0.1:9090", description="address of probes and metrics, never exposed")
    jwt_secret: SecretStr | None = Field(None, description="key for HS256 tokens, at least 32 bytes")
    jwks: str | None = Field(None, description="URL or file of the keys for RS256, ES256 and EdDSA tokens")
    jwt_audience: str | None = Field(None, description="required `aud`; unset = not checked")
    jwt_issuer: str | None = Field(None, description="required `iss`; unset = not checked")
    jwt_user_claim: str = Field(
        "sub", min_length=1, max_length=256, description="claim with the user id: a name, or a path with dots"
    )
    jwt_groups_claim: str = Field(
        "groups", max_length=256, description="claim with the groups, in the same form; empty = no groups are read"
    )
    auth_url: str | None = Field(
        None, description="address of your application that says whose a request is, for sessions without tokens"
    )
    auth_headers: Annotated[tuple[str, ...], NoDecode] = Field(
        ("Cookie", "Authorization", "Origin"), description="headers of a request that `auth_url` gets, joined by commas"
    )
    auth_timeout_seconds: Seconds = Field(3, description="limit of a question to `auth_url`; after it, `busy`")
    auth_cache_seconds: Annotated[float, Field(ge=0, le=300, allow_inf_nan=False)] = Field(
        5, description="how long an answer of `auth_url` is used for further requests with the same headers"
    )
    auth_concurrency: Count = Field(50, description="the most questions to `auth_url` at once")
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="origins of pages on other hosts, joined by commas"
    )
    heartbeat_seconds: Seconds = Field(15, description="a comment is sent after this time without a byte")
    retry_seconds: Seconds = Field(3, description="a browser's pause before it reconnects, times 0.5 to 1.5")
    max_age_seconds: Seconds = Field(3600, description="life of a stream, times 0.8 to 1.0")
    drain_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        10, description="after SIGTERM, streams are ended one after the other over this time"
    )
    stall_seconds: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        30, description="a write without progress for this time ends the stream"
    )
    max_connections: Count = Field(10_000, description="the most streams of a process")
    max_connections_per_user: Count = Field(20, description="the most streams of one user in a process")
    openings_per_user: Count | None = Field(
        None,
        description="the most streams that one user may open at once; the budget refills in 20 s; unset = derived from "
        "max_connections_per_user",
    )
    log_entries_per_user: Annotated[int, Field(ge=1000)] = Field(
        1_000_000,
        description="the most entries of the log that are read for one user at once; the budget refills in ten minutes",
    )
    backlog_events: Count = Field(1000, description="the most events that wait for one client")
    backlog_bytes: Annotated[int, Field(ge=1024)] = Field(
        1_048_576, description="the most bytes that wait for one client"
    )
    control_max_age: Annotated[str, Field(pattern=r"^[1-9][0-9]*[YMDhms]$")] = Field(
        "30D", description="how long a revocation is kept; not shorter than your tokens live"
    )
    internal_key: SecretStr | None = Field(
        None, description="bearer key for /users on the internal address; unset = no key is needed"
    )
    tracing: bool = Field(False, description="whether deliveries of traced events become spans (OpenTelemetry)")
    broker_grace_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        30, description="how long RabbitMQ may be away before /readyz answers 503"
    )

    @property
    def identity_key(self) -> bytes:
        """The key of identities (`Subscriber.identity`): a secret that is equal in all replicas of a bridge.

        It is derived from BRIDGE_JWT_SECRET. Without that, it is derived from RabbitMQ's users and passwords, which are
        sorted because the order of the nodes may differ between replicas.
        """
        if self.jwt_secret is not None:
            secrets = [self.jwt_secret.get_secret_value()]
        else:
            secrets = sorted({amqp.credentials(address) for address in self.addresses})
        return hashlib.sha256("\0".join(["identity", *secrets]).encode()).digest()

    @field_validator(
        "jwt_secret",
        "jwks",
        "jwt_audience",
        "jwt_issuer",
        "auth_url",
        "internal_key",
        "openings_per_user",
        mode="before",
    )
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("jwt_secret")
    @classmethod
    def _check_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value().encode()) < MIN_SECRET_BYTES:
            raise ValueError(
                f"must have at least {MIN_SECRET_BYTES} bytes (RFC 7518, section 3.2): openssl rand -hex 32"
            )
        return value

    @field_validator("auth_url")
    @classmethod
    def _check_auth_url(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            # `port` raises ValueError for what is not a port.
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or parts.fragment:
                raise ValueError("must be an address, for example http://app:8000/bridge-login")
        return value

    @field_validator("auth_headers")
    @classmethod
    def _check_auth_headers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not _HEADER_NAME.fullmatch(name) or name.lower() in _CONNECTION_HEADERS:
                raise ValueError(f"{name[:60]!r} is not a header that can be passed on: remove it")
        return value

    @field_validator("allowed_origins", "auth_headers", mode="before")
    @classmethod
    def _split_list(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin == "*":
                raise ValueError("'*' is not possible, because the stream is read with credentials: list the origins")
            parts = urlsplit(origin)
            if (
                parts.scheme not in ("http", "https")
                or not parts.netloc
                or origin != f"{parts.scheme}://{parts.netloc}"
                or not _ORIGIN_HOST.fullmatch(parts.netloc)
            ):
                raise ValueError(
                    f"{origin!r} is not an origin: write https://app.example.com, without a path; "
                    "put commas between several"
                )
        return tuple(normal_origin(origin) for origin in value)


Kind = TypeVar("Kind", bound=BrokerSettings)


def load(kind: type[Kind]) -> Kind:
    """Reads the settings from the environment.

    Raises:
        InvalidSettings: has all faults, not only the first.
    """
    faults: list[str] = []
    settings = None
    try:
        settings = kind()
    except ValidationError as error:
        faults += [_describe(kind, fault) for fault in error.errors(include_url=False, include_context=False)]
    if issubclass(kind, Settings) and not any(_given(name) for name in ("JWT_SECRET", "JWKS", "AUTH_URL")):
        # Checked here, because pydantic checks several fields together only after each of them is valid.
        faults.append(
            "BRIDGE_JWT_SECRET, BRIDGE_JWKS or BRIDGE_AUTH_URL: set one of them; without one, the bridge cannot know "
            "whose a request is (for development: export BRIDGE_JWT_SECRET=$(openssl rand -hex 32))"
        )
    if isinstance(settings, Settings) and settings.feed == "log" and not settings.log:
        faults.append("BRIDGE_FEED: 'log' reads the event log: set BRIDGE_LOG to its name, or BRIDGE_FEED to 'queues'")
    if faults or settings is None:
        raise InvalidSettings(faults)
    return settings


def _given(name: str) -> bool:
    return any(key.upper() == PREFIX + name and value for key, value in os.environ.items())


def _describe(kind: type[BrokerSettings], fault: Any) -> str:
    name = str(fault["loc"][0]) if fault["loc"] else "?"
    message = fault["msg"].removeprefix("Value error, ")
    field = kind.model_fields.get(name)
    secret = field is None or "SecretStr" in str(field.annotation)
    given = "" if secret else f" (it is {str(fault['input'])[:200]!r})"
    return f"{PREFIX}{name.upper()}: {message}{given}"


def unknown_names(kind: type[BrokerSettings]) -> list[str]:
    """Returns a line for each `BRIDGE_` variable that is not a setting, with the most similar setting."""
    known = [PREFIX + name.upper() for name in kind.model_fields]
    found = []
    for name in sorted(os.environ):
        # A Kubernetes service with the name `bridge` sets BRIDGE_SERVICE_HOST and BRIDGE_PORT_... in every pod.
        if name.startswith(PREFIX) and name not in known and not re.match(r"BRIDGE_(SERVICE|PORT)(_|$)", name):
            close = difflib.get_close_matches(name, known, n=1)
            found.append(f"{name} is not a setting" + (f"; did you mean {close[0]}?" if close else ""))
    return found
