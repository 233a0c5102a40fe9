"""What an adapter must pass before the engine sees it, and before traffic sees it.

First on the CPU, without the engine: every byte against the manifest, the file checks of
:mod:`registry.adapter_files`, the base it was made for, and what this engine can hold. Then, once loaded, the
manifest's probes are replayed. vLLM itself accepts most wrong adapters in silence and serves garbage.
"""

from __future__ import annotations

import asyncio
import copy
import time
from dataclasses import dataclass
from pathlib import Path

from registry import Artifact, BaseModel, Registry, errors
from registry.adapter_files import check_adapter
from registry.durable import storage_errors
from registry.manifest import MANIFEST_NAME
from serve.engine_api import Engine, EngineAdapter, EngineLimits
from serve.engine_arguments import LORA_RANKS

_MAX_PROBES = 64
"""Training writes four (:mod:`tune.probes`)."""


_LEAST_SHARE_ON_QUANTIZED = 0.5
"""Of probe tokens, where the base is a quantised copy: a clear token may turn there, and the rest of its answer with
it. Weights that are not the trained ones agree on next to none."""

_DAMAGE_SECONDS = 60.0
"""Files that look as they did when they were found damaged are not read again for so long. Not for ever, because some
repairs do not show there: a file taken away that the manifest does not name, or bytes put back with their old time."""


class Gate:
    """Checks adapters for one base model. ``registry`` is where the bytes are verified."""

    def __init__(self, registry: Registry, base_model: BaseModel) -> None:
        self._registry = registry
        self._base_model = base_model
        self._passed: dict[str, _FileStates] = {}
        """By revision: the files as they were when they passed."""
        self._damage: dict[str, _Damage] = {}
        self._notes: dict[str, tuple[str, ...]] = {}

    async def check(self, artifact: Artifact, limits: EngineLimits) -> None:
        """Refuse what this engine cannot or must not serve. Reads every byte in a thread: once per revision, and again
        when somebody has touched its files since; of one that is damaged, also after a minute.

        Raises:
            InvalidArtifactError: with a stable ``code``.
            ModelNotFoundError: it was deleted meanwhile.
        """
        states = await asyncio.to_thread(_file_states, artifact)
        if self._passed.get(artifact.revision) == states:
            return
        damage = self._damage.get(artifact.revision)
        if damage is not None and damage.holds_for(states):
            await self.require_there(artifact)
            raise copy.copy(damage.error)
        try:
            self._notes[artifact.revision] = await asyncio.to_thread(self._read, artifact, limits)
        except errors.StorageError:
            await self.require_there(artifact)
            raise
        except errors.InvalidArtifactError as error:
            await self.require_there(artifact)
            if error.code == "damaged":
                self._damage[artifact.revision] = _Damage(states, copy.copy(error), time.monotonic())
            raise
        self._damage.pop(artifact.revision, None)
        if None not in states:
            self._passed[artifact.revision] = states

    async def require_there(self, artifact: Artifact) -> None:
        """To be asked after a refusal or a failure: of an adapter whose files have gone meanwhile it says nothing.

        Raises:
            ModelNotFoundError: they have.
        """
        if not await asyncio.to_thread(artifact.path.exists):
            raise deleted(artifact)

    def notes(self, revision: str) -> tuple[str, ...]:
        """What could not be checked of an adapter that passed, one sentence each."""
        return self._notes.get(revision, ())

    def forget(self, revision: str) -> None:
        """The registry no longer has ``revision``."""
        self._passed.pop(revision, None)
        self._damage.pop(revision, None)
        self._notes.pop(revision, None)

    def _read(self, artifact: Artifact, limits: EngineLimits) -> tuple[str, ...]:
        with storage_errors(f"read {artifact.revision}"):  # it may be deleted between two of the checks
            return self._check(artifact, limits)

    def _check(self, artifact: Artifact, limits: EngineLimits) -> tuple[str, ...]:
        """The checks; returns the notes."""
        manifest = artifact.manifest
        if manifest.kind != "lora" or manifest.lora is None:
            raise errors.InvalidArtifactError(
                f"{artifact.revision} is a {manifest.kind} model, not an adapter. Serve it with "
                f"`capo serve --model {artifact.revision}`.",
                code="not_an_adapter",
            )
        trained_for = manifest.base_model.fingerprint
        if trained_for is not None and not self._base_model.takes_adapters_of(trained_for):
            raise errors.InvalidArtifactError(
                f"{artifact.revision} was made for another base model ({manifest.base_model.id}, fingerprint "
                f"{trained_for[:16]}); this service runs {self._base_model.id} "
                f"({str(self._base_model.identity.fingerprint)[:16]}). Serve it with its own base.",
                code="base_mismatch",
            )
        if manifest.lora.rank > limits.max_lora_rank:
            raise errors.InvalidArtifactError(
                f"{artifact.revision} has rank {manifest.lora.rank}; this engine holds {limits.max_lora_rank}. "
                f"Start the service with -- --max-lora-rank {_allowed_rank(manifest.lora.rank)}.",
                code="rank_too_large",
            )
        problems = self._registry.verify(f"{artifact.name}@{artifact.digest}")
        if problems:
            raise errors.InvalidArtifactError(
                f"{artifact.revision} is damaged on disk: {'; '.join(problems)}. Publish it again.",
                code="damaged",
            )
        report = check_adapter(artifact.path, base_model=self._base_model, max_rank=limits.max_lora_rank)
        if report.rank != manifest.lora.rank:
            raise errors.InvalidArtifactError(
                f"{artifact.revision} has rank {report.rank}, its manifest says {manifest.lora.rank}. "
                "Publish it again.",
                code="manifest_mismatch",
            )
        _check_probes(artifact, limits)
        return report.notes

    async def probe(self, artifact: Artifact, engine: Engine, adapter: EngineAdapter) -> float | None:
        """Replay the manifest's probes on the loaded adapter; returns the share of their tokens that agree.

        A probe ends before the first near tie (:mod:`tune.probes`), so a sound engine agrees on every token in any
        dtype; over a quantised copy of the base, on half of them at least. ``None``: the artifact has no probes
        (imported ones do not).

        Raises:
            InvalidArtifactError: fewer agree. The weights that answer are not the ones that were trained.
        """
        probes = artifact.manifest.probes
        total = sum(len(probe.completion_token_ids) for probe in probes)
        if not total:
            return None
        # All of them end before the adapter may be unloaded again, also when one fails.
        answers = await asyncio.gather(
            *(
                engine.generate_greedy(
                    probe.prompt_token_ids, max_tokens=len(probe.completion_token_ids), adapter=adapter
                )
                for probe in probes
            ),
            return_exceptions=True,
        )
        for answer in answers:
            if isinstance(answer, errors.InvalidRequestError):
                raise errors.InvalidArtifactError(
                    f"{artifact.revision} has a probe that this engine cannot take: {answer.message}",
                    code="probe_refused",
                ) from answer
            if isinstance(answer, BaseException):
                raise answer
        agreeing = sum(
            given == expected
            for probe, answer in zip(probes, answers, strict=True)
            if not isinstance(answer, BaseException)
            for given, expected in zip(answer, probe.completion_token_ids, strict=False)
        )
        share = agreeing / total
        if share < (_LEAST_SHARE_ON_QUANTIZED if self._base_model.quantized_from is not None else 1.0):
            raise errors.InvalidArtifactError(
                f"{artifact.revision} answers {total - agreeing} of {total} probe tokens unlike its training did. "
                "Check that the base model and its dtype are those it was trained with.",
                code="probe_mismatch",
            )
        return share


