"""Duplicates against brute force: every pair compared by hand."""

from __future__ import annotations

import random
import re
import tracemalloc
from itertools import combinations

import pytest

from tests.sizes import size
from tests.tune.planted import WORDS, good_row, repeated
from tests.tune.samples import message
from tune.data.clean import duplicates_to_drop
from tune.data.duplicates import SIMILAR_AT_LEAST, Fingerprints, signature
from tune.data.faults import RowFault, row_fault
from tune.data.formats import AnyRow, parse_object
from tune.data.preferences import check_preference_object
from tune.data.rows import TextRow, check_chat_object


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def similarity(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def varied_texts(number: int, seed: int) -> list[str]:
    """Texts of 60 words; each third one is an earlier one with some words changed, from one word to twenty."""
    random_ = random.Random(seed)
    texts: list[str] = []
    for index in range(number):
        if index % 3 == 2:
            words = random_.choice(texts).split()
            for _ in range(random_.choice((1, 1, 2, 3, 20))):
                words[random_.randrange(60)] = random_.choice(WORDS)
            texts.append(" ".join(words))
        else:
            texts.append(" ".join(random_.choice(WORDS) for _ in range(60)))
    return texts


def test_near_duplicates_are_those_of_a_comparison_of_all_pairs() -> None:
    texts = varied_texts(400, seed=3)
    clear: dict[int, bool] = {}
    for earlier, later in combinations(range(len(texts)), 2):
        similar = similarity(texts[earlier], texts[later])
        if similar == 1.0:
            continue
        if similar >= SIMILAR_AT_LEAST + 0.1:  # four standard deviations of an estimate from 128 hashes, or more
            clear[later] = True
        elif similar >= SIMILAR_AT_LEAST - 0.15 and later not in clear:
            clear[later] = False  # may be judged either way
    with Fingerprints() as prints:
        for line, text in enumerate(texts):
            prints.add(TextRow(line, text))
        found = prints.near_duplicates()
    surely = {later for later, is_clear in clear.items() if is_clear}
    assert len(surely) > 40
    assert surely <= found.keys() <= clear.keys() | surely
    assert all(similarity(texts[later], texts[earlier]) > SIMILAR_AT_LEAST - 0.15 for later, earlier in found.items())


def test_exact_duplicates_point_to_the_first_of_their_kind() -> None:
    with Fingerprints() as prints:
        for number in (0, 1, 0, 2, 1, 0):
            prints.add(TextRow(1, f"Tale {number}."))
        assert prints.exact_duplicates() == {2: 0, 4: 1, 5: 0}
        assert prints.near_duplicates() == {}


def test_a_group_of_many_near_copies_is_found_whole() -> None:
    random_ = random.Random(5)
    words = [random_.choice(WORDS) for _ in range(200)]
    with Fingerprints() as prints:
        for number in range(300):
            changed = words.copy()
            changed[number % 200] = f"word{number}"
            prints.add(TextRow(1, " ".join(changed)))
        assert len(prints.near_duplicates()) == 299


def test_weight_and_tools_make_a_row_another_one_but_not_the_order_of_keys() -> None:
    first = {"messages": [message("user", "Hi"), message("assistant", "Hello."), message("user", "And?")]}
    first["messages"].append(message("assistant", "Yes."))
    second = {"messages": [*first["messages"][:1], message("assistant", "Hello.", weight=0), *first["messages"][2:]]}
    third = {**first, "tools": [{"type": "function", "function": {"name": "f"}}]}
    fourth = {"messages": [{"content": m["content"], "role": m["role"]} for m in first["messages"]]}
    with Fingerprints() as prints:
        for row in (first, second, third, fourth):
            prints.add(check_chat_object(row, 1))
        assert prints.exact_duplicates() == {3: 0}


def test_the_same_chat_in_another_format_is_a_duplicate() -> None:
    rows: list[AnyRow] = [
        parse_object({"prompt": "Hi", "completion": "Hello."}, 1, "prompt-completion"),
        parse_object({"instruction": "Hi", "output": "Hello."}, 1, "alpaca"),
    ]
    with Fingerprints() as prints:
        for row in rows:
            prints.add(row)
        assert prints.exact_duplicates() == {1: 0}


def test_short_rows_are_not_compared_nearly() -> None:
    assert signature(TextRow(1, "The door is red and not blue.")) is None
    assert signature(TextRow(1, "One two three four five six seven eight.")) is not None


def test_preference_rows_that_differ_in_one_answer_are_not_exact_duplicates() -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": answer} for answer in ("c", "d", "c")]
    with Fingerprints() as prints:
        for row in rows:
            prints.add(check_preference_object(row, 1))
        assert prints.exact_duplicates() == {2: 0}


@pytest.mark.parametrize(("drop", "dropped"), [("exact", {2: "exact_duplicate"}), ("near", None)])
def test_duplicates_are_dropped_over_all_files_and_the_first_stays(drop: str, dropped: dict[int, str] | None) -> None:
    random_ = random.Random(9)
    one, two = good_row(random_), good_row(random_)
    files = [
        [check_chat_object(row, n + 1) for n, row in enumerate(rows)]
        for rows in ([one, two, one], [repeated(two, "near"), two, good_row(random_)])
    ]
    pairs: list[list[tuple[int, AnyRow | RowFault]]] = [[(row.line, row) for row in rows] for rows in files]
    first, second = duplicates_to_drop(pairs, "exact" if drop == "exact" else "near")
    assert first == {2: "exact_duplicate"}
    assert second == {1: "exact_duplicate"} | ({} if dropped is not None else {0: "near_duplicate"})


def test_a_faulty_row_stops_the_search_for_duplicates() -> None:
    with pytest.raises(RowFault, match="line 3: broken"):
        duplicates_to_drop([[(3, row_fault(3, "broken", "broken_json"))]], "exact")


def peak_bytes_of_a_search(rows: int) -> int:
    """What Python and numpy held at once, while prints of ``rows`` different rows were added and searched."""
    tracemalloc.start()
    with Fingerprints() as prints:
        for number in range(rows):
            prints.add_print(number, number.to_bytes(4, "little") * 128)
        assert prints.exact_duplicates() == {} == prints.near_duplicates()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_row_more_costs_an_index_of_it_and_no_more() -> None:
    few, many = size(55_000, 200_000), size(110_000, 1_000_000)
    grown = peak_bytes_of_a_search(many) - peak_bytes_of_a_search(few)
    assert grown / (many - few) < 150
