import copy
import itertools
import math
import random
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from conftest import RecordingDecoder, Waits, end_often, keys, run_now, widen
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from data.toy.captioner import build_policy
from data.toy.world import draw, make_scene
from grpo import rollout
from grpo.batch import count_together
from grpo.decode import Decoder, head_logits
from grpo.logprobs import CompletionScorer
from grpo.pretrained import make_policy
from grpo.recording import _warm_up_stream, record
from grpo.rollout import DRAW_BLOCK, draw_tokens, read_prompts, sample_rollouts, temper_logits_


def steer(policy, token_logits: dict[int, float]):
    """The policy, made to give the same distribution at every step: these logits, all others very low."""
    vocabulary = policy.model.config.text_config.vocab_size
    logits = torch.full((vocabulary,), -50.0)
    for token, value in token_logits.items():
        logits[token] = value
    policy.model.lm_head.register_forward_hook(lambda module, args, output: logits.expand_as(output).clone())
    return policy


def test_greedy_equals_generate_with_images_of_different_sizes(policy, prompts):
    assert len({len(prompt.input_ids) for prompt in prompts}) > 1  # so left padding is at work
    got = sample_rollouts(policy, prompts, keys(4, 1), 20, temperature=0)
    rows = []
    for row, prompt in enumerate(prompts):
        want = policy.model.generate(
            input_ids=prompt.input_ids[None], attention_mask=torch.ones(1, len(prompt.input_ids), dtype=torch.long),
            pixel_values=prompt.pixel_values, image_grid_thw=prompt.grid,
            mm_token_type_ids=(prompt.input_ids == policy.model.config.image_token_id).int()[None],
            do_sample=False, max_new_tokens=20, suppress_tokens=list(policy.forbidden_ids),
        )[0, len(prompt.input_ids) :]
        assert got.tokens[row, : got.lengths[row]].tolist() == want.tolist()
        rows.append(want.tolist())
    assert len({tuple(row) for row in rows}) > 1  # the images do matter


def test_logits_are_not_rounded_on_a_gpu(monkeypatch):
    """16 + 1/32: the nearest number of bfloat16 is 16. A CPU stands in for the GPU, whose product has float32 results."""
    head = torch.nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    head.weight.data[:] = torch.tensor([[16.0, 1 / 32]])
    hidden = torch.ones(3, 2, dtype=torch.bfloat16)
    assert head_logits(head, hidden).flatten().tolist() == [16.0] * 3  # on a CPU
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    logits = head_logits(head, hidden)
    assert logits.dtype == torch.float32 and logits.flatten().tolist() == [16 + 1 / 32] * 3
    head.bias = torch.nn.Parameter(torch.tensor([4.0], dtype=torch.bfloat16))  # a judge may have one
    assert head_logits(head, hidden).flatten().tolist() == [20.0] * 3


@torch.no_grad()
def test_logits_of_prompts_and_of_steps_are_float32_in_half_precision(policy, prompts):
    policy.model.to(torch.bfloat16)
    logits, cache, mask = read_prompts(policy, prompts[:2])
    decoder, rows = Decoder(policy.model, 1, 4), torch.arange(2)
    decoder.add(cache, mask)
    assert logits.dtype == decoder.step(torch.full_like(rows, 40), rows + 100, rows).dtype == torch.float32


def test_generate_of_another_batch_size_leaves_no_trace(policy, prompts):
    """transformers keeps rope_deltas of the last batch on the model; a stale one shifts or breaks later forwards."""
    fresh = sample_rollouts(policy, prompts[:2], keys(2, 2), 8)
    scorer = CompletionScorer(policy.model, policy.forbidden_ids)
    want = scorer(fresh)[0]
    prompt = prompts[3]
    policy.model.generate(
        input_ids=prompt.input_ids[None].repeat(4, 1), pixel_values=prompt.pixel_values.repeat(4, 1),
        image_grid_thw=prompt.grid.repeat(4, 1), attention_mask=torch.ones(4, len(prompt.input_ids), dtype=torch.long),
        mm_token_type_ids=(prompt.input_ids == policy.model.config.image_token_id).int()[None].repeat(4, 1), max_new_tokens=3,
    )
    assert policy.model.model.rope_deltas is not None
    again = sample_rollouts(policy, prompts[:2], keys(2, 2), 8)
    assert torch.equal(fresh.tokens, again.tokens) and torch.equal(want, scorer(again)[0])


