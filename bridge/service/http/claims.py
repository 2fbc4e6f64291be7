"""Reads a token's compact form and its claims (RFC 7515, RFC 7519), without keys and without a clock.

Owns every check of a token except its signature. Where the standard allows several readings, the lenient one is used if
it cannot mean another user or group.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, TypeGuard

NOT_BEFORE_LEEWAY_SECONDS = 30.0
"""Only for `nbf`: the issuer's clock may be ahead. `exp` has no leeway, as docs/contract.md says."""

NOT_BEFORE_WAIT_SECONDS = 300.0
"""A token that becomes valid within this time is answered with `busy`. A later one is refused."""

IDENTITY_BYTES = 16
"""Length of an identity's digest. Among 10^9 subscribers, the chance that two have the same one is 1 in 10^21."""

ALIASES = {"Ed25519": "EdDSA"}
"""RFC 9864, section 2.2, defines a separate name for EdDSA with this curve."""

_BASE64URL = re.compile(rb"[A-Za-z0-9_-]*={0,2}")


class Refusal(Exception):
    """The token opens no stream. `code` is stable, for programs."""

    code = ""


class InvalidToken(Refusal):
    """401: no token is valid. The message is for the token's owner, `code` for the owner's program."""

    code = "invalid-token"


class MissingToken(InvalidToken):
    code = "missing-token"


class ExpiredToken(InvalidToken):
    code = "expired-token"


class RevokedToken(InvalidToken):
    """The token was issued before the moment until which the user's tokens are refused."""

    code = "revoked-token"


class GroupsElsewhere(Refusal):
    """403: the token is valid, but its groups must be fetched from the identity provider."""

    code = "groups-elsewhere"


class TryAgain(Refusal):
    """The token cannot be judged now, but soon. The answer is `busy`."""


class NotYetValid(TryAgain):
    """The token's `nbf` is 30 to 300 s ahead."""


@dataclass(frozen=True, slots=True)
class Subscriber:
    """The user and the groups of a valid token. Times are in seconds since 1970."""

    user: str
    groups: tuple[str, ...]
    expires_at: float
    issued_at: float | None = field(default=None, compare=False)
    """When the token was issued, or the application was asked. None if the token does not say it."""

    def identity(self, key: bytes) -> str:
        """An opaque name for the events that this subscriber may see. It is equal for the same user and the same groups
        in any order. Without the key, nobody can find the user by trial.
        """
        # JSON quotes every text, so that a user id cannot look like another user id with a group.
        seen = json.dumps([self.user, *sorted(set(self.groups))]).encode("ascii")
        digest = hmac.new(key, seen, hashlib.sha256).digest()[:IDENTITY_BYTES]
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


@dataclass(frozen=True, slots=True)
class Token:
    """A token in parts. Nothing in it is verified.

    `kid` is None if the header names no key. `digest` is the SHA-256 of the whole token, a key for tables.
    """

    algorithm: str
    kid: str | None
    claims: dict[str, Any]
    signed: bytes
    signature: bytes
    digest: bytes


def parse(text: str) -> Token:
    """Splits and decodes a token.

    Raises:
        InvalidToken: the text is not a signed JWT in compact form (RFC 7515, section 7.1).
    """
    raw = text.encode("utf-8", "surrogatepass")
    parts = raw.split(b".")
    if len(parts) == 5:  # RFC 7516, section 9.
        raise InvalidToken("the token is encrypted (JWE): configure the issuer to sign it and not to encrypt it")
    if len(parts) != 3:
        raise InvalidToken("the token is not a JWT in compact form: three parts joined by dots")
    try:
        header, claims = (json.loads(_decode(part)) for part in parts[:2])
        signature = _decode(parts[2])
    except (ValueError, RecursionError):
        raise InvalidToken("the token is not a JWT in compact form: a part cannot be decoded") from None
    if not isinstance(header, dict) or not isinstance(claims, dict):
        raise InvalidToken("the token is not a JWT: its header and its claims must be JSON objects")
    if "crit" in header or header.get("b64", True) is not True:
        # RFC 7515, section 4.1.11: unknown extensions must be refused. The bridge supports none.
        raise InvalidToken("the token's header requires extensions (crit, b64) that are not supported here")
    algorithm = header.get("alg")
    if not isinstance(algorithm, str):
        raise InvalidToken("the token's header has no text in 'alg'")
    return Token(
        algorithm=ALIASES.get(algorithm, algorithm),
        kid=key_id(header.get("kid")),
        claims=claims,
        signed=parts[0] + b"." + parts[1],
        signature=signature,
        digest=hashlib.sha256(raw).digest(),
    )


def key_id(value: object) -> str | None:
    """A `kid` as text, or None if it names no key.

    RFC 7515, section 4.1.4, and RFC 7517, section 4.5, require text. Some issuers write a number; it names the key
    whose `kid` has the same digits. Other types name no key. In any case the signature decides.
    """
    if isinstance(value, str):
        return value or None
    return str(value) if _is_integer(value) else None


def _decode(part: bytes) -> bytes:
    """RFC 7515, section 2: base64url without padding. Some load balancers add padding, which is ignored."""
    if not _BASE64URL.fullmatch(part):
        raise ValueError("not base64url")
    bare = part.rstrip(b"=")
    return base64.urlsafe_b64decode(bare + b"=" * (-len(bare) % 4))


