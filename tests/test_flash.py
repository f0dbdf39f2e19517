"""Flash attention by stand-ins: what it is asked, and that its answer is the definition's."""

import sys

import pytest
import torch
from conftest import flash_attn_varlen_func, keys

import grpo.flash
from grpo.flash import RepeatedTokens, flash_varlen
from grpo.logprobs import CompletionScorer, group_attention
from grpo.rollout import sample_rollouts
from grpo.vision import window_attention


def test_all_groups_are_one_call(flash_calls):
    """Two groups, a completion without tokens, heads that share keys: values and gradients of the other way."""
    torch.manual_seed(0)
    query, (key, value) = torch.randn(1, 4, 14, 8), torch.randn(2, 1, 2, 14, 8)
    segments = [[2, 2, 0, 1], [3, 1, 3, 2]]
    results = []
    for flash in (True, False):
        parts = [part.clone().requires_grad_() for part in (query, key, value)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("grpo.flash.can_use_flash_attention", lambda params, flash=flash: flash)
            out, _ = group_attention(None, *parts, None, scaling=8**-0.5, segments=segments)
        out.square().sum().backward()
        results.append([out, *(part.grad for part in parts)])
    # a prompt alone, then what each completion reads: the prompt and itself
    assert flash_calls == [([2, 2, 1, 3, 1, 3, 2], [2, 4, 3, 3, 4, 6, 5], True)]
    for got, want in zip(*results):
        assert got.shape == want.shape and torch.allclose(got, want, atol=1e-5)


def test_another_scaling_goes_the_other_way(flash_calls):
    """flash attention is asked for 1 / sqrt(D) only."""
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    for scaling in (0.3, 8**-0.5):
        group_attention(None, query, key, value, None, scaling=scaling, segments=[[2, 3]])
        window_attention(None, query, key, value, None, scaling, torch.tensor([0, 2, 5]))
    assert [causal for *_, causal in flash_calls] == [True, False]


def test_copies_of_a_token_sum_their_gradients_in_float32(monkeypatch):
    """1 and 600 times 1 / 256: bfloat16 alone would stop at 1, where 1 / 256 is half a step. A CPU's sum is wider by itself, so
    the data type is looked at too."""
    summed, original = [], torch.Tensor.index_add_
    monkeypatch.setattr(torch.Tensor, "index_add_", lambda total, *rest: summed.append(total.dtype) or original(total, *rest))
    states = torch.zeros(2, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    copies = RepeatedTokens.apply(states, torch.tensor([0] * 601 + [1]))
    assert copies.shape == (602, 1, 1)
    copies.backward(torch.tensor([1.0] + [1 / 256] * 600 + [3.0]).to(torch.bfloat16)[:, None, None])
    assert summed == [torch.float32]
    assert states.grad.flatten().tolist() == [3.34375, 3.0]  # 3.34375 = 1 + 600 / 256


@pytest.mark.parametrize("release", ["2.11", "2.13"])
@pytest.mark.parametrize("causal", [False, True])
def test_without_flash_attn_torch_takes_its_place(flash_calls, monkeypatch, release, causal):
    """torch's own runs on GPUs only. It knows a causal mask as a window, and newer releases ask whether heads share keys."""

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        assert window_size in ((-1, -1), (-1, 0))
        return flash_attn_varlen_func(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=window_size == (-1, 0))

    def new(*args, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa
        return old(*args, window_size=window_size)

    parts = torch.randn(5, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    want = flash_varlen(*parts, [2, 3], [5, 4], causal)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as if not installed
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", old if release == "2.11" else new)
    grpo.flash._varlen_attention.cache_clear()
    assert torch.equal(flash_varlen(*parts, [2, 3], [5, 4], causal), want)
    assert flash_calls == [([2, 3], [5, 4], causal)] * 2


def test_log_probabilities_are_the_same_by_flash_attention(policy, prompts, flash_calls, monkeypatch):
    rollouts = sample_rollouts(policy, prompts, keys(4, 2), 12)
    scorer = CompletionScorer(policy.model, policy.forbidden_ids)
    flash_calls.clear()
    got, _ = scorer(rollouts)
    text, vision = (config.num_hidden_layers if hasattr(config, "num_hidden_layers") else config.depth
                    for config in (policy.model.config.text_config, policy.model.config.vision_config))
    assert sum(causal for *_, causal in flash_calls) == text and len(flash_calls) == text + vision
    monkeypatch.setattr("grpo.flash.can_use_flash_attention", lambda params: False)
    want, _ = scorer(rollouts)
    assert torch.allclose(got, want, atol=1e-4)
