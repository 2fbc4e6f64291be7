"""The audience of an event, as AMQP routing and binding keys (docs/contract.md, "Exchange and routing keys").

Pure. Owns the words of a topic key: an id becomes one word, a type keeps its words. No text of a user or a publisher
can act as a topic operator. Knows nothing about queues, tokens or HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, Self

MAX_KEY_BYTES = 255
"""AMQP 0-9-1, section 4.2.5.3: a routing key is a short string, whose length is one octet."""

MAX_TYPE_CHARS = 128

MAX_PATTERNS = 16
"""The most patterns in one `types` member; each is a separate binding in RabbitMQ."""

FILTERS_KEPT: Final = 1_024
"""Size of the cache of filters by their text: pages request the same few. About 6 MB if each filter has 16 patterns of
128 characters."""

TYPES_KEPT: Final = 32
"""Size of two caches: each filter's results by event type, and the process's word places by event type."""

MAX_HASHES = 2
"""RabbitMQ 4.3.5 refuses a binding key with more than two `#`."""

RESERVED_PREFIX = "bridge."
"""Prefix of the types that the bridge itself sends. A publisher may not use them."""

_WORD = r"[a-z0-9_-]+"
_TYPE = re.compile(rf"{_WORD}(?:\.{_WORD})*")
_PATTERN = re.compile(rf"(?:{_WORD}|\*|#)(?:\.(?:{_WORD}|\*|#))*")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_~")
_ESCAPED = tuple(chr(byte) if byte in _UNRESERVED else f"%{byte:02X}" for byte in range(256))
_ENCODED_WORD = re.compile(r"(?:[A-Za-z0-9_~-]|%[0-9A-F]{2})+")

AudienceKind = Literal["user", "group", "all"]


class RoutingError(ValueError):
    """An id, a type, a pattern or a key is not valid in a topic key. The message names it and the reason."""


class InvalidId(RoutingError):
    """A user or group id is empty or not Unicode text, or a text does not have the form of an id or an audience."""


class InvalidType(RoutingError):
    """An event type does not match the grammar, or is reserved."""


class InvalidPattern(RoutingError):
    """A `types` pattern does not match the grammar, or there are too many patterns."""


class KeyTooLong(RoutingError):
    """A routing or binding key has more than 255 bytes."""


def encode_id(identity: str) -> str:
    """Returns the topic word for a user or group id. Each id has exactly one.

    Every UTF-8 byte other than `A-Z a-z 0-9 - _ ~` is written `%XX`, so `a.b` is `a%2Eb` and `*` is `%2A`.

    Raises:
        InvalidId: the id is empty, or contains a lone surrogate, which has no UTF-8 form.
    """
    if not identity:
        raise InvalidId("an id must not be empty")
    try:
        encoded = identity.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidId(f"an id must be Unicode text: {error.reason} at character {error.start}") from None
    return "".join([_ESCAPED[byte] for byte in encoded])


def decode_id(word: str) -> str:
    """Returns the id from which `encode_id` makes this word.

    Raises:
        InvalidId: `encode_id` makes this word from no id.
    """
    if not _ENCODED_WORD.fullmatch(word):
        raise InvalidId(f"{word[:80]!r} is not an encoded id")
    raw = re.sub(rb"%([0-9A-F]{2})", lambda match: bytes.fromhex(match[1].decode()), word.encode("ascii"))
    try:
        identity = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidId(f"{word[:80]!r} does not decode to UTF-8") from None
    if encode_id(identity) != word:
        # `%41` decodes to `A`, whose word is `A`. With two words, one user's events would have two routing keys.
        raise InvalidId(f"{word[:80]!r} is not the canonical form of its id")
    return identity


def check_type(event_type: str) -> str:
    """Returns the type if a publisher may use it.

    Raises:
        InvalidType: not lower-case words joined by dots, over 128 characters, or reserved (begins with `bridge.`).
    """
    if len(event_type) > MAX_TYPE_CHARS:
        raise InvalidType(f"a type has at most {MAX_TYPE_CHARS} characters, this one has {len(event_type)}")
    if not _TYPE.fullmatch(event_type):
        raise InvalidType(
            f"type {event_type!r} is not lower-case words of a-z, 0-9, _ and - joined by dots (as in job.progress)"
        )
    if event_type.startswith(RESERVED_PREFIX):
        raise InvalidType(f"type {event_type!r} is reserved: 'bridge.' is for the bridge; choose another prefix")
    return event_type


def _check_key(key: str) -> str:
    # Every part of a key is ASCII here, so characters are bytes.
    if len(key) > MAX_KEY_BYTES:
        raise KeyTooLong(f"the key has {len(key)} bytes, AMQP allows {MAX_KEY_BYTES}: {key[:60]}...")
    return key


@dataclass(frozen=True, slots=True)
class Audience:
    """The users who may see an event: one user, the members of one group, or everybody."""

    kind: AudienceKind
    id: str = ""

    @classmethod
    def user(cls, identity: str) -> Self:
        return cls("user", identity)

    @classmethod
    def group(cls, identity: str) -> Self:
        return cls("group", identity)

    @classmethod
    def everyone(cls) -> Self:
        return cls("all")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `user:<id>`, `group:<id>` or `all`, as the command line writes an audience.

        Raises:
            InvalidId: the text has none of the three forms, or the id is empty or not Unicode text.
        """
        kind, colon, identity = text.partition(":")
        if text == "all":
            return cls.everyone()
        if not colon or kind not in ("user", "group"):
            raise InvalidId(f"{text!r} is not an audience: write user:<id>, group:<id> or all")
        encode_id(identity)
        return cls.user(identity) if kind == "user" else cls.group(identity)

    def __str__(self) -> str:
        return "all" if self.kind == "all" else f"{self.kind}:{self.id}"

    @property
    def prefix(self) -> str:
        """The beginning of every routing key of this audience, including the dot."""
        return "all." if self.kind == "all" else f"{self.kind}.{encode_id(self.id)}."

    def routing_key(self, event_type: str) -> str:
        """The routing key for an event of this type.

        Raises:
            InvalidId, InvalidType, KeyTooLong
        """
        return _check_key(self.prefix + check_type(event_type))

    def binding_key(self, pattern: str = "#") -> str:
        """The binding key of a queue for this audience, for the types that `pattern` matches. The default is all types.

        Raises:
            InvalidId, KeyTooLong
        """
        return _check_key(self.prefix + pattern)


