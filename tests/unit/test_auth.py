"""The authenticator accepts good tokens only. The tests make the keys. An HTTP server on loopback has the key set."""

import asyncio
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

from bridge.service.http import keys
from bridge.service.http.auth import (
    MAX_TOKENS,
    Authenticator,
    ExpiredToken,
    GroupsElsewhere,
    InvalidKeySet,
    InvalidToken,
    KeysUnavailable,
    MissingToken,
    NotYetValid,
    mint,
)
from bridge.service.http.keys import FETCH_BURST, FETCH_EVERY_SECONDS, REFRESH_SECONDS, VERDICT_SECONDS
from tests.patience import PATIENCE

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
    kid = values.pop("kid", ...)
    headers = {"kid": kid} if kid is not ... else None
    return jwt.encode({k: v for k, v in values.items() if v is not ...}, key, algorithm=algorithm, headers=headers)


@pytest.mark.contract("2.2")
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


@pytest.mark.contract("2.2")
@pytest.mark.parametrize(
    "changes",
    [
        {"sub": ...}, {"sub": ""}, {"sub": 4.2}, {"sub": None}, {"exp": ...}, {"exp": "soon"}, {"exp": True},
        {"exp": float("inf")}, {"exp": float("nan")}, {"groups": True}, {"groups": [1.5]}, {"groups": [["ops"]]},
        {"groups": {"a": 1}}, {"nbf": NOW + 301}, {"exp": 10**400}, {"nbf": 10**400}, {"nbf": "x"},
    ],
)  # fmt: skip
async def test_bad_claims(changes: dict[str, Any]) -> None:
    token = jwt.api_jws.encode(
        json.dumps({k: v for k, v in {**CLAIMS, **changes}.items() if v is not ...}).encode(), SECRET, algorithm="HS256"
    )
    with pytest.raises(InvalidToken):
        await authenticate(token)


@pytest.mark.parametrize("token", ["", "a", "a.b.c", "....", "é", "x" * 10_000, "e30.e30.", "\0"])
async def test_a_text_that_is_not_a_jwt(token: str) -> None:
    with pytest.raises(InvalidToken):
        await authenticate(token)


async def test_the_wrong_key_and_a_changed_token() -> None:
    with pytest.raises(InvalidToken, match="signature"):
        await authenticate(signed(key="x" * 32))
    head, _, tail = signed().split(".")
    payload = base64.urlsafe_b64encode(json.dumps({**CLAIMS, "sub": "admin"}).encode()).decode().rstrip("=")
    with pytest.raises(InvalidToken, match="signature"):
        await authenticate(f"{head}.{payload}.{tail}")


@pytest.mark.contract("2.5")
@pytest.mark.parametrize("algorithm", ["none", "None", "HS384", "RS256", None, 7, ["HS256"]])
async def test_a_token_cannot_choose_its_algorithm(algorithm: Any) -> None:
    head = base64.urlsafe_b64encode(json.dumps({"alg": algorithm}).encode()).decode().rstrip("=")
    payload = base64.urlsafe_b64encode(json.dumps(CLAIMS).encode()).decode().rstrip("=")
    with pytest.raises(InvalidToken):
        await authenticate(f"{head}.{payload}.")


@pytest.mark.contract("2.2")
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
    daemon_threads = True
    document: Any
    status = 200
    hits = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = threading.Event()
        """While it is clear, requests wait for their answer."""
        self.answers.set()
        self.asked = threading.Event()
        """Set when a request has arrived and its answer is chosen."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, KeyServer)
        self.server.hits += 1
        document = self.server.document
        self.server.asked.set()
        self.server.answers.wait()
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a good answer may be slow. Such an answer must not fail a test."""
    monkeypatch.setattr(keys, "WAIT_SECONDS", PATIENCE)
    monkeypatch.setattr(keys, "FETCH_SECONDS", PATIENCE)


