"""From a token to the subscriber that it speaks for (RFC 7519, RFC 7515, RFC 7517).

Owns which tokens are good. Where the token stood in the request is the web's business; what the subscriber may see is
settled by `user` and `groups` alone.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import httpx
import jwt
import structlog

UNKNOWN_KEY_SECONDS = 30.0
"""An unknown key id has the set fetched anew, at most this often: anybody can invent a key id."""

REFRESH_SECONDS = 3600.0
"""A key set older than this is fetched anew with the next token: a withdrawn key must not stay good for ever."""

FETCH_SECONDS = 5.0

NOT_BEFORE_LEEWAY_SECONDS = 30.0
"""For `nbf` only: the issuer's clock may be ahead of ours. `exp` has no leeway, as the contract says."""

_KEY_TYPES = {"RS256": "RSA", "ES256": "EC", "EdDSA": "OKP"}

_log = structlog.get_logger("bridge.auth")


class InvalidToken(Exception):
    """401. The message is for the person whose token it is; `code` is for their program."""

    code = "invalid-token"


class MissingToken(InvalidToken):
    code = "missing-token"


class ExpiredToken(InvalidToken):
    code = "expired-token"


class KeysUnavailable(Exception):
    """The key set cannot be fetched, so nobody can say whether the token is good. It is worth trying again."""


class InvalidKeySet(ValueError):
    """A JWKS document that holds no key that could verify a token."""


@dataclass(frozen=True, slots=True)
class Subscriber:
    """`expires_at` is in seconds since 1970."""

    user: str
    groups: tuple[str, ...]
    expires_at: float


class Authenticator:
    """
    Args:
        secret: key for HS256, or None.
        jwks: URL or file of a JWKS document for RS256, ES256 and EdDSA, or None.
        audience, issuer: when given, `aud` must hold it and `iss` must be it.
    """

    def __init__(
        self,
        *,
        secret: str | None = None,
        jwks: str | None = None,
        audience: str | None = None,
        issuer: str | None = None,
    ) -> None:
        self._secret = secret
        self._keys = KeySet(jwks) if jwks else None
        self._audience = audience
        self._issuer = issuer

    async def start(self, *, strict: bool = False) -> None:
        """Reads the key set once.

        Raises:
            InvalidKeySet: its file is missing or holds no key. A URL that does not answer is only logged, for it may
                later; with `strict` it raises too.
        """
        if self._keys is not None:
            await self._keys.start(strict=strict)

    async def authenticate(self, token: str | None, now: float) -> Subscriber:
        """
        Args:
            token: the JWT in compact form, or None when the request had none.
            now: seconds since 1970.

        Raises:
            InvalidToken: it is not good; says why, never with any part of the token.
            KeysUnavailable: the key set could not be fetched.
        """
        if token is None:
            raise MissingToken("no token: send it as Authorization: Bearer, or in the cookie")
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError:
            raise InvalidToken("the token is no JWT in compact form") from None
        algorithm = header.get("alg")
        key = await self._key_for(algorithm, header.get("kid"), now)
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[str(algorithm)],
                audience=self._audience,
                issuer=self._issuer,
                options={
                    "verify_aud": self._audience is not None,
                    "verify_iss": self._issuer is not None,
                    # With `now` passed in, by us.
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                    "verify_sub": False,
                },
            )
        except jwt.InvalidSignatureError:
            raise InvalidToken("the token's signature does not fit the key that it names") from None
        except jwt.InvalidAudienceError:
            raise InvalidToken("the token is for another audience (aud)") from None
        except jwt.InvalidIssuerError:
            raise InvalidToken("the token is from another issuer (iss)") from None
        except jwt.MissingRequiredClaimError as error:
            raise InvalidToken(f"the token has no claim {error.claim!r}") from None
        except (jwt.PyJWTError, ValueError, TypeError):
            raise InvalidToken("the token cannot be read") from None
        return _read_claims(claims, now)

    async def _key_for(self, algorithm: object, kid: object, now: float) -> Any:
        if algorithm == "HS256" and self._secret is not None:
            return self._secret
        if self._keys is not None and isinstance(algorithm, str) and algorithm in _KEY_TYPES:
            return await self._keys.find(kid if isinstance(kid, str) else None, algorithm, now)
        taken = [*(["HS256"] if self._secret is not None else []), *(_KEY_TYPES if self._keys is not None else [])]
        # Never the algorithm of the token's choosing: `none`, or HS256 with a public key as its secret.
        raise InvalidToken(f"tokens signed with {str(algorithm)[:20]!r} are not taken here, only {', '.join(taken)}")


