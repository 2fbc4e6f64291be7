"""Which tokens are good. Keys are made here; the key set is served by a real HTTP server on loopback."""

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from bridge.auth import (
    UNKNOWN_KEY_SECONDS,
    Authenticator,
    ExpiredToken,
    InvalidKeySet,
    InvalidToken,
    KeysUnavailable,
    MissingToken,
    mint,
)

SECRET = "0123456789abcdef0123456789abcdef"
NOW = 1_800_000_000.0
CLAIMS: dict[str, Any] = {"sub": "42", "exp": NOW + 60}

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()


def public(key: Any, kid: str, **more: Any) -> dict[str, Any]:
    algorithm = {"RSAPrivateKey": "RS256", "ECPrivateKey": "ES256", "Ed25519PrivateKey": "EdDSA"}[
        type(key).__name__.removeprefix("_")
    ]
    text = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key())
    return {**(json.loads(text) if isinstance(text, str) else text), "kid": kid, **more}


async def authenticate(token: str | None, now: float = NOW, **options: Any) -> Any:
    return await Authenticator(**{"secret": SECRET, **options}).authenticate(token, now)


def signed(key: Any = SECRET, algorithm: str = "HS256", **changes: Any) -> str:
    values = {**CLAIMS, **changes}
    headers = {"kid": values.pop("kid")} if "kid" in values else None
    return jwt.encode({k: v for k, v in values.items() if v is not ...}, key, algorithm=algorithm, headers=headers)


async def test_a_good_token() -> None:
    subscriber = await authenticate(signed(groups=["ops", "dev", "ops"]))
    assert (subscriber.user, subscriber.groups, subscriber.expires_at) == ("42", ("ops", "dev"), NOW + 60)


async def test_a_minted_token_is_good() -> None:
    token = mint(SECRET, user="a.b", groups=("ops",), ttl_seconds=60, now=NOW)
    assert (await authenticate(token)).user == "a.b"


async def test_no_token() -> None:
    with pytest.raises(MissingToken):
        await authenticate(None)


async def test_an_expired_token_says_since_when() -> None:
    with pytest.raises(ExpiredToken, match="expired 35 s ago"):
        await authenticate(signed(), now=NOW + 95)
    with pytest.raises(ExpiredToken):
        await authenticate(signed(), now=NOW + 60)


@pytest.mark.parametrize(
    "changes",
    [
        {"sub": ...}, {"sub": ""}, {"sub": 42}, {"sub": None}, {"exp": ...}, {"exp": "soon"}, {"exp": True},
        {"exp": float("inf")}, {"exp": float("nan")}, {"groups": "ops"}, {"groups": [1]}, {"groups": [""]},
        {"groups": {"a": 1}}, {"nbf": NOW + 31}, {"exp": 10**400}, {"nbf": 10**400}, {"nbf": "x"},
    ],
)  # fmt: skip
async def test_bad_claims(changes: dict[str, Any]) -> None:
    token = jwt.api_jws.encode(
        json.dumps({k: v for k, v in {**CLAIMS, **changes}.items() if v is not ...}).encode(), SECRET, algorithm="HS256"
    )
    with pytest.raises(InvalidToken):
        await authenticate(token)


@pytest.mark.parametrize("token", ["", "a", "a.b.c", "....", "é", "x" * 10_000, "e30.e30.", "\0"])
async def test_no_jwt_at_all(token: str) -> None:
    with pytest.raises(InvalidToken):
        await authenticate(token)


async def test_the_wrong_key_and_a_changed_token() -> None:
    with pytest.raises(InvalidToken, match="signature"):
        await authenticate(signed(key="x" * 32))
    head, _, tail = signed().split(".")
    payload = base64.urlsafe_b64encode(json.dumps({**CLAIMS, "sub": "admin"}).encode()).decode().rstrip("=")
    with pytest.raises(InvalidToken, match="signature"):
        await authenticate(f"{head}.{payload}.{tail}")


@pytest.mark.parametrize("algorithm", ["none", "None", "HS384", "RS256", None, 7, ["HS256"]])
async def test_an_algorithm_of_the_tokens_choosing(algorithm: Any) -> None:
    head = base64.urlsafe_b64encode(json.dumps({"alg": algorithm}).encode()).decode().rstrip("=")
    payload = base64.urlsafe_b64encode(json.dumps(CLAIMS).encode()).decode().rstrip("=")
    with pytest.raises(InvalidToken):
        await authenticate(f"{head}.{payload}.")


async def test_audience_and_issuer_where_configured() -> None:
    options: dict[str, Any] = {"audience": "bridge", "issuer": "https://issuer"}
    good: dict[str, Any] = {"aud": ["bridge", "other"], "iss": "https://issuer"}
    assert (await authenticate(signed(**good), **options)).user == "42"
    bads: list[dict[str, Any]] = [{"aud": "other"}, {"aud": ...}, {"iss": "https://evil"}, {"iss": ...}]
    for bad in bads:
        with pytest.raises(InvalidToken):
            await authenticate(signed(**{**good, **bad}), **options)
    assert (await authenticate(signed(**good))).user == "42"


class KeyServer(ThreadingHTTPServer):
    document: Any
    status = 200
    hits = 0


