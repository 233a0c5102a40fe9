"""Memory that a CPU engine takes late, and then keeps: the pages of its KV cache, and oneDNN's compiled kernels."""

from __future__ import annotations

import asyncio

import aiohttp

from tests.e2e.service import Service
from tests.soak.observe import samples

_PROMPT_TOKENS = 900
_NUM_CLIENTS = 6


async def use_the_whole_kv_cache(service: Service) -> None:
    """The system gives a CPU engine its KV cache page by page, when a block is used for the first time; what it takes
    for that would be counted as growth otherwise."""
    [cache] = [dict(labels) for name, labels in samples(service) if name == "vllm:cache_config_info"]
    num_prompts = 2 * int(cache["num_gpu_blocks"]) * int(cache["block_size"]) // _PROMPT_TOKENS
    numbers = iter(range(num_prompts))
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as session:

        async def one_client() -> None:
            for number in numbers:
                prompt = [1 + (number + place * place) % 200 for place in range(_PROMPT_TOKENS)]
                body = {"model": "capo-tiny", "prompt": prompt, "max_tokens": 1}
                async with session.post(f"{service.url}/v1/completions", json=body) as response:
                    assert response.status == 200, await response.text()

        await asyncio.gather(*(one_client() for _ in range(_NUM_CLIENTS)))


async def use_every_prompt_length(service: Service) -> None:
    """oneDNN keeps the last 1,024 kernels that it compiled, and a prompt of a new length needs new ones: 480 MB for 800
    lengths of capo-tiny, and nothing for the same lengths again (ONEDNN_PRIMITIVE_CACHE_CAPACITY=64: 70 MB)."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as session:
        for length in range(1, 800):
            prompt = [1 + (7 * length + place) % 200 for place in range(length)]
            body = {"model": "capo-tiny", "prompt": prompt, "max_tokens": 1}
            async with session.post(f"{service.url}/v1/completions", json=body) as response:
                assert response.status == 200, await response.text()
