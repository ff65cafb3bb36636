"""A stand-in for a server of vLLM's, which notes every request."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from safetensors.torch import load_file


class StandIn:
    """
    What a server of vLLM's answers.

    `replies` overrides the status and body of a path, `complete` the tokens for a request and the place of a prompt.
    """

    def __init__(self, model):
        self.replies, self.requests, self.files = {}, [], []
        self.complete = lambda body, place: [5, place]
        self.model = model
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer({"data": [{"id": "served", "root": owner.model}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests.append((self.path, body))
                if self.path == "/v1/load_lora_adapter":
                    owner.files.append(load_file(Path(body["lora_path"], "adapter_model.safetensors")))
                # Not in the order of the prompts.
                choices = [
                    {"index": n, "token_ids": owner.complete(body, n), "logprobs": {"token_logprobs": [-0.5, -1.0 - n]}}
                    for n in reversed(range(len(body.get("prompt", ()))))
                ]
                self.answer({"choices": choices})

            def answer(self, body):
                status, body = owner.replies.get(self.path, (200, body))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("localhost", 0), Handler)
        self.url = f"http://localhost:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        """Ends the server."""
        self.server.shutdown()
        self.server.server_close()
