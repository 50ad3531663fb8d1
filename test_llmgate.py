"""The tests of llmgate: the real server on a socket, a stand-in vLLM on a socket, no mocks.

    pytest -q                                       all tests but the soak, about four minutes
    pytest -q -m soak                               ten minutes of mixed load
    python test_llmgate.py upstream [PORT]          the stand-in alone, for trying llmgate
                                                    without a model (PORT is 8001 if not given)
    python test_llmgate.py bench                    how fast the gate is; two minutes

`LLMGATE_TEST_POSTGRES_URL` (postgresql+psycopg://user@/db?host=/socketdir) adds the cases that
need PostgreSQL. Each of them makes a database of its own and drops it. Those at the edge need
nginx, and one test needs `pip install hypothesis`.

After every test the books are read: see `complaints`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import functools
import gc
import gzip
import hmac
import http.client
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import re
import resource
import select
import selectors
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from email.message import Message
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, cast

import jwt
import pytest
import requests
import sqlalchemy
from requests.structures import CaseInsensitiveDict

import llmgate

with contextlib.suppress(ImportError):  # only the PostgreSQL cases need it
    import psycopg

pytestmark = pytest.mark.filterwarnings("error")

with warnings.catch_warnings():  # there is no pytest.ini in which a mark could be registered
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    soak = pytest.mark.soak

JSONObject = dict[str, Any]
T = TypeVar("T")

HERE = Path(llmgate.__file__).resolve().parent
WORDS = [
    "Hello!",
    "I",
    "am",
    "a",
    "stand-in",
    "for",
    "vLLM:",
    "I",
    "say",
    "the",
    "same",
    "few",
    "words",
    "to",
    "everyone,",
    "one",
    "token",
    "at",
    "a",
    "time.",
]
PROMPT = "prompt-marker-5d1c"
ANSWER = "I say the same few words"
PASSWORD = "password-marker-88e0"
UPSTREAM_KEY = "upstream-key-marker-31f7"
FINGERPRINT = "vllm-0.32.0-b18e3f0e"
MAX_MODEL_LEN = 8192
CONTEXT_ERROR = (
    "This model's maximum context length is 8192 tokens. However, your prompt contains at least "
    "8193 input tokens, which exceeds this limit even without any output tokens. Please reduce "
    "the length of the input prompt. (parameter=input_tokens, value=8193)"
)
ENGINE_ERROR = "EngineCore encountered an issue. See stack trace (above) for the root cause."


# ---------------------------------------------------------------------------------------------
# The stand-in vLLM. Its bytes are those of vLLM 0.32; the model's name chooses its behaviour. It
# stops at once when its client hangs up, and counts a token when the event with it was written.


@dataclass(frozen=True)
class Behaviour:
    """How the stand-in answers for one model."""

    most: int = 20  # completion tokens, unless max_tokens is less
    pace_s: float = 0.0  # before each token
    usage: str = "true"  # or "none", or "bad"
    fault: str = ""  # what happens after three tokens, or instead of an answer
    max_model_len: int = MAX_MODEL_LEN


BEHAVIOURS = {
    "ok": Behaviour(),
    "org/tiny": Behaviour(),
    "slow": Behaviour(most=400, pace_s=0.05),
    "paced": Behaviour(most=50, pace_s=0.02),
    "spaced": Behaviour(most=4, pace_s=0.3),
    "long": Behaviour(most=50, pace_s=0.01, max_model_len=131072),
    "echo": Behaviour(most=1000),
    "lumpy": Behaviour(),
    "nousage": Behaviour(usage="none"),
    "badusage": Behaviour(usage="bad"),
    "nostreamopts": Behaviour(pace_s=0.02),
    "silent": Behaviour(fault="silence"),
    "die": Behaviour(fault="cut"),
    "dieclean": Behaviour(fault="clean end"),
    "midstream": Behaviour(fault="error event"),
    "e400": Behaviour(fault="400"),
    "e401": Behaviour(fault="401"),
    "e500": Behaviour(fault="500"),
    "redir": Behaviour(fault="redirect"),
    "gzip": Behaviour(fault="gzip"),
    "garbage": Behaviour(fault="html"),
    "badjson": Behaviour(fault="half a body"),
    "endless": Behaviour(fault="endless line"),
    "nohttp": Behaviour(fault="no HTTP"),
    "nobody": Behaviour(fault="empty body"),
    "cookie": Behaviour(fault="cookie"),
    "busy": Behaviour(fault="429 Too many requests; the queue is full."),
    "wordy": Behaviour(
        fault="429 Token limit exceeded: too many tokens, it exceeds the limit of 9"
    ),
}


@dataclass
class Exchange:
    """One request that the stand-in got, and what it wrote."""

    method: str
    path: str
    headers: Message
    body: bytes
    opened_at: float = field(default_factory=time.monotonic)
    closed_at: float | None = None
    left: bool = False  # the client hung up before the end
    tokens: int = 0  # prompt and completion, of what was written
    sent: list[tuple[float, bytes]] = field(default_factory=list)

    def json(self) -> JSONObject:
        """Return the body that was asked."""
        return cast(JSONObject, json.loads(self.body))

    def answer(self) -> bytes:
        """Return the body that was written, without the framing."""
        return b"".join(event for _, event in self.sent)


class Refused(Exception):
    """An error answer of vLLM: status, message, type, param."""


class Upstream(ThreadingHTTPServer):
    """The stand-in on a port; a context manager that serves in a thread."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(self, port: int = 0, *, pace_s: float = 0.0, idle_s: float = 5.0) -> None:
        """Bind to `port` (0: any); `pace_s` is for models without a pace of their own."""
        super().__init__(("127.0.0.1", port), UpstreamHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.pace_s = pace_s
        self.idle_s = idle_s
        self.redirect_to = ""
        self.serves = frozenset(BEHAVIOURS)  # the models in its list
        self.keeps_bytes = True  # of the answers, for tests that compare them
        self.exchanges: list[Exchange] = []
        self.connections: set[socket.socket] = set()

    def __enter__(self) -> Self:
        """Serve until the block ends."""
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and hang up on everyone."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection, so that `__exit__` can end it."""
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget the connection."""
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about clients that vanish; their exchange says so."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def asked(self) -> list[Exchange]:
        """Return the requests that cost something: all but the looks at models and health."""
        return [x for x in self.exchanges if x.method == "POST" and x.path != "/tokenize"]

    def running(self) -> int:
        """Return how many requests are being answered."""
        return sum(x.closed_at is None for x in self.exchanges)

    def tokens(self) -> dict[str, int]:
        """Return the tokens written for each X-Request-Id."""
        counts: dict[str, int] = {}
        for x in list(self.exchanges):
            name = x.headers.get("X-Request-Id", "")
            counts[name] = counts.get(name, 0) + x.tokens
        return counts


class UpstreamHandler(BaseHTTPRequestHandler):
    """One connection to the stand-in."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Upstream
    exchange: Exchange

    def setup(self) -> None:
        """Watch the socket for a client that hangs up, even by half."""
        super().setup()
        self.connection.settimeout(self.server.idle_s)
        self.hangup = select.poll()
        self.hangup.register(self.connection, select.POLLRDHUP)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer one request and note its end, whatever happened."""
        self.connection.settimeout(None)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.exchange = Exchange(self.command, self.path, self.headers, body)
        self.server.exchanges.append(self.exchange)
        try:
            self.route()
        except Refused as refused:
            self.refuse(*refused.args)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            self.refuse(400, "1 validation error: wrong type", "Bad Request", "body")
        except OSError:
            self.exchange.left = True
            self.close_connection = True
        finally:
            self.exchange.closed_at = time.monotonic()
            self.connection.settimeout(self.server.idle_s)

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

    def route(self) -> None:
        """Choose the answer by method and path, as vLLM would."""
        match (self.command, self.path):
            case ("GET", "/health"):
                self.reply(200, b"", "")
            case ("GET", "/v1/models"):
                self.reply_json(200, {"object": "list", "data": self.models()})
            case ("POST", "/v1/chat/completions" | "/v1/completions"):
                self.generate(self.parse())
            case ("POST", "/v1/embeddings"):
                self.embed(self.parse())
            case ("POST", "/tokenize"):
                count = sum(prompt_tokens(self.parse()))
                self.reply_json(
                    200,
                    {
                        "count": count,
                        "max_model_len": MAX_MODEL_LEN,
                        "tokens": list(range(min(count, MAX_MODEL_LEN))),
                        "token_strs": None,
                    },
                )
            case _:
                self.reply_json(404, {"detail": "Not Found"})

    def models(self) -> list[JSONObject]:
        """Return vLLM's model list; `root` is a path on its disk."""
        return [
            {
                "id": model,
                "object": "model",
                "created": 1795332929,
                "owned_by": "vllm",
                "root": f"/models/{model}",
                "parent": None,
                "max_model_len": behaviour.max_model_len,
                "permission": [{"id": "modelperm-8d6a", "object": "model_permission"}],
            }
            for model, behaviour in BEHAVIOURS.items()
            if model in self.server.serves
        ]

    def parse(self) -> JSONObject:
        """Return the body, or refuse it with vLLM's words."""
        try:
            body = json.loads(self.exchange.body)
        except ValueError:
            raise Refused(400, "1 validation error: json_invalid", "Bad Request", "body") from None
        if not isinstance(body, dict):
            raise Refused(400, "1 validation error: dict_type", "Bad Request", "body")
        decoys = {"/v1/completions": ["messages", "input"], "/v1/embeddings": ["prompt"]}
        for name in decoys.get(self.path, []):  # vLLM reads an endpoint's own fields only
            body.pop(name, None)
        model = body.get("model") or "ok"
        if model not in BEHAVIOURS:
            words = f"The model `{model}` does not exist. Valid aliases: ok."
            raise Refused(404, words, "NotFoundError", "model")
        return body | {"model": model}

    def generate(self, body: JSONObject) -> None:
        """Answer a chat or a completion, plain or streamed."""
        behaviour = BEHAVIOURS[body["model"]]
        if self.strange_answer(behaviour.fault):
            return
        answer = Answer(body, behaviour, chat=self.path == "/v1/chat/completions")
        if behaviour.pace_s == 0:
            answer.pace_s = self.server.pace_s
        if answer.stream:
            self.stream(answer)
        else:
            self.plain(answer)

    def strange_answer(self, fault: str) -> bool:
        """Give the answer of a faulty upstream; return whether there was one."""
        match fault:
            case "400":
                self.refuse(400, CONTEXT_ERROR, "BadRequestError", "input_tokens")
            case "401":
                self.reply_json(401, {"error": "Unauthorized"})
            case "500":
                self.refuse(500, ENGINE_ERROR, "InternalServerError", None)
            case "redirect":
                self.reply(307, b"", "", f"location: {self.server.redirect_to}{self.path}\r\n")
            case "html":
                self.reply(200, b"<html>hello</html>", "text/html")
            case "half a body":
                self.reply(200, b'{"id":"chatcmpl-1","choices":[', "application/json")
            case "no HTTP":
                self.wfile.write(b"+OK hello\r\n\r\n")
                self.close_connection = True
            case "empty body":
                self.reply(200, b"", "application/json")
            case busy if busy.startswith("429 "):
                self.refuse(429, busy[4:], "RateLimitError", None)
            case "endless line":
                self.start_stream()
                while True:
                    self.chunk(b"x" * 65536)
            case _:
                return False
        return True

    def plain(self, answer: Answer) -> None:
        """Write one whole answer after the time its tokens take."""
        if answer.behaviour.fault == "silence":
            self.wait(None)
        self.wait(answer.pace_s * answer.count)
        body = dump(answer.whole())
        if answer.behaviour.fault in ("cut", "clean end"):
            self.write_head(200, "application/json", f"content-length: {len(body)}\r\n")
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        if answer.behaviour.fault == "gzip":
            self.reply(200, gzip.compress(body), "application/json", "content-encoding: gzip\r\n")
        elif answer.behaviour.fault == "cookie":
            self.reply(200, body, "application/json", "set-cookie: session=1; Path=/\r\n")
        else:
            self.reply(200, body, "application/json")
        self.exchange.tokens = answer.prompt + answer.count * answer.choices

    def stream(self, answer: Answer) -> None:
        """Write one event per token, each as one chunk, at the model's pace."""
        self.start_stream()
        self.exchange.tokens = 0
        due = time.monotonic()
        lumps = b": keep-alive\n\n"
        for position, event in answer.events():
            if position == 4 and answer.behaviour.fault:
                self.fail(answer.behaviour.fault)
                return
            if position:
                due += answer.pace_s
            self.wait(max(0.0, due - time.monotonic()))
            if answer.body["model"] == "lumpy":
                lumps += event
                while len(lumps) > 700:
                    self.chunk(lumps[:700])
                    lumps = lumps[700:]
            else:
                self.chunk(event)
            self.exchange.tokens += bool(position) + (not self.exchange.tokens) * answer.prompt
        if answer.body["model"] == "lumpy":
            self.chunk(lumps)
        self.chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def fail(self, fault: str) -> None:
        """End a stream after three tokens in one of the ways that upstreams do."""
        if fault == "silence":
            self.wait(None)
        if fault == "cut":
            self.wfile.write(b'ff\r\ndata: {"id":')
            self.close_connection = True
        if fault == "error event":
            error = {"message": ENGINE_ERROR, "type": "InternalServerError", "param": None}
            self.chunk(b"data: " + dump({"error": error | {"code": 500}}) + b"\n\n")
            self.chunk(b"data: [DONE]\n\n")
        if fault != "cut":
            self.wfile.write(b"0\r\n\r\n")

    def embed(self, body: JSONObject) -> None:
        """Answer with one short vector per input."""
        counts = prompt_tokens(body)
        vectors = [
            {"index": index, "object": "embedding", "embedding": [0.25, -0.5]}
            for index in range(len(counts))
        ]
        answer = {"id": "embd-1", "object": "list", "created": 1795332949, "model": body["model"]}
        usage = {"prompt_tokens": sum(counts), "total_tokens": sum(counts), "completion_tokens": 0}
        self.reply_json(200, answer | {"data": vectors, "usage": usage})
        self.exchange.tokens = sum(counts)

    def wait(self, seconds: float | None) -> None:
        """Let time pass (None: for ever); a client that hangs up ends the answer."""
        if self.hangup.poll(None if seconds is None else seconds * 1000):
            raise ConnectionAbortedError

    def refuse(self, status: int, message: str, type: str, param: str | None) -> None:
        """Write vLLM's error object, whose code is the status."""
        error = {"message": message, "type": type, "param": param, "code": status}
        self.reply_json(status, {"error": error})

    def reply_json(self, status: int, body: JSONObject) -> None:
        """Write `body` as vLLM writes JSON."""
        self.reply(status, dump(body), "application/json")

    def reply(self, status: int, body: bytes, content_type: str, headers: str = "") -> None:
        """Write one whole answer."""
        self.write_head(status, content_type, f"content-length: {len(body)}\r\n{headers}")
        self.exchange.sent.append((time.monotonic(), body))
        self.wfile.write(body)

    def start_stream(self) -> None:
        """Write the head of an event stream."""
        self.write_head(200, "text/event-stream; charset=utf-8", "transfer-encoding: chunked\r\n")

    def chunk(self, event: bytes) -> None:
        """Write `event` as one HTTP chunk and note when."""
        if self.server.keeps_bytes:
            self.exchange.sent.append((time.monotonic(), event))
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))

    def write_head(self, status: int, content_type: str, headers: str) -> None:
        """Write the status line and the headers that uvicorn writes."""
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        head += f"date: {formatdate(usegmt=True)}\r\nserver: uvicorn\r\n"
        head += f"content-type: {content_type}\r\n" if content_type else ""
        head += "connection: close\r\n" if self.close_connection else ""
        self.wfile.write((head + headers + "\r\n").encode())


class Answer:
    """What the stand-in will say to one chat or completion; refuses what vLLM refuses."""

    def __init__(self, body: JSONObject, behaviour: Behaviour, *, chat: bool) -> None:
        """Read the fields that matter; `chat` tells the endpoint."""
        self.body, self.behaviour, self.chat = body, behaviour, chat
        self.pace_s = behaviour.pace_s
        self.stream = body.get("stream") is True
        self.options = body.get("stream_options") or {}
        counts = prompt_tokens(body)
        self.prompt = sum(counts)
        self.choices = whole_number(body, "n", 1) * len(counts)
        self.pieces = self.text()
        asked = body.get("max_completion_tokens")
        name = "max_tokens" if asked is None else "max_completion_tokens"
        self.asked = whole_number(body, name, behaviour.max_model_len)
        self.count = min(self.asked, len(self.pieces))
        self.refuse_as_vllm_does(name)
        self.head: JSONObject = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{random.getrandbits(64):016x}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": body["model"],
        }

    def refuse_as_vllm_does(self, name: str) -> None:
        """Raise for a missing prompt, options without a stream, or too many tokens."""
        prompt = "messages" if self.chat else "prompt"
        if not self.body.get(prompt):
            words = f"1 validation error:\n  {{'type': 'missing', 'loc': 'body.{prompt}'}}"
            raise Refused(400, words, "Bad Request", f"body.{prompt}")
        most = self.behaviour.max_model_len
        if self.asked > most:
            words = (
                f"{name}={self.asked} cannot be greater than max_model_len={most}. "
                f"Please request fewer output tokens. (parameter={name}, value={self.asked})"
            )
            raise Refused(400, words, "BadRequestError", name)
        if self.prompt >= most:
            raise Refused(400, CONTEXT_ERROR, "BadRequestError", "input_tokens")
        if self.options and not self.stream:
            words = "Stream options can only be defined when `stream=True`."
            raise Refused(400, words, "BadRequestError", "stream_options")
        if self.body["model"] == "nostreamopts" and "continuous_usage_stats" in self.options:
            words = "1 validation error: continuous_usage_stats: Extra inputs are not permitted"
            raise Refused(400, words, "Bad Request", "body.stream_options")

    def text(self) -> list[str]:
        """Return the tokens of one choice: the prompt for `echo`, else the same few words."""
        if self.body["model"] == "echo":
            said = "".join(prompt_texts(self.body))
            return [said[at : at + 8] for at in range(0, len(said), 8)]
        words = itertools.cycle(WORDS)
        return [next(words) + " " for _ in range(self.behaviour.most)]

    def piece(self, position: int) -> str:
        """Return one token; of `paced` with the prompt's last word and the time."""
        if self.body["model"] == "paced":
            return f"{prompt_texts(self.body)[-1].split()[-1]} {time.monotonic():.6f} "
        return self.pieces[position]

    def finish_reason(self) -> str:
        """Return "length" when max_tokens ended the answer."""
        return "length" if self.count == self.asked else "stop"

    def usage(self, completion: int) -> JSONObject:
        """Return the usage block of a final event, true or bad."""
        if self.behaviour.usage == "bad":
            return {"prompt_tokens": -5, "completion_tokens": "9", "total_tokens": 1e30}
        return {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + completion,
            "completion_tokens": completion,
        }

    def whole(self) -> JSONObject:
        """Return the plain answer, its keys in vLLM's order."""
        said = "".join(self.piece(position) for position in range(self.count))
        message = {"role": "assistant", "content": said, "refusal": None, "annotations": None}
        message |= {"audio": None, "function_call": None, "reasoning": None}
        content = {"message": message} if self.chat else {"text": said}
        end = {"logprobs": None, "finish_reason": self.finish_reason(), "stop_reason": None}
        choices = [{"index": index} | content | end for index in range(self.choices)]
        answer = self.head | {"choices": choices, "service_tier": None}
        answer["system_fingerprint"] = FINGERPRINT
        if self.behaviour.usage != "none":
            details = {"prompt_tokens_details": None, "completion_tokens_details": None}
            answer["usage"] = self.usage(self.count * self.choices) | details
        return answer | {"kv_transfer_params": None, "metrics": None}

    def events(self) -> Iterator[tuple[int, bytes]]:
        """Yield each event with the number of its token (0: carries none)."""
        include = self.options.get("include_usage") is True and self.behaviour.usage != "none"
        continuous = include and self.options.get("continuous_usage_stats") is True
        if self.chat:
            self.head["object"] = "chat.completion.chunk"
            for index in range(self.choices):
                yield 0, self.event(self.first(index), continuous, 0, ROLE_EVENT_END)
        for position in range(1, self.count + 1):
            for index in range(self.choices):
                last = position == self.count
                fingerprint = {"system_fingerprint": FINGERPRINT} if last and not include else {}
                yield (
                    position,
                    self.event(self.token(index, position), continuous, position, fingerprint),
                )
        if include:
            usage = {"usage": self.usage(self.count * self.choices)}
            end = self.head | {"choices": []} | usage | {"system_fingerprint": FINGERPRINT}
            yield 0, b"data: " + dump(end) + b"\n\n"

    def event(self, choice: JSONObject, continuous: bool, count: int, end: JSONObject) -> bytes:
        """Return one event; its usage counts the tokens of this choice only, as vLLM's."""
        body = self.head | {"choices": [choice]}
        if continuous:
            body["usage"] = self.usage(count) | {"completion_tokens_details": None}
        return b"data: " + dump(body | end) + b"\n\n"

    def first(self, index: int) -> JSONObject:
        """Return the choice that opens a chat stream."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def token(self, index: int, position: int) -> JSONObject:
        """Return the choice with one token; the last one says why it ended."""
        said = self.piece(position - 1)
        choice: JSONObject = {"index": index}
        choice |= {"delta": {"content": said}} if self.chat else {"text": said}
        choice |= {"logprobs": None, "finish_reason": None}
        if position == self.count:
            choice |= {"finish_reason": self.finish_reason(), "stop_reason": None}
        return choice | {"token_ids": None}


ROLE_EVENT_END: JSONObject = {"prompt_token_ids": None, "prompt_text": None}


def dump(value: JSONObject) -> bytes:
    """Return `value` as vLLM writes it: no spaces, raw UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def prompt_texts(body: JSONObject) -> list[str]:
    """Return the texts of all messages, prompts or inputs."""
    if "messages" in body:
        if not all(isinstance(message, dict) for message in body["messages"]):
            raise Refused(400, "1 validation error: dict_type", "Bad Request", "body.messages")
        return [str(message.get("content")) for message in body["messages"]]
    prompt = body.get("prompt", body.get("input")) or ""
    return list(prompt) if isinstance(prompt, list) else [prompt]


def prompt_tokens(body: JSONObject) -> list[int]:
    """Count the prompts' tokens: a quarter of the bytes, never less than ten; messages are one."""
    texts = prompt_texts(body)
    if "messages" in body:
        texts = ["".join(texts)]
    return [max(10, len(text.encode()) // 4) for text in texts]


def whole_number(body: JSONObject, name: str, default: int) -> int:
    """Return a field of at least 1, or refuse it with vLLM's words."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int):
        words = "1 validation error: Input should be a valid integer"
        raise Refused(400, words, "Bad Request", f"body.{name}")
    if value < 1:
        words = f"{name} must be at least 1, got {value}. (parameter={name}, value={value})"
        raise Refused(400, words, "BadRequestError", name)
    return value


def serve_upstream(port: int) -> None:
    """Serve the stand-in in the foreground, at the pace of a person reading."""
    server = Upstream(port, pace_s=0.08)
    print(
        f"A stand-in vLLM serves on {server.url}/v1, no model inside. Ctrl-C ends it.", flush=True
    )
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


# ---------------------------------------------------------------------------------------------
# Gates, and the books that must be right after every test. A gate runs in this process, where a
# fault of its threads fails the test, or as the process that a user starts.


class Gate:
    """A running llmgate, with what a test needs to talk to it and to read its database."""

    def __init__(
        self, url: str, env: Mapping[str, str], directory: Path, upstream: Upstream
    ) -> None:
        """Keep where it listens, what it was told, where it writes, and what stands behind it."""
        self.url, self.env, self.directory, self.upstream = url, env, directory, upstream
        self.database_url = env.get("DATABASE_URL", f"sqlite:///{directory / 'llmgate.db'}")
        self.log = directory / "server.log"
        self.secrets = {PASSWORD, PROMPT, ANSWER, UPSTREAM_KEY}
        self.expected_5xx: set[int] = set()
        self.seen_5xx: set[int] = set()
        self.may_log_traceback = False
        self.verify: bool | str = True  # or the certificate to trust

    @property
    def address(self) -> tuple[str, int]:
        """Return host and port."""
        parts = urllib.parse.urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 80)

    def rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows of one SELECT, straight from the database; `?` marks a value."""
        return query(self.database_url, sql, *values)

    def usage(self, user: User | None = None) -> list[UsageRow]:
        """Return the usage rows, of one user or of all, oldest first."""
        who, values = ("WHERE user_id = ?", (user.id,)) if user else ("", ())
        columns = ", ".join(item.name for item in fields(UsageRow))
        order = "ORDER BY created_at, request_id"
        return [
            UsageRow(*row)
            for row in self.rows(f"SELECT {columns} FROM usage {who} {order}", *values)
        ]

    def row(self, reply: Reply) -> UsageRow:
        """Return the final row of an answer, waiting until it is booked."""
        name = reply.headers["X-Request-Id"]
        wait_until(
            lambda: any(r.request_id == name and r.status != "pending" for r in self.usage())
        )
        return next(row for row in self.usage() if row.request_id == name)

    def tokens_used(self, user: User) -> int:
        """Return the user's counter."""
        return int(self.rows("SELECT tokens_used FROM users WHERE id = ?", user.id)[0][0])

    def reserved(self) -> int:
        """Return what all users hold in reserve."""
        return int(self.rows("SELECT coalesce(sum(tokens_reserved), 0) FROM users")[0][0])

    def complaints(self) -> list[str]:
        """Say what is wrong with the books of a gate at rest; an empty list is a pass."""
        found = [
            f"{name}: tokens_used {used}, rows {total}, reserved {reserved}"
            for name, used, reserved, total in self.rows(
                "SELECT u.username, u.tokens_used, u.tokens_reserved,"
                " coalesce(sum(r.prompt_tokens + r.completion_tokens), 0) FROM users u"
                " LEFT JOIN usage r ON r.user_id = u.id"
                " GROUP BY u.id, u.username, u.tokens_used, u.tokens_reserved"
            )
            if used != total or reserved
        ]
        counted = self.upstream.tokens()
        for row in self.usage():
            if row.status == "pending" or row.reserved:
                found.append(f"not closed: {row}")
            elif not row.agrees_with(counted.get(row.request_id, 0)):
                found.append(f"vLLM counted {counted.get(row.request_id)}: {row}")
        if self.upstream.running():
            found.append(f"vLLM still answers {self.upstream.running()} requests")
        return found

    def settle(self, timeout: float = 3.0) -> None:
        """Wait until nothing runs, and fail unless the books are right then."""
        deadline = time.monotonic() + timeout
        while self.complaints() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.complaints() == []

    def check_output(self, *others: Path) -> None:
        """Fail for a secret or a stack trace in what the gate wrote, or an unexpected 5xx."""
        assert self.seen_5xx <= self.expected_5xx
        for path in (self.log, *others):
            text = path.read_text(errors="replace") if path.exists() else ""
            leaked = [secret for secret in self.secrets if secret in text]
            assert not leaked, f"{leaked} in {path.name}"
            assert self.may_log_traceback or "Traceback" not in text, text[-3000:]


@dataclass(frozen=True)
class UsageRow:
    """One row of the table usage."""

    request_id: str
    user_id: int
    api_key_id: int | None
    model: str
    endpoint: str
    stream: int
    status: str
    estimated: int
    reserved: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def total(self) -> int:
        """Return what was charged."""
        return self.prompt_tokens + self.completion_tokens

    def agrees_with(self, counted: int) -> bool:
        """Return whether the charge is vLLM's count; of a lost row it is the last checkpoint."""
        if self.estimated or self.endpoint == "reset-usage":
            return True
        return self.total <= counted if self.status == "lost" else self.total == counted


def query(database_url: str, sql: str, *values: object) -> list[tuple[Any, ...]]:
    """Return the rows of one SELECT with `?` marks from SQLite or PostgreSQL."""
    if database_url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(database_url.removeprefix("sqlite:///"))) as db:
            return db.execute(sql, values).fetchall()
    with psycopg.connect(database_url.replace("+psycopg", "")) as connection:
        return connection.execute(sql.replace("?", "%s").encode(), values).fetchall()


class ThreadedGate(Gate):
    """A gate in a thread of this process."""

    stopped = False  # by the test itself

    def __init__(self, env: Mapping[str, str], upstream: Upstream) -> None:
        """Start it; it serves when this returns."""
        settings = llmgate.Settings.from_env(env)
        self.server = llmgate.Server(settings, llmgate.bind(settings))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        super().__init__(self.server.url, env, Path(env["LOG_FILE"]).parent, upstream)

    def stop(self) -> None:
        """Drain it, unless the test did; nothing of it may be left."""
        if not self.stopped:
            self.server.drain(1)
        self.thread.join(10)
        assert not self.thread.is_alive(), "the gate did not stop"


class ProcessGate(Gate):
    """A gate as a user starts it: `python llmgate.py` in a directory."""

    def __init__(self, env: Mapping[str, str], directory: Path, upstream: Upstream) -> None:
        """Start it and wait for the line with its URL."""
        self.output = directory / "stdout"
        self.errors = directory / "stderr"
        with self.output.open("wb") as output, self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "llmgate.py")],
                cwd=directory,
                env=clean_env() | dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
            )
        wait_until(lambda: "http://" in self.output.read_text() or self.ended(), 10)
        match = re.search(r"http://[\w.]+:\d+", self.output.read_text())
        assert match, self.errors.read_text()
        super().__init__(match[0], env, directory, upstream)

    def ended(self) -> bool:
        """Return whether the process is gone."""
        return self.process.poll() is not None

    def stop(self) -> None:
        """SIGTERM; it must end by itself and say that all is well."""
        self.process.terminate()
        assert self.process.wait(10) == 0, self.errors.read_text()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(10)

    def descriptors(self) -> int:
        """Return how many files and sockets it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


def clean_env() -> dict[str, str]:
    """Return this process's environment without any setting of llmgate."""
    names = {item.name.upper() for item in fields(llmgate.Settings)}
    return {name: value for name, value in os.environ.items() if name not in names}


