"""Names and references: what is allowed, and 300 texts that are not."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import AliasName, FineTunedName, Registry, RevisionReference, check_name, parse_reference
from registry.errors import InvalidNameError
from registry.names import RESERVED_NAMES, alias_file_stem, parse_alias

ALLOWED = set(string.ascii_lowercase + string.digits + "._-")


def _hostile_names() -> list[str]:
    names = ["", " ", ".", "..", "...", "/", "\\", "~", "-", "_", "a/../b", "a..b", "a.", "support ", " support"]
    names += ["../" * depth + "etc/passwd" for depth in range(1, 11)]
    names += ["..\\" * depth + "windows" for depth in range(1, 11)]
    names += ["%2e%2e/x", "%2e%2e%2fx", "..%2f", "..%5c", "%00", "a%00", "%252e%252e", "..%c0%af", "..;/x", "x/.."]
    names += [f"support{char}" for char in map(chr, range(0x21)) if char not in ALLOWED]
    names += [f"{char}support" for char in map(chr, range(0x21))]
    names += [f"sup{char}port" for char in string.punctuation if char not in "._-@"]
    names += ["Support", "SUPPORT", "supporT", "CON", "NUL", "COM1", "Aux", "İ", "ı", "ſupport", "K", "Å"]
    names += ["sup\u200bport", "\u202esupport", "support\u202c", "\ufeffsupport", "sup\u00adport", "supp\u0308ort"]
    names += [
        "ѕupport",
        "suррort",
        "ｓｕｐｐｏｒｔ",
        "𝓼upport",
        "①",
        "٣",
        "१",
        "ﬁle",
        "naïve",
        "nai\u0308ve",
        "日本",
        "😀",
    ]
    names += ["a" * length for length in (65, 66, 100, 255, 256, 4096, 100_000)]
    names += [
        "\ud800",
        "a\udfff",
        "a\x7f",
        "a\x80",
        "a\u2028",
        "a\u2029",
        "a\x85b",
        "support\n",
        "support\r\n",
        "\nsupport",
    ]
    names += [
        "/etc/passwd",
        "C:\\x",
        "file:///etc",
        "http://x",
        "//x",
        "a//b",
        "a/b",
        "./a",
        "a/.",
        "~root",
        "$HOME",
        "`id`",
    ]
    names += [
        "a;b",
        "a|b",
        "a&b",
        "$(id)",
        "{a}",
        "*",
        "?",
        "a b",
        "'a'",
        '"a"',
        "<a>",
        "a=b",
        "a,b",
        "a+b",
        "a!b",
        "a^b",
    ]
    names += sorted(RESERVED_NAMES)
    names += ["support@", "@3f9c0a7b", "support@3f9c0a7", "support@" + "a" * 65, "support@3F9C0A7B", "support@xyzxyzxy"]
    names += ["support@3f9c0a7b@3f9c0a7b", "support@3f9c0a7b\n", "support@../../../x", "support@ 3f9c0a7b", "a@b@c"]
    names += ["text@3f9c0a7b", "../x@3f9c0a7b", "Support@3f9c0a7b", "support@３f9c0a7b", "support@3f9c0a7b/x"]
    names += ["ft:", "ft::", "ft:a", "ft:a:b", "ft:a:b:c", "ft::::", "ft:a:b::", "ft:a::c:d", "ft::b:c:d", "FT:a:b:c:d"]
    names += ["ft:a:b:c:d:e", "ft:a:b:c:d:ckpt-step-", "ft:a:b:c:d:ckpt-step-01", "ft:a:b:c:d:ckpt-step--1"]
    names += ["ft:a:b:c:d:ckpt-step-1:x", "ft:a:b:c:d:ckpt-step-9999999999", "ft:../x:b:c:d", "ft:a/../b:b:c:d"]
    names += [
        "ft:a:../b:c:d",
        "ft:a:b:../c:d",
        "ft:a:b:c:../d",
        "ft:a:B:c:d",
        "ft:a:b:C:d",
        "ft:a:b:c:d ",
        "ft:a:b:c:é",
    ]
    names += [
        "ft:a/b/c:b:c:d",
        "ft:/a:b:c:d",
        "ft:a/:b:c:d",
        "ft:a:b:c:d\n",
        "ft:a:b:c:" + "d" * 65,
        "ft:" + "a" * 300 + ":b:c:d",
    ]
    names += [f"ft:a:b:c{char}:d" for char in string.whitespace + "/\\%\0"]
    names += [f"support{chr(code)}" for code in range(0x80, 0xC0)]  # C1 controls and Latin-1 signs
    return list(dict.fromkeys(names))


HOSTILE_NAMES = _hostile_names()


def test_the_corpus_has_300_names() -> None:
    assert len(HOSTILE_NAMES) >= 300


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_a_hostile_name_is_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(InvalidNameError) as caught:
        parse_reference(name)
    message = caught.value.message
    assert "llowed" in message or "reserved" in message
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 600


def test_hostile_names_write_nothing_wherever_a_name_is_taken(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    before = sorted(tmp_path.rglob("*"))
    for name in HOSTILE_NAMES:
        for call in (
            registry.resolve,
            registry.verify,
            registry.alias,
            registry.rollback_alias,
            registry.remove_alias,
            registry.remove,
            registry.artifacts,
            lambda text: registry.set_alias(text, "support@3f9c0a7b21d4e865"),
            lambda text: registry.set_alias("support", text),
            lambda text: registry.artifact(text, "0" * 64),
            lambda text: registry.import_adapter(tmp_path, name=text, base_model=None),
        ):
            with pytest.raises(InvalidNameError):
                call(name)
    assert sorted(tmp_path.rglob("*")) == before


@given(st.text(max_size=70) | st.text(alphabet=sorted(ALLOWED), max_size=70))
def test_a_text_is_a_name_exactly_when_every_character_is_allowed(text: str) -> None:
    allowed = (
        1 <= len(text) <= 64
        and set(text) <= ALLOWED
        and text[0] not in "._-"
        and text[-1] != "."
        and ".." not in text
        and text not in RESERVED_NAMES
    )
    if allowed:
        assert check_name(text) is text
        assert (Path("/registry/artifacts") / text).resolve().parent == Path("/registry/artifacts")
    else:
        with pytest.raises(InvalidNameError):
            check_name(text)


@given(
    st.text(max_size=120)
    | st.from_regex(r"ft:[a-zA-Z/@.]{1,9}:[a-z.]{1,5}:[a-z]{0,4}:[A-Za-z0-9]{1,9}(:ckpt-step-[0-9]{1,4})?")
)
def test_what_is_parsed_reads_back_as_the_same_text(text: str) -> None:
    try:
        reference = parse_reference(text)
    except InvalidNameError:
        return
    assert reference.text == text


@given(st.lists(st.from_regex(r"\A[a-zA-Z0-9][a-zA-Z0-9./]{0,6}\Z"), min_size=2, max_size=2, unique=True))
def test_two_aliases_never_share_a_file_even_where_case_is_ignored(bases: list[str]) -> None:
    stems: list[str] = []
    for base in bases:
        try:
            alias = parse_alias(f"ft:{base}:acme::a1")
        except InvalidNameError:
            return
        stems.append(alias_file_stem(alias).casefold())
    assert stems[0] != stems[1]


def test_references_are_told_apart() -> None:
    assert parse_reference("support") == AliasName("support")
    assert parse_reference("support@3f9c0a7b") == RevisionReference("support", "3f9c0a7b")
    assert parse_reference("ft:capo-tiny:acme:support:a1B2") == FineTunedName("capo-tiny", "acme", "support", "a1B2")
    assert parse_reference("ft:Qwen/Qwen3-0.6B:acme::a1:ckpt-step-200") == FineTunedName(
        "Qwen/Qwen3-0.6B", "acme", "", "a1", 200
    )
    assert parse_reference("ft:merged@3f9c0a7b:acme::a1").text == "ft:merged@3f9c0a7b:acme::a1"


def test_a_caller_may_reserve_more_names() -> None:
    with pytest.raises(InvalidNameError, match="reserved"):
        check_name("capo-tiny", reserved={"capo-tiny"})


def test_a_name_that_cannot_be_stored_is_refused_before_anything_is_written() -> None:
    with pytest.raises(InvalidNameError, match="too long to store"):
        alias_file_stem(parse_alias(f"ft:{'A' * 90}:acme::a1"))
