"""One tokenizer for both toy models: byte-level BPE on the toy world's texts, with Qwen's special
tokens and ChatML."""

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from data.choices import LETTERS
from data.toy.world import COMMON_KNOWLEDGE, DOMAINS, make_scene, scene_questions, write_caption
from grpo.policy import CAPTION_INSTRUCTION
from reward.caprl import (
    ABSTAIN,
    ABSTAIN_EXAMPLES,
    ANSWER_INSTRUCTION,
    ANSWER_START,
    WORKED_EXAMPLES,
)

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)
VOCAB_SIZE = 1024

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}\
{% endif -%}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # Qwen2's own way of cutting text into words: AutoTokenizer puts it in place of any other in a
    # Qwen2's folder.
    qwen = Qwen2Tokenizer().backend_tokenizer
    tokenizer.normalizer, tokenizer.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens=[token for token in SPECIAL_TOKENS
                              if token not in ("<|im_end|>", "<|endoftext|>")],
    )


def _corpus():
    """Enough of every text that each of its words becomes one token."""
    rng = random.Random("toy:corpus")
    fixed = [ANSWER_INSTRUCTION, WORKED_EXAMPLES, ABSTAIN_EXAMPLES, ABSTAIN,
             "user assistant system"]
    frame = "Caption: <Caption Start> <Caption End>\nQuestion:"
    fixed += [f"{ANSWER_START} {letter}\n{letter}) {frame}" for letter in LETTERS]
    fixed += [text for text, _, _ in COMMON_KNOWLEDGE] + [CAPTION_INSTRUCTION]
    fixed += [f" {value} {value}\n" for values in DOMAINS.values() for value in values]
    fixed += [f"#### {n}. **\n   - {letter}) **\n**Answer:** {letter})\n------\n"
              for n, letter in enumerate("ABCD", start=1)]
    fixed += ["\nWhat\nWhich\nWhere\nHow\n"]
    yield from fixed * 40
    for index in range(600):
        scene = make_scene("train", index)
        yield write_caption(scene.family, scene.facts)
        for question in scene_questions(scene):
            options = [f"{LETTERS[0]}) {rng.choice(question.choices)}" for _ in range(2)]
            yield f" {question.question}\n" + "\n".join(options)
