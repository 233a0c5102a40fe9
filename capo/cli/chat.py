"""``capo chat``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from capo.cli.asking import api_key
from registry.errors import InvalidRequestError


def add_to(app: typer.Typer) -> None:
    app.command(name="chat")(chat)


def chat(
    address: Annotated[
        str | None, typer.Option(help="gRPC address of a running service; default 127.0.0.1:50051.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base model, alias or name@revision; default: the base.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling, in (0, 1].")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens of each answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    message: Annotated[str | None, typer.Option(help="Ask this alone, print the answer, and end.")] = None,
) -> None:
    """Talk to a model of a running service.

    With --message, or with a question on standard input, one answer is printed and nothing else; an error goes to
    standard error with exit code 2. A service with keys is asked with that of CAPO_API_KEY.
    """
    from capo.chat import Conversation, answer_once, converse, explain
    from capo.client import CapoClient, CapoClientError, Sampling
    from capo.client.channel import DEFAULT_ADDRESS

    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
    if message == "":
        raise InvalidRequestError("There is no question. Give one with --message or on standard input.")
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    try:
        with CapoClient(address or DEFAULT_ADDRESS, api_key=api_key()) as client:
            conversation = Conversation(client, model or client.models()[0].id, sampling, system)
            if message is None:
                converse(client, conversation)
            else:
                answer_once(conversation, message)
    except CapoClientError as error:
        typer.echo(f"error: {explain(error)}", err=True)
        raise typer.Exit(2) from error