def deleted(artifact: Artifact) -> errors.ModelNotFoundError:
    """For who waited for it when that happened."""
    return errors.ModelNotFoundError(
        f"The model {artifact.revision!r} was deleted. GET /v1/models lists what there is.", param="model"
    )


def _check_probes(artifact: Artifact, limits: EngineLimits) -> None:
    """What the engine would choke on, or be kept busy with for long, is refused before it is asked."""
    probes = artifact.manifest.probes
    if len(probes) > _MAX_PROBES:
        raise _probe_refused(artifact, f"{len(probes)} probes, at most {_MAX_PROBES} are replayed")
    for probe in probes:
        prompt, completion = probe.prompt_token_ids, probe.completion_token_ids
        if not prompt or len(prompt) + len(completion) > limits.max_model_len:
            raise _probe_refused(
                artifact,
                f"a probe of {len(prompt)} and {len(completion)} tokens; a prompt has at least one, and both together "
                f"at most {limits.max_model_len}",
            )
        if max(prompt) >= limits.vocab_size:
            raise _probe_refused(artifact, f"a probe with token {max(prompt)} of a vocabulary of {limits.vocab_size}")


def _probe_refused(artifact: Artifact, what: str) -> errors.InvalidArtifactError:
    return errors.InvalidArtifactError(
        f"{artifact.revision} has {what}. Publish it again with probes made for this base model.", code="probe_refused"
    )


_FileState = tuple[int, int, int] | None
_FileStates = tuple[_FileState, ...]


@dataclass(frozen=True, slots=True)
class _Damage:
    states: _FileStates
    """The files as they were before they were read."""
    error: errors.InvalidArtifactError
    found_at: float
    """``time.monotonic()``."""

    def holds_for(self, states: _FileStates) -> bool:
        return states == self.states and time.monotonic() < self.found_at + _DAMAGE_SECONDS


def _file_states(artifact: Artifact) -> _FileStates:
    """Inode, size and time of the manifest and of every file that it names."""
    return tuple(_file_state(artifact.path / path) for path in [MANIFEST_NAME, *sorted(artifact.manifest.files)])


def _file_state(path: Path) -> _FileState:
    """``None``: it cannot be looked at."""
    try:
        status = path.stat(follow_symlinks=False)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _allowed_rank(rank: int) -> int:
    """The least engine rank that holds ``rank``."""
    return next((allowed for allowed in LORA_RANKS if allowed >= rank), LORA_RANKS[-1])
