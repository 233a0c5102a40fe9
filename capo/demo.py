"""``capo demo``: the main job end to end, on real parts, as a user would do it with the stock ``openai`` SDK.

Starts the service on free ports with a fresh data folder, uploads two training files, creates two jobs, follows them,
then asks the base model and both adapters the same held-out questions. Succeeds only if each adapter learned its task
and the base model knows neither.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import openai
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from capo.memory import MemoryWatch
from registry import ManifestDraft, Registry, errors

TASKS = ("support", "crier")
NUM_QUESTIONS = 24
LEAST_ADAPTER_SHARE = 0.9
MOST_BASE_SHARE = 0.1
EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "tasks"
_START_SECONDS = 180.0
_JOB_SECONDS = 600.0
_READY = re.compile(r"Capo is ready at (http://\S+) after ([0-9.]+) s")

console = Console(markup=False, emoji=False)  # models may answer anything


@dataclass(slots=True)
class Report:
    """What the demo measured; printed at its end."""

    start_seconds: float = 0.0
    first_step_seconds: float = 0.0
    job_seconds: dict[str, float] = field(default_factory=dict)
    publish_to_token_seconds: float = 0.0
    service_peak_bytes: int = 0
    worker_peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    messages: list[dict[str, str]]
    """Without the last assistant turn."""
    expected: str


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    seconds: float


def run_demo() -> int:
    """Run it; returns the exit code: 0 only if both adapters learned and the base model did not.

    Raises:
        NotFoundError: the example data is not there (an installed wheel does not carry it; use a checkout).
    """
    if not EXAMPLES.is_dir():
        raise errors.NotFoundError(f"The demo needs the example data in {EXAMPLES}; run it from a checkout.")
    report = Report()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="capo-demo-") as folder:
        data_dir = Path(folder)
        with _service(data_dir, report) as (url, watch):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="not-needed-yet", max_retries=0, timeout=60)
            models = _tune(client, report)
            learned = _compare(client, models)
            report.publish_to_token_seconds = _publish_to_first_token(client, data_dir, models[TASKS[0]])
            report.service_peak_bytes, report.worker_peak_bytes = watch.service_peak, watch.worker_peak
    _print_report(report, time.monotonic() - began)
    if learned:
        console.print("The demo succeeded.", style="bold green")
    else:
        console.print("The demo failed: see above.", style="bold red")
    return 0 if learned else 1


@contextlib.contextmanager
def _service(data_dir: Path, report: Report) -> Iterator[tuple[str, MemoryWatch]]:
    """A running service and a watch on its memory; ended with SIGTERM."""
    console.rule("1. Start the service")
    log_path = data_dir / "service.log"
    command = [
        sys.executable,
        "-m",
        "capo",
        "serve",
        "--port",
        "0",
        "--grpc-port",
        "0",
        "--data-dir",
        str(data_dir),
    ]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        url = _wait_ready(process, report, log_path)
        with MemoryWatch(process.pid) as watch:
            yield url, watch
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_ready(process: subprocess.Popen[str], report: Report, log_path: Path) -> str:
    assert process.stdout is not None
    watchdog = threading.Timer(_START_SECONDS, process.kill)  # the loop below then ends with the output
    watchdog.start()
    for line in process.stdout:
        console.print(f"  {line.rstrip()}", highlight=False)
        if match := _READY.search(line):
            report.start_seconds = float(match[2])
            watchdog.cancel()
            return match[1]
    watchdog.cancel()
    raise errors.UnavailableError(f"The service did not start:\n{log_path.read_text()[-4000:]}")


def _tune(client: openai.OpenAI, report: Report) -> dict[str, str]:
    """Upload, create and follow one job per task; returns each task's model name."""
    console.rule("2. Upload the data and create two jobs")
    jobs: dict[str, str] = {}
    created_at = time.monotonic()
    for task in TASKS:
        uploaded = client.files.create(file=EXAMPLES / task / "train.jsonl", purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="capo-tiny", training_file=uploaded.id, suffix=task, seed=7)
        console.print(f"  {task}: file {uploaded.id} ({uploaded.bytes:,} bytes) -> job {job.id}", highlight=False)
        jobs[task] = job.id
    console.rule("3. Follow the jobs")
    models: dict[str, str] = {}
    with Progress(
        TextColumn("  {task.description:8}"), BarColumn(), TextColumn("{task.fields[state]}"), console=console
    ) as progress:
        bars = {task: progress.add_task(task, total=1.0, state="queued") for task in TASKS}
        for task in TASKS:
            models[task] = _follow(client, jobs[task], progress, bars[task], created_at, report)
            report.job_seconds[task] = time.monotonic() - created_at
    return models


