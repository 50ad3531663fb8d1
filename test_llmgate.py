"""The tests of llmgate: the real server on a socket, a stand-in vLLM on a socket, no mocks.

    pytest -q                                       all tests but the soak, under three minutes
    pytest -q -m soak                               ten minutes of mixed load
    python test_llmgate.py upstream [PORT]          the stand-in alone, for trying llmgate
                                                    without a model (PORT is 8001 if not given)

`LLMGATE_TEST_POSTGRES_URL` (postgresql+psycopg://user@/db?host=/socketdir) adds the tests that
need PostgreSQL. Each of them makes a database of its own and drops it. Those at the edge need nginx.

After every test the books are read: see `Gate.complaints`.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import functools
import gc
import gzip
import hashlib
import hmac
import http.client
import importlib.util
import io
import itertools
import json
import os
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
import threading
import time
import tomllib
import urllib.parse
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from email.message import Message
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import jwt
import pytest
import requests
import sqlalchemy
from requests.structures import CaseInsensitiveDict

import llmgate

with contextlib.suppress(ImportError):  # only the tests with PostgreSQL need it
    import psycopg

pytestmark = pytest.mark.filterwarnings("error")

with warnings.catch_warnings():  # there is no pytest.ini in which a mark could be registered
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    soak = pytest.mark.soak

JSONObject = dict[str, Any]
T = TypeVar("T")

HERE = Path(llmgate.__file__).resolve().parent
SENTENCE = (
    "Hello! I am a stand-in for vLLM: I say the same few words to everyone, one token at a time."
)
WORDS = SENTENCE.split()
PROMPT = "prompt-marker-5d1c"
ANSWER = "I say the same few words"
PASSWORD = "password-marker-88e0"
UPSTREAM_KEY = "upstream-key-marker-31f7"
JWT_SECRET = "secret-marker-2b60" + "0" * 32
FINGERPRINT = "vllm-0.32.0-b18e3f0e"
MAX_MODEL_LEN = 8192
CONTEXT_ERROR = (
    "This model's maximum context length is 8192 tokens. However, your prompt contains at least "
    "8193 input tokens, which exceeds this limit even without any output tokens. Please reduce "
    "the length of the input prompt. (parameter=input_tokens, value=8193)"
)
ENGINE_ERROR = "EngineCore encountered an issue. See stack trace (above) for the root cause."
# ---------------------------------------------------------------------------------------------
# The stand-in vLLM. Its bytes are those of vLLM 0.32 in three protocols; the model's name chooses
# its behaviour. It stops at once when its client hangs up or aborts the request, and counts a
# token when the event with it was written, or when it was made and nothing shows it.


@dataclass(frozen=True)
class Behaviour:
    """How the stand-in answers for one model."""

    most: int = 20  # completion tokens, unless max_tokens is less
    pace_s: float = 0.0  # before each token
    prefill_s: float = 0.0  # before the first token, when a stream's headers are out
    hidden: int = 0  # tokens at the beginning that nothing shows
    thinking: int = 0  # tokens at the beginning that are thoughts
    tool: bool = False  # the answer is a tool call of 69 tokens in 8 deltas
    cached: int = 0  # tokens of the prompt, at most
    usage: str = "true"  # or "none", or "bad"
    shape: str = ""  # what differs in the bytes
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
    "prefill": Behaviour(prefill_s=30),
    "thinking": Behaviour(most=60, pace_s=0.02, thinking=40),
    "hidden": Behaviour(most=200, pace_s=0.02, hidden=150),
    "tool": Behaviour(most=69, pace_s=0.02, tool=True),
    "badtool": Behaviour(most=69, tool=True, shape="badtool"),
    "cached": Behaviour(cached=128),
    "llama": Behaviour(cached=1, shape="llama"),  # llama-server's bytes
    "v33": Behaviour(shape="v33"),  # vLLM 0.33's response.incomplete
    "nousage": Behaviour(usage="none"),
    "badusage": Behaviour(usage="bad"),
    "nostreamopts": Behaviour(pace_s=0.02, shape="nostreamopts"),
    "silent": Behaviour(fault="silence"),
    "die": Behaviour(fault="cut"),
    "dieclean": Behaviour(fault="clean end"),
    "midstream": Behaviour(fault="error event"),
    "e400": Behaviour(fault=f"400 {CONTEXT_ERROR}"),
    "e401": Behaviour(fault="401"),
    "e500": Behaviour(fault=f"500 {ENGINE_ERROR}"),
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
ERROR_TYPES = {400: "BadRequestError", 429: "RateLimitError", 500: "InternalServerError"}
ABORT_PATH = "/inference/v1/abort_requests"
RENDER_PATH = "/v1/responses/render"
COUNT_PATH = "/v1/messages/count_tokens"
FREE_PATHS = ("/tokenize", ABORT_PATH, RENDER_PATH, COUNT_PATH)
FOREIGN_FIELDS = {
    "/v1/completions": ["messages", "input"],
    "/v1/embeddings": ["prompt"],
    "/v1/responses": ["messages", "prompt", "n", "stream_options"],
    "/v1/messages": ["prompt", "input", "n", "stream_options"],
}
WHOLE_ANSWERS = {
    "401": (401, b'{"error":"Unauthorized"}', "application/json"),
    "html": (200, b"<html>hello</html>", "text/html"),
    "half a body": (200, b'{"id":"chatcmpl-1","choices":[', "application/json"),
    "empty body": (200, b"", "application/json"),
}
TOOL_NAME = "get_weather"
TOOL_ID = "chatcmpl-tool-84a3943ff78ff3b4"
TOOL_ARGUMENTS = ["{", '"', "city", '":', ' "', "Rome", '"', "}"]  # a token in eight shows one
SCALE_OUT_ERROR = (
    "Scale-out endpoints are disabled. Restart with --enable-scale-out to enable them."
)
BAD_TOOL_ERROR = (
    "1 validation error for AnthropicContentBlock\ninput\n  Input should be a dictionary"
)
MISSING = "1 validation error:\n  {{'type': 'missing', 'loc': 'body.{}', 'msg': 'Field required'}}"


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
    tokens: int = 0  # prompt and completion, shown or not
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
        self.prefill_s = 0.0  # of models without one of their own
        self.idle_s = idle_s
        self.redirect_to = ""
        self.scale_out: bool | None = False  # has abort_requests; None: never heard of it
        self.serves = frozenset(BEHAVIOURS)  # the models in its list, other names too
        self.keeps_bytes = True  # of the answers, for tests that compare them
        self.exchanges: list[Exchange] = []
        self.connections: set[socket.socket] = set()
        self.unfinished: set[Answer] = set()  # those that are being made
        self.lock = threading.Lock()  # nobody rings a bell that is gone

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

    @contextlib.contextmanager
    def abortable(self, answer: Answer) -> Iterator[int]:
        """Let abort_requests end `answer`; yield the descriptor that is readable then."""
        answer.bell = os.eventfd(0)
        with self.lock:
            self.unfinished.add(answer)
        try:
            yield answer.bell
        finally:
            with self.lock:
                self.unfinished.remove(answer)
            os.close(answer.bell)

    def abort(self, request_ids: list[str]) -> None:
        """End the answers all of whose ids were named; others are not told apart."""
        with self.lock:
            for answer in self.unfinished:
                if answer.ids and not answer.ids.difference(request_ids):
                    os.eventfd_write(answer.bell, 1)
                answer.ids.difference_update(request_ids)

    def asked(self) -> list[Exchange]:
        """Return the requests that cost something: all but counts, aborts and looks."""
        return [x for x in self.exchanges if x.method == "POST" and x.path not in FREE_PATHS]

    def aborts(self) -> list[str]:
        """Return the request ids that were to be aborted, in order."""
        bodies = [x.json() for x in list(self.exchanges) if x.path == ABORT_PATH]
        return [name for body in bodies for name in body["request_ids"]]

    def running(self) -> int:
        """Return how many requests are being answered."""
        return sum(x.closed_at is None for x in self.exchanges)

    def tokens(self) -> dict[str, int]:
        """Return the tokens made for each X-Request-Id."""
        counts: Counter[str] = Counter()
        for x in list(self.exchanges):
            counts[x.headers.get("X-Request-Id", "")] += x.tokens
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
        self.watched = select.poll()
        self.watched.register(self.connection, select.POLLRDHUP)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer one request and note its end, whatever happened."""
        self.connection.settimeout(None)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.path = self.path.partition("?")[0]
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
        scale_out = self.server.scale_out
        match (self.command, self.path):
            case ("GET", "/health"):
                self.reply(200, b"", "")
            case ("GET", "/v1/models"):
                self.reply_json(200, {"object": "list", "data": self.models()})
            case ("POST", path) if path in PROTOCOLS:
                self.generate(self.parse())
            case ("POST", "/v1/embeddings"):
                self.embed(self.parse())
            case ("POST", path) if path == COUNT_PATH:
                count = sum(prompt_tokens(self.parse()))
                about = {"context_management": {"original_input_tokens": count}}
                self.reply_json(200, {"input_tokens": count} | about)
            case ("POST", "/tokenize"):
                body = self.parse()
                body.pop("documents", None)  # it does not know all that the template renders
                count = sum(prompt_tokens(body))
                answer = {"count": count, "max_model_len": MAX_MODEL_LEN, "token_strs": None}
                ids = list(range(min(count, MAX_MODEL_LEN)))
                self.reply_json(200, answer | {"tokens": ids})
            case ("POST", path) if path in (ABORT_PATH, RENDER_PATH) and scale_out is False:
                raise Refused(403, SCALE_OUT_ERROR, "PermissionDeniedError", None)
            case ("POST", path) if path == RENDER_PATH and scale_out:
                ids = list(range(sum(prompt_tokens(self.parse()))))
                self.reply_json(200, {"request_id": "resp_0", "token_ids": ids})
            case ("POST", path) if path == ABORT_PATH and scale_out:
                self.server.abort(self.exchange.json()["request_ids"])
                self.reply(200, b"", "")
            case _:
                self.reply_json(404, {"detail": "Not Found"})

    def models(self) -> list[JSONObject]:
        """Return vLLM's model list; `root` is a path on its disk."""
        serves = self.server.serves
        names = [name for name in BEHAVIOURS if name in serves] + [*serves - BEHAVIOURS.keys()]
        about = {"object": "model", "created": 1795332929, "owned_by": "vllm", "parent": None}
        about["permission"] = [{"id": "modelperm-8d6a", "object": "model_permission"}]
        contexts = {name: BEHAVIOURS.get(name, Behaviour()).max_model_len for name in names}
        return [
            {"id": name, "root": f"/models/{name}", "max_model_len": contexts[name]} | about
            for name in names
        ]

    def parse(self) -> JSONObject:
        """Return the body, or refuse it with vLLM's words."""
        try:
            body = json.loads(self.exchange.body)
        except ValueError:
            raise Refused(400, "1 validation error: json_invalid", "Bad Request", "body") from None
        if not isinstance(body, dict):
            raise Refused(400, "1 validation error: dict_type", "Bad Request", "body")
        for name in FOREIGN_FIELDS.get(self.path, []):  # vLLM reads an endpoint's own fields only
            body.pop(name, None)
        model = body.get("model")
        if model is None and self.path.startswith("/v1/messages"):
            raise Refused(400, MISSING.format("model"), "Bad Request", "body.model")
        model = model or "ok"
        if model not in BEHAVIOURS and model not in self.server.serves:
            words = f"The model `{model}` does not exist. Valid aliases: ok."
            raise Refused(404, words, "NotFoundError", "model")
        return body | {"model": model}

    def generate(self, body: JSONObject) -> None:
        """Answer a chat, a completion, a message or a response, plain or streamed."""
        behaviour = BEHAVIOURS.get(body["model"], Behaviour())
        if self.strange_answer(behaviour.fault):
            return
        name = self.headers.get("X-Request-Id", "")
        answer = PROTOCOLS[self.path](body, behaviour, name)
        answer.pace_s = behaviour.pace_s or self.server.pace_s
        with self.server.abortable(answer) as bell:
            self.watched.register(bell, select.POLLIN)
            try:
                write = self.stream if body.get("stream") is True else self.plain
                write(answer)
            finally:
                self.watched.unregister(bell)

    def strange_answer(self, fault: str) -> bool:
        """Give the answer of a faulty upstream; return whether there was one."""
        match fault:
            case "redirect":
                self.reply(307, b"", "", f"location: {self.server.redirect_to}{self.path}\r\n")
            case whole if whole in WHOLE_ANSWERS:
                self.reply(*WHOLE_ANSWERS[whole])
            case "no HTTP":
                self.wfile.write(b"+OK hello\r\n\r\n")
                self.close_connection = True
            case "endless line":
                self.start_stream()
                while True:
                    self.chunk(b"x" * 65536)
            case error if error[:3].isdigit():
                status = int(error[:3])
                param = "input_tokens" if status == 400 else None
                self.refuse(status, error[4:], ERROR_TYPES[status], param)
            case _:
                return False
        return True

    def plain(self, answer: Answer) -> None:
        """Write one whole answer after the time its tokens take."""
        fault = answer.behaviour.fault
        self.prefill(answer)
        if fault == "silence":
            answer.aborted = not self.wait(None)
        while answer.made < answer.count * answer.choices and self.make_token(answer):
            self.exchange.tokens = answer.prompt + answer.made
        self.exchange.tokens = answer.prompt + answer.made
        body = dump(answer.whole())
        if fault in ("cut", "clean end"):
            self.write_head(200, "application/json", f"content-length: {len(body)}\r\n")
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        headers = "set-cookie: session=1; Path=/\r\n" if fault == "cookie" else ""
        if fault == "gzip":
            body, headers = gzip.compress(body), "content-encoding: gzip\r\n"
        self.reply(200, body, "application/json", headers)

    def stream(self, answer: Answer) -> None:
        """Write the events of each token, each as one chunk, at the model's pace."""
        self.start_stream()
        fault = answer.behaviour.fault
        lumps = b": keep-alive\n\n" if answer.body["model"] == "lumpy" else b""
        for number, (token, events) in enumerate(answer.events()):
            if number == answer.greetings:
                self.prefill(answer)
            if token and fault and answer.made == 3 * answer.choices:
                if fault != "silence":
                    self.fail(answer, fault)
                    return
                answer.aborted = not self.wait(None)
            if token and not self.make_token(answer):
                continue
            if lumps:
                lumps += events
                for _ in range(len(lumps) // 700):
                    self.chunk(lumps[:700])
                    lumps = lumps[700:]
            else:
                for event in events.split(b"\n\n")[:-1]:
                    self.chunk(event + b"\n\n")
            self.exchange.tokens = answer.prompt + answer.made
        if lumps + answer.end:
            self.chunk(lumps + answer.end)
        self.wfile.write(b"0\r\n\r\n")

    def fail(self, answer: Answer, fault: str) -> None:
        """End a stream after three tokens in one of the ways that upstreams do."""
        if fault == "cut":
            self.wfile.write(b'ff\r\ndata: {"id":')
        elif fault == "error event" and answer.failure:
            self.chunk(answer.failure)
        if fault == "cut" or (fault == "error event" and not answer.failure):
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def embed(self, body: JSONObject) -> None:
        """Answer with one short vector per input."""
        counts = prompt_tokens(body)
        vector = {"object": "embedding", "embedding": [0.25, -0.5]}
        vectors = [{"index": index} | vector for index in range(len(counts))]
        answer = {"id": "embd-1", "object": "list", "created": 1795332949, "model": body["model"]}
        usage = {"prompt_tokens": sum(counts), "total_tokens": sum(counts), "completion_tokens": 0}
        self.reply_json(200, answer | {"data": vectors, "usage": usage})
        self.exchange.tokens = sum(counts)

    def prefill(self, answer: Answer) -> None:
        """Let the time pass that the prompt takes."""
        answer.aborted = not self.wait(answer.behaviour.prefill_s or self.server.prefill_s)
        answer.due = time.monotonic()

    def make_token(self, answer: Answer) -> bool:
        """Let the time pass that a token takes; return False when the answer was aborted."""
        answer.due += answer.pace_s / answer.choices
        if not answer.aborted:
            answer.aborted = not self.wait(max(0.0, answer.due - time.monotonic()))
        answer.made += not answer.aborted
        return not answer.aborted

    def wait(self, seconds: float | None) -> bool:
        """Let time pass (None: for ever); return False when aborted, raise at a hang-up."""
        happened = self.watched.poll(None if seconds is None else seconds * 1000)
        if any(number == self.connection.fileno() for number, _ in happened):
            raise ConnectionAbortedError
        return not happened

    def refuse(self, status: int, message: str, type: str, param: str | None) -> None:
        """Write vLLM's error object; on /v1/messages it is Anthropic's, but not of a wrong type."""
        error: JSONObject = {"message": message, "type": type, "param": param, "code": status}
        body: JSONObject = {"error": error}
        if self.path.startswith("/v1/messages") and type != "Bad Request":
            body = {"type": "error", "error": {"type": type, "message": message}}
        self.reply_json(status, body)

    def reply_json(self, status: int, body: JSONObject) -> None:
        """Write `body` as vLLM writes JSON."""
        self.reply(status, dump(body), "application/json")

    def reply(self, status: int, body: bytes, content_type: str, headers: str = "") -> None:
        """Write one whole answer."""
        self.write_head(status, content_type, f"content-length: {len(body)}\r\n{headers}")
        self.exchange.sent.append((time.monotonic(), body))
        if self.command != "HEAD":
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
    """What the stand-in says to a chat or a completion; refuses what vLLM refuses."""

    greetings = 0  # events before the prefill
    end = b"data: [DONE]\n\n"
    bell = -1  # rings when the answer is aborted
    pace_s = 0.0
    due = 0.0  # when the last token was made
    made = 0  # tokens, of all choices
    aborted = False

    def __init__(
        self, body: JSONObject, behaviour: Behaviour, name: str = "", *, chat: bool
    ) -> None:
        """Read the fields that matter; `name` is the X-Request-Id, `chat` tells the endpoint."""
        self.chat = chat
        id = f"{'chatcmpl' if chat else 'cmpl'}-{name or random.getrandbits(64)}"
        object = "chat.completion" if chat else "text_completion"
        self.head: JSONObject = {"id": id, "object": object, "created": int(time.time())}
        self.head["model"] = body["model"]
        asked = body.get("max_completion_tokens")
        bound = "max_tokens" if asked is None else "max_completion_tokens"
        self.read(body, behaviour, "messages" if chat else "prompt", bound)
        self.ids = {id} if chat else {f"{id}-{part}" for part in range(len(self.prompts))}
        error = {"message": ENGINE_ERROR, "type": "InternalServerError", "param": None}
        self.failure = event_of({"error": error | {"code": 500}}) + self.end

    def read(self, body: JSONObject, behaviour: Behaviour, prompt: str, bound: str) -> None:
        """Read what all protocols have; `prompt` and `bound` are the names of their fields."""
        if not body.get(prompt):
            raise Refused(400, MISSING.format(prompt), "Bad Request", f"body.{prompt}")
        self.body, self.behaviour = body, behaviour
        self.options = body.get("stream_options") or {}
        self.prompts = prompt_tokens(body)
        self.prompt = sum(self.prompts)
        self.choices = whole_number(body, "n", 1) * len(self.prompts)
        self.cached = min(behaviour.cached, self.prompt - 1)
        self.pieces = self.text()
        self.asked = whole_number(body, bound, behaviour.max_model_len)
        self.count = min(self.asked, len(self.pieces))
        most = behaviour.max_model_len
        if self.asked > most:
            words = (
                f"{bound}={self.asked} cannot be greater than max_model_len={most}. "
                f"Please request fewer output tokens. (parameter={bound}, value={self.asked})"
            )
            raise Refused(400, words, "BadRequestError", bound)
        if self.prompt >= most:
            raise Refused(400, CONTEXT_ERROR, "BadRequestError", "input_tokens")
        if self.options and self.body.get("stream") is not True:
            words = "Stream options can only be defined when `stream=True`."
            raise Refused(400, words, "BadRequestError", "stream_options")
        if self.behaviour.shape == "nostreamopts" and "continuous_usage_stats" in self.options:
            words = "1 validation error: continuous_usage_stats: Extra inputs are not permitted"
            raise Refused(400, words, "Bad Request", "body.stream_options")

    def text(self) -> list[str]:
        """Return the tokens of one choice; an empty one shows nothing."""
        most, hidden = self.behaviour.most, self.behaviour.hidden
        if self.body["model"] == "echo":
            said = "".join(prompt_texts(self.body))
            return [said[at : at + 8] for at in range(0, len(said), 8)]
        if self.behaviour.tool:
            shown = iter(TOOL_ARGUMENTS)
            return [next(shown, "") if at % 8 == 7 else "" for at in range(most)]
        words = itertools.cycle(WORDS)
        return [""] * hidden + [next(words) + " " for _ in range(most - hidden)]

    def piece(self, position: int) -> str:
        """Return one token; of `paced` with the prompt's last word and the time."""
        if self.body["model"] == "paced":
            return f"{prompt_texts(self.body)[-1].split()[-1]} {time.monotonic():.6f} "
        return self.pieces[position]

    def kind(self, position: int) -> str:
        """Return what the token is part of."""
        if self.behaviour.tool:
            return "tool"
        return "thinking" if position < self.behaviour.thinking else "text"

    def parts(self) -> dict[str, str]:
        """Return what one choice has said so far, by kind."""
        made = itertools.groupby(range(self.made // self.choices), self.kind)
        return {kind: "".join(map(self.piece, positions)) for kind, positions in made}

    def steps(self) -> Iterator[tuple[int, int]]:
        """Yield position and choice of each token in turn, until the end or an abort."""
        for step in itertools.product(range(self.count), range(self.choices)):
            if self.aborted:
                return
            yield step

    def finish_reason(self) -> str:
        """Return why the answer ends, in the words of chat."""
        if self.aborted:
            return "abort"
        if self.count == self.asked:
            return "length"
        return "tool_calls" if self.behaviour.tool else "stop"

    def usage(self, completion: int) -> JSONObject:
        """Return the usage block of chat and completions."""
        usage: JSONObject = {"prompt_tokens": self.prompt, "total_tokens": self.prompt + completion}
        usage["completion_tokens"] = completion
        if self.cached:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached}
        return self.told(usage)

    def told(self, usage: JSONObject) -> JSONObject:
        """Return what the model tells of the usage: all, nothing, or nonsense."""
        nonsense = dict(zip(usage, (-5, 1e30, "9"), strict=False))
        return {"true": usage, "none": {}, "bad": nonsense}[self.behaviour.usage]

    def whole(self) -> JSONObject:
        """Return the plain answer, its keys in vLLM's order."""
        said = self.parts()
        message: JSONObject = {"role": "assistant", "content": said.get("text", "")}
        message |= {"refusal": None, "annotations": None, "audio": None, "function_call": None}
        if "tool" in said:
            function = {"name": TOOL_NAME, "arguments": said["tool"]}
            message["tool_calls"] = [{"id": TOOL_ID, "type": "function", "function": function}]
        message["reasoning"] = said.get("thinking")
        content = {"message": message} if self.chat else {"text": said.get("text", "")}
        end = {"logprobs": None, "finish_reason": self.finish_reason(), "stop_reason": None}
        choices = [{"index": index} | content | end for index in range(self.choices)]
        answer = self.head | {"choices": choices, "service_tier": None}
        answer["system_fingerprint"] = FINGERPRINT
        if self.behaviour.usage != "none":
            answer["usage"] = self.usage(self.made) | {"completion_tokens_details": None}
        return answer | {"kv_transfer_params": None, "metrics": None}

    def events(self) -> Iterator[tuple[int, bytes]]:
        """Yield what is to be written, with 1 if it brings a token; a hidden token is b""."""
        include = self.options.get("include_usage") is True and self.behaviour.usage != "none"
        continuous = include and self.options.get("continuous_usage_stats") is True
        if self.chat:
            self.head["object"] = "chat.completion.chunk"
            count = 0 if continuous else None
            delta = {"role": "assistant", "content": ""}
            for index in range(self.choices):
                choice: JSONObject = {"index": index, "delta": delta}
                choice |= {"logprobs": None, "finish_reason": None}
                yield 0, self.event(choice, count, prompt_token_ids=None, prompt_text=None)
        for position, index in self.steps():
            last = position == self.count - 1
            end = {"system_fingerprint": FINGERPRINT} if last and not include else {}
            count = position + 1 if continuous else None
            shown = last or self.pieces[position]
            yield 1, self.event(self.token(index, position), count, **end) if shown else b""
        if self.aborted and self.made:
            count = self.made // self.choices if continuous else None
            for index in range(self.choices):
                choice = (
                    {"index": index, "delta": {}} if self.chat else {"index": index, "text": ""}
                )
                choice |= {"logprobs": None, "finish_reason": "abort", "stop_reason": None}
                yield 0, self.event(choice, count)
        if include:
            body = self.head | {"choices": [], "usage": self.usage(self.made)}
            yield 0, event_of(body | {"system_fingerprint": FINGERPRINT})

    def event(self, choice: JSONObject, count: int | None, **end: object) -> bytes:
        """Return one event; its usage counts the tokens of this choice only, as vLLM's."""
        body = self.head | {"choices": [choice]}
        if count is not None:
            body["usage"] = self.usage(count) | {"completion_tokens_details": None}
        return event_of(body | end)

    def typed(self, type: str, **fields: object) -> bytes:
        """Return an event of the other protocols."""
        return f"event: {type}\n".encode() + event_of({"type": type} | fields)

    def token(self, index: int, position: int) -> JSONObject:
        """Return the choice with one token; the last one says why it ended."""
        said = self.piece(position)
        delta: JSONObject = {"reasoning" if self.kind(position) == "thinking" else "content": said}
        if self.behaviour.tool:
            function = {"name": TOOL_NAME} if said == TOOL_ARGUMENTS[0] else {}
            delta = {"tool_calls": [{"index": 0, "function": function | {"arguments": said}}]}
        choice: JSONObject = {"index": index}
        choice |= {"delta": delta} if self.chat else {"text": said}
        choice |= {"logprobs": None, "finish_reason": None}
        if position == self.count - 1:
            choice |= {"finish_reason": self.finish_reason(), "stop_reason": None}
        return choice | {"token_ids": None}


class MessageAnswer(Answer):
    """What the stand-in says at /v1/messages."""

    end = b""

    def __init__(self, body: JSONObject, behaviour: Behaviour, name: str = "") -> None:
        """Read the fields that matter."""
        self.id = f"chatcmpl-{name or random.getrandbits(64)}"
        self.ids = {self.id}
        if "max_tokens" not in body:
            raise Refused(400, MISSING.format("max_tokens"), "Bad Request", "body.max_tokens")
        self.read(body, behaviour, "messages", "max_tokens")
        self.failure = self.typed("error", error={"type": "internal_error", "message": "model"})

    def counts(self, output: int, *, start: bool = False) -> JSONObject:
        """Return the usage; vLLM tells the cached part at the end, llama-server at the start."""
        llama = self.behaviour.shape == "llama"
        if llama and not start:
            return self.told({"output_tokens": output})
        usage = {"input_tokens": self.prompt, "output_tokens": output}
        if self.cached and (llama or not start):
            usage["input_tokens"] -= self.cached
            usage |= {"cache_creation_input_tokens": 0, "cache_read_input_tokens": self.cached}
        return self.told(usage)

    def stop_reason(self) -> str | None:
        """Return why the answer ends, in Anthropic's words."""
        if self.aborted:
            return None if self.made else "end_turn"
        reasons = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
        return reasons[self.finish_reason()]

    def block(self, kind: str, said: str) -> JSONObject:
        """Return a content block."""
        if kind == "tool":
            tool = {"type": "tool_use", "id": TOOL_ID, "name": TOOL_NAME}
            return tool | {"input": json.loads(said or "{}")}
        return {"type": kind, kind: said}

    def whole(self) -> JSONObject:
        """Return the plain answer; an unlucky forced tool is refused when all was generated."""
        forced = self.body.get("tool_choice", {}).get("type") == "tool"
        if forced and self.behaviour.shape == "badtool":
            raise Refused(400, BAD_TOOL_ERROR, "BadRequestError", None)
        said = self.parts()
        if self.made < self.behaviour.most:
            said.pop("tool", None)  # half a call is none
        blocks = [self.block(kind, text) for kind, text in said.items()]
        answer: JSONObject = {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "content": blocks,
        }
        answer |= {"model": self.body["model"], "stop_reason": self.stop_reason()}
        usage = self.counts(0, start=True) | self.counts(self.made)
        return answer | ({"usage": usage} if usage else {})

    def events(self) -> Iterator[tuple[int, bytes]]:
        """Yield what is to be written, with 1 if it brings a token; a hidden token is b""."""
        start: JSONObject = {"id": self.id, "type": "message", "role": "assistant", "content": []}
        start |= {"model": self.body["model"], "stop_reason": None, "stop_sequence": None}
        yield 0, self.typed("message_start", message=start | {"usage": self.counts(0, start=True)})
        yield from part_events(self)
        stop = {"stop_reason": self.stop_reason(), "stop_sequence": None}
        yield 0, self.typed("message_delta", delta=stop, usage=self.counts(self.made))
        yield 0, self.typed("message_stop")

    def begins(self, kind: str, number: int) -> bytes:
        """Return the event before a block's first token."""
        return self.typed("content_block_start", content_block=self.block(kind, ""), index=number)

    def brings(self, kind: str, number: int, said: str) -> bytes:
        """Return the event with a token."""
        call = {"type": "input_json_delta", "partial_json": said}
        delta = call if kind == "tool" else {"type": f"{kind}_delta", kind: said}
        return self.typed("content_block_delta", delta=delta, index=number)

    def ends(self, kind: str, number: int, text: str) -> bytes:
        """Return the events after a block's last token; thoughts are signed."""
        end = self.typed("content_block_stop", index=number)
        if kind == "thinking":
            delta = {"type": "signature_delta", "signature": "d93efc2743fb4bb4b808b2717a6986be"}
            end = self.typed("content_block_delta", delta=delta, index=number) + end
        return end


class ResponseAnswer(Answer):
    """What the stand-in says at /v1/responses."""

    greetings = 1
    end = failure = b""  # when the engine dies the bytes just stop

    def __init__(self, body: JSONObject, behaviour: Behaviour, name: str = "") -> None:
        """Read the fields that matter; `name` is ignored as by vLLM, the body has the id."""
        self.id = body.get("request_id") or f"resp_{name or random.getrandbits(64)}"
        self.ids = {f"{self.id}_0"}
        self.created = int(time.time())
        self.sequence = itertools.count()
        self.read(body, behaviour, "input", "max_output_tokens")

    def typed(self, type: str, **fields: object) -> bytes:
        """Return one event, its type last; llama-server says it first and does not count."""
        body = fields | {"sequence_number": next(self.sequence), "type": type}
        if self.behaviour.shape == "llama":
            body = {"type": type} | fields
        return f"event: {type}\n".encode() + event_of(body)

    def response(self, status: str, output: list[JSONObject], usage: object) -> JSONObject:
        """Return the object that every answer and three events have."""
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        body = {"id": self.id, "created_at": self.created, "incomplete_details": reason}
        body |= {"instructions": self.body.get("instructions"), "metadata": None}
        body |= {"model": self.body["model"], "object": "response", "output": output}
        body |= {"tool_choice": "auto", "tools": self.body.get("tools", [])}
        body |= {"background": False, "max_output_tokens": self.asked}
        body |= {"previous_response_id": None, "status": status, "truncation": "disabled"}
        return body | {"usage": usage, "user": None}

    def whole(self) -> JSONObject:
        """Return the plain answer."""
        status = "incomplete" if self.finish_reason() == "length" else "completed"
        said = enumerate(self.parts().items())
        output = [self.item(kind, number, text) for number, (kind, text) in said]
        cached = {"cached_tokens": self.cached, "cached_tokens_per_turn": []}
        usage = {"input_tokens": self.prompt, "input_tokens_details": cached}
        turns = {"reasoning_tokens": 0, "output_tokens_per_turn": []}
        usage |= {"output_tokens": self.made, "output_tokens_details": turns}
        usage |= {"total_tokens": self.prompt + self.made}
        return self.response(status, output, self.told(usage) or None)

    def events(self) -> Iterator[tuple[int, bytes]]:
        """Yield what is to be written, with 1 if it brings a token; a hidden token is b""."""
        started = self.response("in_progress", [], None)
        types = ("response.created", "response.in_progress")
        yield 0, b"".join(self.typed(type, response=started) for type in types)
        yield from part_events(self)
        final = self.whole()
        last = final["status"] if self.behaviour.shape == "v33" else "completed"
        yield 0, self.typed(f"response.{last}", response=final)

    def item(self, kind: str, number: int, said: str | None) -> JSONObject:
        """Return an item of the output; without a text it is in progress."""
        status = "in_progress" if said is None else "completed"
        item: JSONObject = {"id": f"item_{number}", "status": status}
        if kind == "tool":
            call = {"type": "function_call", "name": TOOL_NAME, "call_id": TOOL_ID}
            return item | call | {"arguments": said or ""}
        content = [] if said is None else [self.part(kind, said)]
        if kind == "thinking":
            return item | {"type": "reasoning", "summary": [], "content": content}
        return item | {"type": "message", "role": "assistant", "content": content}

    def part(self, kind: str, said: str) -> JSONObject:
        """Return the content of an item."""
        return {"annotations": [], "text": said, "type": DELTAS[kind], "logprobs": None}

    def placed(self, type: str, kind: str, number: int, **fields: object) -> bytes:
        """Return an event about an item; that of a call has no content to count."""
        if kind != "tool":
            fields = {"content_index": 0} | fields
        fields |= {"item_id": f"item_{number}", "output_index": number}
        return self.typed(f"response.{type}", **fields)

    def begins(self, kind: str, number: int) -> bytes:
        """Return the events before an item's first token."""
        item = self.item(kind, number, None)
        events = self.typed("response.output_item.added", item=item, output_index=number)
        if kind != "tool":
            part = self.part(kind, "")
            events += self.placed("content_part.added", kind, number, part=part)
        return events

    def brings(self, kind: str, number: int, said: str) -> bytes:
        """Return the event with a token."""
        return self.placed(f"{DELTAS[kind]}.delta", kind, number, delta=said)

    def ends(self, kind: str, number: int, text: str) -> bytes:
        """Return the events after an item's last token; each tells all of it once more."""
        name = "arguments" if kind == "tool" else "text"
        events = self.placed(f"{DELTAS[kind]}.done", kind, number, **{name: text})
        if kind != "tool":
            part = self.part(kind, text)
            events += self.placed("content_part.done", kind, number, part=part)
        item = self.item(kind, number, text)
        return events + self.typed("response.output_item.done", item=item, output_index=number)


DELTAS = {"thinking": "reasoning_text", "text": "output_text", "tool": "function_call_arguments"}


def part_events(answer: MessageAnswer | ResponseAnswer) -> Iterator[tuple[int, bytes]]:
    """Yield, as `events` does, how each part begins, brings its tokens, and ends."""
    kind, number, text = "", -1, ""
    for position, _ in answer.steps():
        said, now, events = answer.piece(position), answer.kind(position), b""
        new = now != kind
        if said and new and kind:
            events += answer.ends(kind, number, text)
        if said and new:
            events += answer.begins(now, number + 1)
        if said:
            events += answer.brings(now, number + new, said)
        yield 1, events
        if said and not answer.aborted:
            kind, number, text = now, number + new, said if new else text + said
    if kind:
        yield 0, answer.ends(kind, number, text)


PROTOCOLS: dict[str, Callable[[JSONObject, Behaviour, str], Answer]] = {
    "/v1/chat/completions": functools.partial(Answer, chat=True),
    "/v1/completions": functools.partial(Answer, chat=False),
    "/v1/messages": MessageAnswer,
    "/v1/responses": ResponseAnswer,
}


def event_of(body: JSONObject) -> bytes:
    """Return one event."""
    return b"data: " + dump(body) + b"\n\n"


def dump(value: JSONObject) -> bytes:
    """Return `value` as vLLM writes it: no spaces, raw UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


PICTURES = {"image", "image_url", "input_image", "input_file"}
TEXTS = ("content", "text", "thinking", "arguments", "output")  # the fields that hold words


def text_of(part: Any) -> str:
    """Return the words of a message, of a block or of a list; a picture is 256 tokens."""
    if isinstance(part, list):
        return "".join(map(text_of, part))
    if isinstance(part, dict):
        picture = part.get("type") in PICTURES
        return "x" * 1024 if picture else "".join(text_of(part.get(name)) for name in TEXTS)
    return part if isinstance(part, str) else ""


def prompt_texts(body: JSONObject) -> list[str]:
    """Return the texts of all messages, prompts or inputs; a list of ids is one, of that size."""
    if "messages" in body:
        if not all(isinstance(message, dict) for message in body["messages"]):
            raise Refused(400, "1 validation error: dict_type", "Bad Request", "body.messages")
        return [text_of(message) for message in body["messages"]]
    prompt = body.get("prompt", body.get("input")) or ""
    if not isinstance(prompt, list) or isinstance(prompt[0], int):
        prompt = [prompt]
    return ["four" * len(p) if isinstance(p, list) else text_of(p) for p in prompt]


def prompt_tokens(body: JSONObject) -> list[int]:
    """Count the prompts' tokens: a quarter of the bytes, never less than ten; messages are one."""
    texts = prompt_texts(body)
    prompt = body.get("prompt", body.get("input"))
    if "messages" in body or (isinstance(prompt, list) and isinstance(prompt[0], dict)):
        texts = ["".join(texts)]
    around = text_of([body.get("system"), body.get("instructions")])
    rendered = [body[name] for name in ("tools", "documents") if body.get(name)]
    around += json.dumps(rendered) if rendered else ""
    return [max(10, len((around + text).encode()) // 4) for text in texts]


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
    for model, behaviour in BEHAVIOURS.items():  # the context that a coding agent needs
        BEHAVIOURS[model] = replace(behaviour, max_model_len=131072)
    server = Upstream(port, pace_s=0.08)
    server.scale_out = True
    print(
        f"A stand-in vLLM serves on {server.url}/v1; no model inside. Ctrl-C ends it.", flush=True
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
        columns = ", ".join(item.name for item in fields(UsageRow))
        rows = self.rows(f"SELECT {columns} FROM usage ORDER BY created_at, request_id")
        return [
            row for row in itertools.starmap(UsageRow, rows) if not user or row.user_id == user.id
        ]

    def row(self, reply: Reply) -> UsageRow:
        """Return the final row of an answer, waiting until it is booked."""
        name = reply.headers["X-Request-Id"]
        wait_until(
            lambda: [r for r in self.usage() if r.request_id == name and r.status != "pending"]
        )
        return next(row for row in self.usage() if row.request_id == name)

    def last_row(self, user: User, timeout: float = 3.0) -> UsageRow:
        """Return the user's only row, waiting until it is booked."""
        wait_until(lambda: [r for r in self.usage(user) if r.status != "pending"], timeout)
        (row,) = self.usage(user)
        return row

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
    """Run one statement with `?` marks in SQLite or PostgreSQL; return its rows."""
    if database_url.startswith("sqlite"):
        path = database_url.removeprefix("sqlite:///")
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            return database.execute(sql, values).fetchall()
    with psycopg.connect(database_url.replace("+psycopg", "")) as connection:
        cursor = connection.execute(sql.replace("?", "%s").encode(), values)
        return cursor.fetchall() if cursor.description else []


def change(gate: Gate, sql: str, *values: object) -> None:
    """Write to the database of a gate behind its back."""
    query(gate.database_url, sql, *values)


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

    def drain(self, grace_s: float) -> None:
        """Begin to stop it, as SIGTERM does, in the middle of a test."""
        self.stopped = True
        self.server.drain(grace_s)

    def stop(self) -> None:
        """Drain it, unless the test did; nothing of it may be left."""
        if not self.stopped:
            self.drain(1)
        self.thread.join(10)
        assert not self.thread.is_alive(), "the gate did not stop"


class ProcessGate(Gate):
    """A gate as a user starts it: `python llmgate.py` in a directory."""

    def __init__(self, env: Mapping[str, str], directory: Path, upstream: Upstream) -> None:
        """Start it and wait for the line with its URL."""
        self.output = directory / "stdout"
        self.errors = directory / "stderr"
        program = [sys.executable, str(HERE / "llmgate.py")]
        options: Any = {
            "cwd": directory,
            "env": clean_env() | dict(env),
            "stdin": subprocess.DEVNULL,
        }
        with self.output.open("wb") as output, self.errors.open("ab") as errors:
            self.process = subprocess.Popen(program, stdout=output, stderr=errors, **options)
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

    def threads(self) -> int:
        """Return how many threads it has."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def resident_kb(self) -> int:
        """Return the memory that it holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0])

    def workers(self) -> set[int]:
        """Return its children's process ids: with PROCESSES they do the work."""
        pid = self.process.pid
        return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def clean_env() -> dict[str, str]:
    """Return this process's environment without any setting of llmgate."""
    names = {item.name.upper() for item in fields(llmgate.Settings)}
    return {name: value for name, value in os.environ.items() if name not in names}


def customized(directory: Path, code: str) -> dict[str, str]:
    """Return settings of a process that runs `code` before llmgate."""
    directory.mkdir(exist_ok=True)
    (directory / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(directory)}


def resources() -> Counter[str]:
    """Return the kinds of open descriptors and the running threads of this process."""
    found = Counter(re.sub(r"[-_]\d+", "", thread.name) for thread in threading.enumerate())
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[re.sub(r":\[\d+\]", "", os.readlink(f"/proc/self/fd/{number}"))] += 1
    return found


MakeGate = Callable[..., ThreadedGate]  # with settings, NAME=value
StartProcess = Callable[..., ProcessGate]  # likewise, after a directory
StartNginx = Callable[..., Gate]  # in front of gates


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
def make_gate(upstream: Upstream, tmp_path: Path) -> Iterator[MakeGate]:
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
    files = {
        "LOG_FILE": f"{directory}/server.log",
        "DATABASE_URL": f"sqlite:///{directory}/llmgate.db",
    }
    vllm = {"VLLM_ENDPOINT": upstream.url, "VLLM_API_KEY": UPSTREAM_KEY}
    return files | vllm | {"PORT": "0", "JWT_SECRET_KEY": JWT_SECRET, "THREADS": "100"}


@pytest.fixture
def gate(make_gate: MakeGate) -> ThreadedGate:
    """A gate with default settings and an empty database."""
    return make_gate()


@pytest.fixture
def start_process(upstream: Upstream, tmp_path: Path) -> Iterator[StartProcess]:
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
def postgres_env() -> Iterator[dict[str, str]]:
    """Settings of gates that share a fresh PostgreSQL database, which is dropped at the end."""
    url = os.environ.get("LLMGATE_TEST_POSTGRES_URL", "")
    if not url:
        pytest.skip("LLMGATE_TEST_POSTGRES_URL is not set: no PostgreSQL to test with")
    name = f"llmgate_test_{random.getrandbits(48):012x}"
    server = url.replace("+psycopg", "")
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        made = sqlalchemy.make_url(url).set(database=name).render_as_string(hide_password=False)
        yield {"DATABASE_URL": made, "JWT_SECRET_KEY": JWT_SECRET, "MAX_REQUESTS_PER_USER": "64"}
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())


@pytest.fixture(params=["sqlite", "postgresql"])
def shared_env(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """Settings of gates that share a database; as an argument it comes before `start_process`."""
    if request.param == "postgresql":
        return cast(dict[str, str], request.getfixturevalue("postgres_env"))
    return {"DATABASE_URL": f"sqlite:///{tmp_path / 'both.db'}", "JWT_SECRET_KEY": JWT_SECRET}


def start_two(
    start_process: StartProcess, env: dict[str, str], tmp_path: Path
) -> tuple[ProcessGate, ProcessGate]:
    """Start two gates side by side, each in a directory of its own."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    return start_process(tmp_path / "one", **env), start_process(tmp_path / "two", **env)


class Scripted(Upstream):
    """A stand-in for which a test writes each answer: `say(handler, body)` for every POST."""

    def __init__(
        self, say: Callable[[ScriptedHandler, JSONObject], None], *listed: JSONObject
    ) -> None:
        """Serve what is `listed`, or the model "ok"."""
        super().__init__()
        self.RequestHandlerClass = ScriptedHandler
        self.say = say
        self.listed = list(listed) or [{"id": "ok", "max_model_len": MAX_MODEL_LEN}]


class ScriptedHandler(UpstreamHandler):
    """One connection to it."""

    server: Scripted

    def route(self) -> None:
        """Let the test answer a POST, but for /tokenize of a model that the stand-in knows."""
        if self.command == "POST" and self.path != "/tokenize":
            self.server.say(self, json.loads(self.exchange.body))
        else:
            super().route()

    def models(self) -> list[JSONObject]:
        """Return the test's list."""
        return self.server.listed

    def say_whole(self, prompt: int = 10, completion: int = 1, **fields: object) -> None:
        """Answer a plain request, with these counts."""
        counts = {"prompt_tokens": prompt, "completion_tokens": completion}
        usage = counts | {"total_tokens": prompt + completion}
        choice = {"index": 0, "message": {"content": ANSWER}, "finish_reason": "stop"}
        self.exchange.tokens = prompt + completion
        self.reply_json(200, {"id": "c1", "choices": [choice], "usage": usage} | fields)

    def say_events(self, *events: bytes, tokens: int = 13) -> None:
        """Stream these events, and no [DONE] unless it is one of them."""
        self.start_stream()
        self.exchange.tokens = tokens
        for event in events:
            self.chunk(event + b"\n\n")
        self.wfile.write(b"0\r\n\r\n")


@contextlib.contextmanager
def scripted_gate(
    make_gate: MakeGate,
    say: Callable[[ScriptedHandler, JSONObject], None],
    *listed: JSONObject,
    **settings: str,
) -> Iterator[ThreadedGate]:
    """A gate in front of a scripted stand-in, whose books are right at the end."""
    with Scripted(say, *listed) as upstream:
        gate = make_gate(VLLM_ENDPOINT=upstream.url, **settings)
        gate.upstream = upstream
        yield gate
        gate.settle()


# ---------------------------------------------------------------------------------------------
# Verbs. A test says what it does in the words of the README.


Reply = requests.Response  # also of what came on a raw connection


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


def call(gate: Gate, method: str, path: str, bearer: str = "", **options: Any) -> requests.Response:
    """Send one request on a connection of its own; `options` as for `requests`."""
    headers = dict(options.pop("headers", {}))
    if bearer:
        headers["Authorization"] = f"Bearer {bearer}"
    options = {"timeout": 60, "allow_redirects": False} | options
    with requests.Session() as session:
        session.trust_env, session.verify = False, gate.verify
        answer = session.request(method, gate.url + path, headers=headers, **options)
    if answer.status_code >= 500:
        gate.seen_5xx.add(answer.status_code)
    return answer


def post_text(gate: Gate, path: str, bearer: str, body: str | bytes) -> requests.Response:
    """Post a body as it is written here, which may be no JSON, as JSON."""
    headers = {"Content-Type": "application/json"}
    return call(gate, "POST", path, bearer, data=body, headers=headers)


def command(
    directory: Path, env: Mapping[str, str], *arguments: str, stdin: str = "", status: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run `python llmgate.py ARGUMENTS` in a directory; fail unless it exits with `status`."""
    program = [sys.executable, str(HERE / "llmgate.py"), *arguments]
    options: Any = {"capture_output": True, "text": True, "timeout": 20, "input": stdin}
    env = clean_env() | dict(env)
    ended = subprocess.run(program, cwd=directory, env=env, check=False, **options)
    assert ended.returncode == status, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert PASSWORD not in ended.stdout + ended.stderr
    return ended


def run_command(gate: Gate, *arguments: str, stdin: str = "") -> str:
    """Run `python llmgate.py ARGUMENTS` beside a gate; return what it prints."""
    return command(gate.directory, gate.env, *arguments, stdin=stdin).stdout


def refusal(directory: Path, status: int = 2, **settings: str) -> str:
    """Start a gate that must refuse to; return the one line it says."""
    said = command(directory, {"PORT": "0"} | settings, status=status).stderr
    assert len(said.strip().splitlines()) == 1, said
    return said


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
    return post_text(gate, "/auth/token", "", body)


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


def longest_delay(gate: Gate, key: str) -> float:
    """Stream events that vLLM writes 300 ms apart; return the longest way of one, in seconds."""
    with chat(gate, key, "spaced", stream=True) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        received = [(time.monotonic(), event) for event in stream_events(response)]
        row = gate.row(response)
    assert received[-1][1] == b"data: [DONE]\n\n"
    assert (row.stream, row.status, row.estimated) == (1, "ok", 0)
    assert (row.prompt_tokens, row.completion_tokens) == (10, 4)
    events = gate.upstream.asked()[-1].sent
    sent = [at for at, event in events if b'"choices":[],' not in event]
    return max(there - here for (there, _), here in zip(received, sent, strict=True))


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


def read_reply(connection: socket.socket, method: str = "GET") -> Reply:
    """Read one answer to a request of this method from a raw connection."""
    reply = Reply()
    with contextlib.closing(http.client.HTTPResponse(connection, method=method)) as response:
        response.begin()
        reply.status_code, reply.headers = (
            response.status,
            CaseInsensitiveDict(response.getheaders()),
        )
        reply.raw = io.BytesIO(response.read())
    return reply


def send_raw(gate: Gate, *pieces: bytes) -> Reply:
    """Send bytes on a connection of their own and read one answer."""
    with connected(gate) as connection:
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            for piece in pieces:
                connection.sendall(piece)
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


def wait_for_rows(gate: Gate, count: int) -> None:
    """Wait until so many requests were booked as begun."""
    wait_until(lambda: gate.rows("SELECT count(*) FROM usage") >= [(count,)], 10)


LEAKS = re.compile(
    r"Traceback|\.py\b|File \"|SELECT |INSERT |UPDATE |sqlite|psycopg|sqlalchemy|urllib3|127\.0\.0\.1"
    r"|localhost|:\d{4,5}\b|port \d{4,5}|/tmp|/root|/home|<html|<!doctype",
    re.IGNORECASE,
)
MISREAD_BY_OPENCODE = "(?i)token limit exceeded|too many tokens|exceeds the limit of"


def assert_error(reply: Reply, status: int, code: str = "", param: str = "") -> JSONObject:
    """Fail unless `reply` is an error of the gate in every respect; return the error object."""
    text = reply.content.decode()
    assert reply.status_code == status, text
    assert reply.headers["Content-Type"].split(";")[0] == "application/json"
    assert reply.headers["X-Request-Id"]
    assert text.endswith("\n")
    body = json.loads(text)
    assert set(body) == {"error"}
    error = cast(JSONObject, body["error"])
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    assert code in ("", error["code"]) and param in ("", error["param"]), text
    assert not LEAKS.search(text), text
    headers = reply.headers
    if status == 401:
        assert headers["WWW-Authenticate"].startswith("Bearer")
    if status == 405:
        assert headers["Allow"]
    if status == 429:
        assert not re.search(MISREAD_BY_OPENCODE, text), text
    if error["code"] == "insufficient_quota":
        assert headers["x-should-retry"] == "false" and headers["retry-after-ms"] == "1"
    elif status in (429, 503):
        assert int(headers["Retry-After"]) >= 1
    return error


# ---------------------------------------------------------------------------------------------
# Accounts, JWTs and keys: who gets in, and that nobody else does.

API_KEY = re.compile(r"sk-llmgate-[0-9A-Za-z]{49}")
LONGEST_PASSWORD = "ä" * 36  # 72 bytes


def test_registration_gives_an_integer_id_and_a_key(gate: Gate) -> None:
    """The answer that README shows, which no cache may keep; /users/me shows the key again."""
    body = {"username": "alice_1", "password": PASSWORD}
    answer = call(gate, "POST", "/auth/register", json=body)
    assert answer.status_code == 201
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Request-Id"]
    key = answer.json()["api_key"]
    gate.secrets.add(key)
    assert API_KEY.fullmatch(key)
    account = {"username": "alice_1", "token_limit": 1000000, "tokens_used": 0, "api_key": key}
    assert answer.json() == account | {"id": 1}
    seen = me(gate, User(1, "alice_1", PASSWORD, key))
    assert abs(seen.pop("created_at") - time.time()) < 60
    assert seen == account | {"id": 1}


def test_login_takes_json_and_a_form(gate: Gate) -> None:
    """Both give a JWT of a day, which no cache may keep; it buys a new one of the same shape."""
    user = register(gate)
    credentials = {"username": user.name, "password": PASSWORD}
    by_json = call(gate, "POST", "/auth/token", json=credentials)
    by_form = call(gate, "POST", "/auth/token", data=credentials | {"grant_type": "password"})
    refreshed = call(gate, "POST", "/auth/refresh", by_json.json()["access_token"])
    for answer in (by_json, by_form, refreshed):
        assert answer.status_code == 200, answer.text
        assert set(answer.json()) == {"access_token", "token_type", "expires_in"}
        assert answer.json()["token_type"] == "bearer"
        assert answer.json()["expires_in"] == 24 * 3600
        assert answer.headers["Cache-Control"] == "no-store"
        gate.secrets.add(answer.json()["access_token"])
        assert call(gate, "GET", "/users/me", answer.json()["access_token"]).status_code == 200
    assert_error(call(gate, "POST", "/auth/refresh"), 401)


def test_names_are_unique_whatever_their_case(gate: Gate) -> None:
    """Also when eight ask for one at the same time: one row, and seven clear answers."""
    body = {"username": "alice_1", "password": PASSWORD}
    answers = in_parallel(8, lambda _: call(gate, "POST", "/auth/register", json=body))
    refused = [answer for answer in answers if answer.status_code != 201]
    assert len(refused) == 7
    body["username"] = "ALICE_1"
    for answer in [*refused, call(gate, "POST", "/auth/register", json=body)]:
        assert_error(answer, 409, "username_taken")
    assert gate.rows("SELECT count(*) FROM users") == [(1,)]
    assert gate.rows("SELECT count(*) FROM api_keys") == [(1,)]
    assert try_login(gate, "Alice_1", PASSWORD).status_code == 200


BAD_NAMES = ["ab", "a" * 65, "", "a b", "älice", "a\r\nb", "a/b", 12345, None]
BAD_PASSWORDS = ["a" * 73, "😀" * 19, "a" * 60_000, "", "passwor", 12345678, None, "password\ud800"]
BAD_LIMITS = ["-1", "0", "1.5", '"100"', "true", "[]", "NaN", "1e999"]


def test_bad_name_password_or_limit_makes_no_account(gate: Gate) -> None:
    """400 at registration; at login a bad name or password is a wrong one."""
    for name in BAD_NAMES:
        body: JSONObject = {"username": name, "password": PASSWORD}
        assert_error(call(gate, "POST", "/auth/register", json=body), 400, param="username")
        assert_error(try_login(gate, name, PASSWORD), 401, "invalid_credentials")
    for limit in BAD_LIMITS:
        text = f'{{"username": "dave", "password": "{PASSWORD}", "token_limit": {limit}}}'
        assert_error(post_text(gate, "/auth/register", "", text), 400)
    users = [register(gate), register(gate)]  # with four tries for each
    for number, password in enumerate(BAD_PASSWORDS):
        body = {"username": "carol", "password": password}
        assert_error(post_text(gate, "/auth/register", "", json.dumps(body)), 400, param="password")
        assert_error(try_login(gate, users[number % 2].name, password), 401, "invalid_credentials")
    assert gate.rows("SELECT count(*) FROM users") == [(2,)]
    user = register(gate, password=LONGEST_PASSWORD)
    assert try_login(gate, user.name, LONGEST_PASSWORD).status_code == 200
    for wrong in (LONGEST_PASSWORD + "a", LONGEST_PASSWORD[:-1] + "ö", LONGEST_PASSWORD[:-1]):
        assert_error(try_login(gate, user.name, wrong), 401, "invalid_credentials")


def test_token_limit_is_granted_up_to_the_maximum(make_gate: MakeGate) -> None:
    """Absent and null mean the default."""
    gate = make_gate(DEFAULT_TOKEN_LIMIT="5000", MAX_TOKEN_LIMIT="9000")
    absent = register(gate)
    assert me(gate, absent)["token_limit"] == 5000
    for asked, granted in ((None, 5000), (7, 7), (9000, 9000), (9001, 9000), (10**30, 9000)):
        assert me(gate, register(gate, token_limit=asked))["token_limit"] == granted


def test_extra_fields_change_nothing(gate: Gate) -> None:
    """Nobody registers as somebody else."""
    rights: JSONObject = {"is_admin": True, "id": 77, "jwt_version": 9, "disabled_at": 1}
    keys = {"api_key": "sk-llmgate-mine", "key_hash": "0" * 64}
    user = register(gate, tokens_used=-1000, tokens_reserved=-1000, **rights, **keys)
    assert user.id == 1 and API_KEY.fullmatch(user.key)
    row = gate.rows("SELECT id, tokens_used, tokens_reserved, jwt_version, disabled_at FROM users")
    assert row == [(1, 0, 0, 1, None)]
    assert gate.rows("SELECT count(*) FROM api_keys WHERE key_hash = ?", "0" * 64) == [(0,)]


READS_JSON = [
    "/auth/register", "/auth/token", "/auth/password", "/users/me/keys",
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings",
]  # fmt: skip
BAD_BODIES = [b"{bad", b"", b"[1]", b"null", b'"x"', b"\xff\xfe", b'{"model": "\xff\xfe"}']
BAD_BODIES += [b"[" * 60_000, b'{"model": ' + b"[" * 60_000]


def test_bad_body_is_refused_by_every_call(gate: Gate) -> None:
    """400; and 415 for `text/plain`, which a web page may send without asking, or no type."""
    user = register(gate)
    token = login(gate, user)
    good = json.dumps(chat_body() | {"username": "erin", "password": PASSWORD}).encode()
    for path in READS_JSON:
        bearer = user.key if path.startswith("/v1") else token
        for body in BAD_BODIES:
            assert_error(post_text(gate, path, bearer, body), 400)
        for headers in ({"Content-Type": "text/plain"}, {}):
            assert_error(call(gate, "POST", path, bearer, data=good, headers=headers), 415)
    assert gate.upstream.asked() == []
    assert gate.rows("SELECT count(*) FROM users") == [(1,)]


def test_unknown_name_and_wrong_password_look_the_same(gate: Gate) -> None:
    """The same answer in the same time, so that names cannot be guessed."""
    bodies = set()

    def seconds(name: str) -> float:
        began = time.perf_counter()
        answer = try_login(gate, name, "wrong-password")
        assert_error(answer, 401, "invalid_credentials")
        bodies.add(answer.content)
        return time.perf_counter() - began

    def difference() -> float:
        names = [register(gate).name for _ in range(4)] * 3
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


def test_forged_jwt_is_refused_at_once(gate: Gate) -> None:
    """One that the gate's own key has signed works, or the others would show nothing."""
    register(gate)
    genuine = sign(gate, {})
    assert call(gate, "GET", "/users/me", genuine).status_code == 200
    header, payload, signature = genuine.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    other = base64.urlsafe_b64encode(json.dumps(claims | {"sub": "2"}).encode()).decode()
    none = base64.urlsafe_b64encode(b'{"alg":"none"}').decode().rstrip("=")
    forged = [f"{none}.{payload}.", f"{none}.{payload}.{signature}", f"{header}.{payload}."]
    forged += [f"{header}.{other.rstrip('=')}.{signature}", "a.b.c", "a" * 40_000]
    forged += [jwt.encode(claims, "k" * 32), jwt.encode(claims, JWT_SECRET)]
    forged += [sign(gate, {}, "HS512"), sign(gate, {}, crit=cast(str, ["exp"]))]
    forged += [sign(gate, {"sub": sub}) for sub in (None, 1, "2", "9" * 30, "one")]
    forged += [sign(gate, {"exp": None}), sign(gate, {"ver": 2})]
    for token in [*forged, sign(gate, {"nbf": int(time.time()) + 3600})]:
        began = time.perf_counter()
        answer = call(gate, "GET", "/users/me", token)
        assert time.perf_counter() - began < 0.5, token
        assert_error(answer, 401, "invalid_token")
    expired = sign(gate, {"exp": int(time.time()) - 120})  # so that a client logs in again
    assert_error(call(gate, "GET", "/users/me", expired), 401, "token_expired")
    for value in ("Bearer", "Bearer ", "", "Bearer \xe4\xff"):
        reply = send_raw(gate, raw_request("GET", "/users/me", {"Authorization": value}))
        assert_error(reply, 401)
    too_long = {"Authorization": "Bearer " + "a" * 10**6}
    assert send_raw(gate, raw_request("GET", "/users/me", too_long)).status_code == 431


def test_each_credential_opens_its_own_calls_only(gate: Gate) -> None:
    """An API key opens no account but reads its usage; a JWT opens no model; no query opens both."""
    user = register(gate)
    token = login(gate, user)
    for path in ("/users/me", "/users/me/keys"):
        assert_error(call(gate, "GET", path, user.key), 401)
    for path in ("/users/me/api-key", "/auth/refresh"):
        assert_error(call(gate, "POST", path, user.key), 401)
    assert call(gate, "GET", "/users/usage", user.key).status_code == 200
    assert_error(call(gate, "GET", "/v1/models", token), 401, "invalid_api_key")
    assert_error(chat(gate, token), 401, "invalid_api_key")
    for name in ("api_key", "key", "token", "access_token", "authorization"):
        assert_error(call(gate, "GET", f"/users/me?{name}={token}"), 401)
        assert_error(call(gate, "GET", f"/v1/models?{name}={user.key}"), 401)
    assert gate.upstream.asked() == []
    assert me(gate, user)["api_key"] == user.key


def test_bad_key_is_refused_before_vllm(gate: Gate) -> None:
    """At once, and without a reason to try again. A scheme in small letters is a good one."""
    user = register(gate)
    key, body = user.key, json.dumps(chat_body()).encode()
    changed = key[:20] + ("B" if key[20] == "A" else "A") + key[21:]
    in_basic = "Basic " + base64.b64encode(f"user:{key}".encode()).decode()
    wrong = ["' OR 1=1 --", "sk-llmgate-' OR 1=1 --", "\xff\xfe", changed, key + "a", key[:-1]]
    wrong += [key.swapcase(), f"{key}, Bearer {key}", f"other\r\nAuthorization: Bearer {key}"]
    for value in ["Bearer", "Basic x", in_basic, key, *[f"Bearer {item}" for item in wrong]]:
        headers = {"Authorization": value, "Content-Type": "application/json"}
        began = time.perf_counter()
        reply = send_raw(gate, raw_request("POST", "/v1/chat/completions", headers, body))
        assert time.perf_counter() - began < 0.5, value
        assert_error(reply, 401)
        assert reply.headers["x-should-retry"] == "false", value
    assert_error(relay(gate, "", "chat/completions", chat_body()), 401, "missing_api_key")
    assert gate.upstream.asked() == []
    headers = {"Authorization": f"bearer {key}"}
    assert call(gate, "GET", "/v1/models", headers=headers).status_code == 200


def test_mistyped_key_is_refused_without_the_database(start_process: StartProcess) -> None:
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


def test_replaced_key_is_refused_and_its_stream_goes_on(gate: Gate) -> None:
    """The old key stops at once, a running answer ends well, the quota is the same."""
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
    """The one that /users/me shows."""
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
    """Also for the right password, until the time is over; keys and others go on.

    A name that does not exist is held back the same, so that nobody learns which ones do.
    """
    user, other = register(gate), register(gate)
    answers = [try_login(gate, user.name, "wrong-password") for _ in range(10)]
    held_back = try_login(gate, user.name, PASSWORD)
    statuses = [answer.status_code for answer in answers]
    assert statuses[:5] == [401] * 5 and statuses[-1] == 429
    for answer in (answers[-1], held_back):
        assert_error(answer, 429, "rate_limit_exceeded")
    assert chat(gate, user.key).status_code == 200
    assert try_login(gate, other.name, PASSWORD).status_code == 200
    wait_s = int(held_back.headers["Retry-After"])
    wait_until(lambda: try_login(gate, user.name, PASSWORD).status_code == 200, wait_s + 1)
    unknown = [try_login(gate, "no-such-name", "wrong-password") for _ in range(10)]
    assert [answer.status_code for answer in unknown] == statuses
    assert unknown[-1].content == answers[-1].content


def test_guesses_are_counted_before_they_are_tried(gate: Gate) -> None:
    """Few of fifty at once get that far; of a typed name only as much is kept as one can have."""
    user = register(gate)
    answers = in_parallel(50, lambda _: try_login(gate, user.name, "wrong-password"))
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses[401] + statuses[429] == 50
    assert 1 <= statuses[401] <= 10
    for number in range(3):
        assert_error(try_login(gate, f"{number}" * 60_000, "wrong"), 401, "invalid_credentials")
    remembered = gate.rows("SELECT * FROM login_attempts")
    assert len(remembered) == 4
    assert max(len(str(row)) for row in remembered) < 200


def test_disabled_account_is_refused(gate: Gate) -> None:
    """The operator's `disable` stops login, JWT and key."""
    user = register(gate)
    token = login(gate, user)
    run_command(gate, "disable", user.name)
    for answer in (
        try_login(gate, user.name, PASSWORD),
        call(gate, "GET", "/users/me", token),
        call(gate, "GET", "/v1/models", user.key),
    ):
        assert_error(answer, 403, "account_disabled")
    run_command(gate, "enable", user.name)
    assert chat(gate, user.key).status_code == 200


def test_registration_is_closed_or_by_invitation(
    make_gate: MakeGate, start_process: StartProcess
) -> None:
    """REGISTRATION; with an invitation the first lines of the gate say how to use it."""
    closed = make_gate(REGISTRATION="closed")
    gate = start_process(REGISTRATION="invite", REGISTRATION_TOKEN="invitation-marker-77")
    gate.secrets.add("invitation-marker-77")
    body = {"username": "ida", "password": PASSWORD}
    assert_error(call(closed, "POST", "/auth/register", json=body), 403, "registration_closed")
    for token in ("another", 5):
        wrong = body | {"registration_token": token}
        assert_error(call(gate, "POST", "/auth/register", json=wrong), 403, "registration_closed")
    assert register(gate, "ida", registration_token="invitation-marker-77").id == 1
    assert '"registration_token":"…"' in gate.output.read_text()


@pytest.mark.parametrize(("ahead_s", "status"), [(8, 200), (-8, 200), (30, 401)])
def test_jwt_of_a_gate_with_another_clock_works(gate: Gate, ahead_s: int, status: int) -> None:
    """Clocks differ: 8 s too early or too late are borne, half a minute is not."""
    register(gate)
    start = int(time.time()) + (ahead_s if ahead_s > 0 else ahead_s - 3600)
    token = sign(gate, {"iat": start, "nbf": start, "exp": start + 3600})
    assert call(gate, "GET", "/users/me", token).status_code == status


def test_commands_at_once_make_one_secret(tmp_path: Path, start_process: StartProcess) -> None:
    """In an empty folder nobody fails, and every key can be shown again."""

    def create(number: int) -> User:
        made = command(tmp_path, {}, "create-user", f"user.{number}", stdin=PASSWORD)
        return User(0, f"user.{number}", PASSWORD, made.stdout.split()[-1])

    users = in_parallel(5, create)
    gate = start_process()
    gate.secrets |= {user.key for user in users}
    assert [me(gate, user)["api_key"] for user in users] == [user.key for user in users]


def test_no_half_of_a_secret_is_left_or_followed(tmp_path: Path) -> None:
    """A write that fails leaves no short file behind; a link in its place is refused."""
    full = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
    command(tmp_path, customized(tmp_path / "full", full), "create-tables", status=1)
    assert not (tmp_path / "llmgate.secret").exists()
    (tmp_path / "llmgate.secret").symlink_to(tmp_path / "elsewhere")
    assert "llmgate.secret" in refusal(tmp_path) and not (tmp_path / "elsewhere").exists()
    (tmp_path / "llmgate.secret").unlink()
    command(tmp_path, {}, "create-tables")
    assert len((tmp_path / "llmgate.secret").read_text().strip()) >= 32


def test_hundred_and_first_key_is_refused(gate: Gate) -> None:
    """A user has at most 100 live keys; a revoked one makes room."""
    token, name = login(gate, register(gate)), {"name": "one more"}
    made = [call(gate, "POST", "/users/me/keys", token, json=name) for _ in range(99)]
    gate.secrets |= {answer.json()["api_key"] for answer in made}
    assert_error(call(gate, "POST", "/users/me/keys", token, json=name), 400)
    call(gate, "DELETE", f"/users/me/keys/{made[0].json()['id']}", token)
    assert call(gate, "POST", "/users/me/keys", token, json=name).status_code == 201


def test_wrong_invitation_is_called_wrong(make_gate: MakeGate) -> None:
    """Who has none is told that one is needed; who has a wrong one, that it is wrong."""
    gate = make_gate(REGISTRATION="invite", REGISTRATION_TOKEN="invitation-marker-78")
    body = {"username": "ida", "password": PASSWORD}
    none = call(gate, "POST", "/auth/register", json=body)
    assert "registration_token" in assert_error(none, 403, "registration_closed")["message"]
    wrong = call(gate, "POST", "/auth/register", json=body | {"registration_token": "another"})
    assert "wrong" in assert_error(wrong, 403)["message"].lower()
    assert "wrong" not in none.text.lower()


def test_failed_login_names_the_address_in_the_log(gate: Gate) -> None:
    """The operator can see who guesses; a name that is none is not written there."""
    for name in ("mallory", "no name\n"):
        try_login(gate, name, "wrong-password")
    wait_until(lambda: gate.log.read_text().count("/auth/token") == 2)
    first, second = [s for s in gate.log.read_text().splitlines() if "/auth/token" in s]
    assert "401" in first and "127.0.0.1" in first and "mallory" in first
    assert "401" in second and "127.0.0.1" in second and "no name" not in second


def test_hosts_match_whatever_their_spelling(make_gate: MakeGate) -> None:
    """Upper case and IPv6, on both sides; any other name stays refused."""
    gate = make_gate(ALLOWED_HOSTS="[fd00::1],LLM.example.org,127.0.0.1")
    key = register(gate).key
    good = {"llm.example.org", "LLM.Example.org:8000", "[fd00::1]:8000", "[FD00::1]"}
    for host in (*good, "example.org", "llm.example.org.evil.net", "[fd00::2]"):
        answer = call(gate, "GET", "/v1/models", key, headers={"Host": host})
        assert (host, answer.status_code) == (host, 200 if host in good else 400)


def test_gate_listens_on_ipv6(make_gate: MakeGate) -> None:
    """HOST=::1, asked by its address and by name."""
    if not os.path.exists("/proc/sys/net/ipv6") or not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    gate = make_gate(HOST="::1")
    user = register(gate)
    assert gate.url.startswith("http://[::1]:") and chat(gate, user.key).status_code == 200
    headers = {"Host": f"localhost:{gate.address[1]}"}
    config = call(gate, "GET", "/opencode.json", user.key, headers=headers).text
    assert f'"http://localhost:{gate.address[1]}/v1"' in config


def test_host_that_is_none_makes_no_url(make_gate: MakeGate) -> None:
    """Where any name is accepted it must still be one; only /health needs none at all."""
    gate = make_gate(HOST="0.0.0.0", REGISTRATION="open")
    headers = {"Authorization": f"Bearer {register(gate).key}"}
    request = raw_request("GET", "/opencode.json", headers)
    for host in ("", "a b", "//", "@", "x/y", "[::1", "a:b:c", 'a"b', "localhost:99999"):
        asked = request.replace(b"Host: localhost", f"Host: {host}".encode())
        assert_error(send_raw(gate, asked), 400)
    assert send_raw(gate, b"GET /health HTTP/1.0\r\n\r\n").status_code == 200
    assert send_raw(gate, b"GET /users/usage HTTP/1.0\r\n\r\n").status_code == 400


# ---------------------------------------------------------------------------------------------
# The relay: what vLLM gets and what the client gets, byte by byte.


def test_plain_answer_is_vllms_byte_by_byte(gate: Gate) -> None:
    """And its one row has vLLM's counts, under the answer's X-Request-Id."""
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


def test_completions_and_embeddings_are_relayed_and_booked(gate: Gate) -> None:
    """Two prompts each; embeddings have no completion, and a completion of 16 tokens by default."""
    user = register(gate)
    body = {"model": "ok", "prompt": [PROMPT, PROMPT], "input": [PROMPT, PROMPT], "max_tokens": 6}
    for endpoint, completion in (("completions", 12), ("embeddings", 0)):
        answer = relay(gate, user.key, endpoint, body)
        assert answer.status_code == 200, answer.text
        assert answer.content == gate.upstream.asked()[-1].answer()
        row = gate.row(answer)
        assert (row.endpoint, row.status, row.estimated) == (endpoint, "ok", 0)
        assert (row.prompt_tokens, row.completion_tokens) == (20, completion)
    relay(gate, user.key, "completions", {"model": "ok", "prompt": "Hello"})
    assert gate.upstream.asked()[-1].json()["max_tokens"] == 16  # vLLM's own default there


def test_each_event_passes_at_once(gate: Gate) -> None:
    """Events that vLLM writes 300 ms apart are at the client within 150 ms."""
    user = register(gate)
    assert best_of_six(lambda: longest_delay(gate, user.key), 0.15) < 0.15


STREAM_OPTIONS: list[JSONObject | None] = [
    *[None, {}, {"include_usage": False}, {"include_usage": True}],
    {"include_usage": True, "continuous_usage_stats": False},
    {"include_usage": True, "continuous_usage_stats": True},
]


@pytest.mark.parametrize("model", ["ok", "lumpy"])
def test_stream_is_what_vllm_would_have_sent(gate: Gate, model: str) -> None:
    """The usage that only the gate asked for is gone, every other byte is there."""
    user = register(gate)
    for options in STREAM_OPTIONS:
        asked = {} if options is None else {"stream_options": options}
        events = streamed(gate, user.key, model, n=2, **asked)
        exchange = gate.upstream.asked()[-1]
        assert exchange.json()["stream_options"]["include_usage"] is True
        assert exchange.json()["stream_options"]["continuous_usage_stats"] is True
        assert b"".join(events) == said_by_vllm(exchange, options)
        usages = [event for event in events if b'"usage":' in event]
        if not (options or {}).get("include_usage"):
            assert usages == []
        elif not (options or {}).get("continuous_usage_stats"):
            assert usages == [events[-2]] and data(usages[0])["choices"] == []
    gate.settle()
    assert [(row.total, row.estimated) for row in gate.usage(user)] == [(50, 0)] * 6
    body = {"model": model, "prompt": PROMPT, "stream": True, "max_tokens": 5}
    with relay(gate, user.key, "completions", body) as response:  # whose events are other objects
        events = list(stream_events(response))
        assert gate.row(response).total == 15
    assert b"".join(events) == said_by_vllm(gate.upstream.asked()[-1])


STRANGE_WORDS = [
    ',"usage":{"prompt_tokens":1,"completion_tokens":1},"choices":[],',
    'data: [DONE]\n\ndata: {"error":{"message":"no"}}\n\n',
    '"usage":null}] \\"usage\\": \\\\',
    "\N{SNOWMAN}\N{GRINNING FACE}äöü\u2028\u2029\x85\x00",
]


def test_text_that_looks_like_the_protocol_passes_unchanged(gate: Gate) -> None:
    """Usage is taken out of the stream, not out of what the model says."""
    user = register(gate)
    for words in STRANGE_WORDS:
        messages = [{"role": "user", "content": words * 3}]
        events = streamed(gate, user.key, "echo", messages=messages)
        assert spoken(events) == words * 3
        assert b"".join(events) == said_by_vllm(gate.upstream.asked()[-1])
        plain = chat(gate, user.key, "echo", messages=messages)
        assert plain.json()["choices"][0]["message"]["content"] == words * 3
    gate.settle()
    assert [row.estimated for row in gate.usage(user)] == [0] * 8


WHOLE_ANSWER = b'{"id":"c","choices":[],"usage":{"prompt_tokens":10,"completion_tokens":3}}'
LENGTH = b"Content-Length: %d\r\n\r\n" % len(WHOLE_ANSWER)
CHUNKED = b"Transfer-Encoding: Chunked\r\n\r\n"
OK_200 = b"HTTP/1.1 200 OK\r\n"
FRAMINGS = [
    OK_200 + LENGTH + WHOLE_ANSWER,
    b"HTTP/1.1 100 Continue\r\n\r\n" + OK_200 + LENGTH + WHOLE_ANSWER,
    OK_200 + b"Connection: Close\r\n" + LENGTH + WHOLE_ANSWER,
    b"HTTP/1.0 200 OK\r\n\r\n" + WHOLE_ANSWER,
    OK_200
    + CHUNKED
    + b"4\r\n%s\r\n046;x=1\r\n%s\r\n0\r\n\r\n" % (WHOLE_ANSWER[:4], WHOLE_ANSWER[4:]),
]
BROKEN_FRAMINGS = [
    OK_200 + b"no end: of headers",
    OK_200 + b"Content-Length: five\r\n\r\n" + WHOLE_ANSWER,
    OK_200 + CHUNKED + b"4a\r\n" + WHOLE_ANSWER + b"\r\n" + b"1" * 200,
]


def test_answer_is_read_however_it_arrives(make_gate: MakeGate) -> None:
    """By its length, in chunks, to the end; what breaks off is never taken for whole."""
    turns = [*itertools.product(FRAMINGS + BROKEN_FRAMINGS, (1, 7, 10**6))]
    left = iter(turns)

    def say(upstream: ScriptedHandler, body: JSONObject) -> None:
        answer, size = next(left)
        upstream.exchange.tokens = 13 * (answer in FRAMINGS)
        for at in range(0, len(answer), size):
            upstream.wfile.write(answer[at : at + size])
        upstream.close_connection = True

    with scripted_gate(make_gate, say) as gate:
        gate.expected_5xx = {502}
        user = register(gate)
        for sent, _ in turns:
            answer = chat(gate, user.key)
            if sent in FRAMINGS:
                assert (answer.status_code, answer.content) == (200, WHOLE_ANSWER), sent
            else:
                assert_error(answer, 502, "upstream_error")


def test_vllms_own_4xx_passes(gate: Gate) -> None:
    """Its text about the context makes OpenCode compact; a 429 never does, whatever its words.

    Nothing is charged.
    """
    user = register(gate)
    statuses = {"e400": 400, "busy": 429, "wordy": 429}
    for (model, status), stream in itertools.product(statuses.items(), (False, True)):
        with chat(gate, user.key, model, stream=stream) as answer:
            assert answer.status_code == status
            assert answer.json()["error"]["message"]
            assert model == "wordy" or answer.content == gate.upstream.asked()[-1].answer()
            assert model == "e400" or not re.search(MISREAD_BY_OPENCODE, answer.text)
    gate.settle()
    assert [(row.status, row.total) for row in gate.usage(user)] == [("error", 0)] * 6


FAULTS = {"e401": 0, "e500": 0, "redir": 0, "nohttp": 0, "nobody": 0, "garbage": 1, "badjson": 1}


def test_faults_of_vllm_are_502(gate: Gate) -> None:
    """The gate's key is wrong, the engine is dead, or what came is no answer.

    Free, unless vLLM began an answer: then it has worked for it, and the row is an estimate. A
    redirect is not followed: the second server gets neither the prompt nor the gate's key.
    """
    gate.expected_5xx = {502}
    user = register(gate)
    with Upstream() as second:
        gate.upstream.redirect_to = second.url
        for (model, estimated), stream in itertools.product(FAULTS.items(), (False, True)):
            with chat(gate, user.key, model, stream=stream) as answer:
                assert_error(answer, 502, "upstream_error")
                assert "Location" not in answer.headers
            row = gate.row(answer)
            assert (model, row.status, row.estimated) == (model, "error", estimated)
            assert (row.total > 0) == bool(estimated), model
        assert second.exchanges == []


def test_gate_goes_on_when_vllm_comes(make_gate: MakeGate) -> None:
    """502 while nobody listens, also near the limit; 200 afterwards without a restart."""
    with Upstream() as later:
        port = later.server_address[1]
    gate = make_gate(VLLM_ENDPOINT=f"http://127.0.0.1:{port}")
    gate.expected_5xx = {502}
    user, poor = register(gate), register(gate, token_limit=200)
    began = time.monotonic()
    for key in (user.key, poor.key):
        assert_error(chat(gate, key), 502, "upstream_unavailable")
    assert_error(call(gate, "GET", "/v1/models", user.key), 502, "upstream_unavailable")
    assert time.monotonic() - began < 3
    gate.settle()
    with Upstream(port) as later:
        gate.upstream = later
        wait_until(lambda: chat(gate, user.key).status_code == 200)
        assert call(gate, "GET", "/v1/models", user.key).status_code == 200
        gate.settle()
    assert_error(chat(gate, poor.key), 502, "upstream_unavailable")  # who would count the prompt?


def test_server_killed_under_load_fails_its_own_requests_only(
    make_gate: MakeGate, upstream: Upstream
) -> None:
    """Two servers beside one that is down; the killed one takes its models away, and returns."""
    with Upstream() as gone:
        dead = gone.url
    with Upstream() as killed, Upstream() as other, ThreadPoolExecutor(8) as pool:
        killed.serves, other.serves = frozenset({"slow"}), frozenset({"paced"})
        gate = make_gate(VLLM_ENDPOINT=f"{dead}, {killed.url}/v1,{other.url}/")
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
        listed = call(gate, "GET", "/v1/models", user.key).json()["data"]
        assert {model["id"] for model in listed} == {"paced", "llm-user-managed"}
        with Upstream(killed.server_address[1]) as again:
            again.serves = frozenset({"slow"})
            wait_until(lambda: chat(gate, user.key, "slow", max_tokens=2).status_code == 200)
            upstream.exchanges += [*killed.exchanges, *other.exchanges, *again.exchanges]
            gate.settle()
    statuses = Counter((row.model, row.status) for row in gate.usage(user))
    assert statuses[("slow", "error")] >= 4 and statuses[("slow", "ok")] == 1
    assert statuses[("paced", "ok")] == 4


def test_kept_connection_that_vllm_closed_costs_nothing(make_gate: MakeGate) -> None:
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
    """The caller's credentials and traces stay at the gate, which adds its own key.

    vLLM's cookies come back neither to it nor to a caller.
    """
    user = register(gate)
    headers = {"Cookie": "session=cookie-marker", "X-Request-Id": "chosen-by-the-caller"}
    headers |= {"X-Forwarded-For": "203.0.113.9", "Forwarded": "for=203.0.113.9"}
    headers |= {"Accept-Encoding": "gzip, br", "TE": "trailers", "Priority": "u=0"}
    for _ in range(2):
        body = chat_body("cookie")
        answer = call(gate, "POST", "/v1/chat/completions", user.key, json=body, headers=headers)
        assert answer.headers["X-Request-Id"] != "chosen-by-the-caller"
        assert "Set-Cookie" not in answer.headers
        got = gate.upstream.asked()[-1].headers
        assert got["Authorization"] == f"Bearer {UPSTREAM_KEY}"
        assert got["Accept-Encoding"] == "identity"
        assert got["Content-Type"] == "application/json"
        assert got["Priority"] is None and got["Cookie"] is None
        for trace in (user.key, "cookie-marker", "chosen-by", "203.0.113.9", "trailers"):
            assert trace not in str(got)


def test_every_other_field_reaches_vllm_unchanged(gate: Gate) -> None:
    """Also the fields that nobody knows yet, and whole numbers of any length."""
    user = register(gate)
    extra = (
        '"chat_template_kwargs": {"enable_thinking": false}, "top_k": 40, "temperature": 0.10, '
        '"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": 1e3}}}], '
        '"response_format": {"type": "json_object"}, "seed": 12345678901234567890123, '
        '"unknown": {"deep": [null, true, "\\u00e4\\ud83d\\ude00", -0.0, 1.0]}, "max_tokens": 5'
    )
    body = json.dumps(chat_body())[:-1] + ", " + extra + "}"
    answer = post_text(gate, "/v1/chat/completions", user.key, body)
    assert answer.status_code == 200, answer.text
    sent = gate.upstream.asked()[0].json()
    assert sent == json.loads(body)
    assert list(sent) == list(json.loads(body))


REFUSED_FIELDS: JSONObject = {"priority": 1, "request_id": "mine", "stream_interval": 100}
REFUSED_FIELDS |= {"kv_transfer_params": {"do_remote_prefill": True}, "vllm_xargs": {"a": 1}}
REFUSED_FIELDS |= {"use_beam_search": True, "best_of": 2}
BAD_FIELDS: list[tuple[str, str]] = [  # as they stand in the body
    *[("model", value) for value in ("null", "5", '""')],
    *[("stream", value) for value in ('"true"', "1")],
    *[("stream_options", value) for value in ('"all"', "[]")],
    *[("n", value) for value in ("100000", "17", "0", "-1", "1.5", '"5"', "true")],
    *[("max_tokens", value) for value in ("-1", "1.5", '"abc"', "true", "[]", "NaN", "1e999")],
    *[("max_completion_tokens", value) for value in ("-1", "1.5", '"5"', "true", "{}")],
]


def test_field_that_harms_others_or_has_a_wrong_type_is_refused(gate: Gate) -> None:
    """By its name, before vLLM, without a row. The fields that the gate reads are strict."""
    user = register(gate)
    bad = [(name, json.dumps(value)) for name, value in REFUSED_FIELDS.items()] + BAD_FIELDS
    for name, value in bad:
        body = json.dumps(chat_body(stream=True) | {name: "here"}).replace('"here"', value)
        error = assert_error(post_text(gate, "/v1/chat/completions", user.key, body), 400)
        assert error["param"] == name or error["code"] == "invalid_json", (name, value)
    assert gate.usage() == []
    body = json.dumps(chat_body(temperature=7)).replace("7", "1e999")  # no number for JSON
    answer = post_text(gate, "/v1/chat/completions", user.key, body)
    assert_error(answer, 400, "invalid_json")
    assert gate.upstream.asked() == [] and gate.tokens_used(user) == 0


def test_alias_becomes_the_models_name(make_gate: MakeGate) -> None:
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
        assert set(model) == {"id", "object", "created", "owned_by", "max_model_len"}
    assert models["llm-user-managed"]["max_model_len"] == MAX_MODEL_LEN
    assert models["long"]["max_model_len"] == 131072
    for name in ("ok", "org/tiny", "llm-user-managed"):
        one = call(gate, "GET", f"/v1/models/{name}", user.key)
        assert one.json() == models[name]
    assert_error(call(gate, "GET", "/v1/models"), 401, "missing_api_key")
    assert_error(call(gate, "GET", "/v1/models/gpt-4", user.key), 404, "model_not_found")
    assert_error(chat(gate, user.key, "gpt-4"), 404, "model_not_found")
    assert gate.upstream.asked() == []  # which would say what models it has


UNKNOWN_PATHS = [
    "POST /invocations", "GET /metrics", "POST /tokenize", "POST /pause", "GET /no-such-page",
    "POST /v1/load_lora_adapter", "POST /v1/chat/completions/batch", "POST /v1/../tokenize",
    "POST /v1/%2e%2e/tokenize", "POST /v1/..%2ftokenize", "GET /v1//models", "GET /V1/models",
    "GET /v1/models/../../metrics", "POST /v1/chat/completions/",
]  # fmt: skip
WRONG_METHODS = {
    "GET /v1/chat/completions": "POST",
    "DELETE /v1/models": "GET",
    "PUT /auth/register": "POST",
    "POST /users/me": "GET",
    "TRACE /v1/models": "GET",
}


def test_nothing_else_of_vllm_is_reachable(gate: Gate) -> None:
    """404 and no redirect; a wrong method is 405, and the answer says which one is right."""
    user = register(gate)
    headers = {"Authorization": f"Bearer {user.key}", "Content-Type": "application/json"}
    for asked in UNKNOWN_PATHS:
        method, path = asked.split()
        body = b"{}" if method == "POST" else b""
        reply = send_raw(gate, raw_request(method, path, headers, body))
        assert_error(reply, 404)
        assert "Location" not in reply.headers, path
    for asked, allowed in WRONG_METHODS.items():
        method, path = asked.split()
        answer = call(gate, method, path, user.key)
        assert_error(answer, 405)
        assert allowed in answer.headers["Allow"], asked
    assert not any(x.path not in ("/v1/models", "/health") for x in gate.upstream.exchanges)


def test_any_http_client_is_served(gate: Gate) -> None:
    """One that keeps its connection, one that sends in chunks, one that knows HTTP/1.0 only."""
    user = register(gate)
    with connected(gate) as connection:
        for stream in (False, False, True):
            connection.sendall(raw_chat(user.key, chat_body(stream=stream)))
            assert read_reply(connection).status_code == 200
    body = json.dumps(chat_body()).encode()
    in_chunks = iter([body[:20], body[20:]])
    headers = {"Content-Type": "application/json"}
    path = "/v1/chat/completions"
    answer = call(gate, "POST", path, user.key, data=in_chunks, headers=headers)
    assert answer.status_code == 200, answer.text
    request = raw_chat(user.key, chat_body(stream=True)).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    reply = send_raw(gate, request)  # which reads until the end of the connection
    assert reply.status_code == 200
    assert reply.content == said_by_vllm(gate.upstream.asked()[-1])


DONE = b"data: [DONE]"
TEXT = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":null}]}'
LAST = b'data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}'
COUNT = b'{"prompt_tokens":10,"completion_tokens":3,"total_tokens":13}'
USAGE = b'data: {"id":"c","choices":[],"usage":%s}' % COUNT
CALL = b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"arguments":%s}}]}}],"usage":%s}'
DEEP = COUNT[:-1] + b',"prompt_tokens_details":{"cached":{"by":{"usage":null}}}}'


