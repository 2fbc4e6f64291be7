"""The bridge uses some keys of a key set, and ignores the others."""

from __future__ import annotations

import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bridge.service.http.keys import InvalidKeySet, read_key_set


def public(key: Any, algorithm: str) -> dict[str, Any]:
    found: dict[str, Any] = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)
    return found


GOOD = {**public(Ed25519PrivateKey.generate(), "EdDSA"), "kid": "good"}
P256 = public(ec.generate_private_key(ec.SECP256R1()), "ES256")
P384 = public(ec.generate_private_key(ec.SECP384R1()), "ES384")
ED448 = public(Ed448PrivateKey.generate(), "EdDSA")


def names(*keys: dict[str, Any]) -> list[tuple[str | None, str]]:
    document = json.dumps({"keys": [*keys, GOOD]}).encode()
    return [(key.kid, key.algorithm) for key in read_key_set(document)]


def test_each_kind_of_key_has_its_algorithm() -> None:
    assert names({**P256, "kid": "e"}) == [("e", "ES256"), ("good", "EdDSA")]


@pytest.mark.parametrize("other", [P384, ED448], ids=["P-384", "Ed448"])
def test_a_good_key_on_another_curve_is_ignored(other: dict[str, Any]) -> None:
    """PyJWT would read both; ES256 is P-256 alone (RFC 7518, section 3.4)."""
    assert names({**other, "kid": "other"}) == [("good", "EdDSA")]


def test_a_curve_by_the_name_of_another_key_is_ignored() -> None:
    assert names({**P384, "crv": "P-256"}) == [("good", "EdDSA")]
    assert names({**P256, "crv": "P-384"}) == [("good", "EdDSA")]


def test_a_key_that_occurs_twice_counts_once() -> None:
    assert names(GOOD, GOOD) == [("good", "EdDSA")]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (b"<html>", "HTML page"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"jwks_uri": "https://idp.example/keys"}', "discovery document: set BRIDGE_JWKS to 'https://idp"),
        (b"[]", "not a JSON Web Key Set"),
        (b'{"keys": {}}', "not a JSON Web Key Set"),
        (b'{"keys": []}', "no usable key for RS256, ES256, EdDSA"),
    ],
)
def test_a_document_that_is_not_a_key_set(document: bytes, words: str) -> None:
    with pytest.raises(InvalidKeySet, match=words):
        read_key_set(document)


def test_a_byte_order_mark_is_ignored() -> None:
    (key,) = read_key_set(b"\xef\xbb\xbf" + json.dumps({"keys": [GOOD]}).encode())
    assert key.kid == "good"