@pytest.fixture
def key_server() -> Iterator[KeyServer]:
    server = KeyServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.answers.set()
        server.shutdown()
        thread.join()
        server.server_close()


def url(server: KeyServer) -> str:
    return f"http://127.0.0.1:{server.server_port}/keys"


@pytest.mark.contract("2.4")
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


@pytest.mark.contract("2.5")
async def test_a_public_key_is_not_accepted_as_a_secret(key_server: KeyServer) -> None:
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


@pytest.mark.contract("6.12")
@pytest.mark.parametrize(
    "change", [{"use": "enc"}, {"alg": "RS512"}, {"key_ops": ["sign"]}, {"kty": "oct", "k": "AAAA"}, {"kid": "other"}]
)
async def test_a_key_for_something_else_is_not_used(key_server: KeyServer, change: dict[str, Any]) -> None:
    key_server.document = {"keys": [{**public(RSA, "r"), **change}, public(EC, "e")]}
    with pytest.raises(InvalidToken):
        await authenticate(signed(key=RSA, algorithm="RS256", kid="r"), secret=None, jwks=url(key_server))


def by(key: Any, kid: Any = ..., **claims: Any) -> str:
    """A token that one of our keys signed. It is valid for a day."""
    algorithm = {RSA: "RS256", EC: "ES256", ED: "EdDSA"}[key]
    return signed(key, algorithm, **{"exp": NOW + 86_400, "kid": kid, **claims})


@pytest.mark.contract("6.2")
async def test_a_rotated_key_is_found_at_once(key_server: KeyServer) -> None:
    key_server.document = {"keys": [public(EC, "old")]}
    authenticator = Authenticator(jwks=url(key_server))
    await authenticator.start()
    await authenticator.authenticate(by(EC, "old"), NOW)
    assert key_server.hits == 1

    key_server.document = {"keys": [public(ED, "new")]}
    await authenticator.authenticate(by(ED, "new"), NOW + 1)
    assert key_server.hits == 2
    # A withdrawn key is refused. Ten requests with the same token cost one read of the key set.
    withdrawn = by(EC, "old")
    for _ in range(10):
        with pytest.raises(InvalidToken, match="does not have key 'old'"):
            await authenticator.authenticate(withdrawn, NOW + 2)
    assert key_server.hits == 3


async def test_a_strangers_key_id_does_not_keep_a_rotated_key_out(key_server: KeyServer) -> None:
    key_server.document = {"keys": [public(EC, "old")]}
    authenticator = Authenticator(jwks=url(key_server))
    await authenticator.start()
    # A stranger guesses the next key's name, in the same second.
    with pytest.raises(InvalidToken):
        await authenticator.authenticate(by(RSA, "next"), NOW)
    key_server.document = {"keys": [public(EC, "old"), public(ED, "next")]}
    assert (await authenticator.authenticate(by(ED, "next"), NOW)).user == "42"


@pytest.mark.contract("6.5")
async def test_strangers_cannot_exceed_the_budget_or_cause_refusals_of_others(key_server: KeyServer) -> None:
    key_server.document = {"keys": [public(EC, "old")]}
    authenticator = Authenticator(jwks=url(key_server))
    await authenticator.start()
    for number in range(FETCH_BURST):
        with pytest.raises(InvalidToken):
            await authenticator.authenticate(by(RSA, f"invented-{number}"), NOW)
    for number in range(100):
        with pytest.raises(KeysUnavailable):
            await authenticator.authenticate(by(RSA, f"more-{number}"), NOW)
    assert key_server.hits == 1 + FETCH_BURST

    key_server.document = {"keys": [public(EC, "old"), public(ED, "new")]}
    with pytest.raises(KeysUnavailable):
        await authenticator.authenticate(by(ED, "new"), NOW + 1)
    assert (await authenticator.authenticate(by(EC, "old"), NOW + 1)).user == "42"
    assert (await authenticator.authenticate(by(ED, "new"), NOW + FETCH_EVERY_SECONDS)).user == "42"
    # That read of the key set also decided about the strangers' tokens.
    with pytest.raises(InvalidToken):
        await authenticator.authenticate(by(RSA, "more-0"), NOW + FETCH_EVERY_SECONDS)
    assert key_server.hits == 2 + FETCH_BURST


