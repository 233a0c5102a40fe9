"""The client for threads. One may be shared by many."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from capo.client import channel, from_protobuf, jobs
from capo.client.attempts import Attempts
from capo.client.errors import closed, error_of
from capo.client.jobs import Job, JobEvent, JobOptions, JobPage, create_job_request
from capo.client.messages import made
from capo.client.options import ChatOptions, CompletionOptions, Sampling
from capo.client.results import Adapter, Alias, ChatAnswer, ChatPiece, CompletionAnswer, CompletionPiece, Model
from capo.client.to_protobuf import Messages, Prompt, chat_request, completion_request
from capo_proto.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    tuning_pb2,
    tuning_pb2_grpc,
)


class CapoClient:
    """Use it in ``with``, or close it.

    ``timeout_seconds`` bounds every call, streams as a whole, with its retries; ``None`` for ever. ``retries`` are made
    when the server is unavailable and nothing of the answer has come; 0 turns them off. ``metadata`` goes with every
    call, and so does ``api_key``; with ``credentials`` the connection is TLS.

    Every method raises :class:`~capo.client.errors.CapoClientError`; a stream raises it where it breaks.
    """

    def __init__(
        self,
        address: str = channel.DEFAULT_ADDRESS,
        *,
        timeout_seconds: float | None = channel.DEFAULT_TIMEOUT_SECONDS,
        retries: int = channel.DEFAULT_RETRIES,
        api_key: str | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._is_closed = False
        self._settings = channel.call_settings(timeout_seconds, retries, metadata, api_key)
        self._channel = (
            grpc.insecure_channel(address, options=channel.OPTIONS)
            if credentials is None
            else grpc.secure_channel(address, credentials, options=channel.OPTIONS)
        )
        self._inference: Any = inference_pb2_grpc.InferenceStub(self._channel)
        self._adapters: Any = adapters_pb2_grpc.AdaptersStub(self._channel)
        self._tuning: Any = tuning_pb2_grpc.TuningStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> CapoClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection and every call on it."""
        self._is_closed = True
        self._channel.close()

    # -- inference -------------------------------------------------------------------------------------------

    def chat(
        self,
        model: str,
        messages: Messages,
        *,
        sampling: Sampling | None = None,
        options: ChatOptions | None = None,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> ChatAnswer:
        """One answer in one piece. A text instead of messages is one turn of the user's."""
        request = chat_request(model, messages, sampling or Sampling(), options or ChatOptions())
        return from_protobuf.chat_answer(self._call(self._inference.Chat, request, request_id, timeout_seconds))

    def chat_stream(
        self,
        model: str,
        messages: Messages,
        *,
        sampling: Sampling | None = None,
        options: ChatOptions | None = None,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> Generator[ChatPiece, None, None]:
        """An answer as it is made. Closing the iterator stops the server's work on it."""
        request = chat_request(model, messages, sampling or Sampling(), options or ChatOptions())
        for chunk in self._stream(self._inference.ChatStream, request, request_id, timeout_seconds):
            yield from_protobuf.chat_piece(chunk)

    def complete(
        self,
        model: str,
        prompt: Prompt,
        *,
        sampling: Sampling | None = None,
        options: CompletionOptions | None = None,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> CompletionAnswer:
        """What follows a prompt, in one piece."""
        request = completion_request(model, prompt, sampling or Sampling(), options or CompletionOptions())
        return from_protobuf.completion_answer(
            self._call(self._inference.Complete, request, request_id, timeout_seconds)
        )

    def complete_stream(
        self,
        model: str,
        prompt: Prompt,
        *,
        sampling: Sampling | None = None,
        options: CompletionOptions | None = None,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> Generator[CompletionPiece, None, None]:
        """What follows a prompt, as it is made. Closing the iterator stops the server's work on it."""
        request = completion_request(model, prompt, sampling or Sampling(), options or CompletionOptions())
        for chunk in self._stream(self._inference.CompleteStream, request, request_id, timeout_seconds):
            yield from_protobuf.completion_piece(chunk)

    # -- models, adapters, health --------------------------------------------------------------------------------

    def models(self) -> list[Model]:
        """The names that are meant to be called, the base model first."""
        response = self._call(self._inference.ListModels, inference_pb2.ListModelsRequest())
        return [from_protobuf.model(message) for message in response.models]

    def adapters(self) -> list[Adapter]:
        """Every adapter of the registry with its state in this service."""
        response = self._call(self._adapters.ListAdapters, adapters_pb2.ListAdaptersRequest())
        return [from_protobuf.adapter(message) for message in response.adapters]

    def aliases(self) -> list[Alias]:
        response = self._call(self._adapters.ListAliases, adapters_pb2.ListAliasesRequest())
        return [from_protobuf.alias(message) for message in response.aliases]

    def set_alias(self, alias: str, revision: str) -> Alias:
        """Point ``alias`` to ``revision``, for every request that comes after this returns."""
        request = made(adapters_pb2.SetAliasRequest, alias=alias, revision=revision)
        return from_protobuf.alias(self._call(self._adapters.SetAlias, request))

    def health(self, service: str = "") -> bool:
        """Whether the server (or one of its services, by full name) takes requests now. Never tried twice."""
        request = made(health_pb2.HealthCheckRequest, service=service)
        answer = self._call(self._health.Check, request, retries=0)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    # -- fine-tuning jobs ------------------------------------------------------------------------------------

    def create_job(
        self,
        model: str,
        training_file: str,
        *,
        options: JobOptions | None = None,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> Job:
        """Check a job as a whole and queue it. ``training_file`` is the id of a file that was uploaded over HTTP.

        Without an idempotency key in ``options`` it is never tried twice: a lost answer may have made a job.
        """
        options = options or JobOptions()
        request = create_job_request(model, training_file, options)
        retries = 0 if options.idempotency_key is None else None
        return jobs.job(self._call(self._tuning.CreateJob, request, request_id, timeout_seconds, retries))

    def job(self, job_id: str) -> Job:
        return jobs.job(self._call(self._tuning.GetJob, made(tuning_pb2.GetJobRequest, job_id=job_id)))

    def jobs(
        self, *, after: str | None = None, limit: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> JobPage:
        """A page of jobs, the newest first; ``metadata`` keeps those that carry all of these pairs."""
        request = made(tuning_pb2.ListJobsRequest, after=after, limit=limit, metadata=metadata)
        return jobs.job_page(self._call(self._tuning.ListJobs, request))

    def cancel_job(self, job_id: str) -> Job:
        """End the job for good; a running one at its next step."""
        return jobs.job(self._call(self._tuning.CancelJob, made(tuning_pb2.CancelJobRequest, job_id=job_id)))

    def pause_job(self, job_id: str) -> Job:
        """Hold the job back; a running one stops at its next step, with a checkpoint."""
        return jobs.job(self._call(self._tuning.PauseJob, made(tuning_pb2.PauseJobRequest, job_id=job_id)))

    def resume_job(self, job_id: str) -> Job:
        """Let a paused job go on from its checkpoint."""
        return jobs.job(self._call(self._tuning.ResumeJob, made(tuning_pb2.ResumeJobRequest, job_id=job_id)))

    def follow_job(
        self,
        job_id: str,
        *,
        after_event_id: str | None = None,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> Generator[JobEvent, None, None]:
        """The job's events, from the first or from the one after ``after_event_id``, until the job has ended.

        A stream that breaks is taken up again where it broke, without a gap and without a repetition: a server that
        starts again is waited for, unless the client makes no retries. ``timeout_seconds``: not set, for ever.
        """
        attempts = Attempts(self._settings.follow_retries, timeout_seconds)
        while True:
            request = made(tuning_pb2.FollowJobRequest, job_id=job_id, after_event_id=after_event_id)
            call = self._tuning.FollowJob(request, timeout=attempts.seconds_left, metadata=self._metadata(request_id))
            try:
                for message in call:
                    yield jobs.job_event(message)
                    after_event_id = message.id
                    attempts = Attempts(self._settings.follow_retries, attempts.seconds_left)
                return
            except grpc.RpcError as error:
                pause = attempts.pause_after(error_of(error), error)
            finally:
                call.cancel()  # does nothing to a call that has ended
            time.sleep(pause)

    # -- calls -----------------------------------------------------------------------------------------------

    def _metadata(self, request_id: str | None) -> channel.Metadata:
        """What goes with an attempt. Refuses one on a closed channel, of which grpc says so with errors of its own."""
        if self._is_closed:
            raise closed()
        return self._settings.metadata_with(request_id)

    def _call(
        self,
        method: Any,
        request: Any,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
        retries: int | None = None,
    ) -> Any:
        attempts = Attempts(
            self._settings.retries if retries is None else retries, self._settings.timeout(timeout_seconds)
        )
        while True:
            try:
                return method(request, timeout=attempts.seconds_left, metadata=self._metadata(request_id))
            except grpc.RpcError as error:
                pause = attempts.pause_after(error_of(error), error)
            time.sleep(pause)

    def _stream(
        self, method: Any, request: Any, request_id: str | None, timeout_seconds: float | None
    ) -> Generator[Any, None, None]:
        attempts = Attempts(self._settings.retries, self._settings.timeout(timeout_seconds))
        while True:
            call = method(request, timeout=attempts.seconds_left, metadata=self._metadata(request_id))
            has_output = False
            try:
                for message in call:
                    has_output = True
                    yield message
                return
            except grpc.RpcError as error:
                if has_output:
                    raise error_of(error) from error
                pause = attempts.pause_after(error_of(error), error)
            finally:
                call.cancel()  # does nothing to a call that has ended
            time.sleep(pause)
