import itertools
import math

import pytest
import torch
from conftest import keys, widen
from transformers import GenerationConfig

from data.toy.captioner import build_policy
from data.toy.world import draw, make_scene
from grpo import rollout
from grpo.decode import Decoder
from grpo.logprobs import CompletionScorer
from grpo.pretrained import make_policy
from grpo.rollout import draw_tokens, read_prompts, sample_rollouts, temper_logits_


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


def test_generate_of_another_batch_size_leaves_no_trace(policy, prompts):
    """transformers keeps rope_deltas of the last batch on the model; a stale one shifts or breaks later forwards."""
    fresh = sample_rollouts(policy, prompts[:2], keys(2, 2), 8)
    scorer = CompletionScorer(policy.model, policy.pad_id, policy.forbidden_ids)
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
    scorer = CompletionScorer(policy.model, policy.pad_id, policy.forbidden_ids, temperature)
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

    def end_often(module, args, output):
        output[..., policy.eos_ids[0]] = output.logsumexp(-1) - 1.5  # about one token in five
        return output

    policy.model.lm_head.register_forward_hook(end_often)
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


def test_draw_tokens_never_takes_an_impossible_one():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    top = torch.tensor(1 - 2**-24)  # the largest float32 below 1
    for uniform, want in ((0.0, 1), (0.2499, 1), (0.2501, 3), (top.item(), 3)):
        assert draw_tokens(probs, torch.tensor([uniform])).item() == want


def test_temper_logits_hand_computed():
    logits = torch.tensor([1.0, 2.0, 3.0])
    assert temper_logits_(logits, 0.5, torch.tensor([1])).tolist() == [2, -math.inf, 6]


@pytest.mark.parametrize("groups_at_a_time", [1, 2, 3])
def test_waiting_groups_take_the_place_of_finished_ones(policy, groups_at_a_time, monkeypatch):
    """Prompts of different lengths join groups that are already under way: same captions as all at once."""

    def end_often(module, args, output):
        output[..., policy.eos_ids[0]] = output.logsumexp(-1) - 1.5  # about one token in five
        return output

    policy.model.lm_head.register_forward_hook(end_often)
    prompts = [policy.prompt(draw(make_scene("train", index))) for index in range(9)]
    whole = sample_rollouts(policy, prompts, keys(9, 2), 30)
    held = []

    def spy(decoder, tokens, positions, rows):
        held.append((decoder.ages.tolist(), decoder.prefix_bias.isinf().any().item(), len(rows)))
        return original(decoder, tokens, positions, rows)

    original = Decoder.step
    monkeypatch.setattr(Decoder, "step", spy)
    budget = groups_at_a_time * (max(len(prompt.input_ids) for prompt in prompts) + 2 * 30)
    refilled = sample_rollouts(policy, prompts, keys(9, 2), 30, token_budget=budget)
    assert torch.equal(refilled.tokens, whole.tokens) and torch.equal(refilled.lengths, whole.lengths)
    assert refilled.captions == whole.captions and torch.allclose(refilled.logprobs, whole.logprobs, atol=1e-5)
    assert max(len(ages) for ages, _, _ in held) == groups_at_a_time  # and finished rows are not computed:
    assert sum(rows for _, _, rows in held) == (whole.lengths - 1).sum()
    if groups_at_a_time > 1:  # groups of different ages and prompt lengths have met
        assert any(len(set(ages)) > 1 and is_padded for ages, is_padded, _ in held)


def run_now(function):
    """Stands for a CUDA graph: a replay computes again from the same inputs into the same result."""
    result = function()
    return lambda: result.copy_(function()), result


class RecordingDecoder(Decoder):
    def __init__(self, *args):
        super().__init__(*args)
        self.uses_graphs = True


@pytest.mark.parametrize("groups_at_a_time", [2, 9])
def test_decoding_by_recordings_draws_the_same(policy, groups_at_a_time, monkeypatch):
    """All rows take part in a recording, finished groups stay in the batch until half of them are done, room doubles."""

    def end_often(module, args, output):
        output[..., policy.eos_ids[0]] = output.logsumexp(-1) - 3  # about one token in twenty
        return output

    policy.model.lm_head.register_forward_hook(end_often)
    prompts = [policy.prompt(draw(make_scene("train", index))) for index in range(9)]
    want = sample_rollouts(policy, prompts, keys(9, 2), 80)
    sizes = []

    def spy(function):
        replay, result = run_now(function)
        sizes.append(len(result))
        return replay, result

    monkeypatch.setattr("grpo.rollout.Decoder", RecordingDecoder)
    monkeypatch.setattr("grpo.decode.record", spy)
    budget = groups_at_a_time * (max(len(prompt.input_ids) for prompt in prompts) + 2 * 80)
    got = sample_rollouts(policy, prompts, keys(9, 2), 80, token_budget=budget)
    assert torch.equal(got.tokens, want.tokens) and torch.allclose(got.logprobs, want.logprobs, atol=1e-5)
    if groups_at_a_time == 9:  # nobody waits: 9 groups, then at most 4, 2 and 1, and twice as much room after 64 tokens
        assert sizes[0] == 18 and len(sizes) <= 5 and sizes == sorted(sizes, reverse=True)
        assert want.lengths.view(9, 2).amax(1).unique().numel() > 5  # more ends than recordings


def test_decoding_goes_on_without_recordings_and_says_so_once(policy, prompts, monkeypatch, recwarn):
    want = sample_rollouts(policy, prompts, keys(4, 2), 6)

    def fail(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("grpo.rollout.Decoder", RecordingDecoder)
    monkeypatch.setattr("grpo.decode.record", fail)
    got = sample_rollouts(policy, prompts, keys(4, 2), 6)
    assert torch.equal(got.tokens, want.tokens)
    said = [str(warning.message) for warning in recwarn if "CUDA graphs" in str(warning.message)]
    assert said == ["decoding without CUDA graphs, several times slower (operation not permitted when stream is capturing)"]


def test_groups_are_refilled_a_quarter_of_the_room_at_a_time(policy, monkeypatch):
    """24 prompts in room for 8: one prefill of 8, then never fewer than 2 at a time while there are as many."""

    def end_often(module, args, output):
        output[..., policy.eos_ids[0]] = output.logsumexp(-1) - 1.5
        return output

    policy.model.lm_head.register_forward_hook(end_often)
    prompts = [policy.prompt(draw(make_scene("train", 0)))] * 24
    whole = sample_rollouts(policy, prompts, keys(24, 1), 30)
    sizes = []
    monkeypatch.setattr(rollout, "read_prompts", lambda policy, some: sizes.append(len(some)) or read_prompts(policy, some))
    refilled = sample_rollouts(policy, prompts, keys(24, 1), 30, token_budget=8 * (len(prompts[0].input_ids) + 30))
    assert sizes[0] == 8 and min(sizes[1:-1]) >= 2 and sum(sizes) == 24
    assert refilled.captions == whole.captions


def test_the_cache_grows_and_refills_past_its_first_room(policy, prompts):
    """64 tokens at first; 100 are written, by groups that join at different times."""
    whole = sample_rollouts(policy, prompts, keys(4, 2), 100)
    refilled = sample_rollouts(policy, prompts, keys(4, 2), 100, token_budget=2 * (40 + 2 * 100))
    assert whole.lengths.max() > 64 and torch.equal(refilled.tokens, whole.tokens)
    logprobs, _ = CompletionScorer(policy.model, policy.pad_id, policy.forbidden_ids)(whole)
    assert torch.allclose(logprobs, whole.logprobs, atol=1e-3)


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
