"""Every number that a run writes, with its unit and meaning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number that a run writes once per step."""

    key: str
    unit: str
    """"share" is 0 to 1, "count" a whole number. A list has one number per letter or one text per
    question."""
    what: str
    panel: str = ""
    """The curve on which the report page draws it; empty for what is no curve."""


METRICS = {
    "metrics.jsonl": (
        Metric("reward", "", "mean reward of the captions that have one", "reward and its parts"),
        Metric("reward_accuracy", "", "the part of `reward` that the verifier's answers earn", "reward and its parts"),
        Metric("reward_length", "", "the part for length, its weight applied", "reward and its parts"),
        Metric("reward_repetition", "", "the part for repeated 4-grams, its weight applied; 0 or less", "reward and its parts"),
        Metric("reward_judge", "", "the judge's rating, 0 to 1, with `--reward judge`", "reward and its parts"),
        Metric("accuracy", "share", "of the scored questions, answered rightly; ranks weighted by their captions", "accuracy"),
        Metric("flat_groups", "share", "of groups whose rewards are all equal: they teach nothing", "flat groups"),
        Metric("unscored_captions", "count", "captions without any scored question; they count nowhere"),
        Metric("failed_share", "share", "of the questions, could not be scored", "replies"),
        Metric("unparsed_share", "share", "of the scored questions, reply not readable", "replies"),
        Metric("abstain_share", "share", "of the scored questions, abstain option chosen", "replies"),
        Metric("length", "tokens", "mean per caption, the end token included", "length"),
        Metric("truncated_share", "share", "of captions, cut off at `max_new_tokens`", "truncated"),
        Metric("loss", "", "the clipped surrogate with the KL, at the first inner epoch", "loss"),
        Metric("ratio", "", "mean of rho, the policy's probability of a token over the old one, at the last inner epoch",
               "ratio"),
        Metric("clip_share", "share", "of tokens, on the clipped branch, at the last inner epoch", "clip share"),
        Metric("kl", "nats per token", "mean k3 estimate of the KL to the reference, at the first inner epoch", "KL"),
        Metric("entropy", "nats", "mean over tokens of the policy's next-token distribution, at the first inner epoch",
               "entropy"),
        Metric("sampler_gap", "nats", "mean absolute difference between the sampler's and the trainer's log-probabilities",
               "sampler gap"),
        Metric("grad_norm", "", "before clipping, of the last inner epoch", "gradient norm"),
        Metric("skipped", "count", "optimizer steps left out because the gradient was not finite"),
    ),
    "audit.jsonl": (
        Metric("gold_letters", "list of shares", "A, B, C, ... of the right options: as even as the numbers of options allow"),
        Metric("chosen_letters", "list of shares", "A, B, C, ... of the chosen options: without a favourite"),
        Metric("split_half", "at most 1", "reliability of the reward within groups: 1 if two halves of its questions agree on "
               "the captions, 0 or less if by chance", "audit of the reward"),
        Metric("shuffle_agreement", "share", "of pairs of shuffles of a question that lead to the same option, with "
               "`--num-shuffles` over 1", "audit of the reward"),
        Metric("length_correlation", "-1 to 1", "of reward and length within groups", "audit of the reward"),
        Metric("repetition", "share", "of a caption's 4-grams that are repeats, mean", "audit of the reward"),
        Metric("always_right", "list of questions", "on which a whole group is right, as id:place"),
        Metric("always_wrong", "list of questions", "on which a whole group is wrong, as id:place"),
        Metric("probe_accuracy", "share", "of the questions on `--probe-images` fixed images, answered rightly from the "
               "image's caption; every `--audit-every` steps", "probe and its floors"),
        Metric("probe_other_image", "share", "the same from another image's caption: a floor", "probe and its floors"),
        Metric("probe_no_caption", "share", "the same from no caption: the other floor", "probe and its floors"),
        Metric("probe_shuffle_agreement", "share", "of pairs of shuffles of a probe question that lead to the same option",
               "audit of the reward"),
    ),
    "timing.jsonl": (
        Metric("seconds", "s", "of the step", "seconds by phase"),
        Metric("seconds_rollout", "s", "writing captions; this and the next four are means over ranks", "seconds by phase"),
        Metric("seconds_reward", "s", "asking the verifier", "seconds by phase"),
        Metric("seconds_update", "s", "loss, gradient and optimizer", "seconds by phase"),
        Metric("seconds_weights", "s", "giving the sampler the new weights", "seconds by phase"),
        Metric("seconds_records", "s", "audit and records", "seconds by phase"),
        Metric("idle_share", "share", "of all ranks' time, waiting for the slowest rank", "idle share"),
        Metric("tokens_per_second", "tokens/s", "tokens of captions per second of the step and rank", "tokens per second"),
    ),
}
"""Every key that a run writes beside `step`, by file, each once. A key of the audit that stands in metrics.jsonl too (of the
same captions) is defined there. docs/metrics.md is this list."""


def metrics_page() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics", "",
        "Written from the list in `tools/report/metrics.py` by",
        "`python -c \"from tools.report.metrics import metrics_page; print(metrics_page(), end='')\" > docs/metrics.md`.", "",
        "Each file of a run folder has one line per step, with `step` (0-based) and these keys. Numbers are over all ranks;",
        "token means are weighted as in the loss. What could not be measured is `null`. At the first inner epoch the policy is",
        "still the one that sampled. So `ratio` is 1 and `clip_share` 0, unless `--inner-epochs` is over 1.",
    ]
    for name, metrics in METRICS.items():
        lines += ["", f"## {name}", "", "| key | unit | what |", "| --- | --- | --- |"]
        lines += [f"| `{one.key}` | {one.unit} | {one.what} |" for one in metrics]
    return "\n".join(lines + [
        "", "`audit.jsonl` repeats `flat_groups`, `unparsed_share` and `abstain_share` of the same captions; "
        "`python -m reward.caprl audit RUN_DIR`", "prints the whole run's. A reward of another file brings keys of its own, "
        "`reward_` and the name of each part.", "",
    ])