def resources() -> Counter[str]:
    """Return the kinds of open descriptors and the running threads of this process."""
    found = Counter(re.sub(r"[-_]\d+", "", thread.name) for thread in threading.enumerate())
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[re.sub(r":\[\d+\]", "", os.readlink(f"/proc/self/fd/{number}"))] += 1
    return found


@pytest.fixture(scope="session")
def standing_upstream() -> Iterator[Upstream]:
    """One stand-in for the whole run."""
    with Upstream() as upstream:
        yield upstream


@pytest.fixture
def upstream(standing_upstream: Upstream) -> Upstream:
    """The stand-in, with a clean slate."""
    standing_upstream.exchanges = []
    return standing_upstream


@pytest.fixture
def make_gate(upstream: Upstream, tmp_path: Path) -> Iterator[Callable[..., ThreadedGate]]:
    """A factory of gates in this process, `make_gate(NAME=value)`; checks all books at the end."""
    gates: list[ThreadedGate] = []
    before = resources()

    def make(**settings: str) -> ThreadedGate:
        gate = ThreadedGate(default_env(tmp_path, upstream) | settings, upstream)
        gates.append(gate)
        return gate

    yield make
    try:
        for gate in gates:
            assert gate.stopped or gate.thread.is_alive(), "the gate died"
            gate.settle()
    finally:
        for gate in gates:
            gate.stop()
    for gate in gates:
        gate.check_output()
    deadline = time.monotonic() + 3
    while (left := resources() - before) and time.monotonic() < deadline:
        gc.collect()  # a connection may wait for it in a cycle of references
        time.sleep(0.02)
    assert not left, "left behind by the gate"


def default_env(directory: Path, upstream: Upstream) -> dict[str, str]:
    """Return the settings of a gate for tests: its own database, log and secret, any port."""
    return {
        "PORT": "0",
        "DATABASE_URL": f"sqlite:///{directory / 'llmgate.db'}",
        "LOG_FILE": str(directory / "server.log"),
        "JWT_SECRET_KEY": JWT_SECRET,
        "VLLM_ENDPOINT": upstream.url,
        "VLLM_API_KEY": UPSTREAM_KEY,
        "THREADS": "80",
    }


JWT_SECRET = "secret-marker-2b60" + "0" * 32


@pytest.fixture
def gate(make_gate: Callable[..., ThreadedGate]) -> ThreadedGate:
    """A gate with default settings and an empty database."""
    return make_gate()


@pytest.fixture
def start_process(upstream: Upstream, tmp_path: Path) -> Iterator[Callable[..., ProcessGate]]:
    """A factory of gates as processes; checks their books and output, unless they were killed."""
    gates: list[ProcessGate] = []

    def start(directory: Path = tmp_path, **settings: str) -> ProcessGate:
        env = {"PORT": "0", "VLLM_ENDPOINT": upstream.url, "VLLM_API_KEY": UPSTREAM_KEY}
        gate = ProcessGate(env | settings, directory, upstream)
        gates.append(gate)
        return gate

    try:
        yield start
        for gate in gates:
            if not gate.ended():
                gate.settle()
                gate.stop()
                gate.check_output(gate.output, gate.errors)
    finally:
        for gate in gates:
            gate.kill()


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """The URL of a fresh PostgreSQL database, dropped at the end."""
    url = os.environ.get("LLMGATE_TEST_POSTGRES_URL", "")
    if not url:
        pytest.skip("LLMGATE_TEST_POSTGRES_URL is not set: no PostgreSQL to test with")
    name = f"llmgate_test_{random.getrandbits(48):012x}"
    server = url.replace("+psycopg", "")
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        yield sqlalchemy.make_url(url).set(database=name).render_as_string(hide_password=False)
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())


# ---------------------------------------------------------------------------------------------
# Verbs. A test says what it does in the words of the contract.


class Reply(Protocol):
    """What a test reads of an answer, whether `requests` or a raw socket got it."""

    @property
    def status_code(self) -> int:
        """The HTTP status."""

    @property
    def headers(self) -> CaseInsensitiveDict[str]:
        """The headers, whatever their case."""

    @property
    def content(self) -> bytes:
        """The body."""


@dataclass(frozen=True)
class RawReply:
    """An answer read from a raw socket."""

    status_code: int
    headers: CaseInsensitiveDict[str]
    content: bytes


@dataclass(frozen=True)
class User:
    """An account that a test made."""

    id: int
    name: str
    password: str
    key: str


def wait_until(ready: Callable[[], object], timeout: float = 3.0) -> None:
    """Poll until `ready()` holds; fail after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, f"did not happen within {timeout} s"
        time.sleep(0.01)


def best_of_six(measure: Callable[[], float], limit: float) -> float:
    """Return the least of up to six measurements; other programs may need the same cores."""
    measured = [measure()]
    while min(measured) >= limit and len(measured) < 6:
        measured.append(measure())
    return min(measured)


def call(
    gate: Gate, method: str, path: str, bearer: str | bytes = "", **options: Any
) -> requests.Response:
    """Send one request on a connection of its own; `options` as for `requests`."""
    headers = dict(options.pop("headers", {}))
    if bearer:
        prefix: Any = b"Bearer " if isinstance(bearer, bytes) else "Bearer "
        headers["Authorization"] = prefix + bearer
    options = {"timeout": 60, "allow_redirects": False} | options
    with requests.Session() as session:
        session.trust_env, session.verify = False, gate.verify
        answer = session.request(method, gate.url + path, headers=headers, **options)
    if answer.status_code >= 500:
        gate.seen_5xx.add(answer.status_code)
    return answer


USER_NUMBERS = itertools.count(1)


def register(gate: Gate, name: str = "", password: str = PASSWORD, **fields: object) -> User:
    """Make an account; `fields` may hold token_limit."""
    name = name or f"user-{next(USER_NUMBERS)}"
    body = {"username": name, "password": password} | fields
    answer = call(gate, "POST", "/auth/register", json=body)
    assert answer.status_code == 201, answer.text
    gate.secrets.add(answer.json()["api_key"])
    return User(answer.json()["id"], name, password, answer.json()["api_key"])


def try_login(gate: Gate, name: object, password: object) -> requests.Response:
    """Ask for a JWT."""
    body = json.dumps({"username": name, "password": password})
    headers = {"Content-Type": "application/json"}
    return call(gate, "POST", "/auth/token", data=body, headers=headers)


def login(gate: Gate, user: User) -> str:
    """Return a JWT of the user."""
    answer = try_login(gate, user.name, user.password)
    assert answer.status_code == 200, answer.text
    token = str(answer.json()["access_token"])
    gate.secrets.add(token)
    return token


def me(gate: Gate, user: User) -> JSONObject:
    """Return what /users/me says."""
    answer = call(gate, "GET", "/users/me", login(gate, user))
    assert answer.status_code == 200, answer.text
    return cast(JSONObject, answer.json())


def replace_key(gate: Gate, token: str) -> str:
    """Replace the user's key; return the new one."""
    answer = call(gate, "POST", "/users/me/api-key", token)
    assert answer.status_code == 200, answer.text
    gate.secrets.add(answer.json()["api_key"])
    return str(answer.json()["api_key"])


def chat_body(model: str = "ok", **fields: object) -> JSONObject:
    """Return the body of a chat with the prompt marker in it."""
    return {"model": model, "messages": [{"role": "user", "content": PROMPT}]} | fields


def chat(gate: Gate, key: str, model: str = "ok", **fields: object) -> requests.Response:
    """Ask for a chat; with stream=True the answer is read by the caller, and must be closed."""
    return relay(gate, key, "chat/completions", chat_body(model, **fields))


def relay(gate: Gate, key: str, endpoint: str, body: JSONObject) -> requests.Response:
    """Post `body` to an endpoint under /v1."""
    streams = body.get("stream") is True
    return call(gate, "POST", f"/v1/{endpoint}", key, json=body, stream=streams)


def stream_events(response: requests.Response) -> Iterator[bytes]:
    """Yield each event, with its blank line, when it arrives."""
    rest = b""
    for piece in response.iter_content(None):
        rest += piece
        while b"\n\n" in rest:
            event, _, rest = rest.partition(b"\n\n")
            yield event + b"\n\n"
    assert rest == b"", f"a torn event: {rest!r}"


def streamed(gate: Gate, key: str, model: str = "ok", **fields: object) -> list[bytes]:
    """Return all events of a chat that is streamed."""
    with chat(gate, key, model, stream=True, **fields) as response:
        assert response.status_code == 200, response.text
        return list(stream_events(response))


def data(event: bytes) -> JSONObject:
    """Return the JSON of one event."""
    return cast(JSONObject, json.loads(event.removeprefix(b"data: ")))


def spoken(events: list[bytes]) -> str:
    """Return the text of the first choice of a streamed chat."""
    said = ""
    for event in events:
        if event.startswith(b"data: {"):
            for choice in data(event).get("choices", [])[:1]:
                said += choice["delta"].get("content") or ""
    return said


def said_by_vllm(exchange: Exchange, options: JSONObject | None = None) -> bytes:
    """Return the stream as vLLM would have written it for these stream_options of the caller."""
    asked = options or {}
    kept = b""
    for event in exchange.answer().split(b"\n\n")[:-1]:
        final = b'"choices":[],' in event
        if final and not asked.get("include_usage"):
            continue
        if not final and not asked.get("continuous_usage_stats"):
            event = re.sub(rb',"usage":\{[^}]*\}', b"", event)
        kept += event + b"\n\n"
    return kept


@contextlib.contextmanager
def connected(gate: Gate) -> Iterator[socket.socket]:
    """A raw connection to the gate."""
    with socket.create_connection(gate.address, timeout=20) as connection:
        yield connection


def raw_request(method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """Return a request as bytes, header by header as given."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def raw_chat(key: str, body: JSONObject) -> bytes:
    """Return a chat request as bytes."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return raw_request("POST", "/v1/chat/completions", headers, json.dumps(body).encode())


def read_reply(connection: socket.socket) -> RawReply:
    """Read one answer from a raw connection."""
    with contextlib.closing(http.client.HTTPResponse(connection)) as response:
        response.begin()
        return RawReply(
            response.status, CaseInsensitiveDict(response.getheaders()), response.read()
        )


def send_raw(gate: Gate, request: bytes) -> RawReply:
    """Send bytes on a connection of their own and read one answer."""
    with connected(gate) as connection:
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            connection.sendall(request)
        return read_reply(connection)


def read_events(connection: socket.socket, count: int) -> bytes:
    """Read from a raw connection until `count` events were there; return all bytes."""
    received = b""
    while received.count(b"\n\ndata: ") + received.count(b"\r\ndata: ") < count:
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    return received


def leave_with_reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN, as a client does whose process is killed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def in_parallel(count: int, work: Callable[[int], T]) -> list[T]:
    """Do `work(0)` … `work(count - 1)` at the same time; return what they gave, in order."""
    start = threading.Barrier(count)

    def begin(number: int) -> T:
        start.wait(30)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


LEAKS = re.compile(
    r"Traceback|\.py\b|File \"|SELECT |INSERT |UPDATE |sqlite|psycopg|sqlalchemy|urllib3|127\.0\.0\.1"
    r"|localhost|:\d{4,5}\b|port \d{4,5}|/tmp|/root|/home|<html|<!doctype",
    re.IGNORECASE,
)
MISREAD_BY_OPENCODE = ("token limit exceeded", "too many tokens", "exceeds the limit of")


def assert_error(
    reply: Reply, status: int, code: str | None = None, param: str | None = None
) -> JSONObject:
    """Fail unless `reply` is the contract's error in every respect; return the error object."""
    text = reply.content.decode()
    assert reply.status_code == status, text
    assert reply.headers["Content-Type"].split(";")[0] == "application/json"
    assert reply.headers["X-Request-Id"]
    body = json.loads(text)
    assert set(body) == {"error"}
    error = cast(JSONObject, body["error"])
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str) and error["type"]
    assert code is None or error["code"] == code, text
    assert param is None or error["param"] == param, text
    assert not LEAKS.search(text), text
    headers = reply.headers
    if status == 401:
        assert headers["WWW-Authenticate"].startswith("Bearer")
    if status == 405:
        assert headers["Allow"]
    if status == 429:
        assert not any(words in text.lower() for words in MISREAD_BY_OPENCODE), text
    if error["code"] == "insufficient_quota":
        assert headers["x-should-retry"] == "false" and headers["retry-after-ms"] == "1"
    elif status in (429, 503):
        assert int(headers["Retry-After"]) >= 1
    return error


# ---------------------------------------------------------------------------------------------
# A. Accounts, JWTs and keys: who gets in, and that nobody else does.

API_KEY = re.compile(r"sk-llmgate-[0-9A-Za-z]{49}")
LONGEST_PASSWORD = "ä" * 36  # 72 bytes


def test_registration_gives_an_integer_id_and_a_key(gate: Gate) -> None:
    """Case 1: the answer of the contract, which no cache may keep."""
    body = {"username": "alice_1", "password": PASSWORD}
    answer = call(gate, "POST", "/auth/register", json=body)
    key = answer.json().pop("api_key")
    assert answer.status_code == 201
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Request-Id"]
    assert answer.json() == {
        "id": 1,
        "username": "alice_1",
        "token_limit": 1000000,
        "tokens_used": 0,
        "api_key": key,
    }
    assert API_KEY.fullmatch(key)
    gate.secrets.add(key)


def test_login_takes_json_and_a_form(gate: Gate) -> None:
    """Case 1: both give a JWT of a day, which no cache may keep."""
    user = register(gate)
    credentials = {"username": user.name, "password": PASSWORD}
    for answer in (
        call(gate, "POST", "/auth/token", json=credentials),
        call(gate, "POST", "/auth/token", data=credentials | {"grant_type": "password"}),
    ):
        assert answer.status_code == 200, answer.text
        assert set(answer.json()) == {"access_token", "token_type", "expires_in"}
        assert answer.json()["token_type"] == "bearer"
        assert answer.json()["expires_in"] == 24 * 3600
        assert answer.headers["Cache-Control"] == "no-store"
        gate.secrets.add(answer.json()["access_token"])
        assert call(gate, "GET", "/users/me", answer.json()["access_token"]).status_code == 200


def test_users_me_shows_the_account_and_its_key_again(gate: Gate) -> None:
    """Case 1: the key that registration showed."""
    user = register(gate, token_limit=5000)
    seen = me(gate, user)
    assert abs(seen.pop("created_at") - time.time()) < 60
    assert seen == {
        "id": user.id,
        "username": user.name,
        "token_limit": 5000,
        "tokens_used": 0,
        "api_key": user.key,
    }


def test_refreshed_jwt_works(gate: Gate) -> None:
    """A JWT buys a new one of the same shape."""
    answer = call(gate, "POST", "/auth/refresh", login(gate, register(gate)))
    assert set(answer.json()) == {"access_token", "token_type", "expires_in"}
    assert call(gate, "GET", "/users/me", answer.json()["access_token"]).status_code == 200
    assert_error(call(gate, "POST", "/auth/refresh"), 401)


def test_names_are_unique_whatever_their_case(gate: Gate) -> None:
    """Case 2."""
    register(gate, "alice_1")
    for name in ("alice_1", "ALICE_1"):
        body = {"username": name, "password": PASSWORD}
        assert_error(call(gate, "POST", "/auth/register", json=body), 409, "username_taken")
    assert try_login(gate, "Alice_1", PASSWORD).status_code == 200


def test_one_of_twenty_parallel_registrations_gets_the_name(gate: Gate) -> None:
    """Case 2: one row, and nineteen clear answers."""
    body = {"username": "bob", "password": PASSWORD}
    answers = in_parallel(20, lambda _: call(gate, "POST", "/auth/register", json=body))
    refused = [answer for answer in answers if answer.status_code != 201]
    assert len(refused) == 19
    for answer in refused:
        assert_error(answer, 409, "username_taken")
    assert gate.rows("SELECT count(*) FROM users") == [(1,)]
    assert gate.rows("SELECT count(*) FROM api_keys") == [(1,)]


@pytest.mark.parametrize("name", ["ab", "a" * 65, "", "a b", "älice", "a\r\nb", "a/b", 12345, None])
def test_bad_name_is_refused(gate: Gate, name: object) -> None:
    """Names are 3 to 64 of a small alphabet; a line break never reaches the log."""
    body = {"username": name, "password": PASSWORD}
    answer = call(gate, "POST", "/auth/register", json=body)
    assert_error(answer, 400, param="username")
    assert_error(try_login(gate, name, PASSWORD), 401, "invalid_credentials")


BAD_PASSWORDS = {
    "73 bytes": "a" * 73,
    "19 emoji": "\N{GRINNING FACE}" * 19,
    "a megabyte": "a" * 1_000_000,
    "empty": "",
    "7 characters": "passwor",
    "a number": 12345678,
    "null": None,
    "a lone surrogate": "password\ud800",
}


@pytest.mark.parametrize("password", BAD_PASSWORDS.values(), ids=BAD_PASSWORDS)
def test_bad_password_is_refused(gate: Gate, password: object) -> None:
    """Case 3: 400 at registration, the answer of a wrong password at login."""
    user = register(gate)
    body = {"username": "carol", "password": password}
    assert_error(call(gate, "POST", "/auth/register", json=body), 400, param="password")
    assert_error(try_login(gate, user.name, password), 401, "invalid_credentials")
    assert gate.rows("SELECT count(*) FROM users") == [(1,)]


def test_password_of_72_bytes_is_whole(gate: Gate) -> None:
    """Case 3: all 72 bytes count, and one more is another password."""
    user = register(gate, password=LONGEST_PASSWORD)
    assert try_login(gate, user.name, LONGEST_PASSWORD).status_code == 200
    for wrong in (LONGEST_PASSWORD + "a", LONGEST_PASSWORD[:-1] + "ö", LONGEST_PASSWORD[:-1]):
        assert_error(try_login(gate, user.name, wrong), 401, "invalid_credentials")


@pytest.mark.parametrize("limit", ["-1", "0", "1.5", '"100"', "true", "[]", "NaN", "1e999"])
def test_bad_token_limit_is_refused(gate: Gate, limit: str) -> None:
    """Case 4."""
    body = f'{{"username": "dave", "password": "{PASSWORD}", "token_limit": {limit}}}'
    headers = {"Content-Type": "application/json"}
    answer = call(gate, "POST", "/auth/register", data=body, headers=headers)
    assert_error(answer, 400)
    assert gate.rows("SELECT count(*) FROM users") == [(0,)]


@pytest.mark.parametrize(
    ("asked", "granted"),
    [({}, 5000), ({"token_limit": None}, 5000), ({"token_limit": 7}, 7)]
    + [({"token_limit": 9001}, 9000), ({"token_limit": 10**30}, 9000)],
)
def test_token_limit_is_granted_up_to_the_maximum(
    make_gate: Callable[..., ThreadedGate], asked: JSONObject, granted: int
) -> None:
    """Case 4: absent and null mean the default."""
    gate = make_gate(DEFAULT_TOKEN_LIMIT="5000", MAX_TOKEN_LIMIT="9000")
    assert me(gate, register(gate, **asked))["token_limit"] == granted


def test_extra_fields_change_nothing(gate: Gate) -> None:
    """Case 5: nobody registers as somebody else."""
    extra: JSONObject = {
        "is_admin": True,
        "tokens_used": -1000,
        "tokens_reserved": -1000,
        "id": 77,
        "api_key": "sk-llmgate-mine",
        "key_hash": "0" * 64,
        "jwt_version": 9,
        "disabled_at": 1,
    }
    user = register(gate, **extra)
    assert user.id == 1 and API_KEY.fullmatch(user.key)
    row = gate.rows("SELECT id, tokens_used, tokens_reserved, jwt_version, disabled_at FROM users")
    assert row == [(1, 0, 0, 1, None)]
    assert gate.rows("SELECT count(*) FROM api_keys WHERE key_hash = ?", "0" * 64) == [(0,)]


READS_JSON = [
    "/auth/register",
    "/auth/token",
    "/auth/password",
    "/users/me/keys",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
]
BAD_BODIES = {
    "torn": b"{bad",
    "empty": b"",
    "an array": b"[1]",
    "null": b"null",
    "a string": b'"x"',
    "not UTF-8": b"\xff\xfe",
    "not UTF-8 inside": b'{"username": "\xff\xfe", "model": "\xff\xfe"}',
    "deep": b"[" * 100_000,
    "deep inside": b'{"model": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("path", READS_JSON)
def test_bad_body_is_refused(gate: Gate, path: str) -> None:
    """Case 6: 400 in the contract's shape on every call that reads JSON; vLLM sees nothing."""
    user = register(gate)
    bearer = user.key if path.startswith("/v1") else login(gate, user)
    headers = {"Content-Type": "application/json"}
    for body in BAD_BODIES.values():
        assert_error(call(gate, "POST", path, bearer, data=body, headers=headers), 400)
    assert gate.upstream.asked() == []


@pytest.mark.parametrize("path", READS_JSON)
def test_body_that_is_not_declared_as_json_is_refused(gate: Gate, path: str) -> None:
    """Case 6: `text/plain`, which a web page may send without asking, and no type at all."""
    user = register(gate)
    bearer = user.key if path.startswith("/v1") else login(gate, user)
    body = json.dumps(chat_body() | {"username": "erin", "password": PASSWORD}).encode()
    for headers in ({"Content-Type": "text/plain"}, {}):
        assert_error(call(gate, "POST", path, bearer, data=body, headers=headers), 415)
    assert gate.upstream.asked() == []
    assert gate.rows("SELECT count(*) FROM users") == [(1,)]


def test_unknown_name_and_wrong_password_look_the_same(gate: Gate) -> None:
    """Case 7: the same answer in the same time, so that names cannot be guessed."""
    bodies = set()

    def seconds(name: str) -> float:
        began = time.perf_counter()
        answer = try_login(gate, name, "wrong-password")
        assert_error(answer, 401, "invalid_credentials")
        bodies.add(answer.content)
        return time.perf_counter() - began

    def difference() -> float:
        names = [register(gate).name for _ in range(5)] * 3
        pairs = [(seconds(name), seconds(f"no-{name}-{i}")) for i, name in enumerate(names)]
        wrong = statistics.median([wrong_s for wrong_s, _ in pairs])
        unknown = statistics.median([unknown_s for _, unknown_s in pairs])
        return abs(wrong - unknown) / max(wrong, unknown)

    assert best_of_six(difference, 0.25) < 0.25
    assert len(bodies) == 1


def sign(gate: Gate, claims: Mapping[str, object], algorithm: str = "HS256", **header: str) -> str:
    """Sign claims with the gate's own key for JWTs; None as a claim leaves it out."""
    now = int(time.time())
    whole = {"sub": "1", "iat": now, "exp": now + 60, "ver": 1} | dict(claims)
    kept = {name: value for name, value in whole.items() if value is not None}
    key = hmac.digest(JWT_SECRET.encode(), b"llmgate jwt", "sha256")
    with warnings.catch_warnings():  # PyJWT finds 32 bytes short for HS512
        warnings.simplefilter("ignore", jwt.InsecureKeyLengthWarning)
        return jwt.encode(kept, key, algorithm, headers=dict(header))


def test_jwt_with_the_right_signature_works(gate: Gate) -> None:
    """The ground for the next test: `sign` signs as the gate does."""
    register(gate)
    assert call(gate, "GET", "/users/me", sign(gate, {})).status_code == 200


def forged_jwts(gate: Gate, genuine: str) -> dict[str, str]:
    """Return JWTs that must all be refused."""
    header, payload, signature = genuine.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "==")) | {"sub": "2"}
    changed = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    none = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').decode().rstrip("=")
    return {
        "alg none": f"{none}.{payload}.",
        "alg none, signed": f"{none}.{payload}.{signature}",
        "HS512": sign(gate, {}, "HS512"),
        "another key": jwt.encode({**claims, "sub": "1"}, "k" * 32),
        "the secret itself": jwt.encode({**claims, "sub": "1"}, JWT_SECRET),
        "changed payload": f"{header}.{changed}.{signature}",
        "no signature": f"{header}.{payload}.",
        "no exp": sign(gate, {"exp": None}),
        "no sub": sign(gate, {"sub": None}),
        "integer sub": sign(gate, {"sub": 1}),
        "sub of nobody": sign(gate, {"sub": "2"}),
        "sub beyond 64 bits": sign(gate, {"sub": "9" * 30}),
        "not a number": sign(gate, {"sub": "one"}),
        "another version": sign(gate, {"ver": 2}),
        "from the future": sign(gate, {"nbf": int(time.time()) + 3600}),
        "crit": sign(gate, {}, crit=cast(str, ["exp"])),
        "three letters": "a.b.c",
        "long": "a" * 40_000,
    }


