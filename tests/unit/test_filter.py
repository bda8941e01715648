"""AIP-160 filters: what a text means, and what is said about one that means nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation_server.domain.filter import (
    MAX_DEPTH,
    MAX_RESTRICTIONS,
    And,
    Comparator,
    Filter,
    FilterError,
    Not,
    Or,
    Restriction,
    parse,
)


def shown(tree: Filter | None) -> str:
    """A tree in a form that leaves no doubt: (a = x & (b = y | !c : z))."""
    match tree:
        case None:
            return ""
        case Restriction(path, comparator, value):
            return f"{'/'.join(path)}{comparator}{value}"
        case Not(part):
            return f"!{shown(part)}"
        case And(parts):
            return f"({' & '.join(map(shown, parts))})"
        case Or(parts):
            return f"({' | '.join(map(shown, parts))})"


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("", ""),
        (" \n\t", ""),
        ("a = 1", "a=1"),
        ("a=1", "a=1"),
        ("a\n=\t1", "a=1"),
        ("a = 1 AND b = 2 AND c = 3", "(a=1 & b=2 & c=3)"),
        ("a = 1 b = 2", "(a=1 & b=2)"),
        ("a = 1 OR b = 2", "(a=1 | b=2)"),
        # OR binds more tightly than AND.
        ("a = 1 AND b = 2 OR c = 3", "(a=1 & (b=2 | c=3))"),
        ("a = 1 OR b = 2 AND c = 3", "((a=1 | b=2) & c=3)"),
        ("a = 1 OR b = 2 c = 3", "((a=1 | b=2) & c=3)"),
        ("(a = 1 AND b = 2) OR c = 3", "((a=1 & b=2) | c=3)"),
        ("(a = 1)", "a=1"),
        ("((a = 1) AND (b = 2))AND(c = 3)", "(a=1 & b=2 & c=3)"),
        # NOT and - take what stands next to them.
        ("NOT a = 1 b = 2", "(!a=1 & b=2)"),
        ("-a = 1 OR b = 2", "(!a=1 | b=2)"),
        ("a = 1 -b = 2", "(a=1 & !b=2)"),
        ("NOT (a = 1 OR b = 2)", "!(a=1 | b=2)"),
        ("NOT(a = 1)", "!a=1"),
        ("-(a = 1 b = 2)", "!(a=1 & b=2)"),
        ("NOT (NOT a = 1)", "!!a=1"),
        # values
        ("a = -5", "a=-5"),
        ("a = 1.5e-3", "a=1.5e-3"),
        ("a = 2026-01-31T12:00:00.5+01:00", "a=2026-01-31T12:00:00.5+01:00"),
        ("a = x*", "a=x*"),
        ("a:b:c", "a:b:c"),
        ("a = AND", "a=AND"),
        ('a = "x y"', "a=x y"),
        ("a = 'x \"y\"'", 'a=x "y"'),
        (r'a = "x\"y\\z"', 'a=x"y\\z'),
        ('a = "(" b = ")"', "(a=( & b=))"),
        ('a = "x OR b = 1"', "a=x OR b = 1"),
        ('a = ""', "a="),
        ("a = äöü", "a=äöü"),
        # comparators
        ("a != 1", "a!=1"),
        ("a<1 b<=2 c>3 d>=4", "(a<1 & b<=2 & c>3 & d>=4)"),
        ("a:*", "a:*"),
        # paths
        ("labels.zone = eu", "labels/zone=eu"),
        ("labels.my-zone = eu", "labels/my-zone=eu"),
        ("labels.2nd/zone = eu", "labels/2nd/zone=eu"),
        ("labels.a.b = eu", "labels/a/b=eu"),
        ('labels."k8s.io/zone" = eu', "labels/k8s.io/zone=eu"),
        ("labels.NOT = eu", "labels/NOT=eu"),
        # names that begin like a word of the grammar
        ("ANDROID = 1 AND ORDER = 2 OR NOTE = 3", "(ANDROID=1 & (ORDER=2 | NOTE=3))"),
    ],
)
def test_a_filter_means(text: str, meaning: str) -> None:
    assert shown(parse(text)) == meaning


def test_a_restriction_knows_where_it_stands_and_whether_it_was_quoted() -> None:
    tree = parse('a = 1 AND  b : "2"')
    assert tree == And(
        (
            Restriction(("a",), Comparator.EQUAL, "1", quoted=False, position=1),
            Restriction(("b",), Comparator.HAS, "2", quoted=True, position=12),
        )
    )


@pytest.mark.parametrize(
    ("text", "position", "said"),
    [
        ("scraper", 8, "ends too soon"),
        ("scraper eu", 9, "'eu'"),
        ('"scraper"', 1, "'\"scraper\"'"),
        ("a =", 4, "ends too soon"),
        ("a = 1 AND ", 10, "ends too soon"),
        ("a = 1 OR", 9, "ends too soon"),
        ("NOT", 4, "ends too soon"),
        ("(a = 1", 7, "ends too soon"),
        ("a = 1)", 6, "')'"),
        ("()", 2, "')'"),
        ("a == 1", 4, "'='"),
        ("a ~ 1", 3, "'~'"),
        ("a = (1)", 5, "'(1)'"),
        ('a = "x', 5, "'\"x'"),
        ("a = 1 AND AND b = 2", 15, "'b'"),
        ("NOT NOT a = 1", 9, "'a'"),
        ("a. = 1", 4, "'='"),
        ("ä = 1", 1, "'ä'"),
        ("a = 1; DROP TABLE neurons", 13, "'TABLE'"),
    ],
)
def test_what_is_no_filter_is_refused_with_its_place_and_its_word(
    text: str, position: int, said: str
) -> None:
    with pytest.raises(FilterError) as caught:
        parse(text)
    assert caught.value.position == position
    assert f"at character {position}: " in str(caught.value)
    assert said in str(caught.value)


def test_a_filter_has_at_most_a_hundred_comparisons() -> None:
    assert parse("a=1 " * MAX_RESTRICTIONS) is not None
    with pytest.raises(FilterError, match="more than 100 comparisons"):
        parse("a=1 " * (MAX_RESTRICTIONS + 1))


def test_parentheses_are_nested_at_most_twenty_deep() -> None:
    def deep(levels: int) -> str:
        return "NOT (" * levels + "a = 1" + ")" * levels

    assert parse(deep(MAX_DEPTH)) is not None
    with pytest.raises(FilterError, match="nested deeper than 20") as caught:
        parse(deep(MAX_DEPTH + 1))
    assert caught.value.position == 5 * (MAX_DEPTH + 1)


def test_parentheses_in_a_string_are_no_nesting() -> None:
    assert shown(parse(f'a = "{"(" * 100}"')) == "a=" + "(" * 100


@given(st.text(max_size=200) | st.text(alphabet="ab=<>!:.()\"'\\ -*ANDORT1", max_size=200))
def test_any_text_is_a_filter_or_a_filter_error(text: str) -> None:
    position: int | None = None
    try:
        parse(text)
    except FilterError as error:
        position = error.position
    assert position is None or 1 <= position <= len(text) + 1


@given(st.text(min_size=1, max_size=50))
def test_any_string_can_be_quoted(value: str) -> None:
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    assert shown(parse(f'a = "{quoted}"')) == f"a={value}"
