"""``capo export``: other forms of what was tuned, each verified against it before it is published."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capo.cli.serve import read_settings
from registry import Registry

if TYPE_CHECKING:
    from tune.progress import StepMetrics, TrainingEvent

app = typer.Typer(
    help="Merge, quantise or extract an adapter, verify the result, and publish it.", no_args_is_help=True
)

ReferenceArgument = Annotated[str, typer.Argument(help="A revision, alias or ft: name; for gptq also a base model.")]
NameOption = Annotated[
    str | None, typer.Option(help="Of the new artifact; default the old one's, with the kind behind.")
]
DataOption = Annotated[
    Path | None, typer.Option(help="Rows to verify (and calibrate) on; default those of its own training job.")
]
BaseOption = Annotated[str | None, typer.Option(help="Where its base is, if the base's id does not say.")]
KlOption = Annotated[float | None, typer.Option("--max-kl", help="Not published beyond this divergence, in nats.")]
TopOption = Annotated[float | None, typer.Option("--min-top1-agreement", help="Not published below this share.")]
RegistryOption = Annotated[
    Path | None, typer.Option("--registry", help="Registry directory; default as for capo serve.")
]


@app.command()
def merge(
    reference: ReferenceArgument,
    dtype: Annotated[str, typer.Option(help="base, float32 or bfloat16.")] = "base",
    name: NameOption = None,
    data: DataOption = None,
    max_kl: KlOption = None,
    min_top1_agreement: TopOption = None,
    base_model: BaseOption = None,
    registry: RegistryOption = None,
) -> None:
    """Add an adapter into its base's weights: a model that serves with capo serve --model NAME@REVISION."""
    limits = {"max_kl": max_kl, "min_top1_agreement": min_top1_agreement}
    _export(
        {"kind": "merge", "dtype": dtype, "name": name, "thresholds": limits}, reference, data, base_model, registry
    )


@app.command()
def gptq(
    reference: ReferenceArgument,
    bits: Annotated[int, typer.Option(help="4, or 8 (which vLLM serves on a GPU only).")] = 4,
    group_size: Annotated[int | None, typer.Option(help="32, 64 or 128; default the largest that fits.")] = None,
    desc_act: Annotated[bool, typer.Option(help="In order of activation: more exact, slower to serve.")] = False,
    calibration_rows: Annotated[int, typer.Option(help="Rows that it is calibrated on.")] = 128,
    name: NameOption = None,
    data: DataOption = None,
    max_kl: KlOption = None,
    min_top1_agreement: TopOption = None,
    base_model: BaseOption = None,
    registry: RegistryOption = None,
) -> None:
    """Quantise to 4 or 8 bits. A copy of a plain base takes the base's adapters."""
    asked = {
        "kind": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "calibration_rows": calibration_rows,
        "name": name,
        "thresholds": {"max_kl": max_kl, "min_top1_agreement": min_top1_agreement},
    }
    _export(asked, reference, data, base_model, registry)


@app.command()
def lora(
    reference: ReferenceArgument,
    rank: Annotated[int, typer.Option(help="Of the adapter; the error falls as it rises.")] = 16,
    name: NameOption = None,
    data: DataOption = None,
    max_kl: KlOption = None,
    min_top1_agreement: TopOption = None,
    base_model: BaseOption = None,
    registry: RegistryOption = None,
) -> None:
    """Extract an adapter from a model whose whole weights were tuned."""
    limits = {"max_kl": max_kl, "min_top1_agreement": min_top1_agreement}
    _export({"kind": "lora", "rank": rank, "name": name, "thresholds": limits}, reference, data, base_model, registry)


@app.command()
def awq(reference: ReferenceArgument) -> None:
    """Not offered; says why."""
    _export({"kind": "awq"}, reference, None, None, None)


class _Told:
    """Prints events as they come."""

    def on_event(self, event: TrainingEvent) -> None:
        typer.echo(event.message, err=True)

    def on_step(self, metrics: StepMetrics) -> None:
        del metrics


def _export(
    asked: dict[str, Any], reference: str, data: Path | None, base_model: str | None, registry: Path | None
) -> None:
    from tune.cli import hush_optional_libraries
    from tune.exports.session import export, locate_source, rows_for
    from tune.exports.settings import parse_export
    from tune.jobs.settings import files_dir

    settings = read_settings(registry_dir=registry)
    export_settings = parse_export(asked)
    opened = Registry(settings.registry_path)
    hush_optional_libraries()
    source = locate_source(reference, opened, base_model)
    rows = rows_for(
        source,
        data=data,
        directories=[Path(), files_dir(settings.data_dir)],
        max_rows=export_settings.max_rows,
        calibration_rows=asked.get("calibration_rows", 0),
    )
    typer.echo(export(source, export_settings, rows, registry=opened, watcher=_Told()).revision)