@pytest.fixture
def key_server() -> Iterator[KeyServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert isinstance(self.server, KeyServer)
            self.server.hits += 1
            body = json.dumps(self.server.document).encode()
            self.send_response(self.server.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = KeyServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def url(server: KeyServer) -> str:
    return f"http://127.0.0.1:{server.server_port}/keys"


@pytest.mark.parametrize(("key", "algorithm"), [(RSA, "RS256"), (EC, "ES256"), (ED, "EdDSA")])
async def test_each_algorithm_of_a_key_set(key_server: KeyServer, key: Any, algorithm: str) -> None:
    key_server.document = {"keys": [public(RSA, "r"), public(EC, "e"), public(ED, "d")]}
    kid = {"RS256": "r", "ES256": "e", "EdDSA": "d"}[algorithm]
    options: dict[str, Any] = {"secret": None, "jwks": url(key_server)}
    assert (await authenticate(signed(key=key, algorithm=algorithm, kid=kid), **options)).user == "42"
    # One key fits, so a token need not name it.
    assert (await authenticate(signed(key=key, algorithm=algorithm), **options)).user == "42"
    wrong = {"r": "e", "e": "d", "d": "r"}[kid]
    with pytest.raises(InvalidToken):
        await authenticate(signed(key=key, algorithm=algorithm, kid=wrong), **options)


async def test_a_public_key_is_no_secret(key_server: KeyServer) -> None:
    key_server.document = {"keys": [public(RSA, "r")]}
    pem = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    head = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"r"}').decode().rstrip("=")
    payload = base64.urlsafe_b64encode(json.dumps(CLAIMS).encode()).decode().rstrip("=")
    signature = hmac.new(pem, f"{head}.{payload}".encode(), hashlib.sha256).digest()
    token = f"{head}.{payload}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"
    several: list[dict[str, Any]] = [{"secret": None}, {}]
    for options in several:
        with pytest.raises(InvalidToken):
            await authenticate(token, jwks=url(key_server), **options)


@pytest.mark.parametrize(
    "change", [{"use": "enc"}, {"alg": "RS512"}, {"key_ops": ["sign"]}, {"kty": "oct", "k": "AAAA"}, {"kid": "other"}]
)
async def test_a_key_for_something_else_is_not_used(key_server: KeyServer, change: dict[str, Any]) -> None:
    key_server.document = {"keys": [{**public(RSA, "r"), **change}, public(EC, "e")]}
    with pytest.raises(InvalidToken):
        await authenticate(signed(key=RSA, algorithm="RS256", kid="r"), secret=None, jwks=url(key_server))


async def test_rotation_is_found_at_once_and_inventions_are_not_paid_for(key_server: KeyServer) -> None:
    key_server.document = {"keys": [public(EC, "old")]}
    authenticator = Authenticator(jwks=url(key_server))
    await authenticator.authenticate(signed(key=EC, algorithm="ES256", kid="old"), NOW)
    assert key_server.hits == 1

    key_server.document = {"keys": [public(ED, "new")]}
    late = NOW + UNKNOWN_KEY_SECONDS + 1
    rotated = signed(key=ED, algorithm="EdDSA", kid="new", exp=late + 60)
    await authenticator.authenticate(rotated, late)
    assert key_server.hits == 2
    for _ in range(10):
        with pytest.raises(InvalidToken, match="does not have key"):
            await authenticator.authenticate(signed(key=EC, algorithm="ES256", kid="old", exp=late + 60), late + 1)
    assert key_server.hits == 2


async def test_a_key_set_that_does_not_answer_judges_nobody(key_server: KeyServer) -> None:
    key_server.document, key_server.status = {}, 500
    authenticator = Authenticator(jwks=url(key_server))
    await authenticator.start()
    token = signed(key=EC, algorithm="ES256", kid="e", exp=NOW + 10_000)
    with pytest.raises(KeysUnavailable):
        await authenticator.authenticate(token, NOW)
    key_server.document, key_server.status = {"keys": [public(EC, "e")]}, 200
    with pytest.raises(KeysUnavailable):
        await authenticator.authenticate(token, NOW + 1)
    assert (await authenticator.authenticate(token, NOW + 100)).user == "42"
    # And once it has been read, an outage does not lock out those whose key is known.
    key_server.status = 500
    assert (await authenticator.authenticate(token, NOW + 5000)).user == "42"


@pytest.mark.parametrize(
    "bad", [{"kty": "RSA", "kid": "x"}, {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}, None, "x", {"kty": "OKP"},
            {"kty": "OKP", "crv": "Ed25519", "x": "AA"}]
)  # fmt: skip
async def test_a_bad_key_beside_a_good_one_is_passed_over(tmp_path: Path, bad: Any) -> None:
    good = public(ED, "d")
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [bad, good, good]}))
    authenticator = Authenticator(jwks=str(tmp_path / "keys.json"))
    await authenticator.start()
    for kid in [{"kid": "d"}, {}]:
        assert (await authenticator.authenticate(signed(key=ED, algorithm="EdDSA", **kid), NOW)).user == "42"


async def test_a_key_set_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    authenticator = Authenticator(jwks=str(file))
    with pytest.raises(InvalidKeySet):
        await authenticator.start()
    for bad in [
        "",
        "{}",
        '{"keys": []}',
        '{"keys": [{"kty": "oct", "k": "AAAA"}]}',
        '{"keys": [{"kty": "RSA"}]}',
        "[]",
    ]:
        file.write_text(bad)
        with pytest.raises(InvalidKeySet):
            await Authenticator(jwks=str(file)).start()
    file.write_text(json.dumps({"keys": [public(ED, "d")]}))
    await authenticator.start()
    assert (await authenticator.authenticate(signed(key=ED, algorithm="EdDSA", kid="d"), NOW)).user == "42"
