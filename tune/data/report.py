"""The account of training files as a person reads it, and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from tune.data.account import Account, FileAccount, Finding

_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


def lines(account: Account, *, shown_per_kind: int) -> Iterator[str]:
    """The report, with the first findings of each kind."""
    for file in account.files:
        yield f"{file.path}: {file.container} of {file.format} rows ({file.why}), {file.use}"
        yield f"  {_rows_sentence(file)}"
    yield from _balance(account.files)
    yield from _contents(account)
    yield from _findings("faults, which stop training", account.faults, shown_per_kind)
    yield from _findings("warnings", account.warnings, shown_per_kind)
    if account.may_train:
        yield "may train: yes"
    else:
        why = f"{len(account.faults)} rows have faults" if account.faults else "no row is left to train on"
        yield f"may train: no, {why}"


def as_json(account: Account) -> dict[str, Any]:
    """Everything, with every finding."""
    has_tokens = bool(account.token_lengths)
    return {
        "may_train": account.may_train,
        "max_tokens": account.max_tokens,
        "files": [{**asdict(file), "used_rows": file.used_rows} for file in account.files],
        "messages_by_role": dict(account.roles),
        "rows_by_assistant_turns": {str(turns): count for turns, count in sorted(account.turns.items())},
        "rows_with_system_message": account.rows_with_system,
        "rows_with_tools": account.rows_with_tools,
        "tool_calls": account.tool_calls,
        "messages_with_weight_0": account.messages_with_weight_0,
        "rows_by_personal_data": dict(account.personal_data),
        "repeats": dict(account.repeats),
        "token_length_quantiles": {f"{q:g}": account.quantile(q) for q in _QUANTILES} if has_tokens else None,
        "faults_by_kind": dict(_by_kind(account.faults)),
        "warnings_by_kind": dict(_by_kind(account.warnings)),
        "faults": [asdict(finding) for finding in account.faults],
        "warnings": [asdict(finding) for finding in account.warnings],
    }


def _rows_sentence(file: FileAccount) -> str:
    text = f"{file.rows:,} rows: {file.used_rows:,} used"
    if file.truncated_rows:
        text += f" ({file.truncated_rows:,} of them truncated)"
    if file.dropped_rows:
        text += f", {file.dropped_rows:,} dropped as over-long"
    if file.faulty_rows:
        text += f", {file.faulty_rows:,} faulty"
    if file.total_tokens:
        text += f"; {file.total_tokens:,} tokens, {file.trained_tokens:,} of them trained"
    return text


def _balance(files: Sequence[FileAccount]) -> Iterator[str]:
    training = [file for file in files if file.use == "training"]
    if len(training) < 2:
        return
    rows, tokens = sum(f.used_rows for f in training), sum(f.trained_tokens for f in training)
    for file in training:
        text = f"  {file.path}: {file.used_rows / max(1, rows):.1%} of the rows"
        yield text + (f", {file.trained_tokens / tokens:.1%} of the trained tokens" if tokens else "")


def _contents(account: Account) -> Iterator[str]:
    if account.roles:
        yield f"messages: {_counted(account.roles)}"
        turns = ", ".join(f"{count:,} rows with {number}" for number, count in sorted(account.turns.items())[:8])
        yield f"assistant turns: {turns}{', ...' if len(account.turns) > 8 else ''}"
        yield (
            f"system message in {account.rows_with_system:,} rows, tools in {account.rows_with_tools:,}, "
            f"{account.tool_calls:,} tool calls, {account.messages_with_weight_0:,} answers with weight 0"
        )
    if account.token_lengths:
        shown = ", ".join(f"{_name(q)} {account.quantile(q):,}" for q in _QUANTILES)
        yield f"tokens in a row: {shown}; limit {account.max_tokens if account.max_tokens is not None else 'none'}"
    else:
        yield "tokens: not counted; name a base with --base"
    if account.repeats:
        yield f"rows that repeat another: {_counted(account.repeats)}"
    if account.personal_data:
        yield f"rows with personal data: {_counted(account.personal_data)}"


def _findings(title: str, findings: Sequence[Finding], shown_per_kind: int) -> Iterator[str]:
    if not findings:
        yield f"no {title}"
        return
    yield f"{len(findings):,} {title}:"
    for kind, count in _by_kind(findings).most_common():
        yield f"  {kind}: {count:,}"
        of_kind = [finding for finding in findings if finding.kind == kind]
        for finding in of_kind[:shown_per_kind]:
            reason = finding.reason.removeprefix(f"line {finding.line}: ")
            yield f"    {finding.file} line {finding.line}: {reason}"
        if count > shown_per_kind:
            yield f"    and {count - shown_per_kind:,} more; --json FILE lists them all"


def _by_kind(findings: Sequence[Finding]) -> Counter[str]:
    return Counter(finding.kind for finding in findings)


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counter.most_common())


def _name(quantile: float) -> str:
    return {0.0: "shortest", 0.5: "median", 1.0: "longest"}.get(quantile, f"{quantile:.0%} up to")