def split_key(key: str) -> tuple[Audience, str]:
    """Returns the audience and the event type of a routing key.

    Raises:
        RoutingError: the key breaks the contract: its first word, its id or its type is invalid.
    """
    kind, _, rest = key.partition(".")
    if kind == "all":
        return Audience.everyone(), check_type(rest)
    if kind not in ("user", "group"):
        raise RoutingError(f"the key begins with {kind[:40]!r}; keys begin with user, group or all")
    word, _, event_type = rest.partition(".")
    identity = decode_id(word)
    return (Audience.user if kind == "user" else Audience.group)(identity), check_type(event_type)


# An audience without escapes, which needs no decoding by `split_key`.
_PLAIN_AUDIENCE = re.compile(r"all\.|(?:user|group)\.[A-Za-z0-9_~-]+\.")


def is_key_of(key: str, event_type: str) -> bool:
    """Whether the key certainly has a valid audience and this type, which must be valid. If False, call `split_key`."""
    match = _PLAIN_AUDIENCE.match(key)
    return match is not None and key[match.end() :] == event_type


class TypeFilter:
    """The event types that a client requested. Without patterns it matches every type.

    Patterns are those of a topic exchange (AMQP 0-9-1, section 3.1.3.3): `*` is exactly one word, `#` is zero or more.
    RabbitMQ filters a user's live queue by binding key. Events of the shared queue and of the log are filtered here,
    with the same rules.

    Streams that request the same `types` text share one filter.
    """

    __slots__ = ("_known", "_takes_all", "patterns")

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        # A repeated pattern would be declared as a binding twice. The order has no effect.
        self.patterns = tuple(dict.fromkeys(patterns))
        self._takes_all = not self.patterns or "#" in self.patterns
        self._known: dict[str, bool] = {}

    @classmethod
    def parse(cls, text: str) -> TypeFilter:
        """Reads the value of the query member `types`: patterns joined by commas.

        Raises:
            InvalidPattern: an empty pattern, one outside the grammar, or more than 16.
        """
        # Counted before the split: a query of 16 KB can contain 16,000 commas.
        if text.count(",") >= MAX_PATTERNS:
            raise InvalidPattern(f"at most {MAX_PATTERNS} patterns in `types`, these are {text.count(',') + 1}")
        return _parse(text)

    def matches(self, event_type: str) -> bool:
        if self._takes_all:
            return True
        known = self._known.get(event_type)
        if known is None:
            places, end = _places(event_type)
            known = any(takes(pattern, places, end) for pattern in self.patterns)
            if len(self._known) >= TYPES_KEPT:
                self._known.clear()
            self._known[event_type] = known
        return known

    def binding_keys(self, audience: Audience) -> tuple[str, ...]:
        """The binding keys of the live queue for this audience: one for each pattern, or one for every type.

        Raises:
            InvalidId: the audience's id has no topic word.
            KeyTooLong: a key is over 255 bytes. With the pattern `#`, no event can have this audience.
        """
        return tuple(audience.binding_key(pattern) for pattern in self.patterns or ("#",))

    def __repr__(self) -> str:
        return f"TypeFilter({', '.join(self.patterns) or 'every type'})"


