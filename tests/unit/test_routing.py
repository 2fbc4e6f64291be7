"""Ids, types and patterns at the limits of their grammar."""

import pytest

from bridge.routing import (
    TYPES_KEPT,
    Audience,
    InvalidId,
    InvalidPattern,
    InvalidType,
    KeyTooLong,
    RoutingError,
    TypeFilter,
    decode_id,
    encode_id,
    is_key_of,
    split_key,
)


@pytest.mark.contract("1.3")
@pytest.mark.parametrize(
    ("identity", "word"),
    [
        ("42", "42"),
        ("a.b", "a%2Eb"),
        ("*", "%2A"),
        ("#", "%23"),
        ("Az09-_~", "Az09-_~"),
        ("auth0|x y", "auth0%7Cx%20y"),
        ("%", "%25"),
        ("é", "%C3%A9"),
        ("😀", "%F0%9F%98%80"),
        ("\0\r\n", "%00%0D%0A"),
    ],
)
def test_an_id_is_one_word_and_is_decoded_again(identity: str, word: str) -> None:
    assert encode_id(identity) == word
    assert decode_id(word) == identity


@pytest.mark.contract("1.3")
@pytest.mark.parametrize("identity", ["", "\ud800"])
def test_an_id_without_a_word_is_refused(identity: str) -> None:
    with pytest.raises(InvalidId):
        encode_id(identity)


@pytest.mark.parametrize("word", ["", "%41", "%2a", "a.b", "%", "%C3", "%FF", "a b", "*"])
def test_a_word_that_no_id_has_is_refused(word: str) -> None:
    with pytest.raises(InvalidId):
        decode_id(word)


@pytest.mark.contract("1.5")
@pytest.mark.parametrize("event_type", ["a", "job.progress", "a-b_c.0", "x" * 128])
def test_a_type_is_lower_case_words(event_type: str) -> None:
    assert Audience.everyone().routing_key(event_type) == f"all.{event_type}"


@pytest.mark.contract("1.5")
@pytest.mark.parametrize(
    "event_type", ["", ".", "a.", ".a", "a..b", "A", "a b", "a*", "#", "a\n", "ä", "x" * 129, "bridge.ready"]
)
def test_a_type_outside_the_grammar_or_reserved_is_refused(event_type: str) -> None:
    with pytest.raises(InvalidType):
        Audience.everyone().routing_key(event_type)


@pytest.mark.contract("1.4")
def test_a_key_has_at_most_255_bytes() -> None:
    longest = "x" * (255 - len("user.") - len(".a.b"))
    assert len(Audience.user(longest).routing_key("a.b")) == 255
    with pytest.raises(KeyTooLong):
        Audience.user(longest + "x").routing_key("a.b")
    with pytest.raises(KeyTooLong):
        Audience.user("😀" * 25).binding_key()  # Twelve characters each.


@pytest.mark.contract("1.2")
@pytest.mark.parametrize(
    ("key", "audience", "event_type"),
    [
        ("user.42.job.done", Audience.user("42"), "job.done"),
        ("user.a%2Eb.x", Audience.user("a.b"), "x"),
        ("group.ops.x", Audience.group("ops"), "x"),
        ("all.job.done", Audience.everyone(), "job.done"),
    ],
)
def test_a_key_has_an_audience_and_a_type(key: str, audience: Audience, event_type: str) -> None:
    assert split_key(key) == (audience, event_type)
    assert audience.routing_key(event_type) == key


@pytest.mark.parametrize(
    "key", ["", "user", "user.42", "user..x", "team.1.x", "all", "all.", "user.42.X", "user.%41.x"]
)
def test_a_key_outside_the_contract_is_refused(key: str) -> None:
    with pytest.raises(RoutingError):
        split_key(key)


@pytest.mark.parametrize(
    ("key", "certain"),
    [
        ("user.42.job.done", True), ("group.ops.job.done", True), ("all.job.done", True),
        ("user.42.job.failed", False), ("user.42.more.job.done", False), ("team.42.job.done", False),
        ("user.a%2Eb.job.done", False),  # Valid, but only `split_key` decodes it.
        ("job.done", False), ("", False),
    ],
)  # fmt: skip
def test_a_key_that_certainly_has_this_type(key: str, certain: bool) -> None:
    assert is_key_of(key, "job.done") is certain


@pytest.mark.parametrize(
    ("text", "audience"),
    [("user:42", Audience.user("42")), ("user:a:b", Audience.user("a:b")), ("group:x", Audience.group("x")),
     ("all", Audience.everyone())],
)  # fmt: skip
def test_an_audience_on_the_command_line(text: str, audience: Audience) -> None:
    assert Audience.parse(text) == audience
    assert str(audience) == text


@pytest.mark.parametrize("text", ["", "42", "user:", "group:", "team:1", "all:x", "user"])
def test_a_text_that_is_not_an_audience_is_refused(text: str) -> None:
    with pytest.raises(InvalidId):
        Audience.parse(text)


@pytest.mark.contract("2.6")
@pytest.mark.parametrize(
    "text",
    ["", ",", "job.*,", "a b", "A", "a..b", ".", "job.**", "a#", "x" * 129, "#.a.#.b.#", ",".join("abcdefghijklmnopq"),
     "user.%2A", "job.*\n"],
)  # fmt: skip
def test_a_pattern_outside_the_grammar_is_refused(text: str) -> None:
    with pytest.raises(InvalidPattern):
        TypeFilter.parse(text)


def test_commas_are_counted_before_anything_is_cut() -> None:
    with pytest.raises(InvalidPattern, match="at most 16 patterns in `types`, these are 16001"):
        TypeFilter.parse("," * 16_000)


def test_each_pattern_is_a_binding() -> None:
    types = TypeFilter.parse("job.*,billing.#,job.*")
    assert types.binding_keys(Audience.user("a.b")) == ("user.a%2Eb.job.*", "user.a%2Eb.billing.#")
    assert TypeFilter().binding_keys(Audience.user("42")) == ("user.42.#",)


@pytest.mark.contract("2.6")
def test_the_words_of_a_pattern() -> None:
    types = TypeFilter.parse("job.*,billing.#,report.ready")
    taken = ["job.done", "billing", "billing.a", "billing.a.b", "report.ready"]
    left = ["job", "job.a.b", "billings", "report", "report.ready.now", "xjob.done"]
    assert [event_type for event_type in taken + left if types.matches(event_type)] == taken
    assert TypeFilter().matches("anything.at.all")


@pytest.mark.contract("2.6")
@pytest.mark.parametrize("text", ["x" * 128, "#.a.#"])
def test_the_longest_pattern_and_two_hashes_are_allowed(text: str) -> None:
    assert TypeFilter.parse(text).patterns == (text,)


def test_a_word_of_a_pattern_matches_only_at_its_place() -> None:
    types = TypeFilter.parse("b.b")
    assert [types.matches(event_type) for event_type in ("b.b", "a.b", "b.a")] == [True, False, False]


def test_a_filter_remembers_few_types() -> None:
    types = TypeFilter.parse("kept.*")  # No other test has this pattern: equal patterns share a filter.
    for number in range(TYPES_KEPT):
        assert types.matches(f"kept.{number}")
    assert len(types._known) == TYPES_KEPT
    assert not types.matches("report.ready")
    assert len(types._known) <= TYPES_KEPT
    assert types.matches("kept.0")


def test_a_filter_names_its_patterns() -> None:
    assert repr(TypeFilter.parse("job.*,report.ready")) == "TypeFilter(job.*, report.ready)"
    assert repr(TypeFilter()) == "TypeFilter(every type)"
