"""How much memory a rank needs, part by part, from the shapes alone: the models may be on the meta
device.

Counted are weights, what is gathered of them, caches and what autograd keeps, at the longest
captions that the settings allow. Not counted: what the allocator leaves unused, the optimizer's
step, and the libraries themselves. `python bench/memory.py` holds it against measurements.
`train.py --check` measures instead (tools/memory.py).
"""

from torch import nn
from transformers import PreTrainedModel

from grpo.config import TrainConfig
from grpo.logprobs import HEAD_ROWS
from tools.memory import (
    cache_bytes,
    head_dim,
    num_parameters,
    pixel_bytes,
    rollout_bytes,
    step_images,
)


def estimate_memory(policy: PreTrainedModel, verifier: PreTrainedModel | None, config: TrainConfig,
                    num_ranks: int, is_gpu: bool, prompt_tokens: int, image_tokens: int,
                    asking_tokens: int) -> dict[str, int]:
    """Bytes at the peak on each rank by part; "peak" is their sum, in which only the hungriest of
    the phases counts.

    prompt_tokens: T, of the longest prompt, of which image_tokens are the image's. asking_tokens:
    of the verifier's prompt, beside the caption.
    """
    width = 2 if is_gpu else 4  # bytes of a number in the compute dtype
    has_one_model = num_ranks == 1 and not is_gpu  # one model samples and learns
    is_sharded = num_ranks > 1 or is_gpu
    shards = num_ranks // config.replicas
    parameters = sum(parameter.numel() for name, parameter in policy.named_parameters()
                     if "lora_" not in name)  # of adapters below
    visual = policy.model.visual
    merger = sum(num_parameters(part) for name, part in visual.named_children() if "merger" in name)
    frozen = {"none": 0, "vision": num_parameters(visual) - merger,
              "vision+merger": num_parameters(visual)}[config.freeze]
    adapters = config.lora.lora_rank * _ins_and_outs(policy.model.language_model.layers)
    trained = adapters or parameters - frozen
    parts = {
        "sampler's weights": 0 if has_one_model else width * parameters,
        "masters and moments": (12 * trained + 4 * frozen) // shards,
        "reference": width * parameters // shards,
        "verifier's weights": width * num_parameters(verifier) if verifier is not None else 0,
    }
    if adapters:  # one copy is sampler, trainer and reference, whole on every rank
        parts |= {"sampler's weights": width * parameters, "masters and moments": 12 * adapters}
    if config.kl_coef == 0 or config.offload_reference or adapters:
        parts["reference"] = 0
    has_features = ((adapters > 0 or config.freeze == "vision+merger")
                    and not hasattr(visual, "deepstack_merger_list"))  # see `encode_images`
    parts["images"] = step_images(policy, config, num_ranks, width, image_tokens, is_gpu,
                                  has_features)
    if is_sharded and not adapters:
        blocks = [num_parameters(block)
                  for block in [*policy.model.language_model.layers, *visual.blocks]]
        # The root's and two blocks' are whole at a time, and the gradients of as many.
        whole = parameters - sum(blocks) + 2 * max(blocks)
        parts["gathered weights and gradients"] = (2 * width + 4) * whole
    phases = {
        "rollout": rollout_bytes(policy, config, num_ranks, width, prompt_tokens, image_tokens),
        "verifier": _verifier(verifier, config, num_ranks, width, asking_tokens),
        "update": _update(
            policy, config, num_ranks, width, prompt_tokens, image_tokens,
            gradients=4 * adapters or 4 * (parameters - frozen) // shards
        ),
    }
    hungriest = max(phases, key=phases.get)
    parts |= {f"phase {name}": size for name, size in phases.items()}
    static = [size for name, size in parts.items() if not name.startswith("phase")]
    parts["peak"] = sum(static) + phases[hungriest]
    return parts


def _ins_and_outs(layers: nn.Module) -> int:
    """Inputs and outputs of all linear layers: the parameters of adapters of rank 1."""
    linears = (module for module in layers.modules() if isinstance(module, nn.Linear))
    return sum(linear.in_features + linear.out_features for linear in linears)


