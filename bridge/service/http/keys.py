"""Reads the issuer's public keys (RFC 7517) from a URL or a file, and decides when to read them again.

Anybody can invent a key id, and after each rotation a real one is unknown for a moment. So a token that no key verifies
is refused only if the key set was read after the token's first arrival. A budget limits the readings; until the next
one, the answer is "try again". The last valid set stays in use.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jwt
import structlog

from bridge.service.budgets import Budget
from bridge.service.http.claims import Token, TryAgain, key_id

FETCH_BURST = 5
"""The most readings of the key set without a pause."""

FETCH_EVERY_SECONDS = 10.0
"""After the burst, one reading in this time, whatever tokens arrive. A `busy` client returns after 5 to 15 s."""

FETCH_SECONDS = 5.0
"""Limit for one reading, from the connection to the last byte."""

WAIT_SECONDS = 2.0
"""A request waits at most this long for a reading, and is then answered with `busy`. Most endpoints answer in 0.2 s."""

VERDICT_SECONDS = 30.0
"""For this time a reading decides about a token that arrived before it. After that, the token causes a new reading."""

REFRESH_SECONDS = 3600.0
"""A set older than this is read again in the background, so that a withdrawn key does not stay valid forever."""

FIRST_READ_EVERY_SECONDS = 5.0
"""Average interval of the readings until the first one succeeds. Without keys the replica is not ready, so no token
arrives that would cause a reading."""

MAX_DOCUMENT_BYTES = 1_000_000
"""The largest accepted document. The largest real sets have about 20 kB."""

MAX_REMEMBERED = 4096
"""The most remembered tokens that no key verified, 150 bytes each. A forgotten token counts as new: it gets `busy`, and
never a wrong 401."""

ALGORITHMS = {"RS256": "RSA", "ES256": "EC", "EdDSA": "OKP"}
"""The accepted algorithms, each with its key type (RFC 7518, section 6; RFC 8037)."""

_CURVES = {"ES256": "P-256", "EdDSA": "Ed25519"}
_PRIVATE = {"d", "p", "q", "dp", "dq", "qi", "oth"}

_log = structlog.get_logger("bridge.keys")


class KeysUnavailable(TryAgain):
    """No key verifies the token, and no set has been read since its arrival. Another try may succeed."""


class InvalidKeySet(ValueError):
    """The key set cannot be read, or has no key that could verify a token."""


@dataclass(frozen=True, slots=True)
class Key:
    """A public key. `key` is PyJWT's key object."""

    kid: str | None
    algorithm: str
    key: Any