@pytest.mark.contract("6.1")
@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "https://evil"},
        {"iss": ...},
        {"aud": "other"},
        {"aud": ...},
        {"exp": NOW - 1},
        {"exp": ...},
        {"sub": ...},
    ],
)
async def test_a_token_whose_claims_do_not_fit_costs_nothing(key_server: KeyServer, claims: dict[str, Any]) -> None:
    key_server.document = {"keys": [public(EC, "old")]}
    authenticator = Authenticator(jwks=url(key_server), audience="bridge", issuer="https://issuer")
    await authenticator.start()
    with pytest.raises(InvalidToken):
        await authenticator.authenticate(by(RSA, "x", **{"aud": "bridge", "iss": "https://issuer", **claims}), NOW)
    with pytest.raises(InvalidToken, match="not accepted"):
        await authenticator.authenticate(signed(key="x" * 32), NOW)
    assert key_server.hits == 1


@pytest.mark.contract("6.6")
async def test_a_forgotten_token_is_busy_and_never_refused(
    key_server: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "MAX_REMEMBERED", 2)
    key_server.document = {"keys": [public(EC, "old")]}
    authenticator = Authenticator(jwks=url(key_server))
    await authenticator.start()
    tokens = [by(RSA, f"invented-{number}") for number in range(FETCH_BURST)]
    for token in tokens:
        with pytest.raises(InvalidToken):
            await authenticator.authenticate(token, NOW)
    with pytest.raises(InvalidToken):
        await authenticator.authenticate(tokens[-1], NOW)
    with pytest.raises(KeysUnavailable):
        await authenticator.authenticate(tokens[0], NOW)


@pytest.mark.contract("6.3")
async def test_a_verdict_is_looked_up_again_after_a_while(key_server: KeyServer) -> None:
    key_server.document = {"keys": [public(EC, "old")]}
    authenticator = Authenticator(jwks=url(key_server))
    await authenticator.start()
    token = by(ED, "late")  # The issuer publishes this key only after it has signed with it.
    with pytest.raises(InvalidToken):
        await authenticator.authenticate(token, NOW)
    key_server.document = {"keys": [public(ED, "late")]}
    with pytest.raises(InvalidToken):
        await authenticator.authenticate(token, NOW + VERDICT_SECONDS)
    assert (await authenticator.authenticate(token, NOW + VERDICT_SECONDS + 1)).user == "42"


@pytest.mark.contract("6.7")
@pytest.mark.parametrize("kid", ["same", ...])
async def test_another_key_under_the_same_name_is_found(key_server: KeyServer, kid: Any) -> None:
    other = ed25519.Ed25519PrivateKey.generate()
    key_server.document = {"keys": [public(ED, "same")]}
    authenticator = Authenticator(jwks=url(key_server))
    await authenticator.start()
    token = signed(other, "EdDSA", kid=kid)
    with pytest.raises(InvalidToken, match="signature"):
        await authenticator.authenticate(token, NOW)
    key_server.document = {"keys": [public(other, "same")]}
    assert (await authenticator.authenticate(token, NOW + VERDICT_SECONDS + 1)).user == "42"


@pytest.mark.contract("6.14")
@pytest.mark.parametrize("kid", ["same", ...])
async def test_each_of_several_keys_with_one_name_is_tried(key_server: KeyServer, kid: Any) -> None:
    other = ed25519.Ed25519PrivateKey.generate()
    key_server.document = {"keys": [public(EC, "same"), public(other, "same"), public(ED, "same")]}
    authenticator = Authenticator(jwks=url(key_server))
    await authenticator.start()
    for key, algorithm in [(ED, "EdDSA"), (other, "EdDSA"), (EC, "ES256")]:
        assert (await authenticator.authenticate(signed(key, algorithm, kid=kid), NOW)).user == "42"
    assert key_server.hits == 1


