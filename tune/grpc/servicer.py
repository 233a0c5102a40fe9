"""The ``capo.v1.Tuning`` service, over the same :class:`~tune.jobs.service.JobService` as the HTTP routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import grpc

from capo_proto.v1 import tuning_pb2 as pb
from capo_proto.v1 import tuning_pb2_grpc as stubs
from registry.errors import InvalidRequestError
from registry.principal import current_principal
from registry.threads import Threads
from tune.grpc.answers import event_message, job_message
from tune.grpc.requests import create_job_body
from tune.jobs.query import LIST_DEFAULT, LIST_LIMIT
from tune.jobs.service import JobService

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Tuning"].full_name
_FOLLOW_SECONDS = 0.25
"""Between two looks for new events; each is one indexed query."""


class TuningServicer(stubs.TuningServicer):
    """Errors pass through: the server's interceptor turns them into status codes. What blocks runs in a thread."""

    def __init__(self, service: JobService, threads: Threads) -> None:
        self._service = service
        self._threads = threads

    @property
    def _seen(self) -> JobService:
        """The service as the caller's tenant sees it."""
        return self._service.seen_by(current_principal().tenant)

    def add_to(self, server: grpc.aio.Server) -> None:
        stubs.add_TuningServicer_to_server(self, server)

    async def CreateJob(self, request: pb.CreateJobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        body, asked = create_job_body(request)
        return job_message(await self._threads.run(self._seen.create, body, asked))

    async def GetJob(self, request: pb.GetJobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        return job_message(await self._threads.run(self._seen.job, request.job_id))

    async def ListJobs(self, request: pb.ListJobsRequest, context: grpc.aio.ServicerContext) -> pb.ListJobsResponse:
        limit = request.limit if request.HasField("limit") else LIST_DEFAULT
        if not 1 <= limit <= LIST_LIMIT:
            raise InvalidRequestError(f"limit must be an integer from 1 to {LIST_LIMIT}, got {limit}", param="limit")
        page = await self._threads.run(
            self._seen.jobs,
            after=request.after if request.HasField("after") else None,
            limit=limit,
            metadata=dict(request.metadata),
        )
        return pb.ListJobsResponse(jobs=[job_message(job) for job in page.records], has_more=page.has_more)

    async def CancelJob(self, request: pb.CancelJobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        return job_message(await self._threads.run(self._seen.cancel, request.job_id))

    async def PauseJob(self, request: pb.PauseJobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        return job_message(await self._threads.run(self._seen.pause, request.job_id))

    async def ResumeJob(self, request: pb.ResumeJobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        return job_message(await self._threads.run(self._seen.resume, request.job_id))

    async def FollowJob(
        self, request: pb.FollowJobRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.JobEvent, None]:
        after = request.after_event_id if request.HasField("after_event_id") else None
        service = self._seen
        sequence = await self._threads.run(service.event_sequence, request.job_id, after)
        while True:
            news = await self._threads.run(service.news, request.job_id, sequence)
            for event in news.events:
                yield event_message(event)
                sequence = event.sequence
            if news.is_complete:
                return
            if not news.events:
                await asyncio.sleep(_FOLLOW_SECONDS)
