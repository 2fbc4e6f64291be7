"""Who an event is for, as AMQP routing and binding keys (docs/contract.md, "Exchange and routing keys").

Pure. Owns the words of a topic key: ids become one word each, types stay words, and nothing that a user or a
publisher chose can act as a topic operator. Knows nothing of queues, tokens or HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Self

MAX_KEY_BYTES = 255
"""AMQP 0-9-1, section 4.2.5.3: a routing key is a short string, whose length is one octet."""

MAX_TYPE_CHARS = 128

MAX_PATTERNS = 16
"""Patterns in one `types` member; each is a binding of its own on the broker."""

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
    The broker filters a user's own queue by binding key; what comes by the shared queue or from the log is filtered
    here, by the same words.
    """

    __slots__ = ("_matches", "patterns")

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        # The order does not matter to anybody, a repeated pattern would be a binding made twice.
        self.patterns = tuple(dict.fromkeys(patterns))
        self._matches = _compile(self.patterns)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads the value of the query member `types`: patterns joined by commas.

        Raises:
            InvalidPattern: an empty pattern, one outside the grammar, or more than 16.
        """
        patterns = text.split(",")
        if len(patterns) > MAX_PATTERNS:
            raise InvalidPattern(f"at most {MAX_PATTERNS} patterns in `types`, these are {len(patterns)}")
        for pattern in patterns:
            if not pattern:
                raise InvalidPattern("`types` has an empty pattern; leave `types` out to get every type")
            if len(pattern) > MAX_TYPE_CHARS or not _PATTERN.fullmatch(pattern):
                raise InvalidPattern(
                    f"{pattern[:140]!r} is no type pattern: write words of a-z, 0-9, _ and -, or *, or #, joined by "
                    f"dots (job.progress, job.*, job.#), at most {MAX_TYPE_CHARS} characters"
                )
            if pattern.split(".").count("#") > MAX_HASHES:
                raise InvalidPattern(f"{pattern!r} has more than {MAX_HASHES} '#'")
        return cls(patterns)

    def matches(self, event_type: str) -> bool:
        return self._matches is None or self._matches.fullmatch(event_type) is not None

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


@lru_cache(maxsize=1024)  # Pages ask for the same few filters over and over.
def _compile(patterns: tuple[str, ...]) -> re.Pattern[str] | None:
    if not patterns or "#" in patterns:
        return None
    return re.compile("|".join(f"(?:{_as_regex(pattern)})" for pattern in patterns))


def _as_regex(pattern: str) -> str:
    # `#` may be no word at all, so it takes its dot along: `a.#` is `a(?:\.word)*`, `#.a` is `(?:word\.)*a`.
    # Words and dots are disjoint sets, so nothing here backtracks further than the number of words allows.
    regex = ""
    at_start = True  # Nothing that must be there has been written yet, so no dot goes before the next word.
    previous = ""
    for word in pattern.split("."):
        if word != "#":
            regex += ("" if at_start else r"\.") + (_WORD if word == "*" else re.escape(word))
            at_start = False
        elif previous != "#":  # `#.#` is `#`.
            regex += rf"(?:{_WORD}\.)*" if at_start else rf"(?:\.{_WORD})*"
        previous = word
    # A pattern of nothing but `#` takes every type.
    return rf"{_WORD}(?:\.{_WORD})*" if at_start else regex
