"""Filters and pages on a real PostgreSQL: which rows they find, and that no text is ever SQL."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    DateTime,
    Double,
    Enum,
    MetaData,
    SmallInteger,
    Table,
    create_engine,
    func,
    insert,
    select,
)
from sqlalchemy import Text as SqlText
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from federation_server.domain.analytics import Severity
from federation_server.domain.filter import FilterError
from federation_server.store import filter as filters
from federation_server.store.paging import PageTokenInvalid, SortKey, page

METADATA = MetaData()

SEVERITY = Enum(Severity, name="filter_severity", values_callable=lambda e: [m.name for m in e])

THINGS = Table(
    "things",
    METADATA,
    Column("id", BigInteger, primary_key=True),
    Column("name", SqlText),
    Column("score", Double),
    Column("priority", SmallInteger),
    Column("time", DateTime(timezone=True)),
    Column("severity", SEVERITY),
    Column("tags", ARRAY(SqlText)),
    Column("labels", JSONB),
    prefixes=["TEMPORARY"],
)

FIELDS: filters.Fields = {
    "name": filters.Text(THINGS.c.name),
    "score": filters.Number(THINGS.c.score),
    "priority": filters.Number(THINGS.c.priority),
    "time": filters.Time(THINGS.c.time),
    "severity": filters.Choice(THINGS.c.severity, Severity, ordered=True),
    "mood": filters.Choice(THINGS.c.severity, Severity),
    "tags": filters.TextArray(THINGS.c.tags),
    "labels": filters.TextMap(THINGS.c.labels),
}

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)

ROWS: list[dict[str, Any]] = [
    {
        "id": 1,
        "name": "scraper-eu",
        "score": 90.5,
        "priority": 2,
        "time": NOON,
        "severity": Severity.INFO,
        "tags": ["ocr", "pdf"],
        "labels": {"zone": "eu", "k8s.io/app": "a"},
    },
    {
        "id": 2,
        "name": "100%_sure\\",
        "score": 10,
        "priority": 3,
        "time": NOON + timedelta(hours=1),
        "severity": Severity.CRITICAL,
        "tags": [],
        "labels": {"zone": "us"},
    },
    {
        "id": 3,
        "name": "scraper-us",
        "score": -1,
        "priority": 9,
        "time": NOON - timedelta(days=1),
        "severity": Severity.ERROR,
        "tags": ["ocr"],
        "labels": {"tier": "gold"},
    },
    # A row that says nothing.
    dict.fromkeys(("name", "score", "priority", "time", "severity"))
    | {"id": 4, "tags": [], "labels": {}},
]


@pytest.fixture(scope="module")
def connection(postgres: Any) -> Iterator[Connection]:
    with postgres.database() as url:
        engine = create_engine(url)
        with engine.connect() as connection:
            METADATA.create_all(connection)
            connection.execute(insert(THINGS), ROWS)
            connection.commit()
            yield connection
        engine.dispose()


def found(connection: Connection, filter_text: str) -> list[int]:
    query = select(THINGS.c.id).where(filters.condition(filter_text, FIELDS)).order_by(THINGS.c.id)
    return list(connection.execute(query).scalars())


@pytest.mark.parametrize(
    ("filter_text", "ids"),
    [
        ("", [1, 2, 3, 4]),
        # texts
        ("name = scraper-eu", [1]),
        ('name = "scraper-eu"', [1]),
        ("name : scraper-eu", [1]),
        ("name = scraper*", [1, 3]),
        ("name = *-us", [3]),
        ('name = "*rap*"', [1, 3]),
        ("name = *", [1, 2, 3]),
        ("name = scr*eu", []),  # a star inside is a star
        ("name != scraper-eu", [2, 3, 4]),
        ("name != scraper*", [2, 4]),
        ("NOT name = scraper*", [2, 4]),
        ("NOT name != scraper*", [1, 3]),
        ("name > scraper-eu", [3]),
        ('name = ""', []),
        # numbers
        ("score >= 10", [1, 2]),
        ("score = 90.5", [1]),
        ("score < 0", [3]),
        ("score = -1", [3]),
        ("score != 10", [1, 3, 4]),
        ("NOT score >= 10", [3, 4]),
        ("priority > 2.5", [2, 3]),
        ("priority = 2.5", []),
        ("priority < 1e300", [1, 2, 3]),
        ("priority = 99999999999999999999", []),
        # times
        ("time = 2026-01-31T12:00:00Z", [1]),
        ('time >= "2026-01-31T13:00:00+01:00"', [1, 2]),
        ("time < 2026-01-31T12:00:00.000001Z", [1, 3]),
        ("NOT time < 2027-01-01T00:00:00Z", [4]),
        # enums
        ("severity = ERROR", [3]),
        ("severity >= ERROR", [2, 3]),
        ("severity < ERROR", [1]),
        ("severity != ERROR", [1, 2, 4]),
        ("NOT severity = ERROR", [1, 2, 4]),
        ("mood = INFO", [1]),
        # arrays
        ("tags:ocr", [1, 3]),
        ("tags:ocr tags:pdf", [1]),
        ("NOT tags:ocr", [2, 4]),
        ("tags:*", [1, 3]),
        # maps
        ("labels.zone = eu", [1]),
        ("labels.zone != eu", [2, 3, 4]),
        ("NOT labels.zone = eu", [2, 3, 4]),
        ("labels.zone = *", [1, 2]),
        ("labels.zone = e*", [1]),
        ("labels.zone:*", [1, 2]),
        ("labels.zone:eu", [1]),
        ("labels:zone", [1, 2]),
        ("labels:*", [1, 2, 3]),
        ('labels."k8s.io/app" = a', [1]),
        ("labels.k8s.io/app = a", [1]),
        ("NOT labels:zone", [3, 4]),
        # together
        ("name = scraper* AND NOT labels.zone = eu", [3]),
        ("score > 50 OR severity >= CRITICAL", [1, 2]),
        ("name:* (score > 50 OR score < 0)", [1, 3]),
        ("NOT (name = scraper* OR score = 10)", [4]),
        ("-name = scraper* -score = 10", [4]),
    ],
)
def test_a_filter_finds(connection: Connection, filter_text: str, ids: list[int]) -> None:
    assert found(connection, filter_text) == ids


@pytest.mark.parametrize(
    ("filter_text", "ids"),
    [
        ('name = "%*"', []),
        ('name = "scraper_*"', []),
        ('name = "*%_*"', [2]),
        (r'name = "100%_sure\\"', [2]),
        (r'name = "100%_sure\\*"', [2]),
        (r'name = "*e\\"', [2]),
    ],
)
def test_what_like_treats_specially_is_an_ordinary_letter(
    connection: Connection, filter_text: str, ids: list[int]
) -> None:
    assert found(connection, filter_text) == ids


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.999999-14:00"])
def test_the_first_and_the_last_time_can_be_compared(connection: Connection, time: str) -> None:
    assert sorted(found(connection, f"time < {time}") + found(connection, f"time > {time}")) == [
        1,
        2,
        3,
    ]


@pytest.mark.parametrize(
    ("filter_text", "position", "said"),
    [
        ("typ = a", 1, "unknown field 'typ'; known: labels, mood, name, priority, score"),
        ("name = a AND nam = b", 14, "unknown field 'nam'"),
        ("name.first = a", 1, "name has no parts"),
        ("score = high", 1, "score is a number, not 'high'"),
        ("score = nan", 1, "score is a number, not 'nan'"),
        ("score = 1 OR score = 2*", 14, "score is a number, not '2*'"),
        ("time > yesterday", 1, "time is a time like 2026-01-31T12:00:00Z, not 'yesterday'"),
        ("time > 2026-01-31", 1, "time is a time like"),
        ("time > 2026-01-31T12:00:00", 1, "time is a time like"),
        ("severity = HIGH", 1, "severity is one of DEBUG, INFO, WARNING, ERROR, CRITICAL"),
        ("mood > INFO", 1, "mood has no order"),
        ("tags = ocr", 1, "tags is compared by : only"),
        ("labels = zone", 1, "labels is compared by : only"),
        ("labels.zone > a", 1, "labels.zone is compared by = != or :"),
    ],
)
def test_what_a_field_cannot_be_compared_with_is_refused(
    filter_text: str, position: int, said: str
) -> None:
    with pytest.raises(FilterError) as caught:
        filters.condition(filter_text, FIELDS)
    assert caught.value.position == position
    assert said in str(caught.value)


NASTY = [
    "'; DROP TABLE things; --",
    "' OR '1'='1",
    "%(name)s %s :name $1 ?",
    "\\'; SELECT 1 --",
    "{zone}",
    'a" -> b',
    "\u2028\u0001\ud7ff\U0010ffff",
]


@pytest.mark.parametrize("value", NASTY)
@pytest.mark.parametrize(
    "shape",
    [
        'name = "{}"',
        'name = "*{}*"',
        'name > "{}"',
        'tags:"{}"',
        'labels."{}" = "{}"',
        'labels:"{}"',
    ],
)
def test_a_nasty_string_is_only_ever_a_value(
    connection: Connection, value: str, shape: str
) -> None:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    filter_text = shape.replace("{}", escaped)
    ids = found(connection, filter_text)
    if ">" not in shape:  # where a text sorts is the database's to say
        assert ids == []
    assert value not in str(filters.condition(filter_text, FIELDS).compile(connection))
    assert connection.execute(select(func.count()).select_from(THINGS)).scalar_one() == 4


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    value=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
)
def test_any_text_is_compared_as_itself(connection: Connection, value: str) -> None:
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    names = [row["name"] for row in ROWS if row["name"]]
    if not value.startswith("*") and not value.endswith("*"):
        assert len(found(connection, f'name = "{quoted}"')) == names.count(value)
    inside = value.strip("*")
    middle = inside.replace("\\", "\\\\").replace('"', '\\"')
    assert len(found(connection, f'name = "*{middle}*"')) == sum(inside in name for name in names)


def test_the_largest_filter_is_answered(connection: Connection) -> None:
    many = " OR ".join(f"name = n{i}" for i in range(99)) + " OR name = scraper-eu"
    assert found(connection, many) == [1]
    deep = "NOT (" * 20 + "name = scraper-eu" + ")" * 20
    assert found(connection, deep) == [1]


# -- pages ---------------------------------------------------------------------------------


def pages(connection: Connection, keys: list[SortKey], size: int, *asked: str) -> list[list[int]]:
    """The ids of every page of a list."""
    found_pages, token = [], ""
    while True:
        one = page(size, token, *asked)
        rows = connection.execute(one.apply(select(THINGS), keys)).mappings().all()
        shown = rows[: one.size]
        found_pages.append([row["id"] for row in shown])
        last = [shown[-1][key.column.name] for key in keys] if shown else []
        token = one.next_token(rows, last)
        if not token:
            return found_pages


ID = SortKey(THINGS.c.id)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("column", ["id", "name", "score", "priority", "time", "severity"])
def test_pages_hold_every_row_once_in_order_and_those_without_a_value_last(
    connection: Connection, column: str, size: int, *, descending: bool
) -> None:
    order = THINGS.c[column].desc() if descending else THINGS.c[column]
    whole = list(connection.execute(select(THINGS.c.id).order_by(order.nulls_last())).scalars())
    keys = [SortKey(THINGS.c[column], descending=descending)]
    found_pages = pages(connection, [*keys, ID] if column != "id" else keys, size, "things")
    assert [id_ for one in found_pages for id_ in one] == whole
    assert all(len(one) == size for one in found_pages[:-1])
    assert found_pages[-1]


def test_ties_go_by_the_last_key(connection: Connection) -> None:
    with connection.begin_nested() as point:
        connection.execute(THINGS.update().values(score=1.5))
        connection.execute(THINGS.update().where(THINGS.c.id > 2).values(score=None))
        keys = [SortKey(THINGS.c.score, descending=True), ID]
        assert pages(connection, keys, 1, "things") == [[1], [2], [3], [4]]
        point.rollback()


def test_a_row_that_comes_between_two_pages_is_not_shown_twice(connection: Connection) -> None:
    with connection.begin_nested() as point:
        one = page(2, "", "things")
        rows = connection.execute(one.apply(select(THINGS), [ID])).mappings().all()
        token = one.next_token(rows, [rows[1]["id"]])
        connection.execute(insert(THINGS), [{"id": -1, "tags": [], "labels": {}}])
        two = page(2, token, "things")
        next_rows = connection.execute(two.apply(select(THINGS), [ID])).mappings().all()
        assert [row["id"] for row in next_rows] == [3, 4]
        point.rollback()


def token(*asked: str) -> str:
    return page(1, "", *asked).next_token([1, 2], [5])


def test_a_token_of_another_list_filter_or_order_is_refused() -> None:
    made = token("things", "score > 1", "name")
    assert page(1, made, "things", "score > 1", "name").after == [5]
    for other in (("things", "score > 2", "name"), ("things", "score > 1", "id"), ("other",)):
        with pytest.raises(PageTokenInvalid):
            page(1, made, *other)


def test_what_was_asked_cannot_be_shifted_between_its_parts() -> None:
    with pytest.raises(PageTokenInvalid):
        page(1, token("things", "a", "b"), "things", "a\0b", "")


def tampered(value: Any) -> str:
    raw = token("things")
    decoded = orjson.loads(base64.urlsafe_b64decode(raw + "=" * (-len(raw) % 4)))
    return base64.urlsafe_b64encode(orjson.dumps([decoded[0], value])).decode().rstrip("=")


@pytest.mark.parametrize(
    "bad",
    ["x", "!!!", "ä", "=", "bnVsbA", "W10", "e30", "A" * 8000, tampered(6), tampered("\0"),
     tampered({}), tampered(2**63)],
)  # fmt: skip
def test_a_damaged_token_is_refused(bad: str) -> None:
    with pytest.raises(PageTokenInvalid):
        page(1, bad, "things")


@given(st.text(max_size=60))
def test_no_text_but_a_token_is_a_token(bad: str) -> None:
    if bad:
        with pytest.raises(PageTokenInvalid):
            page(1, bad, "things")


def test_a_token_is_safe_in_a_url_and_short(connection: Connection) -> None:
    made = page(1, "", "things", "x" * 4096).next_token([1, 2], [NOON, "n" * 128])
    assert len(made) < 300
    assert set(made) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


def test_a_page_is_a_hundred_rows_unless_said_otherwise_and_a_thousand_at_most() -> None:
    assert page(0, "", "things").size == 100
    assert page(7, "", "things").size == 7
    assert page(10_000, "", "things").size == 1000