def test_sampling_ignores_the_checkpoints_generation_config(policy, prompts):
    """Its temperature, top_k and repetition penalty once leaked into rollouts; frequencies must match the softmax."""
    policy.model.generation_config = GenerationConfig(
        temperature=1e-6, top_k=1, repetition_penalty=1.3, do_sample=True, eos_token_id=list(policy.eos_ids)
    )
    chances = {40: 0.5, 41: 0.3, 42: 0.2}
    steer(policy, {token: math.log(p) for token, p in chances.items()})
    tokens = sample_rollouts(policy, prompts[:1], keys(1, 64), 32).tokens
    for token, chance in chances.items():  # 2048 draws: 5 standard deviations are 0.055
        assert (tokens == token).float().mean().item() == pytest.approx(chance, abs=0.055)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_logprobs_equal_recomputed_ones(policy, prompts, temperature):
    rollouts = sample_rollouts(policy, prompts, keys(4, 3), 16, temperature)
    scorer = CompletionScorer(policy.model, policy.forbidden_ids, temperature)
    logprobs, _ = scorer(rollouts)
    assert torch.allclose(logprobs, rollouts.logprobs, atol=1e-4)
    assert (rollouts.logprobs[rollouts.completion_mask] < 0).all()


def test_every_eos_id_ends_a_completion_and_belongs_to_it(policy, prompts):
    assert len(policy.eos_ids) == 2
    for eos in policy.eos_ids:
        other = build_policy(policy.tokenizer, 0)
        rollouts = sample_rollouts(steer(other, {eos: 0.0}), prompts[:1], keys(1, 2), 5)
        assert rollouts.lengths.tolist() == [1, 1] and rollouts.tokens.tolist() == [[eos], [eos]]
        assert not rollouts.truncated.any() and rollouts.completion_mask.all()


def test_pad_equal_to_eos_masks_nothing_but_what_follows(policy, prompts):
    eos = policy.tokenizer.eos_token_id
    same = make_policy(policy.model, policy.tokenizer, policy.image_processor)
    same = type(same)(same.model, same.tokenizer, same.image_processor, (eos,), eos, same.forbidden_ids)
    steer(same, {40: math.log(0.7), eos: math.log(0.3)})
    rollouts = sample_rollouts(same, prompts[:1], keys(1, 16), 12)
    masks = rollouts.completion_mask.tolist()
    for tokens, mask, truncated in zip(rollouts.tokens.tolist(), masks, rollouts.truncated.tolist()):
        ends = tokens.index(eos) + 1 if eos in tokens else len(tokens)
        assert mask == [True] * ends + [False] * (len(tokens) - ends)
        assert truncated == (eos not in tokens)


def test_truncation_is_known(policy, prompts):
    rollouts = sample_rollouts(steer(policy, {40: 0.0}), prompts[:2], keys(2, 2), 6)
    assert rollouts.truncated.all() and rollouts.lengths.tolist() == [6] * 4
    assert (rollouts.logprobs.abs() < 1e-6).all()  # a certain token has log-probability 0