class KeySet:
    """The keys of a JWKS document. It is read again if a token arrives that no key verifies.

    Args:
        source: URL or file of the document.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        # A URL may contain a password, which must not be logged.
        self._shown = re.sub(r"(?<=//)[^/@]*(?=@)", "***", source)
        self._is_url = source.lower().startswith(("http://", "https://"))
        self._keys: tuple[Key, ...] = ()
        self._failure: str | None = None
        self._budget = Budget(FETCH_BURST, FETCH_EVERY_SECONDS)
        self._begun = 0
        """Number of the latest reading."""
        self._read = 0
        """Number of the latest successful reading. `_read_at` is the time of its begin."""
        self._read_at: float | None = None
        self._reading: asyncio.Task[None] | None = None
        self._needs: dict[bytes, int] = {}
        """For each token that no key verified, by digest: the reading that decides. The oldest is deleted first."""

    async def start(self, *, strict: bool) -> None:
        """Reads the set once; see `Authenticator.start`.

        Raises:
            InvalidKeySet
        """
        await self._begin(time.time())
        if self._failure is not None and (strict or not self._is_url):
            raise InvalidKeySet(self._failure)

    @property
    def missing(self) -> str | None:
        """Why no set has been read yet; None once one has been read."""
        if self._read:
            return None
        return self._failure or f"the key set {self._shown} has not answered yet"

    async def read_first(self) -> None:
        """Reads the set about every 5 s, until one reading succeeds."""
        while self.missing is not None:
            await asyncio.sleep(FIRST_READ_EVERY_SECONDS * random.uniform(0.5, 1.5))
            if self.missing is not None:
                await self._begin(time.time())

    def verifies(self, token: Token, now: float) -> bool:
        """Whether a key of the current set signed this token. Never waits.

        RFC 7515, section 4.1.4: `kid` is a hint. If the token or a key has none, the algorithm decides whether they
        match. Two keys may have the same `kid` (RFC 7517, section 4.5), so each matching key is tried.
        """
        for key in self._keys:
            fits = key.algorithm == token.algorithm and (token.kid in (None, key.kid) or key.kid is None)
            if fits and verify(token, key.key):
                self._renew_in_background(now)
                return True
        return False

    def knows(self, token: Token) -> bool:
        """Whether the current set contains the token's key."""
        return any(key.algorithm == token.algorithm and token.kid in (None, key.kid) for key in self._keys)

    def has_decided(self, token: Token, now: float) -> bool:
        """Whether the set was read after this token's first arrival, so that the token may be refused.

        If not, the token is remembered: the next reading decides.
        """
        needed = self._needs.get(token.digest)
        if needed is not None and self._read >= needed and self._age(now) <= VERDICT_SECONDS:
            return True
        if needed is None or self._read >= needed:
            self._needs.pop(token.digest, None)
            self._needs[token.digest] = self._begun + 1
            if len(self._needs) > MAX_REMEMBERED:
                del self._needs[next(iter(self._needs))]
        return False

    async def renew(self, now: float) -> None:
        """Reads the set again, or waits for the current reading, at most 2 s.

        Raises:
            KeysUnavailable: the budget is used up, the endpoint is slow, or its answer cannot be used.

        Cancelling does not end the reading.
        """
        if self._reading is None and not self._budget.take(now):
            raise KeysUnavailable(
                f"no known key verifies the token, and the key set was read {FETCH_BURST} times in a row: "
                f"it is read again within {FETCH_EVERY_SECONDS:g} s"
            )
        before = self._read
        await asyncio.wait({self._begin(now)}, timeout=WAIT_SECONDS)
        if self._read == before:
            raise KeysUnavailable(self._failure or f"the key set {self._shown} has not answered yet")

    def _age(self, now: float) -> float:
        # The absolute value: after a clock is set back, a set must not count as new until the clock has caught up.
        return abs(now - self._read_at) if self._read_at is not None else float("inf")

    def _renew_in_background(self, now: float) -> None:
        if self._reading is None and self._age(now) > REFRESH_SECONDS and self._budget.take(now):
            self._begin(now)

    def _begin(self, now: float) -> asyncio.Task[None]:
        if self._reading is None:
            self._begun += 1
            self._reading = asyncio.create_task(self._renew(self._begun, now), name="key-set")
        return self._reading

    async def _renew(self, number: int, now: float) -> None:
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                self._keys = read_key_set(await self._fetch())
        except Exception as error:  # noqa: BLE001 - whatever an endpoint answers, the current set stays in use.
            why = _describe(error)
            self._failure = f"the key set {self._shown} cannot be used: {why}"
            _log.error("key set not read", source=self._shown, error=why, keys_kept=len(self._keys))
        else:
            self._failure = None
            self._read, self._read_at = number, now
            _log.info("key set read", source=self._shown, keys=[key.kid for key in self._keys])
        finally:
            self._reading = None

    async def _fetch(self) -> bytes:
        if not self._is_url:
            return Path(self._source).read_bytes()  # noqa: ASYNC240 - a small local file, read rarely.
        headers = {
            "Accept": "application/jwk-set+json, application/json;q=0.9, */*;q=0.1",  # RFC 7517, section 8.5.2.
            "Cache-Control": "no-cache",  # A cache must not hide a new key (RFC 9111, section 5.2.1.4).
        }
        async with (
            httpx.AsyncClient(timeout=FETCH_SECONDS, follow_redirects=True) as client,
            client.stream("GET", self._source, headers=headers) as response,
        ):
            response.raise_for_status()
            body = bytearray()
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > MAX_DOCUMENT_BYTES:
                    raise InvalidKeySet(f"it is larger than {MAX_DOCUMENT_BYTES} bytes; is this the key set's address?")
            return bytes(body)


