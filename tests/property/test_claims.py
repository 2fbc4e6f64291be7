"""A client may send any text as a token. It is read or refused, and no other exception is raised."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from bridge.service.http.claims import ClaimsReader, Refusal, parse
from bridge.service.http.headers import admits_stream, bearer_token, is_own_origin

NOW = 1_800_000_000.0

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("ops"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
times = st.sampled_from([NOW - 1, NOW + 0.5, NOW + 40, NOW + 1e6]) | values
claims = st.fixed_dictionaries(
    {"sub": values, "exp": times},
    optional={"nbf": times, "groups": values, "aud": values, "iss": values, "_claim_names": values, "a": values},
)
readers = st.builds(
    ClaimsReader,
    audience=st.none() | st.just("ops"),
    issuer=st.none() | st.just("ops"),
    user=st.just("sub") | st.text(min_size=1, max_size=5),
    groups=st.just("groups") | st.text(alphabet="a.", max_size=5),
)


@given(readers, claims)
def test_any_claims_are_read_or_refused(reader: ClaimsReader, given_claims: dict[str, Any]) -> None:
    try:
        subscriber = reader.read(given_claims, NOW)
    except Refusal:
        return
    assert subscriber.user
    assert all(subscriber.groups)
    assert len(set(subscriber.groups)) == len(subscriber.groups)
    assert subscriber.expires_at > NOW
    # A group that was given as text appears unchanged.
    groups = given_claims.get("groups")
    if reader.groups == "groups" and isinstance(groups, str):
        assert subscriber.groups == ((groups,) if groups else ())


@given(st.dictionaries(st.sampled_from(["alg", "kid", "crit", "typ", "b64"]), values), values, st.binary(max_size=8))
def test_any_parts_are_a_token_or_refused(header: dict[str, Any], payload: Any, signature: bytes) -> None:
    raw = [json.dumps(header).encode(), json.dumps(payload).encode(), signature]
    try:
        token = parse(".".join(base64.urlsafe_b64encode(part).decode() for part in raw))
    except Refusal:
        return
    assert isinstance(header["alg"], str)
    assert token.signature == signature


@given(st.text() | st.text(alphabet="a.=-_ é\ud800", max_size=20))
def test_any_text_is_a_token_or_refused(text: str) -> None:
    with contextlib.suppress(Refusal):
        parse(text)


@given(st.lists(st.text(alphabet='text/ven-sramq=.01;,*" \t'), max_size=3), st.text(max_size=20), st.text(max_size=20))
def test_any_headers_are_read(lines: list[str], origin: str, host: str) -> None:
    admits_stream(lines)
    bearer_token(lines)
    is_own_origin(origin, host)
    is_own_origin(f"http://{origin}", host)