@pytest.mark.contract("6.14")
@pytest.mark.parametrize(
    ("in_the_set", "in_the_token"),
    [(7, 7), ("7", 7), (7, "7"), ("k", None), ("k", ["k"]), ("k", {"a": 1}), ("k", 1.5), ("k", True), ("k", ""),
     (None, "k"), (["k"], "k"), (..., "k")],
)  # fmt: skip
async def test_a_kid_of_another_type(tmp_path: Path, in_the_set: Any, in_the_token: Any) -> None:
    key = {**public(ED, "x"), "kid": in_the_set}
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [{k: v for k, v in key.items() if v is not ...}]}))
    authenticator = Authenticator(jwks=str(tmp_path / "keys.json"))
    await authenticator.start()
    head = base64.urlsafe_b64encode(json.dumps({"alg": "EdDSA", "kid": in_the_token}).encode()).rstrip(b"=")
    payload = base64.urlsafe_b64encode(json.dumps(CLAIMS).encode()).rstrip(b"=")
    tail = base64.urlsafe_b64encode(ED.sign(head + b"." + payload)).rstrip(b"=")
    assert (await authenticator.authenticate(b".".join([head, payload, tail]).decode(), NOW)).user == "42"


@pytest.mark.contract("5.41", "6.4")
async def test_without_an_answer_from_the_key_set_no_token_is_refused(key_server: KeyServer) -> None:
    key_server.document, key_server.status = {}, 500
    authenticator = Authenticator(jwks=url(key_server))
    await authenticator.start()
    for _ in range(20):
        with pytest.raises(KeysUnavailable):
            await authenticator.authenticate(by(EC, "e"), NOW)
    assert key_server.hits == 1 + FETCH_BURST
    key_server.document, key_server.status = {"keys": [public(EC, "e")]}, 200
    assert (await authenticator.authenticate(by(EC, "e"), NOW + FETCH_EVERY_SECONDS)).user == "42"
    # After the first read, a token with a known key is accepted during an outage.
    key_server.status = 500
    assert (await authenticator.authenticate(by(EC, "e"), NOW + REFRESH_SECONDS + 100)).user == "42"


@pytest.mark.contract("6.9")
@pytest.mark.parametrize(
    ("answer", "why"),
    [(b"<!doctype html><p>Sign in", "it is an HTML page"), (b"", "it is not JSON"), ([], "not a JSON Web Key Set"),
     ({"keys": {}}, "not a JSON Web Key Set"), ({"jwks_uri": "https://idp/keys"}, "set BRIDGE_JWKS to 'https://idp/keys'"),
     ({"keys": []}, "no usable key for RS256"), (b"[" * 100_000, "not JSON"), (b" " * 1_000_001, "larger than")],
)  # fmt: skip
async def test_an_answer_that_is_not_a_key_set_keeps_the_last_good_one(
    key_server: KeyServer, answer: Any, why: str
) -> None:
    key_server.document = {"keys": [public(EC, "e")]}
    authenticator = Authenticator(jwks=url(key_server))
    await authenticator.start()
    key_server.document = answer
    with pytest.raises(KeysUnavailable, match=why):
        await authenticator.authenticate(by(ED, "new"), NOW)
    assert (await authenticator.authenticate(by(EC, "e"), NOW)).user == "42"
    with pytest.raises(InvalidKeySet, match=why):
        await Authenticator(jwks=url(key_server)).start(strict=True)


@pytest.mark.contract("6.13")
async def test_a_byte_order_mark_before_a_key_set(key_server: KeyServer) -> None:
    key_server.document = b"\xef\xbb\xbf" + json.dumps({"keys": [public(EC, "e")]}).encode()
    await Authenticator(jwks=url(key_server)).start(strict=True)


