"""A model behind OpenAI's API, small enough to read: questions that wait are run in one batch.

    python bench/serve.py data/toy/verifier --port 8000

For tests and measurements of reward/remote.py. It takes token ids and chat messages, gives
log-probabilities and draws with a seed. For real models take vLLM or SGLang.
"""

import json
import random
import sys
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import AutoModelForCausalLM

from grpo.policy import chat_text
from grpo.pretrained import load_tokenizer


def make_server(folder: str, port: int = 0) -> ThreadingHTTPServer:
    """Not yet serving; port 0 takes a free one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, waiting = load_tokenizer(folder), Queue()

    @torch.no_grad()
    def run_batches() -> None:
        while True:
            batch = [waiting.get(), *(waiting.get() for _ in range(min(63, waiting.qsize())))]
            width = max(len(ids) for ids, _ in batch)
            rows = [ids + [0] * (width - len(ids)) for ids, _ in batch]
            mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch]
            hidden = model.base_model(input_ids=torch.tensor(rows),
                                      attention_mask=torch.tensor(mask)).last_hidden_state
            ends = torch.tensor([len(ids) - 1 for ids, _ in batch])
            logits = model.lm_head(hidden[torch.arange(len(batch)), ends])
            for (_, future), row in zip(batch, logits.log_softmax(-1)):
                future.set_result(row)

    def next_logprobs(ids: list[int]) -> torch.Tensor:
        waiting.put((ids, future := Future()))
        return future.result()

    def complete(body: dict, ids: list[int]) -> tuple[str, dict[str, float]]:
        first, new, rng = next_logprobs(ids), [], random.Random(body.get("seed"))
        top = first.topk(body.get("top_logprobs") or body.get("logprobs") or 1)
        row = first
        while len(new) < body["max_tokens"] and tokenizer.eos_token_id not in new:
            probs = (row / max(body["temperature"], 1e-4)).softmax(-1).tolist()
            new += rng.choices(range(len(probs)), probs)
            row = next_logprobs(ids + new) if len(new) < body["max_tokens"] else row
        text = tokenizer.decode(new, skip_special_tokens=True)
        return text, {tokenizer.decode([i]): p for p, i in zip(*map(torch.Tensor.tolist, top))}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else an answer waits for the acknowledgement of its head

        def log_message(self, *_) -> None:
            pass

        def answer(self, reply: dict) -> None:
            data = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.path != "/v1/models":
                return self.send_error(404)
            size = model.config.max_position_embeddings
            self.answer({"data": [{"id": "served", "root": folder, "max_model_len": size}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            is_chat = self.path == "/v1/chat/completions"
            if is_chat:
                text = chat_text(tokenizer, body["messages"][0]["content"])
                ids = tokenizer.encode(text, add_special_tokens=False)
            else:
                ids = body["prompt"]
            text, top = complete(body, ids)
            likely = [{"token": token, "logprob": value} for token, value in top.items()]
            choice = {"message": {"role": "assistant", "content": text},
                      "logprobs": {"content": [{"top_logprobs": likely}]}} if is_chat else {
                      "text": text, "logprobs": {"top_logprobs": [top]}}
            self.answer({"choices": [choice], "usage": {"prompt_tokens": len(ids)}})

    threading.Thread(target=run_batches, daemon=True).start()
    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def serve(folder: tyro.conf.Positional[str], port: int = 8000) -> None:
    torch.set_num_threads(1)
    server = make_server(folder, port)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    tyro.cli(serve)
