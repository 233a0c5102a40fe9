"""``capo registry``: look at and change a registry directory. Works beside a running service, which follows it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from capo.cli.audited import audited
from capo.cli.printing import print_table
from capo.cli.serve import read_settings
from registry import Alias, CanaryRequest, DamagedArtifact, Registry, RevisionReference, errors, parse_reference
from registry.names import shown

app = typer.Typer(help="List, check and change what a registry directory holds.", no_args_is_help=True)

RegistryOption = Annotated[
    Path | None, typer.Option("--registry", help="The registry directory; default as for capo serve.")
]


def _show_alias(record: Alias) -> None:
    canary = record.canary
    share = "" if canary is None else f", {canary.percent} % -> {canary.revision}"
    typer.echo(f"{record.alias} -> {record.revision}{share}")


def _open(given: Path | None, *, read_only: bool = False, create: bool = False) -> Registry:
    directory = read_settings(registry_dir=given).registry_path
    try:
        return Registry(directory, read_only=read_only, create=create)
    except errors.NotFoundError as error:
        message = f"There is no registry at {directory}. Name one with --registry."
        raise errors.NotFoundError(message, code=error.code) from error


def _audit_dir(given: Path | None) -> Path:
    """The data directory, which is above the registry unless a setting says otherwise."""
    return read_settings().data_dir if given is None else given.absolute().parent


def _revision_of(opened: Registry, reference: str) -> str:
    """What the reference means, also where that is damaged."""
    try:
        return opened.resolve(reference).revision
    except errors.ModelNotFoundError:
        is_revision = isinstance(parse_reference(reference), RevisionReference)
        return reference if is_revision else opened.alias(reference).revision


@app.command("list")
def list_artifacts(registry: RegistryOption = None) -> None:
    """Every artifact, newest first, with the aliases that point to it; then what is damaged, and why."""
    opened = _open(registry, read_only=True)
    aliases: dict[str, list[str]] = {}
    for alias in opened.aliases():
        aliases.setdefault(alias.revision, []).append(alias.alias)
        if alias.canary is not None:
            aliases.setdefault(alias.canary.revision, []).append(f"{alias.alias} ({alias.canary.percent} %)")
    table = Table("revision", "kind", "base model", "rank", "size", "made", "aliases")
    artifacts, damaged = opened.survey()
    for artifact in sorted(artifacts, key=lambda a: -a.manifest.created_at):
        manifest = artifact.manifest
        size = sum(record.size_bytes for record in manifest.files.values())
        table.add_row(
            artifact.revision,
            manifest.kind,
            manifest.base_model.id,
            str(manifest.lora.rank) if manifest.lora is not None else "-",
            f"{size / 1e6:.1f} MB",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(manifest.created_at)),
            ", ".join(sorted(aliases.get(artifact.revision, []))),
        )
    print_table(table)
    for each in damaged:
        typer.echo(f"{each.revision} is damaged: {each.error.message}", err=True)


@app.command()
def show(reference: str, registry: RegistryOption = None) -> None:
    """The manifest of a revision, alias or ft: name, as JSON."""
    artifact = _open(registry, read_only=True).resolve(reference)
    document = {"revision": artifact.revision, "digest": artifact.digest, "path": str(artifact.path)}
    typer.echo(json.dumps(document | artifact.manifest.model_dump(mode="json"), indent=2))


@app.command("import")
def import_adapter(
    directory: Path,
    name: Annotated[str, typer.Option(help="Name under which the adapter is published.")],
    base_model: Annotated[str, typer.Option(help="The base model that the adapter was made for.")] = "capo-tiny",
    alias: Annotated[bool, typer.Option(help="Point the alias NAME to the new revision.")] = True,
    registry: RegistryOption = None,
) -> None:
    """Take in a PEFT adapter directory made by any other tool, after checking it."""
    from registry import check_adapter, locate_base_model

    opened = _open(registry, create=True)
    base = locate_base_model(base_model, opened)
    with audited(_audit_dir(registry), "registry import", name) as notes:
        artifact = opened.import_adapter(directory, name=name, base_model=base)
        notes["revision"] = artifact.revision
        left_out = sorted(path.name for path in directory.iterdir() if path.name not in artifact.manifest.files)
        if left_out:
            typer.echo(f"note: left out, for it is no part of the adapter: {', '.join(map(shown, left_out))}", err=True)
        for note in check_adapter(artifact.path, base_model=base).notes:
            typer.echo(f"note: {note}", err=True)
        if alias:
            opened.set_alias(name, artifact.revision)
    typer.echo(artifact.revision)


@app.command()
def alias(
    name: str,
    revision: str,
    canary: Annotated[
        str | None, typer.Option(help="A second revision that answers a share; left out: a running canary ends.")
    ] = None,
    percent: Annotated[int | None, typer.Option(help="The canary's share of the requests, 1 to 99.")] = None,
    expected: Annotated[str | None, typer.Option(help="Only if NAME points to this revision now.")] = None,
    registry: RegistryOption = None,
) -> None:
    """Point alias NAME to REVISION, at once for every reader. A running service follows without checking; to have
    it check and load the revision first, use its PUT /v1/aliases/NAME."""
    if (canary is None) != (percent is None):
        raise errors.InvalidRequestError(
            f"--canary ({canary}) and --percent ({percent}) belong together: give both or none.", param="canary"
        )
    request = None if canary is None or percent is None else CanaryRequest(canary, percent)
    opened = _open(registry)
    with audited(_audit_dir(registry), "registry alias", name) as notes:
        notes |= {"revision": revision} | ({} if request is None else {"canary": f"{percent} % {canary}"})
        record = opened.set_alias(name, revision, canary=request, expected=expected)
    _show_alias(record)


@app.command()
def rollback(name: str, registry: RegistryOption = None) -> None:
    """Undo the last step of alias NAME: end its canary if one runs, else go back to the revision before."""
    opened = _open(registry)
    with audited(_audit_dir(registry), "registry rollback", name) as notes:
        record = opened.rollback_alias(name)
        notes["revision"] = record.revision
    _show_alias(record)


@app.command()
def unalias(name: str, registry: RegistryOption = None) -> None:
    """Remove alias NAME; its revisions stay."""
    opened = _open(registry)
    with audited(_audit_dir(registry), "registry unalias", name):
        opened.remove_alias(name)
    typer.echo(f"removed {name}")


@app.command()
def verify(
    reference: Annotated[str | None, typer.Argument(help="A revision or alias; left out: everything.")] = None,
    registry: RegistryOption = None,
) -> None:
    """Read every byte again and compare with the manifest. Exit code 1 if anything differs."""
    opened = _open(registry, read_only=True)
    unlisted: list[DamagedArtifact] = []
    if reference:
        revisions = [_revision_of(opened, reference)]
    else:
        artifacts, damaged = opened.survey()
        revisions = [artifact.revision for artifact in artifacts] + [each.revision for each in damaged if each.digest]
        unlisted = [each for each in damaged if not each.digest]
    broken = len(unlisted)
    for each in unlisted:
        typer.echo(f"{each.name}: {each.error.message}")
    for revision in revisions:
        problems = opened.verify(revision)
        broken += bool(problems)
        typer.echo(f"{revision}: {'; '.join(problems) if problems else 'ok'}")
    if broken:
        raise typer.Exit(1)


@app.command()
def remove(
    revision: str,
    force: Annotated[
        bool, typer.Option(help="Also when aliases serve it; those that point to it are removed, a canary ends.")
    ] = False,
    registry: RegistryOption = None,
) -> None:
    """Remove a revision. A running service lets its users finish."""
    opened = _open(registry)
    with audited(_audit_dir(registry), "registry remove", revision) as notes:
        notes["force"] = str(force).lower()
        opened.remove(revision, force=force)
    typer.echo(f"removed {revision}")


@app.command()
def gc(
    keep_unaliased: Annotated[
        int | None,
        typer.Option(help="Also remove all but this many of the newest unaliased revisions per name."),
    ] = None,
    registry: RegistryOption = None,
) -> None:
    """Remove what interrupted publishers left behind."""
    opened = _open(registry)
    with audited(_audit_dir(registry), "registry gc", "") as notes:
        removed = str(opened.gc(keep_unaliased))
        notes["removed"] = removed
    typer.echo(removed)
