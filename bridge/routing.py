"""Who an event is for, as AMQP routing and binding keys (docs/contract.md, "Exchange and routing keys").

Pure. Owns the words of a topic key: ids become one word each, types stay words, and nothing that a user or a
publisher chose can act as a topic operator. Knows nothing of queues, tokens or HTTP.
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
"""Patterns in one `types` member; each is a binding of its own on the broker."""

FILTERS_KEPT: Final = 1_024
"""Filters that are remembered by their text, because pages ask for the same few. About 6 MB, when all of them have 16
patterns of 128 characters."""

TYPES_KEPT: Final = 32
"""Event types for which a filter, and places of types for which the process, remembers the answer."""

MAX_HASHES = 2
"""RabbitMQ 4.3.5 refuses a binding key with more than two `#`."""

RESERVED_PREFIX = "bridge."
"""Types that the bridge itself sends: a publisher may not use them."""

_WORD = r"[a-z0-9_-]+"
_TYPE = re.compile(rf"{_WORD}(?:\.{_WORD})*")
_PATTERN = re.compile(rf"(?:{_WORD}|\*|#)(?:\.(?:{_WORD}|\*|#))*")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_~")
_ESCAPED = tuple(chr(byte) if byte in _UNRESERVED else f"%{byte:02X}" for byte in range(256))
_ENCODED_WORD = re.compile(r"(?:[A-Za-z0-9_~-]|%[0-9A-F]{2})+")

AudienceKind = Literal["user", "group", "all"]


class RoutingError(ValueError):
    """An id, a type, a pattern or a key that cannot stand in a topic key; the message says which and why."""


class InvalidId(RoutingError):
    """A user or group id that is empty or is no Unicode text."""


class InvalidType(RoutingError):
    """An event type outside the grammar, or a reserved one."""


class InvalidPattern(RoutingError):
    """A `types` pattern outside the grammar."""


class KeyTooLong(RoutingError):
    """A routing or binding key of more than 255 bytes."""


def encode_id(identity: str) -> str:
    """The one topic word for a user or group id.

    Every UTF-8 byte other than `A-Z a-z 0-9 - _ ~` is written `%XX`, so `a.b` is `a%2Eb` and `*` is `%2A`.

    Raises:
        InvalidId: the id is empty, or holds a lone surrogate and so has no UTF-8 form.
    """
    if not identity:
        raise InvalidId("an id must not be empty")
    try:
        encoded = identity.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidId(f"an id must be Unicode text: {error.reason} at character {error.start}") from None
    return "".join([_ESCAPED[byte] for byte in encoded])


def decode_id(word: str) -> str:
    """The id that `encode_id` made this word from.

    Raises:
        InvalidId: no id has this word, because it is not written as `encode_id` writes.
    """
    if not _ENCODED_WORD.fullmatch(word):
        raise InvalidId(f"{word[:80]!r} is not an encoded id")
    raw = re.sub(rb"%([0-9A-F]{2})", lambda match: bytes.fromhex(match[1].decode()), word.encode("ascii"))
    try:
        identity = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidId(f"{word[:80]!r} does not decode to UTF-8") from None
    if encode_id(identity) != word:
        # `%41` is `A` spelled another way. Two words for one id would be two queues for one person.
        raise InvalidId(f"{word[:80]!r} is not the canonical form of its id")
    return identity


def check_type(event_type: str) -> str:
    """The type itself, once it is known to be one that a publisher may use.

    Raises:
        InvalidType: not lower-case words joined by dots, over 128 characters, or reserved (`bridge.`).
    """
    if len(event_type) > MAX_TYPE_CHARS:
        raise InvalidType(f"a type has at most {MAX_TYPE_CHARS} characters, this one has {len(event_type)}")
    if not _TYPE.fullmatch(event_type):
        raise InvalidType(
            f"type {event_type!r} is not lower-case words of a-z, 0-9, _ and - joined by dots (as in job.progress)"
        )
    if event_type.startswith(RESERVED_PREFIX):
        raise InvalidType(f"type {event_type!r} is reserved: types that begin with 'bridge.' are the bridge's own")
    return event_type


def _check_key(key: str) -> str:
    # Every part of a key is ASCII by now, so characters are bytes.
    if len(key) > MAX_KEY_BYTES:
        raise KeyTooLong(f"the key has {len(key)} bytes, AMQP allows {MAX_KEY_BYTES}: {key[:60]}...")
    return key


@dataclass(frozen=True, slots=True)
class Audience:
    """Who may see an event: one user, one group, or everybody."""

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
            InvalidId: none of the three forms, or an empty id.
        """
        kind, colon, identity = text.partition(":")
        if text == "all":
            return cls.everyone()
        if not colon or kind not in ("user", "group"):
            raise InvalidId(f"{text!r} is no audience: write user:<id>, group:<id> or all")
        encode_id(identity)
        return cls.user(identity) if kind == "user" else cls.group(identity)

    def __str__(self) -> str:
        return "all" if self.kind == "all" else f"{self.kind}:{self.id}"

    @property
    def prefix(self) -> str:
        """What every routing key of this audience begins with, the last dot included."""
        return "all." if self.kind == "all" else f"{self.kind}.{encode_id(self.id)}."

    def routing_key(self, event_type: str) -> str:
        """The key that an event of this type is published with.

        Raises:
            InvalidId, InvalidType, KeyTooLong
        """
        return _check_key(self.prefix + check_type(event_type))

    def binding_key(self, pattern: str = "#") -> str:
        """The key that binds a queue to this audience, for all types or for those that `pattern` matches.

        Raises:
            InvalidId, KeyTooLong
        """
        return _check_key(self.prefix + pattern)


