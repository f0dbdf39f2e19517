"""Three ways to score N questions on one caption, side by side: how much does sharing the caption
save?

    python bench/verifier.py

separate   every question with its whole prompt, a row each expanded   head and caption run once,
the cache copied to a row per question (what reward/caprl.py does) packed     head run once, then
caption and questions in one row, with a mask that keeps questions apart

Random weights, since only time is measured; the scores of the three are compared before. Prints the
median over interleaved repeats and the ratio to "separate".
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.toy.world import make_scene, scene_questions, write_caption
from grpo.config import RewardConfig
from grpo.distributed import compute_dtype, local_device
from reward.attention import share_heads_
from reward.caprl import PromptWriter, ask, letter_logits, question_rows_, run_head, run_rows_


@dataclass(frozen=True)
class BenchConfig:
    """Sizes of the measurement."""

    width: int = 512
    layers: int = 8
    captions: int = 8
    sentences: int = 40
    """Length of a caption in the mean, from half to one and a half; a sentence has 6 tokens."""
    repeats: int = 5


def separate(model, head, captions, questions, letter_ids) -> Tensor:
    rows = [head + caption + row for caption, group in zip(captions, questions) for row in group]
    cache, seen = DynamicCache(config=model.config), torch.ones(1, 0, dtype=torch.long,
                                                                device=model.device)
    hidden, _, _ = run_rows_(model, rows, [0] * len(rows), cache, seen)
    return F.linear(hidden[:, -1], model.lm_head.weight[letter_ids]).float()


def expanded(model, head, captions, questions, letter_ids) -> Tensor:
    rows = question_rows_(model, head, captions, questions, run_head(model, head))
    hidden, _, _ = run_rows_(model, *rows)
    return letter_logits(model, hidden[:, -1], letter_ids)


def packed(model, head, captions, questions, letter_ids) -> Tensor:
    device = model.device
    cache, seen = DynamicCache(config=model.config), torch.ones(1, 0, dtype=torch.long,
                                                                device=device)
    _, cache, seen = run_rows_(model, [head], [0], cache, seen)
    cache.batch_repeat_interleave(len(captions))
    width = max(len(c) + sum(map(len, q)) for c, q in zip(captions, questions))
    ids, positions = torch.zeros(2, len(captions), width, dtype=torch.long, device=device)
    segments = torch.full((len(captions), width), -1, device=device)
    ends = []
    for row, (caption, group) in enumerate(zip(captions, questions)):
        at = 0
        for segment, part in enumerate([caption, *group]):
            start = len(head) + (len(caption) if segment else 0)
            ids[row, at : at + len(part)] = torch.tensor(part)
            positions[row, at : at + len(part)] = torch.arange(start, start + len(part))
            segments[row, at : at + len(part)] = segment
            at += len(part)
            if segment:
                ends.append((row, at - 1))
    sees = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    sees &= torch.ones(width, width, dtype=torch.bool, device=device).tril()
    of_head = seen.bool().expand(len(captions), width, -1)
    mask = torch.cat([of_head, sees], dim=2)[:, None]
    out = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions,
                           past_key_values=cache, use_cache=True)
    rows, places = zip(*ends)
    return F.linear(out.last_hidden_state[list(rows), list(places)],
                    model.lm_head.weight[letter_ids]).float()


def median_seconds(ways: dict[str, Callable], repeats: int, *inputs) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):  # interleaved: what else the machine does meets all alike
        for name, way in ways.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            way(*inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def main(config: BenchConfig) -> None:
    device = local_device()
    tokenizer = PreTrainedTokenizerFast.from_pretrained("data/toy/verifier")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=config.width, intermediate_size=4 * config.width,
            num_hidden_layers=config.layers, num_attention_heads=config.width // 64,
            num_key_value_heads=2, tie_word_embeddings=True,
        )
    ).eval().to(device, compute_dtype(device))
    share_heads_(model)
    writer, ways = PromptWriter(tokenizer), {"separate": separate, "expanded": expanded,
                                             "packed": packed}
    scenes = [make_scene("train", index) for index in range(config.captions)]
    captions = []
    for place, scene in enumerate(scenes):
        number = config.sentences * (config.captions + 2 * place) // (2 * config.captions)
        sentences = write_caption(scene.family, scene.facts).split(". ")
        captions.append(writer.caption_ids(". ".join((sentences * number)[:number])))
    lengths = f"{min(map(len, captions))} to {max(map(len, captions))} tokens"
    print(f"{device}, width {config.width}, {config.layers} layers, {config.captions} captions of "
          f"{lengths}")
    print("| N | " + " | ".join(ways) + " | expanded / separate | packed / separate |\n| ---: |"
          + " ---: |" * 5)
    for number in tqdm((1, 2, 4, 8), desc="N", leave=False):
        settings = RewardConfig(num_questions=number)
        questions = [
            list(map(writer.question_ids, ask(scene_questions(scene), settings, scene.id)))
            for scene in scenes
        ]
        inputs = (model, writer.head_ids, captions, questions, writer.letter_ids)
        scores = [way(*inputs) for way in ways.values()]
        tolerance = 0.1 if device.type == "cuda" else 1e-3
        assert all(torch.allclose(scores[0], other, atol=tolerance)
                   for other in scores[1:]), "the three ways disagree"
        seconds = median_seconds(ways, config.repeats, *inputs)
        ratios = [seconds[name] / seconds["separate"] for name in ("expanded", "packed")]
        cells = [f"{seconds[name]:.3f} s" for name in ways] + [f"{ratio:.2f}" for ratio in ratios]
        tqdm.write(f"| {number} | " + " | ".join(cells) + " |", file=sys.stdout)


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