def test_image_tokens_are_never_sampled_and_count_for_nothing(policy, prompts):
    marks = {policy.tokenizer.convert_tokens_to_ids(t) for t in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>")}
    assert marks <= set(policy.forbidden_ids)
    steer(policy, {40: 0.0, 41: 0.0} | dict.fromkeys(policy.forbidden_ids, 9.0))
    rollouts = sample_rollouts(policy, prompts[:1], keys(1, 8), 16)
    assert set(rollouts.tokens.flatten().tolist()) == {40, 41}
    assert torch.allclose(rollouts.logprobs, torch.tensor(math.log(0.5)), atol=1e-5)


def test_a_row_does_not_depend_on_its_batch_mates(policy, prompts):
    """Also where rows end at different times and leave the batch."""
    end_often(policy)
    together = sample_rollouts(policy, prompts, keys(4, 3), 12)
    for p, prompt in enumerate(prompts):
        alone = sample_rollouts(policy, [prompt], keys(4, 3)[3 * p : 3 * p + 3], 12)
        rows, width = slice(3 * p, 3 * p + 3), alone.tokens.shape[1]
        assert torch.equal(together.lengths[rows], alone.lengths)
        assert torch.equal(together.tokens[rows, :width], alone.tokens)
        assert torch.allclose(together.logprobs[rows, :width], alone.logprobs, atol=1e-5)
    assert len(set(together.lengths.tolist())) > 3


def test_siblings_differ_and_repeat_with_their_key(policy, prompts):
    first = sample_rollouts(policy, prompts[:1], keys(1, 8), 12)
    assert len(set(first.captions)) > 4
    assert sample_rollouts(policy, prompts[:1], keys(1, 8), 12).captions == first.captions
    other = sample_rollouts(policy, prompts[:1], [f"other:{k}" for k in keys(1, 8)], 12)
    assert other.captions != first.captions


def test_first_tokens_of_a_group_are_drawn_apart(policy, prompts):
    """Guards against one draw broadcast over the group: 32 equal tokens have probability 2 ** -31."""
    steer(policy, {40: 0.0, 41: 0.0})
    assert len(set(sample_rollouts(policy, prompts[:1], keys(1, 32), 1).tokens[:, 0].tolist())) == 2


@pytest.mark.parametrize("vocab", [3, 512, 700, 1024, 5000])
def test_draw_tokens_block_by_block_is_the_inverse_cdf(vocab):
    generator = torch.Generator().manual_seed(vocab)
    probs = torch.rand(400, vocab, generator=generator)
    probs[torch.rand(400, vocab, generator=generator) < 0.7] = 0.0
    probs[:, 1] += 0.01
    probs /= probs.sum(1, keepdim=True)
    uniforms = torch.rand(400, generator=generator)
    uniforms[:3] = torch.tensor([0.0, 1 - 2**-24, 0.5])
    drawn = draw_tokens(probs, uniforms)
    assert (probs.gather(1, drawn[:, None]) > 0).all()
    for row, uniform, token in zip(probs.double(), uniforms.tolist(), drawn.tolist()):
        target = uniform * row.sum().item()
        ends = [0.0, *itertools.accumulate(row.tolist())]
        place = next(n for n, end in enumerate(ends[1:]) if end > target)
        # A block's sum is rounded to float32: only a number so near to an end may fall to the next token.
        assert place == token or min(abs(end - target) for end in ends[place : place + 2]) < 2e-7


def test_logits_that_are_not_finite_are_named(policy, prompts):
    policy.model.lm_head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="the policy's logits are not finite"):
        sample_rollouts(policy, prompts[:1], keys(1, 2), 3)


@pytest.mark.parametrize("length", [4097, 2**44])
def test_captions_longer_than_the_policys_positions_are_refused(policy, prompts, length):
    """Before their tensors are made: the system killed the process, or torch raised RuntimeError."""
    with pytest.raises(ValueError, match=f"max_new_tokens {length}: expected at most the 4096 positions of the policy"):
        sample_rollouts(policy, prompts[:1], keys(1, 2), length)


def test_draw_tokens_never_takes_an_impossible_one():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    top = torch.tensor(1 - 2**-24)  # the largest float32 below 1
    for uniform, want in ((0.0, 1), (0.2499, 1), (0.2501, 3), (top.item(), 3)):
        assert draw_tokens(probs, torch.tensor([uniform])).item() == want
    one = torch.zeros(1, 3 * DRAW_BLOCK).index_fill_(1, torch.tensor(2 * DRAW_BLOCK + 9), 1.0)
    assert draw_tokens(one, torch.tensor([0.0])).item() == 2 * DRAW_BLOCK + 9  # two blocks have probability 0
    rounded = torch.tensor([[1.0, 1.0]])  # a number is a share of the sum, whatever that is
    assert [draw_tokens(rounded, torch.tensor([uniform])).item() for uniform in (0.4, 0.6)] == [0, 1]