def _verifier(verifier: PreTrainedModel | None, config: TrainConfig, num_ranks: int, width: int,
              asking_tokens: int) -> int:
    """The cache of a batch, the widest layer's activations and, where it replies in words, the
    logits of the next token of each row."""
    if verifier is None:
        return 0
    text = verifier.config.get_text_config()
    replies = config.verifier_mode == "sample"
    reply_tokens = config.verifier_max_new_tokens if replies else 0
    room = getattr(text, "max_position_embeddings", None) or VERIFIER_TOKENS  # Bloom has no limit
    longest = min(config.max_new_tokens + asking_tokens + reply_tokens, room)
    questions = config.reward_config.num_questions * config.reward_config.num_shuffles
    rows = config.prompts_per_step // num_ranks * config.group_size * questions
    tokens = min(VERIFIER_TOKENS, rows * longest)
    wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    activations = tokens // questions * width * (3 * wide + 6 * text.hidden_size)
    # As they come, in float32, and the probabilities.
    logits = tokens // longest * text.vocab_size * (width + 4 + 4) if replies else 0
    return tokens * cache_bytes(verifier, width) + activations + logits


VERIFIER_TOKENS = 262_144
"""The token budget of reward.caprl.Verifier."""


def _update(policy: PreTrainedModel, config: TrainConfig, num_ranks: int, width: int,
            prompt_tokens: int, image_tokens: int, gradients: int) -> int:
    """What autograd keeps of one micro-batch, the head's logits and its gradient;
    `grpo/logprobs.py` has the shapes.

    gradients: bytes of the weights' gradients. They are beside all this from the second micro-batch
    on; in the first they come as what autograd kept goes.
    """
    text, vision = policy.config.get_text_config(), policy.config.vision_config
    size, length = config.group_size, config.max_new_tokens
    group_tokens = prompt_tokens + size * length
    groups = min(config.prompts_per_step // num_ranks,
                 max(1, config.micro_batch_tokens // group_tokens))
    tokens, rows, seen = groups * group_tokens, groups * size, prompt_tokens + length
    size_of_head = head_dim(text)
    queries, keys = text.num_attention_heads * size_of_head, text.num_key_value_heads * size_of_head
    # of two norms: input in float32, normalised, weighted
    norms = 2 * text.hidden_size * (4 + 2 * width)
    layer = tokens * (norms + width * (2 * queries + 2 * keys + 4 * text.intermediate_size))
    layer += width * (groups * prompt_tokens * queries + 2 * rows * seen * keys
                      + 2 * rows * length * queries)
    layer += width * groups * length * seen  # the mask, as numbers
    patches = vision.spatial_merge_size**2 * groups * image_tokens
    block = patches * vision.hidden_size * (2 * (4 + 2 * width) + 6 * width)
    block += patches * width * 4 * vision.intermediate_size
    stacks = [(text.num_hidden_layers, layer, tokens * text.hidden_size * width)]
    if config.freeze == "none" and not config.lora.lora_rank:
        stacks.append((vision.depth, block, patches * vision.hidden_size * width))
    if config.gradient_checkpointing:  # inputs of all layers, and one layer at a time
        kept = sum(depth * size_of_input + whole for depth, whole, size_of_input in stacks)
    else:
        kept = sum(depth * whole for depth, whole, _ in stacks)
    # as they came, side by side, cast
    kept += 3 * pixel_bytes(policy, groups * image_tokens)
    # gradients inside a layer
    inside = tokens * width * (2 * text.intermediate_size + 4 * text.hidden_size)
    head = 0 if config.lora.lora_rank else 4 * text.vocab_size * text.hidden_size  # its gradient
    # In bfloat16 the logits are also there as they came, later their gradient; and so is the
    # weight's, before it is added.
    copy = 0 if width == 4 else width
    rows_at_a_time = min(HEAD_ROWS["cpu" if width == 4 else "cuda"], rows * length)
    logits = (4 + copy) * rows_at_a_time * text.vocab_size
    logits += copy * text.vocab_size * text.hidden_size * (not config.lora.lora_rank)
    widest = head + max(logits, inside)  # the logits are freed before the layers' backward
    is_one = groups * num_ranks == config.prompts_per_step
    return max(kept + widest, gradients + head + inside) if is_one else gradients + kept + widest
