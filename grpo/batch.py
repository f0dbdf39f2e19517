"""Which groups the sampler writes at a time, and which of their rows are still going on."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from grpo.decode import Decoder
from grpo.policy import Prompt

PREFILL_PROMPTS = 16
"""Most prompts, with their images, in a forward of the model."""
PREFILL_TOKENS = 1 << 15
"""Most tokens in it, padding included, unless a prompt alone has more."""


def count_together(lengths: Sequence[int]) -> int:
    """How many of the first of these prompts, by their tokens, a forward takes."""
    longest, num = 0, 0
    for length in lengths[:PREFILL_PROMPTS]:
        longest = max(longest, length)
        if num and (num + 1) * longest > PREFILL_TOKENS:
            break
        num += 1
    return num


class Batch:
    """Which prompts' groups the decoder holds, and which of their rows are still being written. All
    of this is known on the host; the device is told when it changes, and is never asked.

    Prompts are admitted by the room that captions take, not by the longest that is allowed. If the
    room runs out as they grow, the youngest groups are set back. They wait and are later drawn
    anew, which gives the same tokens up to rounding.
    """

    def __init__(self, decoder: Decoder, prompts: Sequence[Prompt], token_budget: int):
        self.decoder, self.token_budget = decoder, token_budget
        self.starts = [prompt.next_position for prompt in prompts]
        """For each prompt, the position in the model of a completion's first token."""
        self.waiting = list(range(len(prompts)))
        """Numbers of prompts."""
        self.groups: list[int] = []
        """For each group in the decoder, the number of its prompt."""
        self.live: list[int] = []
        """Places in the decoder of the n rows that are being written, ascending."""
        self.where = torch.empty(4, 0, dtype=torch.long)
        """(4, n) on the device. For each of these rows: the number of its completion and its place
        in the decoder. Also its next token's place in the completion and position in the model."""
        self.lengths = [len(prompt.input_ids) for prompt in prompts]
        self.longest_prompt = max(self.lengths)
        self.num_ended, self.longest_ended, self.patience = 0, 0, 1

    def slots(self, length: int) -> int:
        """Groups that the budget has room for when the longest caption has this length."""
        return max(1,
                   self.token_budget // self.decoder.tokens_of_group(self.longest_prompt, length))

    def next_prompts(self) -> list[int]:
        """Numbers of the waiting prompts that should be added now."""
        length = self.longest_ended
        if self.num_ended <= len(self.live):  # too few to know
            length = max(length, self.decoder.max_new_tokens // 4)
        slots = self.slots(max(length, self.decoder.longest + 1))
        num_free = slots - len(self.groups)
        # Several at a time: each time the cache is copied, and a forward over several prompts is
        # cheaper than several forwards.
        self.patience = max(1, slots // 4)
        if num_free < self.patience:
            return []
        together = count_together([self.lengths[number] for number in self.waiting])
        return self.waiting[: min(num_free, together)]

    def add(self, new: list[int], cache: DynamicCache, mask: Tensor) -> None:
        """Adds the groups of the first of the waiting prompts, after their forward."""
        size, num_groups = self.decoder.group_size, len(self.groups)
        self.decoder.add(cache, mask)
        self.live += range(num_groups * size, (num_groups + len(new)) * size)
        self.groups, self.waiting = self.groups + new, self.waiting[len(new) :]
        self._locate()

    def stopped(self, stops: list[bool]) -> list[tuple[int, int, int]]:
        """Of each of the n rows that stops: its number among them, the number of its completion,
        and the completion's length."""
        size, ages = self.decoder.group_size, self.decoder.ages
        places = [(i, place) for i, place in enumerate(self.live) if stops[i]]
        return [(i, self._completion(place), ages[place // size] + 1) for i, place in places]

    def drop(self, stops: list[bool]) -> tuple[Tensor | None, list[int]]:
        """Takes out the rows that stop. Groups without a live row go too, if that is worth a copy
        of the cache. The youngest groups go if the next token has no room.

        Returns which of the n rows are left, None for all, and the numbers of the prompts that were
        set back.
        """
        decoder, size = self.decoder, self.decoder.group_size
        stopped = self.stopped(stops)
        slots = self.slots(decoder.longest + 1)
        if not stopped and len(self.groups) <= slots:
            return None, []
        self.num_ended += len(stopped)
        self.longest_ended = max([self.longest_ended, *(length for _, _, length in stopped)])
        rows = [i for i, stop in enumerate(stops) if not stop]
        alive = sorted({self.live[i] // size for i in rows})
        num_done = len(self.groups) - len(alive)
        # A copy makes room. If nobody waits it only saves work, and then a step that is recorded
        # has to be recorded again.
        enough = len(self.groups) / 2 if decoder.uses_graphs else 1
        enough = self.patience if self.waiting else enough
        chosen = list(range(len(self.groups)))
        if not alive or num_done >= enough or len(self.groups) > slots:
            chosen = alive[:slots]  # groups stand in the order in which they came: the oldest first
            decoder.keep(chosen)
        number = {group: place for place, group in enumerate(chosen)}
        set_back = [self.groups[group] for group in alive if group not in number]
        rows = [i for i in rows if self.live[i] // size in number]
        live = [self.live[i] for i in rows]
        self.live = [number[place // size] * size + place % size for place in live]
        self.groups = [self.groups[group] for group in chosen]
        self.waiting = set_back + self.waiting
        self._locate()
        return decoder.to_device(rows), set_back

    def _completion(self, place: int) -> int:
        size = self.decoder.group_size
        return self.groups[place // size] * size + place % size

    def _locate(self) -> None:
        size = self.decoder.group_size
        ages = [self.decoder.ages[place // size] for place in self.live]
        starts = [self.starts[self.groups[place // size]] for place in self.live]
        positions = [start + age for start, age in zip(starts, ages)]
        completions = [self._completion(place) for place in self.live]
        self.where = self.decoder.to_device([completions, self.live, ages, positions])
