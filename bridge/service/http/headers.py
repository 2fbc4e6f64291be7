"""Reads request headers for which the framework is stricter than the standard (RFC 9110, RFC 6454)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from bridge.service.streams.sse import MEDIA_TYPE

STREAM_REQUEST_HEADERS = ("Authorization", "Last-Event-ID", "Cache-Control", "Accept")
"""Headers that clients of the stream send. A preflight's answer always allows them."""

MOST_ASKED = 100
MOST_ASKED_BYTES = 4096
"""Limits of a preflight's header names: real preflights have at most ten. The answer omits what exceeds them."""

_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_RANGE = re.compile(r"([a-z0-9!#$&^_.+*-]+)/([a-z0-9!#$&^_.+*-]+)")
_WEIGHT = re.compile(r";\s*q\s*=\s*([0-9.]+)\s*(?:;|$)")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def admits_stream(accept: Iterable[str]) -> bool:
    """Whether the lines of an Accept header admit `text/event-stream` (RFC 9110, section 12.5.1).

    The most specific range decides. Java sends a lone `*` and weights such as `.2`, which are accepted. Parameters of a
    range are ignored, because a stream has only one form. An unreadable part is ignored: the standard allows a server
    to ignore the whole header.
    """
    kind, _, subtype = MEDIA_TYPE.partition("/")
    best: tuple[int, float] | None = None
    for part in ",".join(accept).lower().split(","):
        name = part.partition(";")[0].strip()
        found = _RANGE.fullmatch("*/*" if name == "*" else name)
        if found is None:
            continue
        best = best or (0, 0.0)
        ranks = {("*", "*"): 1, (kind, "*"): 2, (kind, subtype): 3}
        rank = ranks.get((found[1], found[2]))
        if rank is not None:
            best = max(best, (rank, _weight(part)))
    return best is None or best[1] > 0


def _weight(part: str) -> float:
    """The weight of a range (RFC 9110, section 12.4.2). A missing or unreadable weight counts as 1."""
    found = _WEIGHT.search(part)
    try:
        return float(found[1]) if found else 1.0
    except ValueError:
        return 1.0


def bearer_token(authorization: Iterable[str]) -> str | None:
    """The credentials of the first Bearer line with credentials, or None (RFC 6750, section 2.1).

    The scheme is case-insensitive, and several spaces are accepted (RFC 9110, sections 11.1 and 11.4). Other schemes
    are for a proxy in front, and are ignored.
    """
    for line in authorization:
        scheme, _, credentials = line.strip().replace("\t", " ").partition(" ")
        if scheme.lower() == "bearer" and credentials.strip():
            return credentials.strip()
    return None


def allowed_headers(asked: Iterable[str]) -> str:
    """The `Access-Control-Allow-Headers` for the lines of an `Access-Control-Request-Headers`.

    Libraries add headers to each request of a page (`traceparent`, `baggage`, `sentry-trace`). All names are allowed:
    an allowed origin may read the stream anyway, and the bridge ignores unknown headers. `*` does not work, because the
    stream is read with credentials (Fetch standard, "CORS-preflight fetch"). Invalid names are left out.
    """
    line = ",".join(asked)
    names = line.split(",") if len(line) <= MOST_ASKED_BYTES else []
    found = {name.lower(): name for name in STREAM_REQUEST_HEADERS}
    for name in (name.strip() for name in names[:MOST_ASKED]):
        if _TOKEN.fullmatch(name):
            found.setdefault(name.lower(), name)
    return ", ".join(found.values())


def normal_origin(origin: str) -> str:
    """An origin as a browser writes it: in lower case, without its scheme's default port (RFC 6454, section 6.2)."""
    origin = origin.strip().lower()
    return origin.removesuffix(_DEFAULT_PORTS.get(origin.partition("://")[0], ":"))


def is_own_origin(origin: str, host: str) -> bool:
    """Whether the origin's host is the host of the request (RFC 9110, sections 4.2.3 and 7.2)."""
    origin = normal_origin(origin)
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    if parts.scheme not in _DEFAULT_PORTS or not parts.netloc:
        return False
    return origin == normal_origin(f"{parts.scheme}://{host}")
