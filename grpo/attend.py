"""Attention of a decoding step on a GPU: two Triton kernels, in place of the products and the
softmax of grpo/layers.py.

The G captions of an image read its prompt's keys together, and each its own. Keys are dealt to many
programs, since a GPU has more processors than there are images. Each program writes a part of the
result. Then the parts are summed by their weights (as Flash-Decoding does). Only keys that are to
be seen are read.

Shape letters are those of grpo/decode.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of those tried on an H200, the fastest: keys that a program reads at a time, queries that it has
# at most, programs for the prompts and for the captions, and what Triton may overlap.
KEYS, TILE, PROGRAMS, STAGES = 64, 32, 256, 2


@torch.library.custom_op("grpo::attend", mutates_args=())
def attend(query: Tensor, prompt_keys: Tensor, prompt_values: Tensor, keys: Tensor, values: Tensor,
           padding: Tensor, slots: Tensor) -> Tensor:
    """Attention for the next token of all captions, scaled by 1 / sqrt(D): (B, R * K, D), as query.

    prompt_keys, prompt_values: (P, K, T, D). keys, values: (P, K, G, room, D) of the captions. All
    four are contiguous. padding: (P,) int64, places on the left of each prompt that are not seen.
    slots: (B,) int64, the place of each caption's newest keys. D is a power of 2, 16 or more.
    """
    (num_p, num_kv, num_g, room, width), heads = keys.shape, query.shape[1]
    assert len(query) == num_p * num_g, f"expected {num_p * num_g} rows, found {len(query)}"
    caches = prompt_keys, prompt_values, keys, values
    assert all(part.is_contiguous() for part in caches), "expected contiguous keys and values"
    if query.stride()[1:] != (width, 1):
        query = query.contiguous()
    size, width_of_prompts, num_rows = heads // num_kv, prompt_keys.shape[2], len(query) * heads
    tiles = num_p * num_kv * triton.cdiv(num_g * size, TILE)  # of queries that share keys
    prompt_splits = min(triton.cdiv(PROGRAMS, tiles), triton.cdiv(width_of_prompts, KEYS))
    own = len(query) * num_kv
    splits = min(triton.cdiv(PROGRAMS, own), triton.cdiv(room, KEYS))
    parts = query.new_empty(prompt_splits + splits, num_rows, width, dtype=torch.float32)
    weights = query.new_empty(prompt_splits + splits, num_rows, dtype=torch.float32)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    _attend_parts[(tiles * prompt_splits + own * splits,)](
        query, query.stride(0), prompt_keys, prompt_values, keys, values, padding, slots, parts,
        weights, num_rows, width_of_prompts, room, tiles * prompt_splits, width**-0.5,
        prompt_splits, splits, num_kv, num_g, size, width, KEYS,
        max(16, triton.next_power_of_2(size)),
        min(TILE, max(16, triton.next_power_of_2(size * num_g))), num_stages=STAGES,
    )
    _sum_parts[(triton.cdiv(num_rows, 8),)](parts, weights, out, num_rows, prompt_splits + splits,
                                            width, 8)
    return out


@attend.register_fake
def _(query, prompt_keys, prompt_values, keys, values, padding, slots):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@triton.jit(do_not_specialize=["num_rows", "prompt_room", "room", "of_prompts", "prompt_splits",
                               "splits"])
def _attend_parts(query, row_stride, prompt_keys, prompt_values, keys, values, padding, slots,
                  parts, weights, num_rows, prompt_room, room, of_prompts, scaling, prompt_splits,
                  splits, NUM_KV: tl.constexpr, NUM_G: tl.constexpr, ROWS: tl.constexpr,
                  WIDTH: tl.constexpr, KEYS: tl.constexpr, OWN: tl.constexpr,
                  SHARED: tl.constexpr):
    """The first programs read prompts' keys, the others captions'."""
    number = tl.program_id(0)
    if number < of_prompts:
        TILES: tl.constexpr = (NUM_G * ROWS + SHARED - 1) // SHARED
        split, number = number % prompt_splits, number // prompt_splits
        tile, head, group = number % TILES, number // TILES % NUM_KV, number // TILES // NUM_KV
        first = tl.load(padding + group).to(tl.int32)
        _attend_keys(query, row_stride, prompt_keys, prompt_values, parts, weights, num_rows,
                     (group * NUM_KV + head) * prompt_room, first, prompt_room, split,
                     prompt_splits, split, group * NUM_G, tile * SHARED, head, scaling,
                     NUM_KV, ROWS, NUM_G * ROWS, WIDTH, KEYS, SHARED)
    else:
        number -= of_prompts
        split, number = number % splits, number // splits
        member, head, group = number % NUM_G, number // NUM_G % NUM_KV, number // NUM_G // NUM_KV
        row = group * NUM_G + member
        stop = tl.load(slots + row).to(tl.int32) + 1
        _attend_keys(query, row_stride, keys, values, parts, weights, num_rows, number * room, 0,
                     stop, split, splits, prompt_splits + split, row, 0, head, scaling,
                     NUM_KV, ROWS, ROWS, WIDTH, KEYS, OWN)


@triton.jit
def _attend_keys(query, row_stride, keys, values, parts, weights, num_rows, base, first, stop,
                 split, splits, part, row, offset, head, scaling, NUM_KV: tl.constexpr,
                 ROWS: tl.constexpr, USED: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
                 SIZE: tl.constexpr):
    """One of the `splits` of the keys `first` to `stop` behind `base`, for SIZE of the USED queries
    that read them: those of a head, from caption `row` on."""
    place, column = offset + tl.arange(0, SIZE), tl.arange(0, WIDTH)
    member, used = row + place // ROWS, place < USED
    start = member * row_stride + (head * ROWS + place % ROWS) * WIDTH
    q = tl.load(query + start[:, None] + column, mask=used[:, None], other=0.0)
    length = tl.cdiv(tl.cdiv(stop - first, splits), KEYS) * KEYS
    begin = first + split * length
    end = tl.minimum(begin + length, stop)
    keys += base.to(tl.int64) * WIDTH
    values += base.to(tl.int64) * WIDTH
    highest = tl.full([SIZE], -float("inf"), tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    result = tl.zeros([SIZE, WIDTH], tl.float32)
    for block in range(begin, end, KEYS):
        token = block + tl.arange(0, KEYS)
        seen = token < end
        address = token[:, None] * WIDTH + column
        k = tl.load(keys + address, mask=seen[:, None], other=0.0)
        v = tl.load(values + address, mask=seen[:, None], other=0.0)
        # times log2(e): exponentials are to base 2
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scaling * 1.4426950408889634)
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrink, probs = tl.exp2(highest - higher), tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(probs, 1)
        own = tl.dot(probs.to(v.dtype), v, input_precision="ieee")
        result = result * shrink[:, None] + own
        highest = higher
    to = part * num_rows + (member * NUM_KV + head) * ROWS + place % ROWS
    total = tl.maximum(total, 1e-38)  # 0 in a split without keys, whose weight is 0 then
    tl.store(parts + to[:, None].to(tl.int64) * WIDTH + column, result / total[:, None],
             mask=used[:, None])
    tl.store(weights + to, highest + tl.log2(total), mask=used)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def _sum_parts(parts, weights, out, num_rows, num_parts, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """The parts of SIZE rows, by their weights, which are logarithms to base 2."""
    row, column = tl.program_id(0) * SIZE + tl.arange(0, SIZE), tl.arange(0, WIDTH)
    used = row < num_rows
    highest = tl.full([SIZE], -float("inf"), tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    result = tl.zeros([SIZE, WIDTH], tl.float32)
    for part in range(num_parts):
        at = part * num_rows + row
        weight = tl.load(weights + at, mask=used, other=0.0)
        values = tl.load(parts + at[:, None].to(tl.int64) * WIDTH + column, mask=used[:, None],
                         other=0.0)
        higher = tl.maximum(highest, weight)
        shrink, share = tl.exp2(highest - higher), tl.exp2(weight - higher)
        total = total * shrink + share
        result = result * shrink[:, None] + values * share[:, None]
        highest = higher
    tl.store(out + row[:, None].to(tl.int64) * WIDTH + column, result / total[:, None],
             mask=used[:, None])
