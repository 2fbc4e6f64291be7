"""Finds the subscriber whom one of a request's tokens identifies.

Owns which tokens are valid: the accepted algorithms, and the order of the checks of keys and claims. `web.py` finds the
tokens in the request. Only `user` and `groups` decide which events the subscriber may see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import jwt

from bridge.service.http.claims import (
    ClaimsReader,
    ExpiredToken,
    GroupsElsewhere,
    InvalidToken,
    MissingToken,
    NotYetValid,
    Refusal,
    Subscriber,
    Token,
    TryAgain,
    parse,
)
from bridge.service.http.keys import ALGORITHMS, InvalidKeySet, KeySet, KeysUnavailable, verify

__all__ = [
    "Authenticator",
    "ExpiredToken",
    "GroupsElsewhere",
    "InvalidKeySet",
    "InvalidToken",
    "KeysUnavailable",
    "MissingToken",
    "NotYetValid",
    "Subscriber",
    "TryAgain",
    "mint",
]

MAX_TOKENS = 5
"""The most tokens of one request that are checked. Each check verifies a signature, which takes about 50 µs."""


class Authenticator:
    """Verifies tokens, with a secret, a key set or both.

    Args:
        secret: key for HS256, or None.
        jwks: URL or file of a JWKS document for RS256, ES256 and EdDSA, or None.
        audience, issuer: if given, `aud` must contain the audience, and `iss` must equal the issuer.
        user_claim, groups_claim: names of claims, or paths with dots. An empty `groups_claim` reads no groups.
    """

    def __init__(
        self,
        *,
        secret: str | None = None,
        jwks: str | None = None,
        audience: str | None = None,
        issuer: str | None = None,
        user_claim: str = "sub",
        groups_claim: str = "groups",
    ) -> None:
        self._secret = secret
        self._keys = KeySet(jwks) if jwks else None
        self._reader = ClaimsReader(audience, issuer, user_claim, groups_claim)

    async def start(self, *, strict: bool = False) -> None:
        """Reads the key set once.

        Raises:
            InvalidKeySet: the file is missing or has no usable key. A URL that fails is only logged, because it may
                answer later; with `strict` it raises too.
        """
        if self._keys is not None:
            await self._keys.start(strict=strict)

    @property
    def reads_tokens(self) -> bool:
        """Whether it has a secret or a key set."""
        return self._secret is not None or self._keys is not None

    @property
    def missing_keys(self) -> str | None:
        """Why no key set has been read yet. None once one has been read, or if none is configured."""
        return None if self._keys is None else self._keys.missing

    async def read_first_keys(self) -> None:
        """Reads the key set until one reading succeeds. Returns at once if no key set is configured."""
        if self._keys is not None:
            await self._keys.read_first()

    async def authenticate(self, token: str | None, now: float) -> Subscriber:
        """As `authenticate_any`, with one token or none."""
        return await self.authenticate_any([] if token is None else [token], now)

    async def authenticate_any(self, tokens: Sequence[str], now: float) -> Subscriber:
        """Returns the subscriber of the first valid token.

        Args:
            tokens: JWTs in compact form. All are tried with the current keys before the key set is read again.
            now: seconds since 1970.

        Raises:
            InvalidToken: no token is valid. The message says why, and contains at most the token's `alg` and `kid`.
            GroupsElsewhere: the token leaves out its groups.
            TryAgain: a token may be valid, but this cannot be decided now.
        """
        refusals: list[Refusal] = []
        unverified: list[Token] = []
        for text in tokens[:MAX_TOKENS]:
            try:
                token = parse(text)
                if self._is_verified(token, now):
                    return self._reader.read(token.claims, now)
                # Check the claims first: a token of a stranger must not cause a reading of the key set.
                with contextlib.suppress(GroupsElsewhere, NotYetValid):
                    self._reader.read(token.claims, now)
                unverified.append(token)
            except Refusal as refusal:
                refusals.append(refusal)
        for token in unverified:
            try:
                await self._await_key(token, now)
                return self._reader.read(token.claims, now)
            except Refusal as refusal:
                refusals.append(refusal)
        if not refusals:
            raise MissingToken("the request has no token: send it as Authorization: Bearer, or in the cookie")
        raise min(refusals, key=_rank)

    def _is_verified(self, token: Token, now: float) -> bool:
        """Whether the secret or a current key signed the token. False: the key set must be read again.

        Raises:
            InvalidToken: its algorithm is not accepted, or the secret did not sign it.
        """
        if token.algorithm == "HS256" and self._secret is not None:
            if not verify(token, self._secret):
                raise InvalidToken("the token's signature does not match the secret of this bridge")
            return True
        if self._keys is not None and token.algorithm in ALGORITHMS:
            return self._keys.verifies(token, now)
        taken = [*(["HS256"] if self._secret is not None else []), *(ALGORITHMS if self._keys is not None else [])]
        # The token must not choose the algorithm: it could choose `none`, or HS256 with a public key as its secret
        # (RFC 8725, section 3.1).
        raise InvalidToken(f"tokens signed with {token.algorithm[:20]!r} are not accepted, only {', '.join(taken)}")

    async def _await_key(self, token: Token, now: float) -> None:
        """Reads the key set again until a key verifies the token.

        Raises:
            InvalidToken: a key set that was read after the token's first arrival does not verify it.
            KeysUnavailable: no key set could be read since then.
        """
        assert self._keys is not None, "only a key set leaves a token unverified"
        while not self._keys.verifies(token, now):
            if self._keys.has_decided(token, now):
                if self._keys.knows(token):
                    raise InvalidToken("the token's signature does not match the key that it names")
                named = f"key {token.kid[:60]!r}" if token.kid else f"a key for {token.algorithm}"
                raise InvalidToken(
                    f"the key set does not have {named}; was the token signed by the issuer configured here?"
                )
            await self._keys.renew(now)


def _rank(refusal: Refusal) -> int:
    """The rank of a refusal. With several tokens, the first refusal of the lowest rank is the answer: temporary ones
    rank lowest."""
    for rank, kind in enumerate((TryAgain, GroupsElsewhere, ExpiredToken)):
        if isinstance(refusal, kind):
            return rank
    return 3


def mint(
    secret: str,
    *,
    user: str,
    groups: tuple[str, ...] = (),
    ttl_seconds: int,
    now: float,
    user_claim: str = "sub",
    groups_claim: str = "groups",
) -> str:
    """Makes a token for development, signed with HS256.

    A claim path with dots becomes the name of one claim, which `claim_at` reads too.
    """
    claims: dict[str, object] = {user_claim: user, "iat": int(now), "exp": int(now) + ttl_seconds}
    if groups:
        claims[groups_claim] = list(groups)
    return jwt.encode(claims, secret, algorithm="HS256")