def test_forged_jwt_is_refused_at_once(gate: Gate) -> None:
    """Case 8."""
    register(gate)
    for name, token in forged_jwts(gate, sign(gate, {})).items():
        began = time.perf_counter()
        answer = call(gate, "GET", "/users/me", token)
        assert time.perf_counter() - began < 0.5, name
        assert answer.status_code == 401, name
        assert_error(answer, 401, "invalid_token")


def test_expired_jwt_is_refused_and_told(gate: Gate) -> None:
    """Case 8: a client can tell that it must log in again."""
    register(gate)
    token = sign(gate, {"exp": int(time.time()) - 120})
    assert_error(call(gate, "GET", "/users/me", token), 401, "token_expired")


@pytest.mark.parametrize(
    "value", ["Bearer", "Bearer ", "", "Bearer \xe4\xff", "Bearer " + "a" * 10**6]
)
def test_unreadable_jwt_is_refused(gate: Gate, value: str) -> None:
    """Case 8: empty, not ASCII, or a megabyte, which is too much for any header."""
    reply = send_raw(gate, raw_request("GET", "/users/me", {"Authorization": value}))
    if len(value) < 10**6:
        assert_error(reply, 401)
    else:
        assert reply.status_code == 431


def test_api_key_opens_no_account(gate: Gate) -> None:
    """Case 9: what an agent holds may read its usage, and no more."""
    user = register(gate)
    for method, path in (
        ("GET", "/users/me"),
        ("POST", "/users/me/api-key"),
        ("GET", "/users/me/keys"),
        ("POST", "/auth/refresh"),
    ):
        assert_error(call(gate, method, path, user.key), 401)
    assert call(gate, "GET", "/users/usage", user.key).status_code == 200
    assert me(gate, user)["api_key"] == user.key


def test_jwt_opens_no_model(gate: Gate) -> None:
    """Case 9: a JWT is for the account calls."""
    token = login(gate, register(gate))
    assert_error(call(gate, "GET", "/v1/models", token), 401, "invalid_api_key")
    assert_error(chat(gate, token), 401, "invalid_api_key")
    assert gate.upstream.asked() == []


@pytest.mark.parametrize("name", ["api_key", "key", "token", "access_token", "authorization"])
def test_credentials_in_the_query_are_not_read(gate: Gate, name: str) -> None:
    """Case 9: they would end up in logs."""
    user = register(gate)
    token = login(gate, user)
    assert_error(call(gate, "GET", f"/users/me?{name}={token}"), 401)
    assert_error(call(gate, "GET", f"/v1/models?{name}={user.key}"), 401)


def bad_authorizations(key: str) -> dict[str, str]:
    """Return values of the Authorization header that open nothing."""
    other = "B" if key[20] == "A" else "A"
    return {
        "Bearer": "Bearer",
        "Basic": "Basic x",
        "the key in Basic": "Basic " + base64.b64encode(f"user:{key}".encode()).decode(),
        "no scheme": key,
        "SQL": "Bearer ' OR 1=1 --",
        "SQL in a key": f"Bearer sk-llmgate-{chr(39)} OR 1=1 --",
        "bytes": "Bearer \xff\xfe",
        "changed": f"Bearer {key[:20]}{other}{key[21:]}",
        "longer": f"Bearer {key}a",
        "shorter": f"Bearer {key[:-1]}",
        "another case": f"Bearer {key.swapcase()}",
        "two in one": f"Bearer {key}, Bearer {key}",
    }


def test_bad_key_is_refused_before_vllm(gate: Gate) -> None:
    """Case 10: at once, and vLLM sees nothing."""
    user = register(gate)
    body = json.dumps(chat_body()).encode()
    for name, value in bad_authorizations(user.key).items():
        headers = {"Authorization": value, "Content-Type": "application/json"}
        began = time.perf_counter()
        reply = send_raw(gate, raw_request("POST", "/v1/chat/completions", headers, body))
        assert time.perf_counter() - began < 0.5, name
        assert_error(reply, 401)
    assert_error(relay(gate, "", "chat/completions", chat_body()), 401, "missing_api_key")
    assert gate.upstream.asked() == []


def test_two_authorization_headers_are_refused(gate: Gate) -> None:
    """Case 10: which one counts must not depend on who reads them."""
    user = register(gate)
    request = raw_chat(user.key, chat_body()).replace(
        b"Authorization:", b"Authorization: Bearer other\r\nAuthorization:"
    )
    assert_error(send_raw(gate, request), 401)
    assert gate.upstream.asked() == []


def test_scheme_is_read_in_any_case(gate: Gate) -> None:
    """Case 10: `bearer KEY` works (RFC 9110)."""
    user = register(gate)
    headers = {"Authorization": f"bearer {user.key}"}
    assert call(gate, "GET", "/v1/models", headers=headers).status_code == 200


def test_replaced_key_is_refused_and_its_stream_goes_on(gate: Gate) -> None:
    """Case 11: the old key stops at once, a running answer ends well, the quota is the same."""
    user = register(gate, token_limit=50_000)
    assert chat(gate, user.key).status_code == 200
    with chat(gate, user.key, "slow", stream=True, max_tokens=10) as running:
        key = replace_key(gate, login(gate, user))
        assert_error(chat(gate, user.key), 401, "invalid_api_key")
        assert chat(gate, key).status_code == 200
        assert list(stream_events(running))[-1] == b"data: [DONE]\n\n"
    gate.settle()
    seen = me(gate, user)
    assert (seen["token_limit"], seen["tokens_used"], seen["api_key"]) == (50_000, 80, key)


def test_one_of_ten_parallel_new_keys_works(gate: Gate) -> None:
    """Case 11: the one that /users/me shows."""
    user = register(gate)
    token = login(gate, user)
    keys = in_parallel(10, lambda _: replace_key(gate, token))
    working = [key for key in keys if call(gate, "GET", "/v1/models", key).status_code == 200]
    assert working == [me(gate, user)["api_key"]]
    assert_error(call(gate, "GET", "/v1/models", user.key), 401)


def test_named_keys_are_listed_and_revoked(gate: Gate) -> None:
    """A user may have more keys, each with its own usage; a revoked one is refused at once."""
    user = register(gate)
    token = login(gate, user)
    made = call(gate, "POST", "/users/me/keys", token, json={"name": "laptop"})
    assert made.status_code == 201, made.text
    key = made.json()["api_key"]
    gate.secrets.add(key)
    assert chat(gate, key).status_code == 200
    gate.settle()
    keys = call(gate, "GET", "/users/me/keys", token).json()["data"]
    assert [item["name"] for item in keys][1:] == ["laptop"]
    assert [item["api_key"] for item in keys] == [user.key, key]
    assert [item["tokens_used"] for item in keys] == [0, 30]
    number = keys[1]["id"]
    assert call(gate, "DELETE", f"/users/me/keys/{number}", token).status_code == 204
    assert_error(chat(gate, key), 401, "invalid_api_key")
    assert chat(gate, user.key).status_code == 200
    other = login(gate, register(gate))
    assert_error(call(gate, "DELETE", f"/users/me/keys/{keys[0]['id']}", other), 404)
    assert me(gate, user)["api_key"] == user.key


def test_new_password_ends_every_older_jwt(gate: Gate) -> None:
    """A stolen JWT is of no use any more; the API key works on."""
    user = register(gate)
    old = login(gate, user)
    body = {"old_password": PASSWORD, "new_password": PASSWORD + "-2"}
    wrong = call(gate, "POST", "/auth/password", old, json=body | {"old_password": "wrong-one"})
    assert_error(wrong, 401)
    answer = call(gate, "POST", "/auth/password", old, json=body)
    assert answer.status_code == 200, answer.text
    gate.secrets.add(answer.json()["access_token"])
    assert_error(call(gate, "GET", "/users/me", old), 401, "invalid_token")
    assert call(gate, "GET", "/users/me", answer.json()["access_token"]).status_code == 200
    assert_error(try_login(gate, user.name, PASSWORD), 401, "invalid_credentials")
    assert try_login(gate, user.name, PASSWORD + "-2").status_code == 200
    assert chat(gate, user.key).status_code == 200


def test_guessing_is_slowed_down_for_one_name_only(gate: Gate) -> None:
    """Case 12: also for the right password, until the time is over; keys and others go on."""
    user, other = register(gate), register(gate)
    answers = [try_login(gate, user.name, "wrong-password") for _ in range(10)]
    statuses = [answer.status_code for answer in answers]
    assert statuses[:5] == [401] * 5 and statuses[-1] == 429
    assert_error(answers[-1], 429, "rate_limit_exceeded")
    held_back = try_login(gate, user.name, PASSWORD)
    assert_error(held_back, 429, "rate_limit_exceeded")
    assert chat(gate, user.key).status_code == 200
    assert try_login(gate, other.name, PASSWORD).status_code == 200
    wait_s = int(held_back.headers["Retry-After"])
    wait_until(lambda: try_login(gate, user.name, PASSWORD).status_code == 200, wait_s + 1)


def test_guessing_an_unknown_name_is_slowed_down_the_same(gate: Gate) -> None:
    """Case 12: the throttle does not tell which names exist."""
    user = register(gate)
    known = [try_login(gate, user.name, "wrong-password") for _ in range(7)]
    unknown = [try_login(gate, "no-such-name", "wrong-password") for _ in range(7)]
    assert [answer.status_code for answer in known] == [answer.status_code for answer in unknown]
    assert known[-1].content == unknown[-1].content


def test_endless_names_fill_no_memory(gate: ThreadedGate) -> None:
    """Of a typed name only as much is remembered as a name can have."""
    for number in range(3):
        body = {"username": f"{number}" * 1_000_000, "password": "wrong"}
        assert_error(call(gate, "POST", "/auth/token", json=body), 401, "invalid_credentials")
    assert max(map(len, gate.server.app.throttle)) <= 65


def test_few_of_fifty_parallel_guesses_are_tried(gate: Gate) -> None:
    """Case 12: tries are counted before they are hashed."""
    user = register(gate)
    answers = in_parallel(50, lambda _: try_login(gate, user.name, "wrong-password"))
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(401) <= 10
    assert statuses.count(401) + statuses.count(429) == 50


def test_disabled_account_is_refused(gate: Gate) -> None:
    """The operator's `disable` stops login, JWT and key."""
    user = register(gate)
    token = login(gate, user)
    run_command(gate, "disable", user.name)
    for answer in (
        try_login(gate, user.name, PASSWORD),
        call(gate, "GET", "/users/me", token),
        call(gate, "GET", "/v1/models", user.key),
        chat(gate, user.key),
    ):
        assert_error(answer, 403, "account_disabled")
    run_command(gate, "enable", user.name)
    assert chat(gate, user.key).status_code == 200


def test_closed_registration_is_refused(make_gate: Callable[..., ThreadedGate]) -> None:
    """REGISTRATION=closed."""
    gate = make_gate(REGISTRATION="closed")
    body = {"username": "mallory", "password": PASSWORD}
    assert_error(call(gate, "POST", "/auth/register", json=body), 403, "registration_closed")
    assert gate.rows("SELECT count(*) FROM users") == [(0,)]


def test_host_names_that_are_not_the_gates_are_refused(gate: Gate) -> None:
    """A web page whose name was pointed at loopback gets nowhere."""
    answer = call(gate, "GET", "/health", headers={"Host": "evil.example"})
    assert_error(answer, 400, "host_not_allowed")
    assert call(gate, "GET", "/health", headers={"Host": "localhost:8000"}).status_code == 200


# ---------------------------------------------------------------------------------------------
# B. The relay: what vLLM gets and what the client gets, byte by byte.


def test_plain_answer_is_vllms_byte_by_byte(gate: Gate) -> None:
    """Case 13: and its one row has vLLM's counts, under the answer's X-Request-Id."""
    user = register(gate)
    answer = chat(gate, user.key, max_tokens=7)
    (asked,) = gate.upstream.asked()
    assert answer.status_code == 200
    assert answer.content == asked.answer()
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["x-ratelimit-limit-tokens"] == "1000000"
    assert 0 < int(answer.headers["x-ratelimit-remaining-tokens"]) <= 1000000
    row = gate.row(answer)
    assert (row.user_id, row.model, row.endpoint) == (user.id, "ok", "chat/completions")
    assert (row.stream, row.status, row.estimated) == (0, "ok", 0)
    assert (row.prompt_tokens, row.completion_tokens) == (10, 7)
    assert len(gate.usage()) == 1


@pytest.mark.parametrize("endpoint", ["completions", "embeddings"])
def test_other_endpoints_are_relayed_and_booked(gate: Gate, endpoint: str) -> None:
    """Completions with two prompts, and embeddings, which have no completion."""
    user = register(gate)
    body = {"model": "ok", "prompt": [PROMPT, PROMPT], "input": [PROMPT, PROMPT], "max_tokens": 6}
    answer = relay(gate, user.key, endpoint, body)
    assert answer.status_code == 200, answer.text
    assert answer.content == gate.upstream.asked()[0].answer()
    row = gate.row(answer)
    assert (row.endpoint, row.status, row.estimated) == (endpoint, "ok", 0)
    assert (row.prompt_tokens, row.completion_tokens) == (
        20,
        12 if endpoint == "completions" else 0,
    )


def test_each_event_passes_at_once(gate: Gate) -> None:
    """Case 14: events that vLLM writes 300 ms apart are at the client within 150 ms."""
    user = register(gate)

    def longest_delay() -> float:
        with chat(gate, user.key, "spaced", stream=True) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            received = [(time.monotonic(), event) for event in stream_events(response)]
            row = gate.row(response)
        assert received[-1][1] == b"data: [DONE]\n\n"
        assert (row.stream, row.status, row.estimated) == (1, "ok", 0)
        assert (row.prompt_tokens, row.completion_tokens) == (10, 4)
        events = gate.upstream.asked()[-1].sent
        sent = [at for at, event in events if b'"choices":[],' not in event]
        return max(there - here for (there, _), here in zip(received, sent, strict=True))

    assert best_of_six(longest_delay, 0.15) < 0.15


STREAM_OPTIONS: list[JSONObject | None] = [
    None,
    {},
    {"include_usage": False},
    {"include_usage": True},
    {"include_usage": True, "continuous_usage_stats": False},
    {"include_usage": True, "continuous_usage_stats": True},
]


@pytest.mark.parametrize("options", STREAM_OPTIONS, ids=str)
@pytest.mark.parametrize("model", ["ok", "lumpy"])
def test_stream_is_what_vllm_would_have_sent(
    gate: Gate, model: str, options: JSONObject | None
) -> None:
    """Cases 14, 15: the usage that only the gate asked for is gone, every other byte is there."""
    user = register(gate)
    asked = {} if options is None else {"stream_options": options}
    events = streamed(gate, user.key, model, n=2, **asked)
    (exchange,) = gate.upstream.asked()
    assert exchange.json()["stream_options"]["include_usage"] is True
    assert exchange.json()["stream_options"]["continuous_usage_stats"] is True
    assert b"".join(events) == said_by_vllm(exchange, options)
    usages = [event for event in events if b'"usage":' in event]
    if not (options or {}).get("include_usage"):
        assert usages == []
    elif not (options or {}).get("continuous_usage_stats"):
        assert usages == [events[-2]] and data(usages[0])["choices"] == []
    (row,) = gate.usage(user)
    assert (row.prompt_tokens, row.completion_tokens, row.estimated) == (10, 40, 0)


def test_streamed_completion_is_what_vllm_would_have_sent(gate: Gate) -> None:
    """/v1/completions streams other objects, under the same rules."""
    user = register(gate)
    body = {"model": "ok", "prompt": PROMPT, "stream": True, "max_tokens": 5}
    with relay(gate, user.key, "completions", body) as response:
        events = list(stream_events(response))
    assert b"".join(events) == said_by_vllm(gate.upstream.asked()[0])
    assert len(events) == 6
    gate.settle()
    assert [row.total for row in gate.usage(user)] == [15]


@pytest.mark.parametrize(
    "words",
    [
        ',"usage":{"prompt_tokens":1,"completion_tokens":1},"choices":[],',
        'data: [DONE]\n\ndata: {"error":{"message":"no"}}\n\n',
        '"usage":null}] \\"usage\\": \\\\',
        "\N{SNOWMAN}\N{GRINNING FACE}äöü\u2028\u2029\x85\x00",
    ],
)
def test_text_that_looks_like_the_protocol_passes_unchanged(gate: Gate, words: str) -> None:
    """Usage is taken out of the stream, not out of what the model says."""
    user = register(gate)
    messages = [{"role": "user", "content": words * 3}]
    events = streamed(gate, user.key, "echo", messages=messages)
    assert spoken(events) == words * 3
    assert b"".join(events) == said_by_vllm(gate.upstream.asked()[0])
    plain = chat(gate, user.key, "echo", messages=messages)
    assert plain.json()["choices"][0]["message"]["content"] == words * 3
    assert [row.estimated for row in gate.usage(user)] == [0, 0]


def test_vllms_own_400_passes_unchanged(gate: Gate) -> None:
    """Case 16: its text about the context makes OpenCode compact."""
    user = register(gate)
    for stream in (False, True):
        with chat(gate, user.key, "e400", stream=stream) as answer:
            assert answer.status_code == 400
            assert answer.content == gate.upstream.asked()[-1].answer()
    gate.settle()
    assert gate.tokens_used(user) == 0


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("model", ["e401", "e500", "garbage", "badjson", "nohttp", "nobody"])
def test_faults_of_vllm_are_502_and_free(gate: Gate, model: str, stream: bool) -> None:
    """Case 16: the gate's key is wrong, the engine is dead, or what came is no answer."""
    gate.expected_5xx = {502}
    user = register(gate)
    with chat(gate, user.key, model, stream=stream) as answer:
        assert_error(answer, 502, "upstream_error")
    gate.settle()
    assert [row.status for row in gate.usage(user)] == ["error"]
    if model in ("e401", "e500"):
        assert gate.tokens_used(user) == 0


def test_gate_goes_on_when_vllm_comes(make_gate: Callable[..., ThreadedGate]) -> None:
    """Case 17: 502 while nobody listens, 200 afterwards without a restart."""
    with Upstream() as later:
        port = later.server_address[1]
    gate = make_gate(VLLM_ENDPOINT=f"http://127.0.0.1:{port}")
    gate.expected_5xx = {502}
    user = register(gate)
    began = time.monotonic()
    assert_error(chat(gate, user.key), 502, "upstream_unavailable")
    assert_error(call(gate, "GET", "/v1/models", user.key), 502, "upstream_unavailable")
    assert time.monotonic() - began < 3
    gate.settle()
    with Upstream(port) as later:
        gate.upstream = later
        wait_until(lambda: chat(gate, user.key).status_code == 200)
        assert call(gate, "GET", "/v1/models", user.key).status_code == 200
        gate.settle()


def test_server_that_is_down_is_passed_over(
    make_gate: Callable[..., ThreadedGate], upstream: Upstream
) -> None:
    """Of several endpoints those that answer are used; each model once in the list."""
    with Upstream() as gone:
        dead = gone.url
    gate = make_gate(VLLM_ENDPOINT=f"{dead}, {upstream.url}/v1")
    user = register(gate)
    for _ in range(3):
        assert chat(gate, user.key).status_code == 200
    listed = call(gate, "GET", "/v1/models", user.key).json()["data"]
    assert len(listed) == len(BEHAVIOURS) + 1


def test_server_that_goes_down_is_passed_over(
    make_gate: Callable[..., ThreadedGate], upstream: Upstream
) -> None:
    """Also when it was there a moment ago; nothing is lost with it."""
    with Upstream() as going:
        gate = make_gate(VLLM_ENDPOINT=f"{going.url},{upstream.url}")
        user = register(gate)
        assert chat(gate, user.key).status_code == 200
        gone = going.tokens()
    upstream.exchanges += going.exchanges
    for _ in range(3):
        assert chat(gate, user.key).status_code == 200
    gate.settle()
    assert gate.tokens_used(user) == 120
    assert gone


def test_server_killed_under_load_fails_its_own_requests_only(
    make_gate: Callable[..., ThreadedGate], upstream: Upstream
) -> None:
    """Two servers with different models; the killed one takes its own models away, and returns."""
    with Upstream() as killed, Upstream() as other, ThreadPoolExecutor(8) as pool:
        killed.serves, other.serves = frozenset({"slow"}), frozenset({"paced"})
        gate = make_gate(VLLM_ENDPOINT=f"{killed.url},{other.url}", MAX_REQUESTS_PER_USER="64")
        user = register(gate)
        broken = [pool.submit(streamed, gate, user.key, "slow", max_tokens=200) for _ in range(4)]
        whole = [pool.submit(streamed, gate, user.key, "paced", max_tokens=50) for _ in range(4)]
        wait_until(lambda: killed.running() >= 4 and other.running() >= 4)
        killed.__exit__()
        for future in broken:
            assert data(future.result()[-1])["error"]["code"] == "upstream_error"
        for future in whole:
            assert future.result()[-1] == b"data: [DONE]\n\n"
        gate.expected_5xx = {502}
        assert_error(chat(gate, user.key, "slow"), 502, "upstream_unavailable")
        assert {m["id"] for m in call(gate, "GET", "/v1/models", user.key).json()["data"]} == {
            "paced",
            "llm-user-managed",
        }
        with Upstream(killed.server_address[1]) as again:
            again.serves = frozenset({"slow"})
            wait_until(lambda: chat(gate, user.key, "slow", max_tokens=2).status_code == 200)
            upstream.exchanges += [*killed.exchanges, *other.exchanges, *again.exchanges]
            gate.settle()
    statuses = Counter((row.model, row.status) for row in gate.usage(user))
    assert statuses[("slow", "error")] >= 4 and statuses[("slow", "ok")] == 1
    assert statuses[("paced", "ok")] == 4


def test_kept_connection_that_vllm_closed_costs_nothing(
    make_gate: Callable[..., ThreadedGate],
) -> None:
    """vLLM closes idle connections; that is no 502, and no request runs twice."""
    with Upstream(idle_s=0.2) as hasty:
        gate = make_gate(VLLM_ENDPOINT=hasty.url + "/v1/")
        gate.upstream = hasty
        user = register(gate)
        for _ in range(3):
            assert chat(gate, user.key).status_code == 200
            wait_until(lambda: not hasty.connections)
        assert len(hasty.asked()) == 3
        gate.settle()


def test_only_what_vllm_needs_reaches_it(gate: Gate) -> None:
    """Case 18: the caller's credentials and traces stay at the gate, which adds its own key."""
    user = register(gate)
    headers = {
        "Cookie": "session=cookie-marker",
        "X-Request-Id": "chosen-by-the-caller",
        "X-Forwarded-For": "203.0.113.9",
        "Forwarded": "for=203.0.113.9",
        "Accept-Encoding": "gzip, br",
        "X-Api-Key": "other-key",
        "TE": "trailers",
        "Priority": "u=0",
    }
    answer = call(gate, "POST", "/v1/chat/completions", user.key, json=chat_body(), headers=headers)
    got = gate.upstream.asked()[0].headers
    assert answer.headers["X-Request-Id"] != "chosen-by-the-caller"
    assert got["Authorization"] == f"Bearer {UPSTREAM_KEY}"
    assert got["Accept-Encoding"] == "identity"
    assert got["Content-Type"] == "application/json"
    everything = str(got)
    for trace in (user.key, "cookie-marker", "chosen-by", "203.0.113.9", "other-key", "trailers"):
        assert trace not in everything
    assert got["Priority"] is None


def test_every_other_field_reaches_vllm_unchanged(gate: Gate) -> None:
    """Case 18: also the fields that nobody knows yet, and whole numbers of any length."""
    user = register(gate)
    extra = (
        '"chat_template_kwargs": {"enable_thinking": false}, "top_k": 40, "temperature": 0.10, '
        '"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": 1e3}}}], '
        '"response_format": {"type": "json_object"}, "seed": 12345678901234567890123, '
        '"unknown": {"deep": [null, true, "\\u00e4\\ud83d\\ude00", -0.0, 1.0]}, "max_tokens": 5'
    )
    body = json.dumps(chat_body())[:-1] + ", " + extra + "}"
    headers = {"Content-Type": "application/json"}
    answer = call(gate, "POST", "/v1/chat/completions", user.key, data=body, headers=headers)
    assert answer.status_code == 200, answer.text
    sent = gate.upstream.asked()[0].json()
    assert sent == json.loads(body)
    assert list(sent) == list(json.loads(body))


REFUSED_FIELDS: JSONObject = {
    "priority": 1,
    "request_id": "mine",
    "kv_transfer_params": {"do_remote_prefill": True},
    "vllm_xargs": {"a": 1},
    "stream_interval": 100,
    "use_beam_search": True,
    "best_of": 2,
    "n": 17,
}


@pytest.mark.parametrize(("name", "value"), REFUSED_FIELDS.items(), ids=REFUSED_FIELDS)
def test_field_that_harms_others_is_refused(gate: Gate, name: str, value: Any) -> None:
    """Case 18: by its name, before vLLM."""
    user = register(gate)
    assert_error(chat(gate, user.key, **{name: value}), 400, param=name)
    assert gate.upstream.asked() == []
    assert gate.usage() == []


