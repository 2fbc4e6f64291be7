"""The bridge refuses bad request heads, by RFC 9112."""

import pytest

from bridge.service.http.requesthead import MAX_HEAD_BYTES, fault_of_head, fault_of_lines, origin_form

GOOD = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def refused(head: bytes = GOOD, method: bytes = b"GET", version: bytes = b"1.1", **headers: bytes) -> int | None:
    pairs = [(name.replace("_", "-").encode(), value) for name, value in {"host": b"x", **headers}.items()]
    fault = fault_of_head(head, method=method, version=version, headers=pairs)
    return None if fault is None else fault.status


def test_a_usual_request_is_good() -> None:
    assert refused() is None
    assert refused(content_length=b"5") is None
    assert refused(transfer_encoding=b"chunked") is None
    assert refused(method=b"PRI", version=b"2.0") is None  # HTTP/2's preface is not judged here.


@pytest.mark.contract("6.33")
@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"GET / HTTP/1.1\r\nHost: x\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n\n",
        b"GET / HTTP/1.1\r\nX: a\rb\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: a\r\n b\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: a\r\n\tb\r\nHost: x\r\n\r\n",
    ],
)
def test_lines_end_with_cr_lf_and_are_not_folded(head: bytes) -> None:
    assert refused(head) == 400


@pytest.mark.contract("6.35")
@pytest.mark.parametrize("method", [b"get", b"Get", b"GETS", b"PROPFIND", b"BREW"])
def test_methods_are_case_sensitive(method: bytes) -> None:
    assert refused(method=method) == 501


@pytest.mark.contract("6.32")
def test_two_framings_are_refused() -> None:
    assert refused(content_length=b"5", transfer_encoding=b"chunked") == 400
    assert refused(version=b"1.0", transfer_encoding=b"chunked") == 400


@pytest.mark.parametrize(
    "host", [b"", b"x", b"x:", b"x:80", b"127.0.0.1:8080", b"[::1]", b"[::1]:80", b"a_b.c", b"a%41"]
)
def test_a_good_host(host: bytes) -> None:
    assert refused(host=host) is None


@pytest.mark.contract("6.34")
@pytest.mark.parametrize(
    "host", [b"x/y", b"a b", b"a,b:c", b"me@x", b"x:y", b"x:80:80", b"[::1", b"a%4", b"x?y", b"\xe9"]
)
def test_a_bad_host(host: bytes) -> None:
    assert refused(host=host) == 400


@pytest.mark.contract("6.34")
@pytest.mark.parametrize(
    ("version", "status"), [(b"1.0", None), (b"1.1", 400), (b"1.2", 400), (b"1.9", 400), (b"2.0", None)]
)
def test_each_version_after_1_0_needs_a_host(version: bytes, status: int | None) -> None:
    fault = fault_of_head(GOOD, method=b"GET", version=version, headers=[])
    assert (None if fault is None else fault.status) == status


def test_lines_of_a_body_in_chunks() -> None:
    assert fault_of_lines(b"0\r\nX: y\r\n\r\n") is None
    assert fault_of_lines(b"") is None
    assert fault_of_lines(b"0\r\nX: y\n\r\n") is not None


@pytest.mark.contract("6.39")
@pytest.mark.parametrize(
    ("target", "read"),
    [
        (b"/events?a=b", (b"/events?a=b", None)),
        (b"http://x:80/events?a=b", (b"/events?a=b", b"x:80")),
        (b"HTTPS://me@x/events", (b"/events", b"x")),
        (b"http://x", (b"/", b"x")),
        (b"http://x?a=http://y/", (b"/?a=http://y/", b"x")),
        (b"*", (b"*", None)),
        (b"x:80", (b"x:80", None)),
        (b"/http://x/", (b"/http://x/", None)),
    ],
)
def test_a_target_with_a_host(target: bytes, read: tuple[bytes, bytes | None]) -> None:
    assert origin_form(target) == read


def test_a_head_has_16_kb_at_most() -> None:
    padding = b"X: " + b"a" * (MAX_HEAD_BYTES - len(GOOD) - len(b"X: \r\n")) + b"\r\n"
    largest = GOOD[:-2] + padding + b"\r\n"
    assert len(largest) == MAX_HEAD_BYTES == 16 * 1024
    assert refused(largest) is None
    assert refused(GOOD[:-2] + b"a" + padding + b"\r\n") == 431