def _describe(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no complete answer within {FETCH_SECONDS:g} s"
    if isinstance(error, httpx.HTTPStatusError):
        # The library's message contains the whole address, with its password.
        return f"it answers {error.response.status_code} {error.response.reason_phrase}".rstrip()
    return str(error) or type(error).__name__


def verify(token: Token, key: Any) -> bool:
    """Whether this key signed the token. The caller must have checked that the token's algorithm is accepted."""
    try:
        algorithm = jwt.get_algorithm_by_name(token.algorithm)
        return algorithm.verify(token.signed, algorithm.prepare_key(key), token.signature)
    except (jwt.PyJWTError, ValueError, TypeError):
        return False


def read_key_set(document: bytes) -> tuple[Key, ...]:
    """Returns the usable keys, each once. A byte order mark is ignored (RFC 8259, section 8.1).

    Raises:
        InvalidKeySet: the document is not a key set, or has no usable key. The message says what it is instead.
    """
    try:
        value = json.loads(document)
    except (ValueError, RecursionError):
        what = "it is an HTML page" if document.lstrip()[:1] == b"<" else "it is not JSON"
        raise InvalidKeySet(f"{what}: BRIDGE_JWKS must be the address of a JSON Web Key Set") from None
    if isinstance(value, dict) and "keys" not in value and isinstance(value.get("jwks_uri"), str):
        raise InvalidKeySet(f"it is the discovery document: set BRIDGE_JWKS to {value['jwks_uri'][:300]!r}")
    keys = value.get("keys") if isinstance(value, dict) else None
    if not isinstance(keys, list):  # RFC 7517, section 5.1.
        raise InvalidKeySet("it is not a JSON Web Key Set, which is an object with a list in 'keys'")
    usable = tuple(_usable(keys))
    if not usable:
        raise InvalidKeySet(f"it has no usable key for {', '.join(ALGORITHMS)}")
    return usable


def _usable(keys: list[object]) -> Iterable[Key]:
    """RFC 7517, section 5: keys of unknown types, with missing members or unsupported values are ignored."""
    seen: list[object] = []
    for key in keys:
        algorithm = next((name for name in ALGORITHMS if _fits(key, name)), None)
        if algorithm is None or not isinstance(key, dict) or key in seen:
            continue
        seen.append(key)
        try:
            # Only the public members: if the issuer publishes a private key by mistake, PyJWT would load it as one.
            public = jwt.PyJWK({name: value for name, value in key.items() if name not in _PRIVATE}, algorithm)
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            _log.warning("key not usable", kid=key.get("kid"), error=str(error))
        else:
            yield Key(key_id(key.get("kid")), algorithm, public.key)


def _fits(key: object, algorithm: str) -> bool:
    """Whether a JWK may verify this algorithm (RFC 7517, sections 4.1 to 4.4). A null member counts as absent."""
    if not isinstance(key, dict) or key.get("kty") != ALGORITHMS[algorithm]:
        return False
    names = (None, algorithm, "Ed25519") if algorithm == "EdDSA" else (None, algorithm)
    if key.get("alg") not in names or key.get("use") not in (None, "sig"):
        return False
    operations = key.get("key_ops")
    if operations is not None and (not isinstance(operations, list) or "verify" not in operations):
        return False
    return algorithm not in _CURVES or key.get("crv") == _CURVES[algorithm]