def _read_claims(claims: dict[str, Any], now: float) -> Subscriber:
    expires_at = claims.get("exp")
    if not _is_time(expires_at):
        raise InvalidToken("the claim 'exp' (seconds since 1970) is missing or is no number")
    if now >= expires_at:
        raise ExpiredToken(f"the token expired {now - expires_at:.0f} s ago: get a new one, then open the stream again")
    not_before = claims.get("nbf")
    if not_before is not None and not _is_time(not_before):
        raise InvalidToken("the claim 'nbf' (seconds since 1970) is no number")
    if not_before is not None and now + NOT_BEFORE_LEEWAY_SECONDS < not_before:
        raise InvalidToken(f"the token is not good for another {not_before - now:.0f} s (nbf)")
    user = claims.get("sub")
    if not isinstance(user, str) or not user:
        raise InvalidToken("the claim 'sub' (the user id) is missing or is no text")
    groups = claims.get("groups") or []
    if not isinstance(groups, list) or not all(isinstance(group, str) and group for group in groups):
        raise InvalidToken("the claim 'groups' is no list of group ids")
    return Subscriber(user, tuple(dict.fromkeys(groups)), float(expires_at))


def _is_time(value: object) -> TypeGuard[int | float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # An integer of some hundred digits.
        return False


class KeySet:
    """A JWKS document, kept, and fetched anew when a token names a key that is not in it."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._is_url = source.startswith(("http://", "https://"))
        self._keys: list[dict[str, Any]] = []
        self._tried_at = -math.inf
        self._read_at = -math.inf
        self._failure: str | None = None
        self._lock = asyncio.Lock()

    async def start(self, *, strict: bool) -> None:
        await self._refresh(time.time())
        if self._failure is not None and (strict or not self._is_url):
            raise InvalidKeySet(self._failure)

    async def find(self, kid: str | None, algorithm: str, now: float) -> Any:
        """The public key for a token.

        Raises:
            InvalidToken: the set has no such key.
            KeysUnavailable: the set could not be read, so it cannot be known.
        """
        key = self._lookup(kid, algorithm)
        stale = now - self._read_at > REFRESH_SECONDS
        if key is None or stale:
            async with self._lock:  # Whoever waited here finds the set that the first one fetched.
                if now - self._tried_at > UNKNOWN_KEY_SECONDS:
                    await self._refresh(now)
            key = self._lookup(kid, algorithm)
        if key is not None:
            return key
        if self._failure is not None:
            raise KeysUnavailable(self._failure)
        named = f"key {kid[:60]!r}" if kid else f"one key for {algorithm}"
        raise InvalidToken(f"the key set does not have {named}; was the token signed by the issuer configured here?")

    def _lookup(self, kid: str | None, algorithm: str) -> Any:
        fitting = [key for key in self._keys if _fits(key, algorithm) and (kid is None or key.get("kid") == kid)]
        # A token without `kid` is taken where there is nothing to choose (RFC 7515, section 4.1.4: `kid` is optional).
        if not fitting or (kid is None and len(fitting) > 1):
            return None
        return jwt.PyJWK(fitting[0], algorithm).key

    async def _refresh(self, now: float) -> None:
        self._tried_at = now
        try:
            text = await self._read()
            usable = _usable(json.loads(text)["keys"])
            if not usable:
                raise InvalidKeySet("it has no key for RS256, ES256 or EdDSA")
        except (OSError, httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, jwt.PyJWTError) as error:
            self._failure = f"the key set {self._source} cannot be used: {error or type(error).__name__}"
            _log.error("key set not read", source=self._source, error=str(error) or type(error).__name__)
            return
        self._failure = None
        self._read_at = now
        self._keys = usable
        _log.info("key set read", source=self._source, keys=[key.get("kid") for key in usable])

    async def _read(self) -> str:
        if not self._is_url:
            return Path(self._source).read_text(encoding="utf-8")  # noqa: ASYNC240 - a small local file, read rarely.
        async with httpx.AsyncClient(timeout=FETCH_SECONDS, follow_redirects=True) as client:
            response = await client.get(self._source)
            response.raise_for_status()
            return response.text


def _usable(keys: list[object]) -> list[dict[str, Any]]:
    """The keys that can verify something; others are passed over (RFC 7517, section 5), each once."""
    found: list[dict[str, Any]] = []
    for key in keys:
        algorithm = next((algorithm for algorithm in _KEY_TYPES if _fits(key, algorithm)), None)
        if algorithm is None or not isinstance(key, dict) or key in found:
            continue
        try:
            jwt.PyJWK(key, algorithm)
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            _log.warning("key not usable", kid=key.get("kid"), error=str(error))
        else:
            found.append(key)
    return found


def _fits(key: object, algorithm: str) -> bool:
    """Whether a JWK may verify this algorithm (RFC 7517, sections 4.1 to 4.4; RFC 7518, section 6; RFC 8037)."""
    if not isinstance(key, dict) or key.get("kty") != _KEY_TYPES[algorithm]:
        return False
    if key.get("alg", algorithm) != algorithm or key.get("use", "sig") != "sig":
        return False
    operations = key.get("key_ops")
    if operations is not None and (not isinstance(operations, list) or "verify" not in operations):
        return False
    curve = {"ES256": "P-256", "EdDSA": "Ed25519"}.get(algorithm)
    return curve is None or key.get("crv") == curve


def mint(secret: str, *, user: str, groups: tuple[str, ...] = (), ttl_seconds: int, now: float) -> str:
    """A token for development, signed with HS256."""
    claims: dict[str, object] = {"sub": user, "iat": int(now), "exp": int(now) + ttl_seconds}
    if groups:
        claims["groups"] = list(groups)
    return jwt.encode(claims, secret, algorithm="HS256")
