"""A real model behind an OpenAI-compatible server that speaks as vLLM does.

python tests/model_server.py FOLDER PORT
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM, GenerationConfig


class Handler(BaseHTTPRequestHandler):
    """The pages that rankwise.endpoint asks for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        pages = {
            "/v1/models": {"data": [{"id": sys.argv[1], "owned_by": "vllm", "max_model_len": 256}]},
            "/version": {"version": "none"},
        }
        self._send(pages.get(self.path, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with BUSY:
            made = answers(body)
        choices = [
            {
                "index": k,
                "text": "",
                "token_ids": ids,
                "finish_reason": "stop" if ids[-1] in body["stop_token_ids"] else "length",
            }
            for k, ids in enumerate(made)
        ]
        self._send({"choices": choices, "usage": {"prompt_tokens": len(body["prompt"])}})

    def log_message(self, *_: object) -> None:
        """Requests are not worth a line."""

    def _send(self, page: dict) -> None:
        data = json.dumps(page).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def answers(body: dict) -> list[list[int]]:
    """Token ids of the n choices, up to an end token."""
    torch.manual_seed(body["seed"])
    drawn = {"do_sample": True, "top_k": 0, "temperature": body["temperature"]} if body["temperature"] else {}
    config = GenerationConfig(
        max_new_tokens=body["max_tokens"],
        num_return_sequences=body.get("n", 1),
        eos_token_id=body["stop_token_ids"],
        pad_token_id=0,
        **drawn,
    )
    prompt = torch.tensor([body["prompt"]])
    made = MODEL.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    rows = made[:, prompt.shape[1] :].tolist()
    ends = [next((i for i, token in enumerate(row, 1) if token in body["stop_token_ids"]), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends)]


if __name__ == "__main__":
    BUSY = threading.Lock()  # the model draws from one stream of random numbers
    MODEL = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
