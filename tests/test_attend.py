"""The kernels of grpo/attend.py, run on a CPU by Triton's interpreter (TRITON_INTERPRET in conftest.py)."""

import math

import pytest
import torch
from conftest import RecordingDecoder, end_often, keys, run_now

from data.toy.world import draw, make_scene
from grpo.decode import Decoder
from grpo.layers import compiled_step_, has_kernels, layer_step_
from grpo.rollout import read_prompts, sample_rollouts

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
import grpo.attend
from grpo.attend import attend


def by_loops(query, prompt_keys, prompt_values, own_keys, own_values, padding, slots):
    """The same, a caption and a head at a time."""
    num_p, num_kv, num_g, _, width = own_keys.shape
    out = torch.empty(query.shape, dtype=torch.float64)
    for p in range(num_p):
        for g in range(num_g):
            row = p * num_g + g
            for head in range(query.shape[1]):
                k = head * num_kv // query.shape[1]
                start, stop = padding[p], slots[row] + 1
                seen = torch.cat([prompt_keys[p, k, start:], own_keys[p, k, g, :stop]]).double()
                read = torch.cat([prompt_values[p, k, start:], own_values[p, k, g, :stop]]).double()
                scores = seen @ query[row, head].double() / math.sqrt(width)
                out[row, head] = scores.softmax(0) @ read
    return out


def test_by_hand():
    """Queries of 0 see all alike: the mean of what is seen. Then a key that outweighs all others."""
    prompt_values = torch.tensor([100.0, 1.0, 2.0])[None, None, :, None].expand(1, 1, 3, 16).contiguous()
    values = torch.tensor([[6.0, 7.0, 100.0], [12.0, 100.0, 100.0]])[None, None, :, :, None].expand(1, 1, 2, 3, 16).contiguous()
    prompt_keys, own_keys = torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 2, 3, 16)
    padding, slots = torch.tensor([1]), torch.tensor([1, 0])
    states = prompt_keys, prompt_values, own_keys, values, padding, slots
    out = attend(torch.zeros(2, 1, 16), *states)
    assert torch.allclose(out, torch.tensor([4.0, 5.0])[:, None, None].expand(2, 1, 16))  # of 1 2 6 7, and of 1 2 12
    prompt_keys[0, 0, 2] = 100.0
    assert torch.allclose(attend(torch.ones(2, 1, 16), *states), torch.full((2, 1, 16), 2.0))


@pytest.mark.parametrize("num_p, num_kv, num_g, shared, width, prompt, room", [
    (1, 1, 1, 1, 32, 5, 8),
    (3, 2, 2, 8, 16, 200, 128),  # more parts than blocks of keys
    (2, 2, 8, 8, 128, 400, 256),  # Qwen2.5-VL's heads: two tiles of queries
    (2, 3, 3, 6, 32, 130, 200),  # numbers that are no power of 2
    (1, 2, 40, 6, 16, 90, 30),  # many tiles, the last not full
])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_against_loops(num_p, num_kv, num_g, shared, width, prompt, room, dtype, most):
    """What is not to be seen is nan. Queries are part of a wider tensor, as in a layer. (The interpreter has no products in
    bfloat16.)"""
    torch.manual_seed(0)
    query = torch.randn(num_p * num_g, num_kv * (shared + 2), width).to(dtype)[:, : num_kv * shared]
    prompts = torch.randn(2, num_p, num_kv, prompt, width).to(dtype)
    own = torch.randn(2, num_p, num_kv, num_g, room, width).to(dtype)
    padding, slots = torch.randint(0, prompt, (num_p,)), torch.randint(0, room, (num_p * num_g,))
    padding[0], slots[0] = prompt - 1, 0  # one token of the prompt, one of the caption
    for p in range(num_p):
        prompts[:, p, :, : padding[p]] = math.nan
        for g in range(num_g):
            own[:, p, :, g, slots[p * num_g + g] + 1 :] = math.nan
    inputs = query, *prompts, *own, padding, slots
    want, got = by_loops(*inputs), attend(*inputs)
    assert got.dtype == dtype and got.is_contiguous() and got.shape == query.shape
    assert (got.double() - want).norm() / want.norm() < most