BAD_FIELDS: list[JSONObject] = [
    {"model": None},
    {"model": 5},
    {"model": ""},
    {"stream": "true"},
    {"stream": 1},
    {"stream_options": "all"},
    {"stream_options": []},
    {"max_tokens": "5"},
    {"max_tokens": 5.5},
    {"max_tokens": True},
    {"max_completion_tokens": "5"},
    {"n": "1"},
]


@pytest.mark.parametrize("bad", BAD_FIELDS, ids=str)
def test_field_of_the_wrong_type_is_refused(gate: Gate, bad: JSONObject) -> None:
    """The fields that the gate reads are strict; the answer names the field."""
    user = register(gate)
    body = chat_body("ok", **({"stream": True} if "stream_options" in bad else {})) | bad
    answer = call(gate, "POST", "/v1/chat/completions", user.key, json=body)
    if bad != {"model": ""}:
        assert_error(answer, 400, param=next(iter(bad)))
    assert 400 <= answer.status_code < 500
    assert gate.upstream.asked() == []


def test_unknown_model_is_404(gate: Gate) -> None:
    """vLLM is not asked, for it would say which models it has."""
    user = register(gate)
    assert_error(chat(gate, user.key, "gpt-4"), 404, "model_not_found")
    assert_error(call(gate, "GET", "/v1/models/gpt-4", user.key), 404, "model_not_found")
    assert gate.upstream.asked() == []


def test_alias_becomes_the_models_name(make_gate: Callable[..., ThreadedGate]) -> None:
    """The row has the real name; an alias without a model means the first one vLLM serves."""
    gate = make_gate(MODEL_ALIASES="llm-user-managed=,tiny=org/tiny")
    user = register(gate)
    for alias, model in (("llm-user-managed", "ok"), ("tiny", "org/tiny")):
        answer = chat(gate, user.key, alias)
        assert answer.status_code == 200, answer.text
        assert gate.upstream.asked()[-1].json()["model"] == model
        assert gate.row(answer).model == model


def test_models_are_listed_with_aliases_and_without_paths(gate: Gate) -> None:
    """vLLM's list, less `root`, which is a path on its disk."""
    user = register(gate)
    listed = call(gate, "GET", "/v1/models", user.key)
    assert listed.status_code == 200
    assert "/models/" not in listed.text
    models = {model["id"]: model for model in listed.json()["data"]}
    assert set(models) == {*BEHAVIOURS, "llm-user-managed"}
    assert listed.json()["object"] == "list"
    for model in models.values():
        assert set(model) >= {"id", "object", "created", "owned_by", "max_model_len"}
    assert models["llm-user-managed"]["max_model_len"] == MAX_MODEL_LEN
    assert models["long"]["max_model_len"] == 131072
    for name in ("ok", "org/tiny", "llm-user-managed"):
        one = call(gate, "GET", f"/v1/models/{name}", user.key)
        assert one.json() == models[name]
    assert_error(call(gate, "GET", "/v1/models"), 401, "missing_api_key")


def test_redirect_of_vllm_is_not_followed(gate: Gate) -> None:
    """Case 19: the second server gets neither the prompt nor the gate's key."""
    gate.expected_5xx = {502}
    with Upstream() as second:
        gate.upstream.redirect_to = second.url
        user = register(gate)
        answer = chat(gate, user.key, "redir")
        assert_error(answer, 502, "upstream_error")
        assert "Location" not in answer.headers
        assert second.exchanges == []


UNKNOWN_PATHS = [
    ("POST", "/invocations"),
    ("GET", "/metrics"),
    ("POST", "/tokenize"),
    ("POST", "/pause"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/chat/completions/batch"),
    ("POST", "/v1/../tokenize"),
    ("POST", "/v1/%2e%2e/tokenize"),
    ("POST", "/v1/..%2ftokenize"),
    ("GET", "/v1//models"),
    ("GET", "/v1/models/../../metrics"),
    ("GET", "/V1/models"),
    ("POST", "/v1/chat/completions/"),
    ("GET", "/no-such-page"),
    ("GET", "/"),
]


@pytest.mark.parametrize(("method", "path"), UNKNOWN_PATHS)
def test_nothing_else_of_vllm_is_reachable(gate: Gate, method: str, path: str) -> None:
    """Case 20: 404 and no redirect."""
    user = register(gate)
    headers = {"Authorization": f"Bearer {user.key}", "Content-Type": "application/json"}
    reply = send_raw(gate, raw_request(method, path, headers, b"{}" if method == "POST" else b""))
    assert_error(reply, 404)
    assert "Location" not in reply.headers
    assert gate.upstream.asked() == []
    assert not any(x.path not in ("/v1/models", "/health") for x in gate.upstream.exchanges)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/models", "GET"),
        ("PUT", "/auth/register", "POST"),
        ("POST", "/users/me", "GET"),
        ("TRACE", "/v1/models", "GET"),
    ],
)
def test_wrong_method_is_405(gate: Gate, method: str, path: str, allowed: str) -> None:
    """Case 20: and the answer says which one is right."""
    user = register(gate)
    answer = call(gate, method, path, user.key)
    assert_error(answer, 405)
    assert allowed in answer.headers["Allow"]
    assert gate.upstream.asked() == []


def test_http_1_0_client_gets_a_whole_answer(gate: Gate) -> None:
    """A client without chunked coding reads until the end of the connection."""
    user = register(gate)
    request = raw_chat(user.key, chat_body(stream=True)).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    reply = send_raw(gate, request)
    assert reply.status_code == 200
    assert reply.content == said_by_vllm(gate.upstream.asked()[0])


def test_two_requests_on_one_connection(gate: Gate) -> None:
    """Keep-alive."""
    user = register(gate)
    with connected(gate) as connection:
        for stream in (False, False, True):
            connection.sendall(raw_chat(user.key, chat_body(stream=stream)))
            assert read_reply(connection).status_code == 200
    assert len(gate.upstream.asked()) == 3


def test_upstream_without_usage_options_is_asked_again(gate: Gate) -> None:
    """A server that refuses continuous_usage_stats still streams, and is remembered."""
    user = register(gate)
    for _ in range(2):
        events = streamed(gate, user.key, "nostreamopts")
        assert events[-1] == b"data: [DONE]\n\n"
        assert not any(b'"usage":' in event for event in events)
    assert len(gate.upstream.asked()) == 3
    gate.settle()
    assert [row.total for row in gate.usage(user)] == [30, 30]


# ---------------------------------------------------------------------------------------------
# C. Quota: `tokens_used` never passes `token_limit`, and what is left can be used.


def test_quota_ends_exactly(gate: Gate) -> None:
    """Case 21: the last answer is cut to what is left; after that vLLM sees nothing more."""
    user = register(gate, token_limit=100)
    for _ in range(3):
        answer = chat(gate, user.key, max_tokens=20)
        assert answer.json()["usage"]["total_tokens"] == 30
    cut = chat(gate, user.key, max_tokens=20)
    if cut.status_code == 200:
        assert cut.json()["usage"]["total_tokens"] == 10 + (100 - 90 - 10)
    asked = len(gate.upstream.asked())
    for stream in (False, True):
        with chat(gate, user.key, max_tokens=20, stream=stream) as refused:
            error = assert_error(refused, 429, "insufficient_quota")
    assert error["type"] == "insufficient_quota"
    assert "of 100 tokens" in error["message"]
    assert len(gate.upstream.asked()) == asked
    assert gate.tokens_used(user) <= 100


def test_last_answer_is_cut_to_what_is_left(gate: Gate) -> None:
    """The end of the quota is a `finish_reason` "length", which every client understands."""
    user = register(gate, token_limit=45)
    assert chat(gate, user.key, max_tokens=20).json()["usage"]["total_tokens"] == 30
    answer = chat(gate, user.key, max_tokens=20, min_tokens=10)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 5
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    sent = gate.upstream.asked()[-1].json()
    assert sent["max_tokens"] == 5 and sent["min_tokens"] <= 5
    assert answer.headers["x-ratelimit-remaining-tokens"] == "0"
    assert gate.tokens_used(user) == 45


@dataclass
class QuotaRace:
    """What 64 parallel chats of one user got, and the highest counter seen meanwhile."""

    answers: list[requests.Response]
    highest: int = 0

    @classmethod
    def run(cls, gates: list[Gate], user: User, model: str = "slow") -> QuotaRace:
        """Spread 64 chats of 10 + 40 over the gates, polling `tokens_used` all the time."""
        race = cls([])
        over = threading.Event()

        def poll() -> None:
            while not over.wait(0.02):
                race.highest = max(race.highest, gates[0].tokens_used(user))

        poller = threading.Thread(target=poll)
        poller.start()
        try:
            race.answers = in_parallel(
                64, lambda i: chat(gates[i % len(gates)], user.key, model, max_tokens=40)
            )
        finally:
            over.set()
            poller.join()
        return race

    def check(self, gate: Gate, user: User, limit: int) -> None:
        """Fail unless the limit held, 18 were answered, and the others were told 429."""
        answered = [answer for answer in self.answers if answer.status_code == 200]
        assert len(answered) >= 18
        for answer in self.answers:
            if answer.status_code != 200:
                assert_error(answer, 429)
                assert answer.json()["error"]["code"] in ("quota_reserved", "insufficient_quota")
        gate.settle()
        assert self.highest <= limit
        spent = sum(answer.json()["usage"]["total_tokens"] for answer in answered)
        assert gate.tokens_used(user) == spent <= limit


def test_parallel_requests_never_pass_the_limit(make_gate: Callable[..., ThreadedGate]) -> None:
    """Case 22."""
    gate = make_gate(MAX_REQUESTS_PER_USER="64")
    user = register(gate, token_limit=1000)
    QuotaRace.run([gate], user).check(gate, user, 1000)


def test_parallel_chats_without_max_tokens_all_run(gate: Gate) -> None:
    """Case 23: one request does not claim the whole quota."""
    user = register(gate, token_limit=100_000)
    answers = in_parallel(8, lambda _: chat(gate, user.key, "paced"))
    assert [answer.status_code for answer in answers] == [200] * 8


def test_both_requests_of_opencode_run(gate: Gate) -> None:
    """Case 23: it sends a title request and the main one at once, both asking for 32,000."""
    user = register(gate, token_limit=50_000)
    long = [{"role": "user", "content": PROMPT + " word" * 2000}]
    bodies: list[JSONObject] = [{}, {"messages": long}]
    answers = in_parallel(2, lambda i: chat(gate, user.key, "long", max_tokens=32000, **bodies[i]))
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text


def test_request_waits_for_what_others_hold(gate: Gate) -> None:
    """While a running request holds the rest of the quota, the answer is "try again"."""
    user = register(gate, token_limit=100)
    with chat(gate, user.key, "slow", stream=True, max_tokens=80) as running:
        events = stream_events(running)
        next(events)
        assert_error(chat(gate, user.key, max_tokens=80), 429, "quota_reserved")
    gate.settle()
    assert chat(gate, user.key, max_tokens=20).status_code == 200


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_each_choice_is_charged(gate: Gate, stream: bool) -> None:
    """Case 24: `n: 5` costs the prompt once and five completions."""
    user = register(gate)
    with chat(gate, user.key, n=5, max_tokens=8, stream=stream) as answer:
        assert answer.status_code == 200
        assert answer.content
        row = gate.row(answer)
    assert (row.prompt_tokens, row.completion_tokens, row.estimated) == (10, 40, 0)


@pytest.mark.parametrize("n", [100_000, 17, 0, -1, 1.5, "5", True])
def test_bad_n_is_refused(gate: Gate, n: object) -> None:
    """Case 24."""
    user = register(gate)
    assert_error(chat(gate, user.key, n=n), 400, param="n")
    assert gate.upstream.asked() == []


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", '"abc"', "true", "[]", "NaN", "1e999"])
def test_bad_max_tokens_is_refused(gate: Gate, name: str, value: str) -> None:
    """Case 25: and costs nothing."""
    user = register(gate)
    body = json.dumps(chat_body())[:-1] + f', "{name}": {value}}}'
    headers = {"Content-Type": "application/json"}
    answer = call(gate, "POST", "/v1/chat/completions", user.key, data=body, headers=headers)
    assert_error(answer, 400)
    gate.settle()
    assert gate.tokens_used(user) == 0


def test_huge_max_tokens_is_lowered_or_refused(gate: Gate) -> None:
    """Case 25: 10^18 tokens overflow nothing."""
    user = register(gate, token_limit=50)
    answer = chat(gate, user.key, max_tokens=10**18)
    assert answer.status_code in (200, 400)
    gate.settle()
    assert gate.tokens_used(user) <= 50


