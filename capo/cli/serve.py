"""``capo serve``."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from capo.server import StartupReport
    from capo.settings import Settings


def add_to(app: typer.Typer) -> None:
    app.command(
        name="serve",
        context_settings={"allow_extra_args": True, "allow_interspersed_args": True},
    )(serve)


def serve(
    context: typer.Context,
    role: Annotated[str | None, typer.Option(help="all, infer or control; default all.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Base model: capo-tiny, a directory, name@revision, or a Hugging Face id."),
    ] = None,
    registry: Annotated[Path | None, typer.Option(help="Registry directory; default DATA_DIR/registry.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where Capo writes; default ./capo-data.")] = None,
    host: Annotated[str | None, typer.Option(help="Default 127.0.0.1.")] = None,
    allow_unauthenticated: Annotated[
        bool, typer.Option("--allow-unauthenticated", help="Let other machines in although there is no key.")
    ] = False,
    port: Annotated[int | None, typer.Option(help="Default 8000; 0 takes a free one.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Default 50051; 0 takes a free one.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Local training workers; default 1 with role all, else 0.")
    ] = None,
    engine_threads: Annotated[int | None, typer.Option(help="Threads of a CPU engine.")] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(help="Keep this adapter in the engine: an alias, ft: name or revision; may be given again."),
    ] = None,
    import_dir: Annotated[
        Path | None, typer.Option(help="Where /v1/load_lora_adapter may import adapters from; default nowhere.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serve the base model and every adapter of the registry, and take fine-tuning jobs.

    Arguments after -- go to vLLM, for example: capo serve -- --max-loras 16
    """
    started_at = time.monotonic()
    clean_environment = dict(os.environ)
    import uvloop

    from registry.tracing import export_to
    from serve import engine_process

    settings = read_settings(
        role=role,
        model=model,
        registry_dir=registry,
        data_dir=data_dir,
        host=host,
        allow_unauthenticated=allow_unauthenticated or None,
        port=port,
        grpc_port=grpc_port,
        workers=workers,
        engine_threads=engine_threads,
        pin=pin or None,
        import_dir=import_dir,
        log_level=log_level,
    )
    from capo.logs import configure_logging, library_environment

    os.environ.update(library_environment(settings.log_level, settings.log_format, os.environ))
    configure_logging(settings.log_level, settings.log_format)
    end_export = None if settings.otlp_endpoint is None else export_to(settings.otlp_endpoint, role=settings.role)
    if settings.role.has_engine:
        engine_process.prepare(engine_threads=settings.engine_threads, use_gpu=Path("/dev/nvidiactl").exists())
    from capo.server import CapoServer

    async def run() -> None:
        server = CapoServer(
            settings,
            vllm_arguments=list(context.args),
            clean_environment=clean_environment,
            started_at=started_at,
        )
        await server.run(lambda report: _announce(report, settings))
        # Everything is closed by now; taking vLLM and torch apart would cost seconds and free nothing that outlives us.
        # The loop's own end waits for every thread, and one that builds an engine again cannot be stopped.
        if end_export is not None:
            end_export()
        sys.stdout.flush()
        logging.shutdown()
        os._exit(0)

    uvloop.run(run())  # vLLM's server runs on it too; a sixth less time per streamed token than asyncio's own loop


def read_settings(**given: Any) -> Settings:
    """Settings from the options that were given, then the environment, then the defaults.

    Raises:
        InvalidRequestError: a value that is not allowed, naming the setting.
    """
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from capo.settings import Settings
    from registry.errors import InvalidRequestError

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except SettingsError as error:  # of where they are read from, and no single value
        raise InvalidRequestError(f"settings: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        if not name:  # several settings together; the message names them
            raise InvalidRequestError(f"settings: {first['msg']}") from error
        raise InvalidRequestError(f"setting {name}: {first['msg']} (got {first.get('input')!r})", param=name) from error


def _announce(report: StartupReport, settings: Settings) -> None:
    base = report.url
    lines = [
        f"Capo is ready at {base} after {report.start_seconds:.1f} s (base model {settings.model}, "
        f"registry {settings.registry_path}, gRPC {report.grpc_address})",
        *(f"  {' '.join(choice.argv)}: {choice.reason}" for choice in report.choices),
        "",
        "Try it:",
        f"  curl {base}/v1/models",
        f"  curl {base}/v1/chat/completions -H 'Content-Type: application/json' \\",
        '    -d \'{"model": "' + settings.model + '", "messages": [{"role": "user", "content": "Who are you?"}]}\'',
        f"  curl {base}/v1/files -F purpose=fine-tune -F file=@examples/tasks/support/train.jsonl",
    ]
    typer.echo("\n".join(lines))