def test_keys_that_are_not_contiguous_and_a_part_of_the_rows_are_refused():
    own, first = torch.zeros(1, 2, 2, 8, 16), torch.zeros(2, dtype=torch.long)
    prompts = own[:, :, 0].contiguous()
    with pytest.raises(AssertionError, match="contiguous"):
        attend(torch.zeros(2, 2, 16), prompts, prompts, own, own[:, :, :, ::2], first[:1], first)
    with pytest.raises(AssertionError, match="expected 2 rows, found 1"):
        attend(torch.zeros(1, 2, 16), prompts, prompts, own, own, first[:1], first)


class KernelDecoder(RecordingDecoder):
    def __init__(self, *args):
        super().__init__(*args)
        self.uses_kernels = True


@pytest.mark.parametrize("is_compiled", [False, True])
def test_captions_are_those_without_kernels(policy, monkeypatch, is_compiled):
    """Prompts of unlike sizes that join and leave, and rows that end."""
    end_often(policy)
    scenes = [draw(make_scene("train", index)) for index in range(3)]
    prompts = [policy.prompt(scene.resize(size)) for scene, size in zip(scenes, [(112, 112), (84, 56), (56, 56)])]
    want = sample_rollouts(policy, prompts, keys(3, 2), 6)
    assert len(want.lengths.unique()) > 1

    class Ours(KernelDecoder):
        def __init__(self, *args):
            super().__init__(*args)
            self.layer_step_ = compiled_step_() if is_compiled else layer_step_

    graphs, original = [], torch.compile
    monkeypatch.setattr("grpo.rollout.Decoder", Ours)
    monkeypatch.setattr("grpo.recording.record", run_now)
    monkeypatch.setattr("torch.compile", lambda function, **options: original(
        function, backend=lambda graph, _: graphs.append(graph.code) or graph, **options))
    compiled_step_.cache_clear()
    got = sample_rollouts(policy, prompts, keys(3, 2), 6, token_budget=2 * (30 + 2 * 8))
    compiled_step_.cache_clear()
    assert torch.equal(got.tokens, want.tokens) and torch.allclose(got.logprobs, want.logprobs, atol=1e-4)
    assert bool(graphs) == is_compiled and all("grpo.attend" in code for code in graphs)


def test_kernels_are_left_out_where_not_all_rows_take_part(policy, monkeypatch):
    """As where nothing can be recorded, and rows have ended."""

    def fail(function):
        raise RuntimeError("cannot be recorded")

    prompts = [policy.prompt(draw(make_scene("train", index)).resize((56, 56))) for index in range(2)]
    seen = []
    for kind in (Decoder, KernelDecoder):
        decoder = kind(policy.model, 2, 8)
        monkeypatch.setattr("grpo.recording.record", fail)
        with torch.no_grad():
            _, cache, mask = read_prompts(policy, prompts)
            decoder.add(cache, mask)
            rows = torch.tensor([0, 1, 3])
            logits = [decoder.step(rows + 40, rows + 60, rows), decoder.step(rows[1:] + 40, rows[1:] + 61, rows[1:])]
        seen.append(torch.cat(logits))
    assert torch.allclose(*seen, atol=1e-5) and not decoder.uses_graphs and decoder.uses_kernels


def test_room_is_of_few_sizes_where_kernels_do_not_read_it(policy):
    decoder = Decoder(policy.model, 2, 2000)
    assert [decoder.room_for(length) for length in (1, 65, 257, 600)] == [64, 128, 512, 768]
    decoder.uses_kernels = True
    assert [decoder.room_for(length) for length in (1, 65, 257, 600)] == [256, 256, 512, 768]


def test_kernels_that_fail_are_left_out_with_a_warning(monkeypatch, recwarn):
    def fail(*args):
        raise AssertionError("libcuda.so cannot be found\nat all")

    has_kernels.cache_clear()
    here = torch.float32, torch.device("cpu")
    widths = {width: has_kernels((2, 2, 3, width), *here) for width in (8, 16, 24)}
    assert widths == {8: False, 16: True, 24: False} and not recwarn.list
    monkeypatch.setattr(grpo.attend, "attend", fail)
    assert not has_kernels((2, 2, 3, 32), *here) and not has_kernels((2, 2, 3, 32), *here)
    assert [str(warning.message) for warning in recwarn] == [
        "decoding without kernels of its own, slower (libcuda.so cannot be found)"]
    monkeypatch.setattr(grpo.attend, "attend", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        has_kernels((2, 2, 3, 64), *here)
    has_kernels.cache_clear()
