"""What an adapter must pass before the engine sees it, and before traffic sees it.

First on the CPU, without the engine: every byte against the manifest, the file checks of
:mod:`registry.adapter_files`, the base it was made for, and what this engine can hold. Then, once loaded, the
manifest's probes are replayed. vLLM itself accepts most wrong adapters in silence and serves garbage.
"""

from __future__ import annotations

import asyncio

from registry import Artifact, BaseModel, Registry, errors
from registry.adapter_files import check_adapter
from serve.engine_api import Engine, EngineAdapter, EngineLimits


class Gate:
    """Checks adapters for one base model. ``registry`` is where the bytes are verified."""

    def __init__(self, registry: Registry, base_model: BaseModel) -> None:
        self._registry = registry
        self._base_model = base_model
        self._passed: set[str] = set()

    async def check(self, artifact: Artifact, limits: EngineLimits) -> None:
        """Refuse what this engine cannot or must not serve. Reads every byte once per revision, in a thread.

        Raises:
            InvalidArtifactError: with a stable ``code``.
        """
        if artifact.revision in self._passed:
            return
        await asyncio.to_thread(self._check, artifact, limits)
        self._passed.add(artifact.revision)

    def _check(self, artifact: Artifact, limits: EngineLimits) -> None:
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
        check_adapter(artifact.path, base_model=self._base_model)

    async def probe(self, artifact: Artifact, engine: Engine, adapter: EngineAdapter) -> float | None:
        """Replay the manifest's probes on the loaded adapter; returns the share of their tokens that agree.

        A probe ends before the first near tie (:mod:`tune.probes`), so a sound engine agrees on every token in any
        dtype. ``None``: the artifact has no probes (imported ones do not).

        Raises:
            InvalidArtifactError: any token differs. The weights that answer are not the ones that were trained.
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
        if agreeing < total:
            raise errors.InvalidArtifactError(
                f"{artifact.revision} answers {total - agreeing} of {total} probe tokens unlike its training did. "
                "Check that the base model and its dtype are those it was trained with.",
                code="probe_mismatch",
            )
        return 1.0


def _allowed_rank(rank: int) -> int:
    """The least engine rank that holds ``rank`` (vLLM 0.32, vllm/config/lora.py, MaxLoRARanks)."""
    return next((allowed for allowed in (1, 8, 16, 32, 64, 128, 256, 320, 512) if allowed >= rank), 512)