@dataclass(frozen=True, slots=True)
class ClaimsReader:
    """Reads the subscriber from a token's claims.

    Args:
        audience, issuer: if given, `aud` must contain the audience, and `iss` must equal the issuer.
        user, groups: names or paths of the claims to read. With an empty `groups`, no groups are read.
    """

    audience: str | None = None
    issuer: str | None = None
    user: str = "sub"
    groups: str = "groups"

    def read(self, claims: dict[str, Any], now: float) -> Subscriber:
        """Checks the claims, and returns the subscriber. `now` is in seconds since 1970.

        Raises:
            InvalidToken: a claim is missing or invalid. The message names it.
            NotYetValid: the token becomes valid soon.
            GroupsElsewhere: the claims refer to groups that are not in the token.
        """
        self._check_destination(claims)
        expires_at = _check_times(claims, now)
        user = _identifier(claim_at(claims, self.user))
        if not user:
            raise InvalidToken(f"the claim {self.user!r} (the user id) is missing or is not text")
        issued_at = claims.get("iat")
        return Subscriber(
            user, self._read_groups(claims), expires_at, float(issued_at) if _is_time(issued_at) else None
        )

    def _check_destination(self, claims: dict[str, Any]) -> None:
        # The message does not contain the expected value: only a token with the right claims may cause a reading of the
        # key set. RFC 7519, sections 2 and 4.1.1: an issuer is compared exactly, so a final slash counts.
        if self.issuer is not None and claims.get("iss") != self.issuer:
            raise InvalidToken(_unlike(claims, "iss", "is from another issuer"))
        # RFC 7519, section 4.1.3: one text or a list. List elements of other types are ignored.
        audience = claims.get("aud")
        if self.audience is not None and self.audience not in (audience if isinstance(audience, list) else [audience]):
            raise InvalidToken(_unlike(claims, "aud", "is for another audience"))

    def _read_groups(self, claims: dict[str, Any]) -> tuple[str, ...]:
        """RFC 7519 does not define groups. One text is one group, whatever it contains (AD FS, IdentityServer).

        An empty text is ignored: no event can be published to it.
        """
        if not self.groups:
            return ()
        value = claim_at(claims, self.groups)
        if value is None:
            self._check_overage(claims)
            return ()
        groups = [_identifier(group) for group in (value if isinstance(value, list) else [value])]
        named = [group for group in groups if group]
        if None in groups:
            raise InvalidToken(f"the claim {self.groups!r} is neither a group id nor a list of group ids")
        return tuple(dict.fromkeys(named))

    def _check_overage(self, claims: dict[str, Any]) -> None:
        """OpenID Connect Core, section 5.6.2: a claim named in `_claim_names` is not in the token.

        Entra ID does this for users in more than about 200 groups. In tokens that come by a URL, it writes `hasgroups`.
        """
        elsewhere = claims.get("_claim_names")
        names = {self.groups, self.groups.partition(".")[0]}
        if (isinstance(elsewhere, dict) and names & elsewhere.keys()) or (
            self.groups == "groups" and claims.get("hasgroups") in (True, "true")
        ):
            raise GroupsElsewhere(
                f"the token leaves out the claim {self.groups!r}, as Entra ID does for users in many groups: configure "
                "the identity provider to send only groups that are assigned to the application, or roles, and name "
                "that claim in BRIDGE_JWT_GROUPS_CLAIM (empty = read no groups)"
            )


def _unlike(claims: dict[str, Any], claim: str, why: str) -> str:
    return f"the token has no claim {claim!r}" if claims.get(claim) is None else f"the token {why} ({claim})"


def _check_times(claims: dict[str, Any], now: float) -> float:
    # RFC 7519, section 2: a NumericDate is a number and may have a fraction. `iat` is not checked (section 4.1.6).
    expires_at = claims.get("exp")
    if not _is_time(expires_at):
        raise InvalidToken("the claim 'exp' (seconds since 1970) is missing or is not a number")
    if now >= expires_at:
        raise ExpiredToken(f"the token expired {now - expires_at:.0f} s ago: get a new one, then open the stream again")
    not_before = claims.get("nbf")
    if not_before is None:
        return float(expires_at)
    if not _is_time(not_before):
        raise InvalidToken("the claim 'nbf' (seconds since 1970) is not a number")
    # RFC 7519, section 4.1.5, allows a small leeway. After a 401 a page would not reconnect when the token is valid.
    ahead = not_before - now
    if ahead > NOT_BEFORE_WAIT_SECONDS:
        raise InvalidToken(f"the token is not valid for another {ahead:.0f} s (nbf)")
    if ahead > NOT_BEFORE_LEEWAY_SECONDS:
        raise NotYetValid(f"the token is not valid for another {ahead:.0f} s (nbf)")
    return float(expires_at)


def claim_at(claims: dict[str, Any], path: str) -> Any:
    """The value of a claim, or None.

    A claim with exactly this name has priority, so names with dots and URLs need no escapes (RFC 7519, section 4.2,
    recommends URLs for public claims). Otherwise a dot separates nested members: `realm_access.roles`. If a member's
    name contains dots, the longest name is tried first: `resource_access.my.client.roles`.
    """
    if path in claims:
        return claims[path]
    for dot in reversed([found.start() for found in re.finditer(r"\.", path)]):
        inner = claims.get(path[:dot])
        if isinstance(inner, dict) and (value := claim_at(inner, path[dot + 1 :])) is not None:
            return value
    return None


def _identifier(value: object) -> str | None:
    """A user or group id as text.

    RFC 7519, section 4.1.2, requires `sub` to be text. Some issuers write a database's integer, which can only mean its
    digits. A fraction, a boolean or null may be a mistake and is refused.
    """
    if isinstance(value, str):
        return value
    return str(value) if _is_integer(value) else None


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_time(value: object) -> TypeGuard[int | float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # An integer of more than 308 digits.
        return False