def test_only_a_400_that_names_the_option_ends_running_counts(
    make_gate: MakeGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unlucky first request changes nothing for others; and after a while it is tried again."""
    monkeypatch.setattr(llmgate, "RETRY_OPTION_S", 0.3)  # not to wait for 10 minutes
    words = [CONTEXT_ERROR, "stream_options: continuous_usage_stats is not permitted"]

    def say(upstream: ScriptedHandler, body: JSONObject) -> None:
        if words and "continuous_usage_stats" in body["stream_options"]:
            upstream.refuse(400, words.pop(0), "BadRequestError", None)
        else:
            upstream.say_events(TEXT, LAST, USAGE, DONE)

    with scripted_gate(make_gate, say) as gate:
        user = register(gate)
        with chat(gate, user.key, stream=True) as answer:
            assert (answer.status_code, answer.json()["error"]["message"]) == (400, CONTEXT_ERROR)
        assert streamed(gate, user.key) == streamed(gate, user.key)
        wait_until(after_seconds(0.35))
        assert streamed(gate, user.key)
        asked = [x.json()["stream_options"] for x in gate.upstream.asked()]
    wanted = ["continuous_usage_stats" in options for options in asked]
    assert wanted == [True, True, False, False, True]


STREAMS: dict[str, list[bytes]] = {
    "alone": [LAST, USAGE, DONE],
    "first in its event": [LAST, b'data: {"usage":%s,"id":"c","choices":[]}' % COUNT, DONE],
    "blanks": [LAST, b'data: {"id" : "c", "choices" : [], "usage" : %s}' % COUNT, DONE],
    "deep": [LAST, USAGE.replace(COUNT, DEEP), DONE],
    "no blank after data:": [LAST, USAGE.replace(b"data: ", b"data:"), DONE],
    "beside the end": [LAST[:-1] + b',"usage":%s}' % COUNT, DONE],
    "before the end": [LAST.replace(b'"id"', b'"usage":%s,"id"' % COUNT), DONE],
    "in a tool's string": [CALL % (b'"{\\"usage\\": null}"', COUNT), LAST, USAGE, DONE],
    "in a tool's object": [CALL % (b'{"usage": null}', COUNT), LAST, USAGE, DONE],
    "more after [DONE]": [LAST, USAGE, DONE, TEXT],
    "[DONE] twice": [LAST, USAGE, DONE, DONE],
    "no [DONE]": [LAST, USAGE],
}


def passed_on(event: bytes, asked: bool) -> JSONObject | None:
    """Return what a caller sees of an event, who asked for the usage at the end or did not."""
    body = data(event.replace(b"data:{", b"data: {"))
    if not asked or body["choices"] and not body["choices"][0].get("finish_reason"):
        body.pop("usage", None)
    return body if body["choices"] or asked else None


@pytest.mark.parametrize("asked", [False, True], ids=["not asked", "asked"])
def test_usage_is_found_wherever_it_stands(make_gate: MakeGate, asked: bool) -> None:
    """Read for the row, shown to who asked; what a tool says of it stays, and [DONE] is the end."""
    streams = iter(STREAMS.values())
    options: JSONObject = {"stream_options": {"include_usage": True}} if asked else {}
    with scripted_gate(make_gate, lambda up, _: up.say_events(TEXT, *next(streams))) as gate:
        user = register(gate)
        for name, stream in STREAMS.items():
            seen = streamed(gate, user.key, "ok", **options)
            assert (seen[0], seen[-1]) == (TEXT + b"\n\n", DONE + b"\n\n"), name
            said = stream[: stream.index(DONE)] if DONE in stream else stream
            expected = [passed_on(event, asked) for event in said]
            assert [json.loads(event[5:]) for event in seen[1:-1]] == list(filter(None, expected))
    assert {(row.total, row.estimated, row.status) for row in gate.usage()} == {(13, 0, "ok")}


def test_first_server_in_the_list_gives_the_alias_its_model(
    make_gate: MakeGate, upstream: Upstream
) -> None:
    """In the list, in a chat and in opencode.json, whether the second server is there or not."""
    with Upstream() as first, Upstream() as second:
        first.serves, second.serves = frozenset({"long"}), frozenset({"ok", "long"})
        gate, name = make_gate(VLLM_ENDPOINT=f"{first.url},{second.url}"), "llm-user-managed"
        key = register(gate).key

        def contexts() -> set[int]:
            listed = call(gate, "GET", f"/v1/models/{name}", key).json()["max_model_len"]
            (provider,) = call(gate, "GET", "/opencode.json", key).json()["provider"].values()
            model = gate.row(chat(gate, key, name, max_tokens=1)).model
            limit = provider["models"][name]["limit"]["context"]
            return {listed, limit, BEHAVIOURS[model].max_model_len}

        assert contexts() == {131072}
        listed = call(gate, "GET", "/v1/models", key).json()["data"]
        assert sorted(model["id"] for model in listed) == [name, "long", "ok"]
        second.__exit__()
        assert contexts() == {131072}
        with Upstream(second.server_address[1]) as again:
            again.serves = frozenset({"ok"})
            assert contexts() == {131072}
            first.__exit__()
            gate.expected_5xx = {502}
            wait_until(lambda: contexts() == {MAX_MODEL_LEN}, 5)
        upstream.exchanges += first.exchanges + second.exchanges + again.exchanges


def test_opencode_json_outlives_a_change_of_the_model(
    make_gate: MakeGate, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It speaks of the alias alone, so that a file made last week still works."""
    with Upstream() as before:
        monkeypatch.setattr(llmgate, "MODELS_TTL_S", 0.2)  # not to wait for 10 s
        before.serves = frozenset({"old/model"})
        gate = make_gate(VLLM_ENDPOINT=before.url)
        user = register(gate)
        config = call(gate, "GET", "/opencode.json", user.key).json()
    provider, _, model = config["model"].partition("/")
    asked_for = config["provider"][provider]["models"][model].get("id", model)
    gate.expected_5xx = {502}
    with Upstream(before.server_address[1]) as after:
        after.serves = frozenset({"new/model"})
        wait_until(lambda: chat(gate, user.key, asked_for).status_code == 200)
        upstream.exchanges += after.exchanges
    assert [row.model for row in gate.usage(user) if row.status == "ok"] == ["new/model"]


def test_vllms_busy_answers_keep_status_and_retry_after(make_gate: MakeGate) -> None:
    """A client that waits as long as vLLM asks need not fail."""

    def say(upstream: ScriptedHandler, body: JSONObject) -> None:
        said = dump({"error": {"message": "queue full", "type": "x", "param": None, "code": 1}})
        wait = f"retry-after: {body['seed'] - 420}\r\n"
        upstream.reply(body["seed"], said, "application/json", wait)

    with scripted_gate(make_gate, say) as gate:
        gate.expected_5xx = {503}
        user = register(gate)
        for status, stream in itertools.product((429, 503), (False, True)):
            with chat(gate, user.key, stream=stream, seed=status) as answer:
                code = answer.json()["error"]["code"]
            assert (answer.status_code, code == "upstream_busy") == (status, status == 503)
            assert answer.headers["Retry-After"] == str(status - 420)
    assert gate.tokens_used(user) == 0


def test_headers_of_a_stream_come_before_its_first_event(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They leave when vLLM's have come; the caller need not wait for a long prefill."""
    monkeypatch.setattr(gate.upstream, "prefill_s", 0.6)
    key, began = register(gate).key, time.monotonic()
    with chat(gate, key, stream=True) as answer:
        assert answer.status_code == 200 and time.monotonic() - began < 0.4
        assert list(stream_events(answer))[-1] == DONE + b"\n\n"


OK_HEAD = b"HTTP/1.1 200 OK\r\n"
BROKEN_ANSWERS = [
    OK_HEAD + b"content-length: 5\n 6\r\n\r\nhello",
    OK_HEAD + b"content-length: -5\r\n\r\nhello",
    OK_HEAD + b"content-length: 5\r\ncontent-length: 9\r\n\r\nhello",
    OK_HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"9" * 30 + b"\r\nhello",
    OK_HEAD + b"transfer-encoding: chunked\r\n\r\n-5\r\nhello",
    b"HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\nhello",
    (OK_HEAD + b"content-length: 5\r\n\r\nhello") * 2,
]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_answer_that_is_no_http_harms_its_own_caller_only(
    make_gate: MakeGate, stream: bool
) -> None:
    """502 at once; the next caller, on a connection that was kept, gets his own answer."""

    def say(upstream: ScriptedHandler, body: JSONObject) -> None:
        if "seed" in body:
            upstream.wfile.write(BROKEN_ANSWERS[body["seed"]])
            upstream.close_connection = b"chunked" in BROKEN_ANSWERS[body["seed"]]
        else:
            upstream.say_whole()

    with scripted_gate(make_gate, say) as gate:
        gate.expected_5xx = {502}
        user = register(gate)
        for number in range(len(BROKEN_ANSWERS)):
            began = time.monotonic()
            with chat(gate, user.key, stream=stream, seed=number) as answer:
                assert_error(answer, 502, "upstream_error")
            assert time.monotonic() - began < 2
            assert ANSWER in chat(gate, user.key).text
        change(gate, "UPDATE usage SET estimated = 1 WHERE status = 'error'")


def test_refused_fields_are_refused_whatever_their_value(gate: Gate) -> None:
    """0, "" and {} too; what cannot harm passes: null, and `best_of: 1`."""
    user = register(gate)
    harmful = [*REFUSED_FIELDS.keys() - {"best_of", "n"}, "ec_transfer_params"]
    for name, value in itertools.product(harmful, (0, "", {})):
        assert_error(chat(gate, user.key, "ok", **{name: value}), 400, param=name)
    assert gate.upstream.asked() == []
    nothing: JSONObject = dict.fromkeys(harmful)
    assert chat(gate, user.key, "ok", best_of=1, **nothing).status_code == 200


def test_bodies_in_other_clothes(gate: Gate) -> None:
    """gzip is refused, for nobody would have counted it; a byte order mark is read over."""
    user, path, body = register(gate), "/v1/chat/completions", json.dumps(chat_body()).encode()
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    packed = gzip.compress(body)
    assert_error(call(gate, "POST", path, user.key, data=packed, headers=headers), 415)
    assert post_text(gate, path, user.key, b"\xef\xbb\xbf" + body).status_code == 200
    assert [x.json() for x in gate.upstream.asked()] == [chat_body()]


def test_vllm_is_told_how_many_requests_the_user_has(gate: Gate) -> None:
    """So that it can serve first who has the fewest; the caller's own word does not count."""
    user, other = register(gate), register(gate)
    own = {"X-Vllm-Priority": "-9", "X-data-parallel-rank": "1"}
    path = "/v1/chat/completions"
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(chat(gate, user.key, "silent", stream=True))
        for key in (user.key, other.key):
            call(gate, "POST", path, key, json=chat_body(), headers=own)
    wait_until(lambda: gate.reserved() == 0)
    chat(gate, user.key)
    asked = [x.headers for x in gate.upstream.asked()]
    assert [headers["X-Vllm-Priority"] for headers in asked] == ["0", "1", "2", "3", "0", "0"]
    assert not any(headers["X-data-parallel-rank"] for headers in asked)


def test_configurations_use_the_public_url(make_gate: MakeGate) -> None:
    """PUBLIC_URL, with a path, whatever the request says of the host."""
    gate, public = make_gate(PUBLIC_URL="https://example.org/llm/"), "https://example.org/llm"
    key = register(gate).key
    shown = call(gate, "GET", "/.well-known/opencode").json()["config"]
    for config in (call(gate, "GET", "/opencode.json", key).json(), shown):
        (provider,) = config["provider"].values()
        assert provider["options"]["baseURL"] == f"{public}/v1"
    claude = call(gate, "GET", "/claude.json", key).json()
    assert claude["env"]["ANTHROPIC_BASE_URL"] == public
    codex = tomllib.loads(call(gate, "GET", "/codex.toml", key).text)
    assert codex["model_providers"]["llmgate"]["base_url"] == f"{public}/v1"
    assert f"{public}/auth/register" in call(gate, "GET", "/").text
    with pytest.raises(llmgate.SettingsError, match="PUBLIC_URL"):
        llmgate.Settings.from_env({"PUBLIC_URL": "example.org/llm"})


def test_first_page_and_lost_callers_are_helped(gate: Gate, make_gate: MakeGate) -> None:
    """GET / says in plain text what to do next; a path without /v1 is told where it is."""
    for accept in ("*/*", "text/html,application/xhtml+xml"):
        page = call(gate, "GET", "/", headers={"Accept": accept})
        assert page.headers["Content-Type"].startswith("text/plain")
        for word in ("/auth/register", "opencode auth login", "/claude.json", "/codex.toml"):
            assert word in page.text
        assert page.text.count("\n") <= 20 and page.text.endswith("\n")
    assert "/auth/register" not in call(make_gate(REGISTRATION="closed"), "GET", "/").text
    key = register(gate).key
    for method, path in (("POST", "/chat/completions"), ("GET", "/models"), ("POST", "/messages")):
        error = assert_error(call(gate, method, path, key, json={}), 404)
        assert f"/v1{path}" in error["message"]
    assert "/v1" not in assert_error(call(gate, "GET", "/no-such-page"), 404)["message"]
    assert gate.upstream.asked() == []


# ---------------------------------------------------------------------------------------------
# Claude Code and Codex: /v1/messages and /v1/responses, and how a request ends whose caller left.

AGENTS = ("messages", "responses")
BOUND_NAMES = {"messages": "max_tokens", "responses": "max_output_tokens"}
LONG_PROMPT = "four" * 166  # 166 tokens, of which "cached" knows 128


def body_of(endpoint: str, model: str = "ok", most: int = 300, **fields: object) -> JSONObject:
    """Return the body of a request for at most so many tokens, with the prompt marker in it."""
    body: JSONObject = {"model": model, BOUND_NAMES.get(endpoint, "max_tokens"): most}
    if endpoint == "completions":
        return body | {"prompt": [PROMPT, PROMPT]} | fields
    if endpoint == "responses":
        return body | {"input": PROMPT} | fields
    return body | {"messages": [{"role": "user", "content": PROMPT}]} | fields


def events_of(content: bytes) -> list[tuple[str, JSONObject]]:
    """Return type and data of each event of a stream, whose two types must agree."""
    found = []
    for event in content.split(b"\n\n")[:-1]:
        first, _, said = event.partition(b"\ndata: ")
        found.append((first.decode().removeprefix("event: "), json.loads(said)))
        assert found[-1][0] == found[-1][1]["type"]
    return found


def refused(endpoint: str, reply: Reply, status: int, code: str = "") -> str:
    """Fail unless `reply` is an error in the protocol's own shape; return its words."""
    if endpoint != "messages":
        return str(assert_error(reply, status, code)["message"])
    body = json.loads(reply.content)
    assert (reply.status_code, set(body), body["type"]) == (status, {"type", "error"}, "error")
    assert set(body["error"]) == {"type", "message"} and body["error"]["message"]
    assert reply.content.endswith(b"\n") and not LEAKS.search(reply.content.decode())
    return str(body["error"]["message"])


def exchange_of(gate: Gate, row: UsageRow) -> Exchange:
    """Return what vLLM saw of a request."""
    name = row.request_id
    return next(x for x in gate.upstream.asked() if x.headers["X-Request-Id"] == name)


SHAPES = ["ok", "thinking", "tool", "cached", "llama", "v33", "lumpy", "llm-user-managed"]
NO_COUNT = ["nousage", "badusage"]


@pytest.mark.parametrize("endpoint", AGENTS)
def test_agents_get_vllms_bytes_and_exact_rows(make_gate: MakeGate, endpoint: str) -> None:
    """Plain and streamed; text, thoughts, tool calls, cached prompts; without a count: marked."""
    gate = make_gate(MAX_REQUESTS_PER_USER="20")
    user = register(gate)
    asked = list(itertools.product(SHAPES + NO_COUNT, (False, True)))

    def ask(number: int) -> None:
        model, stream = asked[number]
        body = body_of(endpoint, model, 5 if model == "v33" else 300, stream=stream)
        if model == "cached":
            body["input" if endpoint == "responses" else "system"] = LONG_PROMPT
        answer = relay(gate, user.key, f"{endpoint}?beta=true", body)
        content, row = answer.content, gate.row(answer)
        exchange = exchange_of(gate, row)
        assert (answer.status_code, content) == (200, exchange.answer()), model
        assert (row.status, row.endpoint, row.stream) == ("ok", endpoint, stream)
        assert row.estimated == (model in NO_COUNT), model
        made = {"tool": 69, "thinking": 60, "v33": 5}.get(model, 20)
        if model in NO_COUNT:
            assert row.prompt_tokens > 0 < row.completion_tokens and row.total < 700
        else:
            assert (row.total, row.completion_tokens) == (exchange.tokens, made), model

    in_parallel(len(asked), ask)
    columns = "model, prompt_tokens, cached_tokens"
    cached = gate.rows(f"SELECT DISTINCT {columns} FROM usage WHERE cached_tokens > 0 ORDER BY 1")
    whole = 166 if endpoint == "responses" else 170  # beside it there is the system's prompt
    assert cached == [("cached", whole, 128), ("llama", 10, 1)]


def test_vllm_gets_what_an_agent_sent(gate: Gate) -> None:
    """But for the model's name; responses are not stored and have the gate's own id."""
    user = register(gate)
    tools: JSONObject = {"tools": [{"name": "get_weather", "input_schema": {"type": "object"}}]}
    fields = tools | {"metadata": {"user_id": "u"}, "top_k": 3, "tool_choice": {"type": "auto"}}
    fields |= {"context_management": {"edits": []}, "instructions": "Be brief.", "stop": None}
    for endpoint in AGENTS:
        sent = body_of(endpoint, "llm-user-managed", **fields)
        headers = {"x-api-key": user.key, "Cookie": "a=1", "X-Request-Id": "mine"}
        answer = call(gate, "POST", f"/v1/{endpoint}", json=sent, headers=headers)
        assert (answer.status_code, gate.row(answer).model) == (200, "ok")
        exchange = gate.upstream.asked()[-1]
        got = exchange.json()
        assert exchange.headers["Authorization"] == f"Bearer {UPSTREAM_KEY}"
        assert not {"x-api-key", "cookie"} & {name.lower() for name in exchange.headers}
        if endpoint == "responses":
            assert got.pop("store") is False
            assert answer.headers["X-Request-Id"] in got.pop("request_id")
        assert got == sent | {"model": "ok"}


@pytest.mark.parametrize("endpoint", AGENTS)
def test_bound_of_an_agent_stays_within_context_and_quota(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    """Claude Code asks for 128,000 tokens, Codex for no bound; near the limit it is lowered."""
    monkeypatch.setattr(gate.upstream, "scale_out", True)
    bound = BOUND_NAMES[endpoint]
    rich, poor = register(gate), register(gate, token_limit=25)
    for most in (128_000, 32_000, MAX_MODEL_LEN):
        assert relay(gate, rich.key, endpoint, body_of(endpoint, most=most)).status_code == 200
        assert 4096 < gate.upstream.asked()[-1].json()[bound] <= MAX_MODEL_LEN
    left = relay(gate, rich.key, endpoint, body_of(endpoint, "silent", stream=True))
    left.close()
    assert gate.row(left).status == "aborted"  # and the gate knows now what vLLM can count
    unbound = body_of(endpoint, most=5000)
    if endpoint == "responses":
        del unbound[bound]
    answer = relay(gate, poor.key, endpoint, unbound)
    assert answer.status_code == 200, answer.text
    assert gate.upstream.asked()[-1].json()[bound] == 15
    assert (gate.row(answer).completion_tokens, gate.tokens_used(poor)) == (15, 25)
    words = refused(endpoint, relay(gate, poor.key, endpoint, unbound), 429, "insufficient_quota")
    assert words.startswith("Quota used up: 25 of 25 tokens")


def test_thinking_budget_stays_below_the_bound(gate: Gate) -> None:
    """Also where the bound is lowered; as Anthropic wants it."""
    user = register(gate)
    for most, budget, sent in (
        (32_000, 31_999, None),
        (32_000, 2_000, 2_000),
        (1_025, 1_024, 1_024),
    ):
        thinking = {"type": "enabled", "budget_tokens": budget}
        body = body_of("messages", most=most, thinking=thinking)
        assert relay(gate, user.key, "messages", body).status_code == 200
        got = gate.upstream.asked()[-1].json()
        assert 1024 <= got["thinking"]["budget_tokens"] < got["max_tokens"] <= MAX_MODEL_LEN
        assert sent in (None, got["thinking"]["budget_tokens"])


def test_fields_that_agents_may_not_send(gate: Gate) -> None:
    """Each is named, whatever its value; answers that vLLM stores have no owner."""
    user = register(gate)
    harmful = ("kv_transfer_params", "ec_transfer_params", "vllm_xargs")
    stored = ("previous_response_id", "previous_input_messages", "request_id")
    cases: list[tuple[str, str, object]]
    cases = [(endpoint, name, {}) for endpoint in AGENTS for name in harmful]
    cases += [("responses", name, "") for name in stored]
    cases += [("responses", name, True) for name in ("store", "background")]
    for endpoint, name, value in cases:
        answer = relay(gate, user.key, endpoint, body_of(endpoint) | {name: value})
        assert name in refused(endpoint, answer, 400), name
    assert gate.upstream.asked() == [] and gate.usage() == []
    harmless = dict.fromkeys(harmful + stored) | {"store": False, "background": False}
    assert relay(gate, user.key, "responses", body_of("responses") | harmless).status_code == 200


def test_nothing_else_of_these_protocols_is_relayed(gate: Gate) -> None:
    """Reading, cancelling or rendering another's answer: vLLM is not even asked."""
    user = register(gate)
    paths = "responses/x responses/x/cancel responses/render messages/render messages/batches"
    for method, path in itertools.product(("GET", "POST", "DELETE"), paths.split()):
        answer = call(gate, method, f"/v1/{path}", user.key, json={})
        refused(path.partition("/")[0], answer, 404)
    refused("messages", call(gate, "GET", "/v1/messages", user.key), 405)
    assert {x.path for x in gate.upstream.exchanges} <= {"/v1/models", "/health"}


def test_key_may_come_as_x_api_key(gate: Gate) -> None:
    """Claude Code sends it so, or as Bearer, or both; two different keys are refused."""
    user, other = register(gate), register(gate)
    good = [("", user.key), (user.key, user.key), (user.key, "")]
    bad = [(user.key, other.key), ("", user.key[:-1]), ("", "")]
    for name, (bearer, key) in itertools.product(("models", *AGENTS), good + bad):
        body = None if name == "models" else body_of(name)
        method, headers = "POST" if body else "GET", {"x-api-key": key}
        answer = call(gate, method, f"/v1/{name}", bearer, json=body, headers=headers)
        if (bearer, key) in good:
            assert answer.status_code == 200, (name, bool(bearer))
        else:
            refused(name, answer, 401)
            assert answer.headers["x-should-retry"] == "false"
    assert call(gate, "GET", "/users/me", headers={"x-api-key": user.key}).status_code == 401
    assert len(gate.upstream.asked()) == 6


@pytest.mark.parametrize("endpoint", AGENTS)
def test_agents_are_told_in_their_own_words(make_gate: MakeGate, endpoint: str) -> None:
    """Quota, key, model, busy, down: the client shows our sentence at once."""
    with Upstream() as going:
        gate = make_gate(VLLM_ENDPOINT=going.url, MAX_REQUESTS_PER_USER="1")
        gate.upstream, gate.expected_5xx = going, {502, 503}
        user = register(gate)

        def ask(model: str = "ok", key: str = user.key) -> requests.Response:
            return relay(gate, key, endpoint, body_of(endpoint, model))

        answer = ask("e400")
        assert (answer.status_code, answer.content) == (400, going.asked()[-1].answer())
        assert gate.row(answer).total == 0
        refused(endpoint, ask(key=f"{user.key}x"), 401, "invalid_api_key")
        assert "no-such" in refused(endpoint, ask("no-such"), 404, "model_not_found")
        for model in ("e500", "e401"):
            refused(endpoint, ask(model), 502, "upstream_error")
        refused(endpoint, post_text(gate, f"/v1/{endpoint}", user.key, "{bad"), 400)
        with relay(gate, user.key, endpoint, body_of(endpoint, "silent", stream=True)):
            wait_until(lambda: going.running() == 1)
            refused(endpoint, ask(), 429, "rate_limit_exceeded")
        wait_until(lambda: gate.reserved() == 0)
        answer = ask(key=register(gate, token_limit=1).key)
        assert "tokens" in refused(endpoint, answer, 429, "insufficient_quota")
        assert answer.headers["x-should-retry"] == "false"
        gate.settle()
    assert "vLLM" in refused(endpoint, ask(), 502, "upstream_unavailable")


def raw_agent(key: str, endpoint: str, body: JSONObject) -> bytes:
    """Return a request as bytes."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return raw_request("POST", f"/v1/{endpoint}", headers, json.dumps(body).encode())


@pytest.mark.parametrize("endpoint", AGENTS)
def test_agents_stream_that_vllm_loses_says_so(gate: Gate, endpoint: str) -> None:
    """In the shape that makes the client try again; vLLM's own error event is not doubled."""
    user = register(gate)
    for model in ("die", "dieclean", "midstream"):
        answer = relay(gate, user.key, endpoint, body_of(endpoint, model, 30, stream=True))
        content = answer.content
        assert content.startswith(gate.upstream.asked()[-1].answer()) and content[-2:] == b"\n\n"
        *before, (kind, last) = events_of(content)
        ends = {"error", "response.failed", "message_stop", "response.completed"}
        assert not ends & {kind for kind, _ in before}, model
        if endpoint == "messages":
            assert (kind, set(last)) == ("error", {"type", "error"})
            assert last["error"]["message"] and last["error"]["type"]
        else:
            assert (kind, last["response"]["status"]) == ("response.failed", "failed")
            assert last["response"]["error"]["message"] and last["response"]["error"]["code"]
        row = gate.row(answer)
        assert (row.status, row.estimated) == ("error", 1)
        assert row.prompt_tokens >= 10 and 3 <= row.completion_tokens <= 30


def test_drained_agents_stream_says_so(gate: ThreadedGate) -> None:
    """The last event is the protocol's own failure."""
    user = register(gate)
    gate.expected_5xx = {503}
    with connected(gate) as connection:
        bodies = [body_of(endpoint, "silent", stream=True) for endpoint in AGENTS]
        answers = list(map(functools.partial(relay, gate, user.key), AGENTS, bodies))
        wait_until(lambda: sum(x.tokens for x in gate.upstream.asked()) == 26)
        connection.sendall(raw_request("GET", "/health", {}))
        assert read_reply(connection).status_code == 200
        gate.drain(0.3)
        connection.sendall(raw_agent(user.key, "messages", body_of("messages")))
        refused("messages", read_reply(connection), 503, "draining")
        message, response = (events_of(answer.content)[-1] for answer in answers)
    assert message[0] == "error" and message[1]["error"]["message"]
    assert response[1]["response"]["error"]["code"] == "draining"


def leave_with_fin(connection: socket.socket) -> None:
    """Close when all that has come was read; else it would be a reset."""
    connection.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while connection.recv(1 << 20):
            pass
    connection.close()


LEFT_MODELS = ["prefill", "slow", "tool", "thinking", "silent"]
LEFT = list(itertools.product(LEFT_MODELS, (True, False), (leave_with_fin, leave_with_reset)))


@pytest.mark.parametrize("endpoint", ["chat/completions", "completions", *AGENTS])
def test_request_left_is_ended_by_vllm_and_exact(
    make_gate: MakeGate, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    """In the prefill, in text, thoughts or a tool call; streamed or plain; with all choices."""
    gate = make_gate(MAX_REQUESTS_PER_USER=str(len(LEFT)))
    user, upstream = register(gate), gate.upstream
    monkeypatch.setattr(upstream, "scale_out", True)

    def ask_and_leave(number: int) -> float:
        model, stream, leave = LEFT[number]
        body = body_of(endpoint, model, stream=stream, seed=number)
        if endpoint == "chat/completions":
            body["n"] = 3
        connection = socket.create_connection(gate.address, timeout=10)
        connection.sendall(raw_agent(user.key, endpoint, body))
        wait_until(lambda: any(x.json()["seed"] == number for x in upstream.asked()))
        wait_until(after_seconds(0.15))
        leave(connection)
        return time.monotonic()

    left_at = in_parallel(len(LEFT), ask_and_leave)
    wait_until(lambda: {row.status for row in gate.usage()} == {"aborted"})
    rows = {row.request_id: row for row in gate.usage()}
    assert len(rows) == len(upstream.asked()) == len(LEFT)
    named: set[str] = set()
    for exchange in upstream.asked():
        number, name = exchange.json()["seed"], exchange.headers["X-Request-Id"]
        row, case = rows[name], LEFT[number][:2]
        assert not exchange.left, f"{case}: the gate hung up"
        assert cast(float, exchange.closed_at) - left_at[number] < 1, case
        assert (row.estimated, row.total) == (0, exchange.tokens), case
        assert row.prompt_tokens == (20 if endpoint == "completions" else 10), case
        nothing_made = case[0] == "prefill" or case == ("silent", False)
        assert (row.completion_tokens == 0) == nothing_made, case
        names = {"completions": {f"cmpl-{name}-0", f"cmpl-{name}-1"}}
        names["responses"] = {f"{exchange.json().get('request_id')}_0"}
        named |= names.get(endpoint, {f"chatcmpl-{name}"})
    assert set(upstream.aborts()) == named


@pytest.mark.parametrize("scale_out_is", [False, None], ids=["off", "older vLLM"])
def test_request_left_where_vllm_cannot_end_it(
    gate: Gate, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, scale_out_is: bool | None
) -> None:
    """A stream is cut within a second: an estimate between the deltas and the reservation."""
    monkeypatch.setattr(upstream, "scale_out", scale_out_is)
    user, other = register(gate), register(gate)
    cases = list(itertools.product(AGENTS, LEFT_MODELS))

    def ask_and_leave(number: int) -> tuple[int, int, requests.Response, float]:
        endpoint, model = cases[number]
        deltas = 0
        with relay(gate, user.key, endpoint, body_of(endpoint, model, stream=True)) as answer:
            events = stream_events(answer)  # held: one that is dropped closes its connection
            while model != "prefill" and deltas < 3:
                deltas += b"delta" in next(events).partition(b"\n")[0]
            name = answer.headers["X-Request-Id"]
            reserved = next(row.reserved for row in gate.usage() if row.request_id == name)
        return deltas, reserved, answer, time.monotonic()

    left = in_parallel(len(cases), ask_and_leave)
    wait_until(lambda: not upstream.running())
    for case, (deltas, reserved, answer, left_at) in zip(cases, left, strict=True):
        row = gate.row(answer)
        exchange = exchange_of(gate, row)
        assert exchange.left and cast(float, exchange.closed_at) - left_at < 1, case
        assert (row.status, row.estimated) == ("aborted", 1), case
        assert deltas <= row.completion_tokens <= 300 and 0 < row.total <= reserved, case
        assert row.prompt_tokens == 10 or "messages" not in case or "prefill" in case
    asked = len(upstream.aborts())
    assert asked > 0
    with connected(gate) as connection:  # a plain request runs to its end, and is charged whole
        connection.sendall(raw_agent(other.key, "messages", body_of("messages", "tool")))
        wait_until(lambda: gate.usage(other))
    row = gate.last_row(other)
    assert (row.status, row.estimated, row.total) == ("aborted", 0, 79)
    assert len(upstream.aborts()) == asked  # it was remembered what this vLLM can


def test_vllm_that_comes_back_is_asked_again_what_it_can(make_gate: MakeGate) -> None:
    """Somebody restarts it with --enable-scale-out: the next row is exact."""
    with Upstream() as before:
        gate = make_gate(VLLM_ENDPOINT=before.url)
        user = register(gate)

        def leave(model: str = "slow") -> UsageRow:
            body = body_of("messages", model, stream=True)
            answer = relay(gate, user.key, "messages", body)
            answer.close()
            return gate.row(answer)

        assert leave().estimated == 1
    gate.expected_5xx = {502}
    assert leave().status == "error"
    with Upstream(before.server_address[1]) as after:
        after.scale_out = True
        wait_until(lambda: leave("prefill").status == "aborted", 5)
        assert leave().estimated == 0
        gate.upstream = after
        after.exchanges += before.exchanges
        gate.settle()


@pytest.mark.parametrize("endpoint", ["chat/completions", *AGENTS])
def test_silent_stream_is_kept_alive_between_whole_events(
    make_gate: MakeGate, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    """A comment after so much silence, in the prefill and later, but never inside an event."""
    monkeypatch.setattr(llmgate, "PING_S", 0.07)
    body = body_of(endpoint, stream=True)
    if endpoint == "chat/completions":
        body |= {"stream_options": {"include_usage": True}}
    told = PROTOCOLS[f"/v1/{endpoint}"](body, Behaviour(), "x")
    told.made = 20
    events = b"".join(event for _, event in told.events()) + told.end

    def say(upstream: ScriptedHandler, body: JSONObject) -> None:
        upstream.start_stream()
        upstream.exchange.tokens = 30
        for piece in (events[:300], events[300:340], events[340:]):
            upstream.wait(0.25)
            upstream.chunk(piece)
        upstream.wfile.write(b"0\r\n\r\n")

    with scripted_gate(make_gate, say) as gate:
        received = list(stream_events(relay(gate, register(gate).key, endpoint, body)))
    comments = [event for event in received if event.startswith(b":")]
    assert b"".join(event for event in received if not event.startswith(b":")) == events
    assert received[0] in comments and 3 <= len(comments) <= 10


def test_counting_is_free(gate: Gate) -> None:
    """Claude Code asks 24 times for /context: beside 16 relays, and even without a quota."""
    user, poor = register(gate), register(gate, token_limit=1)
    body = body_of("messages", "llm-user-managed")
    with contextlib.ExitStack() as stack:
        for _ in range(16):
            running = body_of("messages", "silent", stream=True)
            stack.enter_context(relay(gate, user.key, "messages", running))
        keys = [user.key, poor.key] * 24
        path = "messages/count_tokens"
        answers = in_parallel(48, lambda number: relay(gate, keys[number], path, body))
        assert {answer.json()["input_tokens"] for answer in answers} == {10}
        refused("messages", relay(gate, user.key, "messages", body), 429)
        assert len(gate.usage()) == 16 and gate.usage(poor) == []
    counted = [x for x in gate.upstream.exchanges if x.path == COUNT_PATH]
    assert answers[0].content == counted[-1].answer()
    assert {x.json()["model"] for x in counted} == {"ok"}
    for model, status in (("no-such", 404), (5, 400)):
        refused("messages", relay(gate, user.key, path, body | {"model": model}), status)
    refused("messages", relay(gate, "", path, body), 401)


def test_forced_tool_that_vllm_refuses_when_made_is_not_free(gate: Gate) -> None:
    """vLLM has worked for that 400, and does not say how much; other 400s are free."""
    user = register(gate)
    forced = body_of("messages", "badtool", tool_choice={"type": "tool", "name": "get_weather"})
    answer = relay(gate, user.key, "messages", forced)
    assert (answer.status_code, answer.content) == (400, gate.upstream.asked()[-1].answer())
    row = gate.row(answer)
    assert row.estimated == 1 and 0 < row.total <= 300 + len(json.dumps(forced))
    answer = relay(gate, user.key, "messages", forced | {"model": "e400"})
    assert (answer.status_code, gate.row(answer).total) == (400, 0)


HOSTILE = "we\"ird]\\/'name\x7f{x}\t#é"


def test_configurations_of_the_agents_work(make_gate: MakeGate) -> None:
    """Whatever the model is called: they parse, and name the gate and the true context."""
    with Upstream() as other:
        other.serves = frozenset({HOSTILE})
        for model, aliases in (
            ("llm-user-managed", "llm-user-managed="),
            ('al"i\\as', 'al"i\\as='),
            (HOSTILE, "gone=no-such-model"),
        ):
            gate = make_gate(VLLM_ENDPOINT=other.url, MODEL_ALIASES=aliases)
            gate.upstream, user = other, register(gate)
            env = call(gate, "GET", "/claude.json", user.key).json()["env"]
            models = [value for name, value in env.items() if name.endswith("_MODEL")]
            assert models == [model] * 4
            assert env["ANTHROPIC_BASE_URL"] == gate.url
            assert env["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == str(MAX_MODEL_LEN)
            assert 0 < int(env["CLAUDE_CODE_MAX_OUTPUT_TOKENS"]) < MAX_MODEL_LEN
            config = tomllib.loads(call(gate, "GET", "/codex.toml", user.key).content.decode())
            assert (config["model"], config["model_context_window"]) == (model, MAX_MODEL_LEN)
            provider = config["model_providers"][config["model_provider"]]
            assert provider["base_url"] == f"{gate.url}/v1"
            assert (provider["wire_api"], provider["env_key"]) == ("responses", "LLMGATE_API_KEY")
            for endpoint in AGENTS:
                asked = relay(gate, user.key, endpoint, body_of(endpoint, model))
                assert gate.row(asked).model == HOSTILE
            for path in ("/claude.json", "/codex.toml"):
                assert_error(call(gate, "GET", path), 401)
            gate.settle()


# ---------------------------------------------------------------------------------------------
# Quota: `tokens_used` never passes `token_limit`, and what is left can be used.


def test_quota_ends_exactly(gate: Gate) -> None:
    """The last answer is cut to what is left; after that vLLM sees nothing more.

    The end is a `finish_reason` "length", which every client understands.
    """
    user = register(gate, token_limit=105)
    for _ in range(3):
        answer = chat(gate, user.key, max_tokens=20)
        assert answer.json()["usage"]["total_tokens"] == 30
    cut = chat(gate, user.key, max_tokens=20, min_tokens=10)
    assert cut.status_code == 200, cut.text
    assert cut.json()["usage"]["completion_tokens"] == 5
    assert cut.json()["choices"][0]["finish_reason"] == "length"
    assert cut.headers["x-ratelimit-remaining-tokens"] == "0"
    sent = gate.upstream.asked()[-1].json()
    assert sent["max_tokens"] == 5 and sent["min_tokens"] <= 5
    gate.settle()
    assert gate.tokens_used(user) == 105
    for stream in (False, True):
        with chat(gate, user.key, max_tokens=20, stream=stream) as refused:
            error = assert_error(refused, 429, "insufficient_quota")
    assert error["type"] == "insufficient_quota"
    assert error["message"].startswith("Quota used up: 105 of 105 tokens")
    assert len(gate.upstream.asked()) == 4


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
        assert 0 < self.highest <= limit
        spent = sum(answer.json()["usage"]["total_tokens"] for answer in answered)
        assert gate.tokens_used(user) == spent <= limit


def test_parallel_requests_never_pass_the_limit(make_gate: MakeGate) -> None:
    """64 at once, of which 20 fit."""
    gate = make_gate(MAX_REQUESTS_PER_USER="64")
    user = register(gate, token_limit=1000)
    QuotaRace.run([gate], user).check(gate, user, 1000)


def test_one_request_does_not_claim_the_whole_quota(gate: Gate) -> None:
    """Eight without max_tokens all run; so do OpenCode's two, which ask for 32,000 tokens each."""
    user = register(gate, token_limit=100_000)
    answers = in_parallel(8, lambda _: chat(gate, user.key, "paced"))
    assert [answer.status_code for answer in answers] == [200] * 8
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


def test_each_choice_is_charged(gate: Gate) -> None:
    """`n: 5` costs the prompt once and five completions."""
    user = register(gate)
    for stream in (False, True):
        with chat(gate, user.key, n=5, max_tokens=8, stream=stream) as answer:
            assert answer.status_code == 200
            assert answer.content
            row = gate.row(answer)
        assert (row.prompt_tokens, row.completion_tokens, row.estimated) == (10, 40, 0)


def test_strange_max_tokens_cost_no_more_than_is_left(gate: Gate) -> None:
    """0 is a 400; 10^18 is lowered; of a field that stands twice vLLM gets the last one, once."""
    user = register(gate, token_limit=100)
    assert chat(gate, user.key, max_tokens=0).status_code == 400
    gate.settle()
    assert gate.tokens_used(user) == 0
    body = json.dumps(chat_body())[:-1] + ', "max_tokens": 8000, "max_tokens": 5}'
    answer = post_text(gate, "/v1/chat/completions", user.key, body)
    assert answer.status_code == 200, answer.text
    asked = gate.upstream.asked()[-1]
    assert asked.body.count(b'"max_tokens"') == 1 and asked.json()["max_tokens"] == 5
    assert chat(gate, user.key, max_tokens=10**18).status_code == 200
    assert gate.upstream.asked()[-1].json()["max_tokens"] == 75


BOUNDS: list[JSONObject] = [
    {"max_tokens": 5, "max_completion_tokens": 8000},
    {"max_tokens": 8000, "max_completion_tokens": 5},
    {"max_tokens": None, "max_completion_tokens": None},
    {"max_completion_tokens": 8000},
    {"n": 3},
]


def test_no_field_yields_more_than_is_left(gate: Gate) -> None:
    """Whichever of the fields vLLM obeys."""
    for asked, stream in itertools.product(BOUNDS, (False, True)):
        user = register(gate, token_limit=25)
        with chat(gate, user.key, stream=stream, **asked) as answer:
            assert answer.status_code == 200, answer.text
            assert answer.content
        gate.settle()
        assert gate.tokens_used(user) in range(11, 26), asked


def test_answer_without_a_count_is_estimated(gate: Gate) -> None:
    """The client gets it, and each is charged within what was reserved."""
    user = register(gate)
    for model, stream, _ in itertools.product(("nousage", "badusage"), (False, True), range(3)):
        with chat(gate, user.key, model, stream=stream, max_tokens=20) as answer:
            assert answer.status_code == 200
            assert ANSWER.split()[0] in answer.text
            row = gate.row(answer)
        assert row.estimated == 1 and row.status == "ok"
        assert 20 < row.total <= len(json.dumps(chat_body(model))) + 400 + 20
    assert gate.tokens_used(user) == sum(row.total for row in gate.usage(user)) > 12 * 20


def test_true_count_above_the_claim_is_charged(make_gate: MakeGate) -> None:
    """A chat template may add more than the bytes of the JSON; an absurd count is no count."""
    counts = iter([900, 10**30])

    def say(upstream: ScriptedHandler, body: JSONObject) -> None:
        upstream.say_whole(next(counts), 1)

    with scripted_gate(make_gate, say) as gate:
        user = register(gate)
        row = gate.row(chat(gate, user.key, max_tokens=20))
        assert (row.total, row.estimated) == (901, 0)
        row = gate.row(chat(gate, user.key, max_tokens=20))
        assert row.estimated == 1 and 0 < row.total <= MAX_MODEL_LEN


def test_prompt_is_counted_exactly_near_the_limit(gate: Gate) -> None:
    """200 tokens left, a prompt of 150 tokens in more than 600 bytes; one of 300 is refused."""
    messages = [{"role": "user", "content": PROMPT.ljust(600, ".")}]
    for stream in (False, True):
        user = register(gate, token_limit=200)
        with chat(gate, user.key, messages=messages, max_tokens=20, stream=stream) as answer:
            assert answer.status_code == 200, answer.text
            assert answer.content
            row = gate.row(answer)
        assert (row.prompt_tokens, row.completion_tokens) == (150, 20)
    assert any(x.path == "/tokenize" for x in gate.upstream.exchanges)
    user = register(gate, token_limit=200)
    messages = [{"role": "user", "content": "." * 1200}]
    assert_error(chat(gate, user.key, messages=messages), 429, "insufficient_quota")
    assert len(gate.upstream.asked()) == 2


DECOYS: dict[str, tuple[str, JSONObject]] = {
    "messages": ("completions", {"prompt": "x" * 40000, "messages": [{"role": "user"}]}),
    "prompt": ("embeddings", {"input": "x" * 40000, "prompt": [1]}),
    "token lists": ("completions", {"prompt": [[1] * 4000]}),
    "a list": ("completions", {"prompt": ["x" * 5000, "y" * 9000]}),
}


def test_no_shape_of_a_prompt_escapes_the_count(gate: Gate) -> None:
    """What vLLM will read is counted, whatever else the body holds."""
    user = register(gate, token_limit=3000)
    for endpoint, body in DECOYS.values():
        answer = relay(gate, user.key, endpoint, {"model": "ok", "max_tokens": 1} | body)
        assert_error(answer, 429, "insufficient_quota")
    assert gate.upstream.asked() == []


def test_raised_limit_and_reset_count_at_once(gate: Gate) -> None:
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


def test_reset_while_a_stream_runs_keeps_the_books(make_gate: MakeGate) -> None:
    """The count that comes later is lower than the estimate that the reset has balanced."""
    go_on = threading.Event()

    def say(upstream: ScriptedHandler, body: JSONObject) -> None:
        upstream.start_stream()
        upstream.chunk(b'data: {"choices":[{"index":0,"delta":{"content":"Hi"}}]}\n\n')
        assert go_on.wait(10)
        upstream.chunk(b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n')
        upstream.chunk(
            b'data: {"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":3}}\n\n'
        )
        upstream.chunk(b"data: [DONE]\n\n")
        upstream.wfile.write(b"0\r\n\r\n")
        upstream.exchange.tokens = 13

    with scripted_gate(make_gate, say) as gate:
        user = register(gate)
        long = [{"role": "user", "content": "word " * 400}]
        with chat(gate, user.key, stream=True, messages=long) as running:
            events = stream_events(running)
            next(events)
            wait_until(lambda: gate.tokens_used(user) > 13, 6)  # booked so far: an estimate
            run_command(gate, "reset-usage", user.name)
            assert gate.tokens_used(user) == 0
            go_on.set()
            assert list(events)[-1] == b"data: [DONE]\n\n"
        assert gate.row(running).status == "ok"
        assert gate.tokens_used(user) <= 13


PICTURE = base64.b64encode(bytes(3 << 19)).decode()  # 2 MB
PICTURE_SHAPES = ["image_url", "image", "tool_result", "input_image", "input_file"]


def with_picture(shape: str, size: int) -> tuple[str, JSONObject]:
    """Return endpoint and body of a request with so much base64 in one of the clients' shapes."""
    url = "data:image/png;base64," + PICTURE[:size]
    source = {"type": "base64", "media_type": "image/png", "data": PICTURE[:size]}
    parts: dict[str, JSONObject] = {
        "image_url": {"image_url": {"url": url}},
        "image": {"source": source},
        "tool_result": {"tool_use_id": "t", "content": [{"type": "image", "source": source}]},
        "input_image": {"image_url": url},
        "input_file": {"filename": "a.png", "file_data": url},
    }
    said = [{"role": "user", "content": [{"type": shape} | parts[shape]]}]
    if shape.startswith("input"):
        return "responses", {"model": "ok", "max_output_tokens": 16, "input": said}
    endpoint = "chat/completions" if shape == "image_url" else "messages"
    return endpoint, {"model": "ok", "max_tokens": 16, "messages": said}


def test_picture_is_not_counted_by_its_bytes(make_gate: MakeGate) -> None:
    """Relayed near the limit; left in the prefill it costs the model's context at most."""

    def say(upstream: ScriptedHandler, body: JSONObject) -> None:
        if upstream.path == ABORT_PATH:
            raise Refused(403, SCALE_OUT_ERROR, "PermissionDeniedError", None)
        if body.get("stream"):
            upstream.start_stream()
            upstream.wait(None)
        usage = {"prompt_tokens": 900, "completion_tokens": 1}
        upstream.say_whole(900, usage=usage | {"input_tokens": 900, "output_tokens": 1})

    def ask(number: int) -> None:
        user, size = users[number], 10_240 if number % 2 else len(PICTURE)
        endpoint, body = with_picture(PICTURE_SHAPES[number // 2], size)
        answer = relay(gate, user.key, endpoint, body)
        assert answer.status_code == 200, answer.text
        assert gate.row(answer).total == 901
        with relay(gate, user.key, endpoint, body | {"stream": True}) as answer:
            assert answer.status_code == 200
        row = gate.row(answer)
        assert (row.status, row.estimated) == ("aborted", 1)
        assert 0 < row.total <= MAX_MODEL_LEN + 16

    with scripted_gate(make_gate, say) as gate:
        limits = [1_000_000, 30_000] * len(PICTURE_SHAPES)
        users = [register(gate, token_limit=limit) for limit in limits]
        in_parallel(len(users), ask)


def test_picture_of_a_killed_gate_costs_the_context_at_most(start_process: StartProcess) -> None:
    """The row that it left is closed as lost, with an estimate that is no base64."""
    gate = start_process()
    user = register(gate)
    endpoint, body = with_picture("image_url", 20_000)
    with relay(gate, user.key, endpoint, body | {"stream": True, "model": "prefill"}):
        gate.kill()
    gate = start_process()
    expire_leases(gate)
    assert gate.last_row(user, 6).status == "lost"
    assert 0 < gate.tokens_used(user) <= MAX_MODEL_LEN


def test_text_is_no_picture(gate: Gate) -> None:
    """Neither an escaped letter nor a `data:` URL in what is said makes it one."""
    user, poor = register(gate, token_limit=200), register(gate, token_limit=900)
    said = json.dumps(chat_body(messages=[{"role": "user", "content": "`" * 600}], max_tokens=9))
    answer = post_text(gate, "/v1/chat/completions", user.key, said.replace("`", "\\u0060"))
    assert answer.status_code == 200, answer.text
    assert gate.row(answer).prompt_tokens == 150
    long = [{"role": "user", "content": "data:image/png;base64," + PICTURE[:10_000]}]
    assert_error(chat(gate, poor.key, messages=long), 429)
    assert len(gate.upstream.asked()) == 1


def test_batch_of_embeddings_counts_as_vllm_counts_it(make_gate: MakeGate) -> None:
    """Token ids by their number, each text for itself: it is relayed, and booked exactly."""
    ids: list[Any] = list(range(230))
    inputs = {1_000_000: ["word" * 230] * 1000, 300_000: [ids] * 1000, 300: ids}
    counts = iter([230_000, 230_000, 230])
    with scripted_gate(make_gate, lambda up, _: up.say_whole(next(counts), 0, data=[])) as gate:
        for limit, asked in inputs.items():
            user = register(gate, token_limit=limit)
            answer = relay(gate, user.key, "embeddings", {"model": "ok", "input": asked})
            assert answer.status_code == 200, answer.text
        gate.settle()
        rows = [(row.total, row.estimated) for row in gate.usage()]
    assert sorted(rows) == [(230, 0), (230_000, 0), (230_000, 0)]


def test_gate_asks_for_what_the_context_and_the_quota_hold(make_gate: MakeGate) -> None:
    """Never for more, which some servers refuse; nor less, where a server tells no context."""
    asked: list[int] = []

    def say(upstream: ScriptedHandler, body: JSONObject) -> None:
        asked.append(body.get("max_tokens", 0))
        upstream.say_whole(9007, min(asked[-1], 180_000) or 1)

    told, untold = {"id": "told", "max_model_len": 32768}, {"id": "untold"}
    with scripted_gate(make_gate, say, told, untold) as gate:
        for left in (50_000, 100_000, 115_000, 131_000, 1_000_000):
            messages, user = (
                [{"role": "user", "content": "word" * 9007}],
                register(gate, token_limit=left),
            )
            assert chat(gate, user.key, "told", messages=messages).status_code == 200, left
        assert max(asked) <= 32768 - 9007
        poor, rich = register(gate, token_limit=400_000), register(gate)
        assert chat(gate, poor.key, "untold", max_tokens=550_000).status_code == 200
        assert chat(gate, rich.key, "untold", max_tokens=200_000).status_code == 200
        gate.settle()
        assert asked[-2] < 400_000 and asked[-1] == 200_000
        assert gate.tokens_used(rich) == 189_007  # all of it, though the prompt looked short


def test_field_that_the_tokenizer_does_not_know_counts_by_its_bytes(gate: Gate) -> None:
    """A template may render it: 20,000 tokens do not pass a limit of 2,000, a short one does."""
    user, large = register(gate, token_limit=2000), {"type": "text", "text": "word" * 20_000}
    for name in ("documents", "reasoning_effort", "response_format", "tool_choice", "what_comes"):
        assert_error(chat(gate, user.key, "ok", **{name: large}), 429)
    embeds = {"model": "ok", "prompt": "", "prompt_embeds": [PICTURE[:9000]] * 9, "max_tokens": 1}
    assert_error(relay(gate, user.key, "completions", embeds), 429)
    assert gate.upstream.asked() == []
    assert chat(gate, user.key, reasoning_effort="low", max_tokens=5).status_code == 200


def test_counting_costs_vllm_no_more_than_answering(
    make_gate: MakeGate, upstream: Upstream
) -> None:
    """Prompts to count are admitted like requests; who has nothing left costs nothing."""
    gate = make_gate(MAX_REQUESTS_PER_USER="3")
    user, spent = register(gate, token_limit=100), register(gate, token_limit=30)
    messages = [{"role": "user", "content": "x" * 1_000_000}]
    answers = in_parallel(20, lambda _: chat(gate, user.key, messages=messages))
    assert {answer.status_code for answer in answers} == {429}
    counted = [x for x in upstream.exchanges if x.path == "/tokenize"]
    at_once = [
        sum(x.opened_at <= y.opened_at < cast(float, x.closed_at) for x in counted) for y in counted
    ]
    assert 1 <= max(at_once) <= 3
    spend_all(gate, spent)
    before = len(upstream.exchanges)
    for _ in range(3):
        assert_error(chat(gate, spent.key), 429, "insufficient_quota")
    assert not any(x.method == "POST" for x in upstream.exchanges[before:])


def test_used_up_is_said_only_when_it_is(gate: Gate) -> None:
    """Who still has some is told what is used, what is left, and what this request needs."""
    user = register(gate, token_limit=1000)
    assert chat(gate, user.key, max_tokens=20).status_code == 200
    gate.settle()
    long = [{"role": "user", "content": "word" * 2000}]
    message = assert_error(chat(gate, user.key, messages=long), 429)["message"]
    assert "used up" not in message.lower()
    assert {"30", "970", "2001"} <= set(re.findall(r"\d+", message.replace(",", "")))
    run_command(gate, "set-limit", user.name, "30")
    message = assert_error(chat(gate, user.key), 429, "insufficient_quota")["message"]
    assert message.startswith("Quota used up: 30 of 30 tokens")


class Clock:
    """The wall clock of the processes that are started with `env`; a test sets it, in UTC."""

    def __init__(self, directory: Path, moment: str) -> None:
        """Start at a moment written like 2027-01-31 23:59:50."""
        self.offset = directory / "offset"
        self.set(moment)
        now = f"time.time = lambda: real() + float(open({str(self.offset)!r}).read())"
        self.env = customized(directory / "clock", f"import time\nreal = time.time\n{now}\n")

    def set(self, moment: str) -> None:
        """Go to another moment."""
        new = self.offset.with_suffix(".new")
        new.write_text(str(unix(moment) - time.time()))
        new.rename(self.offset)


def unix(moment: str) -> float:
    """Return the Unix seconds of a moment of UTC."""
    return datetime.fromisoformat(f"{moment}+00:00").timestamp()


def resets(gate: Gate) -> list[tuple[int, int]]:
    """Return user and tokens of each row that began a quota again."""
    sql = "SELECT user_id, prompt_tokens + completion_tokens FROM usage"
    return sorted(gate.rows(f"{sql} WHERE endpoint = 'reset-usage'"))


def spend_all(gate: Gate, user: User) -> None:
    """Use a quota of 30 tokens up."""
    wait_until(lambda: chat(gate, user.key, max_tokens=20).status_code == 200, 5)
    gate.settle()
    assert_error(chat(gate, user.key, max_tokens=20), 429, "insufficient_quota")


def test_quota_begins_again_each_day(start_process: StartProcess, tmp_path: Path) -> None:
    """Soon after midnight and only once, also if the gate was down then; the rows stay the sum."""
    clock = Clock(tmp_path, "2028-02-27 12:00:00")
    gate = start_process(QUOTA_PERIOD="day", **clock.env)
    user = register(gate, token_limit=30)
    register(gate)  # who uses nothing has nothing to balance
    for day in range(9):  # with a leap day and a turn of the month
        spend_all(gate, user)
        evening = datetime(2028, 2, 27, 23, 59, 50) + timedelta(day)
        clock.set(str(evening))
        assert_error(chat(gate, user.key, max_tokens=20), 429, "insufficient_quota")
        clock.set(str(evening + timedelta(seconds=12)))
    spend_all(gate, user)
    gate.stop()
    clock.set("2028-04-09 09:00:00")
    gate = start_process(QUOTA_PERIOD="day", **clock.env)
    spend_all(gate, user)
    gate.stop()
    gate = start_process(QUOTA_PERIOD="day", **clock.env)
    assert_error(chat(gate, user.key, max_tokens=20), 429, "insufficient_quota")
    assert resets(gate) == [(user.id, -30)] * 10
    assert user.name not in run_command(gate, "check")


def test_gates_on_one_database_are_one(
    shared_env: dict[str, str], start_process: StartProcess, tmp_path: Path
) -> None:
    """A gate and one of four processes: one quota, one period, five wrong passwords for all."""
    clock = Clock(tmp_path, "2027-03-31 23:59:00")
    env = shared_env | clock.env | {"QUOTA_PERIOD": "month", "MAX_REQUESTS_PER_USER": "64"}
    (tmp_path / "two").mkdir()
    one, two = start_process(**env), start_process(tmp_path / "two", **env, PROCESSES="4")
    racer, users = register(one, token_limit=1000), [register(one, token_limit=30) for _ in "abc"]
    tries = [try_login((one, two)[i % 2], racer.name, "wrong-password") for i in range(6)]
    assert [answer.status_code for answer in tries] == [401] * 5 + [429]
    for user in users:
        spend_all(one, user)
    clock.set("2027-04-01 00:00:01")
    for user, gate in zip(users, (one, two, two), strict=True):
        spend_all(gate, user)
    QuotaRace.run([one, two], racer).check(one, racer, 1000)  # and all have looked at the clock
    assert resets(one) == [(user.id, -30) for user in users]
    assert {one.tokens_used(user) for user in users} == {30}


def test_stream_over_midnight_is_booked_to_both_days(
    start_process: StartProcess, tmp_path: Path
) -> None:
    """What it made since the last checkpoint is the new day's; nothing is lost between them."""
    clock = Clock(tmp_path, "2027-05-05 23:59:00")
    gate = start_process(QUOTA_PERIOD="day", **clock.env)
    user = register(gate)
    with chat(gate, user.key, "slow", stream=True, max_tokens=60) as running:
        events = stream_events(running)
        wait_until(lambda: next(events) and gate.tokens_used(user) > 0, 5)
        clock.set("2027-05-06 00:00:00")
        wait_until(lambda: next(events) and resets(gate), 5)
        assert list(events)[-1] == b"data: [DONE]\n\n"
    assert gate.row(running).total == 70
    ((_, day_before),) = resets(gate)
    assert gate.tokens_used(user) == 70 + day_before < 70


PERIODS = {  # {moment: when the quota begins again}
    "day": {"2028-02-28 23:59:30": "2028-02-29", "2027-12-31 00:00:00": "2028-01-01"},
    "week": {"2026-11-30 00:00:05": "2026-12-07", "2027-12-28 12:00:00": "2028-01-03"},
    "month": {
        "2027-01-31 23:59:30": "2027-02-01",
        "2028-02-29 12:00:00": "2028-03-01",
        "2027-12-01 00:00:05": "2028-01-01",
    },
}


@pytest.mark.parametrize("period", PERIODS)
def test_report_says_when_the_quota_begins_again(
    start_process: StartProcess, tmp_path: Path, period: str
) -> None:
    """In Unix seconds of the next period's first moment."""
    clock = Clock(tmp_path, "2026-01-01 00:00:00")
    gate = start_process(QUOTA_PERIOD=period, **clock.env)
    user = register(gate)
    for now, then in PERIODS[period].items():
        clock.set(now)
        told = call(gate, "GET", "/users/usage", user.key).json()["resets_at"]
        assert (now, told) == (now, unix(f"{then} 00:00:00"))


def test_everybody_is_told_when_the_quota_begins_again(
    gate: Gate, start_process: StartProcess, tmp_path: Path
) -> None:
    """In the drawn report, in the 429's sentence, in OpenAI's header; null if it never does."""
    clock, begins = Clock(tmp_path, "2026-11-27 12:00:30"), "begins again on Tuesday 1 December"
    (tmp_path / "timed").mkdir()
    timed = start_process(tmp_path / "timed", QUOTA_PERIOD="month", **clock.env)
    user, headers = register(timed, token_limit=30), {"Accept": "text/plain"}
    spend_all(timed, user)
    drawn = call(timed, "GET", "/users/usage", user.key, headers=headers).text
    refused = chat(timed, user.key)
    assert f"{begins}, in 4 days" in drawn and begins in refused.json()["error"]["message"]
    assert re.fullmatch(r"83h59m[23]\ds", refused.headers["x-ratelimit-reset-tokens"])
    clock.set("2026-11-30 20:47:55")
    assert re.fullmatch(r"3h12m\ds", chat(timed, user.key).headers["x-ratelimit-reset-tokens"])
    assert call(gate, "GET", "/users/usage", register(gate).key).json()["resets_at"] is None


# ---------------------------------------------------------------------------------------------
# Faults: vLLM, the client, the database, the disk or the gate itself fails, and the books stay
# right.


def test_answer_that_breaks_off_is_told_and_booked(gate: Gate) -> None:
    """A stream never ends cleanly then, for OpenCode would ask again without end; plain it is 502.

    When the engine dies vLLM says so in the stream, and that passes.
    """
    gate.expected_5xx = {502}
    user = register(gate)
    for model in ("die", "dieclean", "midstream"):
        with chat(gate, user.key, model, stream=True) as response:
            events = list(stream_events(response))
            row = gate.row(response)
        assert (row.status, row.estimated) == ("error", 0)
        assert (row.prompt_tokens, row.completion_tokens) == (10, 3)
        assert spoken(events) == " ".join(WORDS[:3]) + " "
        if model == "midstream":
            assert b"".join(events) == said_by_vllm(gate.upstream.asked()[-1])
        else:
            assert len(events) == 5
            error = data(events[-1])["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["code"] == "upstream_error" and not LEAKS.search(error["message"])
    for model in ("die", "dieclean", "gzip"):  # half a body, or one that the gate cannot read
        answer = chat(gate, user.key, model)
        assert_error(answer, 502, "upstream_error")
        assert (gate.row(answer).status, gate.row(answer).estimated) == ("error", 1)


def test_endless_line_is_cut(gate: Gate) -> None:
    """An event without an end does not fill the gate's memory; vLLM is let go."""
    events = streamed(gate, register(gate).key, "endless")
    assert [data(event)["error"]["code"] for event in events] == ["upstream_error"]
    assert len(gate.upstream.asked()[0].answer()) < 40_000_000


def test_silent_vllm_is_cut_in_time(make_gate: MakeGate) -> None:
    """An error event, or 504; vLLM's connection is freed."""
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
    """vLLM stops within a second; the row is there within two."""
    user = register(gate)
    connection = socket.create_connection(gate.address, timeout=10)
    connection.sendall(raw_chat(user.key, chat_body(model, stream=True, n=n)))
    read_events(connection, 4 * n)
    left_at = time.monotonic()
    leave(connection)
    (exchange,) = gate.upstream.asked()
    wait_until(lambda: exchange.closed_at is not None, 2)
    assert exchange.left and cast(float, exchange.closed_at) - left_at < 1
    row = gate.last_row(user, 2)
    assert (row.status, row.estimated) == ("aborted", 0)
    assert row.total == exchange.tokens
    if model == "silent":
        assert (row.prompt_tokens, row.completion_tokens) == (10, 3)


def test_client_that_leaves_where_vllm_cannot_be_asked(gate: Gate) -> None:
    """A stream without running counts is a marked estimate; a plain request is charged whole."""
    user, other = register(gate), register(gate)
    with connected(gate) as connection:
        connection.sendall(raw_chat(user.key, chat_body("nostreamopts", stream=True)))
        read_events(connection, 4)
    row = gate.last_row(user)
    assert (row.status, row.estimated) == ("aborted", 1)
    assert 13 <= row.total < 1000
    with connected(gate) as connection:
        connection.sendall(raw_chat(other.key, chat_body("slow", max_tokens=10)))
        wait_until(lambda: gate.upstream.running() == 1)
    row = gate.last_row(other, 5)
    assert (row.prompt_tokens, row.completion_tokens, row.estimated) == (10, 10, 0)


def test_clients_that_leave_at_once_leave_nothing_reserved(make_gate: MakeGate) -> None:
    """200 of them, 0 to 30 ms after asking; whatever had begun is closed as aborted."""
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
    assert {row.status for row in gate.usage(user)} == {"aborted"}
    assert chat(gate, user.key).status_code == 200


def test_caller_who_never_reads_is_given_up(start_process: StartProcess) -> None:
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


def test_killed_gate_loses_no_row(start_process: StartProcess, tmp_path: Path) -> None:
    """Five kills under load; within a minute, by the gate's own clock, nothing is pending."""
    settings = {"MAX_REQUESTS_PER_USER": "400"}
    gate = start_process(**settings)
    user = register(gate)
    whole: list[str] = []
    chance, starts_s = random.Random(32), []
    for number in range(5):
        with ThreadPoolExecutor(2) as pool:
            streams = pool.submit(whole_answers, gate, user, 20, {"stream": True})
            plain = pool.submit(whole_answers, gate, user, 20, {})
            wait_for_rows(gate, 40 * (number + 1))
            time.sleep(chance.uniform(0.1, 0.4))
            gate.kill()
            whole += streams.result() + plain.result()
        if number == 4:
            a_minute_on = "import time\nreal = time.time\ntime.time = lambda: real() + 60\n"
            settings |= customized(tmp_path / "code", a_minute_on)
        began = time.monotonic()
        gate = start_process(**settings, PORT=str(gate.address[1]))  # which nothing holds
        assert call(gate, "GET", "/health").status_code == 200
        starts_s.append(time.monotonic() - began)
        assert gate.rows("PRAGMA integrity_check") == [("ok",)]
    assert statistics.median(starts_s) < 5
    rows = {row.request_id: row.status for row in gate.usage()}
    assert len(rows) == 200
    assert len(whole) > 20 and set(whole) <= set(rows)
    assert chat(gate, user.key).status_code == 200
    gate.settle(10)
    statuses = Counter(row.status for row in gate.usage())
    assert set(statuses) == {"ok", "lost"} and statuses["lost"] > 20
    assert all(row.total > 0 for row in gate.usage())


def test_killed_process_is_replaced_and_none_is_left_behind(start_process: StartProcess) -> None:
    """PROCESSES=2: both write one log, SIGTERM ends both, and a kill -9 of the first one, too."""
    gate = start_process(PROCESSES="2", MAX_REQUESTS_PER_USER="64")
    user, first = register(gate), gate.workers()
    assert len(first) == 2
    answers = in_parallel(40, lambda _: chat(gate, user.key))
    assert {answer.status_code for answer in answers} == {200}
    names = [answer.headers["X-Request-Id"] for answer in answers]
    wait_until(lambda: all(gate.log.read_text().count(name) == 1 for name in names))
    assert not list(gate.directory.glob("server-*.log"))
    os.kill(min(first), signal.SIGKILL)
    wait_until(lambda: len(gate.workers() - first) == 1, 5)
    wait_until(lambda: gate.workers() and chat(gate, user.key).status_code == 200, 5)
    second = gate.workers()
    gate.stop()
    assert not any(Path(f"/proc/{pid}").exists() for pid in second)
    gate = start_process(PROCESSES="2")
    orphans = gate.workers()
    gate.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans), 10)


def test_sigterm_lets_answers_end(start_process: StartProcess) -> None:
    """A running stream ends properly, new relays are refused, exit status 0; the port is free."""
    gate = start_process()
    gate.expected_5xx = {503}
    user = register(gate)
    with connected(gate), chat(gate, user.key, "slow", stream=True, max_tokens=30) as running:
        events = stream_events(running)
        next(events)
        gate.process.terminate()
        wait_until(lambda: is_refused(gate, user))
        assert list(events)[-1] == b"data: [DONE]\n\n"
        assert gate.process.wait(10) == 0
        again = start_process(PORT=str(gate.address[1]))
        assert chat(again, user.key).status_code == 200
    assert [(row.status, row.total) for row in gate.usage() if row.model == "slow"] == [("ok", 40)]
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
    """A stream gets an error event, a plain request 503, and /health as well; all is booked."""
    user = register(gate)
    gate.expected_5xx = {503}
    with (
        chat(gate, user.key, "silent", stream=True) as running,
        ThreadPoolExecutor(1) as pool,
        connected(gate) as connection,
    ):
        events = stream_events(running)
        seen = [next(events) for _ in range(4)]
        waiting = pool.submit(chat, gate, user.key, "silent")
        wait_until(lambda: gate.upstream.running() == 2)
        connection.sendall(raw_request("GET", "/health", {}))
        assert read_reply(connection).status_code == 200
        gate.drain(0.5)
        connection.sendall(raw_request("GET", "/health", {}))
        assert_error(read_reply(connection), 503, "draining")
        seen += list(events)
        assert_error(waiting.result(), 503, "draining")
    assert data(seen[-1])["error"]["code"] == "draining"
    gate.thread.join(5)
    assert not gate.thread.is_alive()
    assert gate.complaints() == []
    plain, stream = sorted(gate.usage(user), key=lambda row: row.stream)
    assert (plain.status, plain.estimated) == ("error", 1)
    assert (stream.status, stream.estimated, stream.total) == ("error", 0, 13)


@contextlib.contextmanager
def database_locked(gate: Gate) -> Iterator[None]:
    """This process holds the write lock of another one's database."""
    path = gate.database_url.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield
        database.execute("ROLLBACK")


def test_locked_database_is_waited_for(start_process: StartProcess) -> None:
    """Three seconds are bridged, and who only reads does not wait; then it is 503.

    vLLM sees nothing of what is refused. What ended meanwhile is booked when the lock is gone.
    """
    gate = start_process()
    gate.expected_5xx, gate.may_log_traceback = {503}, True
    user = register(gate)
    with ThreadPoolExecutor(1) as pool:
        with database_locked(gate):
            answer, over = pool.submit(chat, gate, user.key), after_seconds(3)
            began = time.monotonic()
            assert call(gate, "GET", "/v1/models", user.key).status_code == 200
            assert time.monotonic() - began < 1
            wait_until(over, 4)
            assert not answer.done()
        assert answer.result(5).status_code == 200
    with chat(gate, user.key, "slow", stream=True, max_tokens=5) as running:
        events = stream_events(running)
        next(events)
        with database_locked(gate):
            assert_error(chat(gate, user.key), 503, "database_unavailable")
            assert len(gate.upstream.asked()) == 2
        assert spoken(list(events)).startswith(" ".join(WORDS[:4]))
    assert chat(gate, user.key).status_code == 200
    gate.settle(10)
    assert gate.tokens_used(user) == 15 + 30 + 30


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


def test_database_that_was_away_needs_no_restart(
    postgres_env: dict[str, str], start_process: StartProcess
) -> None:
    """Callers get 503 and vLLM sees nothing new; what ran is booked when the database is back.

    Logins that nobody could check are no guesses: they do not hold the name back afterwards.
    """
    gate = start_process(**postgres_env)
    gate.expected_5xx, gate.may_log_traceback = {503}, True
    user = register(gate)
    token = login(gate, user)
    with ThreadPoolExecutor(3) as pool:
        plain = pool.submit(chat, gate, user.key, "slow", max_tokens=10)
        short = pool.submit(streamed, gate, user.key, "slow", max_tokens=20)
        long = pool.submit(streamed, gate, user.key, "slow", max_tokens=100)
        wait_for_rows(gate, 3)
        wait_until(lambda: len(gate.upstream.asked()) == 3)
        over = after_seconds(3)
        with database_down(gate):
            for number in itertools.count():
                began = time.monotonic()
                assert_error(call(gate, "GET", "/health"), 503, "database_unavailable")
                assert_error(chat(gate, user.key), 503, "database_unavailable")
                assert_error(call(gate, "GET", "/users/me", token), 503, "database_unavailable")
                answer = try_login(gate, user.name, PASSWORD)
                assert_error(answer, 503, "database_unavailable")
                assert time.monotonic() - began < 5
                if over() and number >= 9:
                    break
            assert plain.done() and short.done() and not long.done()
        assert call(gate, "GET", "/health").status_code == 200
        assert login(gate, user) and chat(gate, user.key).status_code == 200
        assert plain.result().status_code == 200
        assert short.result()[-1] == long.result()[-1] == b"data: [DONE]\n\n"
    assert len(gate.upstream.asked()) == 4
    gate.settle(10)
    assert sorted(row.total for row in gate.usage(user)) == [20, 30, 30, 110]
    assert {row.status for row in gate.usage(user)} == {"ok"}


def expire_leases(gate: Gate) -> None:
    """Make every lease end now, as if the time had passed."""
    change(gate, "UPDATE usage SET lease_until = lease_until - 60")


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


def test_frozen_gate_that_goes_on_books_nothing_twice(
    shared_env: dict[str, str], start_process: StartProcess, tmp_path: Path
) -> None:
    """SIGSTOP under load; another gate closes its rows as lost and gives their room away."""
    one, two = start_two(start_process, shared_env, tmp_path)
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


@contextlib.contextmanager
def disk_full(gate: ProcessGate) -> Iterator[None]:
    """No file of the gate takes another byte, whoever runs it: each write fails with EFBIG."""
    before = resource.prlimit(gate.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(gate.process.pid, resource.RLIMIT_FSIZE, (0, before[1]))
    yield
    resource.prlimit(gate.process.pid, resource.RLIMIT_FSIZE, before)


def test_full_disk_refuses_what_begins_and_loses_nothing_that_runs(
    start_process: StartProcess,
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
                assert_error(chat(gate, user.key), 503, "database_unavailable")
            body = {"username": "late", "password": PASSWORD}
            assert_error(call(gate, "POST", "/auth/register", json=body), 503)
            assert_error(call(gate, "GET", "/health"), 503, "database_unavailable")
            assert list(stream_events(running))[-1] == b"data: [DONE]\n\n"
            assert plain.result().json()["usage"]["completion_tokens"] == 20
            assert len(gate.upstream.asked()) == 2
    assert chat(gate, user.key).status_code == 200
    gate.settle(10)
    assert [row.status for row in gate.usage(user)] == ["ok"] * 3
    assert gate.tokens_used(user) == 30 + 30 + 30
    assert gate.rows("PRAGMA integrity_check") == [("ok",)]


def test_log_on_a_full_disk_does_not_stop_the_gate(start_process: StartProcess) -> None:
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


@pytest.mark.parametrize("gap", ["suspended", "database away"])
def test_running_stream_is_never_taken_for_a_dead_gates(
    request: pytest.FixtureRequest, tmp_path: Path, gap: str
) -> None:
    """Whatever time has passed: its reservation is not given to others, its row ends right."""
    env, tokens, clock = {}, 55, Clock(tmp_path, "2027-01-01 12:00:00")
    if gap == "database away":
        env, tokens = request.getfixturevalue("postgres_env"), 95
    gate = request.getfixturevalue("start_process")(**env, **clock.env)
    gate.expected_5xx = {503}
    user = register(gate, token_limit=10 + tokens + 5)
    with chat(gate, user.key, "slow", stream=True, max_tokens=tokens) as running:
        events = stream_events(running)
        next(events)
        if gap == "suspended":  # the clock goes on, the gate does not
            freeze(gate)
            clock.set("2027-01-01 13:00:00")
            gate.process.send_signal(signal.SIGCONT)
        else:
            expire_leases(gate)
            with database_down(gate):
                wait_until(after_seconds(2))
        over = after_seconds(2.2)  # the gate looks after its rows every 2 s
        while not over():
            assert next(events) and [row.status for row in gate.usage()] == ["pending"]
            assert_error(chat(gate, user.key), 429, "quota_reserved")
        assert list(events)[-1] == b"data: [DONE]\n\n"
    row = gate.row(running)
    assert (row.status, row.total, gate.tokens_used(user)) == ("ok", 10 + tokens, 10 + tokens)


@pytest.mark.parametrize("scale_out", [True, False, None])
def test_hidden_tokens_of_a_stream_left_are_charged(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, scale_out: bool | None
) -> None:
    """To the token where vLLM can say so; else a marked estimate, above the prompt alone."""
    monkeypatch.setattr(gate.upstream, "scale_out", scale_out)
    user = register(gate)
    for hides in ({"include_reasoning": False}, {"tool_choice": "required"}):
        body = chat_body("hidden", stream=True, max_tokens=100, **hides)
        with relay(gate, user.key, "chat/completions", body) as answer:
            wait_until(lambda: gate.upstream.asked()[-1].tokens > 13)
        exchange, left_at = gate.upstream.asked()[-1], time.monotonic()
        row = gate.row(answer)
        assert cast(float, exchange.closed_at) - left_at < 1
        assert (row.status, row.estimated) == ("aborted", int(not scale_out))
        assert 10 < row.total < 10 + 100 + 300
        assert row.total == exchange.tokens or not scale_out


@pytest.mark.parametrize("hang_up", [socket.socket.close, leave_with_reset])
def test_request_that_vllm_never_answered_is_free(
    make_gate: MakeGate, hang_up: Callable[[socket.socket], None]
) -> None:
    """As behind a tunnel whose far end is down: 502, however often the client tries."""

    def say(upstream: ScriptedHandler, body: JSONObject) -> None:
        hang_up(upstream.connection)
        raise ConnectionAbortedError

    with scripted_gate(make_gate, say) as gate:
        gate.expected_5xx = {502}
        user = register(gate)
        for number in range(6):
            with chat(gate, user.key, stream=number % 2 == 0) as answer:
                assert_error(answer, 502)
        assert {(row.status, row.total) for row in gate.usage()} == {("error", 0)}


def wait_for_log(gate: Gate, pattern: str) -> None:
    """Wait for a line of the log that has this in it."""
    wait_until(lambda: re.search(pattern, gate.log.read_text()))


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_log_says_why_vllm_is_not_reached(make_gate: MakeGate, tmp_path: Path) -> None:
    """In one line, with the user's name; the caller is told nothing of the machine."""
    make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with Upstream() as gone:
        reasons = {gone.url: "refused", "http://no-such-host.invalid:8001": "no-such-host.invalid"}
    with Upstream() as secure:
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        reasons[f"https://localhost:{secure.server_address[1]}"] = "certificate verify failed"
        for url, reason in reasons.items():
            gate = make_gate(VLLM_ENDPOINT=url)
            gate.expected_5xx = {502}
            user = register(gate)
            assert_error(chat(gate, user.key), 502, "upstream_unavailable")
            wait_for_log(gate, f"{user.name} .*{reason}")


def test_gate_out_of_descriptors_says_so(start_process: StartProcess) -> None:
    """EMFILE on the way to vLLM: 502 for the caller, the reason in the log; then well again."""
    gate = start_process()
    user, pid = register(gate), gate.process.pid
    assert call(gate, "GET", "/v1/models", user.key).status_code == 200
    with connected(gate) as connection:
        connection.sendall(raw_request("GET", "/", {}))
        assert read_reply(connection).status_code == 200
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
        connection.sendall(raw_chat(user.key, chat_body()))
        assert_error(read_reply(connection), 502, "upstream_unavailable")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    wait_for_log(gate, f"{user.name} .*Too many open files")
    assert chat(gate, user.key).status_code == 200


def test_writer_that_stands_still_is_503_and_one_line(start_process: StartProcess) -> None:
    """A stopped process holds the lock of the folder: callers and commands give up, and say so."""
    gate = start_process()
    gate.expected_5xx = {503}
    user = register(gate)
    with ThreadPoolExecutor(1) as pool:
        folder = os.open(gate.directory, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
        arguments = ("set-limit", user.name, "5")
        told = pool.submit(command, gate.directory, gate.env, *arguments, status=1)
        began = time.monotonic()
        assert_error(chat(gate, user.key), 503, "database_unavailable")
        assert len(told.result().stderr.strip().splitlines()) == 1
        assert 3 < time.monotonic() - began < 15
        os.close(folder)
    assert chat(gate, user.key).status_code == 200
    gate.process.send_signal(signal.SIGHUP)
    assert gate.process.wait(10) == 0


def test_fault_in_our_sql_is_logged_without_values(
    postgres_env: dict[str, str], start_process: StartProcess
) -> None:
    """A stack and 500, not "the database does not answer"; no value of a row is written."""
    gate = start_process(**postgres_env)
    gate.expected_5xx, gate.may_log_traceback = {500}, True
    user = register(gate)
    token, body = login(gate, user), {"old_password": PASSWORD, "new_password": PASSWORD + "2"}
    for fault in ("ADD CHECK (jwt_version < 2)", "RENAME COLUMN password_hash TO renamed"):
        change(gate, f"ALTER TABLE users {fault}")
        answer = call(gate, "POST", "/auth/password", token, json=body)
        assert_error(answer, 500, "internal_error")
    wait_until(lambda: gate.log.read_text().count(", in auth_password\n") == 2)
    gate.secrets |= {"$2b$", "Failing row", "does not answer"}
    assert chat(gate, user.key).status_code == 200


def test_gate_that_breaks_is_started_again_by_systemd(start_process: StartProcess) -> None:
    """An OSError while it runs: a traceback, and not the exit status of a wrong setting."""
    gate = start_process()
    resource.prlimit(gate.process.pid, resource.RLIMIT_NOFILE, (0, 0))  # now poll() fails: EINVAL
    wait_until(gate.ended, 10)
    assert gate.process.returncode not in (0, 2)
    said = gate.errors.read_text() + gate.log.read_text()
    assert "Traceback" in said and "Invalid argument" in said


@pytest.mark.parametrize("delay_s", [0.0, 0.03])
def test_request_that_comes_with_sigterm_is_answered_or_refused(
    start_process: StartProcess, delay_s: float
) -> None:
    """Never cut, and never left pending."""
    gate = start_process()
    user, whole = register(gate), []

    def ask_until_refused(_: int) -> None:
        with contextlib.suppress(requests.ConnectionError):  # nobody listens any more
            while True:
                with chat(gate, user.key, stream=True) as answer:
                    if answer.status_code == 503:
                        return
                    assert list(stream_events(answer))[-1] == b"data: [DONE]\n\n"
                    whole.append(answer.headers["X-Request-Id"])

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(in_parallel, 12, ask_until_refused)
        wait_until(lambda: len(whole) > 20)
        wait_until(after_seconds(delay_s))
        gate.process.terminate()
        assert gate.process.wait(10) == 0
        assert asking.result() == [None] * 12
    assert {row.request_id: row.status for row in gate.usage()} == dict.fromkeys(whole, "ok")


# ---------------------------------------------------------------------------------------------
# Load and hygiene: many at once, hostile clients, and what is left on the disk.


def after_requests(count: int) -> Callable[[], bool]:
    """Return a condition that holds after it was asked `count` times."""
    left = itertools.count(count, -1)
    return lambda: next(left) <= 0


def after_seconds(seconds: float) -> Callable[[], bool]:
    """Return a condition that holds when the time is over."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


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


def read_streams(gate: Gate, users: list[User], count: int, begun: threading.Event) -> list[float]:
    """Read `count` streams of `paced` side by side; return how late each of their events was.

    Each must come whole and with its own marker. Sets `begun` when all have brought something.
    """
    opened, received, delays = {}, {}, []
    with selectors.DefaultSelector() as selector:
        for number in range(count):
            marker = f"marker-{number:03d}"
            messages = [{"role": "user", "content": f"{PROMPT} {marker}"}]
            connection = socket.create_connection(gate.address, timeout=20)
            key = users[number % len(users)].key
            connection.sendall(raw_chat(key, chat_body("paced", messages=messages, stream=True)))
            opened[connection], received[connection] = marker.encode(), b""
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
        assert answer.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in answer, answer[:500]
        assert re.findall(rb'"content":"(\S+) ', answer) == [opened[connection]] * 50
    return delays


def test_hundred_streams_run_side_by_side(start_process: StartProcess) -> None:
    """None fails or is mixed up, p99 of the added delay < 100 ms, login and usage < 1 s."""
    rounds: list[tuple[float, float]] = []

    def share_of_bounds() -> float:
        waits, begun = [0.0], threading.Event()
        with ThreadPoolExecutor(1) as pool:
            delays = pool.submit(read_streams, gate, users, 100, begun)
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


def test_user_and_gate_have_their_bounds(make_gate: MakeGate) -> None:
    """The 17th request of one user at a time is a 429, others are served.

    32 threads are kept free of relays: when all others run one it is 503, and the rest goes on.
    """
    gate = make_gate(THREADS="64")
    gate.expected_5xx = {503}
    user, other, third = register(gate), register(gate), register(gate)
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(chat(gate, key, "silent", stream=True))
            for key in [user.key] * 17 + [other.key] * 16 + [third.key] * 2
        ]
        statuses = [answer.status_code for answer in running]
        assert statuses == [200] * 16 + [429] + [200] * 16 + [503] * 2
        assert_error(running[16], 429, "rate_limit_exceeded")
        assert_error(running[34], 503, "overloaded")
        began = time.monotonic()
        assert me(gate, user)["tokens_used"] == gate.tokens_used(user)
        assert call(gate, "GET", "/health").status_code == 200
        assert time.monotonic() - began < 1
    wait_until(lambda: chat(gate, user.key).status_code == 200)


def test_idle_and_slow_connections_do_no_harm(start_process: StartProcess) -> None:
    """1,200 that say nothing and 200 that say a byte at a time."""
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


def test_request_that_is_too_large_is_refused(gate: Gate) -> None:
    """2 GB before the first byte of them, 33 MB in chunks, 300 KB of headers; 30 MB pass."""
    user = register(gate, token_limit=100_000_000)
    path = "/v1/chat/completions"
    headers = {"Authorization": f"Bearer {user.key}", "Content-Type": "application/json"}
    declared = raw_request("POST", path, headers | {"Content-Length": str(2 * 10**9)})
    assert_error(send_raw(gate, declared), 413)
    chunk = b"%x\r\n%s\r\n" % (1 << 20, b" " * (1 << 20))
    begun = raw_request("POST", path, headers | {"Transfer-Encoding": "chunked"})
    assert_error(send_raw(gate, begun, *[chunk] * 33, b"0\r\n\r\n"), 413)
    filler = {f"X-Filler-{number}": "x" * 3000 for number in range(100)}
    assert send_raw(gate, raw_request("GET", "/v1/models", filler)).status_code == 431
    assert gate.upstream.asked() == []
    messages = [{"role": "user", "content": "x" * (30 << 20)}]
    answer = chat(gate, user.key, messages=messages)
    assert answer.status_code == 400
    assert "maximum context length" in answer.json()["error"]["message"]  # vLLM's own words


ROUTES = [
    "GET /", "GET /users/me", "GET /users/usage", "GET /users/me/keys", "POST /users/me/keys",
    "POST /users/me/api-key", "DELETE /users/me/keys/2", "POST /auth/register", "POST /auth/token",
    "POST /auth/refresh", "POST /auth/password", "GET /health", "GET /.well-known/opencode",
    "GET /v1/models", "GET /v1/models/org/tiny", "POST /v1/chat/completions", "POST /v1/completions",
    "POST /v1/embeddings", "POST /v1/messages", "POST /v1/messages/count_tokens",
    "POST /v1/responses", "GET /opencode.json", "GET /claude.json", "GET /codex.toml",
]  # fmt: skip
USUAL_FIELDS = {
    "model": '"ok"', "messages": json.dumps([{"role": "user", "content": PROMPT}]), "prompt": '"Hi"',
    "input": '"Hi"', "username": '"fuzz"', "password": f'"{PASSWORD}"', "name": '"laptop"',
}  # fmt: skip
FIELDS = [
    *USUAL_FIELDS, "old_password", "token_limit", "registration_token", "stream", "stream_options",
    "max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "n", "best_of", "tools",
    "priority", "response_format", "stop", "seed", "user", "echo", "thinking", "store", "system",
]  # fmt: skip
HEADERS = [
    "Host", "Content-Type", "Authorization", "Content-Length", "Transfer-Encoding", "Content-Encoding",
    "X-Forwarded-For", "Forwarded", "Expect", "Accept", "Upgrade", "Range", "Cookie", "x-api-key", "",
]  # fmt: skip
ODDITIES = [
    "", "null", "true", "[]", "{}", '""', "0", "-1", "1.5", "16", "0x9", "1_0", "9" * 30, "9" * 5000,
    "1e999", "NaN", '"x\\ud800"', '"\\u0000"', '"\\r\\nFORGED"', '"\xff"', "\x00", "\xb2", "[null]", "a b",
    "[[1]]", '["a", "b"]', "[" * 900 + "]" * 900, "[" * 60_000, '{"include_usage": true}', '{"a":1}',
    '{"continuous_usage_stats": 1}', '[{"role": 1, "content": []}]', "chunked", "gzip", "identity",
    "text/plain", "application/x-www-form-urlencoded", "Basic eDp5", "Bearer \xff", "Bearer a.b.c", "@",
    "100-continue", "evil.example", "localhost:99999", "[::1", "localhost,evil", "\r\nFORGED: x",
]  # fmt: skip
ODD_PATHS = [
    "*", "//health", "/%00", "/%0d%0aFORGED", "/%e2%80%a8/%1b[2J", "/health/", "/health;x", "/\xff",
    "http://localhost/health", "http://[/health", "/x" + "y" * 60000, "/v1", "/v1/../health", "/ FORGED",
    "/users/usage?days=" + "9" * 900, "/users/usage?days=%00", "/users/usage?ascii&days=366", "/?%ff=%",
    "/v1/models/%ff%0d%0aFORGED", "/users/me/keys/" + "9" * 5000,
]  # fmt: skip


def strange_request(chance: random.Random, key: str, token: str) -> tuple[str, bytes, bool]:
    """Return a method, a request with one or two oddities, and whether its framing is right."""
    method, path = chance.choice(ROUTES).split()
    right = token if path.startswith(("/users", "/auth")) else key
    headers = {"Host": "localhost", "Content-Type": "application/json"}
    headers["Authorization"] = f"Bearer {right}"
    fields, body, framed = [*USUAL_FIELDS.items()], "", True
    for _ in range(chance.randint(1, 2)):
        odd = chance.choice(ODDITIES)
        match chance.choice(["method", "path", "header", "field", "field", "field", "body"]):
            case "method":
                method = chance.choice(["HEAD", "OPTIONS", "PUT", "TRACE", "get", "G%T", "CONNECT"])
            case "path":
                path = chance.choice(ODD_PATHS)
            case "header":
                headers[chance.choice(HEADERS)], framed = odd, False
            case "field":  # which may stand there already
                fields.append((chance.choice(FIELDS), odd))
            case "body":
                body, framed = odd, False
    body = body or "{" + ",".join(f'"{name}":{value}' for name, value in fields) + "}"
    lines = [f"{method} {path} HTTP/1.1", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    request = "\r\n".join([*lines, "", body]).encode("latin-1")
    if chance.random() < 0.1:
        at, framed = chance.randrange(60), False
        request = request[:at] + chance.choice([b"\x16\x03", b"\x00", b"\r", b"\n"]) + request[at:]
    return method, request, framed


def test_no_request_breaks_the_gate(start_process: StartProcess) -> None:
    """Any method, path, header and body: an answer that README knows, one log line, right books.

    Where the framing may be wrong the gate may also wait for the rest, or hang up.
    """
    gate = start_process()
    talker, account = register(gate, token_limit=100_000_000), register(gate)
    token, chance = login(gate, account), random.Random(20)
    statuses: Counter[int] = Counter()
    for _ in range(600):
        method, request, framed = strange_request(chance, talker.key, token)
        with connected(gate) as connection:
            connection.settimeout(20 if framed else 0.1)
            try:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(request)
                reply = read_reply(connection, method)
            except (http.client.HTTPException, OSError):
                assert not framed, request[:3000]
                continue
        statuses[reply.status_code] += 1
        said_by_vllm_itself = {x.answer() for x in gate.upstream.exchanges[-3:]}
        try:
            assert 200 <= reply.status_code < 300 or 400 <= reply.status_code < 500
            if reply.status_code < 400 or reply.content in said_by_vllm_itself:
                continue
            if method == "HEAD":
                assert reply.headers["Content-Type"] == "application/json"
            elif b'"param"' in reply.content:
                assert_error(reply, reply.status_code)
            else:
                refused("messages", reply, reply.status_code)
                assert b" /v1/messages" in request[:20]
        except AssertionError as error:
            raise AssertionError(f"{error} after {request[:3000]!r}") from error
    assert call(gate, "GET", "/health").status_code == 200
    assert {200, 201, 400, 401, 404, 405, 409, 415} <= set(statuses), statuses
    assert {f"POST {x.path}" for x in gate.upstream.asked()} <= set(ROUTES)
    lines = gate.log.read_bytes().split(b"\n")
    assert len(lines) > 250 and all(line.decode().isprintable() for line in lines)
    assert not any(line.startswith(b"FORGED") for line in lines)


def test_no_secret_is_written_anywhere(start_process: StartProcess) -> None:
    """Passwords, keys, JWTs, prompts, answers: in no log, no output, no usage row."""
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
    typed_wrong = {"username": PASSWORD + "!", "password": PASSWORD}
    call(gate, "POST", "/auth/token", data=typed_wrong)
    call(gate, "POST", "/auth/register", json={"username": user.name, "password": PASSWORD})
    gate.settle()
    gate.secrets |= {JWT_SECRET, (gate.directory / "llmgate.secret").read_text().strip()}
    stored = "".join(str(gate.rows(f"SELECT * FROM {name}")) for name in TABLES)
    assert [secret for secret in gate.secrets if secret in stored] == []
    gate.stop()
    gate.check_output(gate.output, gate.errors)


TABLES = ["users", "api_keys", "usage", "login_attempts", "quota_periods"]


def test_first_start_makes_private_files_and_the_second_keeps_them(
    start_process: StartProcess, tmp_path: Path
) -> None:
    """0600 under any umask; the old JWT and key still work."""
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


class MixedLoad:
    """Requests of all kinds by several users at once, from a seed."""

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
                who = chance.randrange(len(self.users))
                kinds = [self.ask, self.leave, self.fail, self.new_key]
                chance.choices(kinds, [60, 25, 12, 3])[0](chance, who)

        in_parallel(workers, work)

    def fields(self, chance: random.Random) -> JSONObject:
        """Return fields that change the cost."""
        asked: JSONObject = {"max_tokens": chance.choice([None, 1, 5, 20, 4000])}
        if chance.random() < 0.2:
            asked["n"] = chance.randint(2, 4)
        return asked

    def ask(self, chance: random.Random, who: int) -> None:
        """A chat, read to its end; a refusal must be one that README knows."""
        stream = chance.random() < 0.5
        models = ["ok", "lumpy", "echo", "paced", "badusage", "org/tiny", "llm-user-managed"]
        asked = self.fields(chance) | {"stream": stream}
        with chat(self.gate, self.keys[who], chance.choice(models), **asked) as answer:
            if answer.status_code != 200:
                assert answer.json()["error"]["code"] in (
                    "insufficient_quota", "quota_reserved", "rate_limit_exceeded", "invalid_api_key"
                ), answer.text  # fmt: skip
            elif stream:
                assert list(stream_events(answer))[-1] == b"data: [DONE]\n\n"

    def leave(self, chance: random.Random, who: int) -> None:
        """A chat whose client leaves somewhere."""
        model = chance.choice(["ok", "slow", "silent", "paced"])
        body = chat_body(model, stream=True, **self.fields(chance))
        if chance.random() < 0.2:
            body = chat_body("slow", max_tokens=5)
        with connected(self.gate) as connection:
            connection.sendall(raw_chat(self.keys[who], body))
            connection.settimeout(chance.uniform(0, 0.3))
            with contextlib.suppress(TimeoutError):
                for _ in range(chance.randrange(6)):
                    connection.recv(400)
            if chance.random() < 0.5:
                leave_with_reset(connection)

    def fail(self, chance: random.Random, who: int) -> None:
        """A request at which vLLM fails, or that is refused."""
        model = chance.choice(["e400", "e500", "die", "dieclean", "badjson", "midstream", "nope"])
        with chat(self.gate, self.keys[who], model, stream=chance.random() < 0.5) as answer:
            assert answer.status_code in (200, 400, 401, 404, 429, 502)
            assert answer.content

    def new_key(self, chance: random.Random, who: int) -> None:
        """A new key; the old one may be in use."""
        self.keys[who] = replace_key(self.gate, self.tokens[who])


def test_mixed_load_leaves_the_books_right(make_gate: MakeGate) -> None:
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
def test_ten_minutes_of_mixed_load(start_process: StartProcess) -> None:
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
        sizes.append((gate.resident_kb(), gate.descriptors(), gate.threads()))
        rows = len(gate.rows("SELECT 1 FROM usage"))
        print("minute {}: {} rows, {} kB, {} files, {} threads".format(minute, rows, *sizes[-1]))
    kilobytes, descriptors, threads = sizes[0]
    for later in sizes[1:]:
        assert later[0] < kilobytes + 30_000
        assert later[1] <= descriptors + 12  # connections of callers who came at the same time
        assert later[2] <= threads + 12


def test_flood_of_logins_does_not_hold_up_keys(start_process: StartProcess) -> None:
    """300 at once: a key's request is answered in a second, the right login soon after."""
    gate = start_process()
    user, json_type = register(gate), {"Content-Type": "application/json"}
    with contextlib.ExitStack() as stack:
        flood = [stack.enter_context(connected(gate)) for _ in range(300)]
        for number, connection in enumerate(flood):
            body = json.dumps({"username": f"flood-{number}", "password": PASSWORD}).encode()
            connection.sendall(raw_request("POST", "/auth/token", json_type, body))
        for _ in range(5):
            began = time.monotonic()
            assert call(gate, "GET", "/v1/models", user.key).status_code == 200
            assert time.monotonic() - began < 1
        wait_until(lambda: try_login(gate, user.name, PASSWORD).status_code == 200, 15)
        statuses = Counter(read_reply(connection).status_code for connection in flood)
    assert set(statuses) == {401, 429} and statuses[401] >= 8


def most_kb(gate: ProcessGate) -> int:
    """Return the most memory that the process ever held."""
    return int(
        re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{gate.process.pid}/status").read_text())[0]
    )


def test_large_bodies_leave_no_memory_behind(start_process: StartProcess) -> None:
    """31 MB without a key take none, 413 or 403 where registration is closed; with a key it returns."""
    gate = start_process(REGISTRATION="closed")
    key = run_command(gate, "create-user", "alice", "--token-limit", "50M", stdin=PASSWORD).split()[
        -1
    ]
    gate.secrets.add(key)
    large = b'{"username": "' + b"x" * (31 << 20) + b'"}'
    statuses = {"/auth/token": 413, "/auth/register": 403, "/users/me/keys": 401}

    def ask_all(body: bytes) -> None:
        for path, status in statuses.items():
            headers = {"Content-Type": "application/json"}
            assert_error(send_raw(gate, raw_request("POST", path, headers, body)), status)

    assert chat(gate, key).status_code == 200
    ask_all(large[: 1 << 20])
    before = most_kb(gate)
    ask_all(large)
    assert most_kb(gate) - before < 5_000
    messages = [{"role": "user", "content": "x" * (31 << 20)}]
    for _ in range(3):
        assert chat(gate, key, messages=messages).status_code == 400
    wait_until(lambda: gate.resident_kb() < before + 20_000, 8)


def test_few_descriptors_are_no_spinning_loop(start_process: StartProcess, tmp_path: Path) -> None:
    """`ulimit -n 256` and 400 connections: little CPU, little output, well again at once."""
    few = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
    gate = start_process(**customized(tmp_path / "code", few))
    user, times = register(gate), Path(f"/proc/{gate.process.pid}/stat")
    with contextlib.ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(connected(gate))
        before = times.read_text().split()[13:15]  # in user and in system mode, in ticks
        wait_until(after_seconds(1))
        ticks = sum(map(int, times.read_text().split()[13:15])) - sum(map(int, before))
    assert ticks / os.sysconf("SC_CLK_TCK") < 0.5
    assert call(gate, "GET", "/v1/models", user.key, timeout=2).status_code == 200
    assert sum(path.stat().st_size for path in (gate.log, gate.output, gate.errors)) < 200_000


def test_names_cannot_steer_a_terminal(start_process: StartProcess) -> None:
    """ESC and line breaks in a model's or a key's name are escaped in log, report and commands."""
    evil = "evil\x1b[2J\r\nname"
    with Scripted(lambda up, _: up.say_whole(), {"id": evil}) as upstream:
        gate = start_process(VLLM_ENDPOINT=upstream.url)
        gate.upstream, user = upstream, register(gate)
        refused = call(gate, "POST", "/users/me/keys", login(gate, user), json={"name": evil})
        assert_error(refused, 400, param="name")
        change(gate, "UPDATE api_keys SET name = ?", evil)  # as an older gate let it in
        assert chat(gate, user.key, evil).status_code == 200
        gate.settle()
        text = {"Accept": "text/plain"}
        shown = [call(gate, "GET", "/users/usage", user.key, headers=text).text]
        for arguments in (("usage", user.name), ("keys", user.name), ("usage",)):
            shown.append(run_command(gate, *arguments))
        gate.stop()
    assert all("evil" in said for said in shown[:3])
    shown += [path.read_text() for path in (gate.log, gate.output, gate.errors)]
    for line in "\n".join(shown).split("\n"):
        assert line.isprintable() and not line.startswith("name"), line


# ---------------------------------------------------------------------------------------------
# The operator and the newcomer: settings, the first start, the usage report, the commands, the
# schema.

BAD_SETTINGS = """VLLM_ENDPOINT=not a url,PORT=http,DATABASE_URL=mysql://root@db/x,THREADS=0,
JWT_SECRET_KEY=secret-marker-short,JWT_EXPIRATION_HOURS=0,DEFAULT_TOKEN_LIMIT=-5,PROCESSES=0,
MAX_TOKEN_LIMIT=many,QUOTA_PERIOD=year,REGISTRATION=maybe,MODEL_ALIASES=no-equals-sign,
MAX_REQUESTS_PER_USER=0,UPSTREAM_TIMEOUT=soon,MAX_BODY_MB=-1,OPENCODE_DISCOVERY=perhaps"""


def test_bad_setting_is_named_and_not_echoed() -> None:
    """It may be a secret in the wrong place. Registration is closed where others can come."""
    for line in BAD_SETTINGS.replace("\n", "").split(","):
        name, _, value = line.partition("=")
        with pytest.raises(llmgate.SettingsError, match=name) as raised:
            llmgate.Settings.from_env({name: value})
        assert "\n" not in str(raised.value)
        assert "secret-marker" not in str(raised.value)
    with pytest.raises(llmgate.SettingsError, match="REGISTRATION_TOKEN"):
        llmgate.Settings.from_env({"REGISTRATION": "invite"})
    outside = {"HOST": "0.0.0.0"}
    assert llmgate.Settings.from_env({}).registration == "open"
    assert llmgate.Settings.from_env(outside).registration == "closed"
    assert llmgate.Settings.from_env(outside | {"REGISTRATION": "open"}).registration == "open"


def test_start_that_cannot_be_is_one_line(start_process: StartProcess, tmp_path: Path) -> None:
    """A bad value, a port in use, users but no secret; a database that is away may come back.

    So that is exit status 1, for a service manager; without psycopg it is 2, and what to install.
    """
    other = tmp_path / "other"
    other.mkdir()
    assert "JWT_SECRET_KEY" in refusal(other, JWT_SECRET_KEY="short")
    assert "LOG_FILE" in refusal(other, LOG_FILE="/no-such-directory/server.log")
    away = {"DATABASE_URL": "postgresql+psycopg://nobody@/x?host=/no-such-directory"}
    away["JWT_SECRET_KEY"] = "x" * 32
    if importlib.util.find_spec("psycopg"):
        assert "database does not answer" in refusal(other, 1, **away)
    else:
        assert "pip install 'psycopg[binary]'" in refusal(other, 2, **away)
    gate = start_process()
    register(gate)
    assert "PORT" in refusal(other, PORT=str(gate.address[1]))
    gate.stop()
    (tmp_path / "llmgate.secret").unlink()
    assert "llmgate.secret" in refusal(tmp_path)
    assert not (tmp_path / "llmgate.secret").exists()


def test_every_setting_is_documented() -> None:
    """Each field of Settings stands in .env.example and in the README."""
    example, readme = (HERE / name for name in (".env.example", "README.md"))
    for item in fields(llmgate.Settings):
        name = item.name.upper()
        assert re.search(rf"^#? ?{name}=", example.read_text(), re.MULTILINE), name
        assert re.search(rf"\b{name}\b", readme.read_text()), name


def test_usage_report_adds_up(gate: Gate) -> None:
    """By model, key and day, and the last rows; of the caller only. Its parameter is strict."""
    user, other = register(gate, token_limit=10_000), register(gate)
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
    assert [row["status"] for row in report["recent"]] == ["ok"] * 4
    assert PROMPT not in json.dumps(report)
    report = call(gate, "GET", "/users/usage", other.key).json()
    assert (report["tokens_used"], report["requests"], report["recent"]) == (0, 0, [])
    for days in ("0", "-1", "many", "1.5", "", "99999999999"):
        assert_error(call(gate, "GET", f"/users/usage?days={days}", user.key), 400, param="days")


def test_usage_report_is_drawn_for_curl(gate: Gate) -> None:
    """Accept: text/plain: a table and a bar within 80 columns; JSON also says what is reserved."""
    user = register(gate)
    with chat(gate, user.key, "silent", stream=True, max_tokens=100) as running:
        events = stream_events(running)  # held: a generator that is dropped closes its connection
        next(events)
        report = call(gate, "GET", "/users/usage", user.key).json()
        headers = {"Accept": "text/plain"}
        answer = call(gate, "GET", "/users/usage", user.key, headers=headers)
    assert report["reserved"] >= 100 and report["recent"][0]["status"] == "pending"
    assert answer.headers["Content-Type"].startswith("text/plain")
    text = answer.content.decode()
    assert user.name in text and time.strftime("%Y-%m-%d", time.gmtime()) in text
    assert max(len(line) for line in text.splitlines()) <= 80


MANY_ROWS = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)
INSERT INTO usage (request_id, user_id, api_key_id, model, endpoint, status, created_at, lease_until)
SELECT 'row-' || i, ?, 1, 'ok', 'chat/completions', 'ok', ? - i * 20, 0 FROM n
"""


def test_usage_report_of_many_rows_comes_at_once(gate: Gate) -> None:
    """Of 100,000 rows it reads the index alone: without the index it would take much longer."""
    user = register(gate)
    change(gate, MANY_ROWS, user.id, int(time.time()))

    def seconds() -> float:
        began = time.monotonic()
        report = call(gate, "GET", "/users/usage?days=30", user.key).json()
        assert report["requests"] == 100_000 and len(report["recent"]) == 20
        return time.monotonic() - began

    quickest = best_of_six(seconds, 0)
    change(gate, "DROP INDEX usage_by_day")
    assert quickest < 0.6 * best_of_six(seconds, 0)
    assert quickest < 0.5


def test_opencode_configuration_is_complete(make_gate: MakeGate) -> None:
    """Every model with its limits; the key comes from the environment. Discovery may be off."""
    gate = make_gate()
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
    name, _, model = config["model"].partition("/")
    assert name in config["provider"] and model in provider["models"]
    assert_error(call(gate, "GET", "/opencode.json"), 401)
    shown = call(gate, "GET", "/.well-known/opencode").json()
    assert shown["auth"]["env"] == "LLMGATE_API_KEY"
    assert set(shown["config"]["provider"]) == {name}
    hidden = make_gate(OPENCODE_DISCOVERY="off")  # for it shows models' names without a key
    assert_error(call(hidden, "GET", "/.well-known/opencode"), 404)


def test_changed_secret_hides_keys_but_keeps_them_working(make_gate: MakeGate) -> None:
    """`api_key` is null with a hint; old JWTs are refused."""
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
    "create-tables", "create-user", "users", "usage", "set-limit", "reset-usage", "disable", "enable",
    "set-password", "check", "keys",
]  # fmt: skip


def test_help_explains_every_command(tmp_path: Path) -> None:
    """Asking for help makes no file, nor does a word that is no command."""
    text = command(tmp_path, {}, "--help").stdout
    for name in COMMANDS:
        assert re.search(rf"^\s+{name}\b.*\w", text, re.MULTILINE), name
    assert "--token-limit" in command(tmp_path, {}, "create-user", "--help").stdout
    assert command(tmp_path, {}, "no-such-command", status=2).stderr
    assert list(tmp_path.iterdir()) == []
    command(tmp_path, {}, "create-tables")
    assert query(f"sqlite:///{tmp_path / 'llmgate.db'}", "SELECT count(*) FROM users") == [(0,)]
    assert stat.S_IMODE((tmp_path / "llmgate.db").stat().st_mode) == 0o600


def test_operator_manages_users_while_the_gate_runs(gate: Gate) -> None:
    """create-user, users, usage, set-password, each seen by the running gate."""
    made = run_command(gate, "create-user", "olga", "--token-limit", "777", stdin=PASSWORD + "\n")
    key = re.search(r"sk-llmgate-\w+", made)
    assert key
    gate.secrets.add(key[0])
    user = User(1, "olga", PASSWORD, key[0])
    assert me(gate, user)["token_limit"] == 777
    assert chat(gate, user.key, max_tokens=5).status_code == 200
    gate.settle()
    assert re.search(r"olga\b.*\b15\b.*\b777\b", run_command(gate, "users"))
    assert "ok" in run_command(gate, "usage", "olga")
    token = login(gate, user)
    run_command(gate, "set-password", "olga", stdin=PASSWORD + "-2\n")
    assert_error(call(gate, "GET", "/users/me", token), 401)
    assert try_login(gate, "olga", PASSWORD + "-2").status_code == 200


def test_command_that_cannot_be_done_says_so(gate: Gate) -> None:
    """One line and a status that a script can see: for nobody, and for a name that is taken."""
    register(gate, "paul")
    for arguments in (
        ("set-limit", "nobody", "5"),
        ("reset-usage", "nobody"),
        ("create-user", "PAUL"),
    ):
        stdin = PASSWORD + "\n"
        said = command(gate.directory, gate.env, *arguments, stdin=stdin, status=1).stderr
        assert said.strip(), arguments


def test_check_finds_what_differs_and_reset_keeps_the_rows(gate: Gate) -> None:
    """It recounts tokens_used from the rows; `reset-usage --all` balances them by one more."""
    users = [register(gate), register(gate)]
    for user in users:
        assert chat(gate, user.key).status_code == 200
    gate.settle()
    assert users[0].name not in run_command(gate, "check")
    change(gate, "UPDATE users SET tokens_used = tokens_used + 7 WHERE id = ?", users[0].id)
    ended = command(gate.directory, gate.env, "check", status=1)
    assert users[0].name in ended.stdout + ended.stderr
    assert users[1].name not in ended.stdout + ended.stderr
    change(gate, "UPDATE users SET tokens_used = tokens_used - 7 WHERE id = ?", users[0].id)
    run_command(gate, "reset-usage", "--all")
    assert [gate.tokens_used(user) for user in users] == [0, 0]
    assert len([row for row in gate.usage() if row.endpoint == "chat/completions"]) == 2
    assert call(gate, "GET", "/users/usage", users[0].key).json()["tokens_used"] == 0


def structure(url: str) -> dict[str, object]:
    """Return what a database says of its tables, without the names of constraints."""
    engine = sqlalchemy.create_engine(url)
    inspector = sqlalchemy.inspect(engine)
    found: dict[str, object] = {}
    with warnings.catch_warnings():  # SQLite's reflection leaves out indexes of expressions
        warnings.filterwarnings("ignore", "Skipped unsupported reflection of expression-based")
        for table in sorted(inspector.get_table_names()):
            columns = inspector.get_columns(table)
            keys = inspector.get_foreign_keys(table)
            indexes = [i for i in inspector.get_indexes(table) if "duplicates_constraint" not in i]
            defaults = [str(c["default"]) for c in columns if c["name"] != "id"]
            found[table] = {
                "columns": [(c["name"], str(c["type"]), c["nullable"]) for c in columns],
                "defaults": [re.sub(r"::\w+$", "", said).strip("'") for said in defaults],
                "primary key": inspector.get_pk_constraint(table)["constrained_columns"],
                "foreign": {(str(k["constrained_columns"]), k["referred_table"]) for k in keys},
                "uniques": {
                    str(u["column_names"]) for u in inspector.get_unique_constraints(table)
                },
                "checks": {c["name"] for c in inspector.get_check_constraints(table)},
                "indexes": {i["name"] for i in indexes} - {"users_username", "usage_by_day"},
            }
    engine.dispose()
    return found


def test_schema_sql_makes_the_same_tables_on_sqlite_and_postgresql(
    postgres_env: dict[str, str], tmp_path: Path
) -> None:
    """It is the only creator of tables, and it may run at every start."""
    on_sqlite = postgres_env | {"DATABASE_URL": f"sqlite:///{tmp_path / 'a.db'}"}
    structures = []
    for env in (on_sqlite, postgres_env):
        for _ in range(2):
            command(tmp_path, env, "create-tables")
        structures.append(structure(env["DATABASE_URL"]))
    assert structures[0] == structures[1]
    assert set(TABLES) <= set(structures[0])


def test_whole_gate_runs_on_postgresql(
    postgres_env: dict[str, str], start_process: StartProcess
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


COMMANDS_FOR_LATER = ["users", "usage", "set-limit bob 5", "reset-usage --all", "check", "keys bob"]


def test_command_in_the_wrong_folder_makes_nothing(tmp_path: Path) -> None:
    """One line and exit status 1, where an empty gate would have been made and called a success."""

    def run(number: int) -> str:
        ended = command(tmp_path, {}, *COMMANDS_FOR_LATER[number].split(), status=1)
        return ended.stdout + ended.stderr

    for said in in_parallel(len(COMMANDS_FOR_LATER), run):
        assert len(said.strip().splitlines()) == 1 and "llmgate.db" in said
    assert list(tmp_path.iterdir()) == []


def test_misspelt_setting_stops_the_start(tmp_path: Path) -> None:
    """In .env, naming the one that was meant; a name that is like none is somebody else's."""
    misspelt = {"REGISTRATON": "REGISTRATION", "VLLM_ENDPOINTS": "VLLM_ENDPOINT"}
    for name, meant in misspelt.items():
        (tmp_path / ".env").write_text(f"{name}=closed\n")
        said = refusal(tmp_path)
        assert re.search(rf"\b{meant}\b", said) and name in said
    (tmp_path / ".env").write_text("COMPOSE_PROJECT_NAME=x\nLLMGATE_API_KEY=x\n")
    command(tmp_path, {}, "create-tables")


def test_readable_env_file_with_a_secret_is_repaired(tmp_path: Path) -> None:
    """0600 and a warning, as the secret's own file gets it; without a secret it is left alone."""
    for text, mode in ((f"JWT_SECRET_KEY={JWT_SECRET}\n", 0o600), ("THREADS=90\n", 0o644)):
        (tmp_path / ".env").write_text(text)
        (tmp_path / ".env").chmod(0o644)
        said = command(tmp_path, {}, "create-tables").stderr
        assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == mode
        assert (".env" in said) == (mode == 0o600) and JWT_SECRET not in said


def test_default_limit_alone_bounds_registration(make_gate: MakeGate) -> None:
    """Who lowers the default need not know of MAX_TOKEN_LIMIT."""
    gate = make_gate(DEFAULT_TOKEN_LIMIT="5")
    assert me(gate, register(gate, token_limit=10**9))["token_limit"] == 5


OLD_ROWS = """
INSERT INTO users (username, password_hash, token_limit, tokens_used, tokens_reserved, created_at)
 VALUES ('Alice', '$2b$04$NAdhogkqxasNimUsIDXYpOlSsVZwpa9knpv/DXl0n1d9hM.0u6zrm', 1000, 30, 60, 1);
INSERT INTO api_keys (user_id, name, nonce, key_hash, created_at) VALUES (1, 'first', '%s', '%s', 1);
INSERT INTO usage (request_id, user_id, api_key_id, model, endpoint, status, estimated, reserved,
 prompt_estimate, prompt_tokens, completion_tokens, created_at, lease_until) VALUES
 ('old-1', 1, 1, 'ok', 'chat/completions', 'ok', 1, 0, 10, 10, 20, 1790000000, 1790000020),
 ('old-2', 1, 1, 'ok', 'chat/completions', 'pending', 0, 60, 12, 0, 0, 1790000000, 1790000020);
"""
SECRET_PART = "sk-llmgate-kBnKzFezxprwls0Csn9ZdwfoD6jRXVLYCyki12X8ngI"  # of JWT_SECRET and a nonce
OLD_VERSIONS = {  # of a key: the end that is its checksum; the index of the usage report
    "2wk5Co": "usage_by_user ON usage (user_id, created_at, model, api_key_id, prompt_tokens,"
    " completion_tokens)",
    "ae3980": "usage_by_day ON usage (user_id, (created_at / 86400), model, api_key_id, created_at,"
    " prompt_tokens, completion_tokens)",
}


@pytest.mark.parametrize("checksum", OLD_VERSIONS)
def test_database_of_an_older_version_works_on(
    shared_env: dict[str, str], start_process: StartProcess, checksum: str
) -> None:
    """The account, both formats of keys, old rows, and one that was left pending."""
    key, url = SECRET_PART + checksum, shared_env["DATABASE_URL"]
    tables = re.compile(r"CREATE TABLE IF NOT EXISTS (?:users|api_keys|usage) .*?\n\);", re.DOTALL)
    script = "\n".join(tables.findall((HERE / "schema.sql").read_text()))
    script += f"CREATE INDEX {OLD_VERSIONS[checksum]};"
    script += OLD_ROWS % ("5f" * 32, hashlib.sha256(key.encode()).hexdigest())
    if url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
            database.executescript(script)
    else:
        identity = "INTEGER PRIMARY KEY GENERATED BY DEFAULT AS IDENTITY"
        with psycopg.connect(url.replace("+psycopg", "")) as connection:
            connection.execute(script.replace("INTEGER PRIMARY KEY NOT NULL", identity).encode())
    gate, user = start_process(QUOTA_PERIOD="month", **shared_env), User(1, "alice", PASSWORD, key)
    gate.secrets.add(key)
    wait_until(lambda: gate.reserved() == 0, 6)
    assert chat(gate, key, max_tokens=5).status_code == 200
    assert streamed(gate, key, max_tokens=5)
    assert me(gate, user)["token_limit"] == 1000 and register(gate).id == 2
    gate.settle()
    statuses = Counter(row.status for row in gate.usage(user) if row.endpoint != "reset-usage")
    assert statuses == {"ok": 3, "lost": 1}
    assert call(gate, "GET", "/users/usage?days=366", key).json()["requests"] == 4


def test_local_port_8000_is_found_and_shared(make_gate: MakeGate, tmp_path: Path) -> None:
    """vLLM's own port: a gate elsewhere looks there; one that wants it says how both can live."""
    try:
        vllm = Upstream(8000)
    except OSError:
        pytest.skip("port 8000 is taken on this machine")
    with vllm:
        said = refusal(tmp_path, PORT="8000")
        assert "vLLM" in said and re.search(r"PORT=(?!8000)\d+", said)
        gate = make_gate(VLLM_ENDPOINT="")
        gate.upstream = vllm
        assert chat(gate, register(gate).key).status_code == 200
        gate.settle()


def test_table_of_all_users_has_the_heaviest_first(gate: Gate) -> None:
    """`usage` without a name: a line with counts and a bar for each user, within 80 columns."""
    for name, count in (("ann.x", 1), ("bob.x", 3), ("cyd.x", 2)):
        user = register(gate, name, token_limit=100)
        for _ in range(count):
            assert chat(gate, user.key, max_tokens=20).status_code == 200
    gate.settle()
    lines = run_command(gate, "usage").splitlines()
    found = [line for line in lines if ".x" in line]
    assert re.findall(r"\w+(?=\.x)", "".join(found)) == ["bob", "cyd", "ann"]
    bars = [line.count("█") for line in found]
    assert bars == sorted(bars, reverse=True) and bars[0] > bars[1] > 0
    assert re.search(r"\b3 +30 +60\b", found[0]) and max(map(len, lines)) <= 80


def test_operator_sees_and_revokes_keys(gate: Gate) -> None:
    """`keys NAME` shows no key; `--revoke` ends one at once, and only one of that user."""
    user, other = register(gate), register(gate)
    path, name = "/users/me/keys", {"name": "laptop"}
    made = call(gate, "POST", path, login(gate, user), json=name).json()
    key, number = made["api_key"], str(made["id"])
    gate.secrets.add(key)
    assert chat(gate, key, max_tokens=5).status_code == 200
    gate.settle()
    shown = run_command(gate, "keys", user.name)
    assert re.search(rf"^\s*{number}\b.*laptop.*\b15\b", shown, re.MULTILINE), shown
    assert user.key not in shown and key not in shown
    command(gate.directory, gate.env, "keys", other.name, "--revoke", number, status=1)
    assert chat(gate, key).status_code == 200
    run_command(gate, "keys", user.name, "--revoke", number)
    assert_error(chat(gate, key), 401, "invalid_api_key")
    assert chat(gate, user.key).status_code == 200
    assert "laptop" not in run_command(gate, "keys", user.name)


def test_limit_may_be_typed_short(gate: Gate) -> None:
    """50k and 2M; what a command prints of it may be typed again."""
    user = register(gate, "bob")
    printed = run_command(gate, "set-limit", "bob", "50k")
    assert me(gate, user)["token_limit"] == 50_000
    run_command(gate, "set-limit", "bob", "2M")
    assert me(gate, user)["token_limit"] == 2_000_000
    run_command(gate, "set-limit", "bob", re.findall(r"\d[\w,]*", printed)[0])
    for wrong in ("0k", "5x"):
        command(gate.directory, gate.env, "set-limit", "bob", wrong, status=2)
    assert me(gate, user)["token_limit"] == 50_000


def test_version_is_told_without_a_file(tmp_path: Path) -> None:
    """`--version` names the program and a number."""
    assert re.search(r"llmgate\D+\d+\.\d+", command(tmp_path, {}, "--version").stdout)
    assert list(tmp_path.iterdir()) == []


def test_health_tells_what_is_up(make_gate: MakeGate, upstream: Upstream) -> None:
    """How many of the servers answer; that one does not is no fault of the gate."""
    with Upstream() as gone:
        gate = make_gate(VLLM_ENDPOINT=f"{upstream.url},{gone.url}")
    expected = {"status": "ok", "upstreams": {"up": 1, "of": 2}}
    wait_until(lambda: call(gate, "GET", "/health").json() == expected, 5)
    assert call(gate, "GET", "/health").status_code == 200


# ---------------------------------------------------------------------------------------------
# The edge: the real nginx with README's own configuration, gates behind it, and a vLLM behind TLS.

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
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {directory}/{kind};\n" for kind in kinds)
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
def test_vllm_behind_tls(start_process: StartProcess, tmp_path: Path) -> None:
    """Plain, streamed, and left: what it has counted by then is charged here, too."""
    make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with Upstream() as secure:
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        url = f"https://localhost:{secure.server_address[1]}"
        gate = start_process(VLLM_ENDPOINT=url, SSL_CERT_FILE=str(tmp_path / "cert.pem"))
        gate.upstream = secure
        user = register(gate)
        assert chat(gate, user.key).status_code == 200
        assert streamed(gate, user.key)[-1] == b"data: [DONE]\n\n"
        for _ in range(5):
            with chat(gate, user.key, "paced", stream=True) as running:
                next(running.iter_content(100))
        gate.settle()
        assert Counter(row.status for row in gate.usage()) == {"ok": 2, "aborted": 5}
        gate.stop()


def test_forwarded_headers_count_only_from_the_proxy(make_gate: MakeGate) -> None:
    """TRUSTED_PROXY: what it says of host and protocol is believed, nobody else's word is.

    Nor is a name in Host that is not the gate's: a web page may have pointed its own here.
    """
    gate = make_gate()
    for host, status in (("localhost:8000", 200), ("[::1]", 200), ("evil.example", 400)):
        assert call(gate, "GET", "/", headers={"Host": host}).status_code == status
    headers = {"X-Forwarded-Host": "gate.example", "X-Forwarded-Proto": "https"}
    for proxy, url in (("", None), ("127.0.0.1", "https://gate.example/v1")):
        gate = make_gate(ALLOWED_HOSTS="gate.example,127.0.0.1", TRUSTED_PROXY=proxy)
        answer = call(gate, "GET", "/opencode.json", register(gate).key, headers=headers)
        (provider,) = answer.json()["provider"].values()
        assert provider["options"]["baseURL"] == (url or f"{gate.url}/v1")


@pytest.fixture
def start_nginx(tmp_path: Path, upstream: Upstream) -> Iterator[StartNginx]:
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
def test_gate_behind_nginx_is_as_good_as_before_it(
    make_gate: MakeGate, start_nginx: StartNginx
) -> None:
    """Events pass at once, who hangs up there is `aborted`, the public name is in opencode.json."""
    edge = start_nginx(make_gate(**readme_env()))
    user = register(edge)
    assert best_of_six(lambda: longest_delay(edge, user.key), 0.15) < 0.15
    with secured(edge) as connection:
        connection.sendall(raw_chat(user.key, chat_body("slow", stream=True)))
        read_events(connection, 4)
    exchange = edge.upstream.asked()[-1]
    wait_until(lambda: exchange.left, 2)
    wait_until(lambda: edge.usage(user)[-1].status != "pending", 2)
    row = edge.usage(user)[-1]
    assert (row.status, row.estimated, row.total) == ("aborted", 0, exchange.tokens)
    config = call(edge, "GET", "/opencode.json", user.key).json()
    assert [p["options"]["baseURL"] for p in config["provider"].values()] == [f"{edge.url}/v1"]
    strange = call(edge, "GET", "/users/usage", headers={"Host": "evil.example"})
    assert_error(strange, 400, "host_not_allowed")


@needs_nginx
def test_slow_connections_stay_at_nginx(
    start_process: StartProcess, start_nginx: StartNginx
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


def told_of_end(answer: requests.Response, events: Iterator[bytes]) -> tuple[str, bool]:
    """Read a stream as far as it goes; return its X-Request-Id and whether it came whole."""
    last = b""
    with contextlib.suppress(requests.RequestException, AssertionError):  # broken, or torn
        for last in events:
            pass
    return answer.headers["X-Request-Id"], last == b"data: [DONE]\n\n"


@needs_nginx
def test_two_gates_behind_nginx_are_one_until_one_is_killed(
    postgres_env: dict[str, str],
    start_process: StartProcess,
    start_nginx: StartNginx,
    tmp_path: Path,
) -> None:
    """What one gate made the other knows at once; a kill takes one gate's own streams along.

    No login fails, no chat runs twice, no row is lost; they are closed when their leases end.
    """
    one, two = start_two(start_process, postgres_env | readme_env(), tmp_path)
    edge = start_nginx(one, two)
    edge.expected_5xx = {502}  # nginx's own, for plain requests on the dead gate
    user = register(edge)
    token = login(edge, user)
    key = replace_key(edge, token)
    for _ in range(2):
        assert call(edge, "GET", "/users/me", token).status_code == 200
        assert chat(edge, user.key).status_code == 401
    over = threading.Event()
    jwts: list[str] = []

    def log_in_again_and_again() -> None:
        while not over.is_set():
            jwts.append(login(edge, user))

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(12) as pool:
        stack.callback(over.set)
        opened = []
        for _ in range(20):
            answer = chat(edge, key, "slow", stream=True, max_tokens=50)
            opened.append((stack.enter_context(answer), stream_events(answer)))
            assert next(opened[-1][1])
        plain = [pool.submit(chat, edge, key, "slow", max_tokens=30) for _ in range(10)]
        wait_until(lambda: len(edge.upstream.asked()) == 30)
        callers = [pool.submit(log_in_again_and_again) for _ in range(2)]
        wait_until(lambda: len(jwts) > 3)
        one.kill()
        ended = [told_of_end(*stream) for stream in opened]
        statuses = Counter(answer.result().status_code for answer in plain)
        over.set()
        assert [caller.result() for caller in callers] == [None] * 2
    broken = {name for name, whole in ended if not whole}
    assert len(broken) == 10
    assert statuses == {200: 5, 502: 5}
    assert len(edge.upstream.asked()) == 30  # each ran once
    assert [chat(edge, key).status_code for _ in range(10)] == [200] * 10
    expire_leases(edge)  # 20 s later, so to say
    wait_until(lambda: login(edge, user) and edge.complaints() == [], 10)
    rows = {row.request_id: row.status for row in edge.usage(user)}
    assert {name for name, _ in ended if rows[name] == "lost"} == broken
    assert Counter(rows.values()) == {"ok": 25, "lost": 15}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["upstream", *port]:
            serve_upstream(int(*port or ["8001"]))
        case _:
            sys.exit(__doc__)
