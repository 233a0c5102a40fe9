"""The CPU LoRA kernels against the definition of LoRA, row by row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

cpu_lora = pytest.importorskip("serve.vllm_plugin.cpu_lora", reason="needs vLLM's CPU build")

NUM_SLOTS, RANK, NUM_IN = 3, 4, 8
WIDTHS = (6, 2, 4)


def wrapper_for(slots: list[int]):
    """A wrapper as the engine leaves it after ``update_metadata`` for tokens in these slots (-1: no adapter)."""
    wrapper = cpu_lora.CapoPunicaWrapperCPU(max_num_batched_tokens=1024, max_batches=1024, device="cpu")
    mapping = SimpleNamespace(
        index_mapping=tuple(slot + 1 for slot in slots),
        prompt_mapping=tuple(slot + 1 for slot in slots),
        is_prefill=False,
    )
    # vLLM 0.32 counts one slot more here than the stacked weights have (worker_manager: max_loras + 1).
    wrapper.update_metadata(mapping, list(range(1, NUM_SLOTS + 1)), NUM_SLOTS + 1, 100)
    return wrapper


def by_definition(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: list[int]) -> torch.Tensor:
    """``x @ A.T @ B.T`` for each row with its own adapter, nothing for rows without one."""
    out = torch.zeros(len(slots), b.shape[2])
    for row, slot in enumerate(slots):
        if slot >= 0:
            out[row] = x[row] @ a[slot, 0].T @ b[slot, 0].T
    return out


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, NUM_SLOTS - 1), min_size=1, max_size=20), st.integers(0, 2**31), st.booleans())
def test_each_row_gets_its_own_adapter_and_rows_without_one_get_nothing(
    slots: list[int], seed: int, is_long: bool
) -> None:
    if is_long:  # more rows than a small step: the other way of computing
        slots = slots * 40
    torch.manual_seed(seed)
    x = torch.randn(len(slots), NUM_IN)
    a = tuple(torch.randn(NUM_SLOTS, 1, RANK, NUM_IN) for _ in WIDTHS)
    b = tuple(torch.randn(NUM_SLOTS, 1, width, RANK) for width in WIDTHS)
    y = torch.randn(len(slots), sum(WIDTHS))
    expected = y + torch.cat([by_definition(x, a[i], b[i], slots) for i in range(len(WIDTHS))], dim=1)
    wrapper_for(slots).add_lora_linear(y, x, a, b, 1.0, WIDTHS)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slots", [[0, 1, -1], [0, -1, 0, 1, 1]])
def test_an_adapter_that_no_row_uses_changes_nothing_however_large_its_weights(slots: list[int]) -> None:
    torch.manual_seed(3)
    x, y = torch.randn(len(slots), NUM_IN), torch.randn(len(slots), 6)
    a, b = torch.randn(NUM_SLOTS, 1, RANK, NUM_IN), torch.randn(NUM_SLOTS, 1, 6, RANK)
    a[2] = 3e38 * torch.sign(a[2])
    expected = y + by_definition(x, a, b, slots)
    wrapper_for(slots).add_lora_linear(y, x, (a,), (b,), 1.0, (6,))
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("row", "slot"), [(0, 0), (1, -1), (4, 1)])
@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_logits_of_a_prompt_are_of_its_own_adapter_whatever_the_step_samples(
    row: int, slot: int, num_rows: int
) -> None:
    torch.manual_seed(4)
    x, y = torch.randn(num_rows, NUM_IN), torch.randn(num_rows, 10)
    a, b = torch.randn(NUM_SLOTS, 1, RANK, NUM_IN), torch.randn(NUM_SLOTS, 1, 10, RANK)
    expected = y + by_definition(x, a, b, [slot] * num_rows)
    wrapper = wrapper_for([0, -1, -1, -1, 1, 1])
    with wrapper.logits_of_prompt(row):
        wrapper.add_lora_logits(y, x, a, b, 1.0)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slots", [[-1, -1], [0, -1, 0], [2, 2, 2], [0, 1, -1, 1, 0]])
def test_logits_of_base_requests_stay_untouched(slots: list[int]) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(len(slots), NUM_IN), torch.randn(len(slots), 10)
    a, b = torch.randn(NUM_SLOTS, 1, RANK, NUM_IN), torch.randn(NUM_SLOTS, 1, 10, RANK)
    expected = y + by_definition(x, a, b, slots)
    wrapper_for(slots).add_lora_logits(y, x, a, b, 1.0)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def test_stock_vllm_gives_base_rows_the_adapter_of_the_last_slot() -> None:
    """The upstream fault that the wrapper is for (vllm-project/vllm#48421). When this fails, vLLM has mended it."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    torch.manual_seed(2)
    x, y = torch.randn(2, NUM_IN), torch.zeros(2, 6)
    a, b = (torch.randn(NUM_SLOTS, 1, RANK, NUM_IN),), (torch.randn(NUM_SLOTS, 1, 6, RANK),)
    stock = PunicaWrapperCPU(64, 64, "cpu")
    mapping = SimpleNamespace(index_mapping=(0, 1), prompt_mapping=(0, 1), is_prefill=False)
    stock.update_metadata(mapping, [1, 2, 3], NUM_SLOTS, 100)
    stock.add_lora_linear(y, x, a, b, 1.0, (6,))
    leaked = by_definition(x, a[0], b[0], [NUM_SLOTS - 1, 0])
    torch.testing.assert_close(y[0], leaked[0], atol=1e-4, rtol=1e-4)
