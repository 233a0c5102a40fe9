"""Aliases: flips, history, rollback, canaries, and what they keep from being removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from registry import Artifact, CanaryRequest, Registry, Seen
from registry.errors import (
    ConflictError,
    InvalidArtifactError,
    InvalidNameError,
    InvalidRequestError,
    ModelNotFoundError,
)
from tests.registry.samples import draft

CAPO_0_1_ALIAS = {"alias", "revision", "digest", "history", "write_once", "updated_at"}
"""The fields of an alias file before there were canaries; that reader refused any other."""


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> Registry:
    return Registry(tmp_path / "registry", clock=clock)


def _publish(registry: Registry, content: str, *, name: str = "support", **options: Any) -> Artifact:
    with registry.stage() as staging:
        (staging / "model.safetensors").write_text(content)
        return registry.publish(staging, draft(name), **options)


def _document(registry: Registry, alias: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((registry.root / "aliases" / f"{alias}.json").read_text())
    return document


def test_an_alias_flips_only_from_the_expected_revision(registry: Registry) -> None:
    first, second = _publish(registry, "one"), _publish(registry, "two")
    with pytest.raises(ConflictError, match="is not set"):
        registry.set_alias("prod", first.revision, expected=second.revision)
    registry.set_alias("prod", first.revision)
    with pytest.raises(ConflictError, match="points to"):
        registry.set_alias("prod", second.revision, expected=second.revision)
    assert registry.set_alias("prod", second.revision, expected=first.revision).revision == second.revision
    with pytest.raises(InvalidNameError, match="revision"):
        registry.set_alias("prod", first.revision, expected="prod")


def test_an_alias_keeps_20_earlier_revisions_and_rolls_back_through_those_that_exist(registry: Registry) -> None:
    artifacts = [_publish(registry, str(index), alias="prod") for index in range(25)]
    history = [entry.revision for entry in registry.alias("prod").history]
    assert history == [artifact.revision for artifact in artifacts[4:24]]
    registry.remove(artifacts[23].revision)
    assert registry.rollback_alias("prod").revision == artifacts[22].revision
    assert registry.rollback_alias("prod").revision == artifacts[21].revision
    assert len(registry.alias("prod").history) == 17


def test_a_rollback_with_nothing_to_go_back_to_is_a_conflict(registry: Registry) -> None:
    artifact = _publish(registry, "one", alias="prod")
    registry.set_alias("prod", artifact.revision)
    with pytest.raises(ConflictError, match="no earlier revision"):
        registry.rollback_alias("prod")


def test_a_removed_alias_is_gone_and_its_artifact_stays(registry: Registry) -> None:
    artifact = _publish(registry, "one", alias="prod")
    registry.remove_alias("prod")
    with pytest.raises(ModelNotFoundError):
        registry.resolve("prod")
    with pytest.raises(ModelNotFoundError):
        registry.remove_alias("prod")
    assert registry.artifacts() == [artifact]


def test_an_alias_runs_a_canary_until_it_is_set_without_one(registry: Registry) -> None:
    first, second = _publish(registry, "one", alias="prod"), _publish(registry, "two")
    running = registry.set_alias("prod", first.revision, canary=CanaryRequest(f"support@{second.digest[:9]}", 10))
    assert running.canary is not None
    assert (running.revision, running.canary.revision, running.canary.percent) == (first.revision, second.revision, 10)
    assert registry.alias("prod") == running
    assert registry.resolve("prod") == first
    assert running.history == [], "a canary is no flip"
    assert registry.set_alias("prod", first.revision).canary is None


def test_a_canary_becomes_the_main_revision_by_setting_the_alias_to_it(registry: Registry) -> None:
    first, second = _publish(registry, "one", alias="prod"), _publish(registry, "two")
    registry.set_alias("prod", first.revision, canary=CanaryRequest(second.revision, 99))
    promoted = registry.set_alias("prod", second.revision, expected=first.revision)
    assert (promoted.revision, promoted.canary) == (second.revision, None)
    assert [entry.revision for entry in promoted.history] == [first.revision]
    assert promoted.ended_canaries == [], "it did not end, it won"


def test_a_rollback_ends_the_canary_first_and_then_goes_back(registry: Registry) -> None:
    one, two, three = (_publish(registry, text, alias="prod") for text in ("one", "two", "three"))
    registry.set_alias("prod", two.revision, canary=CanaryRequest(three.revision, 5))
    ended = registry.rollback_alias("prod")
    assert (ended.revision, ended.canary) == (two.revision, None)
    assert registry.rollback_alias("prod").revision == three.revision
    assert registry.rollback_alias("prod").revision == two.revision
    assert registry.rollback_alias("prod").revision == one.revision


@pytest.mark.parametrize("percent", [-1, 0, 100, 1000])
def test_a_canary_takes_1_to_99_percent(percent: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"1 to 99 percent.*got {percent}"):
        CanaryRequest("support@3f9c0a7b", percent)


def test_a_canary_that_makes_no_sense_is_refused_and_changes_nothing(registry: Registry) -> None:
    ft = "ft:tiny:acme::a1"
    first, second = _publish(registry, "one", alias="prod", fine_tuned_name=ft), _publish(registry, "two")
    before = _document(registry, "prod")
    with pytest.raises(InvalidRequestError, match="two different revisions"):
        registry.set_alias("prod", first.revision, canary=CanaryRequest(first.revision, 10))
    with pytest.raises(InvalidRequestError, match="write-once"):
        registry.set_alias(ft, first.revision, canary=CanaryRequest(second.revision, 10))
    with pytest.raises(ModelNotFoundError):
        registry.set_alias("prod", first.revision, canary=CanaryRequest("support@00000000", 10))
    with pytest.raises(InvalidNameError, match="not a revision"):
        registry.set_alias("prod", first.revision, canary=CanaryRequest("prod", 10))
    with pytest.raises(ConflictError, match="points to"):
        registry.set_alias("prod", first.revision, canary=CanaryRequest(second.revision, 1), expected=second.revision)
    assert _document(registry, "prod") == before


def test_checking_a_flip_says_what_setting_would_and_writes_nothing(registry: Registry) -> None:
    first, second = _publish(registry, "one", alias="prod"), _publish(registry, "two")
    before, token = _document(registry, "prod"), registry.change_token()
    assert registry.check_alias("prod", second.revision).artifacts == [second]
    checked = registry.check_alias("new", first.revision, canary=CanaryRequest(second.revision, 1))
    assert (checked.artifacts, checked.seen.alias) == ([first, second], None)
    with pytest.raises(ConflictError, match="points to"):
        registry.check_alias("prod", second.revision, expected=second.revision)
    with pytest.raises(InvalidNameError):
        registry.check_alias("Prod", second.revision)
    assert (_document(registry, "prod"), registry.change_token()) == (before, token)


def test_a_flip_that_was_decided_upon_an_older_state_changes_nothing(registry: Registry) -> None:
    first, second, third = _publish(registry, "one", alias="prod"), _publish(registry, "two"), _publish(registry, "3")
    absent, seen = registry.check_alias("new", first.revision).seen, registry.check_alias("prod", second.revision).seen
    registry.set_alias("prod", third.revision)
    registry.set_alias("new", third.revision)
    for alias, decided in (("prod", seen), ("new", absent)):
        with pytest.raises(ConflictError, match="look again") as caught:
            registry.set_alias(alias, second.revision, seen=decided)
        assert caught.value.code == "alias_changed"
        assert registry.resolve(alias) == third
        assert registry.set_alias(alias, third.revision, seen=decided).revision == third.revision, "it is so already"
    registry.set_alias("prod", third.revision, canary=CanaryRequest(first.revision, 10))
    with pytest.raises(ConflictError):
        registry.set_alias("prod", second.revision, seen=Seen(registry.alias("new")))


def test_a_rollback_passes_over_what_the_alias_serves_already(registry: Registry) -> None:
    first, second = _publish(registry, "one", alias="prod"), _publish(registry, "two", alias="prod")
    third = _publish(registry, "three", alias="prod")
    registry.set_alias("prod", first.revision)
    registry.set_alias("prod", third.revision)
    registry.remove(second.revision)
    registry.set_alias("prod", first.revision)
    registry.remove(third.revision)
    with pytest.raises(ConflictError, match="no earlier revision"):
        registry.rollback_alias("prod")
    assert registry.resolve("prod") == first


def test_a_name_goes_with_what_it_meant_or_not_at_all(registry: Registry) -> None:
    ours = _publish(registry, "one", alias="prod")
    kept = _publish(registry, "two", alias="front")
    damaged = registry.root / "aliases" / "elses.json"
    damaged.write_text("{")
    with pytest.raises(ConflictError, match="cannot be read") as caught:
        registry.remove_named("prod")
    assert "elses" not in caught.value.message, "which is another's"
    assert registry.resolve("prod") == ours
    damaged.unlink()
    registry.remove_named("prod")
    registry.remove_named("front", keep=kept.revision)
    assert (registry.artifacts(), registry.aliases()) == ([kept], [])


def test_alias_files_without_a_canary_are_those_of_before_in_both_directions(registry: Registry) -> None:
    first, second = _publish(registry, "one", alias="prod"), _publish(registry, "two")
    assert set(_document(registry, "prod")) == CAPO_0_1_ALIAS, "an older Capo reads it"
    registry.set_alias("prod", first.revision, canary=CanaryRequest(second.revision, 10))
    assert set(_document(registry, "prod")) == CAPO_0_1_ALIAS | {"canary"}
    old = {"alias": "old", "revision": first.revision, "digest": first.digest, "history": []}
    path = registry.root / "aliases" / "old.json"
    path.write_text(json.dumps(old | {"write_once": False, "updated_at": 5}))
    assert registry.alias("old").canary is None
    assert registry.resolve("old") == first


@pytest.mark.parametrize(
    "canary",
    [
        {"percent": 0},
        {"percent": 100},
        {"digest": "0" * 64},
        {"revision": "prod"},
        {"note": "hello"},
    ],
)
def test_an_alias_file_with_a_damaged_canary_is_damaged(registry: Registry, canary: dict[str, Any]) -> None:
    first, second = _publish(registry, "one", alias="prod"), _publish(registry, "two")
    registry.set_alias("prod", first.revision, canary=CanaryRequest(second.revision, 10))
    document = _document(registry, "prod")
    document["canary"] |= canary
    (registry.root / "aliases" / "prod.json").write_text(json.dumps(document))
    with pytest.raises(InvalidArtifactError, match="damaged"):
        registry.alias("prod")


def test_a_canary_protects_its_artifact_and_ends_when_that_is_forced_out(registry: Registry) -> None:
    first, second = _publish(registry, "one", alias="prod"), _publish(registry, "two")
    registry.set_alias("prod", first.revision, canary=CanaryRequest(second.revision, 10))
    with pytest.raises(ConflictError, match="in use by prod"):
        registry.remove(second.revision)
    assert registry.gc(keep_unaliased=0, min_age_seconds=0).removed_revisions == ()
    registry.remove(second.revision, force=True)
    assert registry.artifacts() == [first]
    assert registry.alias("prod").canary is None
    assert registry.resolve("prod") == first


def test_gc_spares_a_canary_for_a_while_after_its_end(registry: Registry, clock: Clock) -> None:
    first, second = _publish(registry, "one", alias="prod"), _publish(registry, "two")
    registry.set_alias("prod", first.revision, canary=CanaryRequest(second.revision, 10))
    clock.now += 10_000
    registry.rollback_alias("prod")
    clock.now += 3000
    assert registry.gc(keep_unaliased=0, min_age_seconds=3600).removed_revisions == ()
    clock.now += 1000
    assert registry.gc(keep_unaliased=0, min_age_seconds=3600).removed_revisions == (second.revision,)


class AliasMachine(RuleBasedStateMachine):
    """The registry against a model of one alias in ten lines."""

    def __init__(self) -> None:
        super().__init__()
        self.main: int | None = None
        self.canary: tuple[int, int] | None = None
        self.history: list[int] = []

    @initialize()
    def open(self) -> None:
        import tempfile

        self.directory = tempfile.TemporaryDirectory()
        self.registry = Registry(Path(self.directory.name) / "registry")
        self.artifacts = [_publish(self.registry, str(number)) for number in range(3)]

    @rule(main=st.integers(0, 2), canary=st.none() | st.tuples(st.integers(0, 2), st.integers(1, 99)))
    def set_alias(self, main: int, canary: tuple[int, int] | None) -> None:
        request = None if canary is None else CanaryRequest(self.artifacts[canary[0]].revision, canary[1])
        if canary is not None and canary[0] == main:
            with pytest.raises(InvalidRequestError):
                self.registry.set_alias("prod", self.artifacts[main].revision, canary=request)
            return
        self.registry.set_alias("prod", self.artifacts[main].revision, canary=request)
        if self.main not in (None, main):
            self.history = [*self.history, self.main][-20:]  # type: ignore[list-item]
        self.main, self.canary = main, canary

    @rule()
    def roll_back(self) -> None:
        if self.canary is not None:
            self.registry.rollback_alias("prod")
            self.canary = None
        elif self.history:
            self.registry.rollback_alias("prod")
            self.main = self.history.pop()
        else:
            with pytest.raises((ConflictError, ModelNotFoundError)):
                self.registry.rollback_alias("prod")

    @rule()
    def remove(self) -> None:
        if self.main is not None:
            self.registry.remove_alias("prod")
            self.main, self.canary, self.history = None, None, []

    @rule()
    def collect_garbage(self) -> None:
        if self.main is not None and len({self.main, *self.history, *(self.canary or ())[:1]}) == 3:
            self.registry.gc(keep_unaliased=0, min_age_seconds=3600)

    @invariant()
    def the_alias_is_what_the_model_says(self) -> None:
        if not hasattr(self, "registry"):
            return
        assert [a.alias for a in self.registry.aliases()] == ([] if self.main is None else ["prod"])
        if self.main is None:
            return
        alias = Registry(self.registry.root, read_only=True).alias("prod")
        assert alias.revision == self.artifacts[self.main].revision
        assert [entry.revision for entry in alias.history] == [self.artifacts[n].revision for n in self.history]
        seen = None if alias.canary is None else (alias.canary.revision, alias.canary.percent)
        assert seen == (None if self.canary is None else (self.artifacts[self.canary[0]].revision, self.canary[1]))

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            self.directory.cleanup()


TestAliasMachine = AliasMachine.TestCase
TestAliasMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
