"""A verifier on another machine: any server that speaks OpenAI's API, such as vLLM, SGLang,
llama.cpp or `transformers serve`.

    python train.py --verifier http://HOST:8000/v1 --verifier-name Qwen/Qwen2.5-72B-Instruct

    1. the server     Server: its models, a request, what is tried again
    2. the prompt     token ids as reward/caprl.py writes them, or a chat message (ChatWriter)
    3. the answer     first_token, choose_likely
    4. the verifier   RemoteVerifier, ChatVerifier, load_remote

The prompt is sent as token ids if the model's tokenizer can be loaded here and the server takes
ids. It is then the same, token by token, as a local verifier's. Otherwise it is a chat message,
which the server's own template wraps. A line at the start says which of the two it is.

A key that the server asks for stands in the environment variable CAPRL_VERIFIER_KEY. It is sent as
a bearer token and written nowhere.
"""

import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from itertools import count, product
from typing import Any, ClassVar, TypeVar

import urllib3

from data.choices import LETTERS
from data.io import text_hash
from grpo.distributed import print0
from grpo.pretrained import load_tokenizer
from reward.caprl import ANSWER_START, Answer, Asked, PromptWriter, Verifier, read_reply

IN_FLIGHT = 64
"""Questions that a rank has on their way at a time: a server of one large GPU is busy with as many,
and more would only wait there."""
CONNECT_S, REQUEST_S = 10.0, 300.0
"""A request without a connection, or without an answer, after so many seconds is sent again."""
DEADLINE_S = 1200.0
"""Questions of a step that have no answer after so many seconds have failed. A server that loads a
large model again is back by then; after 30 minutes other ranks give up (timeout_minutes)."""
MAX_WAIT_S = 30.0
"""Longest wait before a request is sent again, unless the server asks for a longer one."""
AWAY = (408, 425, 429, 502, 503, 504, *range(520, 531))
"""Statuses of a server that is busy or restarts, from 520 as Cloudflare says so for it: sent again
until the deadline."""
TRIES = 5
"""So often a question is asked whose answers cannot be used (status 500, no JSON, no text)."""
BAD_ANSWER = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Errors of reading one of these: JSON may be nested too deeply, and a number too large."""

Content = TypeVar("Content")


# ------------------------------------------------------------------------------- 1. the server


class NoAnswer(ValueError):
    """Why a request has no usable answer, as a sentence."""


class Server:
    """A model of a server. Threads share it."""

    def __init__(self, address: str, name: str = ""):
        """name: NAME or NAME=FOLDER, as in `load_remote`. Raises ValueError, in one sentence, if
        there is no such server or it has no such model."""
        try:
            parts = urllib3.util.parse_url(address.strip())
        except urllib3.exceptions.LocationParseError:
            parts = urllib3.util.Url()
        if parts.scheme not in ("http", "https") or not re.fullmatch(r"\S+", parts.host or ""):
            # as given, but without what may be a user, a password or a query
            given = re.sub(r"^(\w+://)?.*@|[?#].*", r"\1", address.strip()).rstrip("/")
            raise ValueError("verifier: expected an address such as http://HOST:8000/v1, got "
                             f"{given}")
        self.address = urllib3.util.Url(parts.scheme, None, parts.host, parts.port,
                                        (parts.path or "").rstrip("/")).url
        if parts.auth or parts.query or parts.fragment:
            raise ValueError(f"verifier {self.address}: expected an address without user, password "
                             "and query, a key stands in CAPRL_VERIFIER_KEY")
        self.key = os.environ.get("CAPRL_VERIFIER_KEY", "").strip()
        if not re.fullmatch("[!-~]*", self.key):
            raise ValueError("CAPRL_VERIFIER_KEY: expected letters, digits and signs of ASCII")
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.http = urllib3.PoolManager(maxsize=IN_FLIGHT, headers=headers)
        self.jitter = random.Random()  # of its own: draws of the run must not depend on it
        try:
            models = self.send("/models", None, _models)
        except NoAnswer as error:
            wanted = "a server with OpenAI's API, whose address usually ends in /v1"
            if re.search(": 40[13] ", str(error)):
                wanted = "a key that it takes in the variable CAPRL_VERIFIER_KEY"
            raise ValueError(f"{error}; expected {wanted}") from None
        self.name, _, self.folder = name.partition("=")
        if not self.name and len(models) == 1:
            self.name = models[0]["id"]
        names = [model["id"] for model in models]
        if self.name not in names:
            wanted = f"a model {self.name}" if self.name else "the model's --verifier-name"
            raise ValueError(f"{self.address}: expected {wanted}, the server has "
                             f"{', '.join(names[:10]) or 'none'}{', ...' if names[10:] else ''}")
        model = models[names.index(self.name)]
        self.root = model.get("root") or self.name  # the hub name or folder, where NAME is another
        size = model.get("max_model_len")  # vLLM's and SGLang's
        self.context = size if isinstance(size, int) and size > 0 else math.inf
        self.extras: dict[str, Any] = {}
        """Settings of a request that OpenAI's API does not have, as far as the server takes
        them."""
        self.tried: set[str] = set()
        """Modes that the server is known to answer in."""

    def send(self, path: str, body: dict | None, read: Callable[[dict], Content],
             deadline: float | None = None, is_over: threading.Event | None = None,
             tries: int = TRIES) -> Content:
        """What `read` takes out of the server's answer. Raises NoAnswer.

        deadline: of time.monotonic; None for a single try. What may pass is tried again until then
        or until the event: lost connections and statuses in AWAY, with waits that double. Answers
        that `read` cannot use, and status 500, are tried so many times. Any other status is final.
        """
        num_bad, is_over = 0, is_over or threading.Event()
        for attempt in count():
            delay = min(MAX_WAIT_S, 0.5 * 2 ** min(attempt, 16)) * self.jitter.uniform(0.5, 1)
            left = REQUEST_S if deadline is None else deadline - time.monotonic()
            limit = max(0.1, min(REQUEST_S, left))
            try:
                response = self.http.request(
                    "GET" if body is None else "POST", self.address + path, json=body,
                    retries=False,
                    timeout=urllib3.Timeout(total=limit, connect=min(CONNECT_S, limit)),
                )
            except urllib3.exceptions.HTTPError as error:
                reason = re.sub(r"^.*?(?: object at \w+>|\)): ", "", str(error))
                is_final = "CERTIFICATE_VERIFY_FAILED" in reason
            else:
                is_final = response.status not in (200, 500, *AWAY)
                reason = f"{response.status} {self._message(response.data)}"
                if response.status == 200:
                    try:
                        return read(response.json())
                    except BAD_ANSWER as error:
                        reason = f"an answer that cannot be used ({_first_line(error)}): {reason}"
                if response.status in (200, 500):
                    num_bad += 1
                with suppress(urllib3.exceptions.InvalidHeader, *BAD_ANSWER):
                    delay = max(delay, urllib3.Retry().get_retry_after(response) or 0.0)
            left = 0.0 if deadline is None else deadline - time.monotonic()
            if is_final or left <= 0 or num_bad == tries or is_over.wait(min(delay, left)):
                raise NoAnswer(f"{self.address}{path}: {reason}")

    def _message(self, data: bytes) -> str:
        """What the server says is wrong, without the key."""
        text = data.decode("utf-8", errors="replace")
        said = re.search(r'"(?:message|detail)":\s*"((?:[^"\\]|\\.)+)"', text)
        text = " ".join((said[1] if said else text).split())
        return (text.replace(self.key, "***") if self.key else text)[:200]


def _models(reply: dict) -> list[dict]:
    return [model for model in reply["data"] if isinstance(model["id"], str)]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]


# ------------------------------------------------------------------------------- 2. the prompt


class ServersTokenizer:
    """Stands for a tokenizer that only the server has: a text is one piece, and stays text."""

    chat_template = bos_token_id = None

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    get_vocab = get_added_vocab

    def encode(self, text: str, add_special_tokens: bool = False) -> list[str]:
        return [text]

    def decode(self, pieces: Sequence[str]) -> str:
        return "".join(pieces)


class ChatWriter(PromptWriter):
    """Pieces of a user's message instead of token ids.

    Which special tokens the server would read in it is not known here. Those of all public
    templates begin with a bracket and a sign after it. So a space is put between the two.
    """

    def __init__(self, tokenizer: ServersTokenizer, abstain: bool, prompt_text: str,
                 answer_start: str):
        super().__init__(tokenizer, abstain, prompt_text, answer_start="")
        if answer_start == ANSWER_START:
            # The reply cannot be begun for the model here. So it begins with the letter, also in
            # the worked examples.
            begun = re.compile(rf"^{ANSWER_START} (?=[{LETTERS}]$)", re.MULTILINE)
            self.head_ids = [begun.sub("", piece) for piece in self.head_ids]

    def plain_ids(self, text: str) -> list[str]:
        return [re.sub(r"([<\[])(?=\S)", r"\1 ", text)]


# ------------------------------------------------------------------------------- 3. the answer


TOP = 20
"""Likeliest tokens that are asked for: vLLM and OpenAI give no more."""
MOST_UNSEEN = 0.01
"""Most probability that letters outside the likeliest tokens may have, as a share of the others'.
"""

MARKS = (" ", "Ġ", "▁", "")
"""What stands before a letter after "The answer is": a space, as tokenizers or people write it.
Some servers take it away."""


def first_token(logprobs: dict) -> dict[str, float]:
    """Probabilities of the likeliest first tokens by their text, from either form of `logprobs`: a
    dictionary for each token (completions), or a list under "content" (chat, llama.cpp)."""
    if logprobs.get("content"):
        likely = logprobs["content"][0]["top_logprobs"]
        # Of tokens with the same text the first, the likeliest, stays.
        top = {token["token"]: token["logprob"] for token in reversed(likely)}
    else:
        top = logprobs["top_logprobs"][0]
    if not top or not all(value is not False and value <= 1e-3 for value in top.values()):  # no NaN
        raise ValueError("expected log-probabilities of the first token")
    probs = {token: math.exp(value) for token, value in top.items()}
    if sum(probs.values()) > 1.05:  # a server may round them
        raise ValueError(f"expected probabilities of 1 together, got {sum(probs.values()):.3g}")
    return probs


def choose_likely(top: dict[str, float], num_options: int,
                  marks: Sequence[str] = MARKS) -> Answer:
    """The likeliest of the offered letters; probabilities are those of the letters alone.

    top: by token, of the likeliest tokens. marks: the first with which any letter is in it counts.
    A letter that is not in `top` has probability 0. The question has failed if no letter is in it,
    or if so much is outside that another letter could have more than MOST_UNSEEN.
    """
    probs = [0.0]
    for mark in marks:
        probs = [top.get(f"{mark}{letter}", 0.0) for letter in LETTERS[:num_options]]
        if any(probs):
            break
    total, unseen = sum(probs), 1 - sum(top.values())
    if not total:
        return Answer(None, failure=f"none of the letters is among the {len(top)} likeliest tokens "
                                    "that the server gives")
    if 0.0 in probs and unseen > MOST_UNSEEN * total:
        return Answer(None, failure=f"the {len(top)} tokens that the server gives leave out letters"
                                    f" and a probability of {unseen:.2g}")
    return Answer(probs.index(max(probs)), probs=tuple(value / total for value in probs))


# ----------------------------------------------------------------------------- 4. the verifier


class RemoteVerifier(Verifier):
    """As `Verifier`, but `model` is a Server. A question is a request of its own. One that has no
    answer at the deadline has failed."""

    deadline_s, path = DEADLINE_S, "/completions"
    likely: ClassVar = {"logprobs": TOP}
    marks = MARKS

    def _prepare_(self) -> None:
        self.context, self.token_budget = self.model.context, math.inf  # the server makes batches
        if self.mode not in self.model.tried:
            writer = self.writers[False]
            asked = Asked("What colour is the square?", ("red", "blue"), gold=0, source=0)
            prompt = writer.head_ids + writer.caption_ids("A red square.")
            self._send(prompt + writer.question_ids(asked), "", tries=1,
                       deadline=time.monotonic() + REQUEST_S)
            self.model.tried.add(self.mode)

    def _answers(self, writer: PromptWriter, caption_ids: list[list], question_ids: list[list],
                 questions: list[Asked], streams: list[str]) -> list[Answer]:
        prompts = [writer.head_ids + caption + row
                   for caption, group in zip(caption_ids, question_ids) for row in group]
        deadline, is_over = time.monotonic() + self.deadline_s, threading.Event()
        ask = partial(self._answer, deadline=deadline, is_over=is_over)
        pool = ThreadPoolExecutor(IN_FLIGHT)
        try:
            pending = [pool.submit(ask, *row)
                       for row in zip(prompts, questions, streams, strict=True)]
            wait(pending, self.deadline_s + 1)  # a request in time may be answered a little later
        finally:
            is_over.set()
            pool.shutdown(wait=False, cancel_futures=True)
        late = Answer(None, failure=f"{self.model.address}: no answer in {self.deadline_s:.0f} s")
        answers = [future.result() if future.done() and not future.cancelled() else late
                   for future in pending]
        if time.monotonic() > deadline and all(answer.failure for answer in answers):
            raise ValueError(f"{late.failure} to any of {len(answers)} questions "
                             f"({answers[0].failure})")
        return answers

    def _answer(self, prompt: list, question: Asked, stream: str, **limits) -> Answer:
        try:
            content = self._send(prompt, stream, **limits)
        except NoAnswer as error:
            return Answer(None, failure=str(error))
        if self.mode == "sample":
            return read_reply(content, False, question)
        return choose_likely(content, len(question.options), self.marks)

    def _send(self, prompt: list, stream: str, **limits) -> str | dict[str, float]:
        """The reply, or in mode "logits" the probabilities of first tokens. Raises NoAnswer."""
        body = self._prompt(prompt) | self.model.extras | {"model": self.model.name}
        if self.mode == "logits":
            body |= self.likely | {"max_tokens": 1, "temperature": 1.0}
        else:
            body |= {"max_tokens": self.max_new_tokens, "temperature": self.temperature,
                     "seed": int(text_hash(stream)[:7], 16)}
        return self.model.send(self.path, body, partial(self._read, prompt), **limits)

    def _prompt(self, prompt: list) -> dict[str, Any]:
        return {"prompt": prompt}

    def _read(self, prompt: list, reply: dict) -> str | dict[str, float]:
        num_read = (reply.get("usage") or {}).get("prompt_tokens", len(prompt))
        if num_read != len(prompt):
            raise ValueError(f"{len(prompt)} token ids were read as {num_read} tokens")
        return self._content(reply["choices"][0], reply["choices"][0]["text"])

    def _content(self, choice: dict, text: object) -> str | dict[str, float]:
        # vLLM and SGLang, as they stop; services that hold an answer back
        if choice.get("finish_reason") in ("abort", "error", "content_filter"):
            raise ValueError(f"the answer was cut off: {choice['finish_reason']}")
        if self.mode == "logits":
            return first_token(choice["logprobs"])
        if not isinstance(text, str):
            raise TypeError(f"expected a text, got {text!r}")
        if not text.strip() and choice.get("finish_reason") == "length":
            raise ValueError("its tokens were used up before any text, as by a model that thinks")
        return text.encode("utf-8", errors="replace").decode()  # JSON may hold half a letter


class ChatVerifier(RemoteVerifier):
    """A RemoteVerifier whose prompts are messages. Its replies begin with the letter."""

    writer, path = ChatWriter, "/chat/completions"
    likely: ClassVar = {"logprobs": True, "top_logprobs": TOP}
    marks = MARKS[::-1]

    def _prompt(self, prompt: list) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "".join(prompt).strip()}]}

    def _read(self, prompt: list, reply: dict) -> str | dict[str, float]:
        return self._content(reply["choices"][0], reply["choices"][0]["message"]["content"])


NEUTRAL = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Nothing but the temperature shapes the draw, as with a local verifier. Servers would else take
the checkpoint's own settings. Only the first is OpenAI's."""


