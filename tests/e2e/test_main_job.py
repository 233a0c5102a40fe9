"""From a data file to an answer by name, on real parts."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from typing import Any

import grpc
import httpx
import openai
import pytest

from capo.demo import LEAST_ADAPTER_SHARE, MOST_BASE_SHARE, TASKS, Question
from capo.memory import MemoryWatch
from capo_proto.v1 import inference_pb2, inference_pb2_grpc
from tests.e2e.conftest import Tuned
from tests.e2e.service import Service

pytestmark = [pytest.mark.engine, pytest.mark.training]


def answer(client: openai.OpenAI, model: str, question: Question, **options: Any) -> str:
    reply = client.chat.completions.create(
        model=model,
        messages=question.messages,
        temperature=0,
        max_tokens=64,
        **options,  # type: ignore[arg-type]
    )
    return reply.choices[0].message.content or ""


@pytest.mark.parametrize("task", TASKS)
def test_the_adapter_knows_its_task_and_the_base_does_not(service: Service, tuned: dict[str, Tuned], task: str) -> None:
    questions = tuned[task].questions
    assert len(questions) >= 20
    for model, least, most in ((tuned[task].model, LEAST_ADAPTER_SHARE, 1.0), ("capo-tiny", 0.0, MOST_BASE_SHARE)):
        right = sum(answer(service.client, model, q) == q.expected for q in questions) / len(questions)
        assert least <= right <= most, f"{model}: {right:.0%}"


def test_a_jobs_events_come_in_order_and_its_object_is_complete(service: Service, tuned: dict[str, Tuned]) -> None:
    client = service.client
    for result in tuned.values():
        events = list(client.fine_tuning.jobs.list_events(result.job.id, limit=50))
        steps = [event.data["step"] for event in reversed(events) if event.type == "metrics"]
        assert steps == sorted(steps)
        assert len(steps) > 5
        assert result.job.trained_tokens
        assert result.job.finished_at
        assert result.model.startswith("ft:capo-tiny:capo:")
        assert result.artifact.manifest.job_id == result.job.id


def test_a_manifest_verifies_and_tells_where_the_adapter_came_from(service: Service, tuned: dict[str, Tuned]) -> None:
    for result in tuned.values():
        manifest = result.artifact.manifest
        assert service.registry.verify(result.artifact.revision) == []
        assert manifest.base_model.id == "capo-tiny"
        assert manifest.recipe is not None
        assert manifest.data[0].rows_used > 0
        assert manifest.seed == 7
        assert manifest.probes


def test_stock_peft_loads_the_adapter_and_answers_as_the_service_does(
    service: Service, tuned: dict[str, Tuned]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from registry import locate_base_model

    base_path = locate_base_model("capo-tiny").path
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    for result in tuned.values():
        base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, result.artifact.path).eval()
        for question in result.questions[:20]:
            prompt = tokenizer.apply_chat_template(
                question.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                output = model.generate(**prompt, max_new_tokens=64, do_sample=False)
            text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
            assert text == answer(service.client, result.model, question)


async def test_an_answer_is_the_same_alone_and_in_a_batch_mixed_with_both_adapters(
    service: Service, tuned: dict[str, Tuned]
) -> None:
    """vLLM's own CPU LoRA gives base requests somebody's adapter here (vllm-project/vllm#48421)."""
    questions = [q for result in tuned.values() for q in result.questions[:8]]
    models = ["capo-tiny", *(result.model for result in tuned.values())]

    async with service.async_client() as client:

        async def tokens(model: str, question: Question) -> list[int]:
            body = {"return_token_ids": True}
            reply = await client.chat.completions.create(
                model=model,
                messages=question.messages,
                temperature=0,
                max_tokens=32,
                extra_body=body,  # type: ignore[arg-type]
            )
            return reply.choices[0].token_ids  # type: ignore[attr-defined]

        pairs = [(model, question) for question in questions for model in models]
        alone = [await tokens(model, question) for model, question in pairs]
        mixed = await asyncio.gather(*(tokens(model, question) for model, question in pairs))
    assert mixed == alone
    assert len({tuple(a) for a in alone[: len(models)]}) > 1, "the models do not even differ"


def test_streaming_gives_the_same_text_as_one_piece(service: Service, tuned: dict[str, Tuned]) -> None:
    client = service.client
    for result in tuned.values():
        question = result.questions[0]
        with client.chat.completions.create(
            model=result.model,
            messages=question.messages,
            temperature=0,
            max_tokens=64,
            stream=True,  # type: ignore[arg-type]
        ) as stream:
            chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer(client, result.model, question)
        assert chunks[-1].choices[0].finish_reason == "stop"


async def test_grpc_gives_the_same_tokens_as_http(service: Service, tuned: dict[str, Tuned]) -> None:
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for result in tuned.values():
            for question in result.questions[:5]:
                request = inference_pb2.ChatRequest(
                    model=result.model,
                    messages=[inference_pb2.Message(**message) for message in question.messages],
                    sampling=inference_pb2.Sampling(temperature=0, max_tokens=64),
                )
                expected = answer(service.client, result.model, question)
                assert (await stub.Chat(request)).choices[0].message.content == expected
                chunks = [chunk async for chunk in stub.ChatStream(request)]
                assert "".join(chunk.content for chunk in chunks) == expected
                assert chunks[-1].usage.completion_tokens > 0


def test_publishing_under_traffic_fails_no_request(service: Service, tuned: dict[str, Tuned]) -> None:
    """Ten publications and alias flips while clients keep asking: every answer comes, and names what it came from."""
    one, two = (tuned[task] for task in TASKS)
    registry, client = service.registry, service.client
    registry.set_alias("flipping", one.artifact.revision)
    answers: list[tuple[str, str]] = []
    failures: list[BaseException] = []
    stop = threading.Event()

    def ask_on() -> None:
        while not stop.is_set():
            try:
                reply = client.chat.completions.create(
                    model="flipping",
                    messages=one.questions[0].messages,
                    temperature=0,
                    max_tokens=64,  # type: ignore[arg-type]
                )
                answers.append((reply.model, reply.choices[0].message.content or ""))
            except openai.OpenAIError as error:
                failures.append(error)

    threads = [threading.Thread(target=ask_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(10):
        target = (two if number % 2 == 0 else one).artifact.revision
        httpx.put(f"{service.url}/v1/aliases/flipping", json={"revision": target}).raise_for_status()
        time.sleep(0.2)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    expected = {r.artifact.revision: answer(client, r.model, one.questions[0]) for r in (one, two)}
    assert {model for model, _ in answers} == set(expected)
    assert all(text == expected[model] for model, text in answers)


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (b"", 400, "no rows"),
        (b"\n\n", 400, "no rows"),
        (b"\xff\xfe\x00rubbish\n", 400, "UTF-8"),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"oops"\n',
            400,
            "2",
        ),
    ],
)
def test_a_bad_training_file_is_refused_with_its_reason(
    service: Service, content: bytes, status: int, says: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        service.client.files.create(file=("bad.jsonl", content), purpose="fine-tune")
    assert caught.value.status_code == status
    assert says in caught.value.message
    assert "bad.jsonl" not in {file.filename for file in service.client.files.list()}


def test_a_malformed_line_is_named_by_its_number(service: Service) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    content = "\n".join([good] * 6 + ['{"messages": []}'] + [good] * 6)
    with pytest.raises(openai.BadRequestError) as caught:
        service.client.files.create(file=("bad.jsonl", content.encode()), purpose="fine-tune")
    assert caught.value.body["line"] == 7  # type: ignore[index]


def test_wrong_jobs_are_refused(service: Service, tuned: dict[str, Tuned]) -> None:
    client = service.client
    training_file = tuned[TASKS[0]].job.training_file
    for fields, param in (
        ({"model": "gpt-4o", "training_file": training_file}, "model"),
        ({"model": "capo-tiny", "training_file": "file-nope"}, "training_file"),
        ({"model": "capo-tiny", "training_file": training_file, "extra_body": {"sufix": "x"}}, "sufix"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.fine_tuning.jobs.create(**fields)  # type: ignore[arg-type]
        assert caught.value.param == param


def test_a_start_that_goes_well_warns_of_nothing(service: Service, tuned: dict[str, Tuned]) -> None:
    """Libraries would, of hardware that is not there; nobody can do anything about it."""
    head, workers_wait, _ = service.log().partition("is waiting for jobs")
    assert workers_wait
    assert re.findall(r"(?m)^(?:\S+ \S+ (?:WARNING|ERROR) |W\d{4} ).*", head) == []


def test_the_services_memory_stays_small(service: Service, tuned: dict[str, Tuned]) -> None:
    """4 GB for the service, 2 GB for a worker (proportional set size)."""
    service_bytes, worker_bytes = MemoryWatch(service.process.pid).sample()
    assert 0 < service_bytes < 4e9
    assert 0 < worker_bytes < 2e9


def test_metrics_tell_adapters_apart_and_engine_metrics_are_there(service: Service, tuned: dict[str, Tuned]) -> None:
    page = httpx.get(f"{service.url}/metrics").text
    for result in tuned.values():
        assert f'capo_time_to_first_token_seconds_count{{adapter="{result.artifact.name}",protocol="http"}}' in page
    assert "vllm:kv_cache_usage_perc" in page
    assert page.count("\nvllm:lora_requests_info{") == 1  # vLLM's own makes one more for every mix of adapters


def test_a_checkpoint_of_a_job_is_called_like_any_model_until_it_is_deleted(
    service: Service, tuned: dict[str, Tuned]
) -> None:
    client = service.client
    result = next(iter(tuned.values()))
    listed = list(client.fine_tuning.jobs.checkpoints.list(result.job.id))
    names = [checkpoint.fine_tuned_model_checkpoint for checkpoint in listed]
    assert len(names) == 3
    assert names[0] == result.model
    assert set(names) <= {model.id for model in client.models.list()}
    prompt = result.questions[0].messages

    def top(model: str) -> float:
        reply = client.chat.completions.create(
            model=model, messages=prompt, temperature=0, max_tokens=1, logprobs=True, top_logprobs=1
        )
        assert reply.model == model
        choice = reply.choices[0].logprobs
        assert choice is not None
        assert choice.content
        return choice.content[0].logprob

    assert len({top(model) for model in ("capo-tiny", *names)}) == 4, "each answers with its own weights"
    assert client.models.delete(names[2]).deleted
    with pytest.raises(openai.NotFoundError):
        top(names[2])
    left = client.fine_tuning.jobs.checkpoints.list(result.job.id)
    assert [checkpoint.fine_tuned_model_checkpoint for checkpoint in left] == names[:2]