@pytest.mark.parametrize(
    "asked",
    [
        {"max_tokens": 5, "max_completion_tokens": 8000},
        {"max_tokens": 8000, "max_completion_tokens": 5},
        {"max_tokens": None, "max_completion_tokens": None},
        {"max_completion_tokens": 8000},
        {"n": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_no_field_yields_more_than_is_left(gate: Gate, asked: JSONObject, stream: bool) -> None:
    """Case 25: whichever of the two fields vLLM obeys."""
    user = register(gate, token_limit=25)
    with chat(gate, user.key, stream=stream, **asked) as answer:
        assert answer.status_code == 200, answer.text
        assert answer.content
    gate.settle()
    assert gate.tokens_used(user) in range(11, 26)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("model", ["nousage", "badusage"])
def test_answer_without_a_count_is_estimated(gate: Gate, model: str, stream: bool) -> None:
    """Case 26: the client gets it, and each is charged within what was reserved."""
    user = register(gate)
    most = len(json.dumps(chat_body(model))) + 400 + 20
    totals = []
    for _ in range(3):
        with chat(gate, user.key, model, stream=stream, max_tokens=20) as answer:
            assert answer.status_code == 200
            assert ANSWER.split()[0] in answer.text
            row = gate.row(answer)
        assert row.estimated == 1 and row.status == "ok"
        assert 0 < row.total <= most
        totals.append(row.total)
    assert gate.tokens_used(user) == sum(totals)


def test_field_that_stands_twice_is_sent_once(gate: Gate) -> None:
    """Case 27: what the gate reserved for is what vLLM obeys."""
    user = register(gate, token_limit=100)
    body = json.dumps(chat_body())[:-1] + ', "max_tokens": 5, "max_tokens": 8000}'
    headers = {"Content-Type": "application/json"}
    answer = call(gate, "POST", "/v1/chat/completions", user.key, data=body, headers=headers)
    if answer.status_code == 200:
        (asked,) = gate.upstream.asked()
        assert asked.body.count(b'"max_tokens"') == 1
        assert asked.json()["max_tokens"] <= 90
    else:
        assert_error(answer, 400)
    gate.settle()
    assert gate.tokens_used(user) <= 100


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_prompt_is_counted_exactly_near_the_limit(gate: Gate, stream: bool) -> None:
    """Case 28: 200 tokens left, a prompt of 150 tokens in more than 600 bytes."""
    user = register(gate, token_limit=200)
    messages = [{"role": "user", "content": PROMPT.ljust(600, ".")}]
    with chat(gate, user.key, messages=messages, max_tokens=20, stream=stream) as answer:
        assert answer.status_code == 200, answer.text
        assert answer.content
        row = gate.row(answer)
    assert (row.prompt_tokens, row.completion_tokens) == (150, 20)
    assert any(x.path == "/tokenize" for x in gate.upstream.exchanges)


def test_prompt_that_does_not_fit_is_refused_before_vllm(gate: Gate) -> None:
    """A prompt of 300 tokens is too much for 200; vLLM counts it but does not run it."""
    user = register(gate, token_limit=200)
    messages = [{"role": "user", "content": "." * 1200}]
    assert_error(chat(gate, user.key, messages=messages), 429, "insufficient_quota")
    assert gate.upstream.asked() == []


DECOYS = {
    "messages": ("completions", {"prompt": "x" * 40000, "messages": [{"role": "user"}]}),
    "prompt": ("embeddings", {"input": "x" * 40000, "prompt": [1]}),
    "token lists": ("completions", {"prompt": [[1] * 4000]}),
    "a list": ("completions", {"prompt": ["x" * 5000, "y" * 9000]}),
}


@pytest.mark.parametrize(("endpoint", "body"), DECOYS.values(), ids=DECOYS)
def test_no_shape_of_a_prompt_escapes_the_count(
    gate: Gate, endpoint: str, body: JSONObject
) -> None:
    """What vLLM will read is counted, whatever else the body holds."""
    user = register(gate, token_limit=3000)
    answer = relay(gate, user.key, endpoint, {"model": "ok", "max_tokens": 1} | body)
    assert_error(answer, 429, "insufficient_quota")
    assert gate.upstream.asked() == []


def test_completion_without_max_tokens_writes_what_vllm_would(gate: Gate) -> None:
    """vLLM's default there is 16 tokens, not the rest of the context."""
    user = register(gate)
    relay(gate, user.key, "completions", {"model": "ok", "prompt": "Hello"})
    (asked,) = gate.upstream.asked()
    assert json.loads(asked.body)["max_tokens"] == 16


def test_request_that_was_never_sent_is_free(gate: Gate) -> None:
    """A number that JSON cannot hold is found before vLLM is asked."""
    user = register(gate)
    body = json.dumps(chat_body(temperature=7)).replace("7", "1e999")
    headers = {"Content-Type": "application/json"}
    path = "/v1/chat/completions"
    answer = call(gate, "POST", path, user.key, data=body, headers=headers)
    assert_error(answer, 400, "invalid_json")
    assert gate.upstream.asked() == [] and gate.tokens_used(user) == 0


def test_true_count_above_the_claim_is_charged(gate: Gate) -> None:
    """A chat template may add more than the bytes of the JSON; an absurd count is cut."""
    meter = llmgate.Meter(llmgate.Claim(300, 20, 1, 1), 1, {}, 8192)
    meter.asked = True
    for prompt, charged in ((900, 901), (10**30, 8192)):
        usage = b'{"prompt_tokens":%d,"completion_tokens":1}' % prompt
        meter.feed(b'data: {"choices":[],"usage":%s}\n\n' % usage)
        assert meter.counts().total == charged


class Wire:
    """A connection from which so many bytes at a time arrive."""

    def __init__(self, sent: bytes, at_a_time: int) -> None:
        """Keep what the other side has sent before it closed."""
        self.sent, self.at_a_time = sent, at_a_time

    def recv(self, most: int) -> bytes:
        """Return what is next; nothing at the end."""
        now = self.sent[: min(most, self.at_a_time)]
        self.sent = self.sent[len(now) :]
        return now


OK_200 = b"HTTP/1.1 200 OK\r\n"
WIRES: dict[bytes, tuple[bytes, bool]] = {  # what the body is, and whether another may follow
    OK_200 + b"Content-Length: 5\r\n\r\nhello": (b"hello", True),
    OK_200 + b"content-length:0\r\n\r\n": (b"", True),
    b"HTTP/1.1 100 Continue\r\n\r\n" + OK_200 + b"Content-Length: 2\r\n\r\nhi": (b"hi", True),
    OK_200 + b"Connection: Close\r\nContent-Length: 2\r\n\r\nhi": (b"hi", False),
    b"HTTP/1.0 200 OK\r\n\r\nto the end": (b"to the end", False),
    OK_200 + b"Transfer-Encoding: Chunked\r\n\r\n2\r\nhe\r\n03;x=1\r\nllo\r\n0\r\n\r\n": (
        b"hello",
        False,
    ),
}
BROKEN_WIRES = [
    b"",
    b"no HTTP\r\n\r\n",
    OK_200 + b"no end: of headers",
    OK_200 + b"x: y" * 20_000,
    OK_200 + b"Content-Length: five\r\n\r\nhello",
    OK_200 + b"Content-Length: 9\r\n\r\nhello",
    OK_200 + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel",
    OK_200 + b"Transfer-Encoding: chunked\r\n\r\nfive\r\nhello",
    OK_200 + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n" + b"1" * 200,
]


@pytest.mark.parametrize("at_a_time", [1, 7, 10**6])
def test_answer_is_read_however_it_arrives(at_a_time: int) -> None:
    """By its length, in chunks, to the end; what breaks off is never taken for whole."""
    for sent, (body, another) in WIRES.items():
        answer = llmgate.Answer(cast(socket.socket, Wire(sent, at_a_time)))
        assert (answer.status, llmgate.whole(answer.pieces())) == (200, body), sent
        assert (answer.left == 0 and answer.keeps_open) == another, sent
    too_much = Wire(OK_200 + b"Content-Length: 2\r\n\r\nhi, and more", 10**6)
    answer = llmgate.Answer(cast(socket.socket, too_much))
    assert llmgate.whole(answer.pieces()) == b"hi" and answer.left < 0
    for sent in BROKEN_WIRES:
        with pytest.raises((OSError, ValueError)):
            llmgate.whole(llmgate.Answer(cast(socket.socket, Wire(sent, at_a_time))).pieces())


def begin_request(gate: ThreadedGate, request_id: str, claim: llmgate.Claim) -> llmgate.Caller:
    """Reserve as a relay of the only user does, for tests of the booking alone."""
    ledger = gate.server.app.ledger
    (row,) = ledger.query(llmgate.CALLER_BY_ID, value=1)
    usage_row = {"request_id": request_id, "model": "ok", "endpoint": "completions", "stream": 1}
    ledger.transaction(llmgate.reserve, llmgate.Caller(*row), claim, usage_row, 16)
    return llmgate.Caller(*row)


def test_frozen_gate_that_comes_back_books_the_difference_once(gate: ThreadedGate) -> None:
    """Its row was closed as lost, and its room may be others' now: the limit holds."""
    user, ledger = register(gate, token_limit=1000), gate.server.app.ledger
    begin_request(gate, "frozen", llmgate.Claim(100, 40, 300, 1))
    ledger.transaction(llmgate.book, "frozen", "pending", llmgate.Counts(90, 10))
    ledger.write("UPDATE usage SET lease_until = 0 RETURNING 1")
    wait_until(lambda: gate.usage(user)[0].status == "lost", 5)
    assert gate.tokens_used(user) == 100
    begin_request(gate, "other", llmgate.Claim(700, 700, 1, 1))
    for _ in range(2):
        ledger.transaction(llmgate.book, "frozen", "ok", llmgate.Counts(90, 300))
        assert gate.tokens_used(user) == 100 + 199  # all that the other request does not hold
    ledger.transaction(llmgate.book, "other", "ok", llmgate.Counts(700, 1, estimated=1))
    assert gate.tokens_used(user) == 1000


def test_reset_between_an_estimate_and_the_count_is_no_deadlock(gate: ThreadedGate) -> None:
    """The later count is lower than what the reset has balanced: the books stay right."""
    user, ledger = register(gate), gate.server.app.ledger
    caller = begin_request(gate, "r1", llmgate.Claim(500, 100, 10, 1))
    ledger.transaction(llmgate.book, "r1", "pending", llmgate.Counts(100, 50, estimated=1))
    ledger.transaction(llmgate.reset_usage, caller.id)
    assert ledger.transaction(llmgate.book, "r1", "ok", llmgate.Counts(20, 5)) == 0
    assert gate.tokens_used(user) == 0


def test_raised_limit_counts_at_once(gate: Gate) -> None:
    """The operator's set-limit and reset-usage work while the gate runs."""
    user = register(gate, token_limit=30)
    assert chat(gate, user.key, max_tokens=20).status_code == 200
    assert_error(chat(gate, user.key), 429, "insufficient_quota")
    run_command(gate, "set-limit", user.name, "60")
    assert chat(gate, user.key, max_tokens=20).status_code == 200
    assert_error(chat(gate, user.key), 429, "insufficient_quota")
    run_command(gate, "reset-usage", user.name)
    assert gate.tokens_used(user) == 0
    assert chat(gate, user.key, max_tokens=20).status_code == 200


# ---------------------------------------------------------------------------------------------
# D. Faults: vLLM, the client, the database or the gate itself fails, and the books stay right.


@pytest.mark.parametrize("model", ["die", "dieclean"])
def test_broken_stream_ends_with_an_error_event(gate: Gate, model: str) -> None:
    """Case 29: never a clean end, for which OpenCode would ask again without end."""
    user = register(gate)
    with chat(gate, user.key, model, stream=True) as response:
        events = list(stream_events(response))
        row = gate.row(response)
    assert spoken(events) == " ".join(WORDS[:3]) + " "
    assert len(events) == 5
    error = data(events[-1])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "upstream_error" and not LEAKS.search(error["message"])
    assert (row.status, row.estimated) == ("error", 0)
    assert (row.prompt_tokens, row.completion_tokens) == (10, 3)


def test_vllms_own_error_event_passes(gate: Gate) -> None:
    """When the engine dies, vLLM says so in the stream; the row has what came before."""
    user = register(gate)
    with chat(gate, user.key, "midstream", stream=True) as response:
        events = list(stream_events(response))
        row = gate.row(response)
    assert b"".join(events) == said_by_vllm(gate.upstream.asked()[0])
    assert (row.status, row.total) == ("error", 13)


@pytest.mark.parametrize("model", ["die", "dieclean", "gzip"])
def test_broken_plain_answer_is_502(gate: Gate, model: str) -> None:
    """Case 29: half a body, or one that the gate cannot read, is not passed on."""
    gate.expected_5xx = {502}
    user = register(gate)
    answer = chat(gate, user.key, model)
    assert_error(answer, 502, "upstream_error")
    assert gate.row(answer).status == "error"


def test_endless_line_is_cut(gate: Gate) -> None:
    """An event without an end does not fill the gate's memory; vLLM is let go."""
    user = register(gate)
    with chat(gate, user.key, "endless", stream=True) as response:
        events = list(stream_events(response))
    assert [data(event)["error"]["code"] for event in events] == ["upstream_error"]
    assert len(gate.upstream.asked()[0].answer()) < 40_000_000


def test_silent_vllm_is_cut_in_time(make_gate: Callable[..., ThreadedGate]) -> None:
    """Case 30, with a shorter timeout: an error event, or 504; vLLM's connection is freed."""
    gate = make_gate(UPSTREAM_TIMEOUT="2")
    gate.expected_5xx = {504}
    user = register(gate)

    def ask(number: int) -> tuple[requests.Response, bytes, float]:
        began = time.monotonic()
        with chat(gate, user.key, "silent", stream=number == 1) as answer:
            return answer, answer.content, time.monotonic() - began

    (plain, _, plain_s), (stream, events, stream_s) = in_parallel(2, ask)
    assert_error(plain, 504, "upstream_timeout")
    assert events.count(b"data: ") == 5 and b"[DONE]" not in events
    assert json.loads(events.split(b"data: ")[-1])["error"]["code"] == "upstream_timeout"
    assert 2 <= plain_s < 5 and 2 <= stream_s < 5
    gate.settle()
    assert gate.row(stream).total == 13
    assert all(x.left for x in gate.upstream.asked())


@pytest.mark.parametrize("leave", [socket.socket.close, leave_with_reset], ids=["FIN", "RST"])
@pytest.mark.parametrize(("model", "n"), [("silent", 1), ("slow", 1), ("slow", 3)])
def test_client_that_leaves_is_charged_what_vllm_counted(
    gate: Gate, model: str, n: int, leave: Callable[[socket.socket], None]
) -> None:
    """Case 31: vLLM stops within a second; the row is there within two."""
    user = register(gate)
    connection = socket.create_connection(gate.address, timeout=10)
    connection.sendall(raw_chat(user.key, chat_body(model, stream=True, n=n)))
    read_events(connection, 4 * n)
    left_at = time.monotonic()
    leave(connection)
    (exchange,) = gate.upstream.asked()
    wait_until(lambda: exchange.closed_at is not None, 2)
    assert exchange.left and cast(float, exchange.closed_at) - left_at < 1
    wait_until(lambda: gate.usage(user)[0].status != "pending", 2)
    (row,) = gate.usage(user)
    assert (row.status, row.estimated) == ("aborted", 0)
    assert row.total == exchange.tokens
    if model == "silent":
        assert (row.prompt_tokens, row.completion_tokens) == (10, 3)


def test_client_that_leaves_is_estimated_where_nothing_is_counted(gate: Gate) -> None:
    """A server that gives its usage only at the end: the row is marked, within what was held."""
    user = register(gate)
    with connected(gate) as connection:
        connection.sendall(raw_chat(user.key, chat_body("nostreamopts", stream=True)))
        read_events(connection, 4)
    wait_until(lambda: gate.usage(user)[0].status != "pending")
    (row,) = gate.usage(user)
    assert (row.status, row.estimated) == ("aborted", 1)
    assert 3 <= row.total < 1000


def test_client_that_leaves_a_plain_request_is_charged_whole(gate: Gate) -> None:
    """Contract 5: it runs to its end."""
    user = register(gate)
    with connected(gate) as connection:
        connection.sendall(raw_chat(user.key, chat_body("slow", max_tokens=10)))
        wait_until(lambda: gate.upstream.running() == 1)
    wait_until(lambda: gate.usage(user)[0].status != "pending", 5)
    (row,) = gate.usage(user)
    assert (row.prompt_tokens, row.completion_tokens, row.estimated) == (10, 10, 0)


def test_clients_that_leave_at_once_leave_nothing_reserved(
    make_gate: Callable[..., ThreadedGate],
) -> None:
    """Case 31: 200 of them, 0 to 30 ms after asking; every row is closed."""
    gate = make_gate(MAX_REQUESTS_PER_USER="200")
    user = register(gate)
    request = raw_chat(user.key, chat_body("slow", stream=True))
    chance = random.Random(31)
    delays = [chance.uniform(0, 0.03) for _ in range(200)]

    def ask_and_leave(number: int) -> None:
        for delay in delays[number::20]:
            connection = socket.create_connection(gate.address, timeout=10)
            connection.sendall(request)
            time.sleep(delay)
            if delay < 0.015:
                leave_with_reset(connection)
            else:
                connection.close()

    in_parallel(20, ask_and_leave)
    gate.settle(10)
    assert {row.status for row in gate.usage(user)} <= {"aborted"}
    assert chat(gate, user.key).status_code == 200


def whole_answers(gate: Gate, user: User, count: int, fields: JSONObject) -> list[str]:
    """Ask `count` chats at once; return the X-Request-Id of those that came whole."""

    def ask(number: int) -> str:
        try:
            with chat(gate, user.key, "slow", max_tokens=number + 1, **fields) as answer:
                assert answer.status_code == 200, answer.text
                whole = not fields or b"data: [DONE]" in answer.content
                return answer.headers["X-Request-Id"] if whole else ""
        except requests.RequestException:
            return ""

    return [name for name in in_parallel(count, ask) if name]


def test_killed_gate_loses_no_row(start_process: Callable[..., ProcessGate]) -> None:
    """Case 32: five kills under load; one wait for the leases to run out."""
    settings = {"MAX_REQUESTS_PER_USER": "400"}
    gate = start_process(**settings)
    user = register(gate)
    whole: list[str] = []
    chance = random.Random(32)
    for number in range(5):
        with ThreadPoolExecutor(2) as pool:
            streams = pool.submit(whole_answers, gate, user, 20, {"stream": True})
            plain = pool.submit(whole_answers, gate, user, 20, {})
            wait_for_rows(gate, 40 * (number + 1))
            time.sleep(chance.uniform(0.1, 0.4))
            gate.kill()
            whole += streams.result() + plain.result()
        began = time.monotonic()
        gate = start_process(**settings)
        assert call(gate, "GET", "/health").status_code == 200
        assert time.monotonic() - began < 5
        assert gate.rows("PRAGMA integrity_check") == [("ok",)]
    rows = {row.request_id: row.status for row in gate.usage()}
    assert len(rows) == 200
    assert len(whole) > 20 and set(whole) <= set(rows)
    assert chat(gate, user.key).status_code == 200
    gate.settle(40)
    statuses = Counter(row.status for row in gate.usage())
    assert set(statuses) == {"ok", "lost"} and statuses["lost"] > 20
    assert all(row.total > 0 for row in gate.usage())


def wait_for_rows(gate: Gate, count: int) -> None:
    """Wait until so many requests were booked as begun."""
    wait_until(lambda: gate.rows("SELECT count(*) FROM usage") >= [(count,)], 10)


def workers(gate: ProcessGate) -> set[int]:
    """Return the process ids of a gate with PROCESSES, without the one that looks after them."""
    pid = gate.process.pid
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_processes_keep_one_quota_and_a_dead_one_is_replaced(
    start_process: Callable[..., ProcessGate],
) -> None:
    """Case 22 over two processes on one port; SIGTERM ends both, and the second kill is for all."""
    gate = start_process(PROCESSES="2", MAX_REQUESTS_PER_USER="64")
    user, first = register(gate, token_limit=1000), workers(gate)
    assert len(first) == 2
    QuotaRace.run([gate], user).check(gate, user, 1000)
    logs = [gate.directory / name for name in ("server.log", "server-2.log")]
    wait_until(lambda: all("chat/completions" in path.read_text() for path in logs))
    os.kill(min(first), signal.SIGKILL)
    wait_until(lambda: len(workers(gate) - first) == 1, 5)
    other = register(gate)
    wait_until(lambda: workers(gate) and chat(gate, other.key).status_code == 200, 5)
    second = workers(gate)
    gate.stop()
    assert not any(Path(f"/proc/{pid}").exists() for pid in second)
    gate = start_process(PROCESSES="2")
    orphans = workers(gate)
    gate.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans), 10)


def test_sigterm_lets_answers_end(start_process: Callable[..., ProcessGate]) -> None:
    """Case 33: a running stream ends properly, new relays are refused, exit status 0."""
    gate = start_process()
    gate.expected_5xx = {503}
    user = register(gate)
    with chat(gate, user.key, "slow", stream=True, max_tokens=50) as running:
        events = stream_events(running)
        next(events)
        gate.process.terminate()
        wait_until(lambda: is_refused(gate, user))
        assert list(events)[-1] == b"data: [DONE]\n\n"
    assert gate.process.wait(10) == 0
    assert [(row.status, row.total) for row in gate.usage() if row.status == "ok"][-1] == ("ok", 60)
    assert gate.complaints() == []
    gate.check_output(gate.output, gate.errors)


def is_refused(gate: Gate, user: User) -> bool:
    """Return whether a new relay is refused because the gate is ending."""
    try:
        answer = chat(gate, user.key)
    except requests.ConnectionError:
        return True
    if answer.status_code == 200:
        return False
    assert_error(answer, 503, "draining")
    return True


def test_drain_ends_what_takes_too_long(gate: ThreadedGate) -> None:
    """A stream that does not end in time gets an error event, and its row is booked."""
    user = register(gate)
    with chat(gate, user.key, "silent", stream=True) as running:
        events = stream_events(running)
        seen = [next(events) for _ in range(4)]
        gate.server.drain(0.2)
        gate.stopped = True
        seen += list(events)
    assert data(seen[-1])["error"]["code"] == "draining"
    gate.thread.join(5)
    assert not gate.thread.is_alive()
    assert gate.complaints() == []
    assert [row.total for row in gate.usage()] == [13]


HOLD_LOCK = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def database_locked(gate: Gate) -> Iterator[subprocess.Popen[bytes]]:
    """Another process holds the database's write lock until its stdin ends."""
    path = gate.database_url.removeprefix("sqlite:///")
    arguments = [sys.executable, "-c", HOLD_LOCK, path]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"locked\n"
        yield process
        if process.stdin and not process.stdin.closed:
            process.stdin.close()


def test_drain_answers_a_plain_request_that_takes_too_long(gate: ThreadedGate) -> None:
    """Its caller gets 503, and its row is booked."""
    user = register(gate)
    gate.expected_5xx = {503}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(chat, gate, user.key, "slow", max_tokens=200)
        wait_until(lambda: gate.upstream.running() > 0 and len(gate.usage()) == 1)
        gate.server.drain(0.2)
        gate.stopped = True
        assert_error(waiting.result(), 503, "draining")
    gate.thread.join(5)
    assert [row.status for row in gate.usage()] == ["error"]


def test_vllm_that_is_down_is_502_also_near_the_limit(
    make_gate: Callable[..., ThreadedGate],
) -> None:
    """Where its tokenizer would have been asked first."""
    with Upstream() as going:
        gate = make_gate(VLLM_ENDPOINT=going.url)
        gate.expected_5xx = {502}
        user = register(gate, token_limit=200)
        assert call(gate, "GET", "/v1/models", user.key).status_code == 200
    assert_error(chat(gate, user.key), 502, "upstream_unavailable")


def test_chat_waits_for_a_locked_database(gate: Gate) -> None:
    """Case 34: three seconds are bridged."""
    user = register(gate)
    with database_locked(gate) as locker, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(chat, gate, user.key)
        with contextlib.suppress(TimeoutError):
            answer.result(3)
        assert not answer.done()
        assert locker.stdin
        locker.stdin.close()
        assert answer.result(5).status_code == 200


def test_database_locked_for_too_long_is_503(start_process: Callable[..., ProcessGate]) -> None:
    """Case 34: and vLLM sees nothing. What ended meanwhile is booked when the lock is gone."""
    gate = start_process()
    gate.expected_5xx, gate.may_log_traceback = {503}, True
    user = register(gate)
    with chat(gate, user.key, "slow", stream=True, max_tokens=5) as running:
        events = stream_events(running)
        next(events)
        with database_locked(gate):
            assert_error(chat(gate, user.key), 503)
            assert len(gate.upstream.asked()) == 1
            assert spoken(list(events)).startswith(" ".join(WORDS[:4]))
    assert chat(gate, user.key).status_code == 200
    gate.settle(10)
    assert gate.tokens_used(user) == 15 + 30


@pytest.fixture
def postgres_env(postgres_url: str) -> dict[str, str]:
    """Settings of an instance that shares a PostgreSQL."""
    return {
        "DATABASE_URL": postgres_url,
        "JWT_SECRET_KEY": JWT_SECRET,
        "MAX_REQUESTS_PER_USER": "64",
    }


def start_two(
    start_process: Callable[..., ProcessGate], env: dict[str, str], tmp_path: Path
) -> list[Gate]:
    """Start two instances side by side, each in a directory of its own."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return [start_process(tmp_path / name, **env) for name in ("one", "two")]


def test_two_instances_share_one_quota(
    postgres_env: dict[str, str], start_process: Callable[..., ProcessGate], tmp_path: Path
) -> None:
    """Case 35: case 22 over both; a key made at one works at the other at once."""
    gates = start_two(start_process, postgres_env, tmp_path)
    user = register(gates[0], token_limit=1000)
    assert call(gates[1], "GET", "/users/me", login(gates[0], user)).status_code == 200
    race = QuotaRace.run(gates, user)
    race.check(gates[0], user, 1000)


def test_surviving_instance_closes_the_rows_of_the_dead_one(
    postgres_env: dict[str, str], start_process: Callable[..., ProcessGate], tmp_path: Path
) -> None:
    """Case 35: kill -9 of one under load; the other goes on. The leases are ended by hand."""
    one, two = start_two(start_process, postgres_env, tmp_path)
    user = register(one)
    with ThreadPoolExecutor(2) as pool:
        dying = pool.submit(whole_answers, one, user, 10, {"stream": True})
        living = pool.submit(whole_answers, two, user, 10, {"stream": True})
        wait_for_rows(one, 20)
        cast(ProcessGate, one).kill()
        assert len(dying.result()) < 10
        assert len(living.result()) == 10
    assert chat(two, user.key).status_code == 200
    with psycopg.connect(two.database_url.replace("+psycopg", "")) as connection:
        connection.execute("UPDATE usage SET lease_until = lease_until - 60")
    two.settle(15)
    statuses = Counter(row.status for row in two.usage())
    assert set(statuses) == {"ok", "lost"} and statuses["lost"] >= 5
    assert statuses["ok"] >= 11


# ---------------------------------------------------------------------------------------------
# E. Load and hygiene: many at once, hostile clients, and what is left on the disk.


@contextlib.contextmanager
def upstream_process() -> Iterator[str]:
    """The stand-in in a process of its own, so that it does not share this one's lock; its URL."""
    arguments = [sys.executable, __file__, "upstream", "0"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        url = re.search(r"http://[\d.:]+", process.stdout.readline())
        assert url
        try:
            yield url[0]
        finally:
            process.kill()


def open_streams(gate: Gate, users: list[User], count: int) -> dict[socket.socket, bytes]:
    """Ask for `count` streams of `paced` at once, each with a marker of its own."""
    opened = {}
    for number in range(count):
        marker = f"marker-{number:03d}"
        messages = [{"role": "user", "content": f"{PROMPT} {marker}"}]
        connection = socket.create_connection(gate.address, timeout=20)
        key = users[number % len(users)].key
        connection.sendall(raw_chat(key, chat_body("paced", messages=messages, stream=True)))
        opened[connection] = marker.encode()
    return opened


def read_streams(opened: dict[socket.socket, bytes], begun: threading.Event) -> list[float]:
    """Read all streams to their ends, each whole and with its own marker; return the delays.

    Sets `begun` when every stream has brought its first bytes.
    """
    delays, received = [], dict.fromkeys(opened, b"")
    with selectors.DefaultSelector() as selector:
        for connection in opened:
            selector.register(connection, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(20)
            now = time.monotonic()
            assert ready, "streams stand still"
            for entry, _ in ready:
                connection = cast(socket.socket, entry.fileobj)
                piece = connection.recv(65536)
                received[connection] += piece
                if not begun.is_set() and all(received.values()):
                    begun.set()
                delays += [now - float(at) for at in re.findall(rb"marker-\d+ ([\d.]+)", piece)]
                if not piece or received[connection].endswith(b"\r\n0\r\n\r\n"):
                    selector.unregister(connection)
                    connection.close()
    for connection, answer in received.items():
        assert answer.startswith(b"HTTP/1.1 200"), answer[:500]
        assert b"data: [DONE]" in answer
        said = re.findall(rb'"content":"(\S+) ', answer)
        assert said == [opened[connection]] * 50
    return delays


def test_hundred_streams_run_side_by_side(start_process: Callable[..., ProcessGate]) -> None:
    """Case 36: none fails or is mixed up, p99 of the added delay < 100 ms, login and usage < 1 s."""
    rounds: list[tuple[float, float]] = []

    def share_of_bounds() -> float:
        waits, begun = [0.0], threading.Event()
        with ThreadPoolExecutor(1) as pool:
            delays = pool.submit(read_streams, open_streams(gate, users, 100), begun)
            begun.wait(20)
            while not delays.done():
                moments = [time.monotonic()]
                token = login(gate, users[1])
                moments.append(time.monotonic())
                assert call(gate, "GET", "/users/usage", token).status_code == 200
                moments.append(time.monotonic())
                waits += [after - before for before, after in itertools.pairwise(moments)]
                time.sleep(0.3)
        assert len(delays.result()) == 5000
        rounds.append((statistics.quantiles(delays.result(), n=100)[98], max(waits)))
        return max(rounds[-1][0] / 0.1, rounds[-1][1] / 1.0)

    with upstream_process() as url:
        gate = start_process(VLLM_ENDPOINT=url)
        users = [register(gate) for _ in range(7)]
        best = best_of_six(share_of_bounds, 1)
        wait_until(lambda: gate.reserved() == 0)
        rows = gate.usage()
        gate.stop()
    gate.check_output(gate.output, gate.errors)
    assert {(row.status, row.estimated, row.total) for row in rows} == {("ok", 0, 60)}
    assert len(rows) == 100 * len(rounds)
    assert best < 1, rounds


def test_refusal_keeps_the_connection_that_writes(gate: ThreadedGate) -> None:
    """A caller at the end of the quota does not make all others wait for a new one."""
    user = register(gate, token_limit=5)
    ledger = gate.server.app.ledger
    before = list(ledger._writers)
    assert_error(chat(gate, user.key, max_tokens=50), 429, "insufficient_quota")
    assert ledger._writers == before and len(before) == 1


def waiting_together(gate: ThreadedGate, *jobs: Callable[[], object]) -> list[object]:
    """What each job returns, or the type that it raises, when all had to wait for one writer."""
    ledger = gate.server.app.ledger
    wait_until(lambda: not ledger._busy, 5)
    ledger._busy = True
    with ThreadPoolExecutor(len(jobs)) as pool:
        waiting = [pool.submit(job) for job in jobs]
        wait_until(lambda: len(ledger._jobs) == len(jobs), 5)
        with contextlib.suppress(SystemExit):
            ledger._do_all()
        return [type(job.exception()) if job.exception() else job.result() for job in waiting]


def test_writers_who_wait_are_written_together_and_fail_alone(gate: ThreadedGate) -> None:
    """What breaks a rule of the tables, or is a fault of ours, leaves the others' work as it was."""
    ledger, users = gate.server.app.ledger, [register(gate) for _ in range(5)]
    commits: list[str] = []
    writer = ledger._writers[0].driver_connection
    writer.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)

    def set_limit(execute: llmgate.Execute, user: User, limit: int) -> int:
        values = {"limit": limit, "id": user.id}
        execute("UPDATE users SET token_limit = :limit WHERE id = :id", values)
        if limit == 5:
            raise KeyError("a fault of ours")
        if limit == 6:
            execute("SELECT no_such_column FROM users")
        if limit == 7:
            raise SystemExit
        return limit

    def outcomes(*limits: int) -> list[object]:
        pairs = zip(users, limits, strict=True)
        jobs = [functools.partial(ledger.transaction, set_limit, *pair) for pair in pairs]
        return waiting_together(gate, *jobs)

    assert outcomes(1, 2, 3, 4, 1) == [1, 2, 3, 4, 1]
    assert len(commits) == 1
    assert outcomes(2, -1, 4, 5, 3) == [2, sqlite3.IntegrityError, 4, KeyError, 3]
    limits = ledger.query("SELECT token_limit FROM users ORDER BY id")
    assert [limit for (limit,) in limits][-5:] == [2, 2, 4, 4, 3]
    assert outcomes(3, 6, 5, 1, 1) == [3, sqlite3.OperationalError, KeyError, 1, 1]
    assert outcomes(2, 7, 2, 2, 2) == [RuntimeError] * 5  # and nobody takes it for done
    limits = ledger.query("SELECT token_limit FROM users ORDER BY id")
    assert [limit for (limit,) in limits][-5:] == [3, 2, 4, 1, 1]


def test_key_is_found_while_writers_wait(gate: ThreadedGate) -> None:
    """Another program has locked the database: who only reads does not wait with those who write."""
    user, ledger = register(gate), gate.server.app.ledger
    path = gate.database_url.removeprefix("sqlite:///")
    limit = "UPDATE users SET token_limit = 1 WHERE id = :id RETURNING id"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(2) as pool:
            writers = [pool.submit(ledger.write, limit, id=user.id) for _ in range(2)]
            wait_until(lambda: len(ledger._jobs) == 1, 2)
            began = time.monotonic()
            assert call(gate, "GET", "/v1/models", user.key).status_code == 200
            assert time.monotonic() - began < 1
            other.execute("ROLLBACK")
            assert [writer.result() for writer in writers] == [[(user.id,)]] * 2


def test_refused_requests_are_not_kept(gate: ThreadedGate) -> None:
    """Their bodies would fill the memory until the collector of cycles comes, which is rarely."""
    user = register(gate, token_limit=1)
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            assert_error(chat(gate, user.key), 429, "insufficient_quota")
        gone = [item for item in gc.get_objects() if isinstance(item, llmgate.Job)]
    finally:
        gc.enable()
    assert len(gone) <= 1, gone


def test_answer_leaves_in_one_piece(gate: Gate) -> None:
    """Its headers and its body wake the caller up once; without a body they leave alone."""
    user, health = register(gate), raw_request("HEAD", "/health", {})
    with connected(gate) as connection:
        for request in [raw_chat(user.key, chat_body()), health] * 5:
            connection.sendall(request)
            head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
            length = re.search(rb"\nContent-Length: (\d+)", head)
            assert length, head
            assert len(body) == (0 if request == health else int(length[1]))


def test_seventeenth_request_of_a_user_is_refused(gate: Gate) -> None:
    """Case 36: one user does not take all threads; another one is served."""
    user, other = register(gate), register(gate)
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(chat(gate, user.key, "silent", stream=True)) for _ in range(16)
        ]
        assert [answer.status_code for answer in running] == [200] * 16
        assert_error(chat(gate, user.key), 429, "rate_limit_exceeded")
        assert chat(gate, other.key).status_code == 200
    wait_until(lambda: chat(gate, user.key).status_code == 200)


def test_full_gate_is_overloaded_but_answers(make_gate: Callable[..., ThreadedGate]) -> None:
    """When relays hold all threads but the few kept free: 503, while login and usage go on."""
    gate = make_gate(THREADS="8", MAX_REQUESTS_PER_USER="100")
    gate.expected_5xx = {503}
    user = register(gate)
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(chat(gate, user.key, "silent", stream=True)) for _ in range(9)
        ]
        refused = [answer for answer in running if answer.status_code != 200]
        assert refused and len(refused) < 9
        for answer in refused:
            assert_error(answer, 503, "overloaded")
        began = time.monotonic()
        assert me(gate, user)["tokens_used"] >= 0
        assert call(gate, "GET", "/health").status_code == 200
        assert time.monotonic() - began < 1
    wait_until(lambda: chat(gate, user.key).status_code == 200)


def test_threads_are_started_as_they_are_needed(start_process: Callable[..., ProcessGate]) -> None:
    """THREADS is the most; each that was started keeps some memory."""
    gate = start_process(MAX_REQUESTS_PER_USER="40")
    user = register(gate)
    for _ in range(20):
        assert chat(gate, user.key).status_code == 200
    assert thread_count(gate) < 6
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            running = stack.enter_context(chat(gate, user.key, "silent", stream=True))
            assert running.status_code == 200
        assert 40 < thread_count(gate) < 50


def test_idle_and_slow_connections_do_no_harm(start_process: Callable[..., ProcessGate]) -> None:
    """Case 37: 1,200 that say nothing and 200 that say a byte at a time."""
    gate = start_process()
    user = register(gate)
    assert chat(gate, user.key).status_code == 200
    before = gate.descriptors()
    request = raw_chat(user.key, chat_body())
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(gate)) for _ in range(1400)]
        for position in range(5):
            for connection in connections[:200]:
                connection.sendall(request[position : position + 1])
            began = time.monotonic()
            assert chat(gate, user.key).status_code == 200
            assert time.monotonic() - began < 2
    wait_until(lambda: gate.descriptors() <= before + 2, 5)
    assert chat(gate, user.key).status_code == 200


def test_body_that_declares_too_much_is_refused_unread(gate: Gate) -> None:
    """Case 38: 2 GB are refused before the first byte of them."""
    user = register(gate)
    headers = {"Authorization": f"Bearer {user.key}", "Content-Type": "application/json"}
    request = raw_request(
        "POST", "/v1/chat/completions", headers | {"Content-Length": str(2 * 10**9)}
    )
    assert_error(send_raw(gate, request), 413)


def test_chunked_body_that_grows_too_large_is_refused(gate: Gate) -> None:
    """Case 38: 33 MB in chunks."""
    user = register(gate)
    headers = {
        "Authorization": f"Bearer {user.key}",
        "Content-Type": "application/json",
        "Transfer-Encoding": "chunked",
    }
    chunk = b"%x\r\n%s\r\n" % (1 << 20, b" " * (1 << 20))
    with connected(gate) as connection:
        connection.sendall(raw_request("POST", "/v1/chat/completions", headers))
        with contextlib.suppress(ConnectionError):
            for _ in range(33):
                connection.sendall(chunk)
            connection.sendall(b"0\r\n\r\n")
        assert_error(read_reply(connection), 413)
    assert gate.upstream.asked() == []


def test_body_within_the_bound_is_relayed(gate: Gate) -> None:
    """30 MB, for the images that models read; vLLM's own 400 comes back."""
    user = register(gate, token_limit=100_000_000)
    messages = [{"role": "user", "content": "x" * (30 << 20)}]
    answer = chat(gate, user.key, messages=messages)
    assert answer.status_code == 400
    assert "maximum context length" in answer.json()["error"]["message"]


def test_chunked_body_is_relayed(gate: Gate) -> None:
    """A client may send its request in chunks."""
    user = register(gate)
    pieces = [json.dumps(chat_body()).encode()[at : at + 20] for at in range(0, 200, 20)]
    headers = {"Content-Type": "application/json"}
    body = iter([piece for piece in pieces if piece])
    answer = call(gate, "POST", "/v1/chat/completions", user.key, data=body, headers=headers)
    assert answer.status_code == 200, answer.text


def test_oversized_headers_are_refused(gate: Gate) -> None:
    """Case 38: 300 KB of headers."""
    filler = {f"X-Filler-{number}": "x" * 3000 for number in range(100)}
    with connected(gate) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(raw_request("GET", "/v1/models", filler))
        assert read_reply(connection).status_code == 431