def _follow(
    client: openai.OpenAI, job_id: str, progress: Progress, bar: TaskID, created_at: float, report: Report
) -> str:
    deadline = time.monotonic() + _JOB_SECONDS
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job_id)
        newest = client.fine_tuning.jobs.list_events(job_id, limit=1).data
        state = newest[0].message if newest else job.status
        if newest and newest[0].type == "metrics" and isinstance(newest[0].data, dict):
            if not report.first_step_seconds:
                report.first_step_seconds = time.monotonic() - created_at
            done = newest[0].data["step"] / newest[0].data["total_steps"]
            progress.update(bar, completed=done, state=state)
        if job.status == "succeeded" and job.fine_tuned_model is not None:
            progress.update(bar, completed=1.0, state=f"succeeded: {job.fine_tuned_model}")
            return job.fine_tuned_model
        if job.status in ("failed", "cancelled"):
            raise errors.InternalError(f"job {job_id} {job.status}: {job.error.message if job.error else state}")
        time.sleep(0.1)
    raise errors.UnavailableError(f"job {job_id} took longer than {_JOB_SECONDS:g} s")


def _compare(client: openai.OpenAI, models: dict[str, str]) -> bool:
    """Ask everybody the same held-out questions. Returns whether the adapters know and the base does not."""
    console.rule("4. The same held-out questions to the base model and to both adapters")
    everybody = {"capo-tiny": "capo-tiny", **models}
    learned = True
    for task in TASKS:
        questions = read_questions(EXAMPLES / task / "held_out.jsonl", NUM_QUESTIONS)
        answers = {name: [_ask(client, model, q) for q in questions] for name, model in everybody.items()}
        _print_side_by_side(task, questions, answers)
        right = {
            name: sum(a.text == q.expected for a, q in zip(given, questions, strict=True)) / len(questions)
            for name, given in answers.items()
        }
        for name, share in right.items():
            seconds = sum(a.seconds for a in answers[name]) / len(questions)
            console.print(f"  {name:10} {share:6.1%} right, {seconds * 1000:.0f} ms an answer", highlight=False)
        learned &= right[task] >= LEAST_ADAPTER_SHARE and right["capo-tiny"] <= MOST_BASE_SHARE
    return learned


def read_questions(path: Path, limit: int) -> list[Question]:
    """The first ``limit`` held-out rows of a chat file, each split into what is asked and what should come."""
    questions = []
    for line in path.read_text(encoding="utf-8").splitlines()[:limit]:
        messages = json.loads(line)["messages"]
        questions.append(Question(messages[:-1], messages[-1]["content"]))
    return questions


def _ask(client: openai.OpenAI, model: str, question: Question) -> Answer:
    began = time.monotonic()
    reply = client.chat.completions.create(
        model=model,
        messages=question.messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=64,
    )
    return Answer(reply.choices[0].message.content or "", time.monotonic() - began)


def _print_side_by_side(task: str, questions: list[Question], answers: dict[str, list[Answer]]) -> None:
    table = Table("question", "expected", *answers, title=f"{task}: 4 of {len(questions)} questions", show_lines=True)
    for index in range(4):
        texts = [given[index].text for given in answers.values()]
        table.add_row(questions[index].messages[-1]["content"], questions[index].expected, *texts)
    console.print(table)


def _publish_to_first_token(client: openai.OpenAI, data_dir: Path, model: str) -> float:
    """Publish an adapter under a new name, and time until the service has streamed the first token from it."""
    registry = Registry(data_dir / "registry")
    trained = registry.resolve(model)
    with registry.stage() as staging:
        for name in trained.manifest.files:
            (staging / name).write_bytes((trained.path / name).read_bytes())
        draft_fields = {**trained.manifest.model_dump(), "name": "demo-copy"}
        for only_in_manifest in ("files", "schema_version", "created_at"):
            del draft_fields[only_in_manifest]
        copy = registry.publish(staging, ManifestDraft.model_validate(draft_fields))
    published_at = time.monotonic()
    with client.chat.completions.create(
        model=copy.revision,
        messages=[{"role": "user", "content": "Hello."}],
        temperature=0,
        max_tokens=1,
        stream=True,
    ) as stream:
        next(iter(stream))
    return time.monotonic() - published_at


def _print_report(report: Report, total_seconds: float) -> None:
    console.rule("What was measured")
    table = Table("figure", "value", show_header=False)
    table.add_row("service start to ready", f"{report.start_seconds:.1f} s")
    table.add_row("job created to first optimizer step", f"{report.first_step_seconds:.1f} s")
    for task, seconds in report.job_seconds.items():
        table.add_row(f"jobs created to {task} callable", f"{seconds:.1f} s")
    table.add_row("publish to first routed token", f"{report.publish_to_token_seconds * 1000:.0f} ms")
    table.add_row("service peak memory (PSS)", f"{report.service_peak_bytes / 2**30:.2f} GiB")
    table.add_row("training worker peak memory (PSS)", f"{report.worker_peak_bytes / 2**30:.2f} GiB")
    table.add_row("the whole demo", f"{total_seconds:.1f} s")
    console.print(table)
