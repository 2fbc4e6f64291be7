"""Refuses request heads that the parser accepts but that are ambiguous. If RFC 9112 leaves a choice, the strict one.

A proxy in front may read the same bytes differently. Bytes that the proxy treats as the body of one user's request must
not become another request here (request smuggling). Pure: bytes in, a fault or None out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

METHODS = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH", b"QUERY"})
"""Known methods, answered with 405 if a resource does not support them: RFC 9110, section 9.3, RFC 5789, and QUERY,
which OpenAPI 3.2 names. Methods are case-sensitive (RFC 9110, section 9.1), so `get` is unknown."""

MAX_HEAD_BYTES = 16_384
"""Limit for a request head, and for the trailers after a chunked body."""

_BARE_LF = re.compile(rb"(?<!\r)\n")
_BARE_CR = re.compile(rb"\r(?!\n)")
_FOLD = re.compile(rb"\r\n[ \t]")
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*(?::[0-9]*)?|\[[0-9A-Za-z:.%_~-]+\](?::[0-9]*)?")
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)([^#]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HeadFault:
    """`code` is stable, for programs; `detail` is for people."""

    status: int
    code: str
    detail: str


def fault_of_head(
    head: bytes, *, method: bytes, version: bytes, headers: Iterable[tuple[bytes, bytes]]
) -> HeadFault | None:
    """Returns the first fault of a request's head, or None.

    Args:
        head: the received bytes, including the empty line at the end.
        method, version, headers: the parser's results. Header names are in lower case.
    """
    if (fault := fault_of_lines(head)) is not None:
        return fault
    if _FOLD.search(head):
        # RFC 9112, section 5.2.
        return HeadFault(400, "bad-request", "a header is continued on a second line: write it on one line")
    if version != b"2.0" and method not in METHODS:
        return HeadFault(501, "unknown-method", "the method is unknown; methods are written in capitals")
    values = dict(headers)
    if b"transfer-encoding" in values:
        # RFC 9112, sections 6.1 and 6.3. Both are ways to smuggle a request.
        if b"content-length" in values:
            return HeadFault(400, "bad-request", "the request has Content-Length and Transfer-Encoding: send only one")
        if version < b"1.1":
            return HeadFault(400, "bad-request", "Transfer-Encoding needs HTTP/1.1")
    if version[:2] == b"1." and version > b"1.0" and b"host" not in values:
        # The parser requires it only in HTTP/1.1, but later versions are treated as 1.1 here.
        return HeadFault(400, "bad-request", "HTTP/1.1 needs a Host header")
    if not _HOST.fullmatch(values.get(b"host", b"")):
        return HeadFault(400, "bad-request", "Host must be a host, with a port if needed")  # RFC 9112, section 3.2.
    return None


def fault_of_lines(lines: bytes) -> HeadFault | None:
    """Returns the fault of the lines of a head, or of the last chunk and the trailers (RFC 9112, section 2.2).

    The parser limits only lines that are incomplete. Lines that arrive complete in one packet may be larger.
    """
    if len(lines) > MAX_HEAD_BYTES:
        return HeadFault(
            431, "headers-too-large", "the headers of the request are larger than 16 KB: send fewer cookies"
        )
    if _BARE_LF.search(lines) or _BARE_CR.search(lines):
        return HeadFault(400, "bad-request", "lines must end with CR LF, and neither may occur alone")
    return None


def origin_form(target: bytes) -> tuple[bytes, bytes | None]:
    """Returns a request target's path and query, and its host if it has one, which replaces the Host header.

    A server must accept `GET http://host/path`, and then ignore Host (RFC 9112, section 3.2.2).
    """
    found = _ABSOLUTE.fullmatch(target)
    if found is None:
        return target, None
    rest = found[2] if found[2].startswith(b"/") else b"/" + found[2]
    return rest, found[1].rpartition(b"@")[2]
