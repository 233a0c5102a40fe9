"""Run an engine, poison it with a NaN adapter, and print what later requests get. Used by test_engine_repairs.py.

Before it is poisoned, adapters come and go in it (engine_ids.py). Afterwards it is asked for log probabilities and for
seeded answers to prompts of several steps, and the repaired one is held to what every engine promises
(engine_contract.py): engines of their own would cost their starts.

python tests/serve/engine_runs.py FOLDER {repaired,stock}
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any


def make_adapters(folder: Path, base_path: Path) -> None:
    """``good``: small random weights. ``nan``: the same with one NaN, which no gate of ours would let through.
    ``head``: on the head too.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_path), LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    for name in ("good", "nan"):
        model.save_pretrained(folder / name)
    path = folder / "nan" / "adapter_model.safetensors"
    weights = {key: value.clone() for key, value in load_file(path).items()}
    shutil.copytree(folder / "good", folder / "head")
    head = "base_model.model.lm_head.lora_{}.weight"
    sizes = {head.format("A"): (8, model.config.hidden_size), head.format("B"): (model.config.vocab_size, 8)}
    of_head = weights | {name: torch.randn(size) * 0.3 for name, size in sizes.items()}
    save_file(of_head, folder / "head" / path.name)
    config = json.loads((folder / "head" / "adapter_config.json").read_text())
    config["target_modules"].append("lm_head")
    (folder / "head" / "adapter_config.json").write_text(json.dumps(config))
    next(value for key, value in weights.items() if "v_proj.lora_B" in key).fill_(float("nan"))
    save_file(weights, path)


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    from serve import engine_process

    if mode == "stock":
        engine_process.ENABLE_VARIABLE = "CAPO_NOTHING"  # so the plugin finds itself not asked for
    engine_process.prepare(engine_threads=1, use_gpu=False)
    from registry import locate_base_model
    from registry.errors import EngineDeadError
    from serve.engine import VllmEngine
    from serve.engine_api import Call, Endpoint, EngineAdapter
    from tests.serve.engine_contract import Subject, broken_promises, no_hold
    from tests.serve.engine_ids import compare

    base = locate_base_model("capo-tiny")
    base_path = base.path
    if not (folder / "nan").exists():
        make_adapters(folder, base_path)

    def subject(engine: VllmEngine) -> Subject:
        one, other = [EngineAdapter(f"good@{number}", 100 + number, folder / "good") for number in range(2)]
        # Made by engine_ids.py; shapes that show when the weights are copied.
        return Subject(engine, (one, other), EngineAdapter("broken@0", 102, folder / "broken4"), no_hold)

    async def run() -> None:
        arguments = ["--enable-lora", "--max-loras", "2", "--enforce-eager", "--no-enable-prefix-caching"]
        arguments += ["--kv-cache-memory-bytes", str(8 << 20)]  # about 20 blocks, so every block is used again
        arguments += [
            "--max-num-seqs",
            "64",
            "--max-num-batched-tokens",
            "128",
        ]  # so that long prompts take several steps
        engine = VllmEngine(str(base_path), "capo-tiny", arguments)
        await engine.start()

        async def ask(adapter: EngineAdapter | None, prompt: str) -> str:
            body = {"prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
            call = Call(Endpoint.COMPLETION, body, adapter, "x", "request")
            return json.loads(await engine.complete(call))["choices"][0]["text"]

        async def ask_for_logprobs() -> dict[str, Any] | None:
            """``None``: the engine died of it."""
            body = {"prompt": "The mill", "max_tokens": 2, "temperature": 0, "logprobs": 2, "prompt_logprobs": 1}
            try:
                answer = await engine.complete(Call(Endpoint.COMPLETION, body, None, "x", "logprobs"))
            except EngineDeadError:
                return None
            return json.loads(answer)["choices"][0]

        async def ask_seeded(*prompt_lengths: int) -> list[str] | None:
            """The answers to prompts of so many tokens, asked at once. ``None``: the engine died of it."""

            async def ask(length: int) -> str:
                body = {"prompt": list(range(300, 300 + length)), "max_tokens": 20, "temperature": 1, "seed": 7}
                call = Call(Endpoint.COMPLETION, body | {"ignore_eos": True}, None, "x", f"seeded-{length}")
                return json.loads(await engine.complete(call))["choices"][0]["text"]

            try:
                return await asyncio.gather(*map(ask, prompt_lengths))
            except EngineDeadError:
                return None

        async def prompt_logprobs_beside_two_adapters() -> dict[str, list[Any]]:
            """Of the base and of an adapter on the head: each alone, then all at once while two adapters answer."""
            good, head = (EngineAdapter("good@7", 700, folder / "good"), EngineAdapter("head@7", 701, folder / "head"))
            for adapter in (good, head):
                await engine.load_adapter(adapter)

            async def of(adapter: EngineAdapter | None, length: int) -> Any:
                body = {"prompt": list(range(300, 300 + length)), "max_tokens": 1, "temperature": 0}
                call = Call(Endpoint.COMPLETION, body | {"prompt_logprobs": 0}, adapter, "x", f"prompt-{length}")
                found = json.loads(await engine.complete(call))["choices"][0]["prompt_logprobs"][1:]
                return [round(next(iter(each.values()))["logprob"], 3) for each in found]

            asked = [(None, 7), (head, 9), (None, 200), (head, 201), (good, 11)]
            alone = [await of(*each) for each in asked]
            busy = [asyncio.create_task(ask(adapter, "In the village")) for adapter in (good, head, None)]
            await asyncio.sleep(0.02)
            beside = await asyncio.gather(*(of(*each) for each in asked))
            await asyncio.gather(*busy)
            for adapter in (good, head):
                await engine.unload_adapter(adapter)
            return {"alone": alone, "beside": beside}

        ids = await compare(engine, base, folder) if mode == "repaired" else []
        prompts = [f"{number} In the village there is a" for number in range(24)]
        before = [await ask(None, prompt) for prompt in prompts]
        nan = EngineAdapter("nan@0", 1, folder / "nan")
        await engine.load_adapter(nan)
        await asyncio.gather(*(ask(nan, prompt) for prompt in prompts))
        await engine.unload_adapter(nan)
        after = [await ask(None, prompt) for prompt in prompts]
        logprobs = await ask_for_logprobs()
        if engine.is_dead:
            await engine.kill()
            await engine.start()
        # Steps take 128 tokens: alone the prompt is cut into 128 and 72, behind the longer one into 24, 128 and 48.
        seeded = [await ask_seeded(200), await ask_seeded(1000, 200)]
        prompt_logprobs = await prompt_logprobs_beside_two_adapters() if mode == "repaired" else {}
        promises = await broken_promises(subject(engine)) if mode == "repaired" else {}
        found = {"before": before, "after": after, "ids": ids, "logprobs": logprobs, "seeded": seeded}
        found["prompt_logprobs"] = prompt_logprobs
        print(json.dumps(found | {"promises": promises}))
        await engine.stop(2)

    asyncio.run(run())


if __name__ == "__main__":
    main()