def split_key(key: str) -> tuple[Audience, str]:
    """The audience and the type that a routing key names.

    Raises:
        RoutingError: no publisher that keeps to the contract sends this key.
    """
    kind, _, rest = key.partition(".")
    if kind == "all":
        return Audience.everyone(), check_type(rest)
    if kind not in ("user", "group"):
        raise RoutingError(f"the key begins with {kind[:40]!r}; keys begin with user, group or all")
    word, _, event_type = rest.partition(".")
    identity = decode_id(word)
    return (Audience.user if kind == "user" else Audience.group)(identity), check_type(event_type)


# The audience of a key without escapes: what `split_key` would find in it can be read off.
_PLAIN_AUDIENCE = re.compile(r"all\.|(?:user|group)\.[A-Za-z0-9_~-]+\.")


def is_key_of(key: str, event_type: str) -> bool:
    """Whether the key surely names this type, which is a good one. False says nothing: then `split_key` has to tell."""
    match = _PLAIN_AUDIENCE.match(key)
    return match is not None and key[match.end() :] == event_type


class TypeFilter:
    """The types that a browser asked for. Without patterns it is every type.

    Patterns are those of a topic exchange (AMQP 0-9-1, section 3.1.3.3): `*` is exactly one word, `#` none or more.
    RabbitMQ filters a user's own queue by binding key. Events of the shared queue and of the log are filtered here, by
    the same rules.

    Streams that ask for the same share one filter.
    """

    __slots__ = ("_known", "_takes_all", "patterns")

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        # The order does not matter to anybody, a repeated pattern would be a binding made twice.
        self.patterns = tuple(dict.fromkeys(patterns))
        self._takes_all = not self.patterns or "#" in self.patterns
        self._known: dict[str, bool] = {}

    @classmethod
    def parse(cls, text: str) -> TypeFilter:
        """Reads the value of the query member `types`: patterns joined by commas.

        Raises:
            InvalidPattern: an empty pattern, one outside the grammar, or more than 16.
        """
        # Counted before anything is cut: a query of 16 KB can hold as many commas.
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
        """The binding keys of the live queue for this audience: one a pattern, or one for everything.

        Raises:
            InvalidId: the audience's id has no topic word.
            KeyTooLong: a key is over 255 bytes. For the pattern `#` this says that no event at all can have this
                audience.
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
    """Whether a pattern takes an event type, in one step for each word of the pattern.

    `reached` is a set of places in the type, as the bits of a number: the pattern's words so far take exactly the
    type's words before that place. So nothing is tried twice. For the type `a.b.a` and the pattern `#.a`:

        places = {"a": 0b101, "b": 0b010}, end = 0b1000
        before       0b0001  no word yet
        after `#`    0b1111  none or more: this place and all behind it
        after `a`    0b1010  behind the first word and behind the third, which is the end

    Args:
        places: for each word of the type, the bits of the places at which it begins.
        end: the bit behind the last word.
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
