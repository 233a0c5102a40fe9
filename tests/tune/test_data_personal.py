"""Personal data: what is found, what only looks like it, and what remains after redaction."""

from __future__ import annotations

import time

import pytest

from tests.tune.samples import message
from tune.data.clean import redacted_row
from tune.data.personal import find_personal_data, redact
from tune.data.rows import ChatRow, TextRow, check_chat_object

FOUND = {
    "jo.miller+news@mail.example.co.uk": "email",
    "+44 20 7946 0958": "phone",
    "+49 (0)30 901820": "phone",
    "(212) 555-0187": "phone",
    "212-555-0187": "phone",
    "4111 1111 1111 1111": "card",
    "5500-0000-0000-0004": "card",
    "378282246310005": "card",
    "GB82 WEST 1234 5698 7654 32": "iban",
    "DE89370400440532013000": "iban",
    "536-90-4399": "ssn",
    "8.8.8.8": "ip_address",
    "2001:4860:4860::8888": "ip_address",
}
LOOKS_LIKE = {
    "a card whose check digit is wrong": "4111 1111 1111 1112",
    "an order number": "1234-5678-9012-3456",
    "an account whose check digits are wrong": "GB83 WEST 1234 5698 7654 32",
    "a number of no country": "+999 123 456 789",
    "a number of no place": "(000) 555-0187",
    "an area that was never assigned": "000-12-3456",
    "a private address": "192.168.0.1",
    "a loopback address": "::1",
    "a version": "1.2.3.4.5",
    "no address": "300.1.1.1",
    "a time": "12:30:45",
    "a handle": "@jo_miller",
    "a year and a price": "In 2026 it cost 1,234,567.89",
    "a date": "2026-11-21",
    "code": "a[1:10:2] == b::c",
}


@pytest.mark.parametrize("text", FOUND)
@pytest.mark.parametrize("frame", ["{}", "It is {}, he said.", "({})", "a\n{}\nb"])
def test_what_is_personal_is_found_where_it_stands(text: str, frame: str) -> None:
    whole = frame.format(text)
    (one,) = find_personal_data(whole)
    assert (one.kind, whole[one.start : one.end]) == (FOUND[text], text)


@pytest.mark.parametrize("what", LOOKS_LIKE)
def test_what_only_looks_like_it_is_left_alone(what: str) -> None:
    text = f"See {LOOKS_LIKE[what]} there."
    assert find_personal_data(text) == []
    assert redact(text) == text


def test_a_text_full_of_addresses_is_searched_in_time_that_grows_with_its_length() -> None:
    """Comparing every finding with every other takes more than ten seconds here."""
    text = " ".join(f"a{number}@b.com" for number in range(20_000))
    started = time.process_time()
    assert len(find_personal_data(text)) == 20_000
    assert time.process_time() - started < 3.0


def test_redaction_leaves_nothing_to_find_and_the_rest_as_it_was() -> None:
    text = " and ".join(FOUND)
    clean = redact(text)
    assert find_personal_data(clean) == []
    assert clean == " and ".join(f"[{kind.upper()}]" for kind in FOUND.values())


def test_every_text_of_a_row_is_redacted_and_its_ids_are_not() -> None:
    call = {
        "id": "212-555-0187",
        "type": "function",
        "function": {"name": "send", "arguments": '{"to": ["jo@example.org"], "copies": 2}'},
    }
    row = check_chat_object(
        {
            "messages": [
                message("system", "You know jo@example.org."),
                message("user", "Write to jo@example.org."),
                {"role": "assistant", "content": "Writing.", "tool_calls": [call]},
                {"role": "tool", "content": "sent to jo@example.org", "tool_call_id": "212-555-0187"},
                message("assistant", "Sent to jo@example.org."),
            ]
        },
        1,
    )
    clean = redacted_row(row)
    assert isinstance(clean, ChatRow)
    assert "jo@example.org" not in str(clean.messages)
    assert str(clean.messages).count("[EMAIL]") == 5
    assert clean.messages[2]["tool_calls"][0]["function"]["arguments"] == {"to": ["[EMAIL]"], "copies": 2}
    assert clean.messages[3]["tool_call_id"] == clean.messages[2]["tool_calls"][0]["id"] == "212-555-0187"
    assert row.messages[1]["content"] == "Write to jo@example.org.", "the given row is not changed"


def test_a_row_without_personal_data_stays_equal() -> None:
    row = TextRow(1, "A tale of 3 hats.")
    assert redacted_row(row) == row
