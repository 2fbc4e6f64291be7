"""What a token says: its compact form and its claims (RFC 7515, RFC 7519), without keys and without a clock.

Owns every check of a token but its signature. Where the standard leaves room, the lenient reading is
taken when no other user or group could be meant by it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import re
from dataclasses import dataclass
from typing import Any, TypeGuard

NOT_BEFORE_LEEWAY_SECONDS = 30.0
"""For `nbf` only: the issuer's clock may be ahead of ours. `exp` has no leeway, as the contract says."""

NOT_BEFORE_WAIT_SECONDS = 300.0
"""A token that becomes good within this time is answered `busy`. A later one is refused."""

IDENTITY_BYTES = 16
"""Of the digest: two subscribers of a thousand million have the same one with a chance of 1 in 10^21."""

ALIASES = {"Ed25519": "EdDSA"}
"""RFC 9864, section 2.2, gives EdDSA over this curve a name of its own."""

_BASE64URL = re.compile(rb"[A-Za-z0-9_-]*={0,2}")


class Refusal(Exception):
    """A token that opens no stream. `code` is stable, for programs."""

    code = ""


class InvalidToken(Refusal):
    """401. The message is for the person whose token it is; `code` is for their program."""

    code = "invalid-token"


class MissingToken(InvalidToken):
    code = "missing-token"


class ExpiredToken(InvalidToken):
    code = "expired-token"


class GroupsElsewhere(Refusal):
    """403. The token is good, but says that its groups must be fetched from the identity provider."""

    code = "groups-elsewhere"


class TryAgain(Refusal):
    """The token cannot be judged now, and can be soon. It is answered with `busy`."""


class NotYetValid(TryAgain):
    """Its `nbf` is a little ahead."""


@dataclass(frozen=True, slots=True)
class Subscriber:
    """`expires_at` is in seconds since 1970."""

    user: str
    groups: tuple[str, ...]
    expires_at: float

    def identity(self, key: bytes) -> str:
        """A name for what this subscriber may see: the same for the same user and the same set of groups, whatever
        their order. Without the key nobody can find out by trial whose name it is.
        """
        # JSON puts every text between quotes, so that no user id can look like another one with a group.
        seen = json.dumps([self.user, *sorted(set(self.groups))]).encode("ascii")
        digest = hmac.new(key, seen, hashlib.sha256).digest()[:IDENTITY_BYTES]
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


@dataclass(frozen=True, slots=True)
class Token:
    """A token in parts. Nothing in it is verified.

    `kid` is None where the header names no key. `digest` names this very token in a table.
    """

    algorithm: str
    kid: str | None
    claims: dict[str, Any]
    signed: bytes
    signature: bytes
    digest: bytes


def parse(text: str) -> Token:
    """
    Raises:
        InvalidToken: it is not a signed JWT in compact form (RFC 7515, section 7.1).
    """
    raw = text.encode("utf-8", "surrogatepass")
    parts = raw.split(b".")
    if len(parts) == 5:  # RFC 7516, section 9.
        raise InvalidToken("the token is encrypted (JWE): have the issuer sign it and not encrypt it")
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
        # RFC 7515, section 4.1.11: extensions that are not understood must be refused. None is understood here.
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
    """A `kid` as text, or None when it names nothing.

    RFC 7515, section 4.1.4, and RFC 7517, section 4.5, have it be text. Some issuers write a number; it names the key
    whose `kid` reads the same. Other types name no key: the signature decides in any case.
    """
    if isinstance(value, str):
        return value or None
    return str(value) if _is_integer(value) else None


def _decode(part: bytes) -> bytes:
    """RFC 7515, section 2: base64url without padding. Some load balancers add padding; it changes nothing."""
    if not _BASE64URL.fullmatch(part):
        raise ValueError("not base64url")
    bare = part.rstrip(b"=")
    return base64.urlsafe_b64decode(bare + b"=" * (-len(bare) % 4))


