"""Capo's Python client, over gRPC.

    from capo.client import CapoClient, Sampling

    with CapoClient("127.0.0.1:50051") as client:
        print(client.chat("support", "My new lamp fell apart.").text)
        for piece in client.chat_stream("support", "And now?", sampling=Sampling(temperature=0)):
            print(piece.text, end="")

:class:`AsyncCapoClient` is the same with ``await``. Importing this package costs grpc and the stubs, and no other part
of Capo.
"""

from capo.client.aio import AsyncCapoClient
from capo.client.errors import (
    AuthenticationError,
    CancelledByServerError,
    CapoClientError,
    ConflictError,
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
)
from capo.client.jobs import (
    Hyperparameters,
    Job,
    JobError,
    JobEvent,
    JobMethod,
    JobOptions,
    JobPage,
    JobStatus,
    Wandb,
)
from capo.client.options import (
    ChatOptions,
    Choice,
    CompletionOptions,
    Grammar,
    JsonObject,
    JsonSchema,
    Message,
    NamedTool,
    Regex,
    Sampling,
    Tool,
    ToolCall,
    ToolChoice,
)
from capo.client.results import (
    Adapter,
    Alias,
    Canary,
    ChatAnswer,
    ChatChoice,
    ChatPiece,
    CompletionAnswer,
    CompletionChoice,
    CompletionPiece,
    FinishReason,
    Model,
    PromptLogprob,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from capo.client.sync import CapoClient

__all__ = [
    "Adapter",
    "Alias",
    "AsyncCapoClient",
    "AuthenticationError",
    "Canary",
    "CancelledByServerError",
    "CapoClient",
    "CapoClientError",
    "ChatAnswer",
    "ChatChoice",
    "ChatOptions",
    "ChatPiece",
    "Choice",
    "CompletionAnswer",
    "CompletionChoice",
    "CompletionOptions",
    "CompletionPiece",
    "ConflictError",
    "DeadlineExceededError",
    "FinishReason",
    "Grammar",
    "Hyperparameters",
    "InvalidRequestError",
    "Job",
    "JobError",
    "JobEvent",
    "JobMethod",
    "JobOptions",
    "JobPage",
    "JobStatus",
    "JsonObject",
    "JsonSchema",
    "Message",
    "Model",
    "NamedTool",
    "NotFoundError",
    "PermissionDeniedError",
    "PromptLogprob",
    "Regex",
    "ResourceExhaustedError",
    "Sampling",
    "ServerError",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolChoice",
    "TopLogprob",
    "UnavailableError",
    "Usage",
    "Wandb",
]
