"""The bridge reads the claims of real issuers. It refuses a claim that could mean another user."""

import base64
import json
import math
import re
from typing import Any

import pytest

from bridge.service.http.claims import (
    ClaimsReader,
    ExpiredToken,
    GroupsElsewhere,
    InvalidToken,
    NotYetValid,
    Subscriber,
    claim_at,
    key_id,
    parse,
)

NOW = 1_800_000_000.0


def read(*, reader: ClaimsReader | None = None, **claims: Any) -> Subscriber:
    values = {"sub": "42", "exp": NOW + 60, **claims}
    return (reader or ClaimsReader()).read({k: v for k, v in values.items() if v is not ...}, NOW)


def encode(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


@pytest.mark.contract("6.19")
@pytest.mark.parametrize(
    ("given", "groups"),
    [
        (..., ()), (None, ()), ([], ()), ("", ()), ([""], ()), ([None], InvalidToken),
        ("ops", ("ops",)), ("ops dev", ("ops dev",)), ("ops,dev", ("ops,dev",)), (["ops", "", "ops"], ("ops",)),
        (7, ("7",)), ([7, "7", 8], ("7", "8")), ([-1], ("-1",)), (0, ("0",)),
        (True, InvalidToken), (1.5, InvalidToken), ([["ops"]], InvalidToken), ({"ops": {}}, InvalidToken),
        ([{"name": "ops"}], InvalidToken),
    ],
)  # fmt: skip
def test_groups(given: Any, groups: Any) -> None:
    if groups is InvalidToken:
        with pytest.raises(InvalidToken, match="'groups'"):
            read(groups=given)
    else:
        assert read(groups=given).groups == groups


@pytest.mark.contract("6.18")
@pytest.mark.parametrize(
    ("given", "user"),
    [("42", "42"), (42, "42"), (-1, "-1"), (0, "0"), (2**70, str(2**70)), ("a b", "a b"), ("", None), (4.2, None),
     (42.0, None), (True, None), (None, None), (["42"], None), ({}, None), (..., None)],
)  # fmt: skip
def test_the_user(given: Any, user: str | None) -> None:
    if user is None:
        with pytest.raises(InvalidToken, match="'sub'"):
            read(sub=given)
    else:
        assert read(sub=given).user == user


@pytest.mark.contract("6.11", "6.23")
def test_times() -> None:
    assert read(exp=NOW + 0.5).expires_at == NOW + 0.5  # RFC 7519, section 2: a fraction is allowed.
    assert read(iat=NOW + 10_000, jti=7).user == "42"  # Neither decides anything.
    assert read(iat="yesterday").user == "42"
    assert read(nbf=NOW + 30).user == "42"
    assert read(nbf=None).user == "42"
    for ahead in (30.5, 300):
        with pytest.raises(NotYetValid):
            read(nbf=NOW + ahead)
    with pytest.raises(InvalidToken, match="another 301 s"):
        read(nbf=NOW + 301)
    with pytest.raises(ExpiredToken):
        read(exp=NOW)
    with pytest.raises(ExpiredToken, match="expired 90 s ago"):
        read(exp=NOW - 90)
    for bad in (str(NOW + 60), None, [NOW + 60], True, math.inf, 10**400):
        with pytest.raises(InvalidToken, match="'exp'"):
            read(exp=bad)


@pytest.mark.contract("6.22")
@pytest.mark.parametrize(
    ("audience", "fits"),
    [("bridge", True), (["bridge"], True), (["x", "bridge", 7, None], True), ("Bridge", False), ("bridge/", False),
     ([], False), (["x"], False), (None, False), (..., False), ({"bridge": 1}, False), (7, False),
     ([["bridge"]], False)],
)  # fmt: skip
def test_the_audience(audience: Any, fits: bool) -> None:
    reader = ClaimsReader(audience="bridge")
    if fits:
        assert read(reader=reader, aud=audience).user == "42"
    else:
        with pytest.raises(InvalidToken, match="aud"):
            read(reader=reader, aud=audience)


@pytest.mark.contract("6.22")
@pytest.mark.parametrize("issuer", ["https://issuer/", "HTTPS://issuer", ["https://issuer"], None, ..., 7])
def test_an_issuer_is_compared_exactly(issuer: Any) -> None:
    reader = ClaimsReader(issuer="https://issuer")
    assert read(reader=reader, iss="https://issuer").user == "42"
    with pytest.raises(InvalidToken, match="iss"):
        read(reader=reader, iss=issuer)


@pytest.mark.parametrize(
    ("claims", "why"),
    [
        ({"aud": "bridge"}, "the token has no claim 'iss'"),
        ({"aud": "bridge", "iss": "other"}, "the token is from another issuer (iss)"),
        ({"iss": "issuer"}, "the token has no claim 'aud'"),
        ({"iss": "issuer", "aud": ["other"]}, "the token is for another audience (aud)"),
    ],
)
def test_a_missing_claim_has_another_message_than_a_wrong_one(claims: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidToken, match=f"^{re.escape(why)}$"):
        read(reader=ClaimsReader(audience="bridge", issuer="issuer"), **claims)


@pytest.mark.contract("6.17")
@pytest.mark.parametrize(
    ("claims", "path", "value"),
    [
        ({"a": 1}, "a", 1), ({"a": 1}, "b", None), ({"a": {"b": 2}}, "a.b", 2), ({"a": {"b": {"c": 3}}}, "a.b.c", 3),
        ({"https://example.com/groups": ["x"]}, "https://example.com/groups", ["x"]),
        ({"https://example.com/app": {"roles": ["x"]}}, "https://example.com/app.roles", ["x"]),
        ({"resource_access": {"my.client": {"roles": ["x"]}}}, "resource_access.my.client.roles", ["x"]),
        # The exact name first, then the longest.
        ({"a.b": 1, "a": {"b": 2}}, "a.b", 1), ({"a.b": {"c": 1}, "a": {"b.c": 2}}, "a.b.c", 1),
        ({"a.b": {"x": 1}, "a": {"b.c": 2}}, "a.b.c", 2), ({"a.b": "text", "a": {"b": {"c": 3}}}, "a.b.c", 3),
        ({"a": "text"}, "a.b", None), ({"a": ["b"]}, "a.0", None), ({"a.": {"": 1}}, "a..", 1), ({}, ".", None),
        ({"a": {"b": None}}, "a.b", None),
    ],
)  # fmt: skip
def test_claims_by_path(claims: dict[str, Any], path: str, value: Any) -> None:
    assert claim_at(claims, path) == value


@pytest.mark.contract("6.20")
@pytest.mark.parametrize(
    ("claims", "name", "elsewhere"),
    [
        ({"_claim_names": {"groups": "s1"}, "_claim_sources": {"s1": {"endpoint": "https://x/"}}}, "groups", True),
        ({"hasgroups": True}, "groups", True), ({"hasgroups": "true"}, "groups", True),
        ({"hasgroups": False}, "groups", False), ({"_claim_names": {"groups": "src1"}}, "roles", False),
        ({"_claim_names": {"realm": "src1"}}, "realm.roles", True),
        ({"_claim_names": {"address": "x"}}, "groups", False),
        ({"_claim_names": {"groups": "src1"}}, "", False), ({"_claim_names": "groups"}, "groups", False),
        # Entra sends both for a user in some roles and many groups. The groups in the token count.
        ({"_claim_names": {"groups": "src1"}, "groups": ["ops"]}, "groups", False),
    ],
)  # fmt: skip
def test_groups_elsewhere_are_not_read_as_no_groups(claims: dict[str, Any], name: str, elsewhere: bool) -> None:
    reader = ClaimsReader(groups=name)
    if elsewhere:
        with pytest.raises(GroupsElsewhere, match=repr(name)):
            read(reader=reader, **claims)
    else:
        assert read(reader=reader, **claims).user == "42"


@pytest.mark.contract("6.21")
def test_without_a_groups_claim_none_is_read() -> None:
    assert read(reader=ClaimsReader(groups=""), groups={"no": "list"}).groups == ()


@pytest.mark.contract("6.14")
@pytest.mark.parametrize(
    ("given", "text"), [("a", "a"), (7, "7"), ("", None), (None, None), (True, None), (1.0, None), ([], None)]
)
def test_key_ids(given: object, text: str | None) -> None:
    assert key_id(given) == text


@pytest.mark.contract("6.16", "6.23")
def test_the_compact_form() -> None:
    head, claims = encode({"alg": "HS256", "typ": "at+jwt", "kid": 7, "x": 1}), encode({"sub": "42"})
    token = parse(f"{head}.{claims}.AAAA")
    assert (token.algorithm, token.kid, token.claims) == ("HS256", "7", {"sub": "42"})
    assert (token.signed, token.signature) == (f"{head}.{claims}".encode(), b"\0\0\0")
    # RFC 7515, section 2, allows no padding. A load balancer of Amazon adds padding, and signs it.
    assert parse(f"{head}==.{claims}.AA==").signed == f"{head}==.{claims}".encode()


@pytest.mark.contract("6.16")
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a.b.c.d.e", "encrypted"), ("", "three parts"), ("a.b", "three parts"), ("a.b.c.d", "three parts"),
        ("a b.c.d", "decoded"), ("a.b.c", "decoded"), ("é.é.é", "decoded"), ("\ud800..", "decoded"),
        (f"{encode([])}.{encode({})}.", "objects"), (f"{encode({'alg': 'HS256'})}.{encode('x')}.", "objects"),
        (f"{encode({})}.{encode({})}.", "'alg'"), (f"{encode({'alg': 7})}.{encode({})}.", "'alg'"),
        (f"{encode({'alg': 'HS256', 'crit': ['exp'], 'exp': 1})}.{encode({})}.", "crit"),
        (f"{encode({'alg': 'HS256', 'crit': None})}.{encode({})}.", "crit"),
        (f"{encode({'alg': 'HS256', 'b64': False})}.{encode({})}.", "crit"),
        (encode({}) + "." + base64.urlsafe_b64encode(b"[" * 100_000).decode() + ".", "decoded"),
    ],
)  # fmt: skip
def test_a_text_that_is_not_a_signed_token(text: str, why: str) -> None:
    with pytest.raises(InvalidToken, match=why):
        parse(text)


@pytest.mark.contract("2.18", "2.19")
def test_an_identity_depends_on_the_user_and_the_set_of_groups() -> None:
    key = b"k"

    def identity(user: str, *groups: str, key: bytes = key) -> str:
        return Subscriber(user, groups, 0.0).identity(key)

    one = identity("42", "a", "b")
    assert one == identity("42", "b", "a", "a")
    others = [
        identity("42"),
        identity("42", "a"),
        identity("42", "a", "b", "c"),
        identity("42", "a,b"),
        identity("42", 'a","b'),
        identity('42","a', "b"),
        identity("a", "42", "b"),
        identity("42", "a", "b", key=b"l"),
        identity("\ud800", "a", "b"),
        identity("é", "a", "b"),
    ]
    assert len({one, *others}) == len(others) + 1
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{22}", each) for each in (one, *others))