def test_no_secret_is_written_anywhere(start_process: Callable[..., ProcessGate]) -> None:
    """Case 39: passwords, keys, JWTs, prompts, answers, in no log, no output, no usage row."""
    gate = start_process()
    user = register(gate)
    token = login(gate, user)
    key = replace_key(gate, token)
    gate.expected_5xx = {502}
    for model in ("ok", "e400", "e401", "e500", "nousage", "badusage", "badjson", "die", "nope"):
        for stream in (False, True):
            with chat(gate, key, model, stream=stream) as answer:
                assert answer.content
    chat(gate, user.key)
    chat(gate, key, priority=1)
    call(gate, "GET", f"/users/me?token={token}")
    call(gate, "GET", f"/v1/models/none?key={key}", key)
    call(gate, "POST", "/auth/token", data={"username": PASSWORD, "password": PASSWORD})
    call(gate, "POST", "/auth/register", json={"username": user.name, "password": PASSWORD})
    gate.settle()
    secrets = gate.secrets | {JWT_SECRET, (gate.log.parent / "llmgate.secret").read_text().strip()}
    rows = str(gate.rows("SELECT * FROM usage"))
    stored = str(gate.rows("SELECT * FROM users")) + str(gate.rows("SELECT * FROM api_keys"))
    for secret in secrets:
        assert secret not in rows and secret not in stored
    gate.secrets = secrets
    gate.stop()
    gate.check_output(gate.output, gate.errors)


def test_line_breaks_from_a_caller_make_no_log_line(gate: Gate) -> None:
    """Case 39: in a path, a name or a model's name."""
    user = register(gate)
    forged = "\r\n2026-01-01 FORGED line"
    quoted = urllib.parse.quote(forged)
    call(gate, "GET", f"/v1/models/x{quoted}", user.key)
    call(gate, "GET", f"/x{quoted}")
    try_login(gate, "x" + forged, "wrong-password")
    call(gate, "POST", "/auth/register", json={"username": "x" + forged, "password": PASSWORD})
    chat(gate, user.key, "ok" + forged)
    lines = gate.log.read_text().splitlines() if gate.log.exists() else []
    assert not [line for line in lines if line.startswith("2026-01-01 FORGED")]


def test_first_start_makes_private_files_and_the_second_keeps_them(
    start_process: Callable[..., ProcessGate], tmp_path: Path
) -> None:
    """Case 40: 0600 under any umask; the old JWT and key still work."""
    old_umask = os.umask(0o022)
    try:
        gate = start_process()
    finally:
        os.umask(old_umask)
    user = register(gate)
    token = login(gate, user)
    assert chat(gate, user.key).status_code == 200
    made = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in tmp_path.iterdir()
        if path.name not in ("stdout", "stderr")
    }
    assert {"llmgate.db", "llmgate.db-wal", "llmgate.db-shm"} < set(made)
    assert {"llmgate.secret", "server.log"} < set(made)
    assert set(made.values()) == {0o600}, made
    gate.settle()
    gate.stop()
    again = start_process()
    again.secrets |= gate.secrets
    assert call(again, "GET", "/users/me", token).json()["api_key"] == user.key
    assert chat(again, user.key).status_code == 200


def refusal(directory: Path, status: int = 2, **settings: str) -> str:
    """Start a gate that must refuse to; return the one line it says."""
    ended = subprocess.run(
        [sys.executable, str(HERE / "llmgate.py")],
        cwd=directory,
        env=clean_env() | {"PORT": "0"} | settings,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert ended.returncode == status, ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    return ended.stderr


BAD_SETTINGS = {
    "VLLM_ENDPOINT": "not a url",
    "PORT": "http",
    "DATABASE_URL": "mysql://root@db/x",
    "JWT_SECRET_KEY": "secret-marker-short",
    "JWT_EXPIRATION_HOURS": "0",
    "DEFAULT_TOKEN_LIMIT": "-5",
    "MAX_TOKEN_LIMIT": "many",
    "REGISTRATION": "maybe",
    "MODEL_ALIASES": "no-equals-sign",
    "THREADS": "0",
    "MAX_REQUESTS_PER_USER": "0",
    "UPSTREAM_TIMEOUT": "soon",
    "MAX_BODY_MB": "-1",
    "OPENCODE_DISCOVERY": "perhaps",
}


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS.items(), ids=BAD_SETTINGS)
def test_bad_setting_is_named_and_not_echoed(name: str, value: str) -> None:
    """Case 40: it may be a secret in the wrong place."""
    with pytest.raises(llmgate.SettingsError, match=name) as raised:
        llmgate.Settings.from_env({name: value})
    assert "\n" not in str(raised.value)
    assert "secret-marker" not in str(raised.value)


def test_start_that_cannot_be_is_one_line(
    start_process: Callable[..., ProcessGate], tmp_path: Path
) -> None:
    """Case 40: a bad value, a port in use, users but no secret."""
    (tmp_path / "other").mkdir()
    assert "JWT_SECRET_KEY" in refusal(tmp_path / "other", JWT_SECRET_KEY="short")
    assert "LOG_FILE" in refusal(tmp_path / "other", LOG_FILE="/no-such-directory/server.log")
    gate = start_process()
    register(gate)
    port = gate.address[1]
    assert "PORT" in refusal(tmp_path / "other", PORT=str(port))
    gate.stop()
    (tmp_path / "llmgate.secret").unlink()
    assert "llmgate.secret" in refusal(tmp_path)
    assert not (tmp_path / "llmgate.secret").exists()


def test_start_without_its_database_may_be_tried_again(tmp_path: Path) -> None:
    """Exit status 1, not 2, for a service manager; without psycopg, 2 and what to install."""
    away = {"DATABASE_URL": "postgresql+psycopg://nobody@/x?host=/no-such-directory"}
    away["JWT_SECRET_KEY"] = "x" * 32
    if importlib.util.find_spec("psycopg"):
        assert "PostgreSQL does not answer" in refusal(tmp_path, 1, **away)
    else:
        assert "pip install 'psycopg[binary]'" in refusal(tmp_path, 2, **away)


def test_public_address_closes_registration() -> None:
    """Case 40: HOST=0.0.0.0 without REGISTRATION."""
    assert llmgate.Settings.from_env({"HOST": "0.0.0.0"}).registration == "closed"
    assert llmgate.Settings.from_env({}).registration == "open"
    open_to_all = {"HOST": "0.0.0.0", "REGISTRATION": "open"}
    assert llmgate.Settings.from_env(open_to_all).registration == "open"


def test_invitation_opens_registration(make_gate: Callable[..., ThreadedGate]) -> None:
    """REGISTRATION=invite needs its token, and the first lines say so."""
    with pytest.raises(llmgate.SettingsError, match="REGISTRATION_TOKEN"):
        llmgate.Settings.from_env({"REGISTRATION": "invite"})
    gate = make_gate(REGISTRATION="invite", REGISTRATION_TOKEN="invitation-marker-77")
    for token in ({}, {"registration_token": "another"}, {"registration_token": 5}):
        body = {"username": "ida", "password": PASSWORD} | token
        assert_error(call(gate, "POST", "/auth/register", json=body), 403, "registration_closed")
    gate.secrets.add("invitation-marker-77")
    assert register(gate, "ida", registration_token="invitation-marker-77").id == 1
    assert '"registration_token":"…"' in llmgate.banner(gate.server)


# ---------------------------------------------------------------------------------------------
# F. The rest of the contract: the usage report, OpenCode, the operator's commands, the schema.


def run_command(gate: Gate, *arguments: str, stdin: str = "") -> str:
    """Run `python llmgate.py ARGUMENTS` beside a gate; return what it prints."""
    return command(gate.directory, gate.env, *arguments, stdin=stdin).stdout


