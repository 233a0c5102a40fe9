"""``capo keys``: who may ask a service for what. Works on the job store, beside running services, which follow it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote

import typer

from capo.cli.audited import audited
from capo.cli.serve import read_settings
from registry import errors
from registry.principal import Scope

if TYPE_CHECKING:
    from capo.keys.records import KeyRecord
    from capo.keys.secret import Secret
    from capo.keys.store import KeyStore

app = typer.Typer(help="Create, list, revoke and rotate API keys.", no_args_is_help=True)

_MOST = 10**9
"""Of each limit: what no process comes to, and what every database can hold."""
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

DataDir = Annotated[Path | None, typer.Option(help="Where Capo writes; default ./capo-data.")]


@app.command()
def create(
    scope: Annotated[list[str], typer.Option(help="infer, tune, admin or metrics; may be given again.")],
    tenant: Annotated[
        str | None, typer.Option(help="Whose files, jobs and models it sees; default the service's own.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Inference may call only this name; may be given again.")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="After how long, as 90d, 12h or 30m; default never.")] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, max=_MOST, help="In each process; then 429; default no limit.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(min=1, max=_MOST, help="Prompt and completion tokens, likewise; then 429; default no limit."),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=_MOST, help="Requests at once, likewise; then 429.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write the key to this new file, for its owner's eyes only, where what is printed is kept."),
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Make a key and print it, this once. As soon as there is one, a running service asks everybody for a key."""
    from capo.keys.records import KeyLimits, NewKey

    settings = read_settings(data_dir=data_dir)
    new = NewKey(
        tenant=tenant or settings.organization,
        scopes=frozenset(map(_scope, scope)),
        models=None if not model else frozenset(model),
        limits=KeyLimits(requests_per_minute, tokens_per_minute, concurrency),
        expires_at=None if expires is None else int(time.time()) + _seconds("expires", expires),
    )
    with _opened(data_dir, create=True) as (store, directory), _shown(output) as show:
        secret = store.create(new)
        with audited(directory, "keys create", secret.key_id) as notes:
            notes |= {"tenant": new.tenant, "scopes": ",".join(sorted(new.scopes))}
        show(secret)


@app.command("list")
def list_keys(data_dir: DataDir = None) -> None:
    """Every key that was ever made, one on each line, without its secret."""
    with _opened(data_dir) as (store, _):
        keys = store.all()
    for key in keys:
        limits = key.limits
        bounds = {
            "requests/min": limits.requests_per_minute,
            "tokens/min": limits.tokens_per_minute,
            "at once": limits.concurrency,
        }
        columns = [
            key.id,
            key.tenant,
            ",".join(sorted(key.scopes)),
            "all models" if key.models is None else ",".join(sorted(key.models)),
            ", ".join(f"{bound} {name}" for name, bound in bounds.items() if bound is not None) or "no limits",
            f"made {_date(key.created_at)}",
            _state(key),
        ]
        typer.echo("  ".join(columns))


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(help="The key's id, as listed.")], data_dir: DataDir = None) -> None:
    """End a key for good; running services refuse it within seconds."""
    with _opened(data_dir) as (store, directory), audited(directory, "keys revoke", key_id):
        store.revoke(key_id)
    typer.echo(f"{key_id} is revoked")


@app.command()
def rotate(
    key_id: Annotated[str, typer.Argument(help="The key's id, as listed.")],
    grace: Annotated[str, typer.Option(help="How long the present secret is good for, as 1h or 0s.")] = "24h",
    data_dir: DataDir = None,
) -> None:
    """Give a key a new secret and print it, this once; the present one is good for a while yet.

    While an earlier secret is, a key is rotated only with --grace 0s, which ends both.
    """
    seconds = _seconds("grace", grace)
    with _opened(data_dir) as (store, directory), audited(directory, "keys rotate", key_id) as notes:
        notes["grace_seconds"] = str(seconds)
        secret = store.rotate(key_id, grace_seconds=seconds)
    typer.echo(secret.text)


@contextmanager
def _opened(data_dir: Path | None, *, create: bool = False) -> Iterator[tuple[KeyStore, Path]]:
    """The keys, and the directory of the audit log. ``create``: also where there is no job store yet.

    Raises:
        NotFoundError: there is none.
    """
    from capo.keys.store import KeyStore
    from tune.jobs.database import Database

    settings = read_settings(data_dir=data_dir)
    if not create:
        _require_store(settings.job_store_url)
    database = Database(settings.job_store_url, tenant=settings.organization)
    try:
        yield KeyStore(database), settings.data_dir
    finally:
        database.close()


def _require_store(url: str) -> None:
    """A SQLite file is made where it is opened; a server's database is there or is not."""
    path = Path(unquote(url.removeprefix("sqlite:///").partition("?")[0]))
    if url.startswith("sqlite:///") and not path.exists():
        raise errors.NotFoundError(
            f"There is no job store at {path}, and so no key. Name the data directory of the service with --data-dir; "
            "`capo keys create` makes a first key."
        )


@contextmanager
def _shown(output: Path | None) -> Iterator[Callable[[Secret], None]]:
    """Prints a secret, or writes it to a file, which is made first: else a key might be left that nobody can show."""
    if output is None:
        yield lambda secret: typer.echo(secret.text)
        return
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise errors.InvalidRequestError(
            f"--output {output} cannot be made: {error.strerror}. Name a new file in a directory of yours; "
            "no key was made.",
            param="output",
        ) from error
    try:
        with os.fdopen(descriptor, "w") as file:

            def write(secret: Secret) -> None:
                file.write(f"{secret.text}\n")
                typer.echo(f"{secret.key_id} is in {output}")

            yield write
    except Exception:
        output.unlink()
        raise


def _scope(text: str) -> Scope:
    try:
        return Scope(text)
    except ValueError as error:
        raise errors.InvalidRequestError(
            f"--scope {text!r} is none; there are {', '.join(Scope)}.", param="scope"
        ) from error


def _seconds(name: str, text: str) -> int:
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if match is None:
        raise errors.InvalidRequestError(
            f"--{name} {text!r} is no length of time; write 90d, 12h, 30m or 0s.", param=name
        )
    return int(match[1]) * _UNIT_SECONDS[match[2]]


def _state(key: KeyRecord) -> str:
    now = time.time()
    if (reason := key.refusal(now)) is not None:
        return reason.removeprefix("was ").removeprefix("has ")
    if len(key.digests(now)) > 1:
        return f"rotating until {_date(key.previous_until or 0)}"
    return "good" if key.expires_at is None else f"until {_date(key.expires_at)}"


def _date(at: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