@lru_cache(maxsize=FILTERS_KEPT)
def _parse(text: str) -> TypeFilter:
    patterns = text.split(",")
    for pattern in patterns:
        if not pattern:
            raise InvalidPattern("`types` has an empty pattern; leave `types` out to get every type")
        if len(pattern) > MAX_TYPE_CHARS or not _PATTERN.fullmatch(pattern):
            raise InvalidPattern(
                f"{pattern[:140]!r} is not a type pattern: write words of a-z, 0-9, _ and -, or *, or #, joined by "
                f"dots (job.progress, job.*, job.#), at most {MAX_TYPE_CHARS} characters"
            )
        if pattern.split(".").count("#") > MAX_HASHES:
            raise InvalidPattern(f"{pattern!r} has more than {MAX_HASHES} '#'")
    return TypeFilter(patterns)


def takes(pattern: str, places: Mapping[str, int], end: int) -> bool:
    """Whether a pattern matches an event type, in one step for each word of the pattern.

    `reached` is a set of places in the type, as bits. Bit n is set if the pattern's words so far match the type's first
    n words. So the match needs no backtracking. For the type `a.b.a` and the pattern `#.a`:

        places = {"a": 0b101, "b": 0b010}, end = 0b1000
        start        0b0001  no word matched
        after `#`    0b1111  zero or more words: this place and all later ones
        after `a`    0b1010  after the first word, and after the third, which is the end

    Args:
        places: for each word of the type, the bits of the places at which it begins.
        end: the bit of the place after the last word.
    """
    reached = 1
    for word in pattern.split("."):
        if word == "#":
            reached = 2 * end - (reached & -reached)
        elif word == "*":
            reached = (reached << 1) & (2 * end - 1)
        else:
            reached = (reached & places.get(word, 0)) << 1
        if not reached:
            return False
    return reached & end != 0


@lru_cache(maxsize=TYPES_KEPT)
def _places(event_type: str) -> tuple[Mapping[str, int], int]:
    places: dict[str, int] = {}
    bit = 1
    for word in event_type.split("."):
        places[word] = places.get(word, 0) | bit
        bit <<= 1
    return places, bit