@dataclass(frozen=True, slots=True)
class ClaimsReader:
    """
    Args:
        audience, issuer: when given, `aud` must hold it and `iss` must be it.
        user, groups: the claims to read. An empty `groups` reads none.
    """

    audience: str | None = None
    issuer: str | None = None
    user: str = "sub"
    groups: str = "groups"

    def read(self, claims: dict[str, Any], now: float) -> Subscriber:
        """
        Raises:
            InvalidToken: says which claim does not fit.
            NotYetValid: the token becomes good soon.
            GroupsElsewhere: the claims point to groups that are not among them.
        """
        self._check_destination(claims)
        expires_at = _check_times(claims, now)
        user = _identifier(claim_at(claims, self.user))
        if not user:
            raise InvalidToken(f"the claim {self.user!r} (the user id) is missing or is not text")
        return Subscriber(user, self._read_groups(claims), expires_at)

    def _check_destination(self, claims: dict[str, Any]) -> None:
        # What is expected is not said: only tokens that fit may have the key set fetched again.
        # RFC 7519, sections 2 and 4.1.1: an issuer is compared exactly, so a final slash counts.
        if self.issuer is not None and claims.get("iss") != self.issuer:
            raise InvalidToken(_unlike(claims, "iss", "is from another issuer"))
        # RFC 7519, section 4.1.3: one text or a list. Other elements of a list name nobody.
        audience = claims.get("aud")
        if self.audience is not None and self.audience not in (audience if isinstance(audience, list) else [audience]):
            raise InvalidToken(_unlike(claims, "aud", "is for another audience"))

    def _read_groups(self, claims: dict[str, Any]) -> tuple[str, ...]:
        """RFC 7519 does not define groups. One text is one group (AD FS, IdentityServer), whatever is in it.

        An empty text names no group: no event can be published to it.
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
        """OpenID Connect Core, section 5.6.2: a claim named in `_claim_names` is somewhere else.

        Entra ID does so for users in more than some 200 groups, and writes `hasgroups` where the token came by a URL.
        """
        elsewhere = claims.get("_claim_names")
        names = {self.groups, self.groups.partition(".")[0]}
        if (isinstance(elsewhere, dict) and names & elsewhere.keys()) or (
            self.groups == "groups" and claims.get("hasgroups") in (True, "true")
        ):
            raise GroupsElsewhere(
                f"the token leaves out the claim {self.groups!r}, as Entra ID does for users in many groups: have the "
                "identity provider send only groups that are assigned to the application, or roles, and name that "
                "claim in BRIDGE_JWT_GROUPS_CLAIM (empty = read no groups)"
            )


def _unlike(claims: dict[str, Any], claim: str, why: str) -> str:
    return f"the token has no claim {claim!r}" if claims.get(claim) is None else f"the token {why} ({claim})"


def _check_times(claims: dict[str, Any], now: float) -> float:
    # RFC 7519, section 2: a NumericDate may have a fraction, and is a number. `iat` decides nothing (section 4.1.6).
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
    # RFC 7519, section 4.1.5, allows a small leeway. A 401 would silence a page that may listen in a moment.
    ahead = not_before - now
    if ahead > NOT_BEFORE_WAIT_SECONDS:
        raise InvalidToken(f"the token is not valid for another {ahead:.0f} s (nbf)")
    if ahead > NOT_BEFORE_LEEWAY_SECONDS:
        raise NotYetValid(f"the token is not valid for another {ahead:.0f} s (nbf)")
    return float(expires_at)


def claim_at(claims: dict[str, Any], path: str) -> Any:
    """The value of a claim, or None.

    A claim of exactly this name wins, so names with dots and URLs need no escapes (RFC 7519, section 4.2: a public
    claim's name is best a URL). Otherwise dots lead into objects: `realm_access.roles`, and with names that have dots
    themselves, the longest name first: `resource_access.my.client.roles`.
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

    RFC 7519, section 4.1.2, has `sub` be text. Issuers that write a database's number mean its digits, and nothing else
    can be meant; a fraction, a boolean or null could be a mistake.
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
    except OverflowError:  # An integer of some hundred digits.
        return False