@pytest.mark.contract("6.4", "6.8")
async def test_a_slow_endpoint_delays_no_token_whose_key_is_known(
    key_server: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_server.document = {"keys": [public(EC, "e")]}
    authenticator = Authenticator(jwks=url(key_server))
    await authenticator.authenticate(by(EC, "e"), NOW)
    key_server.answers.clear()
    key_server.document = {"keys": [public(ED, "new")]}
    # The set is old, so it is read again in the background. That read does not end, and these requests do not wait.
    for _ in range(3):
        await authenticator.authenticate(by(EC, "e"), NOW + REFRESH_SECONDS + 1)
    # A stranger's cookie before a good one does not cause a wait either.
    await authenticator.authenticate_any([by(RSA, "x"), by(EC, "e")], NOW + REFRESH_SECONDS + 1)
    # A short limit is enough: the endpoint does not answer until the test allows it.
    monkeypatch.setattr(keys, "WAIT_SECONDS", 0.01)
    with pytest.raises(KeysUnavailable, match="has not answered yet"):
        await authenticator.authenticate(by(ED, "new"), NOW + REFRESH_SECONDS + 1)
    monkeypatch.setattr(keys, "WAIT_SECONDS", PATIENCE)
    key_server.answers.set()
    assert (await authenticator.authenticate(by(ED, "new"), NOW + REFRESH_SECONDS + 2)).user == "42"


@pytest.mark.contract("6.3")
async def test_a_read_that_began_before_a_token_arrived_does_not_refuse_it(key_server: KeyServer) -> None:
    key_server.document = {"keys": [public(EC, "old")]}
    authenticator = Authenticator(jwks=url(key_server))
    await authenticator.start()
    key_server.answers.clear()
    key_server.asked.clear()
    stranger = asyncio.create_task(authenticator.authenticate(by(RSA, "x"), NOW))
    await asyncio.to_thread(key_server.asked.wait)
    # The answer on its way has the old keys. Now the issuer publishes the new key, and signs with it.
    key_server.document = {"keys": [public(ED, "new")]}
    page = asyncio.create_task(authenticator.authenticate(by(ED, "new"), NOW))
    await asyncio.sleep(0)  # It runs until it waits for the key set.
    key_server.answers.set()
    with pytest.raises(InvalidToken):
        await stranger
    assert (await page).user == "42"
    assert key_server.hits == 3


async def test_a_clock_that_is_set_back_does_not_keep_an_old_key_set(key_server: KeyServer) -> None:
    key_server.document = {"keys": [public(EC, "old")]}
    authenticator = Authenticator(jwks=url(key_server))
    with pytest.raises(InvalidToken):
        await authenticator.authenticate(by(ED, "new"), NOW)
    key_server.document = {"keys": [public(ED, "new")]}
    assert (await authenticator.authenticate(by(ED, "new"), NOW - 10_000)).user == "42"


@pytest.mark.contract("6.25")
async def test_the_first_good_one_of_several_tokens_counts(key_server: KeyServer) -> None:
    key_server.document = {"keys": [public(EC, "e")]}
    authenticator = Authenticator(secret=SECRET, jwks=url(key_server))
    await authenticator.start()
    good, bad, old = signed(sub="a"), "x.y.z", signed(exp=NOW - 1)
    for tokens in [
        [bad, good],
        [old, good, signed(sub="b")],
        [good, bad],
        [by(ED, "x"), good],
        [bad, by(EC, "e", sub="a")],
    ]:
        assert (await authenticator.authenticate_any(tokens, NOW)).user == "a"
    assert key_server.hits == 1
    with pytest.raises(ExpiredToken):
        await authenticator.authenticate_any([bad, old], NOW)
    with pytest.raises(InvalidToken):
        await authenticator.authenticate_any([bad] * MAX_TOKENS + [good], NOW)
    key_server.status = 500
    with pytest.raises(KeysUnavailable):  # The second one may be good.
        await authenticator.authenticate_any([bad, by(ED, "x"), old], NOW)


@pytest.mark.contract("6.11")
async def test_a_token_that_is_valid_soon_is_not_refused() -> None:
    assert (await authenticate(signed(nbf=NOW + 30))).user == "42"
    with pytest.raises(NotYetValid, match="another 31 s"):
        await authenticate(signed(nbf=NOW + 31))


async def test_groups_elsewhere_need_a_good_signature(key_server: KeyServer) -> None:
    overage: dict[str, Any] = {"_claim_names": {"groups": "src1"}}
    with pytest.raises(GroupsElsewhere, match="BRIDGE_JWT_GROUPS_CLAIM"):
        await authenticate(signed(**overage))
    key_server.document = {"keys": [public(EC, "e")]}
    with pytest.raises(InvalidToken, match="does not have key"):
        await authenticate(by(ED, "x", **overage), jwks=url(key_server))


@pytest.mark.contract("6.15")
async def test_an_algorithm_by_its_name_in_rfc_9864(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [public(ED, "d", alg="Ed25519")]}))
    authenticator = Authenticator(jwks=str(tmp_path / "keys.json"))
    head = base64.urlsafe_b64encode(b'{"alg":"Ed25519","kid":"d"}').rstrip(b"=")
    payload = base64.urlsafe_b64encode(json.dumps(CLAIMS).encode()).rstrip(b"=")
    tail = base64.urlsafe_b64encode(ED.sign(head + b"." + payload)).rstrip(b"=")
    assert (await authenticator.authenticate(b".".join([head, payload, tail]).decode(), NOW)).user == "42"


