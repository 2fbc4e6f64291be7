"""From the tokens of a request to the subscriber that one of them speaks for.

Owns which tokens are good: the algorithms that are taken, and the order in which keys and claims decide. Where a token
stood in the request is the web's business; what the subscriber may see is settled by `user` and `groups` alone.
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
"""Of one request. Each costs a verification, some 50 microseconds."""


class Authenticator:
    """
    Args:
        secret: key for HS256, or None.
        jwks: URL or file of a JWKS document for RS256, ES256 and EdDSA, or None.
        audience, issuer: when given, `aud` must hold it and `iss` must be it.
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
            InvalidKeySet: its file is missing or holds no key. A URL that does not answer is only logged, for it may
                later; with `strict` it raises too.
        """
        if self._keys is not None:
            await self._keys.start(strict=strict)

    @property
    def missing_keys(self) -> str | None:
        """Why no key set has been read yet; None once one has been, and where none is configured."""
        return None if self._keys is None else self._keys.missing

    async def read_first_keys(self) -> None:
        """Until a key set has been read. Ends at once where none is configured."""
        if self._keys is not None:
            await self._keys.read_first()

    async def authenticate(self, token: str | None, now: float) -> Subscriber:
        """As `authenticate_any`, with one token or none."""
        return await self.authenticate_any([] if token is None else [token], now)

    async def authenticate_any(self, tokens: Sequence[str], now: float) -> Subscriber:
        """The subscriber of the first good token.

        Args:
            tokens: JWTs in compact form. All are tried with the keys at hand before the key set is read for one.
            now: seconds since 1970.

        Raises:
            InvalidToken: none is good; says why, never with any part of the token.
            GroupsElsewhere: the token leaves out its groups.
            TryAgain: one may be good, which cannot be known now.
        """
        refusals: list[Refusal] = []
        unverified: list[Token] = []
        for text in tokens[:MAX_TOKENS]:
            try:
                token = parse(text)
                if self._is_verified(token, now):
                    return self._reader.read(token.claims, now)
                # Before a stranger's token may cost anything, its claims must fit.
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
            raise MissingToken("no token: send it as Authorization: Bearer, or in the cookie")
        raise min(refusals, key=_rank)

    def _is_verified(self, token: Token, now: float) -> bool:
        """
        Raises:
            InvalidToken: its algorithm is not taken, or the secret did not sign it.
        """
        if token.algorithm == "HS256" and self._secret is not None:
            if not verify(token, self._secret):
                raise InvalidToken("the token's signature does not fit the secret of this bridge")
            return True
        if self._keys is not None and token.algorithm in ALGORITHMS:
            return self._keys.verifies(token, now)
        taken = [*(["HS256"] if self._secret is not None else []), *(ALGORITHMS if self._keys is not None else [])]
        # Never the algorithm of the token's choosing: `none`, or HS256 with a public key as its secret
        # (RFC 8725, section 3.1).
        raise InvalidToken(f"tokens signed with {token.algorithm[:20]!r} are not accepted, only {', '.join(taken)}")

    async def _await_key(self, token: Token, now: float) -> None:
        """
        Raises:
            InvalidToken: a key set that was read since the token first came does not verify it.
            KeysUnavailable: no set has been read since.
        """
        assert self._keys is not None, "only a key set leaves a token unverified"
        while not self._keys.verifies(token, now):
            if self._keys.has_decided(token, now):
                if self._keys.knows(token):
                    raise InvalidToken("the token's signature does not fit the key that it names")
                named = f"key {token.kid[:60]!r}" if token.kid else f"a key for {token.algorithm}"
                raise InvalidToken(
                    f"the key set does not have {named}; was the token signed by the issuer configured here?"
                )
            await self._keys.renew(now)


def _rank(refusal: Refusal) -> int:
    """Of several tokens' refusals the first of the lowest rank is the answer: what may pass by itself comes first."""
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
    """A token for development, signed with HS256. A path with dots becomes one claim's name, which is read as well."""
    claims: dict[str, object] = {user_claim: user, "iat": int(now), "exp": int(now) + ttl_seconds}
    if groups:
        claims[groups_claim] = list(groups)
    return jwt.encode(claims, secret, algorithm="HS256")
