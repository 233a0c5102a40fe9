"""``capo jobs``: fine-tuning jobs of a running service, over its HTTP API."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from capo.cli.asking import DEFAULT_URL, KEY_HELP, Service, Url, service
from capo.cli.printing import plain_console
from registry import errors
from registry.strict_json import parse_strict_json

app = typer.Typer(help=f"Fine-tuning jobs of a running service. {KEY_HELP}", no_args_is_help=True)

_FOLLOW_SECONDS = 1.0
_ENDED = ("succeeded", "failed", "cancelled")
_PAGE = 100

JobId = Annotated[str, typer.Argument(help="The job's id, ftjob-...")]
console = plain_console()


class Method(StrEnum):
    SUPERVISED = "supervised"
    DPO = "dpo"


@app.command()
def create(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Training rows in JSON Lines.")],
    model: Annotated[str, typer.Option(help="The base model to tune, or an ft: model to go on from.")],
    validation: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Held-out rows.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the result's name.")] = None,
    method: Annotated[Method, typer.Option(help="dpo is for preference rows.")] = Method.SUPERVISED,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; default: chosen.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed trains the same.")] = None,
    capo: Annotated[str | None, typer.Option(help="The request's capo object, as JSON.")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Upload the rows, create a job, and print its id."""
    body: dict[str, Any] = {"model": model, "method": {"type": method.value}}
    if epochs is not None:
        body["method"][method.value] = {"hyperparameters": {"n_epochs": epochs}}
    body |= {name: value for name, value in {"suffix": suffix, "seed": seed}.items() if value is not None}
    if capo is not None:
        try:
            body["capo"] = parse_strict_json(capo.encode())
        except ValueError as error:
            raise errors.InvalidRequestError(f"--capo is not valid JSON: {error}", param="capo") from error
    with service(url) as ask, _uploading(ask) as upload:
        body["training_file"] = upload(file)
        if validation is not None:
            body["validation_file"] = upload(validation)
        console.print(ask("POST", "/fine_tuning/jobs", json=body)["id"])


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=_PAGE, help="How many to list at most, newest first.")] = 20,
    url: Url = DEFAULT_URL,
) -> None:
    """One job on each line: id, state, base model, result."""
    with service(url) as ask:
        for job in ask("GET", "/fine_tuning/jobs", params={"limit": limit}).records():
            console.print(f"{job['id']}  {_state(job):<10} {job['model']}  {job['fine_tuned_model'] or '-'}")


@app.command()
def show(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """The whole job, as JSON."""
    with service(url) as ask:
        console.print_json(data=ask("GET", f"/fine_tuning/jobs/{job_id}"))


@app.command()
def cancel(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """End the job for good."""
    _act(url, job_id, "cancel")


@app.command()
def pause(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """Stop the job with a checkpoint, until it is resumed."""
    _act(url, job_id, "pause")


@app.command()
def resume(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """Let a paused job go on from its checkpoint."""
    _act(url, job_id, "resume")


@app.command()
def logs(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """Every event so far, the oldest first."""
    with service(url) as ask:
        for event in _events_after(ask, job_id, None):
            _print_event(event)


@app.command()
def follow(job_id: JobId, url: Url = DEFAULT_URL) -> None:
    """Show the job's events and progress until it ends; exit code 1 unless it succeeded."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    seen: str | None = None
    with service(url) as ask:
        job = ask("GET", f"/fine_tuning/jobs/{job_id}")  # before a bar is drawn for a job that is not there
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            bar = progress.add_task("waiting", total=None)
            while True:
                for event in _events_after(ask, job_id, seen):
                    seen = event["id"]
                    if event["type"] == "metrics":
                        data = event["data"]
                        loss = data["train_loss"]
                        text = _state(job) if loss is None else f"{_state(job)}, loss {loss:.4f}"
                        progress.update(bar, description=text, completed=data["step"], total=data["total_steps"])
                    else:
                        _print_event(event)
                if job["status"] in _ENDED:
                    progress.update(bar, description=job["status"])
                    break
                time.sleep(_FOLLOW_SECONDS)
                job = ask("GET", f"/fine_tuning/jobs/{job_id}")
    if job["status"] != "succeeded":
        raise typer.Exit(1)
    console.print(job["fine_tuned_model"])


@contextmanager
def _uploading(ask: Service) -> Iterator[Callable[[Path], str]]:
    """Uploads rows, and gives each file's id. What was uploaded for a job that is refused is deleted again."""
    made: list[str] = []

    def upload(path: Path) -> str:
        with path.open("rb") as file:
            answer = ask("POST", "/files", data={"purpose": "fine-tune"}, files={"file": (path.name, file)})
        made.append(str(answer["id"]))
        return made[-1]

    try:
        yield upload
    except errors.InvalidRequestError:  # any other: nobody knows whether there is a job
        for file_id in made:
            with suppress(errors.CapoError):  # the refusal is what has to be told
                ask("DELETE", f"/files/{file_id}")
        raise


def _act(url: str, job_id: str, action: str) -> None:
    with service(url) as ask:
        console.print(_state(ask("POST", f"/fine_tuning/jobs/{job_id}/{action}")))


def _events_after(ask: Service, job_id: str, seen: str | None) -> list[dict[str, Any]]:
    """Oldest first, those that came after ``seen``; the service lists the newest first."""
    newer: list[dict[str, Any]] = []
    params: dict[str, Any] = {"limit": _PAGE}
    while True:
        page = ask("GET", f"/fine_tuning/jobs/{job_id}/events", params=params)
        for event in page.records():
            if event["id"] == seen:
                return newer[::-1]
            newer.append(event)
        if not page["has_more"]:
            return newer[::-1]
        params["after"] = page["last_id"]


def _state(job: dict[str, Any]) -> str:
    return "paused" if job["capo"]["paused"] and job["status"] == "queued" else str(job["status"])


def _print_event(event: dict[str, Any]) -> None:
    when = time.strftime("%H:%M:%S", time.localtime(event["created_at"]))
    console.print(f"{when} {event['level']:<5} {event['message']}")