def test_temper_logits_hand_computed():
    logits = torch.tensor([1.0, 2.0, 3.0])
    assert temper_logits_(logits, 0.5, torch.tensor([1])).tolist() == [2, -math.inf, 6]


@pytest.mark.parametrize("groups_at_a_time", [1, 2, 3])
def test_waiting_groups_take_the_place_of_finished_ones(policy, groups_at_a_time, monkeypatch):
    """Prompts of different lengths join groups that are already under way: same captions as all at once."""
    end_often(policy)
    prompts = [policy.prompt(draw(make_scene("train", index))) for index in range(9)]
    whole = sample_rollouts(policy, prompts, keys(9, 2), 30)
    held = []

    def spy(decoder, tokens, positions, rows):
        held.append((list(decoder.ages), decoder.padding.any().item(), len(rows)))
        return original(decoder, tokens, positions, rows)

    original = Decoder.step
    monkeypatch.setattr(Decoder, "step", spy)
    budget = groups_at_a_time * (max(len(prompt.input_ids) for prompt in prompts) + 2 * 32)  # room in steps of 8
    refilled = sample_rollouts(policy, prompts, keys(9, 2), 30, token_budget=budget)
    assert torch.equal(refilled.tokens, whole.tokens) and torch.equal(refilled.lengths, whole.lengths)
    assert refilled.captions == whole.captions and torch.allclose(refilled.logprobs, whole.logprobs, atol=1e-5)
    assert max(len(ages) for ages, _, _ in held) == groups_at_a_time  # and finished rows are not computed:
    assert sum(rows for _, _, rows in held) == (whole.lengths - 1).sum()
    if groups_at_a_time > 1:  # groups of different ages and prompt lengths have met
        assert any(len(set(ages)) > 1 and is_padded for ages, is_padded, _ in held)


@pytest.mark.parametrize("groups_at_a_time", [3, 9])
def test_decoding_by_recordings_draws_the_same(policy, groups_at_a_time, monkeypatch):
    """All rows take part in a recording, finished groups stay in the batch until half of them are
    done, room doubles."""
    end_often(policy, below=3)
    prompts = [policy.prompt(draw(make_scene("train", index))) for index in range(9)]
    want = sample_rollouts(policy, prompts, keys(9, 2), 80)
    sizes = []

    def spy(function):
        replay, result = run_now(function)
        sizes.append(len(result))
        return replay, result

    monkeypatch.setattr("grpo.rollout.Decoder", RecordingDecoder)
    monkeypatch.setattr("grpo.recording.record", spy)
    budget = groups_at_a_time * (max(len(prompt.input_ids) for prompt in prompts) + 2 * 80)
    got = sample_rollouts(policy, prompts, keys(9, 2), 80, token_budget=budget)
    assert torch.equal(got.tokens, want.tokens) and torch.allclose(got.logprobs, want.logprobs, atol=1e-5)
    if groups_at_a_time == 9:  # nobody waits: 9 groups, then at most 4, 2 and 1, and twice as much room after 64 tokens
        assert sizes[0] == 18 and len(sizes) <= 5 and sizes == sorted(sizes, reverse=True)
        assert want.lengths.view(9, 2).amax(1).unique().numel() > 5  # more ends than recordings