@pytest.mark.contract("6.12")
@pytest.mark.parametrize(
    "bad", [{"kty": "RSA", "kid": "x"}, {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}, None, "x", {"kty": "OKP"},
            {"kty": "OKP", "crv": "Ed25519", "x": "AA"}, {"kty": "AKP", "alg": "ML-DSA-65"}, {"kty": ["EC"]}, [], 7,
            {"kty": "EC", "crv": "P-256K", "x": "AA", "y": "AA"}, {"kty": "OKP", "crv": "X25519", "x": "AA"},
            {**public(RSA, "d"), "use": "enc"}, {**public(RSA, "d"), "alg": "RSA-OAEP"},
            {**public(RSA, "d"), "key_ops": ["encrypt"]}, {**public(RSA, "d"), "use": ["sig"]}]
)  # fmt: skip
async def test_a_bad_key_beside_a_good_one_is_ignored(tmp_path: Path, bad: Any) -> None:
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


@pytest.mark.contract("6.13")
async def test_a_private_key_in_a_set_verifies_by_its_public_half(tmp_path: Path) -> None:
    private = json.loads(jwt.get_algorithm_by_name("RS256").to_jwk(RSA))
    assert "d" in private
    nulls = {"use": None, "alg": None, "key_ops": None}
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [{**private, **nulls, "kid": "r"}]}))
    assert (await authenticate(by(RSA, "r"), jwks=str(tmp_path / "keys.json"))).user == "42"


@pytest.mark.contract("2.3")
async def test_user_and_groups_by_other_claims() -> None:
    options: dict[str, Any] = {"user_claim": "email", "groups_claim": "realm_access.roles"}
    token = signed(email="a@b.example", realm_access={"roles": ["ops"]}, sub=...)
    subscriber = await authenticate(token, **options)
    assert (subscriber.user, subscriber.groups) == ("a@b.example", ("ops",))
    minted = mint(SECRET, user="a@b", groups=("dev",), ttl_seconds=60, now=NOW, **options)
    subscriber = await authenticate(minted, **options)
    assert (subscriber.user, subscriber.groups) == ("a@b", ("dev",))
