"""The policy's prompts and the ids that it may write."""

from dataclasses import replace

import pytest
import torch
import transformers as hf
from conftest import keys
from PIL import Image

from data.toy.world import draw, make_scene
from grpo.logprobs import CompletionScorer
from grpo.policy import chat_text, encode_images
from grpo.pretrained import make_policy
from grpo.rollout import read_prompts, sample_rollouts
from tools.check import token_names


def pad_vocabulary(model, size, likely):
    """Rows behind the vocabulary, as checkpoints have them, that win wherever token `likely` would."""
    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[old:] = 1.5 * model.get_output_embeddings().weight[likely]
    return model


def test_ids_beyond_the_tokenizer_are_never_sampled_and_never_scored(policy, prompts):
    """A padded vocabulary changes neither what is drawn nor its probability."""
    plain = sample_rollouts(policy, prompts, keys(4, 2), 16)
    scored = CompletionScorer(policy.model, policy.forbidden_ids)(plain)
    likely = plain.tokens[0, 0].item()
    padded = make_policy(pad_vocabulary(policy.model, 896, likely), policy.tokenizer, policy.image_processor)
    assert set(range(751, 896)) <= set(padded.forbidden_ids)
    named = token_names(padded, padded.forbidden_ids)
    assert "145 ids without a token" in named and "751" not in named
    rollouts = sample_rollouts(padded, prompts, keys(4, 2), 16)
    assert torch.equal(rollouts.tokens, plain.tokens) and torch.allclose(rollouts.logprobs, plain.logprobs, atol=1e-5)
    again = CompletionScorer(padded.model, padded.forbidden_ids)(rollouts)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(again, scored))


def test_an_id_without_a_token_inside_the_vocabulary_is_forbidden(policy, monkeypatch):
    vocabulary = {token: i for token, i in policy.tokenizer.get_vocab().items() if i != 300}
    monkeypatch.setattr(policy.tokenizer, "get_vocab", lambda: vocabulary)
    assert 300 in make_policy(policy.model, policy.tokenizer, policy.image_processor).forbidden_ids


DATED = "Today Date: {{ strftime_now('%d %b %Y') }}. {{ strftime_now(\"%-d/%m/%y\") }}\n{{ messages[0].content }}"


def test_a_template_that_asks_for_the_date_gets_a_fixed_one():
    tokenizer = hf.PreTrainedTokenizerFast.from_pretrained("data/toy/policy")
    tokenizer.chat_template = DATED
    assert chat_text(tokenizer, "hello") == "Today Date: 01 Jan 2025. 1/01/25\nhello"
    # Llama 3's, which takes the function only where it is there.
    tokenizer.chat_template = (
        "\n  {%- if strftime_now is defined %}{% set day = strftime_now('%B') %}{% endif %}{{ day }}"
    )
    assert chat_text(tokenizer, "hello").strip() == "January"


def test_one_prompt_as_before(policy):
    """Loading draws a prompt of its own; it leaves nothing behind."""
    image = draw(make_scene("train", 0))
    first = policy.prompt(image)
    make_policy(policy.model, policy.tokenizer, policy.image_processor).prompt(Image.new("RGB", (90, 50)))
    assert torch.equal(policy.prompt(image).input_ids, first.input_ids)


@pytest.mark.parametrize("are_known", [False, True])
def test_features_that_are_not_as_many_as_image_tokens_are_refused(policy, prompts, are_known):
    """One image token more, or less, than the tower has features for."""
    first, image_id = prompts[0], policy.model.config.image_token_id
    if are_known:
        [first] = encode_images(policy, [first])
    place = first.input_ids.tolist().index(image_id)
    number = int((first.input_ids == image_id).sum())
    fewer = torch.cat([first.input_ids[:place], first.input_ids[place + 1 :]])
    more = torch.cat([first.input_ids[: place + 1], first.input_ids[place:]])
    for ids, tokens in ((fewer, number - 1), (more, number + 1)):
        wrong = replace(first, input_ids=ids, position_ids=torch.arange(len(ids)).expand(3, -1))
        with pytest.raises(ValueError, match=f"expected {tokens} features of images, .* found {number}"):
            read_prompts(policy, [wrong])