def test_what_a_recording_reads_is_kept_as_long_as_the_recording(policy, prompts, monkeypatch):
    """A graph knows addresses and keeps no tensor. On an H200 the rows were freed, and a replay read other numbers."""

    class Reads(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.made, self.read = set(), {}

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            for part in pytree.tree_leaves(arguments):
                if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() not in self.made:
                    self.read[part.untyped_storage().data_ptr()] = weakref.ref(part)
            out = function(*arguments, **(options or {}))
            self.made |= {part.untyped_storage().data_ptr() for part in pytree.tree_leaves(out)}
            return out

    reads, kept = Reads(), []

    def spy(function):
        with reads:
            result = function()
        kept.append(result)  # none of its memory is used again
        return (lambda: None), result

    monkeypatch.setattr("grpo.recording.record", spy)
    decoder = RecordingDecoder(policy.model, 2, 30)
    _, cache, mask = read_prompts(policy, prompts)
    decoder.add(cache, mask)
    rows = torch.arange(8)
    with torch.no_grad():
        decoder.step(torch.full_like(rows, 40), rows + 100, rows)
    assert len(reads.read) > 20 and decoder.recording is not None
    lost = [address for address, tensor in reads.read.items() if tensor() is None]
    assert not lost


def test_the_cache_gives_room_back_and_its_prompts_are_a_multiple_of_8_long_for_recordings(policy, prompts):
    """A group of 70 tokens needs room for 128. It leaves another of 5, which needs 64."""
    decoder = Decoder(policy.model, 1, 200)
    _, cache, mask = read_prompts(policy, prompts[:1])
    decoder.add(cache, mask)
    for number_of_groups, steps in ((1, 70), (2, 5)):
        if number_of_groups == 2:
            _, cache, mask = read_prompts(policy, prompts[1:2])
            decoder.add(cache, mask)
        for _ in range(steps):
            rows = torch.arange(number_of_groups)
            with torch.no_grad():
                decoder.step(torch.full_like(rows, 40), rows + 100, rows)
    assert decoder.ages == [75, 5] and decoder.suffix[0][0].shape[3] == 128
    decoder.keep([1])
    assert decoder.ages == decoder.device_ages.tolist() == [5] and decoder.suffix[0][0].shape[3] == 64
    assert mask.shape[1] % 8 and RecordingDecoder(policy.model, 1, 200).prompt_room(mask.shape[1]) % 8 == 0
    recording = RecordingDecoder(policy.model, 1, 200)
    _, cache, mask = read_prompts(policy, prompts[1:2])
    recording.add(cache, mask)
    room = recording.prompt_room(mask.shape[1])
    assert recording.prefix[0][0].shape[2] == room
    assert recording.padding.tolist() == [room - mask.sum().item()]


@torch.no_grad()
def test_the_prompts_cache_is_not_held_beside_the_decoders(policy, prompts):
    decoder, held = Decoder(policy.model, 2, 30), []
    for part in (prompts[:2], prompts[2:]):  # into an empty decoder, and beside other groups
        _, cache, mask = read_prompts(policy, part)
        held += [weakref.ref(tensor) for layer in cache.layers for tensor in (layer.keys, layer.values)]
        decoder.add(cache, mask)
    assert len(held) > 8 and not any(tensor() is not None for tensor in held)


def test_long_prompts_are_read_a_few_at_a_time_and_nothing_changes(policy, prompts, monkeypatch):
    """Two of four fit into the tokens of a forward, though there is room for all captions."""
    want, sizes = sample_rollouts(policy, prompts, keys(4, 2), 12), []
    longest = max(len(prompt.input_ids) for prompt in prompts)
    monkeypatch.setattr("grpo.batch.PREFILL_TOKENS", 2 * longest)
    monkeypatch.setattr("grpo.rollout.read_prompts", lambda policy, new: sizes.append(len(new)) or read_prompts(policy, new))
    got = sample_rollouts(policy, prompts, keys(4, 2), 12)
    assert sizes == [2, 2] and torch.equal(got.tokens, want.tokens)
    torch.testing.assert_close(got.logprobs, want.logprobs)


def test_all_recordings_warm_up_on_one_stream(monkeypatch):
    """A graph's replay is left out here: cuBLAS keeps memory for every stream that it has met."""
    made = []
    for name in ("current_stream", "CUDAGraph", "graph", "stream"):
        monkeypatch.setattr(f"torch.cuda.{name}", MagicMock())
    monkeypatch.setattr("torch.cuda.Stream", lambda: made.append(MagicMock()) or made[-1])
    _warm_up_stream.cache_clear()
    calls = itertools.count(1)
    assert [record(lambda: next(calls))[1] for _ in range(3)] == [2, 4, 6]  # once to warm up, once to record
    _warm_up_stream.cache_clear()
    assert len(made) == 1
    assert torch.cuda.graph.call_args.kwargs == {"capture_error_mode": "thread_local"}


def test_a_recording_that_fails_leaves_nothing_running_beside_the_caller(monkeypatch):
    """The caller goes on with the same cache on its own stream: it must wait for the warm-up's."""
    for name in ("current_stream", "CUDAGraph", "graph", "Stream"):
        monkeypatch.setattr(f"torch.cuda.{name}", MagicMock())
    monkeypatch.setattr("torch.cuda.stream", lambda stream: nullcontext())  # a MagicMock would hide the error
    _warm_up_stream.cache_clear()
    with pytest.raises(RuntimeError, match="memory"):
        record(MagicMock(side_effect=RuntimeError("out of memory")))
    torch.cuda.current_stream().wait_stream.assert_called_once_with(_warm_up_stream())
    _warm_up_stream.cache_clear()


def test_a_forward_of_prompts_is_bounded_in_tokens_by_hand():
    """At most 16 prompts, and 32,768 tokens with the padding, but always one."""
    assert count_together([100] * 20) == 16 and count_together([100] * 3) == 3
    assert count_together([16_384] * 4) == 2 and count_together([40_000, 5]) == 1
    assert count_together([1000] * 8 + [16_384]) == 8 and count_together([16_384, 1000, 1000]) == 2


def test_decoding_goes_on_without_recordings_and_says_so_once(policy, prompts, monkeypatch, recwarn):
    want = sample_rollouts(policy, prompts, keys(4, 2), 6)

    def fail(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("grpo.rollout.Decoder", RecordingDecoder)
    monkeypatch.setattr("grpo.recording.record", fail)
    got = sample_rollouts(policy, prompts, keys(4, 2), 6)
    assert torch.equal(got.tokens, want.tokens)
    said = [str(warning.message) for warning in recwarn if "CUDA graphs" in str(warning.message)]
    assert said == [
        "decoding without CUDA graphs, several times slower (operation not permitted when stream is capturing)"
    ]


def test_groups_are_refilled_a_quarter_of_the_room_at_a_time(policy, monkeypatch):
    """24 prompts in room for 8: one prefill of 8, then never fewer than 2 at a time while there are as many."""
    end_often(policy)
    prompts = [policy.prompt(draw(make_scene("train", 0)))] * 24
    whole = sample_rollouts(policy, prompts, keys(24, 1), 30)
    sizes = []
    monkeypatch.setattr(
        rollout, "read_prompts", lambda policy, some: sizes.append(len(some)) or read_prompts(policy, some)
    )
    refilled = sample_rollouts(policy, prompts, keys(24, 1), 30, token_budget=8 * (len(prompts[0].input_ids) + 32))
    assert sizes[0] == 8 and min(sizes[1:-1]) >= 2 and sum(sizes) == 24
    assert refilled.captions == whole.captions


def test_the_cache_grows_and_refills_past_its_first_room(policy, prompts):
    """64 tokens at first; 100 are written, by groups that join at different times."""
    whole = sample_rollouts(policy, prompts, keys(4, 2), 100)
    refilled = sample_rollouts(policy, prompts, keys(4, 2), 100, token_budget=2 * (40 + 2 * 100))
    assert whole.lengths.max() > 64 and torch.equal(refilled.tokens, whole.tokens)
    logprobs, _ = CompletionScorer(policy.model, policy.forbidden_ids)(whole)
    assert torch.allclose(logprobs, whole.logprobs, atol=1e-3)


class Scripted(Decoder):
    """A decoder without a model. Row g of prompt p says token (p + g + step) % 7 and ends when `LENGTHS[p][g]` says."""

    LENGTHS: ClassVar[list[list[int]]] = []
    uses_kernels = False

    def __init__(self, model, group_size, max_new_tokens):
        self.group_size, self.max_new_tokens, self.uses_graphs = group_size, max_new_tokens, True
        self.embed, self.ages, self.steps, self.room, self.most = torch.empty(0), [], 0, 0, 0

    def hold(self, ages, length=0):
        self.ages, self.room = ages, max(self.room, self.room_for(max(length, self.longest)))
        used = len(ages) * (self.prompt_room(T) + self.group_size * self.room)
        self.most = max(self.most, used if len(ages) > 1 else 0)

    def add(self, cache, mask):
        self.hold(self.ages + [0] * len(mask))

    def keep(self, groups):
        self.room = 0
        self.hold([self.ages[group] for group in groups])

    def step(self, tokens, positions, rows):
        self.steps += 1
        self.hold(self.ages, self.longest + 1)
        ages = [self.ages[row // self.group_size] for row in rows.tolist()]
        said = [self.say(position // 100_000, row % self.group_size, age + 1)
                for position, row, age in zip(positions.tolist(), rows.tolist(), ages)]
        assert [position % 100_000 for position in positions.tolist()] == ages
        self.hold([min(age + 1, self.max_new_tokens - 1) for age in self.ages])
        return 9.0 * F.one_hot(torch.tensor(said), 8)

    @classmethod
    def say(cls, prompt, member, step):
        return 7 if step + 1 == cls.LENGTHS[prompt][member] else (prompt + member + step) % 7


T = 1053


def run_script(monkeypatch, lengths, budget, max_new_tokens):
    """Steps, the most tokens that more than one group had in the cache, and prompts read, again
    after they were set back."""
    decoders, read = [], []

    def first_tokens(policy, some):
        for p in (prompt.next_position // 100_000 for prompt in some):
            if p in read:  # set back; let rounding have ended its captions earlier the second time
                lengths[p] = [max(2, length - 5) for length in lengths[p]]
            read.append(p)
        first = [Scripted.say(prompt.next_position // 100_000, 0, 0) for prompt in some]
        return 9.0 * F.one_hot(torch.tensor(first), 8), None, torch.ones(len(some), T)

    monkeypatch.setattr(Scripted, "LENGTHS", lengths)
    monkeypatch.setattr(rollout, "Decoder", lambda *args: decoders.append(Scripted(*args)) or decoders[0])
    monkeypatch.setattr(rollout, "read_prompts", first_tokens)
    model = SimpleNamespace(device=torch.device("cpu"), lm_head=SimpleNamespace(weight=torch.empty(8, 1)))
    policy = SimpleNamespace(model=model, pad_id=0, eos_ids=(7,), forbidden_ids=(), decode=str)
    prompts = [SimpleNamespace(input_ids=range(T), next_position=100_000 * p) for p in range(len(lengths))]
    size = len(lengths[0])
    got = sample_rollouts(policy, prompts, keys(len(lengths), size), max_new_tokens, 0, budget)
    for row, (tokens, length) in enumerate(zip(got.tokens.tolist(), got.lengths.tolist())):
        p, g = divmod(row, size)
        assert length == min(lengths[p][g], max_new_tokens) and got.truncated[row] == (lengths[p][g] > max_new_tokens)
        want = [Scripted.say(p, g if step else 0, step) for step in range(length)]
        assert tokens == want + [0] * (len(tokens) - length)
    return decoders[0].steps, decoders[0].most, len(read)


@pytest.mark.parametrize("budget", [1, 5000, 9000, 15_000])
@pytest.mark.parametrize("max_new_tokens", [280, 1000])
def test_groups_that_are_set_back_are_written_again_and_the_cache_stays_within_its_budget(monkeypatch, budget, max_new_tokens):
    rng = random.Random(budget)
    lengths = [[rng.randint(2, 300) for _ in range(4)] for _ in range(12)]
    _, most, num_read = run_script(monkeypatch, lengths, budget, max_new_tokens)
    assert most <= budget
    assert num_read > 12 or (budget, max_new_tokens) not in [(5000, 280), (9000, 280), (15_000, 280)]


@pytest.mark.parametrize("uses_kernels", [False, True])
def test_captions_are_admitted_by_their_length_not_by_the_longest_allowed(monkeypatch, uses_kernels):
    """16 images of a GPU, 8 captions of about 600 tokens each, room for 4,096: as many steps as the
    longest caption has. By the longest allowed, 15 groups would have room, and the last would wait
    for them: 1,549 steps in the mean."""
    monkeypatch.setattr(Scripted, "uses_kernels", uses_kernels)
    rng = random.Random(0)
    lengths = [[round(min(4096, max(50, rng.gauss(600, 150)))) for _ in range(8)] for _ in range(16)]
    steps, _, _ = run_script(monkeypatch, lengths, 524_288, 4096)
    assert steps == max(map(max, lengths)) - 1


def test_groups_are_dropped_several_at_a_time_while_prompts_wait(monkeypatch):
    """Room for 8 of 16 groups, whose captions end one after another. A drop copies the cache. So while some wait 2 go at a
    time, a quarter of the room. After that a drop saves work alone, and a graph is recorded again: half of them go."""
    keeps, keep = [], Scripted.keep
    monkeypatch.setattr(Scripted, "keep", lambda self, groups: keeps.append(len(self.ages) - len(groups)) or keep(self, groups))
    lengths = [[20 + 3 * p] for p in range(16)]
    run_script(monkeypatch, lengths, 8 * (T + 80) + 100, 80)
    assert keeps == [2, 2, 2, 2, 4, 2, 1, 1]


def test_the_host_waits_once_a_token_also_where_rows_end(policy, prompts, monkeypatch):
    end_often(policy)
    prompts, reads, original = prompts * 3, [], torch.Tensor.tolist
    held = read_prompts(policy, prompts)  # the forward of the prompts is transformers', and waits
    monkeypatch.setattr(rollout, "read_prompts", lambda *_: held)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor.shape) or original(tensor))
    with Waits() as waits:
        rollouts = sample_rollouts(policy, prompts, keys(12, 3), 30)
    steps = rollouts.tokens.shape[1]
    assert waits.seen == ["_local_scalar_dense"] * 12  # each prompt's last position, which is not on the device
    assert len(reads) == steps + 1  # and once for all tokens, at the end
    assert len(rollouts.lengths.unique()) > 5


def test_stacked_weights_are_the_models_own(policy):
    """No second copy, none made again, and what a step of the optimizer writes is decoded with at once."""
    model, before = policy.model, copy.deepcopy(policy.model.state_dict())
    first, again = Decoder(model, 2, 8), Decoder(model, 2, 8)
    attention = model.model.language_model.layers[1].self_attn
    for decoder in (first, again):
        assert decoder.layers[1].qkv.weight.data_ptr() == attention.q_proj.weight.data_ptr()
    attention.k_proj.weight.data.fill_(7.0)
    rows = len(attention.q_proj.weight)
    assert (again.layers[1].qkv.weight[rows : rows + len(attention.k_proj.weight)] == 7).all()
    assert torch.equal(again.layers[1].qkv.weight[:rows], before["model.language_model.layers.1.self_attn.q_proj.weight"])
    names = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert names == ["model.language_model.layers.1.self_attn.k_proj.weight"]
    model.to(torch.bfloat16)  # new memory for each: they are stacked again
    assert Decoder(model, 2, 8).layers[1].qkv.weight.dtype == torch.bfloat16


def test_a_policy_with_windowed_attention_is_refused(policy):
    policy.model.model.language_model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="expected a policy with full attention, silu and default rope, got .*sliding"):
        Decoder(policy.model, 2, 8)


def test_pixels_reach_their_own_rows(policy):
    """Ragged image grids: a caption in a mixed batch is the one its image gets alone."""
    widen(policy.model.model.visual)
    scenes = [make_scene("train", index) for index in (0, 1, 2, 3)]
    mixed = [policy.prompt(draw(scene)) for scene in (scenes[2], scenes[0], scenes[3], scenes[1])]
    together = sample_rollouts(policy, mixed, keys(4, 1), 10, temperature=0)
    alone = [sample_rollouts(policy, [prompt], ["x"], 10, temperature=0).captions[0] for prompt in mixed]
    assert together.captions == alone and len(set(alone)) > 1
