"""An engine that says what it is told: OpenAI's API on a unix socket or a port, without a model.

Run as `parrot_server.py MODEL PLACE NAME`. Like engines that one would rather not have, it writes
every prompt to its log and quotes it in its errors. Words of a prompt make it misbehave: `die`,
`stumble`, `refuse`, `fail`, `nonsense`, `slowly`.
"""

import json
import os
import signal
import socket
import socketserver
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

MODEL, PLACE, NAME = sys.argv[1:4]
NOTES = Path(os.environ["PARROT_NOTES"])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def address_string(self):
        return "somebody"

    def log_message(self, text, *arguments):
        print(text % arguments, flush=True)

    def do_GET(self):
        self.answer(200 if self.path == "/health" else 404, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chat = self.path == "/v1/chat/completions"
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        words = prompt.split()
        print(f"ValueError: the prompt is {prompt!r}", flush=True)
        (NOTES / "last-request.json").write_text(json.dumps(body))
        if "refuse" in words:
            told = {"message": f"I do not like {prompt}", "param": "temperature"}
            self.answer(400, {"error": told})
        elif "fail" in words:
            self.answer(500, {"error": {"message": prompt}})
        elif "nonsense" in words:
            self.answer(200, {"text": prompt})
        elif body.get("stream"):
            self.stream(body, chat, words)
        elif "die" in words:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            self.answer(200, whole(body, chat, words))

    def answer(self, status, value):
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def stream(self, body, chat, words):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        said = (words * 1000 if "slowly" in words else words)[: body["max_tokens"]]
        try:
            for at, word in enumerate(said):
                if word == "die" and at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if word == "stumble" and at:
                    self.event({"error": {"message": " ".join(words)}})
                if "slowly" in words:
                    time.sleep(0.02)
                finish = "stop" if at == len(said) - 1 else None
                self.event(event(body, chat, f"{word} ", finish))
            self.event({**event(body, chat, "", None), "choices": [], "usage": usage(words, said)})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            (NOTES / "gone").touch()
        self.close_connection = True

    def event(self, value):
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()


def usage(words, said):
    return {
        "prompt_tokens": len(words),
        "completion_tokens": len(said),
        "total_tokens": len(words) + len(said),
    }


def whole(body, chat, words):
    said = words[: body["max_tokens"]]
    text = " ".join(said)
    shown = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {
        "id": "parrot-1",
        "object": "chat.completion" if chat else "text_completion",
        "created": 1,
        "model": body["model"],
        "feathers": "green",
        "choices": [{"index": 0, "finish_reason": "stop", **shown}],
        "usage": usage(words, said),
    }


def event(body, chat, text, finish):
    shown = {"delta": {"content": text}} if chat else {"text": text}
    return {
        "id": "parrot-1",
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "finish_reason": finish, **shown}],
    }


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    address_family = socket.AF_INET if PLACE.isdigit() else socket.AF_UNIX


def main():
    if (NOTES / "cannot").is_file():
        raise ValueError(f"no weights in {MODEL}")
    # As long as an engine that loads weights takes to be seen loading.
    time.sleep(0.5)
    print(f"{NAME} of {MODEL} at {PLACE}", flush=True)
    place = ("127.0.0.1", int(PLACE)) if PLACE.isdigit() else PLACE
    with Server(place, Handler) as server:
        server.serve_forever()


main()