def load_remote(address: str, name: str, **settings) -> RemoteVerifier:
    """The verifier at an address; `settings` go to `Verifier`.

    name: NAME or NAME=FOLDER. NAME is the model's at the server, and may be empty if there is only
    one. FOLDER, a folder or a hub name, has its tokenizer; without it the server's word for where
    the model is from is tried. Raises ValueError, in one sentence, if the server, its certificate
    or its answers cannot be used.
    """
    server = Server(address, name)
    ways: list[tuple[type[RemoteVerifier], Any]] = [(ChatVerifier, ServersTokenizer())]
    reason = ""
    for folder in [server.folder] if server.folder else dict.fromkeys((server.root, server.name)):
        try:
            ways.insert(0, (RemoteVerifier, load_tokenizer(folder)))
            break
        except Exception as error:  # a hub has many kinds of them
            reason = f"{folder}: expected the tokenizer of {server.name} ({_first_line(error)})"
    if server.folder and reason:
        raise ValueError(reason)
    for (kind, tokenizer), extras in product(ways, (NEUTRAL, {})):
        server.extras = extras
        try:
            verifier = kind(server, tokenizer, **settings)
        except ValueError as error:
            if not extras:
                reason = str(error)
            continue
        how = "token ids" if kind is RemoteVerifier else f"messages ({reason})"
        draw = "" if extras else ", replies are drawn with its own top-p, top-k and penalties"
        print0(f"verifier: {server.name} at {server.address}, prompts are sent as {how}{draw}")
        return verifier
    hint = '; mode "sample" reads replies' if settings.get("mode") == "logits" else ""
    raise ValueError(f"{server.name}: expected answers as OpenAI's API has them, {reason}{hint}")