def command(
    directory: Path, env: Mapping[str, str], *arguments: str, stdin: str = "", status: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run `python llmgate.py ARGUMENTS` in a directory; fail unless it exits with `status`."""
    ended = subprocess.run(
        [sys.executable, str(HERE / "llmgate.py"), *arguments],
        cwd=directory,
        env=clean_env() | dict(env),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert ended.returncode == status, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert PASSWORD not in ended.stdout + ended.stderr
    return ended


def test_usage_report_adds_up(gate: Gate) -> None:
    """Contract 5: by model, key and day, and the last rows."""
    user = register(gate, token_limit=10_000)
    for model in ("ok", "org/tiny", "ok"):
        assert chat(gate, user.key, model, max_tokens=5).status_code == 200
    assert streamed(gate, user.key, "ok", max_tokens=5)
    gate.settle()
    report = call(gate, "GET", "/users/usage?days=7", user.key).json()
    assert (report["tokens_used"], report["token_limit"]) == (60, 10_000)
    assert (report["remaining"], report["reserved"], report["requests"]) == (9_940, 0, 4)
    by_model = {item["model"]: item for item in report["by_model"]}
    assert by_model["ok"]["requests"] == 3 and by_model["org/tiny"]["completion_tokens"] == 5
    (day,) = report["by_day"]
    assert day["date"] == time.strftime("%Y-%m-%d", time.gmtime())
    assert (day["prompt_tokens"], day["completion_tokens"], day["requests"]) == (40, 20, 4)
    assert [item["requests"] for item in report["by_key"]] == [4]
    assert len(report["recent"]) == 4
    assert {row["status"] for row in report["recent"]} == {"ok"}
    assert PROMPT not in json.dumps(report)


def test_usage_report_is_of_the_caller_only(gate: Gate) -> None:
    """Nobody reads another one's numbers."""
    user, other = register(gate), register(gate)
    assert chat(gate, user.key).status_code == 200
    gate.settle()
    report = call(gate, "GET", "/users/usage", other.key).json()
    assert (report["tokens_used"], report["requests"], report["recent"]) == (0, 0, [])


def test_usage_report_shows_what_is_reserved(gate: Gate) -> None:
    """While an answer runs, its worst case is held."""
    user = register(gate)
    with chat(gate, user.key, "silent", stream=True, max_tokens=100) as running:
        events = stream_events(running)  # held: a generator that is dropped closes its connection
        next(events)
        report = call(gate, "GET", "/users/usage", user.key).json()
        assert report["reserved"] >= 100
        assert report["recent"][0]["status"] == "pending"


def test_usage_report_is_drawn_for_curl(gate: Gate) -> None:
    """Accept: text/plain gives a table and a bar, within 80 columns."""
    user = register(gate)
    assert chat(gate, user.key).status_code == 200
    headers = {"Accept": "text/plain"}
    answer = call(gate, "GET", "/users/usage", user.key, headers=headers)
    assert answer.headers["Content-Type"].startswith("text/plain")
    text = answer.content.decode()
    assert user.name in text and time.strftime("%Y-%m-%d", time.gmtime()) in text
    assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize("days", ["0", "-1", "many", "1.5", "", "99999999999"])
def test_bad_days_are_refused(gate: Gate, days: str) -> None:
    """The report's only parameter is strict."""
    user = register(gate)
    assert_error(call(gate, "GET", f"/users/usage?days={days}", user.key), 400, param="days")


def test_opencode_configuration_is_complete(gate: Gate) -> None:
    """Contract 6: every model with its limits; the key comes from the environment."""
    user = register(gate)
    config = call(gate, "GET", "/opencode.json", user.key).json()
    (provider,) = config["provider"].values()
    assert provider["options"]["baseURL"] == f"{gate.url}/v1"
    assert provider["options"]["apiKey"] == "{env:LLMGATE_API_KEY}"
    assert set(provider["models"]) == {*BEHAVIOURS, "llm-user-managed"}
    for model in provider["models"].values():
        assert 0 < model["limit"]["output"] <= model["limit"]["context"]
        assert model["tool_call"] is True
    assert provider["models"]["ok"]["limit"]["context"] == MAX_MODEL_LEN
    assert provider["models"]["long"]["limit"]["context"] == 131072
    assert provider["models"]["llm-user-managed"]["id"] == "ok"
    name, _, model = config["model"].partition("/")
    assert name in config["provider"] and model in provider["models"]
    assert_error(call(gate, "GET", "/opencode.json"), 401)


def test_forwarded_headers_count_only_from_the_proxy(
    make_gate: Callable[..., ThreadedGate],
) -> None:
    """TRUSTED_PROXY: what it says of host and protocol is believed, nobody else's word is."""
    headers = {"X-Forwarded-Host": "gate.example", "X-Forwarded-Proto": "https"}

    def base_url(gate: Gate) -> str:
        answer = call(gate, "GET", "/opencode.json", register(gate).key, headers=headers)
        return str(next(iter(answer.json()["provider"].values()))["options"]["baseURL"])

    gate = make_gate(ALLOWED_HOSTS="gate.example,127.0.0.1")
    assert base_url(gate) == f"{gate.url}/v1"
    gate = make_gate(ALLOWED_HOSTS="gate.example,127.0.0.1", TRUSTED_PROXY="127.0.0.1")
    assert base_url(gate) == "https://gate.example/v1"


def test_opencode_discovery_can_be_turned_off(make_gate: Callable[..., ThreadedGate]) -> None:
    """It shows model names without a key."""
    shown = call(make_gate(), "GET", "/.well-known/opencode").json()
    assert shown["auth"]["env"] == "LLMGATE_API_KEY"
    assert shown["config"]["provider"]
    hidden = call(make_gate(OPENCODE_DISCOVERY="off"), "GET", "/.well-known/opencode")
    assert_error(hidden, 404)


def test_health_needs_no_key(gate: Gate) -> None:
    """Contract 7."""
    assert call(gate, "GET", "/health").status_code == 200


def test_lost_database_is_503(
    postgres_env: dict[str, str], start_process: Callable[..., ProcessGate]
) -> None:
    """Contract 7: /health says so; vLLM sees nothing."""
    gate = start_process(**postgres_env)
    user = register(gate)
    url = sqlalchemy.make_url(gate.database_url)
    server = os.environ["LLMGATE_TEST_POSTGRES_URL"].replace("+psycopg", "")
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {url.database} WITH (FORCE)".encode())
    assert_error(call(gate, "GET", "/health"), 503)
    assert_error(chat(gate, user.key), 503)
    assert gate.upstream.asked() == []
    gate.kill()


def test_changed_secret_hides_keys_but_keeps_them_working(
    make_gate: Callable[..., ThreadedGate],
) -> None:
    """Contract 2: `api_key` is null with a hint; old JWTs are refused."""
    before = make_gate()
    user = register(before)
    token = login(before, user)
    after = make_gate(JWT_SECRET_KEY="another-secret-marker" + "1" * 32)
    assert_error(call(after, "GET", "/users/me", token), 401, "invalid_token")
    seen = me(after, user)
    assert seen["api_key"] is None and "/users/me/api-key" in str(seen)
    assert chat(after, user.key).status_code == 200
    key = replace_key(after, login(after, user))
    assert me(after, user)["api_key"] == key
    assert_error(chat(after, user.key), 401)


COMMANDS = [
    "create-tables",
    "create-user",
    "users",
    "usage",
    "set-limit",
    "reset-usage",
    "disable",
    "enable",
    "set-password",
    "check",
]


def test_help_explains_every_command(tmp_path: Path) -> None:
    """Contract 7; asking for help makes no file."""
    text = command(tmp_path, {}, "--help").stdout
    assert "--token-limit" in command(tmp_path, {}, "create-user", "--help").stdout
    for name in COMMANDS:
        assert re.search(rf"^\s+{name}\b.*\w", text, re.MULTILINE), name
    assert list(tmp_path.iterdir()) == []


def test_unknown_command_is_refused(tmp_path: Path) -> None:
    """Exit status 2, and no server is started."""
    assert command(tmp_path, {}, "no-such-command", status=2).stderr
    assert list(tmp_path.iterdir()) == []


def test_operator_manages_users_while_the_gate_runs(gate: Gate) -> None:
    """Contract 7: create-user, users, usage, set-password, each seen by the running gate."""
    made = run_command(gate, "create-user", "olga", "--token-limit", "777", stdin=PASSWORD + "\n")
    key = re.search(r"sk-llmgate-\w+", made)
    assert key
    gate.secrets.add(key[0])
    user = User(1, "olga", PASSWORD, key[0])
    assert me(gate, user)["token_limit"] == 777
    assert chat(gate, user.key, max_tokens=5).status_code == 200
    gate.settle()
    users = run_command(gate, "users")
    assert re.search(r"olga\b.*\b15\b.*\b777\b|olga\b.*\b777\b.*\b15\b", users), users
    assert "ok" in run_command(gate, "usage", "olga")
    assert "olga" in run_command(gate, "usage")
    token = login(gate, user)
    run_command(gate, "set-password", "olga", stdin=PASSWORD + "-2\n")
    assert_error(call(gate, "GET", "/users/me", token), 401)
    assert try_login(gate, "olga", PASSWORD + "-2").status_code == 200


def test_command_for_nobody_says_so(gate: Gate) -> None:
    """One line and a status that a script can see; also for a name that is taken."""
    register(gate, "paul")
    for arguments in (
        ("set-limit", "nobody", "5"),
        ("reset-usage", "nobody"),
        ("create-user", "PAUL"),
        ("set-limit", "paul", "0"),
    ):
        ended = subprocess.run(
            [sys.executable, str(HERE / "llmgate.py"), *arguments],
            cwd=gate.directory,
            env=clean_env() | dict(gate.env),
            input=PASSWORD + "\n",
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert ended.returncode != 0, arguments
        assert "Traceback" not in ended.stderr and ended.stderr.strip(), arguments


def test_check_finds_what_differs(gate: Gate) -> None:
    """Contract 7: it recounts tokens_used from the rows."""
    user = register(gate)
    assert chat(gate, user.key).status_code == 200
    gate.settle()
    assert user.name not in run_command(gate, "check")
    with contextlib.closing(sqlite3.connect(gate.database_url.removeprefix("sqlite:///"))) as db:
        db.execute("UPDATE users SET tokens_used = tokens_used + 7")
        db.commit()
        ended = command(gate.directory, gate.env, "check", status=1)
        assert user.name in ended.stdout + ended.stderr
        db.execute("UPDATE users SET tokens_used = tokens_used - 7")
        db.commit()


def test_reset_of_all_keeps_the_rows(gate: Gate) -> None:
    """Contract 7: reset-usage --all; the sum of the rows stays the counter."""
    users = [register(gate), register(gate)]
    for user in users:
        assert chat(gate, user.key).status_code == 200
    gate.settle()
    run_command(gate, "reset-usage", "--all")
    assert [gate.tokens_used(user) for user in users] == [0, 0]
    assert len([row for row in gate.usage() if row.endpoint == "chat/completions"]) == 2
    assert call(gate, "GET", "/users/usage", users[0].key).json()["tokens_used"] == 0


def test_create_tables_makes_an_empty_database(tmp_path: Path) -> None:
    """Contract 7: without starting a server."""
    command(tmp_path, {}, "create-tables")
    assert query(f"sqlite:///{tmp_path / 'llmgate.db'}", "SELECT count(*) FROM users") == [(0,)]
    assert stat.S_IMODE((tmp_path / "llmgate.db").stat().st_mode) == 0o600


def test_every_setting_is_documented() -> None:
    """Each field of Settings stands in .env.example and in the README."""
    example, readme = (HERE / name for name in (".env.example", "README.md"))
    for item in fields(llmgate.Settings):
        name = item.name.upper()
        assert re.search(rf"^#? ?{name}=", example.read_text(), re.MULTILINE), name
        assert re.search(rf"\b{name}\b", readme.read_text()), name


def structure(engine: sqlalchemy.Engine) -> dict[str, object]:
    """Return what a database says of its tables, without the names of constraints."""
    inspector = sqlalchemy.inspect(engine)
    found: dict[str, object] = {}
    with warnings.catch_warnings():  # SQLite's reflection leaves out indexes of expressions
        warnings.filterwarnings("ignore", "Skipped unsupported reflection of expression-based")
        for table in sorted(inspector.get_table_names()):
            columns = inspector.get_columns(table)
            keys = inspector.get_foreign_keys(table)
            indexes = [i for i in inspector.get_indexes(table) if "duplicates_constraint" not in i]
            found[table] = {
                "columns": [(c["name"], str(c["type"]), c["nullable"]) for c in columns],
                "defaults": [plain_default(c["default"]) for c in columns if c["name"] != "id"],
                "primary key": inspector.get_pk_constraint(table)["constrained_columns"],
                "foreign keys": {
                    (str(k["constrained_columns"]), k["referred_table"]) for k in keys
                },
                "uniques": {
                    str(u["column_names"]) for u in inspector.get_unique_constraints(table)
                },
                "checks": {c["name"] for c in inspector.get_check_constraints(table)},
                "indexes": {i["name"] for i in indexes} - {"users_username", "usage_by_day"},
            }
    return found


def plain_default(default: str | None) -> str | None:
    """Return a column's default without quotes and PostgreSQL's cast: 0, '0' and '0'::bigint."""
    return default and re.sub(r"::\w+$", "", default).strip("'")


def test_schema_sql_makes_the_same_tables_on_sqlite_and_postgresql(
    postgres_url: str, tmp_path: Path
) -> None:
    """It is the only creator of tables, and it may run at every start."""
    structures = []
    for url in (f"sqlite:///{tmp_path / 'a.db'}", postgres_url):
        engine = sqlalchemy.create_engine(url)
        ledger = llmgate.Ledger(engine)
        for _ in range(2):
            ledger.create_tables()
        structures.append(structure(engine))
        ledger.close()
    assert structures[0] == structures[1]
    assert set(structures[0]) == {"users", "api_keys", "usage"}


def test_usage_report_reads_nothing_but_its_index(tmp_path: Path) -> None:
    """In the index's own order: a user with 100,000 rows waits 40 ms, not a second."""
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path / 'a.db'}")
    ledger = llmgate.Ledger(engine)
    ledger.create_tables()
    plan = str(ledger.query(f"EXPLAIN QUERY PLAN {llmgate.USAGE_BY_DAY}", id=1, since=0))
    recent = str(ledger.query(f"EXPLAIN QUERY PLAN {llmgate.RECENT_ROWS}", id=1))
    ledger.close()
    assert "COVERING INDEX usage_by_day" in plan
    assert "TEMP B-TREE" not in plan
    assert "COVERING INDEX usage_by_day" in recent  # also where all of them are of one day
    assert "INDEX usage_by_day (user_id=? AND <expr>>?)" in recent


def test_whole_gate_runs_on_postgresql(
    postgres_env: dict[str, str], start_process: Callable[..., ProcessGate]
) -> None:
    """Accounts, relay, abort, quota and report, as on SQLite."""
    gate = start_process(**postgres_env)
    users = [register(gate, token_limit=20_000) for _ in range(3)]
    body = {"username": users[0].name.upper(), "password": PASSWORD}
    assert_error(call(gate, "POST", "/auth/register", json=body), 409, "username_taken")
    MixedLoad(gate, users, seed=35).run(workers=6, until=after_requests(120))
    gate.settle(5)
    report = call(gate, "GET", "/users/usage", me(gate, users[0])["api_key"]).json()
    assert report["tokens_used"] == gate.tokens_used(users[0]) > 0
    assert run_command(gate, "users").count("user-") == 3


# ---------------------------------------------------------------------------------------------
# G. Faults from outside: requests that nobody expects, a disk that is full, a gate that freezes.


ROUTES = [
    ("POST", "/auth/register"), ("POST", "/auth/token"), ("POST", "/auth/refresh"),
    ("POST", "/auth/password"), ("GET", "/users/me"), ("GET", "/users/usage"),
    ("POST", "/users/me/api-key"), ("GET", "/users/me/keys"), ("POST", "/users/me/keys"),
    ("DELETE", "/users/me/keys/2"), ("GET", "/v1/models"), ("GET", "/v1/models/org/tiny"),
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/embeddings"),
    ("GET", "/opencode.json"), ("GET", "/.well-known/opencode"), ("GET", "/health"),
    ("GET", "/v1/models/%ff%0d%0aFORGED"), ("DELETE", "/users/me/keys/" + "9" * 5000),
]  # fmt: skip
USUAL_FIELDS = {
    "model": '"ok"',
    "messages": json.dumps([{"role": "user", "content": PROMPT}]),
    "prompt": '"Hello"',
    "input": '"Hello"',
    "username": '"fuzz"',
    "password": f'"{PASSWORD}"',
    "name": '"laptop"',
}
FIELDS = [
    *USUAL_FIELDS, "old_password", "new_password", "token_limit", "registration_token", "stream",
    "stream_options", "max_tokens", "max_completion_tokens", "min_tokens", "n", "best_of", "tools",
    "priority", "response_format", "chat_template_kwargs", "stop", "seed", "suffix", "user", "echo",
]  # fmt: skip
ODD_VALUES = [
    "null", "true", "[]", "{}", '""', "0", "-1", "1.5", "16", "9223372036854775808", "1e999", "NaN",
    "9" * 4000, "9" * 5000, '"x\\ud800"', '"\\u0000"', '"\\r\\nFORGED"', '"\xff"', '"\x00"', "[null]",
    '["a", "b"]', "[" * 900 + "]" * 900, "[" * 99999, '{"a":' * 200 + "1" + "}" * 200, "[[1]]",
    '{"include_usage": true}', '{"continuous_usage_stats": 1}', '[{"role": 1, "content": []}]',
]  # fmt: skip
ODD_METHODS = ["HEAD", "OPTIONS", "PUT", "PATCH", "TRACE", "get", "G%T", "CONNECT"]
ODD_PATHS = [
    "/", "*", "//health", "/%00", "/%0d%0aFORGED", "/%e2%80%a8/%1b[2J", "/health/", "/health;x",
    "http://localhost/health", "http://[/health", "/\xff", "/x" + "y" * 60000, "/v1", "/v1/../health",
]  # fmt: skip
ODD_QUERIES = ["?days=7", "?days=" + "9" * 900, "?days=%00", "?ascii&days=366", "?%", "?%ff=%ff"]
ODD_BODIES = [b"", b"[1]", b"user=%ff&username=\x00", b'3\r\n{"a\r\n0\r\n\r\n', b"\xff\xfe"]
ODD_HOSTS = ["", "evil.example", "localhost:99999", "[::1", "a b", "\xff", "localhost,evil", "@"]
ODD_CREDENTIALS = ["Bearer", "Basic eDp5", "Bearer \xff", "Bearer a.b.c", "Bearer sk-llmgate-x", ""]
ODD_TYPES = ["", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded", "\xff"]
ODD_LENGTHS = ["-1", "+5", "5, 5", "0x9", "9" * 25, "", "1_0", "\xb2", "5\r\nContent-Length: 6"]
ODD_CODINGS = ["chunked", "CHUNKED", "identity", "gzip", "chunked, gzip", "\xff"]
ODD_HEADERS = [
    "X-Forwarded-For: 1.2.3.4, \xff", "X-Forwarded-Host: evil.example", "X-Forwarded-Proto: x",
    "Forwarded: for=x;;", "Expect: 100-continue", "Accept: text/plain", "Accept: ;q=\xff,*",
    "Connection: close", "Upgrade: h2c", "Range: bytes=0-1", "Cookie: \xff=1", "X-Request-Id: a",
    "Host: second", "Authorization: Bearer second", "No-Colon", ": no name", " folded: x",
]  # fmt: skip
ODD_BYTES = [
    (0, b"\x16\x03"),
    (9, b"\x00"),
    (40, b"\r"),
    (50, b"\n"),
    (60, b"\xff"),
]  # put in there


def strange_requests(key: str, token: str) -> Any:
    """A strategy of (method, bytes, whether the framing is right); most are wrong in one place."""
    from hypothesis import strategies as st

    def mostly(usual: T, odd: list[T], weight: int = 9) -> Any:
        return st.sampled_from([usual] * (weight * len(odd)) + odd)

    odd_value = st.sampled_from(ODD_VALUES) | st.text(max_size=9).map(json.dumps)
    pair = st.tuples(st.sampled_from(FIELDS), odd_value)

    @st.composite
    def one(draw: Callable[[Any], Any]) -> tuple[str, bytes, bool]:
        method, path = draw(st.sampled_from(ROUTES))
        right = key if path.startswith(("/v1", "/opencode")) else token
        pairs = [
            *USUAL_FIELDS.items(),
            *draw(st.lists(pair, max_size=3)),
        ]  # a field may stand twice
        body = ("{" + ",".join(f'"{name}":{value}' for name, value in pairs) + "}").encode(
            "latin-1"
        )
        body = draw(mostly(body, ODD_BODIES))
        length, coding = draw(mostly(str(len(body)), ODD_LENGTHS)), draw(mostly("", ODD_CODINGS))
        at, junk = draw(mostly((0, b""), ODD_BYTES))
        method, path = draw(mostly(method, ODD_METHODS)), draw(mostly(path, ODD_PATHS))
        lines = [
            f"{method} {path}{draw(mostly('', ODD_QUERIES))} HTTP/1.1",
            f"Host: {draw(mostly('localhost', ODD_HOSTS))}",
            f"Content-Type: {draw(mostly('application/json', ODD_TYPES))}",
            f"Authorization: {draw(mostly(f'Bearer {right}', ODD_CREDENTIALS))}",
            f"Content-Length: {length}",
            *([f"Transfer-Encoding: {coding}"] if coding else []),
            *draw(st.lists(st.sampled_from(ODD_HEADERS), max_size=1)),
        ]
        sent = "\r\n".join([*lines, "", ""]).encode("latin-1") + body
        framed = bool(body) and length == str(len(body)) and not coding and not junk
        return method, sent[:at] + junk + sent[at:], framed

    return one()


def ask_strangely(gate: Gate, method: str, request: bytes, framed: bool) -> RawReply | None:
    """Send any bytes and return the answer; None where the gate waits for the rest or hangs up."""
    with connected(gate) as connection:
        connection.settimeout(20 if framed else 0.1)
        try:
            with contextlib.suppress(ConnectionError):
                connection.sendall(request)
            with contextlib.closing(http.client.HTTPResponse(connection, method=method)) as answer:
                answer.begin()
                headers = CaseInsensitiveDict(answer.getheaders())
                return RawReply(answer.status, headers, answer.read())
        except (http.client.HTTPException, OSError):
            assert not framed, "no answer"
            return None


def test_no_request_breaks_the_gate(start_process: Callable[..., ProcessGate]) -> None:
    """Any method, path, header and body: an answer of the contract, one log line, right books."""
    hypothesis = pytest.importorskip("hypothesis", reason="needs: pip install hypothesis")
    gate = start_process()
    talker, account = register(gate, token_limit=100_000_000), register(gate)
    statuses: Counter[int] = Counter()
    wrong: dict[str, bytes] = {}  # {what: a short request that shows it}

    @hypothesis.settings(
        max_examples=500,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strange_requests(talker.key, login(gate, account)))
    def ask(strange: tuple[str, bytes, bool]) -> None:
        method, request, _ = strange
        status = 0
        try:
            reply = ask_strangely(gate, *strange)
            status = reply.status_code if reply else 0
            statuses[status] += 1
            assert status == 0 or 200 <= status < 300 or 400 <= status < 500
            if reply and status >= 400 and method == "HEAD":
                assert reply.headers["Content-Type"] == "application/json"
            elif reply and status >= 400:
                assert_error(reply, status)
        except AssertionError as error:
            what = f"{status}: {str(error)[:300]}"
            wrong[what] = min(request[:3000], wrong.get(what, request[:3000]), key=len)

    ask()
    assert not wrong
    assert call(gate, "GET", "/health").status_code == 200
    assert {200, 201, 400, 401, 404, 405, 409, 415} <= set(statuses), statuses
    assert {x.path for x in gate.upstream.asked()} <= {path for _, path in ROUTES}
    lines = gate.log.read_bytes().split(b"\n")
    assert len(lines) > 250 and all(line.decode().isprintable() for line in lines)
    assert not any(line.startswith(b"FORGED") for line in lines)


@contextlib.contextmanager
def disk_full(gate: ProcessGate) -> Iterator[None]:
    """No file of the gate takes another byte, whoever runs it: each write fails with EFBIG."""
    before = resource.prlimit(gate.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(gate.process.pid, resource.RLIMIT_FSIZE, (0, before[1]))
    yield
    resource.prlimit(gate.process.pid, resource.RLIMIT_FSIZE, before)


def test_full_disk_refuses_what_begins_and_loses_nothing_that_runs(
    start_process: Callable[..., ProcessGate],
) -> None:
    """503 and vLLM sees nothing; running answers reach their callers, and are booked afterwards."""
    gate = start_process()
    gate.expected_5xx, gate.may_log_traceback = {503}, True
    user = register(gate)
    with (
        ThreadPoolExecutor(1) as pool,
        chat(gate, user.key, "slow", stream=True, max_tokens=20) as running,
    ):
        plain = pool.submit(chat, gate, user.key, "slow", max_tokens=20)
        wait_until(lambda: gate.upstream.running() == 2)
        with disk_full(gate):
            for _ in range(3):
                assert_error(chat(gate, user.key), 503)
            body = {"username": "late", "password": PASSWORD}
            assert_error(call(gate, "POST", "/auth/register", json=body), 503)
            assert list(stream_events(running))[-1] == b"data: [DONE]\n\n"
            assert plain.result().json()["usage"]["completion_tokens"] == 20
            assert len(gate.upstream.asked()) == 2
    assert chat(gate, user.key).status_code == 200
    gate.settle(10)
    assert [row.status for row in gate.usage(user)] == ["ok"] * 3
    assert gate.tokens_used(user) == 30 + 30 + 30
    assert gate.rows("PRAGMA integrity_check") == [("ok",)]


def test_log_on_a_full_disk_does_not_stop_the_gate(
    start_process: Callable[..., ProcessGate],
) -> None:
    """LOG_FILE=/dev/full; what the log would have hidden is not shown elsewhere instead."""
    gate = start_process(LOG_FILE="/dev/full")
    gate.may_log_traceback = True
    user = register(gate)
    assert call(gate, "GET", f"/v1/models/{user.key}", user.key).status_code == 404
    assert chat(gate, user.key).status_code == 200
    assert streamed(gate, user.key)[-1] == b"data: [DONE]\n\n"
    assert call(gate, "GET", "/health").status_code == 200
    gate.settle()
    gate.stop()
    gate.check_output(gate.output, gate.errors)


def expire_leases(gate: Gate) -> None:
    """Make every lease end now, as if the time had passed."""
    engine = sqlalchemy.create_engine(gate.database_url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE usage SET lease_until = lease_until - 60"))
    engine.dispose()


def freeze(gate: ProcessGate) -> None:
    """SIGSTOP, but not while it holds the only write lock of SQLite."""
    gate.process.send_signal(signal.SIGSTOP)
    path = gate.database_url.removeprefix("sqlite:///")
    if path != gate.database_url:
        with contextlib.closing(sqlite3.connect(path, 0.1, isolation_level=None)) as database:
            try:
                database.executescript("BEGIN IMMEDIATE; ROLLBACK")
            except sqlite3.OperationalError:
                gate.process.send_signal(signal.SIGCONT)
                freeze(gate)


@pytest.fixture(params=["sqlite", "postgresql"])
def shared_env(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """Settings of gates that share a database; as an argument it comes before `start_process`."""
    if request.param == "postgresql":
        return cast(dict[str, str], request.getfixturevalue("postgres_env"))
    return {"DATABASE_URL": f"sqlite:///{tmp_path / 'both.db'}", "JWT_SECRET_KEY": JWT_SECRET}


def test_frozen_gate_that_goes_on_books_nothing_twice(
    shared_env: dict[str, str], start_process: Callable[..., ProcessGate], tmp_path: Path
) -> None:
    """SIGSTOP under load; another gate closes its rows as lost and gives their room away."""
    one, two = (cast(ProcessGate, gate) for gate in start_two(start_process, shared_env, tmp_path))
    rich, poor = register(one), register(one, token_limit=400)
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(chat(one, user.key, "slow", stream=True, max_tokens=60))
            for user in (rich, rich, poor, poor)
        ]
        streams = [stream_events(answer) for answer in running]
        for events in streams:
            assert all(next(events) for _ in range(4))
        freeze(one)
        expire_leases(two)
        wait_until(lambda: [row.status for row in two.usage()] == ["lost"] * 4, 10)
        assert two.complaints()[:-1] == []  # the last one: vLLM still answers
        answers = iter(lambda: chat(two, poor.key, max_tokens=20), None)
        refused = next(answer for answer in answers if answer.status_code != 200)
        assert_error(refused, 429, "insufficient_quota")
        wait_until(lambda: not two.upstream.running(), 20)
        one.process.send_signal(signal.SIGCONT)
        assert [list(events)[-1] for events in streams] == [b"data: [DONE]\n\n"] * 4
    two.settle(10)
    assert two.tokens_used(poor) <= 400
    late = [two.row(answer) for answer in running]
    assert [row.total for row in late[:2]] == [70, 70]
    assert all(row.total <= 70 for row in late)


def test_cookies_of_vllm_do_not_come_back_to_it(gate: Gate) -> None:
    """Nor to another user's request, nor to the caller."""
    for user in [register(gate), register(gate)] * 2:
        assert "Set-Cookie" not in chat(gate, user.key, "cookie").headers
    assert len(gate.upstream.asked()) == 4
    assert not [x for x in gate.upstream.exchanges if "Cookie" in x.headers]


@pytest.mark.parametrize("model", ["busy", "wordy"])
def test_vllms_own_429_passes_without_the_words_that_opencode_misreads(
    gate: Gate, model: str
) -> None:
    """Its text reaches the caller, but never makes OpenCode start a compaction."""
    user = register(gate)
    plain = chat(gate, user.key, model)
    with chat(gate, user.key, model, stream=True) as stream:
        answers = {plain.content, stream.content}
    assert (plain.status_code, stream.status_code) == (429, 429)
    gate.settle()
    assert gate.tokens_used(user) == 0
    for answer in answers:
        assert not any(words in answer.decode().lower() for words in MISREAD_BY_OPENCODE), answer
        assert json.loads(answer)["error"]["message"]
    assert model == "wordy" or answers == {gate.upstream.asked()[0].answer()}


def test_caller_who_never_reads_is_given_up(start_process: Callable[..., ProcessGate]) -> None:
    """Megabytes for sockets that nobody reads: others are served, vLLM and the places are freed."""
    gate = start_process(UPSTREAM_TIMEOUT="2")
    gate.may_log_traceback = True
    user, other = register(gate, token_limit=100_000_000), register(gate)
    messages = [{"role": "user", "content": "x" * 30_000}]
    request = raw_chat(user.key, chat_body("echo", stream=True, n=16, messages=messages))
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(contextlib.closing(socket.socket()))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(gate.address)
            connection.sendall(request)
        wait_until(lambda: len(gate.usage(user)) == 3)
        began = time.monotonic()
        assert chat(gate, other.key).status_code == 200
        assert time.monotonic() - began < 2
        wait_until(lambda: {row.status for row in gate.usage(user)} == {"aborted"}, 20)
    wait_until(lambda: not gate.upstream.running() and gate.reserved() == 0)
    counted = gate.upstream.tokens()  # what the gate had not read yet may be missing
    assert all(7500 < row.total <= counted[row.request_id] for row in gate.usage(user))
    assert gate.tokens_used(user) == sum(row.total for row in gate.usage(user))
    gate.stop()
    gate.check_output(gate.output, gate.errors)


def test_mistyped_key_is_refused_without_the_database(
    start_process: Callable[..., ProcessGate],
) -> None:
    """Its checksum tells; with a right key the same call waits for the database, which is shut."""
    gate = start_process()
    gate.may_log_traceback = True
    user = register(gate)
    with (gate.directory / "llmgate.db-shm").open("r+b") as shared:
        fcntl.lockf(shared, fcntl.LOCK_EX, 8, 120)  # all of SQLite's WAL locks, also the readers'
        with pytest.raises(requests.ReadTimeout):
            call(gate, "GET", "/v1/models", user.key, timeout=1)
        for key in (user.key[:-1], user.key + "0", user.key.replace("-llmgate-", "-llmgate-0")):
            assert_error(call(gate, "GET", "/v1/models", key, timeout=1), 401, "invalid_api_key")
    assert call(gate, "GET", "/v1/models", user.key).status_code == 200


def test_many_logins_do_not_hold_up_streams(start_process: Callable[..., ProcessGate]) -> None:
    """200 at once beside 20 streams: events and /health go on, and each login ends."""
    delays: list[float] = []
    health: list[float] = []

    def timed_login(number: int) -> tuple[int, float]:
        began = time.monotonic()
        answer = try_login(gate, f"many-{number}", PASSWORD)
        return answer.status_code, time.monotonic() - began

    with upstream_process() as url:
        gate = start_process(VLLM_ENDPOINT=url)
        gate.expected_5xx = {503}
        users = [register(gate) for _ in range(2)]
        with contextlib.closing(sqlite3.connect(gate.directory / "llmgate.db")) as database:
            columns = "username, password_hash, token_limit, created_at"
            copied = columns.replace("username", "'many-' || value")
            numbers = "WITH n(value) AS (SELECT 0 UNION ALL SELECT value + 1 FROM n LIMIT 200)"
            insert = f"INSERT INTO users ({columns}) {numbers} SELECT {copied} FROM users, n"
            database.execute(f"{insert} WHERE id = ?", (users[0].id,))
            database.commit()
        with ThreadPoolExecutor(1) as pool:
            logins = pool.submit(in_parallel, 200, timed_login)
            while not logins.done():
                opened = open_streams(gate, users, 20)
                began = time.monotonic()
                assert call(gate, "GET", "/health").status_code == 200
                health.append(time.monotonic() - began)
                delays += read_streams(opened, threading.Event())
        wait_until(lambda: gate.reserved() == 0)
        gate.stop()
    gate.check_output(gate.output, gate.errors)
    statuses = Counter(status for status, _ in logins.result())
    assert set(statuses) <= {200, 429, 503} and statuses[200] > 20, statuses
    assert max(seconds for _, seconds in logins.result()) < 22
    assert statistics.quantiles(delays, n=100)[98] < 1
    assert statistics.median(health) < 1


@pytest.mark.parametrize("end", [ProcessGate.stop, ProcessGate.kill], ids=["SIGTERM", "SIGKILL"])
def test_ended_gate_starts_again_at_once_on_its_port(
    start_process: Callable[..., ProcessGate], end: Callable[[ProcessGate], None]
) -> None:
    """As under systemd: SIGTERM is exit status 0, and connections left behind hold no port."""
    gate = start_process()
    user = register(gate)
    with connected(gate) as connection:
        connection.sendall(raw_request("GET", "/health", {}))
        assert read_reply(connection).status_code == 200
        end(gate)
        again = start_process(PORT=str(gate.address[1]))
        assert chat(again, user.key).status_code == 200


# ---------------------------------------------------------------------------------------------
# H. Everything at once, from a seed: whatever happens in whatever order, the books are right.


def after_requests(count: int) -> Callable[[], bool]:
    """Return a condition that holds after it was asked `count` times."""
    left = itertools.count(count, -1)
    return lambda: next(left) <= 0


def after_seconds(seconds: float) -> Callable[[], bool]:
    """Return a condition that holds when the time is over."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


class MixedLoad:
    """Requests of all kinds by several users at once."""

    def __init__(self, gate: Gate, users: list[User], seed: int) -> None:
        """Keep the users' keys, which change on the way."""
        self.gate, self.users, self.seed = gate, users, seed
        self.keys = [user.key for user in users]
        self.tokens = [login(gate, user) for user in users]
        gate.expected_5xx |= {502}

    def run(self, workers: int, until: Callable[[], bool]) -> None:
        """Let `workers` threads send requests until the condition holds."""

        def work(number: int) -> None:
            chance = random.Random(self.seed * 1000 + number)
            while not until():
                self.one_request(chance)

        in_parallel(workers, work)

    def one_request(self, chance: random.Random) -> None:
        """Do one thing that a caller may do, and look at what a caller would see of it."""
        who = chance.randrange(len(self.users))
        kind = chance.choices(
            [self.plain, self.stream, self.leave, self.leave_plain, self.fail, self.new_key],
            [30, 30, 20, 5, 12, 3],
        )[0]
        kind(chance, who)

    def fields(self, chance: random.Random) -> JSONObject:
        """Return fields that change the cost."""
        asked: JSONObject = {"max_tokens": chance.choice([None, 1, 5, 20, 4000])}
        if chance.random() < 0.2:
            asked["n"] = chance.randint(2, 4)
        return asked

    def plain(self, chance: random.Random, who: int) -> None:
        """A plain chat."""
        model = chance.choice(["ok", "org/tiny", "echo", "llm-user-managed", "nousage"])
        answer = chat(self.gate, self.keys[who], model, **self.fields(chance))
        self.look_at(answer)

    def stream(self, chance: random.Random, who: int) -> None:
        """A stream, read to its end."""
        model = chance.choice(["ok", "lumpy", "echo", "paced", "badusage"])
        with chat(self.gate, self.keys[who], model, stream=True, **self.fields(chance)) as answer:
            if self.look_at(answer):
                assert list(stream_events(answer))[-1] == b"data: [DONE]\n\n"

    def leave(self, chance: random.Random, who: int) -> None:
        """A stream whose client leaves somewhere."""
        model = chance.choice(["ok", "slow", "silent", "paced"])
        with connected(self.gate) as connection:
            body = chat_body(model, stream=True, **self.fields(chance))
            connection.sendall(raw_chat(self.keys[who], body))
            connection.settimeout(chance.uniform(0, 0.3))
            with contextlib.suppress(TimeoutError):
                for _ in range(chance.randrange(6)):
                    connection.recv(400)
            if chance.random() < 0.5:
                leave_with_reset(connection)

    def leave_plain(self, chance: random.Random, who: int) -> None:
        """A plain chat whose client leaves."""
        with connected(self.gate) as connection:
            connection.sendall(raw_chat(self.keys[who], chat_body("slow", max_tokens=5)))

    def fail(self, chance: random.Random, who: int) -> None:
        """A request at which vLLM fails, or that is refused."""
        model = chance.choice(["e400", "e500", "die", "dieclean", "badjson", "midstream", "nope"])
        with chat(self.gate, self.keys[who], model, stream=chance.random() < 0.5) as answer:
            assert answer.status_code in (200, 400, 401, 404, 429, 502)
            assert answer.content

    def new_key(self, chance: random.Random, who: int) -> None:
        """A new key; the old one may be in use."""
        self.keys[who] = replace_key(self.gate, self.tokens[who])

    def look_at(self, answer: requests.Response) -> bool:
        """Return whether there is an answer; a refusal must be one that the contract knows."""
        if answer.status_code == 200:
            return True
        error = answer.json()["error"]["code"]
        known = {"insufficient_quota", "quota_reserved", "rate_limit_exceeded", "invalid_api_key"}
        assert error in known, answer.text
        return False


def test_mixed_load_leaves_the_books_right(make_gate: Callable[..., ThreadedGate]) -> None:
    """A few hundred requests of all kinds: vLLM's own count, rows and counters agree."""
    gate = make_gate()
    limits = [600, 3000, 20_000, 1_000_000, 1_000_000]
    users = [register(gate, token_limit=limit) for limit in limits]
    MixedLoad(gate, users, seed=7).run(workers=12, until=after_requests(400))
    gate.settle(5)
    counted = gate.upstream.tokens()
    exact = [row for row in gate.usage() if not row.estimated]
    assert sum(row.total for row in exact) == sum(counted.get(row.request_id, 0) for row in exact)
    assert len(exact) > 150
    for user, limit in zip(users, limits, strict=True):
        assert 0 < gate.tokens_used(user) <= limit


@soak
@pytest.mark.skipif("'soak' not in config.option.markexpr", reason="ten minutes; give -m soak")
def test_ten_minutes_of_mixed_load(start_process: Callable[..., ProcessGate]) -> None:
    """The same for ten minutes; after each the books are right, and nothing has grown."""
    seconds = float(os.environ.get("LLMGATE_TEST_SOAK_S", "600"))
    gate = start_process()
    users = [register(gate, token_limit=100_000_000) for _ in range(8)]
    load = MixedLoad(gate, users, seed=8)
    gate.upstream.keeps_bytes = False
    sizes = []
    for minute in range(1, 11):
        load.run(workers=12, until=after_seconds(seconds / 10))
        gate.settle(10)
        sizes.append((resident_kb(gate), gate.descriptors(), thread_count(gate)))
        kilobytes, descriptors, threads = sizes[-1]
        rows = len(gate.rows("SELECT 1 FROM usage"))
        print(
            f"minute {minute}: {rows} rows, {kilobytes} kB, {descriptors} files, {threads} threads"
        )
    kilobytes, descriptors, threads = sizes[0]
    for later in sizes[1:]:
        assert later[0] < kilobytes + 30_000
        assert later[1] <= descriptors + 12  # SQLite's, of callers who read at the same time
        assert later[2] <= threads + 12  # started for callers at the same time


def thread_count(gate: ProcessGate) -> int:
    """Return how many threads the gate's process has."""
    return len(os.listdir(f"/proc/{gate.process.pid}/task"))


def resident_kb(gate: ProcessGate) -> int:
    """Return the memory that the gate's process holds."""
    status = Path(f"/proc/{gate.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found
    return int(found[1])


# ---------------------------------------------------------------------------------------------
# H. The edge: the real nginx with README's own configuration, several gates behind it, and a
# PostgreSQL that goes away.

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
needs_nginx = pytest.mark.skipif(not NGINX, reason="nginx is not installed: nothing to test with")


def readme_block(start: str) -> str:
    """Return the indented block of README.md that starts with these words."""
    blocks = re.findall(r"(?:^    .*\n)+", (HERE / "README.md").read_text(), re.MULTILINE)
    (found,) = [block for block in blocks if block.lstrip().startswith(start)]
    return cast(str, found)


def readme_env() -> dict[str, str]:
    """Return README's settings for a gate behind a proxy, with an open registration."""
    lines = readme_block("TRUSTED_PROXY").split()
    return dict(line.split("=", 1) for line in lines) | {"REGISTRATION": "open"}


def nginx_config(directory: Path, port: int, gates: list[Gate]) -> str:
    """Return README's configuration with other ports, paths and addresses of gates."""
    main, server = readme_block("worker_rlimit_nofile"), readme_block("server {")
    if len(gates) > 1:
        server = server.replace("http://127.0.0.1:8000", "http://llmgate")
        server = server.rstrip().removesuffix("}") + readme_block("location = /auth/token") + "}\n"
        server = readme_block("upstream llmgate {") + server
    changes = {
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "/etc/ssl/llm.example.org.pem": f"{directory}/cert.pem",
        "/etc/ssl/llm.example.org.key": f"{directory}/key.pem",
    }
    for readme_port, gate in zip((8000, 8002), gates, strict=False):
        changes[f"127.0.0.1:{readme_port}"] = gate.url.removeprefix("http://")
    for words, others in changes.items():
        assert words in server, f"README's nginx configuration has no {words}"
        server = server.replace(words, others)
    temporary = "".join(
        f"{kind}_temp_path {directory}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return (
        f"user root root;\ndaemon off;\npid {directory}/pid;\nerror_log {directory}/error.log;\n"
        f"{main}http {{\naccess_log off;\n{temporary}{server}}}\n"
    )


def make_certificate(directory: Path) -> None:
    """Write key.pem and cert.pem for localhost."""
    arguments = "req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 1"
    arguments += " -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    arguments += f" -keyout {directory}/key.pem -out {directory}/cert.pem"
    subprocess.run(["openssl", *arguments.split()], check=True, capture_output=True)


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_vllm_behind_tls(tmp_path: Path) -> None:
    """Plain, streamed, and left: what it has counted by then is charged here, too."""
    make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    secure = Upstream()
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    url = f"https://localhost:{secure.server_address[1]}"
    env = {"PORT": "0", "VLLM_ENDPOINT": url, "VLLM_API_KEY": UPSTREAM_KEY}
    env["SSL_CERT_FILE"] = str(tmp_path / "cert.pem")
    with secure:
        gate = ProcessGate(env, tmp_path, secure)
        try:
            user = register(gate)
            assert chat(gate, user.key).status_code == 200
            assert streamed(gate, user.key)[-1] == b"data: [DONE]\n\n"
            for _ in range(5):
                with chat(gate, user.key, "paced", stream=True) as running:
                    next(running.iter_content(100))
            gate.settle()
            assert Counter(row.status for row in gate.usage()) == {"ok": 2, "aborted": 5}
            gate.stop()
        finally:
            gate.kill()


@pytest.fixture
def start_nginx(tmp_path: Path, upstream: Upstream) -> Iterator[Callable[..., Gate]]:
    """Starts nginx in front of gates; what it gives is used like a gate, by https. Once a test."""
    directory = tmp_path / "nginx"
    edges: list[Gate] = []
    with contextlib.ExitStack() as stack:

        def start(*gates: Gate) -> Gate:
            directory.mkdir()
            make_certificate(directory)
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            config = directory / "nginx.conf"
            config.write_text(nginx_config(directory, port, list(gates)))
            command = [cast(str, NGINX), "-p", str(directory), "-c", str(config)]
            with (directory / "stderr").open("wb") as errors:
                process = subprocess.Popen(command, stderr=errors)
            stack.callback(process.wait, 10)
            stack.callback(process.terminate)
            url = f"https://localhost:{port}"
            edge = Gate(url, dict(gates[0].env), gates[0].directory, upstream)
            edge.verify, edge.log = str(directory / "cert.pem"), directory / "error.log"
            edges.append(edge)
            wait_until(lambda: process.poll() is not None or is_open(edge), 10)
            assert process.poll() is None, (directory / "stderr").read_text()
            return edge

        yield start
        for edge in edges:
            edge.settle()
            edge.check_output(directory / "stderr")


def is_open(gate: Gate) -> bool:
    """Return whether somebody listens there."""
    with contextlib.suppress(ConnectionError), connected(gate):
        return True
    return False


@contextlib.contextmanager
def secured(edge: Gate) -> Iterator[socket.socket]:
    """A raw connection to nginx, inside TLS."""
    context = ssl.create_default_context(cafile=cast(str, edge.verify))
    with connected(edge) as plain, context.wrap_socket(plain, server_hostname="localhost") as made:
        yield made


@needs_nginx
def test_events_pass_nginx_at_once(
    make_gate: Callable[..., ThreadedGate], start_nginx: Callable[..., Gate]
) -> None:
    """Case 14 through TLS and nginx, and a client that hangs up there is `aborted`."""
    edge = start_nginx(make_gate(**readme_env()))
    user = register(edge)

    def longest_delay() -> float:
        with chat(edge, user.key, "spaced", stream=True) as response:
            received = [(time.monotonic(), event) for event in stream_events(response)]
            assert edge.row(response).status == "ok"
        assert received[-1][1] == b"data: [DONE]\n\n"
        events = edge.upstream.asked()[-1].sent
        sent = [at for at, event in events if b'"choices":[],' not in event]
        return max(there - here for (there, _), here in zip(received, sent, strict=True))

    assert best_of_six(longest_delay, 0.15) < 0.15
    with secured(edge) as connection:
        connection.sendall(raw_chat(user.key, chat_body("slow", stream=True)))
        read_events(connection, 4)
    exchange = edge.upstream.asked()[-1]
    wait_until(lambda: exchange.left, 2)
    wait_until(lambda: edge.usage(user)[-1].status != "pending", 2)
    row = edge.usage(user)[-1]
    assert (row.status, row.estimated, row.total) == ("aborted", 0, exchange.tokens)


@needs_nginx
def test_gate_behind_nginx_is_known_by_its_public_name(
    make_gate: Callable[..., ThreadedGate], start_nginx: Callable[..., Gate]
) -> None:
    """The URLs in opencode.json are those that the client sees; unknown names stay refused."""
    edge = start_nginx(make_gate(**readme_env()))
    config = call(edge, "GET", "/opencode.json", register(edge).key).json()
    assert [p["options"]["baseURL"] for p in config["provider"].values()] == [f"{edge.url}/v1"]
    strange = call(edge, "GET", "/users/usage", headers={"Host": "evil.example"})
    assert_error(strange, 400, "host_not_allowed")


@needs_nginx
def test_slow_connections_stay_at_nginx(
    start_process: Callable[..., ProcessGate], start_nginx: Callable[..., Gate]
) -> None:
    """A thousand: a third each in the handshake, in the headers, in the body. The gate sees none."""
    gate = start_process(**readme_env())
    edge = start_nginx(gate)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # for the connections of this process
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    user = register(edge)
    assert chat(edge, user.key).status_code == 200
    before = gate.descriptors()
    request = raw_chat(user.key, chat_body())
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # the first bytes of a TLS handshake
    half, most_of_it = request[: len(request) // 4], request[:-20]
    with contextlib.ExitStack() as stack:
        slow = [(stack.enter_context(connected(edge)), hello[:-5], hello[-5:]) for _ in range(334)]
        for begun in (half, most_of_it):
            rest = request[len(begun) :][:5]
            slow += [(stack.enter_context(secured(edge)), begun, rest) for _ in range(333)]
        for connection, begun, _ in slow:
            connection.sendall(begun)
        for position in range(5):
            for connection, _, rest in slow:
                connection.sendall(rest[position : position + 1])
            began = time.monotonic()
            assert chat(edge, user.key).status_code == 200
            assert time.monotonic() - began < 2
            assert gate.descriptors() <= before + 2
    assert len(edge.upstream.asked()) == 6


@needs_nginx
def test_two_gates_behind_nginx_are_one(
    postgres_env: dict[str, str],
    start_process: Callable[..., ProcessGate],
    start_nginx: Callable[..., Gate],
    tmp_path: Path,
) -> None:
    """What one gate made the other knows at once, and no race over both passes the quota."""
    gates = start_two(start_process, postgres_env | readme_env(), tmp_path)
    edge = start_nginx(*gates)
    for _ in range(4):
        user = register(edge, token_limit=1000)
        token = login(edge, user)
        for _ in range(3):
            assert login(edge, user)
            assert call(edge, "GET", "/users/me", token).status_code == 200
        key = replace_key(edge, token)
        assert [chat(edge, user.key).status_code for _ in range(2)] == [401, 401]
        assert [chat(edge, key).status_code for _ in range(2)] == [200, 200]
    user = register(edge, token_limit=1000)
    QuotaRace.run([edge], user).check(edge, user, 1000)
    wait_until(lambda: all("chat/completions" in gate.log.read_text() for gate in gates))


def told_of_end(answer: requests.Response, events: Iterator[bytes]) -> tuple[str, bool]:
    """Read a stream as far as it goes; return its X-Request-Id and whether it came whole."""
    last = b""
    with contextlib.suppress(requests.RequestException, AssertionError):  # broken, or torn
        for last in events:
            pass
    return answer.headers["X-Request-Id"], last == b"data: [DONE]\n\n"


@needs_nginx
def test_killed_gate_takes_only_its_own_streams_along(
    postgres_env: dict[str, str],
    start_process: Callable[..., ProcessGate],
    start_nginx: Callable[..., Gate],
    tmp_path: Path,
) -> None:
    """No login fails, no chat runs twice, no row is lost; they are closed when their leases end."""
    one, two = start_two(start_process, postgres_env | readme_env(), tmp_path)
    edge = start_nginx(one, two)
    edge.expected_5xx = {502}  # nginx's own, for plain requests on the dead gate
    user = register(edge)
    over = threading.Event()
    jwts: list[str] = []

    def log_in_again_and_again() -> None:
        while not over.is_set():
            jwts.append(login(edge, user))

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(14) as pool:
        stack.callback(over.set)
        opened = []
        for _ in range(20):
            answer = chat(edge, user.key, "slow", stream=True, max_tokens=100)
            opened.append((stack.enter_context(answer), stream_events(answer)))
            assert next(opened[-1][1])
        plain = [pool.submit(chat, edge, user.key, "slow", max_tokens=60) for _ in range(10)]
        wait_until(lambda: len(edge.upstream.asked()) == 30)
        callers = [pool.submit(log_in_again_and_again) for _ in range(4)]
        wait_until(lambda: len(jwts) > 8)
        cast(ProcessGate, one).kill()
        ended = [told_of_end(*stream) for stream in opened]
        statuses = Counter(answer.result().status_code for answer in plain)
        over.set()
        assert [caller.result() for caller in callers] == [None] * 4
    broken = {name for name, whole in ended if not whole}
    assert len(broken) == 10
    assert statuses == {200: 5, 502: 5}
    assert len(edge.upstream.asked()) == 30  # each ran once
    assert [chat(edge, user.key).status_code for _ in range(10)] == [200] * 10
    expire = "UPDATE usage SET lease_until = 0 WHERE status = 'pending'"  # 20 s later, so to say
    with psycopg.connect(edge.database_url.replace("+psycopg", "")) as connection:
        connection.execute(expire)
    wait_until(lambda: login(edge, user) and edge.complaints() == [], 10)
    rows = {row.request_id: row.status for row in edge.usage(user)}
    assert len(rows) == 40
    assert {name for name, _ in ended if rows[name] == "lost"} == broken
    assert Counter(rows.values()) == {"ok": 25, "lost": 15}


@contextlib.contextmanager
def database_down(gate: Gate) -> Iterator[None]:
    """PostgreSQL ends every connection to this database and takes no new one, as in a restart."""
    name = sqlalchemy.make_url(gate.database_url).database
    server = os.environ["LLMGATE_TEST_POSTGRES_URL"].replace("+psycopg", "")
    end_all = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        try:
            connection.execute(end_all.encode())
            yield
        finally:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())


def test_database_away_for_ten_seconds_needs_no_restart(
    postgres_env: dict[str, str], start_process: Callable[..., ProcessGate]
) -> None:
    """Callers get 503 and vLLM sees nothing new; what ran is booked when the database is back."""
    gate = start_process(**postgres_env)
    gate.expected_5xx, gate.may_log_traceback = {503}, True
    user = register(gate)
    token = login(gate, user)
    with ThreadPoolExecutor(3) as pool:
        running = [
            pool.submit(chat, gate, user.key, "slow", max_tokens=20, stream=False),
            pool.submit(streamed, gate, user.key, "slow", max_tokens=40),
            pool.submit(streamed, gate, user.key, "slow", max_tokens=220),
        ]
        wait_for_rows(gate, 3)
        wait_until(lambda: len(gate.upstream.asked()) == 3)
        with database_down(gate):
            for _ in range(4):
                began = time.monotonic()
                assert_error(call(gate, "GET", "/health"), 503, "database_unavailable")
                assert_error(chat(gate, user.key), 503, "database_unavailable")
                assert_error(call(gate, "GET", "/users/me", token), 503, "database_unavailable")
                assert time.monotonic() - began < 5
                wait_until(after_seconds(2.5))
            assert running[0].done() and running[1].done() and not running[2].done()
        assert call(gate, "GET", "/health").status_code == 200
        assert login(gate, user) and chat(gate, user.key).status_code == 200
        assert all(cast(list[bytes], r.result())[-1] == b"data: [DONE]\n\n" for r in running[1:])
    assert len(gate.upstream.asked()) == 4
    gate.settle(10)
    assert sorted(row.total for row in gate.usage(user)) == [30, 30, 50, 230]
    assert {row.status for row in gate.usage(user)} == {"ok"}


def test_logins_while_the_database_is_away_are_no_guesses(
    postgres_env: dict[str, str], start_process: Callable[..., ProcessGate]
) -> None:
    """Ten tries that nobody could check do not hold the name back afterwards."""
    gate = start_process(**postgres_env)
    gate.expected_5xx, gate.may_log_traceback = {503}, True
    user = register(gate)
    with database_down(gate):
        for _ in range(10):
            assert_error(try_login(gate, user.name, PASSWORD), 503, "database_unavailable")
    assert try_login(gate, user.name, PASSWORD).status_code == 200


# ---------------------------------------------------------------------------------------------
# The benchmark: the gate beside a bare relay made of the same parts. They take turns behind the
# same callers and in front of the same upstream, so their ratio is what accounts and quotas cost.

BARE_RELAY = """
import sys, flask, requests, waitress
app, session = flask.Flask("bare"), requests.Session()
session.trust_env = False
session.mount("http://", requests.adapters.HTTPAdapter(1, 544))

@app.post("/v1/chat/completions")
def chat():
    url, body = sys.argv[1] + flask.request.path, flask.request.get_data()
    headers = {"Content-Type": "application/json"}
    answer = session.post(url, body, headers=headers, stream=True, timeout=(5, 600))
    kind = answer.headers["Content-Type"]
    streams = kind.startswith("text/event-stream")
    said = answer.iter_content(None) if streams else answer.content
    response = flask.Response(said, answer.status_code, content_type=kind)
    response.call_on_close(answer.close)
    return response

waitress.serve(app, host="127.0.0.1", port=int(sys.argv[2]), threads=544, connection_limit=4000)
"""
PACE_MS = 20  # between two events of a stream that is held
RATES = {callers: f"requests/s, {callers} at a time" for callers in (1, 16, 64)}
ADDED, ADDED_FIRST = "ms added to an answer", "ms added to the first token"
HELD, CPU = f"streams held, {PACE_MS} ms an event", "CPU seconds for 1,000 requests"
IDLE_MB, USED_MB = "MB of memory, idle", "MB of memory, after 64 at a time"
START = "seconds from start to first answer"
ROWS = dict.fromkeys(RATES.values(), 0)  # and the digits after the point
ROWS |= {ADDED: 2, ADDED_FIRST: 2, HELD: 0, CPU: 2, IDLE_MB: 0, USED_MB: 0, START: 2}


@dataclass(frozen=True)
class BenchPlan:
    """How long to measure what."""

    rounds: int = 3
    seconds: float = 0.8  # of each measurement
    ramp_s: float = 0.01  # between the starts of two streams
    pause_s: float = 0.4  # until a server is at rest
    rungs: tuple[int, ...] = (50, 100, 150, 200)  # streams at a time
    most_lag_s: float = 0.02  # of 99 % of the events
    least: float = 0.97  # of the events that must be there


OK_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: "
CONTENT_LENGTH = re.compile(rb"(?i)\r\ncontent-length: (\d+)")
ASKS_STREAM = re.compile(rb'(?s)(?=.*pace-(\d+))(?=.*"max_tokens": ?(\d+)).*"stream": ?true')


def lean_replies() -> dict[bytes, bytes]:
    """Return what the lean upstream says at each path."""
    head = OK_HEAD + b"application/json\r\ncontent-length: %d\r\n\r\n%b"
    said: dict[bytes, JSONObject] = {
        b"/v1/chat/completions": Answer(chat_body(), Behaviour(), chat=True).whole(),
        b"/v1/models": {"data": [{"id": "ok", "max_model_len": MAX_MODEL_LEN}]},
        b"/tokenize": {"count": 10, "max_model_len": MAX_MODEL_LEN},
    }
    return {path: head % (len(dump(value)), dump(value)) for path, value in said.items()}


def lean_events(continuous: bool) -> list[bytes]:
    """Return the opening, a token, the last token, the usage; with places for time and counts."""
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    body = chat_body(stream=True, stream_options=options)
    said = b"".join(event for _, event in Answer(body, Behaviour(most=2), chat=True).events())
    said = re.sub(rb'(?<="content":")[^"]+', b"%(at)d", said)
    said = re.sub(rb'(?<="total_tokens":)\d+', b"%(total)d", said)
    said = re.sub(rb'(?<="completion_tokens":)\d+', b"%(count)d", said)
    return [event + b"\n\n" for event in said.split(b"\n\n")]


class LeanUpstream(asyncio.Protocol):
    """A connection that says what the tests' stand-in says, from prepared bytes.

    Each event has the time at which it was written. Callbacks, for a stream in a task of its own
    would cost three times as much, and it is the relay that shall be short of cores.
    """

    replies: dict[bytes, bytes]
    events: tuple[list[bytes], list[bytes]]
    transport: asyncio.Transport
    rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Answer a request once it is whole."""
        self.rest += data
        head, _, body = self.rest.partition(b"\r\n\r\n")
        length = CONTENT_LENGTH.search(head)
        if b"\r\n\r\n" not in self.rest or len(body) < int(length[1] if length else 0):
            return
        self.rest = b""
        if not (asked := ASKS_STREAM.search(body)):
            self.transport.write(self.replies[head.split(b" ", 2)[1]])
            return
        self.kinds = self.events[b"continuous_usage_stats" in body]
        self.close = b"connection: close" in head.lower()
        self.pace_s, self.most = int(asked[1]) / 1000, int(asked[2])
        self.due = asyncio.get_running_loop().time()
        head = OK_HEAD + b"text/event-stream\r\ntransfer-encoding: chunked\r\n"
        self.transport.write(head + b"connection: close\r\n" * self.close + b"\r\n")
        self.say(0)

    def say(self, sent: int) -> None:
        """Write the next event of a stream, and see to those that follow."""
        if self.transport.is_closing():  # the caller has left
            return
        kind = min(sent, 1) + (sent >= self.most) + (sent > self.most)
        counts = {b"count": min(sent, self.most), b"total": min(sent, self.most) + 10}
        event = self.kinds[kind] % {b"at": time.monotonic_ns(), **counts}
        self.transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        if 1 <= sent < self.most:
            self.due += self.pace_s
            asyncio.get_running_loop().call_at(self.due, self.say, sent + 1)
        elif sent <= self.most:
            self.say(sent + 1)
        else:
            self.transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
            if self.close:
                self.transport.close()


async def serve_lean_upstream(port: int) -> None:
    """Serve until the process is ended."""
    LeanUpstream.replies = lean_replies()
    LeanUpstream.events = (lean_events(False), lean_events(True))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(LeanUpstream, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


@dataclass
class Load:
    """What the callers of one measurement saw; times in seconds."""

    since: float  # when all have begun, and events count (monotonic)
    answers: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)  # of events, behind their writing
    failures: list[bytes] = field(default_factory=list)


class LeanCaller:
    """A connection that asks again when it has its answer; for a stream only once."""

    PLAIN = re.compile(rb"(?is)HTTP/1.1 200 .*?\ncontent-length: (\d+).*?\r\n\r\n")
    WRITTEN_AT = re.compile(rb'"content":"(\d+)"')

    def __init__(self, port: int, request: bytes, tokens: int) -> None:
        """Connect and ask for a stream of so many tokens, or for a plain answer (0)."""
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.request, self.tokens = request, tokens
        self.ask()

    def ask(self) -> None:
        """Send the request."""
        self.seen, self.rest, self.asked_at = 0, b"", time.monotonic()
        self.socket.send(self.request)

    def read(self, load: Load) -> bool:
        """Take what has come; return whether there is more to come."""
        data = b""
        with contextlib.suppress(ConnectionError):
            data = self.socket.recv(1 << 18)
        now = time.monotonic()
        self.rest += data
        if self.tokens:
            events, _, self.rest = self.rest.rpartition(b"\n\n")
            times = self.WRITTEN_AT.findall(events)
            if times and not self.seen:
                load.first_tokens.append(now - self.asked_at)
            self.seen += len(times)
            if now >= load.since:
                load.lags += [now - int(at) / 1e9 for at in times]
            ended = self.rest.endswith(b"\r\n0\r\n\r\n")
        else:
            head = self.PLAIN.match(self.rest)
            ended = head is not None and len(self.rest) >= head.end() + int(head[1])
        right = data and (not data.startswith(b"HTTP/") or b" 200 " in data[:16])
        if not right or (ended and self.seen != self.tokens):
            load.failures.append(data[:300])
            return False
        if ended:
            load.answers.append(now - self.asked_at)
            if self.tokens:
                return False
            self.ask()
        return True


def drive(
    port: int, request: bytes, callers: int, seconds: float, tokens: int = 0, ramp_s: float = 0.0
) -> Load:
    """Let callers ask for so long, once all have begun; one whose answer is wrong asks no more."""
    began = time.monotonic()
    load = Load(since=began + ramp_s * callers * 1.5)
    connected: dict[int, LeanCaller] = {}
    with select.epoll() as poll:
        while (now := time.monotonic()) < load.since + seconds:
            begun = callers if now >= load.since else int((now - began) / ramp_s) + 1
            while len(connected) + len(load.failures) < min(callers, begun):
                caller = LeanCaller(port, request, tokens)
                connected[caller.socket.fileno()] = caller
                poll.register(caller.socket, select.EPOLLIN)
            for number, _ in poll.poll(0.01):
                if not connected[number].read(load):
                    connected.pop(number).socket.close()
    for caller in connected.values():
        caller.socket.close()
    return load


def bench_request(key: str, pace_ms: int = 0, tokens: int = 0) -> bytes:
    """Return a chat, streamed if it has tokens."""
    message = {"role": "user", "content": f"Tell me of the fox and the river. pace-{pace_ms}"}
    body: JSONObject = {"model": "ok", "messages": [message], "max_tokens": tokens or 20}
    if tokens:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return raw_chat(key, body)


def streams_held(port: int, key: str, rungs: tuple[int, ...], plan: BenchPlan) -> int:
    """Return the last rung at which 99 % of the events are in time, 97 % there, no stream broken.

    Each is tried twice if need be: other programs may need the same cores.
    """
    endless = 5000
    request = bench_request(key, PACE_MS, endless)

    def holds(rung: int) -> bool:
        load = drive(port, request, rung, plan.seconds, endless, plan.ramp_s)
        time.sleep(plan.pause_s)
        late = sorted(load.lags)[len(load.lags) * 99 // 100 :]
        there = len(load.lags) >= plan.least * rung * plan.seconds * 1000 / PACE_MS
        return there and max(late[:1], default=1) < plan.most_lag_s and not load.failures

    return max(itertools.takewhile(lambda rung: holds(rung) or holds(rung), rungs), default=0)


def spent(leader: int) -> tuple[float, float]:
    """Return CPU seconds and MB (PSS) of a process and of those that it has started."""
    cpu_s = memory_mb = 0.0
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(path.name)) == leader:
                words = (path / "stat").read_text().rpartition(")")[2].split()
                cpu_s += (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
                pss = re.search(r"\nPss: +(\d+)", (path / "smaps_rollup").read_text())
                memory_mb += int(pss[1]) / 1024 if pss else 0
    return cpu_s, memory_mb


def measure(port: int, leader: int, key: str, plan: BenchPlan) -> dict[str, float]:
    """Measure a server, but for the streams it holds; the times are whole, not yet the added."""
    time.sleep(plan.pause_s)
    found = {IDLE_MB: spent(leader)[1]}
    plain, short = bench_request(key), bench_request(key, 1, 3)
    drive(port, plain, 8, plan.pause_s)
    drive(port, short, 4, plan.pause_s, tokens=3)
    load = drive(port, short, 1, plan.seconds, tokens=3)
    found[ADDED_FIRST] = statistics.median(load.first_tokens) * 1000
    for callers, row in RATES.items():
        before, _ = spent(leader)
        load = drive(port, plain, callers, plan.seconds)
        after, found[USED_MB] = spent(leader)
        assert load.answers and not load.failures, load.failures
        found[row] = len(load.answers) / plan.seconds
        if callers == 1:
            found[ADDED] = statistics.median(load.answers) * 1000
        if callers == 16:
            found[CPU] = (after - before) / len(load.answers) * 1000
    return found


@contextlib.contextmanager
def served(
    directory: Path, key: str, port: int, arguments: list[str], env: dict[str, str]
) -> Iterator[tuple[int, float]]:
    """Run a server; yield its process and the seconds until it answered. It is gone afterwards."""
    output, began, answer = directory / f"output-{port}", time.monotonic(), b""
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=directory,
            env=clean_env() | env,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        while not answer.startswith(b"HTTP/1.1 200"):
            if process.poll() is not None or time.monotonic() - began > 30:
                sys.exit(f"{arguments[0]} does not serve: {answer!r} {output.read_text()}")
            time.sleep(0.005)
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as s:
                s.sendall(bench_request(key))
                answer = s.recv(65536)
        yield process.pid, time.monotonic() - began
    finally:
        for name in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, name)
                process.wait(5)


def free_port() -> int:
    """Return a port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def bench(plan: BenchPlan) -> None:
    """Measure upstream, bare relay and gate in turns; print the medians and their ratios."""
    for ending in (signal.SIGINT, signal.SIGTERM):  # `served` ends what runs
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    upstream_port, port, gate = free_port(), free_port(), [str(HERE / "llmgate.py")]
    url, busy_s, began = f"http://127.0.0.1:{upstream_port}", others_busy_s(), time.monotonic()
    env = {"VLLM_ENDPOINT": url, "PORT": str(port), "MAX_REQUESTS_PER_USER": "1000"}
    relays = {"bare": (["-c", BARE_RELAY, url, str(port)], {}), "gate": (gate, env)}
    if any(item.name == "processes" for item in fields(llmgate.Settings)):
        relays["gate, PROCESSES=2"] = (gate, env | {"PROCESSES": "2"})
    seen: dict[str, list[dict[str, float]]] = {column: [] for column in ("direct", *relays)}
    upstream = [str(Path(__file__).resolve()), "bench-upstream", str(upstream_port)]
    account = ["create-user", "bench", "--token-limit", str(10**15)]
    with tempfile.TemporaryDirectory() as name:
        key = command(Path(name), env, *account, stdin=PASSWORD).stdout.strip()
        serve = functools.partial(served, Path(name), key)
        with serve(upstream_port, upstream, {}) as direct:
            for turn, column in itertools.product(range(plan.rounds), seen):
                print(f"round {turn + 1} of {plan.rounds}: {column}", file=sys.stderr)
                with contextlib.ExitStack() as stack:
                    (leader, start_s), at, rungs = direct, upstream_port, plan.rungs[-1:]
                    if column in relays:
                        leader, start_s = stack.enter_context(serve(port, *relays[column]))
                        at, rungs = port, plan.rungs
                    found = measure(at, leader, key, plan) | {START: start_s}
                    if turn == plan.rounds - 1:
                        found[HELD] = streams_held(at, key, rungs, plan)
                seen[column].append(found)
    print_bench(seen)
    others = (others_busy_s() - busy_s) / (time.monotonic() - began)
    print(f"\nOther programs took {others:.2f} of {os.cpu_count()} cores meanwhile.")


def others_busy_s() -> float:
    """Return the CPU seconds of all programs but this one and those it has started and ended."""
    user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    ticks = int(user) + int(nice) + int(system)
    return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def print_bench(seen: dict[str, list[dict[str, float]]]) -> None:
    """Print a table for the README: the median of each row, the upstream's own time taken off."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = [f"{p} {importlib.metadata.version(p)}" for p in ("flask", "waitress", "requests")]
    print(os.cpu_count(), "cores,", cpu[1] if cpu else platform.machine(), end=", ")
    print(f"Python {platform.python_version()}, {', '.join(packages)}\n")
    ratios = [f"{column} / bare" for column in [*seen][2:]]
    print("| | " + " | ".join([*seen, *ratios]), "|\n|---" + "|---:" * len([*seen, *ratios]) + "|")
    for row, digits in ROWS.items():
        rounds = [[found[row] for found in values if row in found] for values in seen.values()]
        direct, *relays = map(statistics.median, rounds)
        if row in (ADDED, ADDED_FIRST):
            relays = [value - direct for value in relays]
        cells = [f"{direct:,.0f}" if row in (*RATES.values(), HELD) else ""]
        cells += [f"{value:,.{digits}f}" for value in relays]
        cells += [f"{value / (relays[0] or math.nan):.2f}" for value in relays[1:]]
        print(f"| {row} | {' | '.join(cells)} |")


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")
def test_benchmark_fills_its_table(tmp_path: Path) -> None:
    """`bench --quick` is too short for true numbers, but has all of them, and leaves nothing."""
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "bench", "--quick"],
        cwd=tmp_path,
        env=clean_env() | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    table = [line.strip("| ").split(" | ") for line in ended.stdout.splitlines()]
    ratios = {cells[0]: float(cells[-1]) for cells in table if cells[0] in ROWS}
    assert list(ratios) == list(ROWS)
    assert all(map(math.isfinite, ratios.values())), ended.stdout
    assert os.listdir(tmp_path) == []


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["upstream"]:
            serve_upstream(8001)
        case ["upstream", given_port]:
            serve_upstream(int(given_port))
        case ["bench"]:
            bench(BenchPlan())
        case ["bench", "--quick"]:
            bench(BenchPlan(1, 0.2, 0.001, 0.1, (2,), 5.0, 0.0))
        case ["bench-upstream", given_port]:
            asyncio.run(serve_lean_upstream(int(given_port)))
        case _:
            sys.exit(__doc__)
