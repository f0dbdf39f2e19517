import math
from dataclasses import replace

import pytest
import torch
from conftest import keys, widen
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.toy.world import draw, make_scene
from grpo.config import LoraConfig
from grpo.logprobs import HEAD_ROWS, CompletionScorer, HeadLogprobs, group_attention, pack_groups
from grpo.lora import adapters, add_adapters_
from grpo.pretrained import make_policy
from grpo.rollout import Rollouts, sample_rollouts
from grpo.sharding import cast_weights_


def given(policy, prompts, rows: list[list[int]]) -> Rollouts:
    """Rollouts with these completion tokens."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), policy.pad_id)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
    truncated = torch.zeros(len(rows), dtype=torch.bool)
    return Rollouts(prompts, tokens, lengths, torch.zeros(tokens.shape), truncated, [""] * len(rows))


def separate_row(policy, prompt, completion: list[int]) -> torch.Tensor:
    """(L,) log-probabilities from the stock forward on one unpacked row; the shift written out by hand."""
    ids = torch.cat([prompt.input_ids, torch.tensor(completion)])[None]
    logits = policy.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=prompt.pixel_values, image_grid_thw=prompt.grid,
        mm_token_type_ids=(ids == policy.model.config.image_token_id).int(),
    ).logits[0]
    logits[:, list(policy.forbidden_ids)] = -torch.inf
    start = len(prompt.input_ids)
    return torch.stack([logits[start + t - 1].log_softmax(-1)[token] for t, token in enumerate(completion)])


def test_a_pad_id_inside_the_prompt_keeps_its_attention(policy):
    """Masks come from lengths: an instruction that contains the pad token is read like any other."""
    image = draw(make_scene("train", 0))
    prompts = [policy.prompt(image, "Describe <|endoftext|> this <|endoftext|> image."), policy.prompt(image)]
    assert policy.pad_id in prompts[0].input_ids.tolist() and len(prompts[0].input_ids) != len(prompts[1].input_ids)
    rollouts = sample_rollouts(policy, prompts, keys(2, 2), 6)
    logprobs, _ = CompletionScorer(policy.model, policy.forbidden_ids)(rollouts)
    for row in range(4):
        tokens = rollouts.tokens[row, : rollouts.lengths[row]].tolist()
        want = separate_row(policy, prompts[row // 2], tokens)
        assert torch.allclose(rollouts.logprobs[row, : len(tokens)], want, atol=1e-4)
        assert torch.allclose(logprobs[row, : len(tokens)], want, atol=1e-4)


@torch.no_grad()
def test_sampler_and_trainer_agree_in_bfloat16(policy, prompts):
    """As on a GPU, where both compute in it, with kernels of their own. Tolerance: 0.03 nats in the
    mean, 0.25 for the worst token (seen on three seeds: 0.014 and 0.10). Rounding weights and
    activations itself moves a token by 0.08 in the mean."""
    cast_weights_(policy.model, torch.bfloat16)
    rollouts = sample_rollouts(policy, prompts, keys(4, 3), 24)
    logprobs, _ = CompletionScorer(policy.model, policy.forbidden_ids)(rollouts)
    gaps = (logprobs - rollouts.logprobs)[rollouts.completion_mask].abs()
    assert 0 < gaps.mean() < 0.03 and gaps.max() < 0.25


ROWS = [[30, 31, 32, 33, 34], [35], [36, 37], [38, 39, 40], [41, 42, 43, 44], [45, 46]]


def test_a_packed_group_equals_separate_rows_in_values_and_gradients(policy, prompts):
    prompts = prompts[1:3]  # images of different sizes, completions of different lengths
    rollouts = given(policy, prompts, ROWS)
    scorer = CompletionScorer(policy.model, policy.forbidden_ids)
    weights = torch.randn(rollouts.tokens.shape, generator=torch.Generator().manual_seed(0))
    logprobs, _ = scorer(rollouts)
    (logprobs * weights).sum().backward()
    packed = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    policy.model.zero_grad()
    total = 0.0
    for row, completion in enumerate(ROWS):
        want = separate_row(policy, prompts[row // 3], completion)
        assert torch.allclose(logprobs[row, : len(completion)], want, atol=1e-5)
        assert (logprobs[row, len(completion) :] == 0).all()
        total = total + (want * weights[row, : len(completion)]).sum()
    total.backward()
    for name, parameter in policy.model.named_parameters():
        assert torch.allclose(
            packed[name], parameter.grad, rtol=1e-4, atol=1e-5 * parameter.grad.abs().max().item()
        ), name


def test_group_attention_against_its_definition():
    """Two ragged groups: prompts of 2 and 3 tokens, completions of 2, 0 and 1, and of 1, 3 and 1; 3 heads a key."""
    owners = [0, 0, 1, 1, 3, 4, 4, 4, 5, 6, 6, 6, 7]  # 0 and 4 prompts, the others their completions
    prompt_of = [0] * 4 + [4] * 4
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 6, 13, 4), torch.randn(1, 2, 13, 4), torch.randn(1, 2, 13, 4)
    segments = [[2, 2, 0, 1], [3, 1, 3, 1]]
    out, _ = group_attention(None, query, key, value, None, scaling=0.3, segments=segments)
    for head in range(6):
        for i in range(13):
            seen = [j for j in range(i + 1) if owners[j] in (owners[i], prompt_of[owners[i]])]
            weights = (0.3 * key[0, head // 3, seen] @ query[0, head, i]).softmax(0)
            assert torch.allclose(out[0, i, head], weights @ value[0, head // 3, seen], atol=1e-6)


def test_packing_hand_drawn(policy, prompts):
    """A prompt with completions of 3 and 1 tokens, another with 1 and 2: end to end, without padding."""
    rollouts = given(policy, prompts[1:3], [[30, 31, 32], [33], [34], [35, 36]])
    packed = pack_groups(rollouts)
    (first, second), (start, other) = (
        [len(prompt.input_ids) for prompt in prompts[1:3]], [prompt.next_position for prompt in prompts[1:3]]
    )
    assert packed.segments == [[first, 2, 0], [second, 0, 1]]  # no last tokens: they predict nothing
    ids, positions, end = packed.input_ids[0].tolist(), packed.position_ids[:, 0], first + 2 + second
    assert ids == [*prompts[1].input_ids.tolist(), 30, 31, *prompts[2].input_ids.tolist(), 35]
    assert positions[:, first : first + 2].tolist() == [[start, start + 1]] * 3
    assert positions[:, first + 2 :].tolist() == [[*row, other] for row in prompts[2].position_ids.tolist()]
    assert packed.sources.tolist() == [first - 1, first, first + 1, first - 1, end - 1, end - 1, end]
    assert rollouts.tokens.flatten()[packed.places].tolist() == [30, 31, 32, 33, 34, 35, 36]


def test_no_shift_by_one(policy, prompts):
    """A model that always puts all its weight on the successor of the last token: log-probability 0 everywhere."""
    vocabulary = policy.model.config.text_config.vocab_size

    def successor(module, args, output):
        ids = seen[-1][0]
        output.last_hidden_state = torch.nn.functional.one_hot((ids + 1) % vocabulary, vocabulary) * 100.0
        return output

    seen = []
    inner = policy.model.model
    inner.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args))
    inner.register_forward_hook(successor)
    policy.model.lm_head.weight = torch.nn.Parameter(torch.eye(vocabulary))
    last = prompts[0].input_ids[-1].item()
    rollouts = given(policy, prompts[:1], [[last + 1, last + 2, last + 3], [last + 1]])
    logprobs, entropies = CompletionScorer(policy.model, ())(rollouts)
    assert not logprobs._is_view() and not entropies._is_view()  # FSDP2 warns of views at each start
    assert logprobs.abs().max() < 1e-6 and entropies.abs().max() < 1e-6
    wrong, _ = CompletionScorer(policy.model, ())(
        given(policy, prompts[:1], [[last, last + 1], [last + 2]])
    )
    assert (wrong[:, 0] < -50).all()


def test_the_eos_token_gets_gradient_even_where_pad_is_eos(policy, prompts):
    eos = policy.eos_ids[0]
    rollouts = given(replace(policy, pad_id=eos), prompts[:1], [[30, eos], [31, 32, 33]])
    logprobs, _ = CompletionScorer(policy.model, policy.forbidden_ids)(rollouts)
    gradients = []
    for logprob in (logprobs[0, 1], separate_row(policy, prompts[0], [30, eos])[1]):
        policy.model.zero_grad()
        logprob.backward()
        gradients.append(policy.model.model.language_model.norm.weight.grad.clone())
    assert logprobs[0, 1] < 0 and gradients[0].abs().max() > 0
    assert torch.allclose(gradients[0], gradients[1], atol=1e-4 * gradients[1].abs().max().item())


def test_more_padding_and_batch_mates_change_nothing(policy, prompts):
    scorer = CompletionScorer(policy.model, policy.forbidden_ids)
    together, _ = scorer(given(policy, prompts[:2], [[30, 31], [32], [33] * 9, [34]]))
    alone, _ = scorer(given(policy, prompts[:1], [[30, 31], [32]]))
    assert torch.allclose(together[:2, :2], alone, atol=1e-5)
    swapped, _ = scorer(given(policy, prompts[:1], [[32], [30, 31]]))
    assert torch.allclose(swapped.flip(0), alone, atol=1e-5)


def full_head(hidden, weight, targets, temperature, forbidden):
    logits = hidden @ weight.T / temperature
    logits = logits.index_fill(1, torch.tensor(forbidden), -torch.inf)
    logp = logits.log_softmax(-1)
    keep = [i for i in range(weight.shape[0]) if i not in forbidden]
    entropy = -(logp[:, keep].exp() * logp[:, keep]).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


@pytest.mark.parametrize("rows", [1, 3, 33, 100])  # neither 33 nor the 32 rows of a softmax divide 70
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_head_in_chunks_equals_the_whole(rows, temperature, monkeypatch):
    monkeypatch.setitem(HEAD_ROWS, "cpu", rows)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(70, 8, generator=generator), torch.randn(20, 8, generator=generator)
    targets, outer = torch.randint(3, 20, (70,), generator=generator), torch.randn(70, generator=generator)
    results = []
    for head in (lambda h, w: HeadLogprobs.apply(h, w, targets, temperature, torch.tensor([0, 2])),
                 lambda h, w: full_head(h, w, targets, temperature, [0, 2])):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropies = head(h, w)
        (logprobs * outer).sum().backward()
        results.append((logprobs, entropies, h.grad, w.grad))
    for got, want in zip(*results):
        assert torch.allclose(got, want, atol=3e-5)  # entropies are differences of numbers of about 15


def test_head_in_bfloat16_is_near(monkeypatch):
    """8 bits: logits of about 3 are off by up to 0.008, and so are log-probabilities."""
    monkeypatch.setitem(HEAD_ROWS, "cpu", 33)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 8, generator=generator).bfloat16() for size in (50, 20))
    targets = torch.randint(3, 20, (50,), generator=generator)
    results = []
    for head in (lambda h, w: HeadLogprobs.apply(h, w, targets, 1.0, torch.tensor([0, 2])),
                 lambda h, w: full_head(h.float(), w.float(), targets, 1.0, [0, 2])):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropies = head(h, w)
        logprobs.sum().backward()
        results.append((logprobs, entropies, h.grad.float(), w.grad.float()))
    assert results[0][0].dtype == results[0][1].dtype == torch.float32
    for got, want in zip(*results):
        assert torch.allclose(got, want, atol=0.05, rtol=0.02)


def test_entropy_of_uniform_logits_is_log_v():
    none = torch.tensor([], dtype=torch.long)
    _, entropy = HeadLogprobs.apply(torch.zeros(3, 4), torch.randn(50, 4), torch.zeros(3, dtype=torch.long), 1.0, none)
    assert entropy.tolist() == pytest.approx([math.log(50)] * 3, abs=1e-5)
    _, entropy = HeadLogprobs.apply(
        torch.zeros(3, 4), torch.randn(50, 4), torch.ones(3, dtype=torch.long), 1.0, torch.tensor([7, 8])
    )
    assert entropy.tolist() == pytest.approx([math.log(48)] * 3, abs=1e-5)


def test_group_order_is_kept(policy, prompts):
    """Permuting whole groups permutes the result; splitting them one by one gives the same."""
    rollouts = sample_rollouts(policy, prompts, keys(4, 2), 9)
    scorer = CompletionScorer(policy.model, policy.forbidden_ids)
    whole, entropies = scorer(rollouts)
    for p in range(4):
        part, part_entropies = scorer(rollouts.groups(p, p + 1))
        assert torch.allclose(whole[2 * p : 2 * p + 2], part, atol=1e-5)
        assert torch.allclose(entropies[2 * p : 2 * p + 2], part_entropies, atol=1e-4)


@pytest.mark.parametrize("targets", ["", r"language_model\..*_proj|visual\.(merger|deepstack_merger_list).*linear_fc\d"])
def test_qwen3_vl_samples_and_scores_alike(tokenizer, targets):
    """Another family behind the same calls: deepstack features, interleaved M-RoPE, patches of 16."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6], mrope_interleaved=True),
        ),
        vision_config=dict(
            depth=4, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=16, spatial_merge_size=2,
            temporal_patch_size=2, out_hidden_size=64, num_position_embeddings=256, deepstack_visual_indexes=[0, 1],
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )
    processor = Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 64 * 64, "longest_edge": 224 * 224})
    policy = make_policy(widen(Qwen3VLForConditionalGeneration(config)), tokenizer, processor)
    if targets:
        add_adapters_(policy.model, LoraConfig(lora_rank=4, lora_targets=targets), "vision", seed=0)
        assert len(adapters(policy.model)) == 4 * 7 + 3 * 2
        for layer in adapters(policy.model).values():
            layer.lora_b.data.normal_(std=0.05)
    prompts = [policy.prompt(draw(make_scene("train", index))) for index in range(3)]
    rollouts = sample_rollouts(policy, prompts, keys(3, 2), 12)
    logprobs, _ = CompletionScorer(policy.model, policy.forbidden_ids)(rollouts)
    assert torch.allclose(logprobs, rollouts.logprobs, atol=1e-4) and len(set(rollouts.captions)) == 6
