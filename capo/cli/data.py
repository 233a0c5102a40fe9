"""``capo data``: look at training files before they are trained on."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from capo.cli.printing import plain_console
from capo.cli.serve import read_settings
from registry.errors import InvalidRequestError

if TYPE_CHECKING:
    from registry import BaseModel
    from tune.data.formats import Format

app = typer.Typer(help="Check and show training files.", no_args_is_help=True)

FilesArgument = Annotated[
    list[Path],
    typer.Argument(
        help="Data files or folders: JSONL, a JSON array, CSV, Parquet, text, a Hugging Face dataset folder."
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", help="chat, prompt-completion, alpaca, sharegpt, preference or text; default: found out."),
]
BaseOption = Annotated[str | None, typer.Option(help="Base model whose tokenizer and chat template count.")]
IgnoreOption = Annotated[
    list[str] | None, typer.Option("--ignore-key", help="A top-level key that rows have and training leaves out.")
]


@app.command()
def check(
    files: FilesArgument,
    base: BaseOption = None,
    form: FormatOption = None,
    validation: Annotated[Path | None, typer.Option(help="Validation file; compared with the training rows.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=8, help="Tokens of a row; default: the base's context length.")
    ] = None,
    ignore_key: IgnoreOption = None,
    shown: Annotated[int, typer.Option(min=0, help="Findings of each kind to print.")] = 5,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the whole account to this file; - prints it instead.")
    ] = None,
) -> None:
    """Everything about training files before a run. Exit code 1 if they may not train as they are.

    Without --base no tokens are counted and no chat template is tried.
    """
    from tune.data.account import check_data
    from tune.data.report import as_json, lines

    if max_tokens is not None and base is None:
        raise InvalidRequestError(
            "--max-tokens needs --base: each base counts tokens in its own way", param="max_tokens"
        )
    tokenizer, context_tokens = _load_tokenizer(base) if base is not None else (None, None)
    account = check_data(
        files,
        validation=validation,
        named=_format(form),
        ignored_keys=tuple(ignore_key or ()),
        tokenizer=tokenizer,
        max_tokens=max_tokens or context_tokens,
    )
    text = json.dumps(as_json(account), indent=1, ensure_ascii=False)
    if str(json_file) == "-":
        typer.echo(text)
    else:
        for line in lines(account, shown_per_kind=shown):
            typer.echo(line)
        if json_file is not None:
            _write(json_file, text)
    raise typer.Exit(0 if account.may_train else 1)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A data file or folder.")],
    row: Annotated[
        int | None, typer.Option(min=1, help="Only the row with this line; default: the first rows.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show where --row is not given.")] = 3,
    base: BaseOption = None,
    form: FormatOption = None,
    ignore_key: IgnoreOption = None,
    plain: Annotated[bool, typer.Option(help="Mark trained spans with [[ ]] instead of colours.")] = False,
) -> None:
    """Print rows as training sees them, with the trained tokens told apart."""
    from tune.data.datafile import open_data
    from tune.data.show import labelled_examples, pieces

    tokenizer, _ = _load_tokenizer(base or read_settings().model)
    data = open_data(file, named=_format(form), ignored_keys=tuple(ignore_key or ()))
    console = plain_console()
    console.print(f"{file}: {data.sentence()}")
    found = labelled_examples(data, tokenizer)
    chosen = islice(found, rows) if row is None else ((line, examples) for line, examples in found if line == row)
    is_empty = True
    for line, examples in islice(chosen, rows if row is None else 1):
        is_empty = False
        for label, example in examples:
            head = f"line {line}, {label}: {len(example.token_ids)} tokens, {example.num_trained} trained"
            console.print(Text(head, style="" if plain else "bold"))
            console.print(_marked(list(pieces(example, tokenizer))) if plain else _coloured(pieces(example, tokenizer)))
    if is_empty:
        raise InvalidRequestError(f"{file} has no row that begins on line {row}", param="row")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", "utf-8")
    except OSError as error:
        raise InvalidRequestError(
            f"--json {path} cannot be written: {error.strerror}; name a file in a directory of yours", param="json"
        ) from error


def _coloured(parts: Any) -> Text:
    """Trained tokens green, every other one underlined, so that the borders of tokens can be seen."""
    text = Text()
    for number, (piece, trained) in enumerate(parts):
        text.append(piece, style=("green" if trained else "bright_black") + (" underline" if number % 2 else ""))
    return text


def _marked(parts: list[tuple[str, bool]]) -> Text:
    text = ""
    for number, (piece, trained) in enumerate(parts):
        was_trained = number > 0 and parts[number - 1][1]
        text += ("[[" if trained and not was_trained else "]]" if was_trained and not trained else "") + piece
    return Text(text + ("]]" if parts and parts[-1][1] else ""))


def _format(given: str | None) -> Format | None:
    from tune.data.formats import FORMATS

    for form in FORMATS:
        if form == given:
            return form
    if given is not None:
        raise InvalidRequestError(f"--format={given!r} is no row format; allowed: {', '.join(FORMATS)}", param="format")
    return None


def _load_tokenizer(reference: str) -> tuple[Any, int | None]:
    """The base's tokenizer and context length."""
    from registry import Registry, locate_base_model
    from tune.data.tokenizer import context_tokens, load_tokenizer

    directory = read_settings().registry_path
    located: BaseModel = locate_base_model(
        reference, Registry(directory, read_only=True) if directory.is_dir() else None
    )
    return load_tokenizer(located.path), context_tokens(located.path)
