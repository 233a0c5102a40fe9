"""Figures of base and tuned model, against closed forms and plain loops; the report; benchmarks by local task file."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from capo.cli import evaluate
from registry import Registry
from registry.errors import InvalidRequestError
from tests.capo.answering import answering
from tests.serve.running import publish
from tests.tune.samples import chat_rows, write_jsonl
from tune.evaluation.comparison import SideBySide
from tune.evaluation.curves import CurveLog, CurvePoint
from tune.evaluation.figures import text_figures, token_f1
from tune.evaluation.promotion import Promotion
from tune.evaluation.report import Report
from tune.progress import StepMetrics


def test_text_figures_are_what_their_definitions_give() -> None:
    answers = ["the cat sat on the mat", "blue ", "no"]
    wanted = ["the cat sat on a mat", "blue", "yes indeed"]
    figures = text_figures(answers, wanted)
    assert figures["exact_match"] == pytest.approx(1 / 3)
    # 5 of 6 words shared both ways; equal; none.
    assert figures["f1"] == pytest.approx((5 / 6 + 1 + 0) / 3)
    # Longest common subsequence 5 of 6; equal; none. Bigrams: 3 of 5; none to count, twice.
    assert figures["rougeL"] == pytest.approx((5 / 6 + 1 + 0) / 3)
    assert figures["rouge2"] == pytest.approx(3 / 5 / 3)
    assert text_figures(wanted, wanted)["bleu"] == pytest.approx(100)
    assert token_f1("a a b", "a b b") == pytest.approx(2 / 3)
    assert token_f1("", "") == 1
    assert token_f1("", "a") == 0


@pytest.fixture(scope="module")
def examples(tokenizer: Any, base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tune.evaluation.rows import read_examples

    path = write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", chat_rows(20))
    return read_examples(path, tokenizer, base_dir, max_rows=20)


@pytest.fixture(scope="module")
def model(base_dir: Path) -> Any:
    from tune.evaluation.loading import load

    return load(base_dir)


def test_loss_and_accuracy_are_those_of_one_row_at_a_time_and_one_token_at_a_time(model: Any, examples: Any) -> None:
    import torch

    from tune.evaluation.scoring import score

    losses, hits = [], []
    for example in examples:
        for place in np.flatnonzero(example.trained):
            with torch.no_grad():
                ids = torch.tensor([example.token_ids[:place].tolist()])
                log_probabilities = model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
            losses.append(-float(log_probabilities[int(example.token_ids[place])]))
            hits.append(int(log_probabilities.argmax()) == example.token_ids[place])
    measured = score(model, examples, batch_size=7)
    assert measured.num_tokens == len(losses)
    assert measured.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert measured.token_accuracy == pytest.approx(sum(hits) / len(hits))
    assert measured.perplexity == pytest.approx(math.exp(measured.loss))


def test_batched_answers_with_a_cache_are_those_of_a_plain_loop_without(model: Any, examples: Any) -> None:
    import torch

    from tune.evaluation.answers import answer
    from tune.evaluation.questions import questions_of

    questions = questions_of(examples, stop_ids=frozenset({2}))
    stop_ids = frozenset({2, 5})
    given = answer(model, questions, stop_ids=stop_ids, max_tokens=6, batch_size=8)
    for question, ids in zip(questions, given.token_ids, strict=True):
        loop: list[int] = []
        while len(loop) < 6 and (not loop or loop[-1] not in stop_ids):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*question.prompt_ids, *loop]])).logits[0, -1]
            loop.append(int(logits.argmax()))
        assert list(ids) == [i for i in loop if i not in stop_ids]
    assert given.tokens_per_second > 0
    assert given.peak_memory_bytes > 50e6


def test_a_question_is_the_text_before_the_answer_and_an_answer_has_no_end_token(tokenizer: Any, examples: Any) -> None:
    from tune.evaluation.questions import questions_of

    question = questions_of(examples, stop_ids=frozenset({tokenizer.eos_token_id}))[3]
    row = chat_rows(4)[3]["messages"]
    assert tokenizer.decode(question.prompt_ids).endswith("<|im_start|>assistant\n")
    assert row[0]["content"] in tokenizer.decode(question.prompt_ids)
    assert tokenizer.decode(question.answer_ids) == row[1]["content"]


def test_the_curve_of_a_resumed_run_counts_a_repeated_step_once_and_survives_a_cut_line(tmp_path: Path) -> None:
    log = CurveLog(tmp_path / "curve.jsonl")
    for stage, step, loss in (("2-sft", 1, 1.0), ("1-cpt", 1, 3.0), ("10-sft", 1, 0.5), ("1-cpt", 1, 2.0)):
        log.on_step(StepMetrics(stage, step, 9, loss, 0.0, None, None, 1e-3, 1.0, 1, 1.0, 1.0))
    with (tmp_path / "curve.jsonl").open("a") as out:
        out.write('{"stage": "10-')
    points = CurveLog(tmp_path / "curve.jsonl").points()
    assert [(p.stage, p.train_loss) for p in points] == [("1-cpt", 2.0), ("2-sft", 1.0), ("10-sft", 0.5)]


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [name for name, _ in attrs]


def test_the_page_stands_alone_and_escapes_what_models_say(tmp_path: Path) -> None:
    report = Report(
        title="support",
        base="capo-tiny",
        rows="Judged on 1 row.",
        figures={"base": {"loss": 2.0}, "tuned": {"loss": 1.0, "exact_match": 1.0}},
        answers=[SideBySide("<script>alert(1)</script>", "<b>", "no", "<b>")],
        curve=[CurvePoint("1-sft", step, 3.0 / step, 2.0 if step == 5 else None) for step in range(1, 6)],
        decision=Promotion("loss < base").decide(base={"loss": 2.0}, tuned={"loss": 1.0}),
    )
    report.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    tags = _Tags()
    tags.feed(page)
    assert not {"script", "link", "img", "iframe", "b"} & set(tags.seen)
    assert not {"src", "href", "onload"} & set(tags.attributes)
    assert tags.seen.count("polyline") == 2
    assert "&lt;script&gt;" in page
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["promotion"]["is_promoted"] is True
    assert document["answers"][0]["is_tuned_right"] is True
    assert document["figures"]["tuned"] == {"loss": 1.0, "exact_match": 1.0}


TASK = """task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: colours.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["red", "blue"]
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
"""


@pytest.mark.filterwarnings("ignore")
def test_a_local_benchmark_scores_a_model_as_its_own_likelihoods_do(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from tune.evaluation.benchmarks import run_on_model
    from tune.evaluation.settings import Benchmark

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"question": f"The {thing} is", "label": i % 2} for i, thing in enumerate(["door", "boat", "hat", "cup"])]
    write_jsonl(tmp_path / "colours.jsonl", rows)
    (tmp_path / "colours.yaml").write_text(TASK)
    benchmarks = [Benchmark(task="colours", file=Path("colours.yaml"))]
    figures = run_on_model(model, tokenizer, benchmarks, tmp_path, batch_size=2)

    def likelihood(question: str, choice: str) -> float:
        prompt, whole = (tokenizer(text)["input_ids"] for text in (question, f"{question} {choice}"))
        with torch.no_grad():
            log_probabilities = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(log_probabilities[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))

    right = 0
    for row in rows:
        scores = [likelihood(str(row["question"]), choice) for choice in ("red", "blue")]
        right += scores.index(max(scores)) == row["label"]
    assert figures["benchmarks.colours.acc"] == right / len(rows)


@pytest.mark.filterwarnings("ignore")
def test_a_benchmark_of_a_service_shows_it_the_key_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    write_jsonl(tmp_path / "colours.jsonl", [{"question": "The door is", "label": "red"}])
    task = TASK.replace("multiple_choice", "generate_until").replace("acc", "exact_match")
    (tmp_path / "colours.yaml").write_text(task.replace('doc_to_choice: ["red", "blue"]\n', ""))
    revision = publish(Registry(tmp_path / "registry"), "support").revision
    app = typer.Typer()
    evaluate.add_to(app)
    arguments = [revision, "--registry", str(tmp_path / "registry"), "--base-model", "capo-tiny"]
    with answering(json.dumps({"choices": [{"index": 0, "text": "red"}]}).encode()) as (url, shown):
        benchmark = ["--endpoint", url, "--benchmark", "colours=colours.yaml"]
        done = CliRunner().invoke(app, [*arguments, *benchmark], env={"CAPO_API_KEY": "capo_1_2"})
    assert done.exit_code == 0, done.exception
    assert "1.0000" in done.stdout
    assert set(shown) == {"Bearer capo_1_2"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TASK + "process_docs: !function utils.process\n", "code of its own"),
        (TASK.replace("task: colours", "task: other"), "no line 'task: colours'"),
    ],
)
def test_a_task_file_that_brings_code_or_another_name_is_refused_before_it_is_loaded(
    tmp_path: Path, text: str, reason: str
) -> None:
    from tune.evaluation.benchmarks import check
    from tune.evaluation.settings import Benchmark

    (tmp_path / "colours.yaml").write_text(text)
    with pytest.raises(InvalidRequestError, match=reason):
        check([Benchmark(task="colours", file=Path("colours.yaml"))], tmp_path)
