"""Properties of routing keys: an id becomes one word, and patterns match as they do in a topic exchange."""

import re

import hypothesis.strategies as st
import pytest
from hypothesis import given

from bridge.routing import (
    MAX_HASHES,
    MAX_PATTERNS,
    MAX_TYPE_CHARS,
    TYPES_KEPT,
    Audience,
    InvalidPattern,
    TypeFilter,
    decode_id,
    encode_id,
    split_key,
    takes,
)

ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
words = st.text("abz09_-", min_size=1, max_size=3)
types = st.lists(words, min_size=1, max_size=5).map(".".join)
pattern_words = st.one_of(words, st.just("*"), st.just("#"))
patterns = st.lists(pattern_words, min_size=1, max_size=5).filter(lambda p: p.count("#") <= MAX_HASHES).map(".".join)


@pytest.mark.contract("1.3")
@given(ids)
def test_an_id_is_one_word_without_an_operator(identity: str) -> None:
    word = encode_id(identity)
    assert re.fullmatch(r"[A-Za-z0-9%_~-]+", word)
    assert decode_id(word) == identity


@pytest.mark.contract("1.3")
@given(ids, ids)
def test_two_ids_never_share_a_word(one: str, other: str) -> None:
    assert (encode_id(one) == encode_id(other)) == (one == other)


@given(st.sampled_from(["user", "group"]), ids, types)
def test_a_key_is_split_into_the_parts_that_it_was_made_of(kind: str, identity: str, event_type: str) -> None:
    audience = Audience(kind, identity)  # type: ignore[arg-type]
    assert split_key(audience.routing_key(event_type)) == (audience, event_type)


@given(ids, ids, types)
def test_one_users_binding_never_matches_anothers_event(one: str, other: str, event_type: str) -> None:
    binding = Audience.user(one).binding_key()
    key = Audience.user(other).routing_key(event_type)
    assert broker_matches(binding.split("."), key.split(".")) == (one == other)


@given(st.lists(patterns, min_size=1, max_size=4), types)
def test_a_filter_matches_what_the_brokers_bindings_match(chosen: list[str], event_type: str) -> None:
    expected = any(broker_matches(pattern.split("."), event_type.split(".")) for pattern in chosen)
    assert TypeFilter.parse(",".join(chosen)).matches(event_type) == expected


few = st.sampled_from("aab")
"""Words that often match each other: the worst case for a matcher that backtracks."""

long_types = st.lists(few, min_size=1, max_size=64).map(".".join)
long_patterns = st.lists(few | st.just("*"), min_size=1, max_size=60).flatmap(
    lambda words: st.lists(st.integers(0, len(words)), max_size=MAX_HASHES).map(lambda at: with_hashes(words, at))
)


def with_hashes(words: list[str], places: list[int]) -> str:
    found = list(words)
    for place in sorted(places, reverse=True):
        found.insert(place, "#")
    return ".".join(found)


@given(st.lists(long_patterns, min_size=1, max_size=16), st.lists(long_types, min_size=1, max_size=40))
def test_a_filter_of_long_patterns_matches_what_a_table_of_all_places_matches(
    chosen: list[str], event_types: list[str]
) -> None:
    types = TypeFilter.parse(",".join(chosen))
    for event_type in event_types * 2:  # The second time from the cache.
        expected = any(table_matches(pattern.split("."), event_type.split(".")) for pattern in chosen)
        assert types.matches(event_type) == expected
    assert len(types._known) <= TYPES_KEPT


class Counted(dict[str, int]):
    """The places of a type's words, with how often they were asked for."""

    asked = 0

    def get(self, word: str, default: int = 0) -> int:  # type: ignore[override]
        self.asked += 1
        return super().get(word, default)


@given(long_patterns, long_types)
def test_a_pattern_is_tried_in_one_step_for_each_of_its_words(pattern: str, event_type: str) -> None:
    places = Counted()
    for at, word in enumerate(event_type.split(".")):
        places[word] = places.get(word) | 1 << at
    places.asked = 0
    assert takes(pattern, places, 1 << len(event_type.split("."))) == table_matches(
        pattern.split("."), event_type.split(".")
    )
    literals = [word for word in pattern.split(".") if word not in "#*"]
    assert places.asked <= len(literals) <= MAX_TYPE_CHARS // 2


@given(st.text("a.*#, ", max_size=60))
def test_a_text_is_refused_or_has_few_and_short_patterns(text: str) -> None:
    try:
        types = TypeFilter.parse(text)
    except InvalidPattern:
        return
    assert 0 < len(types.patterns) <= MAX_PATTERNS
    assert all(len(pattern) <= MAX_TYPE_CHARS for pattern in types.patterns)
    assert TypeFilter.parse(text) is types, "streams that ask for the same share a filter"


def table_matches(pattern: list[str], key: list[str]) -> bool:
    """Like `broker_matches`, with a table: row[n] says whether the pattern's words so far match n words of the key."""
    row = [True] + [False] * len(key)
    for word in pattern:
        above, row = row, [False] * (len(key) + 1)
        for at in range(len(key) + 1):
            if word == "#":
                row[at] = above[at] or (at > 0 and row[at - 1])
            else:
                row[at] = at > 0 and above[at - 1] and word in ("*", key[at - 1])
    return row[-1]


def broker_matches(pattern: list[str], key: list[str]) -> bool:
    """The rules of AMQP 0-9-1, section 3.1.3.3, applied directly."""
    if not pattern:
        return not key
    if pattern[0] == "#":
        return broker_matches(pattern[1:], key) or (bool(key) and broker_matches(pattern, key[1:]))
    return bool(key) and pattern[0] in ("*", key[0]) and broker_matches(pattern[1:], key[1:])
