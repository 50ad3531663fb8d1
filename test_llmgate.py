"""The tests of llmgate: the real server on a socket, a stand-in vLLM on a socket, no mocks.

    pytest -q                                       all tests but the soak, in three minutes
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
import io
import itertools
import json
import logging
import os
import random
import re
import resource
import select
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
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from email.message import Message
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
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what is ignored here, gates would ignore, too
signal.signal(signal.SIGINT, signal.default_int_handler)
ROUNDS = llmgate.BCRYPT_ROUNDS
llmgate.BCRYPT_ROUNDS = 4  # of gates in this process, or 300 passwords would take 18 seconds

with warnings.catch_warnings():  # there is no pytest.ini in which a mark could be registered
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    soak = pytest.mark.soak

JSONObject = dict[str, Any]
T = TypeVar("T")

HERE = Path(llmgate.__file__).resolve().parent
PROGRAM = [sys.executable, str(HERE / "llmgate.py")]
SENTENCE = (  # as README shows it
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
CONTEXT_ERROR = "This model's maximum context length is 8192 tokens. Please reduce your prompt."
DONE = b"data: [DONE]\n\n"
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
    fault: str = ""  # what happens after three tokens
    max_model_len: int = MAX_MODEL_LEN


BEHAVIOURS = {
    "ok": Behaviour(),
    "org/tiny": Behaviour(),
    "/data/tiny": Behaviour(),  # as `vllm serve /data/tiny` calls it
    "slow": Behaviour(most=400, pace_s=0.05),
    "paced": Behaviour(most=50, pace_s=0.02),
    "spaced": Behaviour(most=4, pace_s=0.3),
    "long": Behaviour(most=50, pace_s=0.01, max_model_len=131072),
    "echo": Behaviour(most=1000),
    "lumpy": Behaviour(),
    "prefill": Behaviour(prefill_s=30),
    "thinking": Behaviour(most=60, pace_s=0.02, thinking=40),
    "hidden": Behaviour(most=200, pace_s=0.02, hidden=150),
    "tool": Behaviour(most=69, pace_s=0.01, tool=True),
    "cached": Behaviour(cached=128),
    "llama": Behaviour(cached=1, shape="llama"),  # llama-server's bytes
    "v33": Behaviour(shape="v33"),  # vLLM 0.33's response.incomplete
    "nousage": Behaviour(usage="none"),
    "badusage": Behaviour(usage="bad"),
    "nostreamopts": Behaviour(most=200, pace_s=0.02, shape="nostreamopts"),
    "silent": Behaviour(fault="silence"),
    "die": Behaviour(fault="cut"),
    "dieclean": Behaviour(fault="clean end"),
    "midstream": Behaviour(fault="error event"),
}
ABORT_PATH = "/inference/v1/abort_requests"
RENDER_PATH = "/v1/responses/render"
COUNT_PATH = "/v1/messages/count_tokens"
COUNTS = {"/tokenize": "count", COUNT_PATH: "input_tokens", RENDER_PATH: "token_ids"}
FREE_PATHS = (ABORT_PATH, *COUNTS)
TOOL_NAME = "get_weather"
TOOL_ID = "chatcmpl-tool-84a3943ff78ff3b4"
TOOL_ARGUMENTS = ["{", '"', "city", '":', ' "', "Rome", '"', "}"]  # a token in eight shows one


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
    """An error answer of vLLM: status and message."""


class Upstream(ThreadingHTTPServer):
    """The stand-in on a port; a context manager that serves in a thread."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(self, port: int = 0) -> None:
        """Bind to `port` (0: any)."""
        super().__init__(("127.0.0.1", port), UpstreamHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.connections: set[socket.socket] = set()
        self.unfinished: set[Answer] = set()  # those that are being made
        self.lock = threading.Lock()  # nobody rings a bell that is gone
        self.exchanges: list[Exchange] = []
        self.listed: list[Any] = [listing(name) for name in BEHAVIOURS]  # what /v1/models shows
        self.say: Say | None = None  # how a test answers each POST but /tokenize
        self.pace_s = 0.0  # of models without a pace of their own
        self.count_s = 0.0  # what /tokenize takes
        self.scale_out: bool | None = False  # has abort_requests; None: never heard of it
        self.key = ""  # --api-key
        self.keeps_bytes = True  # of the answers, for tests that compare them

    def start(self) -> Self:
        """Serve; after a stop, on the same port."""
        if self.socket.fileno() < 0:
            self.socket = socket.socket()
            self.server_bind()
            self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self, *_: object) -> None:
        """End, and hang up on everyone."""
        self.shutdown()
        self.server_close()
        self.hang_up()

    __enter__, __exit__ = start, stop

    def hang_up(self) -> None:
        """Close every connection."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: object) -> None:
        """Keep quiet about clients that vanish; their exchange says so."""

    def abort(self, request_ids: list[str]) -> None:
        """End the answers all of whose ids are named."""
        with self.lock:
            for answer in self.unfinished:
                if answer.ids.issubset(request_ids):
                    os.eventfd_write(answer.bell, 1)

    def asked(self) -> list[Exchange]:
        """Return the requests that cost something: all but counts, aborts and looks."""
        return [x for x in self.exchanges if x.method == "POST" and x.path not in FREE_PATHS]

    def running(self) -> int:
        """Return how many requests are being answered."""
        return sum(x.closed_at is None for x in self.exchanges)

    def tokens(self) -> dict[str, int]:
        """Return the tokens made for each X-Request-Id."""
        counts: Counter[str] = Counter()
        for x in list(self.exchanges):
            counts[x.headers.get("X-Request-Id", "")] += x.tokens
        return counts


Say = Callable[["UpstreamHandler", JSONObject], None]


def listing(name: str) -> JSONObject:
    """Return a model's entry in vLLM's list; `root` is a path on its disk."""
    about = {"object": "model", "created": 1795332929, "owned_by": "vllm", "parent": None}
    context = BEHAVIOURS.get(name, Behaviour()).max_model_len
    return {"id": name, "root": f"/models/{name}", "max_model_len": context} | about


class UpstreamHandler(BaseHTTPRequestHandler):
    """One connection to the stand-in."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "uvicorn", ""
    disable_nagle_algorithm = True
    server: Upstream
    exchange: Exchange

    def setup(self) -> None:
        """Watch the socket for a client that hangs up, even by half."""
        super().setup()
        self.server.connections.add(self.connection)
        self.watched = select.poll()
        self.watched.register(self.connection, select.POLLRDHUP)

    def finish(self) -> None:
        """Forget the connection."""
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer one request and note its end, whatever happened."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.path = self.path.partition("?")[0]
        self.exchange = Exchange(self.command, self.path, self.headers, body)
        self.server.exchanges.append(self.exchange)
        try:
            self.route()
        except Refused as refused:
            self.refuse(*refused.args)
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
            self.refuse(400, "1 validation error: missing or wrong")
        except OSError:
            self.exchange.left = True
            self.close_connection = True
        finally:
            self.exchange.closed_at = time.monotonic()

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

    def route(self) -> None:
        """Choose the answer by method and path, as vLLM would."""
        server, path = self.server, self.path
        scale_out = server.scale_out if path in (ABORT_PATH, RENDER_PATH) else True
        if server.say and self.command == "POST" and path not in ("/tokenize", RENDER_PATH):
            server.say(self, self.exchange.json())
        elif server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            self.reply_json(401, {"error": "Unauthorized"})
        elif (self.command, path) == ("GET", "/v1/models"):
            self.reply_json(200, {"object": "list", "data": server.listed})
        elif self.command != "POST" or scale_out is None:
            self.reply_json(404, {"detail": "Not Found"})
        elif not scale_out:
            raise Refused(403, "Scale-out endpoints are disabled.")
        elif path == ABORT_PATH:
            server.abort(self.exchange.json()["request_ids"])
            self.reply(200, b"")
        elif path in PROTOCOLS:
            self.generate(self.parse())
        elif path == "/v1/embeddings":
            self.embed(self.parse())
        elif path in COUNTS:
            self.wait(server.count_s)
            ids = list(range(sum(prompt_tokens(self.parse()))))
            self.reply_json(200, {COUNTS[path]: ids if path == RENDER_PATH else len(ids)})
        else:
            self.reply_json(404, {"detail": "Not Found"})

    def parse(self) -> JSONObject:
        """Return the body, for a model that is served."""
        body = self.exchange.json()
        listed = [entry.get("id") for entry in self.server.listed if isinstance(entry, dict)]
        if body["model"] not in listed:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        return body

    def generate(self, body: JSONObject) -> None:
        """Answer a chat, a completion, a message or a response, plain or streamed."""
        behaviour = BEHAVIOURS.get(body["model"], Behaviour())
        answer = PROTOCOLS[self.path](body, behaviour, self.headers.get("X-Request-Id", ""))
        answer.bell = os.eventfd(0)
        self.watched.register(answer.bell, select.POLLIN)
        with self.server.lock:
            self.server.unfinished.add(answer)
        try:
            write = self.stream if body.get("stream") is True else self.plain
            write(answer)
        finally:
            with self.server.lock:
                self.server.unfinished.remove(answer)
            self.watched.unregister(answer.bell)
            os.close(answer.bell)

    def plain(self, answer: Answer) -> None:
        """Write one whole answer after the time its tokens take."""
        fault = answer.behaviour.fault
        self.prefill(answer)
        if fault == "silence":
            answer.aborted = not self.wait(None)
        self.exchange.tokens = answer.prompt
        while answer.made < answer.count * answer.choices and self.make_token(answer):
            self.exchange.tokens += 1
        body = dump(answer.whole())
        self.close_connection = fault in ("cut", "clean end")
        shown = body[: len(body) // 2] if self.close_connection else body
        self.reply(200, shown, **{"content-length": str(len(body))})

    def stream(self, answer: Answer) -> None:
        """Write the events of each token, each as one chunk, at the model's pace."""
        self.start_stream()
        fault = answer.behaviour.fault
        lumpy = answer.body["model"] == "lumpy"  # its chunks end anywhere
        rest = b": keep-alive\n\n" if lumpy else b""
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
            if lumpy:
                rest += events
            else:
                for event in events.split(b"\n\n")[:-1]:
                    self.chunk(event + b"\n\n")
            self.exchange.tokens = answer.prompt + answer.made
        rest += answer.end
        for at in range(0, len(rest), 700):
            self.chunk(rest[at : at + 700])
        self.wfile.write(b"0\r\n\r\n")

    def fail(self, answer: Answer, fault: str) -> None:
        """End a stream after three tokens in one of the ways that upstreams do."""
        if fault == "error event" and answer.failure:
            self.chunk(answer.failure)
            fault = "clean end"
        self.close_connection = fault != "clean end"
        self.wfile.write(b'ff\r\ndata: {"id":' if self.close_connection else b"0\r\n\r\n")

    def embed(self, body: JSONObject) -> None:
        """Answer with one short vector per input."""
        counts = prompt_tokens(body)
        vectors = [{"index": index, "embedding": [0.25, -0.5]} for index in range(len(counts))]
        usage = {"prompt_tokens": sum(counts), "total_tokens": sum(counts), "completion_tokens": 0}
        self.reply_json(200, {"object": "list", "data": vectors, "usage": usage})
        self.exchange.tokens = sum(counts)

    def prefill(self, answer: Answer) -> None:
        """Let the time pass that the prompt takes."""
        answer.aborted = not self.wait(answer.behaviour.prefill_s)
        answer.due = time.monotonic()

    def make_token(self, answer: Answer) -> bool:
        """Let the time pass that a token takes; return False when the answer was aborted."""
        answer.due += (answer.behaviour.pace_s or self.server.pace_s) / answer.choices
        answer.aborted |= not self.wait(max(0.0, answer.due - time.monotonic()))
        answer.made += not answer.aborted
        return not answer.aborted

    def wait(self, seconds: float | None) -> bool:
        """Let time pass (None: for ever); return False when aborted, raise at a hang-up."""
        happened = self.watched.poll(None if seconds is None else seconds * 1000)
        if any(number == self.connection.fileno() for number, _ in happened):
            raise ConnectionAbortedError
        return not happened

    def refuse(self, status: int, message: str) -> None:
        """Write vLLM's error object; on /v1/messages it is Anthropic's."""
        error = {"message": message, "type": "Error", "param": None, "code": status}
        body: JSONObject = {"error": error}
        if self.path.startswith("/v1/messages"):
            body = {"type": "error", "error": {"type": "Error", "message": message}}
        self.reply_json(status, body)

    def reply_json(self, status: int, body: JSONObject) -> None:
        """Write `body` as vLLM writes JSON."""
        self.reply(status, dump(body))

    def say_whole(self, prompt: int = 10, completion: int = 1) -> None:
        """Answer a plain request, with these counts."""
        counts = {"prompt_tokens": prompt, "completion_tokens": completion}
        usage = counts | {"total_tokens": prompt + completion}
        choice = {"index": 0, "message": {"content": ANSWER}, "finish_reason": "stop"}
        self.exchange.tokens = prompt + completion
        self.reply_json(200, {"id": "c1", "choices": [choice], "usage": usage})

    def say_events(self, *events: bytes, wait_s: float = 0.0, tokens: int = 13) -> None:
        """Stream these events, each after a while, and no [DONE] unless it is one of them."""
        self.start_stream()
        self.exchange.tokens = tokens
        for event in events:
            self.wait(wait_s)
            self.chunk(event)
        self.wfile.write(b"0\r\n\r\n")

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        """Write one whole answer."""
        about = {"content-type": "application/json", "content-length": str(len(body))}
        self.write_head(status, about | headers)
        self.exchange.sent.append((time.monotonic(), body))
        self.wfile.write(body)

    def start_stream(self) -> None:
        """Write the head of an event stream."""
        content_type = "text/event-stream; charset=utf-8"
        self.write_head(200, {"content-type": content_type, "transfer-encoding": "chunked"})

    def chunk(self, event: bytes) -> None:
        """Write `event` as one HTTP chunk and note when."""
        if self.server.keeps_bytes:
            self.exchange.sent.append((time.monotonic(), event))
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))

    def write_head(self, status: int, headers: Mapping[str, str]) -> None:
        """Write the status line and the headers."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


class Answer:
    """What the stand-in says to a chat or a completion; refuses what vLLM refuses."""

    bounds: tuple[str, ...] = ("max_completion_tokens", "max_tokens")  # in this order
    greetings = 0  # events before the prefill
    end = DONE
    bell = -1  # rings when the answer is aborted
    due = 0.0  # when the last token was made
    made = 0  # tokens, of all choices
    aborted = False

    def __init__(self, body: JSONObject, behaviour: Behaviour, name: str = "") -> None:
        """Read what all protocols have; `name` is the X-Request-Id."""
        self.body, self.behaviour, most = body, behaviour, behaviour.max_model_len
        self.prompts = prompt_tokens(body)
        self.prompt = sum(self.prompts)
        self.choices = (body.get("n") or 1) * len(self.prompts)
        self.cached = min(behaviour.cached, self.prompt - 1)
        self.script = self.tokens()
        bounds = [body[bound] for bound in self.bounds if body.get(bound) is not None]
        self.asked = int([*bounds, most][0])
        self.count = min(self.asked, len(self.script))
        if self.prompt >= most:
            raise Refused(400, CONTEXT_ERROR)
        if not 0 < self.asked <= most:
            raise Refused(400, f"max_tokens={self.asked} must be in 1 ... max_model_len={most}.")
        self.options = body.get("stream_options") or {}
        if behaviour.shape == "nostreamopts" and "continuous_usage_stats" in self.options:
            raise Refused(400, "continuous_usage_stats: Extra inputs are not permitted")
        self.identify(name)

    def identify(self, name: str) -> None:
        """Choose the ids, also those by which it can be aborted, and the event of a fault."""
        self.chat = "messages" in self.body
        id = f"{'chatcmpl' if self.chat else 'cmpl'}-{name}"
        parts = range(len(self.prompts))
        self.ids = {id} if self.chat else {f"{id}-{part}" for part in parts}
        object = "chat.completion" if self.chat else "text_completion"
        self.head: JSONObject = {"id": id, "object": object, "created": int(time.time())}
        self.head["model"] = self.body["model"]
        error = {"message": "EngineCore encountered an issue.", "type": "Error", "code": 500}
        self.failure = event_of({"error": error}) + self.end

    def tokens(self) -> list[tuple[str, str]]:
        """Return kind and text of each token of one choice; an empty one shows nothing."""
        how, made = self.behaviour, range(self.behaviour.most)
        if self.body["model"] == "echo":
            said = "".join(prompt_texts(self.body))
            return [("text", said[at : at + 8]) for at in range(0, len(said), 8)]
        if how.tool:
            return [("tool", TOOL_ARGUMENTS[at // 8] if at % 8 == 7 else "") for at in made]
        kinds = ["thinking" if at < how.thinking else "text" for at in made]
        words = ["" if at < how.hidden else WORDS[at % len(WORDS)] + " " for at in made]
        return [*zip(kinds, words, strict=True)]

    def token(self, position: int) -> tuple[str, str]:
        """Return one token; of `paced` with the prompt's last word and the time."""
        if self.body["model"] == "paced":
            marker = prompt_texts(self.body)[-1].split()[-1]
            return "text", f"{marker} {time.monotonic():.6f} "
        return self.script[position]

    def parts(self) -> dict[str, str]:
        """Return what one choice has said so far, by kind."""
        said: dict[str, str] = {}
        for kind, text in map(self.token, range(self.made // self.choices)):
            said[kind] = said.get(kind, "") + text
        return said

    def steps(self) -> Iterator[tuple[int, int]]:
        """Yield position and choice of each token in turn, until the end or an abort."""
        every = itertools.product(range(self.count), range(self.choices))
        return itertools.takewhile(lambda _: not self.aborted, every)

    def finish_reason(self) -> str:
        """Return why the answer ends, in the words of chat."""
        if self.aborted:
            return "abort"
        if self.count == self.asked:
            return "length"
        return "tool_calls" if self.behaviour.tool else "stop"

    def usage(self, prompt: int, completion: int) -> JSONObject:
        """Return the usage block of chat and completions."""
        usage: JSONObject = {"prompt_tokens": prompt, "total_tokens": prompt + completion}
        return self.told(usage | {"completion_tokens": completion})

    def told(self, usage: JSONObject) -> JSONObject:
        """Return what the model tells of the usage: all, nothing, or nonsense."""
        nonsense = dict(zip(usage, (-5, 1e30, "9"), strict=False))
        return {"true": usage, "none": {}, "bad": nonsense}[self.behaviour.usage]

    def whole(self) -> JSONObject:
        """Return the plain answer, its keys in vLLM's order."""
        said = "".join(self.parts().values())
        message = {"role": "assistant", "content": said}
        content: JSONObject = {"message": message} if self.chat else {"text": said}
        end = {"logprobs": None, "finish_reason": self.finish_reason(), "stop_reason": None}
        choices = [{"index": index} | content | end for index in range(self.choices)]
        answer = self.head | {"choices": choices, "system_fingerprint": FINGERPRINT}
        if self.behaviour.usage != "none":
            answer["usage"] = self.usage(self.prompt, self.made)
        return answer | {"kv_transfer_params": None}

    def events(self) -> Iterator[tuple[int, bytes]]:
        """Yield what is to be written, with 1 if it brings a token; a hidden token is b""."""
        include = self.options.get("include_usage") is True and self.behaviour.usage != "none"
        if self.chat:
            self.head["object"] = "chat.completion.chunk"
            for index in range(self.choices):
                choice = self.choice(index, {"role": "assistant", "content": ""})
                yield 0, self.event(choice, 0, prompt_token_ids=None, prompt_text=None)
        for position, index in self.steps():
            (kind, said), last = self.token(position), position == self.count - 1
            thinks = kind == "thinking" and self.chat
            delta: JSONObject = {"reasoning" if thinks else "content": said}
            if kind == "tool" and self.chat:
                function = {"name": TOOL_NAME} if said == TOOL_ARGUMENTS[0] else {}
                delta = {"tool_calls": [{"index": 0, "function": function | {"arguments": said}}]}
            choice = self.choice(index, delta, self.finish_reason() if last else None)
            end = {"system_fingerprint": FINGERPRINT} if last and not include else {}
            yield 1, self.event(choice, position + 1, **end) if said or last else b""
        if self.aborted and self.made:
            for index in range(self.choices):
                choice = self.choice(index, {}, "abort")
                yield 0, self.event(choice, self.made // self.choices)
        if include:
            body = self.head | {"choices": [], "usage": self.usage(self.prompt, self.made)}
            yield 0, event_of(body | {"system_fingerprint": FINGERPRINT})

    def choice(self, index: int, delta: JSONObject, end: str | None = None) -> JSONObject:
        """Return the choice of an event: a chat's delta, or a completion's text."""
        said: JSONObject = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        return {"index": index} | said | {"logprobs": None, "finish_reason": end}

    def event(self, choice: JSONObject, count: int, **end: object) -> bytes:
        """Return one event; its usage counts the tokens of this choice only, as vLLM's."""
        body = self.head | {"choices": [choice]}
        asked = self.options.get("include_usage") and self.options.get("continuous_usage_stats")
        if asked and self.behaviour.usage != "none":
            prompt = self.prompts[choice["index"] * len(self.prompts) // self.choices]
            body["usage"] = self.usage(prompt, count)
        return event_of(body | end)

    def typed(self, type: str, **fields: object) -> bytes:
        """Return an event of the other protocols."""
        return f"event: {type}\n".encode() + event_of({"type": type} | fields)


class MessageAnswer(Answer):
    """What the stand-in says at /v1/messages."""

    bounds = ("max_tokens",)
    end = b""

    def identify(self, name: str) -> None:
        self.id = f"chatcmpl-{name}"
        self.ids = {self.id}
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
        reasons = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
        return reasons.get(self.finish_reason())

    def block(self, kind: str, said: str) -> JSONObject:
        """Return a content block."""
        if kind == "tool":
            tool = {"type": "tool_use", "id": TOOL_ID, "name": TOOL_NAME}
            return tool | {"input": {"said": said}}
        return {"type": kind, kind: said}

    def whole(self) -> JSONObject:
        blocks = [self.block(kind, text) for kind, text in self.parts().items()]
        usage = self.counts(0, start=True) | self.counts(self.made)
        answer = self.message(blocks, self.stop_reason())
        return answer | ({"usage": usage} if usage else {})

    def message(self, content: list[JSONObject], stop_reason: str | None) -> JSONObject:
        """Return the object that the plain answer and the first event have."""
        message: JSONObject = {"id": self.id, "type": "message", "role": "assistant"}
        message |= {"content": content, "model": self.body["model"], "stop_reason": stop_reason}
        return message | {"stop_sequence": None}

    def events(self) -> Iterator[tuple[int, bytes]]:
        start = self.message([], None) | {"usage": self.counts(0, start=True)}
        yield 0, self.typed("message_start", message=start)
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

    bounds = ("max_output_tokens",)
    greetings = 1
    end = failure = b""  # when the engine dies the bytes just stop

    def identify(self, name: str) -> None:
        """Choose the ids; `name` is ignored as by vLLM, the body has the id."""
        self.id = self.body.get("request_id") or f"resp_{name}"
        self.ids = {f"{self.id}_0"}
        self.sequence = itertools.count()

    def typed(self, type: str, **fields: object) -> bytes:
        """Return one event, its type last; llama-server says it first and does not count."""
        body = fields | {"sequence_number": next(self.sequence), "type": type}
        if self.behaviour.shape == "llama":
            body = {"type": type} | fields
        return f"event: {type}\n".encode() + event_of(body)

    def response(self, status: str, output: list[JSONObject], usage: object) -> JSONObject:
        """Return the object that every answer and three events have."""
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        body = {"id": self.id, "created_at": int(time.time()), "incomplete_details": reason}
        body |= {"instructions": self.body.get("instructions"), "model": self.body["model"]}
        body |= {"object": "response", "output": output, "tools": self.body.get("tools", [])}
        body |= {"max_output_tokens": self.asked, "status": status}
        return body | {"usage": usage, "user": None}

    def whole(self) -> JSONObject:
        status = "incomplete" if self.finish_reason() == "length" else "completed"
        said = enumerate(self.parts().items())
        output = [self.item(kind, number, text) for number, (kind, text) in said]
        details = {"cached_tokens": self.cached}
        usage = {"input_tokens": self.prompt, "input_tokens_details": details}
        usage |= {"output_tokens": self.made, "output_tokens_details": {"reasoning_tokens": 0}}
        usage |= {"total_tokens": self.prompt + self.made}
        return self.response(status, output, self.told(usage) or None)

    def events(self) -> Iterator[tuple[int, bytes]]:
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

    def placed(self, type: str, number: int, **fields: object) -> bytes:
        """Return an event about an item, or about its one part."""
        place = {"item_id": f"item_{number}", "output_index": number, "content_index": 0}
        return self.typed(f"response.{type}", **fields, **place)

    def begins(self, kind: str, number: int) -> bytes:
        events = self.placed("output_item.added", number, item=self.item(kind, number, None))
        if kind != "tool":
            events += self.placed("content_part.added", number, part=self.part(kind, ""))
        return events

    def brings(self, kind: str, number: int, said: str) -> bytes:
        return self.placed(f"{DELTAS[kind]}.delta", number, delta=said)

    def ends(self, kind: str, number: int, text: str) -> bytes:
        """Return the events after an item's last token; each tells all of it once more."""
        told = {"arguments" if kind == "tool" else "text": text}
        events = self.placed(f"{DELTAS[kind]}.done", number, **told)
        if kind != "tool":
            events += self.placed("content_part.done", number, part=self.part(kind, text))
        return events + self.placed("output_item.done", number, item=self.item(kind, number, text))


DELTAS = {"thinking": "reasoning_text", "text": "output_text", "tool": "function_call_arguments"}


def part_events(answer: MessageAnswer | ResponseAnswer) -> Iterator[tuple[int, bytes]]:
    """Yield, as `events` does, how each part begins, brings its tokens, and ends."""
    kind, number, text = "", -1, ""
    for position, _ in answer.steps():
        now, said = answer.token(position)
        if not said:
            yield 1, b""
            continue
        new, events = now != kind, b""
        if new:
            events = answer.ends(kind, number, text) if kind else b""
            events += answer.begins(now, number + 1)
        yield 1, events + answer.brings(now, number + new, said)
        if not answer.aborted:
            kind, number, text = now, number + new, said if new else text + said
    if kind:
        yield 0, answer.ends(kind, number, text)


PROTOCOLS: dict[str, Callable[[JSONObject, Behaviour, str], Answer]] = {
    "/v1/chat/completions": Answer,
    "/v1/completions": Answer,
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
    """Return the words of a message, block or list; a picture is 256 tokens, an id is one."""
    if isinstance(part, list):
        return "".join(map(text_of, part))
    if isinstance(part, dict):
        picture = part.get("type") in PICTURES
        return "x" * 1024 if picture else "".join(text_of(part.get(name)) for name in TEXTS)
    return "four" if isinstance(part, int) else part if isinstance(part, str) else ""


def prompt_texts(body: JSONObject) -> list[str]:
    """Return the text of each prompt or input; all messages are one."""
    said = body.get("messages") or body.get("prompt") or body["input"]
    if "messages" in body and not all(isinstance(message, dict) for message in said):
        raise TypeError
    several = isinstance(said, list) and not isinstance(said[0], int | dict)
    return [text_of(prompt) for prompt in (said if several else [said])]


def prompt_tokens(body: JSONObject) -> list[int]:
    """Count the prompts' tokens: a quarter of the bytes, never less than ten."""
    around = text_of([body.get("system"), body.get("instructions")])
    around += json.dumps(body["tools"]) if body.get("tools") else ""
    return [max(10, len((around + text).encode()) // 4) for text in prompt_texts(body)]


def serve_upstream(port: int) -> None:
    """Serve the stand-in in the foreground, at the pace of a person reading."""
    for model, behaviour in BEHAVIOURS.items():  # the context that a coding agent needs
        BEHAVIOURS[model] = replace(behaviour, max_model_len=131072)
    server = Upstream(port)
    server.pace_s, server.scale_out = 0.08, True
    print(f"A stand-in vLLM serves on {server.url}/v1; no model inside. Ctrl-C ends it.")
    sys.stdout.flush()
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
        host, _, port = url.partition("://")[2].rpartition(":")
        self.address = (host.strip("[]"), int(port))
        self.database_url = env.get("DATABASE_URL", f"sqlite:///{directory / 'llmgate.db'}")
        self.log = directory / "server.log"
        self.secrets = {PASSWORD, PROMPT, ANSWER, UPSTREAM_KEY}
        self.expected_5xx: set[int] = set()
        self.seen: set[int] = set()  # statuses
        self.stopped = False  # by the test itself
        self.may_log_traceback = False
        self.verify: bool | str = True  # or the certificate to trust

    def rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Run one statement in the database itself, `?` marks a value; return its rows."""
        return query(self.database_url, sql, *values)

    def usage(self, user: User | None = None) -> list[UsageRow]:
        """Return the usage rows, of one user or of all, oldest first."""
        columns = ", ".join(item.name for item in fields(UsageRow))
        found = self.rows(f"SELECT {columns} FROM usage ORDER BY created_at, request_id")
        rows = [UsageRow(*row) for row in found]
        return [row for row in rows if not user or row.user_id == user.id]

    def row(self, reply: Reply) -> UsageRow:
        """Return the final row of an answer, waiting until it is booked."""
        name, ended = reply.headers["X-Request-Id"], "status != 'pending' AND request_id = ?"
        wait_until(lambda: self.rows(f"SELECT 1 FROM usage WHERE {ended}", name))
        return next(row for row in self.usage() if row.request_id == name)

    def tokens_used(self, user: User) -> int:
        """Return the user's counter."""
        return int(self.rows("SELECT tokens_used FROM users WHERE id = ?", user.id)[0][0])

    def reserved(self) -> int:
        """Return what all users hold in reserve."""
        return int(self.rows("SELECT coalesce(sum(tokens_reserved), 0) FROM users")[0][0])

    def complaints(self) -> list[str]:
        """Say what is wrong with the books of a gate at rest; an empty list is a pass."""
        users = self.rows("SELECT id, tokens_used, tokens_reserved FROM users")
        counted, rows, found = self.upstream.tokens(), self.usage(), list[str]()
        for id, used, reserved in users:
            total = sum(row.total for row in rows if row.user_id == id)
            if used != total or reserved:
                found.append(f"user {id}: {used} used, {total} in rows, {reserved} reserved")
        cost = {name for name, made in counted.items() if made}
        found += [f"no row: {name}" for name in cost - {row.request_id for row in rows}]
        for row in rows:
            if row.status == "pending" or row.reserved:
                found.append(f"not closed: {row}")
            elif not row.estimated and row.endpoint != "reset-usage":
                made = counted.get(row.request_id, 0)  # of a lost row it is the last checkpoint
                if row.total > made or (row.total < made and row.status != "lost"):
                    found.append(f"vLLM counted {made}: {row}")
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
        assert {status for status in self.seen if status >= 500} <= self.expected_5xx
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


def query(database_url: str, sql: str, *values: object) -> list[tuple[Any, ...]]:
    """Run one statement with `?` marks in SQLite or PostgreSQL; return its rows."""
    if database_url.startswith("sqlite"):
        path = database_url.removeprefix("sqlite:///")
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            return database.execute(sql, values).fetchall()
    with psycopg.connect(database_url.replace("+psycopg", "")) as connection:
        cursor = connection.execute(sql.replace("?", "%s").encode(), values)
        return cursor.fetchall() if cursor.description else []


class ThreadedGate(Gate):
    """A gate in a thread of this process."""

    def __init__(self, env: Mapping[str, str], upstream: Upstream) -> None:
        """Start it; it serves when this returns."""
        settings = llmgate.Settings.from_env(env)
        self.log_handler = llmgate.log_to(settings.log_file, 1)
        self.server = llmgate.Server(settings, llmgate.bind(settings))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        super().__init__(self.server.url, env, Path(env["LOG_FILE"]).parent, upstream)

    def complaints(self) -> list[str]:
        """Say the same, and whether a request runs: it may not have its row yet."""
        return super().complaints() + [repr(relay) for relay in self.server.app.watcher.running]

    def drain(self, grace_s: float) -> None:
        """Begin to stop it, as SIGTERM does, in the middle of a test."""
        self.stopped = True
        self.server.drain(grace_s)
        with contextlib.suppress(ConnectionError):  # it has stopped already
            socket.create_connection(self.address).close()  # wakes it

    def stop(self) -> None:
        """Drain it, unless the test did; nothing of it may be left."""
        if not self.stopped:
            self.drain(1)
        self.thread.join(10)
        assert not self.thread.is_alive(), "the gate did not stop"
        logging.getLogger().removeHandler(self.log_handler)
        self.log_handler.close()


class ProcessGate(Gate):
    """A gate as a user starts it: `python llmgate.py` in a directory."""

    def __init__(self, env: dict[str, str], directory: Path, upstream: Upstream) -> None:
        """Start it and wait for the line with its URL."""
        self.output = directory / "stdout"
        self.errors = directory / "stderr"
        options: Any = {"cwd": directory, "env": clean_env() | env, "stdin": subprocess.DEVNULL}
        with self.output.open("wb") as output, self.errors.open("ab") as errors:
            self.process = subprocess.Popen(PROGRAM, stdout=output, stderr=errors, **options)
        wait_until(lambda: "http://" in self.output.read_text() or self.ended(), 10)
        match = re.search(r"http://[\w.]+:\d+", self.output.read_text())
        assert match, self.errors.read_text()
        super().__init__(match[0], env, directory, upstream)

    def ended(self) -> bool:
        """Return whether the process is gone."""
        return self.process.poll() is not None

    def stop(self) -> None:
        """SIGTERM; it must end by itself and say that all is well."""
        self.stopped = True
        self.process.terminate()
        assert self.process.wait(10) == 0, self.errors.read_text()

    def kill(self) -> None:
        """SIGKILL."""
        self.stopped = True
        self.process.kill()
        self.process.wait(10)

    def descriptors(self) -> int:
        """Return how many files and sockets it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self) -> int:
        """Return how many threads it has."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def memory_kb(self, kind: str = "VmRSS") -> int:
        """Return the memory that it holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(rf"{kind}:\s+(\d+)", status)[0])

    def workers(self) -> set[int]:
        """Return its running children's process ids: with PROCESSES they do the work."""
        pid = self.process.pid
        found = set()
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                if Path(f"/proc/{child}/cmdline").read_bytes():
                    found.add(int(child))
        return found


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
    threads = [thread for thread in threading.enumerate() if not thread.name.startswith("hash")]
    found = Counter(re.sub(r"[-_]\d+", "", thread.name) for thread in threads)
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[re.sub(r":\[\d+\]", "", os.readlink(f"/proc/self/fd/{number}"))] += 1
    return found


MakeGate = Callable[..., ThreadedGate]  # with settings, NAME=value
StartProcess = Callable[..., ProcessGate]  # likewise, after a directory


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    """A stand-in with a clean slate."""
    with Upstream() as upstream:
        yield upstream


@pytest.fixture
def make_gate(upstream: Upstream, tmp_path: Path) -> Iterator[MakeGate]:
    """A factory of gates in this process, `make_gate(NAME=value)`; checks all books at the end."""
    gates: list[ThreadedGate] = []
    before = resources()
    env = {"PORT": "0", "JWT_SECRET_KEY": JWT_SECRET, "THREADS": "100"}
    env |= {"VLLM_ENDPOINT": upstream.url, "VLLM_API_KEY": UPSTREAM_KEY}
    env["LOG_FILE"] = f"{tmp_path}/server.log"
    env["DATABASE_URL"] = f"sqlite:///{tmp_path}/llmgate.db"

    def make(**settings: str) -> ThreadedGate:
        gate = ThreadedGate(env | settings, upstream)
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


@pytest.fixture
def gate(make_gate: MakeGate) -> ThreadedGate:
    """A gate with default settings and an empty database."""
    return make_gate()


@pytest.fixture
def start_process(upstream: Upstream, tmp_path: Path) -> Iterator[StartProcess]:
    """A factory of gates as processes; checks output, and the books of those that still run."""
    gates: list[ProcessGate] = []

    def start(directory: Path = tmp_path, **settings: str) -> ProcessGate:
        env = {"PORT": "0", "VLLM_ENDPOINT": upstream.url, "VLLM_API_KEY": UPSTREAM_KEY}
        gate = ProcessGate(env | settings, directory, upstream)
        gates.append(gate)
        return gate

    try:
        yield start
        for gate in gates:
            assert gate.stopped or not gate.ended(), "the gate died"
            if not gate.stopped:
                gate.settle()
                gate.stop()
        for gate in gates:
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
    start_process: StartProcess, env: dict[str, str], tmp_path: Path, processes: str = "11"
) -> list[ProcessGate]:
    """Start two gates side by side, each in a directory of its own; `processes` has their counts."""

    def start(number: int) -> ProcessGate:
        directory = tmp_path / str(number)
        directory.mkdir()
        return start_process(directory, **env, PROCESSES=processes[number])

    return in_parallel(2, start)


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
    gate.seen.add(answer.status_code)
    if path.startswith(("/auth/", "/users/")):
        gate.secrets |= set(re.findall(r'"(sk-llmgate-[^"]+|eyJ[^"]+)"', answer.text))
    return answer


def post_text(gate: Gate, path: str, bearer: str, body: str | bytes) -> requests.Response:
    """Post a body as it is written here, which may be no JSON, as JSON."""
    headers = {"Content-Type": "application/json"}
    return call(gate, "POST", path, bearer, data=body, headers=headers)


def command(
    directory: Path, env: Mapping[str, str], *arguments: str, stdin: str = "", status: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run `python llmgate.py ARGUMENTS` in a directory; fail unless it exits with `status`."""
    options: Any = {"capture_output": True, "text": True, "timeout": 20, "input": stdin}
    options |= {"cwd": directory, "env": clean_env() | dict(env)}
    ended = subprocess.run([*PROGRAM, *arguments], check=False, **options)
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
    return User(answer.json()["id"], name, password, answer.json()["api_key"])


def try_login(gate: Gate, name: object, password: object) -> requests.Response:
    """Ask for a JWT."""
    body = json.dumps({"username": name, "password": password})
    return post_text(gate, "/auth/token", "", body)


def login(gate: Gate, user: User) -> str:
    """Return a JWT of the user."""
    answer = try_login(gate, user.name, user.password)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["access_token"])


def me(gate: Gate, user: User) -> JSONObject:
    """Return what /users/me says."""
    answer = call(gate, "GET", "/users/me", login(gate, user))
    assert answer.status_code == 200, answer.text
    return cast(JSONObject, answer.json())


def replace_key(gate: Gate, token: str) -> str:
    """Replace the user's key; return the new one."""
    answer = call(gate, "POST", "/users/me/api-key", token)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["api_key"])


def user_says(content: object, **fields: object) -> list[JSONObject]:
    """Return the messages of a chat in which this is said."""
    return [{"role": "user", "content": content} | fields]


def chat_body(model: str = "ok", **fields: object) -> JSONObject:
    """Return the body of a chat with the prompt marker in it."""
    return {"model": model, "messages": user_says(PROMPT)} | fields


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
    bodies = [data(event) for event in events if event.startswith(b"data: {")]
    deltas = [body["choices"][0]["delta"] for body in bodies if body.get("choices")]
    return "".join(delta.get("content") or "" for delta in deltas)


def said_by_vllm(exchange: Exchange, options: JSONObject | None = None) -> bytes:
    """Return the stream as vLLM would have written it for these stream_options of the caller."""
    said, asked = exchange.answer(), options or {}
    if not asked.get("include_usage"):  # the event at the end
        said = re.sub(rb'data: [^\n]*"choices":\[\],[^\n]*\n\n', b"", said)
    if not asked.get("continuous_usage_stats"):  # in all others
        said = re.sub(rb'(?<!"choices":\[\]),"usage":\{[^}]*\}', b"", said)
    return said


def longest_delay(gate: Gate, key: str) -> float:
    """Stream events that vLLM writes 300 ms apart; return the longest way of one, in seconds."""
    with chat(gate, key, "spaced", stream=True) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        received = [(time.monotonic(), event) for event in stream_events(response)]
    assert received[-1][1] == DONE
    events = gate.upstream.asked()[-1].sent
    sent = [at for at, event in events if b'"choices":[],' not in event]
    return max(there - here for (there, _), here in zip(received, sent, strict=True))


def connected(gate: Gate) -> socket.socket:
    """Return a raw connection to the gate."""
    return socket.create_connection(gate.address, timeout=20)


def raw_request(method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """Return a request as bytes, header by header as given."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def raw_chat(key: str, body: JSONObject, endpoint: str = "chat/completions") -> bytes:
    """Return a chat, or a request of its kind, as bytes."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return raw_request("POST", f"/v1/{endpoint}", headers, json.dumps(body).encode())


def read_reply(connection: socket.socket, method: str = "GET") -> Reply:
    """Read one answer to a request of this method from a raw connection."""
    reply = Reply()
    with contextlib.closing(http.client.HTTPResponse(connection, method=method)) as response:
        response.begin()
        reply.status_code = response.status
        reply.headers = CaseInsensitiveDict(response.getheaders())
        reply.raw = io.BytesIO(response.read())
    return reply


def send_raw(gate: Gate, *pieces: bytes) -> Reply:
    """Send bytes on a connection of their own and read one answer."""
    with connected(gate) as connection:
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            for piece in pieces:
                connection.sendall(piece)
        reply = read_reply(connection)
    gate.seen.add(reply.status_code)
    return reply


def read_events(connection: socket.socket, count: int) -> bytes:
    """Read from a raw connection until `count` events were there; return all bytes."""
    received = b""
    while received.count(b"\n\ndata: ") + received.count(b"\r\ndata: ") < count:
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    return received


def leave_with_fin(connection: socket.socket) -> None:
    """Close when all that has come was read; else it would be a reset."""
    connection.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while connection.recv(1 << 20):
            pass
    connection.close()


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


@pytest.fixture
def user(gate: ThreadedGate) -> User:
    """An account on the gate."""
    return register(gate)


ENDPOINTS = ("chat/completions", "messages", "responses")  # one of each protocol
AGENTS = ENDPOINTS[1:]  # what Claude Code and Codex speak
BOUND_NAMES = {"responses": "max_output_tokens"}


def body_of(endpoint: str, model: str = "ok", most: int = 300, **fields: object) -> JSONObject:
    """Return the body of a request for at most so many tokens, with the prompt marker in it."""
    body: JSONObject = {"model": model, BOUND_NAMES.get(endpoint, "max_tokens"): most}
    two = [PROMPT, PROMPT]
    prompts: dict[str, JSONObject] = {"completions": {"prompt": two}, "embeddings": {"input": two}}
    prompts["responses"] = {"input": PROMPT}
    return body | prompts.get(endpoint, {"messages": user_says(PROMPT)}) | fields


def refused(endpoint: str, reply: Reply, status: int, code: str = "") -> str:
    """Fail unless `reply` is an error in the protocol's own shape; return its words."""
    if not endpoint.startswith("messages"):
        return str(assert_error(reply, status, code)["message"])
    body = json.loads(reply.content)
    assert (reply.status_code, set(body), body["type"]) == (status, {"type", "error"}, "error")
    assert set(body["error"]) == {"type", "message"} and body["error"]["message"]
    assert reply.content.endswith(b"\n") and not LEAKS.search(reply.content.decode())
    return str(body["error"]["message"])


# ---------------------------------------------------------------------------------------------
# Accounts, JWTs and keys: who gets in, and that nobody else does.

LONGEST_PASSWORD = "ä" * 36  # 72 bytes
WISHES: JSONObject = {  # of one who would be somebody else
    "is_admin": True, "id": 77, "jwt_version": 9, "disabled_at": 1, "tokens_used": -1000,
    "tokens_reserved": -1000, "api_key": "sk-llmgate-mine", "key_hash": "0" * 64,
}  # fmt: skip


def test_registration_gives_an_integer_id_and_a_key(gate: Gate) -> None:
    """What README shows and no cache may keep; extra fields change nothing of it."""
    body = {"username": "alice_1", "password": PASSWORD}
    answer = call(gate, "POST", "/auth/register", json=body | WISHES)
    assert (answer.status_code, answer.headers["Cache-Control"]) == (201, "no-store")
    assert answer.headers["X-Request-Id"]
    key = answer.json()["api_key"]
    assert re.fullmatch(r"sk-llmgate-[0-9A-Za-z]{49}", key)
    account = {"username": "alice_1", "token_limit": 1000000, "tokens_used": 0, "api_key": key}
    assert answer.json() == account | {"id": 1}
    seen = me(gate, User(1, "alice_1", PASSWORD, key))
    assert abs(seen.pop("created_at") - time.time()) < 60
    assert seen == account | {"id": 1}
    row = gate.rows("SELECT id, tokens_used, tokens_reserved, jwt_version, disabled_at FROM users")
    assert row == [(1, 0, 0, 1, None)]
    assert gate.rows("SELECT count(*) FROM api_keys WHERE key_hash = ?", "0" * 64) == [(0,)]


@pytest.mark.parametrize("settings", [{}, {"JWT_EXPIRATION_HOURS": "1"}], ids=["24 h", "1 h"])
def test_login_takes_json_and_a_form(make_gate: MakeGate, settings: dict[str, str]) -> None:
    """Both give a JWT, which no cache may keep; it buys a new one of the same shape."""
    gate = make_gate(**settings)
    credentials = {"username": register(gate, "olga").name, "password": PASSWORD}
    by_json = call(gate, "POST", "/auth/token", json=credentials)
    by_form = call(gate, "POST", "/auth/token", data=credentials | {"grant_type": "password"})
    refreshed = call(gate, "POST", "/auth/refresh", by_json.json()["access_token"])
    for answer in (by_json, by_form, refreshed):
        assert answer.status_code == 200, answer.text
        token, life_s = answer.json()["access_token"], 3600 if settings else 24 * 3600
        about = {"token_type": "bearer", "expires_in": life_s}
        assert answer.json() == {"access_token": token} | about
        claims = jwt.decode(token, options={"verify_signature": False})
        assert claims["exp"] - claims["iat"] == life_s
        assert answer.headers["Cache-Control"] == "no-store"
        assert call(gate, "GET", "/users/me", token).status_code == 200


def test_names_are_unique_whatever_their_case(gate: Gate) -> None:
    """Also when eight ask for one at the same time: one row, and seven clear answers."""
    body = {"username": "alice_1", "password": PASSWORD}
    answers = in_parallel(8, lambda _: call(gate, "POST", "/auth/register", json=body))
    late = [answer for answer in answers if answer.status_code != 201]
    assert len(late) == 7
    body["username"] = "ALICE_1"
    for answer in [*late, call(gate, "POST", "/auth/register", json=body)]:
        assert_error(answer, 409, "username_taken")
    assert gate.rows("SELECT count(*) FROM users") == [(1,)]
    assert gate.rows("SELECT count(*) FROM api_keys") == [(1,)]
    assert try_login(gate, "Alice_1", PASSWORD).status_code == 200


BAD_NAMES = ["ab", "a" * 65, "", "a b", "älice", "a\r\nb", "a/b", 12345, None]
BAD_PASSWORDS = ["a" * 73, "😀" * 19, "a" * 60_000, "", "passwor", 12345678, None, "password\ud800"]
BAD_LIMITS = ["-1", "0", "1.5", '"100"', "true", "[]", "NaN", "1e999"]
GRANTED_LIMITS = {None: 5000, 7: 7, 9000: 9000, 9001: 9000, 10**30: 9000}


def test_bad_name_password_or_limit_makes_no_account(make_gate: MakeGate) -> None:
    """400 at registration; at login a bad name or password is a wrong one."""
    gate = make_gate(DEFAULT_TOKEN_LIMIT="5000", MAX_TOKEN_LIMIT="9000")
    users = [register(gate, token_limit=asked) for asked in GRANTED_LIMITS] + [register(gate)]
    for name in BAD_NAMES:
        body: JSONObject = {"username": name, "password": PASSWORD}
        assert_error(call(gate, "POST", "/auth/register", json=body), 400, param="username")
        assert_error(try_login(gate, name, PASSWORD), 401, "invalid_credentials")
    for limit in BAD_LIMITS:
        text = f'{{"username": "dave", "password": "{PASSWORD}", "token_limit": {limit}}}'
        assert_error(post_text(gate, "/auth/register", "", text), 400)
    for number, password in enumerate(BAD_PASSWORDS):
        body = {"username": "carol", "password": password}
        assert_error(post_text(gate, "/auth/register", "", json.dumps(body)), 400, param="password")
        name = users[number % 2].name  # with four tries for each
        assert_error(try_login(gate, name, password), 401, "invalid_credentials")
    granted = [limit for (limit,) in gate.rows("SELECT token_limit FROM users ORDER BY id")]
    assert granted == [*GRANTED_LIMITS.values(), 5000]
    user = register(gate, password=LONGEST_PASSWORD)
    assert try_login(gate, user.name, LONGEST_PASSWORD).status_code == 200
    for wrong in (LONGEST_PASSWORD + "a", LONGEST_PASSWORD[:-1] + "ö", LONGEST_PASSWORD[:-1]):
        assert_error(try_login(gate, user.name, wrong), 401, "invalid_credentials")


READS_JSON = [
    "/auth/register", "/auth/token", "/auth/password", "/users/me/keys", "/v1/completions",
    "/v1/chat/completions", "/v1/embeddings", "/v1/responses", "/v1/messages",
    "/v1/messages/count_tokens",
]  # fmt: skip
BAD_BODIES = [b"{bad", b"", b"[1]", b"null", b'"x"', b"\xff\xfe", b'{"model": "\xff\xfe"}']
BAD_BODIES += [b"[" * 60_000, b'{"model": ' + b"[" * 60_000]


def test_bad_body_is_refused_by_every_call(make_gate: MakeGate) -> None:
    """400; 415 as text, which a web page may send unasked, and as gzip. A BOM is read over."""
    gate = make_gate(MAX_BODY_MB="1")
    user = register(gate)
    token = login(gate, user)
    good = json.dumps(chat_body() | {"username": "erin", "password": PASSWORD}).encode()
    packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    for path in READS_JSON:
        endpoint, bearer = path.removeprefix("/v1/"), user.key if "/v1" in path else token
        for body in BAD_BODIES:
            refused(endpoint, post_text(gate, path, bearer, body), 400)
        for headers in ({}, {"Content-Type": "text/plain"}, packed):
            body = gzip.compress(good) if headers == packed else good
            answer = call(gate, "POST", path, bearer, data=body, headers=headers)
            refused(endpoint, answer, 415)
    assert gate.upstream.asked() == []
    assert gate.rows("SELECT count(*) FROM users") == [(1,)]
    marked = b"\xef\xbb\xbf" + json.dumps(chat_body()).encode()
    assert post_text(gate, "/v1/chat/completions", user.key, marked).status_code == 200
    assert [x.json() for x in gate.upstream.asked()] == [chat_body()]
    assert_error(post_text(gate, "/v1/chat/completions", user.key, b" " * (2 << 20)), 413)
    assert chat(gate, user.key, messages=user_says("x" * 900_000)).status_code == 400  # vLLM's


def test_unknown_name_is_like_a_wrong_password(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answer in the same time, so that names cannot be guessed."""
    monkeypatch.setattr(llmgate, "BCRYPT_ROUNDS", ROUNDS)
    bodies = set()

    def seconds(name: str) -> float:
        answer = try_login(gate, name, "wrong-password")
        assert_error(answer, 401, "invalid_credentials")
        bodies.add(answer.content)
        return answer.elapsed.total_seconds()

    names = [register(gate).name for _ in range(7)] * 3
    pairs = [(seconds(name), seconds(f"no-{name}-{i}")) for i, name in enumerate(names)]
    wrong, unknown = (statistics.median(times) for times in zip(*pairs, strict=True))
    assert abs(wrong - unknown) < 0.25 * max(wrong, unknown)
    assert len(bodies) == 1


def sign(claims: Mapping[str, object], algorithm: str = "HS256", **header: str) -> str:
    """Sign claims with the gate's own key for JWTs; None as a claim leaves it out."""
    now = int(time.time())
    whole = {"sub": "1", "iat": now, "exp": now + 60, "ver": 1} | dict(claims)
    kept = {name: value for name, value in whole.items() if value is not None}
    key = hmac.digest(JWT_SECRET.encode(), b"llmgate jwt", "sha256")
    with warnings.catch_warnings():  # PyJWT finds 32 bytes short for HS512
        warnings.simplefilter("ignore", jwt.InsecureKeyLengthWarning)
        return jwt.encode(kept, key, algorithm, headers=dict(header))


def test_forged_jwt_is_refused_at_once(gate: Gate) -> None:
    """What the gate's own key signed works, also by a clock that is 8 s ahead or behind."""
    register(gate)
    now = int(time.time())
    for start in (now + 8, now - 3608, now):
        genuine = sign({"iat": start, "nbf": start, "exp": start + 3600})
        assert call(gate, "GET", "/users/me", genuine).status_code == 200, start - now
    header, payload, signature = genuine.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    other = base64.urlsafe_b64encode(json.dumps(claims | {"sub": "2"}).encode()).decode()
    none = base64.urlsafe_b64encode(b'{"alg":"none"}').decode().rstrip("=")
    forged = [f"{none}.{payload}.", f"{none}.{payload}.{signature}", f"{header}.{payload}."]
    forged += [f"{header}.{other.rstrip('=')}.{signature}", "a.b.c", "a" * 40_000]
    forged += [jwt.encode(claims, "k" * 32), jwt.encode(claims, JWT_SECRET)]
    forged += [sign({}, "HS512"), sign({}, crit=cast(str, ["exp"]))]
    forged += [sign({"sub": sub}) for sub in (None, 1, "2", "9" * 30, "one")]
    forged += [sign({"exp": None}), sign({"ver": 2})]
    for token in [*forged, sign({"iat": now + 30, "nbf": now + 30, "exp": now + 90})]:
        answer = call(gate, "GET", "/users/me", token)
        assert_error(answer, 401, "invalid_token")
        assert answer.elapsed.total_seconds() < 0.5, token
    expired = sign({"exp": now - 120})  # so that a client logs in again
    assert_error(call(gate, "GET", "/users/me", expired), 401, "token_expired")
    for value in ("Bearer", "Bearer ", "", "Bearer \xe4\xff"):
        reply = send_raw(gate, raw_request("GET", "/users/me", {"Authorization": value}))
        assert_error(reply, 401)
    too_long = {"Authorization": "Bearer " + "a" * 10**6}
    assert send_raw(gate, raw_request("GET", "/users/me", too_long)).status_code == 431


def test_each_credential_opens_its_own_calls_only(gate: Gate, user: User) -> None:
    """A key, also as `x-api-key`, opens /v1 and its usage, a JWT the account; a query neither."""
    token, as_bearer = login(gate, user), {"Authorization": f"Bearer {user.key}"}
    as_header = {"x-api-key": user.key}
    for headers in (as_header, as_bearer, as_bearer | as_header, as_bearer | {"x-api-key": ""}):
        assert call(gate, "GET", "/v1/models", headers=headers).status_code == 200
    account = ("GET /users/me", "GET /users/me/keys", "POST /users/me/api-key")
    for asked in (*account, "POST /auth/refresh"):
        method, path = asked.split()
        for headers in (as_header, as_bearer, {}):
            assert_error(call(gate, method, path, headers=headers), 401)
    assert call(gate, "GET", "/users/usage", user.key).status_code == 200
    assert_error(call(gate, "GET", "/v1/models", token), 401, "invalid_api_key")
    assert_error(chat(gate, token), 401, "invalid_api_key")
    for name in ("api_key", "key", "token", "access_token", "authorization"):
        assert_error(call(gate, "GET", f"/users/me?{name}={token}"), 401)
        assert_error(call(gate, "GET", f"/v1/models?{name}={user.key}"), 401)
    assert gate.upstream.asked() == []
    assert me(gate, user)["api_key"] == user.key


def test_bad_key_is_refused_before_vllm(gate: Gate, user: User) -> None:
    """At once, and without a reason to try again. A scheme in small letters is a good one."""
    key, body = user.key, json.dumps(chat_body()).encode()
    changed = key[:20] + ("B" if key[20] == "A" else "A") + key[21:]
    in_basic = "Basic " + base64.b64encode(f"user:{key}".encode()).decode()
    wrong = ["' OR 1=1 --", "sk-llmgate-' OR 1=1 --", "\xff\xfe", changed, key + "a", key[:-1]]
    wrong += [key.swapcase(), f"{key}, Bearer {key}", f"other\r\nAuthorization: Bearer {key}"]
    values = ["Bearer", "Basic x", in_basic, key, *[f"Bearer {item}" for item in wrong]]
    cases = [{"Authorization": value} for value in values]
    cases += [{}, {"x-api-key": ""}, {"x-api-key": key[:-1]}]
    cases.append({"Authorization": f"Bearer {key}", "x-api-key": register(gate).key})
    for headers in cases:
        began, code = time.perf_counter(), "" if any(headers.values()) else "missing_api_key"
        for endpoint in ("models", *ENDPOINTS):
            method = "GET" if endpoint == "models" else "POST"
            asked = {"Content-Type": "application/json"} | headers
            reply = send_raw(gate, raw_request(method, f"/v1/{endpoint}", asked, body))
            refused(endpoint, reply, 401, code)
            assert reply.headers["x-should-retry"] == "false", headers
        assert time.perf_counter() - began < 4 * 0.5, headers
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
            call(gate, "GET", "/v1/models", user.key, timeout=0.4)
        for key in (user.key[:-1], user.key + "0", user.key.replace("-llmgate-", "-llmgate-0")):
            assert_error(call(gate, "GET", "/v1/models", key), 401, "invalid_api_key")
    assert call(gate, "GET", "/v1/models", user.key).status_code == 200


def test_replaced_key_is_refused_and_its_stream_goes_on(gate: Gate) -> None:
    """The quota is the same. Of ten new keys at once one works, which /users/me shows."""
    user = register(gate, token_limit=50_000)
    token = login(gate, user)
    assert chat(gate, user.key).status_code == 200
    with chat(gate, user.key, "slow", stream=True, max_tokens=10) as running:
        key = replace_key(gate, token)
        assert_error(chat(gate, user.key), 401, "invalid_api_key")
        assert chat(gate, key).status_code == 200
        assert list(stream_events(running))[-1] == DONE
    gate.settle()
    keys = [key, *in_parallel(10, lambda _: replace_key(gate, token))]
    working = [key for key in keys if call(gate, "GET", "/v1/models", key).status_code == 200]
    seen = me(gate, user)
    assert working == [seen["api_key"]]
    assert (seen["token_limit"], seen["tokens_used"]) == (50_000, 80)


def test_named_keys_are_listed_and_revoked(gate: Gate) -> None:
    """Up to a hundred of a user, each with its own usage; a revoked one is refused at once."""
    user, path = register(gate), "/users/me/keys"
    token = login(gate, user)

    def make(name: str) -> JSONObject:
        made = call(gate, "POST", path, token, json={"name": name})
        assert made.status_code == 201, made.text
        return cast(JSONObject, made.json())

    key = make("laptop")["api_key"]
    assert chat(gate, key).status_code == 200
    gate.settle()
    keys = call(gate, "GET", path, token).json()["data"]
    assert [item["name"] for item in keys][1:] == ["laptop"]
    assert [item["api_key"] for item in keys] == [user.key, key]
    assert [item["tokens_used"] for item in keys] == [0, 30]
    assert keys[1]["last_used_at"] >= keys[1]["created_at"] > 0
    assert keys[0]["last_used_at"] is None
    assert call(gate, "DELETE", f"{path}/{keys[1]['id']}", token).status_code == 204
    assert_error(chat(gate, key), 401, "invalid_api_key")
    assert chat(gate, user.key).status_code == 200
    other = login(gate, register(gate))
    assert_error(call(gate, "DELETE", f"{path}/{keys[0]['id']}", other), 404)
    assert me(gate, user)["api_key"] == user.key
    last = [make("one more") for _ in range(99)][-1]
    assert_error(call(gate, "POST", path, token, json={"name": "too many"}), 400)
    call(gate, "DELETE", f"{path}/{last['id']}", token)
    make("there is room again")


def test_new_password_ends_every_older_jwt_and_disable_all(gate: Gate, user: User) -> None:
    """A stolen JWT is of no use any more; the API key works on, until the operator disables it."""
    old = login(gate, user)
    body = {"old_password": PASSWORD, "new_password": PASSWORD + "-2"}
    wrong = call(gate, "POST", "/auth/password", old, json=body | {"old_password": "wrong-one"})
    assert_error(wrong, 401)
    answer = call(gate, "POST", "/auth/password", old, json=body)
    assert answer.status_code == 200, answer.text
    token = answer.json()["access_token"]
    assert_error(call(gate, "GET", "/users/me", old), 401, "invalid_token")
    assert call(gate, "GET", "/users/me", token).status_code == 200
    assert_error(try_login(gate, user.name, PASSWORD), 401, "invalid_credentials")
    assert try_login(gate, user.name, PASSWORD + "-2").status_code == 200
    assert chat(gate, user.key).status_code == 200
    run_command(gate, "disable", user.name)
    answers = [call(gate, "GET", "/users/me", token), call(gate, "GET", "/v1/models", user.key)]
    for answer in [*answers, try_login(gate, user.name, PASSWORD + "-2")]:
        assert_error(answer, 403, "account_disabled")
    run_command(gate, "enable", user.name)
    assert chat(gate, user.key).status_code == 200


def test_guessing_is_slowed_down_for_one_name_only(gate: Gate) -> None:
    """Also for the right password; keys and others go on. So it is for a name that nobody has."""
    user, other = register(gate), register(gate)
    guesses = [try_login(gate, user.name, "wrong-password") for _ in range(10)]
    held_back = try_login(gate, user.name, PASSWORD)
    statuses = [answer.status_code for answer in guesses]
    assert statuses[:5] == [401] * 5 and statuses[-1] == 429
    for answer in (guesses[-1], held_back):
        assert_error(answer, 429, "rate_limit_exceeded")
    assert chat(gate, user.key).status_code == 200
    assert try_login(gate, other.name, PASSWORD).status_code == 200
    unknown = [try_login(gate, "no-such-name", "wrong-password") for _ in range(10)]
    assert [answer.status_code for answer in unknown] == statuses
    assert unknown[-1].content == guesses[-1].content
    wait_s = int(held_back.headers["Retry-After"])
    wait_until(lambda: try_login(gate, user.name, PASSWORD).status_code == 200, wait_s + 1)
    assert_error(try_login(gate, user.name, "wrong-password"), 401)
    waits = []
    for tries in (4, 5, 6, 30):
        gate.rows("UPDATE login_attempts SET tries = ?, held_until_ms = 0", tries)
        assert_error(try_login(gate, user.name, "wrong-password"), 401)
        waits.append(int(try_login(gate, user.name, PASSWORD).headers["Retry-After"]))
    assert waits == [1, 2, 4, 15 * 60]


def test_guesses_are_counted_before_they_are_tried(gate: Gate, user: User) -> None:
    """Few of fifty at once get that far; the log has who guesses; a clock gone wrong blocks nobody."""
    assert_error(try_login(gate, user.name, "wrong-password"), 401)
    gate.rows("UPDATE login_attempts SET held_until_ms = held_until_ms + 600000")  # one failure
    assert try_login(gate, user.name, PASSWORD).status_code == 200
    assert_error(try_login(gate, user.name, "wrong-password"), 401)
    gate.rows("UPDATE login_attempts SET tries = 9, held_until_ms = held_until_ms + 3600000")
    assert try_login(gate, user.name, PASSWORD).status_code == 200
    answers = in_parallel(50, lambda _: try_login(gate, user.name, "wrong-password"))
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses[401] + statuses[429] == 50
    assert 0 < statuses[401] <= 10
    for name in ("mallory", "1" * 60_000, "2" * 60_000, "no name\n"):
        assert_error(try_login(gate, name, "wrong"), 401, "invalid_credentials")
    remembered = gate.rows("SELECT * FROM login_attempts")
    assert len(remembered) == 5  # one for each name
    assert max(len(str(row)) for row in remembered) < 200
    wait_until(lambda: gate.log.read_text().count("/auth/token") == 58)
    lines = [line for line in gate.log.read_text().splitlines() if "/auth/token" in line]
    assert all("127.0.0.1" in line and "no name" not in line for line in lines)
    assert [" 401 " in line for line in lines if "mallory" in line] == [True]


def test_registration_by_invitation(start_process: StartProcess) -> None:
    """The first lines say how; none is told from a wrong one. LOG_FILE=- logs to standard error."""
    token = "invitation-marker-77"
    gate = start_process(REGISTRATION="invite", REGISTRATION_TOKEN=token, LOG_FILE="-")
    gate.secrets.add(token)
    body: JSONObject = {"username": "ida", "password": PASSWORD}
    answer = call(gate, "POST", "/auth/register", json=body)
    message = assert_error(answer, 403, "registration_closed")["message"]
    assert "registration_token" in message and "wrong" not in message.lower()
    for wrong, word in (("another", "wrong"), (5, "registration_token")):
        answer = call(gate, "POST", "/auth/register", json=body | {"registration_token": wrong})
        assert word in assert_error(answer, 403, "registration_closed")["message"].lower()
    assert register(gate, "ida", registration_token=token).id == 1
    assert '"registration_token":"…"' in gate.output.read_text()
    wait_until(lambda: gate.errors.read_text().count(" POST /auth/register 403") == 3)
    assert not gate.log.exists()


def test_secret_is_made_once_and_whole(tmp_path: Path, start_process: StartProcess) -> None:
    """By commands at once; a write that fails leaves no half of it, a link there is refused."""
    secret = tmp_path / "llmgate.secret"
    full = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
    command(tmp_path, customized(tmp_path / "full", full), "create-tables", status=1)
    assert not secret.exists()
    secret.symlink_to(tmp_path / "elsewhere")
    assert "llmgate.secret" in refusal(tmp_path) and not (tmp_path / "elsewhere").exists()
    secret.unlink()

    def create(number: int) -> User:
        made = command(tmp_path, {}, "create-user", f"user.{number}", stdin=PASSWORD)
        return User(0, f"user.{number}", PASSWORD, made.stdout.split()[-1])

    users = in_parallel(4, create)
    assert len(secret.read_text().strip()) >= 32
    gate = start_process()
    gate.secrets |= {user.key for user in users}
    assert [me(gate, user)["api_key"] for user in users] == [user.key for user in users]


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


def test_host_that_is_not_the_gates_is_refused(make_gate: MakeGate) -> None:
    """Names match in any case; where all are accepted it must be one. Only /health needs none."""
    gate = make_gate(ALLOWED_HOSTS="[fd00::1],LLM.example.org,127.0.0.1")
    key = register(gate).key
    good = {"llm.example.org", "LLM.Example.org:8000", "[fd00::1]:8000", "[FD00::1]"}
    for host in (*good, "example.org", "llm.example.org.evil.net", "[fd00::2]"):
        answer = call(gate, "GET", "/v1/models", key, headers={"Host": host})
        assert (host, answer.status_code) == (host, 200 if host in good else 400)
    gate = make_gate(HOST="0.0.0.0", REGISTRATION="open")
    request = raw_request("GET", "/opencode.json", {"Authorization": f"Bearer {key}"})
    for host in ("", "a b", "//", "@", "x/y", "[::1", "a:b:c", 'a"b', "localhost:99999"):
        asked = request.replace(b"Host: localhost", f"Host: {host}".encode())
        assert_error(send_raw(gate, asked), 400)
    assert send_raw(gate, b"GET /health HTTP/1.0\r\n\r\n").status_code == 200
    assert send_raw(gate, b"GET /users/usage HTTP/1.0\r\n\r\n").status_code == 400


# ---------------------------------------------------------------------------------------------
# The relay: what vLLM gets and what the client gets, byte by byte.


def test_each_event_passes_at_once(gate: Gate, user: User) -> None:
    """Events that vLLM writes 300 ms apart are at the client within 150 ms."""
    assert best_of_six(lambda: longest_delay(gate, user.key), 0.15) < 0.15


STREAM_OPTIONS: list[JSONObject | None] = [None, {"include_usage": False}, {"include_usage": True}]
STREAM_OPTIONS += [{"include_usage": True, "continuous_usage_stats": on} for on in (False, True)]
STRANGE_WORDS = (  # that look like the protocol
    ',"usage":{"prompt_tokens":1,"completion_tokens":1},"choices":[],'
    'data: [DONE]\n\ndata: {"error":{"message":"no"}}\n\n'
    '"usage":null}] \\"usage\\": \\\\'
    "\N{SNOWMAN}\N{GRINNING FACE}äöü\u2028\u2029\x85\x00"
)


@pytest.mark.parametrize("model", ["ok", "lumpy", "echo"])
def test_stream_is_what_vllm_would_have_sent(gate: Gate, user: User, model: str) -> None:
    """The usage that only the gate asked for is gone, not what the model says; nothing else is."""
    said = user_says(STRANGE_WORDS * 3)
    for options, choices in itertools.product(STREAM_OPTIONS, (1, 2)):
        asked = {} if options is None else {"stream_options": options}
        events = streamed(gate, user.key, model, n=choices, messages=said, **asked)
        exchange = gate.upstream.asked()[-1]
        assert exchange.json()["stream_options"]["include_usage"] is True
        assert exchange.json()["stream_options"]["continuous_usage_stats"] is True
        assert b"".join(events) == said_by_vllm(exchange, options)
        assert spoken(events) == STRANGE_WORDS * 3 or choices > 1 or model != "echo"
        wanted = options or {}
        if not wanted.get("continuous_usage_stats"):
            shown = [event for event in events if b'"usage":' in event]
            assert shown == events[-2:-1] * wanted.get("include_usage", False)
    plain = chat(gate, user.key, "echo", messages=said)
    assert plain.json()["choices"][0]["message"]["content"] == STRANGE_WORDS * 3
    body = {"model": model, "prompt": PROMPT, "stream": True, "max_tokens": 5}
    with relay(gate, user.key, "completions", body) as response:  # whose events are other objects
        events = list(stream_events(response))
        assert gate.row(response).total == 10 + (3 if model == "echo" else 5)
    assert b"".join(events) == said_by_vllm(gate.upstream.asked()[-1])
    gate.settle()
    assert not any(row.estimated for row in gate.usage(user))


WHOLE_ANSWER = b'{"id":"c","choices":[],"usage":{"prompt_tokens":10,"completion_tokens":3}}'
LENGTH = b"Content-Length: %d\r\n\r\n" % len(WHOLE_ANSWER)
CHUNKED = b"Transfer-Encoding: Chunked\r\n\r\n"
HALVES = b"4\r\n%s\r\n046;x=1\r\n%s\r\n0\r\n\r\n" % (WHOLE_ANSWER[:4], WHOLE_ANSWER[4:])
OK_200 = b"HTTP/1.1 200 OK\r\n"
FRAMINGS = [
    OK_200 + LENGTH + WHOLE_ANSWER,
    b"HTTP/1.1 100 Continue\r\n\r\n" + OK_200 + LENGTH + WHOLE_ANSWER,
    OK_200 + b"Connection: Close\r\n" + LENGTH + WHOLE_ANSWER,
    b"HTTP/1.0 200 OK\r\n\r\n" + WHOLE_ANSWER,
    OK_200 + CHUNKED + HALVES,
]
BROKEN_FRAMINGS = [
    OK_200 + b"no end: of headers",
    OK_200 + b"Content-Length: five\r\n\r\n" + WHOLE_ANSWER,
    OK_200 + b"Content-Length: 5\n 6\r\n\r\nhello",
    OK_200 + b"Content-Length: -5\r\n\r\nhello",
    OK_200 + b"Content-Length: 5\r\nContent-Length: 9\r\n\r\nhello",
    (OK_200 + b"Content-Length: 5\r\n\r\nhello") * 2,
    b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello",
    OK_200 + CHUNKED + b"4a\r\n" + WHOLE_ANSWER + b"\r\n" + b"1" * 200,
    OK_200 + CHUNKED + b"9" * 30 + b"\r\nhello",
    OK_200 + CHUNKED + b"-5\r\nhello",
    OK_200 + CHUNKED + HALVES.removesuffix(b"0\r\n\r\n") + b"zz\r\n",
    OK_200 + b"Content-Type: text/x;\r\n charset=utf-8\r\n" + LENGTH + WHOLE_ANSWER,
    OK_200 + b"Content-Type: application/json\r x\r\n" + LENGTH + WHOLE_ANSWER,
    b"+OK hello\r\n\r\n",
]


def test_answer_is_read_however_it_arrives(gate: Gate, user: User) -> None:
    """What breaks off or is no HTTP is 502 at once, for its own caller and not for the next."""

    def say(upstream: UpstreamHandler, body: JSONObject) -> None:
        if "seed" not in body:
            upstream.say_whole()
            return
        answer, size = (FRAMINGS + BROKEN_FRAMINGS)[body["seed"]], body["top_k"]
        upstream.exchange.tokens = 13 * (answer in FRAMINGS)
        for at in range(0, len(answer), size):
            upstream.wfile.write(answer[at : at + size])
        upstream.close_connection = b"Content-Length" not in answer

    gate.upstream.say, gate.expected_5xx = say, {502}
    whole, broken = range(len(FRAMINGS)), range(len(FRAMINGS), len(FRAMINGS + BROKEN_FRAMINGS))
    for number, size in itertools.product(whole, (1, 7, 10**6)):
        answer = chat(gate, user.key, seed=number, top_k=size)
        assert (answer.status_code, answer.content) == (200, WHOLE_ANSWER), FRAMINGS[number]
    for number, size, stream in itertools.product(broken, (1, 10**6), (False, True)):
        with chat(gate, user.key, stream=stream, seed=number, top_k=size) as answer:
            assert_error(answer, 502, "upstream_error")
        assert answer.elapsed.total_seconds() < 2
        assert ANSWER in chat(gate, user.key).text
    assert gate.row(answer).total == 0  # what is no HTTP is free


def test_end_of_a_broken_response_is_seen_and_its_text_counts_once(gate: Gate, user: User) -> None:
    """It was told thrice by then. Nor does a text named like an event hide the end beside it."""
    vllm = ResponseAnswer(body_of("responses"), Behaviour())
    vllm.made, name = 20, "response.output_text.delta"
    *whole, _ = [event for _, event in vllm.events()]  # all but the last one
    begun = vllm.typed("response.created", response={"usage": None}) + vllm.typed(name, delta=name)
    ended = vllm.typed("response.output_text.done", text=name)
    ended += vllm.typed("response.failed", response={"status": "failed", "output": [name]})
    streams = iter([whole, [begun, ended]])
    gate.upstream.say = lambda handler, _: handler.say_events(
        *next(streams), wait_s=0.03, tokens=30
    )
    asked = body_of("responses", stream=True)
    cut, own = [relay(gate, user.key, "responses", asked) for _ in range(2)]
    assert b"event: response.failed" in cut.content and own.content == begun + ended
    assert 20 <= gate.row(cut).completion_tokens <= 30
    for answer in (cut, own):
        assert (gate.row(answer).status, gate.row(answer).estimated) == ("error", 1)


VLLM_SAYS: list[tuple[int, str | bytes, str, str | bool]] = [  # status, words or body, our code
    (400, CONTEXT_ERROR, "", False),  # and whether an answer had begun, or of which endpoint
    (400, "1 validation error for AnthropicContentBlock", "", "messages"),  # all was generated
    (400, "Unterminated string starting at: line 1 column 9 (char 1007)", "", "messages"),
    (400, "1 validation error for ResponsesResponse", "", "responses"),
    (429, "Too many requests; the queue is full.", "", False),
    (429, "Token limit exceeded: too many tokens, it exceeds the limit of 9", "", False),
    (503, "The queue is full.", "upstream_busy", False),
    *[(fault, b'{"error":"Unauthorized"}', "", False) for fault in (307, 401, 403, 500)],
    (200, b"", "", False),
    (200, b"<html>hello</html>", "", True),
    (200, gzip.compress(b"{}"), "", True),
    (200, b'{"id":"c","choices":[', "", True),
]


def test_refusals_of_vllm_keep_their_status_and_its_faults_are_502(gate: Gate, user: User) -> None:
    """`Retry-After` passes, no redirect is followed; free, or an estimate if an answer began."""

    def say(upstream: UpstreamHandler, body: JSONObject) -> None:
        status, said, _, _ = VLLM_SAYS[body["seed"]]
        if isinstance(said, str):
            said = dump({"error": {"message": said, "type": "x", "param": None, "code": status}})
        headers = {"retry-after": "9", "location": second.url + upstream.path}
        headers["set-cookie"] = "session=1; Path=/"
        upstream.reply(status, said, **headers)

    gate.upstream.say, gate.expected_5xx = say, {502, 503}
    with Upstream() as second:
        cases = itertools.product(ENDPOINTS, enumerate(VLLM_SAYS), (False, True))
        for endpoint, (number, (status, said, code, began)), stream in cases:
            begun = began in (True, endpoint)
            body, passes = body_of(endpoint, seed=number, stream=stream), isinstance(said, str)
            with relay(gate, user.key, endpoint, body) as answer:
                text, row = answer.text, gate.row(answer)
            case = (endpoint, status, said, stream)
            assert (row.status, row.estimated, row.total > 0) == ("error", begun, begun), case
            assert not {"Location", "Set-Cookie"} & answer.headers.keys(), case
            if code or not passes:
                refused(endpoint, answer, status if passes else 502, code or "upstream_error")
            if passes:
                assert (answer.status_code, answer.headers["Retry-After"]) == (status, "9"), case
                assert status == 400 or not re.search(MISREAD_BY_OPENCODE, text), case
                if not code and not re.search(MISREAD_BY_OPENCODE, str(said)):
                    assert answer.content == gate.upstream.asked()[-1].answer(), case
                assert answer.json()["error"]["message"], case
        assert second.exchanges == []


def test_gate_goes_on_when_vllm_comes(make_gate: MakeGate, upstream: Upstream) -> None:
    """502 while nobody listens, also near the limit. An idle connection may end: no 502 then."""
    upstream.stop()
    gate = make_gate()
    gate.expected_5xx = {502}
    user, poor = register(gate), register(gate, token_limit=200)
    for key, endpoint in itertools.product((user.key, poor.key), ENDPOINTS):
        answer = relay(gate, key, endpoint, body_of(endpoint))
        assert "vLLM" in refused(endpoint, answer, 502, "upstream_unavailable")
        assert answer.elapsed.total_seconds() < 3
    listed = call(gate, "GET", "/v1/models", user.key, timeout=3)
    assert_error(listed, 502, "upstream_unavailable")
    gate.settle()
    upstream.start()
    wait_until(lambda: call(gate, "GET", "/v1/models", user.key).status_code == 200)
    for _ in range(3):
        assert chat(gate, user.key).status_code == 200
        upstream.hang_up()
        wait_until(lambda: not upstream.connections)
    assert len(upstream.asked()) == 3  # and none ran twice
    gate.settle()
    upstream.stop()
    assert_error(chat(gate, poor.key), 502, "upstream_unavailable")  # who would count the prompt?


def test_killed_server_fails_its_own_requests_only(make_gate: MakeGate, upstream: Upstream) -> None:
    """Two servers beside one that is down; the killed one takes its models away, and returns."""
    dead = "http://127.0.0.1:1"
    with Upstream() as killed, Upstream() as other, ThreadPoolExecutor(8) as pool:
        killed.exchanges = other.exchanges = upstream.exchanges
        killed.listed, other.listed = [listing("slow")], [listing("paced")]
        gate = make_gate(VLLM_ENDPOINT=f"{dead}, {killed.url}/v1,{other.url}/")
        user = register(gate)
        broken = [pool.submit(streamed, gate, user.key, "slow", max_tokens=200) for _ in range(4)]
        whole = [pool.submit(streamed, gate, user.key, "paced", max_tokens=25) for _ in range(4)]
        wait_until(lambda: upstream.running() >= 8)
        killed.stop()
        for future in broken:
            assert data(future.result()[-1])["error"]["code"] == "upstream_error"
        for future in whole:
            assert future.result()[-1] == DONE
        gate.expected_5xx = {502}
        assert_error(chat(gate, user.key, "slow"), 502, "upstream_unavailable")
        listed = call(gate, "GET", "/v1/models", user.key).json()["data"]
        assert {model["id"] for model in listed} == {"paced", "llm-user-managed"}
        killed.start()
        wait_until(lambda: chat(gate, user.key, "slow", max_tokens=2).status_code == 200)


def test_first_server_in_the_list_gives_the_alias_its_model(
    make_gate: MakeGate, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In list, chat and opencode.json, which works on through the alias with another model."""
    monkeypatch.setattr(llmgate, "MODELS_TTL_S", 0.2)  # not to wait for 10 s
    with Upstream() as first, Upstream() as second:
        first.exchanges = second.exchanges = upstream.exchanges
        first.listed, second.listed = [listing("long")], [listing("ok"), listing("long")]
        gate, name = make_gate(VLLM_ENDPOINT=f"{first.url},{second.url}"), "llm-user-managed"
        gate.expected_5xx = {502}
        user = register(gate)
        config = call(gate, "GET", "/opencode.json", user.key).json()
        provider, _, model = config["model"].partition("/")
        asked_for = config["provider"][provider]["models"][model].get("id", model)

        def contexts() -> set[int]:
            listed = call(gate, "GET", f"/v1/models/{name}", user.key).json()["max_model_len"]
            (provider,) = call(gate, "GET", "/opencode.json", user.key).json()["provider"].values()
            model = gate.row(chat(gate, user.key, name, max_tokens=1)).model
            limit = provider["models"][name]["limit"]["context"]
            return {listed, limit, BEHAVIOURS[model].max_model_len}

        assert contexts() == {131072}
        listed = call(gate, "GET", "/v1/models", user.key).json()["data"]
        assert sorted(model["id"] for model in listed) == [name, "long", "ok"]
        second.stop()
        assert contexts() == {131072}
        second.listed = [listing("ok")]
        second.start()
        assert contexts() == {131072}
        first.stop()
        wait_until(lambda: contexts() == {MAX_MODEL_LEN}, 5)
        second.stop()
        first.listed = [listing("new/model")]
        first.start()
        seen = len(first.exchanges)
        wait_until(lambda: len(first.exchanges) > seen + 1)  # nobody asked the gate meanwhile
        assert chat(gate, user.key, asked_for).status_code == 200
    assert "new/model" in {row.model for row in gate.usage(user) if row.status == "ok"}


EXTRA = (  # fields that nobody knows yet, and whole numbers of any length
    '"chat_template_kwargs": {"enable_thinking": false}, "top_k": 40, "temperature": 0.10, '
    '"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": 1e3}}}], '
    '"response_format": {"type": "json_object"}, "seed": 12345678901234567890123, '
    '"metadata": {"user_id": "u"}, "context_management": {"edits": []}, "stop": null, '
    '"unknown": {"deep": [null, true, "\\u00e4\\ud83d\\ude00", -0.0, 1.0]}}'
)


def test_connection_may_end_while_the_prompt_is_counted(gate: Gate) -> None:
    """As vLLM ends one that was idle for 5 s: the request goes over another one."""
    user, upstream = register(gate, token_limit=20_000), gate.upstream
    wait_until(lambda: upstream.exchanges)  # the gate's own connection
    others = set(upstream.connections)
    assert chat(gate, user.key).status_code == 200  # whose connection is kept
    upstream.count_s = 0.5
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(chat, gate, user.key, messages=user_says("four" * 1000), max_tokens=5)
        wait_until(lambda: upstream.running() == 1)
        for kept in upstream.connections - others:
            kept.shutdown(socket.SHUT_RDWR)
        assert asked.result().status_code == 200
    assert [x.path for x in upstream.exchanges].count("/tokenize") == 1


def test_request_is_made_for_the_server_that_gets_it(
    make_gate: MakeGate, upstream: Upstream
) -> None:
    """For its context, when the first one has died."""
    with Upstream() as first:
        first.listed = [{"id": "ok", "max_model_len": 16}]
        gate = make_gate(VLLM_ENDPOINT=f"{first.url},{upstream.url}")
        user = register(gate)
        assert chat(gate, user.key).status_code == 200
    counted = relay(gate, user.key, "messages/count_tokens", body_of("messages"))
    assert counted.status_code == 200
    reply = chat(gate, user.key, max_tokens=None)
    assert (reply.status_code, gate.row(reply).total) == (200, 10 + 20)
    upstream.exchanges += first.exchanges


def test_vllm_gets_what_was_sent_but_nothing_of_its_sender(gate: Gate, user: User) -> None:
    """Responses are not stored, and the gate names them."""
    headers = {"Cookie": "session=cookie-marker", "X-Request-Id": "chosen-by-the-caller"}
    headers |= {"X-Forwarded-For": "203.0.113.9", "Forwarded": "for=203.0.113.9"}
    headers |= {"Accept-Encoding": "gzip, br", "TE": "trailers", "Priority": "u=0"}
    headers |= {"X-Vllm-Priority": "-9", "X-data-parallel-rank": "1", "x-api-key": user.key}
    headers |= {"Content-Type": "application/json"}
    for endpoint, bearer in itertools.product(ENDPOINTS, (user.key, "")):
        body = json.dumps(body_of(endpoint))[:-1] + ", " + EXTRA
        answer = call(gate, "POST", f"/v1/{endpoint}", bearer, data=body, headers=headers)
        assert answer.status_code == 200, answer.text
        exchange, name = gate.upstream.asked()[-1], answer.headers["X-Request-Id"]
        passed = {"Content-Length": str(len(exchange.body)), "Content-Type": "application/json"}
        passed |= {"Host": gate.upstream.url.removeprefix("http://"), "X-Vllm-Priority": "0"}
        passed |= {"Accept-Encoding": "identity", "Authorization": f"Bearer {UPSTREAM_KEY}"}
        assert dict(exchange.headers) == passed | {"X-Request-Id": name}
        assert name != "chosen-by-the-caller"
        got = exchange.json()
        if endpoint == "responses":
            assert got.pop("store") is False and name in got.pop("request_id")
        assert list(got.items()) == list(json.loads(body).items())


HARMFUL = ["kv_transfer_params", "ec_transfer_params", "vllm_xargs"]  # in every protocol
OF_TEXT = ["priority", "request_id", "stream_interval", "use_beam_search", "n_predict"]
STORED = ["previous_response_id", "previous_input_messages", "request_id"]  # without an owner
REFUSED_FIELDS = {  # whatever their value, but for null
    "chat/completions": [*HARMFUL, *OF_TEXT],
    "completions": [*HARMFUL, *OF_TEXT],
    "embeddings": [*HARMFUL, "priority", "request_id", "padding"],
    "messages": HARMFUL,
    "responses": HARMFUL + STORED,
}
ANY_VALUE = ["0", "1", '""', '"mine"', "{}", '{"a": 1}', "true"]
BAD_FIELDS = {  # as they stand in the body
    "model": ["null", "5", '""'],
    "stream": ['"true"', "1"],
    "stream_options": ['"all"', "[]"],
    "n": ["100000", "17", "0", "-1", "1.5", '"5"', "true"],
    "max_tokens": ["-1", "1.5", '"abc"', "true", "[]", "NaN", "1e999"],
    "max_completion_tokens": ["-1", "1.5", '"5"', "true", "{}"],
    "best_of": ["2"],
}


def test_field_that_harms_others_or_has_a_wrong_type_is_refused(gate: Gate, user: User) -> None:
    """By its name, before vLLM, without a row. What cannot harm passes: null, `best_of: 1`."""
    cases = [("responses", name, ["true"]) for name in ("store", "background")]
    cases += [("embeddings", "encoding_format", ['"bytes"', '"bytes_only"'])]
    cases += [("chat/completions", name, values) for name, values in BAD_FIELDS.items()]
    cases += [(end, name, ANY_VALUE) for end, names in REFUSED_FIELDS.items() for name in names]
    for endpoint, name, values in cases:
        for value in values:
            body = json.dumps(body_of(endpoint, stream=True) | {name: "?"}).replace('"?"', value)
            answer = post_text(gate, f"/v1/{endpoint}", user.key, body)
            assert name in refused(endpoint, answer, 400), value
            assert answer.json()["error"].get("param", name) == name, value
    said = user_says([{"type": "image_url", "image_url": None, "uuid": "of-another"}])
    named = [("responses", "input"), ("chat/completions", "messages"), ("embeddings", "messages")]
    for (endpoint, holder), value in itertools.product(named, (said, [said])):
        answer = relay(gate, user.key, endpoint, body_of(endpoint) | {holder: value})
        assert "uuid" in refused(endpoint, answer, 400)
    assert gate.usage() == []
    body = json.dumps(chat_body(temperature=7)).replace("7", "1e999")  # no number for JSON
    assert_error(post_text(gate, "/v1/chat/completions", user.key, body), 400, "invalid_json")
    assert gate.upstream.asked() == [] and gate.tokens_used(user) == 0
    harmless = {"best_of": 1, "store": False, "background": False}
    for endpoint, names in REFUSED_FIELDS.items():
        asked = body_of(endpoint) | harmless | dict.fromkeys(names)
        assert relay(gate, user.key, endpoint, asked).status_code == 200, endpoint


def test_models_are_listed_with_aliases_and_without_paths(make_gate: MakeGate) -> None:
    """Less vLLM's `root`, a path on its disk; an alias without a model means vLLM's first."""
    aliases = {"llm-user-managed": "", "tiny": "org/tiny", "of-tiny": "tiny"}
    aliases["of-first"] = "llm-user-managed"
    gate = make_gate(MODEL_ALIASES=",".join(map("=".join, aliases.items())))
    user = register(gate)
    listed = call(gate, "GET", "/v1/models", user.key)
    assert "/models/" not in listed.text
    models = {model["id"]: model for model in listed.json()["data"]}
    assert set(models) == {*BEHAVIOURS, *aliases}
    assert listed.json()["object"] == "list"
    for model in models.values():
        assert set(model) == {"id", "object", "created", "owned_by", "max_model_len"}
    assert models["llm-user-managed"]["max_model_len"] == MAX_MODEL_LEN
    assert models["long"]["max_model_len"] == 131072
    for name in ("ok", "org/tiny", "llm-user-managed", "/data/tiny"):
        one = call(gate, "GET", f"/v1/models/{name}", user.key)
        assert one.json() == models[name]
    assert_error(call(gate, "GET", "/v1/models/gpt-4", user.key), 404, "model_not_found")
    for endpoint in ENDPOINTS:
        answer = relay(gate, user.key, endpoint, body_of(endpoint, "gpt-4"))
        assert "gpt-4" in refused(endpoint, answer, 404, "model_not_found")
    assert gate.upstream.asked() == []  # which would say what models it has
    for alias in aliases:
        name = "org/tiny" if "tiny" in alias else "ok"
        answer = chat(gate, user.key, alias)
        assert answer.status_code == 200, answer.text
        assert gate.upstream.asked()[-1].json()["model"] == gate.row(answer).model == name


UNKNOWN_PATHS = [
    "POST /invocations", "GET /metrics", "POST /tokenize", "POST /pause", "GET /no-such-page",
    "POST /v1/load_lora_adapter", "POST /v1/chat/completions/batch", "POST /v1/../tokenize",
    "POST /v1/%2e%2e/tokenize", "POST /v1/..%2ftokenize", "GET /v1//models", "GET /V1/models",
    "GET /v1/models/../../metrics", "POST /v1/chat/completions/", "GET /v1/responses/x",
    "DELETE /v1/responses/x", "POST /v1/responses/x/cancel", "POST /v1/responses/render",
    "POST /v1/messages/render", "GET /v1/messages/batches", "POST /v1/messages/batches",
]  # fmt: skip
WRONG_METHODS = [  # and the right one
    "GET /v1/chat/completions POST", "GET /v1/messages POST", "DELETE /v1/models GET",
    "PUT /auth/register POST", "POST /users/me GET", "TRACE /v1/models GET",
]  # fmt: skip


def test_nothing_else_of_vllm_is_reachable(gate: Gate, user: User) -> None:
    """404 and no redirect; a wrong method is 405, and the answer says which one is right."""
    headers = {"Authorization": f"Bearer {user.key}", "Content-Type": "application/json"}
    for asked in UNKNOWN_PATHS:
        method, path = asked.split()
        body = b"{}" if method == "POST" else b""
        reply = send_raw(gate, raw_request(method, path, headers, body))
        refused(path.removeprefix("/v1/"), reply, 404)
        assert "Location" not in reply.headers, path
    for asked in WRONG_METHODS:
        method, path, allowed = asked.split()
        answer = call(gate, method, path, user.key)
        refused(path.removeprefix("/v1/"), answer, 405)
        assert allowed in answer.headers["Allow"], asked
    assert {x.path for x in gate.upstream.exchanges} <= {"/v1/models"}


def test_any_http_client_is_served(gate: Gate, user: User) -> None:
    """One that keeps its connection, one that sends in chunks, one that knows HTTP/1.0 only."""
    with connected(gate) as connection:
        for stream in (False, False, True):
            connection.sendall(raw_chat(user.key, chat_body(stream=stream)))
            assert read_reply(connection).status_code == 200
    body = json.dumps(chat_body()).encode()
    in_chunks = cast(bytes, iter([body[:20], body[20:]]))
    answer = post_text(gate, "/v1/chat/completions", user.key, in_chunks)
    assert answer.status_code == 200, answer.text
    request = raw_chat(user.key, chat_body(stream=True)).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    reply = send_raw(gate, request)  # which reads until the end of the connection
    assert reply.status_code == 200
    assert reply.content == said_by_vllm(gate.upstream.asked()[-1])
    for target in (b"http://localhost", b"?x"):  # without a path
        reply = send_raw(gate, b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % target)
        assert (reply.status_code, reply.headers["Content-Type"][:10]) == (200, "text/plain")
    expects = {"Authorization": f"Bearer {user.key}", "Expect": "100-continue"}
    assert send_raw(gate, raw_request("GET", "/v1/models", expects)).status_code == 200
    declared = expects | {"Content-Length": str(2 * 10**9)}  # refused before it is sent
    assert send_raw(gate, raw_request("POST", "/v1/chat/completions", declared)).status_code == 413


TEXT = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":null}]}\n\n'
LAST = b'data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
COUNT = b'{"prompt_tokens":10,"completion_tokens":3,"total_tokens":13}'
USAGE = b'data: {"id":"c","choices":[],"usage":%s}\n\n' % COUNT
CALL = (
    b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"arguments":%s}}]}}],"usage":%s}\n\n'
)
DEEP = COUNT[:-1] + b',"prompt_tokens_details":{"cached":{"by":{"usage":null}}}}'


def test_only_a_400_that_names_the_option_ends_running_counts(gate: Gate, user: User) -> None:
    """And for this request only."""
    words = [CONTEXT_ERROR, "stream_options: continuous_usage_stats is not permitted"]

    def say(upstream: UpstreamHandler, body: JSONObject) -> None:
        if "temperature" in body:
            upstream.refuse(400, f"no number: {body['temperature']}")
        elif words and "continuous_usage_stats" in body["stream_options"]:
            upstream.refuse(400, words.pop(0))
        else:
            upstream.say_events(TEXT, LAST, USAGE, DONE)

    gate.upstream.say = say
    hostile = chat(gate, user.key, stream=True, temperature="continuous_usage_stats")
    assert hostile.status_code == 400
    with chat(gate, user.key, stream=True) as answer:
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, CONTEXT_ERROR)
    assert streamed(gate, user.key) == streamed(gate, user.key)
    asked = [x.json()["stream_options"] for x in gate.upstream.asked()]
    wanted = ["continuous_usage_stats" in options for options in asked]
    assert wanted == [True, False, True, True, False, True]


STREAMS: dict[str, list[bytes]] = {
    "alone": [LAST, USAGE, DONE],
    "first in its event": [LAST, b'data: {"usage":%s,"id":"c","choices":[]}\n\n' % COUNT, DONE],
    "blanks": [LAST, b'data: {"id" : "c", "choices" : [], "usage" : %s}\n\n' % COUNT, DONE],
    "deep": [LAST, USAGE.replace(COUNT, DEEP), DONE],
    "no blank after data:": [LAST, USAGE.replace(b"data: ", b"data:"), DONE],
    "beside the end": [LAST.replace(b"]}", b'],"usage":%s}' % COUNT), DONE],
    "before the end": [LAST.replace(b'"id"', b'"usage":%s,"id"' % COUNT), DONE],
    "in each event": [TEXT.replace(b"]}", b'],"usage":%s}' % COUNT), LAST, USAGE, DONE],
    "in a tool's string": [CALL % (b'"{\\"usage\\": null}"', COUNT), LAST, USAGE, DONE],
    "in a tool's object": [CALL % (b'{"usage": null}', COUNT), LAST, USAGE, DONE],
    "more after [DONE]": [LAST, USAGE, DONE, TEXT],
    "[DONE] twice": [LAST, USAGE, DONE, DONE],
    "no [DONE]": [LAST, USAGE],
}


def test_usage_is_found_wherever_it_stands(gate: Gate, user: User) -> None:
    """Read for the row, shown to who asked; what a tool says of it stays, and [DONE] is the end."""
    for asked, (name, stream) in itertools.product((False, True), STREAMS.items()):
        gate.upstream.say = lambda handler, _: handler.say_events(TEXT, *stream)  # noqa: B023
        seen = streamed(gate, user.key, stream_options={"include_usage": asked})
        assert (seen[0], seen[-1]) == (TEXT, DONE), name
        expected = []
        for event in itertools.takewhile(lambda event: event != DONE, stream):
            body = json.loads(event[5:])
            if not asked or body["choices"] and not body["choices"][0].get("finish_reason"):
                body.pop("usage", None)
            expected += [body] if body["choices"] or asked else []
        assert [json.loads(event[5:]) for event in seen[1:-1]] == expected, name
    gate.settle()
    assert {(row.total, row.estimated, row.status) for row in gate.usage()} == {(13, 0, "ok")}


def test_large_upload_may_take_longer(make_gate: MakeGate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only UPSTREAM_TIMEOUT bounds an upload, not the time after which silence has a comment."""

    def read_late(upstream: UpstreamHandler) -> None:
        wait_until(after_seconds(0.5))
        upstream.do_GET()

    monkeypatch.setattr(UpstreamHandler, "do_POST", read_late)
    for name in ("PING_S", "CONNECT_TIMEOUT_S"):
        monkeypatch.setattr(llmgate, name, 0.2)
    gate = make_gate()
    endpoint, body = with_picture("image_url", len(PICTURE))
    body["messages"] *= 12  # more than the kernel takes at once
    assert relay(gate, register(gate).key, endpoint, body).status_code == 200


def test_vllm_is_told_how_many_requests_the_user_has(gate: Gate) -> None:
    """So that it can serve first who has the fewest."""
    user, other = register(gate), register(gate)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(chat(gate, user.key, "silent", stream=True))
        for key in (user.key, other.key):
            chat(gate, key)
    wait_until(lambda: gate.reserved() == 0)
    chat(gate, user.key)
    told = [x.headers["X-Vllm-Priority"] for x in gate.upstream.asked()]
    assert told == ["0", "1", "2", "3", "0", "0"]


def test_first_page_and_lost_callers_are_helped(gate: Gate, make_gate: MakeGate) -> None:
    """GET / says in plain text what to do next; a path without /v1 is told where it is."""
    for accept in ("*/*", "text/html,application/xhtml+xml"):
        page = call(gate, "GET", "/", headers={"Accept": accept})
        assert page.headers["Content-Type"].startswith("text/plain")
        for word in ("/auth/register", "opencode auth login", "/claude.json", "/codex.toml"):
            assert word in page.text
        assert page.text.count("\n") <= 20 and page.text.endswith("\n")
    closed, body = make_gate(REGISTRATION="closed"), {"username": "ida", "password": PASSWORD}
    assert "/auth/register" not in call(closed, "GET", "/").text
    assert_error(call(closed, "POST", "/auth/register", json=body), 403, "registration_closed")
    key = register(gate).key
    page = call(make_gate(OPENCODE_DISCOVERY="off"), "GET", "/").text
    assert "opencode auth login" not in page and "/opencode.json" in page
    gets, posts = ("/models", "/models/ok"), ("/chat/completions", "/messages/count_tokens")
    for method, path in [("GET", path) for path in gets] + [("POST", path) for path in posts]:
        error = assert_error(call(gate, method, path, key, json={}), 404)
        assert f"/v1{path}" in error["message"]
    assert "/v1" not in assert_error(call(gate, "GET", "/no-such-page"), 404)["message"]
    assert gate.upstream.asked() == []


# ---------------------------------------------------------------------------------------------
# Claude Code and Codex: /v1/messages and /v1/responses, and how a request ends whose caller left.

SHAPES = ["ok", "thinking", "tool", "cached", "llama", "v33", "lumpy", "llm-user-managed"]
NO_COUNT = ["nousage", "badusage"]


def exchanges(gate: Gate) -> dict[str, Exchange]:
    """Return what vLLM saw of each request, by the X-Request-Id."""
    return {x.headers["X-Request-Id"]: x for x in gate.upstream.asked()}


def passed_on(gate: Gate, endpoint: str, answer: Reply) -> bytes:
    """Return vLLM's answer, less the usage in a stream that only the gate asked for."""
    exchange = exchanges(gate)[answer.headers["X-Request-Id"]]
    strips = endpoint == "chat/completions" and exchange.json().get("stream")
    return said_by_vllm(exchange) if strips else exchange.answer()


def test_answers_and_rows_are_vllms(make_gate: MakeGate) -> None:
    """Plain and streamed; without a count, or with nonsense, a row is marked, within its claim."""
    asked = [("completions", "ok", False), ("embeddings", "ok", False)]
    asked += itertools.product(ENDPOINTS, SHAPES + NO_COUNT, (False, True))
    gate = make_gate(MAX_REQUESTS_PER_USER=str(len(asked)))
    user = register(gate)

    def ask(number: int) -> None:
        endpoint, model, stream = case = asked[number]
        body = body_of(endpoint, model, 5 if model == "v33" else 300, stream=stream)
        if model == "cached":  # 166 tokens, of which it knows 128
            body["input" if endpoint == "responses" else "system"] = "four" * 166
        answer = relay(gate, user.key, f"{endpoint}?beta=true", body)
        assert (answer.status_code, answer.content) == (200, passed_on(gate, endpoint, answer)), (
            case
        )
        assert stream or answer.headers["Content-Type"] == "application/json"
        assert answer.headers["x-ratelimit-limit-tokens"] == "1000000"
        assert 0 < int(answer.headers["x-ratelimit-remaining-tokens"]) <= 1000000
        row = gate.row(answer)
        seen = (row.user_id, row.status, row.endpoint, row.stream, row.estimated)
        assert seen == (user.id, "ok", endpoint, stream, model in NO_COUNT), case
        assert model in (row.model, "llm-user-managed"), case
        made = {"tool": 69, "thinking": 60, "v33": 5}.get(model, 20)
        made = {"completions": 40, "embeddings": 0}.get(endpoint, made)
        if model in NO_COUNT:  # within what is claimed far from the limit
            assert row.prompt_tokens > 0 < row.completion_tokens, case
            assert 20 < row.total <= 300 + len(answer.request.body), case
        else:
            assert row.completion_tokens == made, case

    in_parallel(len(asked), ask)
    assert len(gate.usage()) == len(asked)
    columns = "endpoint, model, prompt_tokens, cached_tokens"
    cached = gate.rows(f"SELECT DISTINCT {columns} FROM usage WHERE cached_tokens > 0")
    both = {(endpoint, "llama", 10, 1) for endpoint in AGENTS} | {("responses", "cached", 166, 128)}
    assert set(cached) == both | {("messages", "cached", 170, 128)}  # there it is beside a prompt
    relay(gate, user.key, "completions", {"model": "ok", "prompt": "Hello"})
    assert gate.upstream.asked()[-1].json()["max_tokens"] == 16  # vLLM's own default there


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_quota_ends_exactly(gate: Gate, endpoint: str) -> None:
    """The last answer is cut to what is left; no more than the context holds is ever asked for."""
    gate.upstream.scale_out = True
    bound = BOUND_NAMES.get(endpoint, "max_tokens")
    rich, user = register(gate), register(gate, token_limit=105)
    for most in (128_000, 32_000, MAX_MODEL_LEN) if endpoint in AGENTS else ():
        assert relay(gate, rich.key, endpoint, body_of(endpoint, most=most)).status_code == 200
        assert 4096 < gate.upstream.asked()[-1].json()[bound] <= MAX_MODEL_LEN
    left = relay(gate, rich.key, endpoint, body_of(endpoint, "silent", stream=True))
    left.close()
    assert gate.row(left).status == "aborted"  # and the gate knows now what vLLM can count
    for _ in range(3):
        answer = relay(gate, user.key, endpoint, body_of(endpoint, most=20))
        assert answer.status_code == 200 and gate.row(answer).total == 30
    unbound = body_of(endpoint, most=5000, min_tokens=10)
    if endpoint == "responses":
        del unbound[bound]
    cut = relay(gate, user.key, endpoint, unbound)
    assert cut.status_code == 200, cut.text
    assert cut.headers["x-ratelimit-remaining-tokens"] == "0"
    sent = gate.upstream.asked()[-1].json()
    assert sent[bound] == 5 and (endpoint != "chat/completions" or sent["min_tokens"] <= 5)
    assert (gate.row(cut).completion_tokens, gate.tokens_used(user)) == (5, 105)
    if endpoint == "chat/completions":
        assert cut.json()["choices"][0]["finish_reason"] == "length"
    asked = len(gate.upstream.asked())
    for stream in (False, True):
        with relay(gate, user.key, endpoint, unbound | {"stream": stream}) as answer:
            words = refused(endpoint, answer, 429, "insufficient_quota")
        assert words.startswith("Quota used up: 105 of 105 tokens")
        assert answer.headers["x-should-retry"] == "false"
        assert endpoint == "messages" or answer.json()["error"]["type"] == "insufficient_quota"
    assert len(gate.upstream.asked()) == asked


def test_thinking_budget_stays_below_the_bound(gate: Gate, user: User) -> None:
    """Also where the bound is lowered; where less than Anthropic's least is left, it is refused."""
    nearly, poor = register(gate, token_limit=1_100), register(gate, token_limit=500)
    cases = [(user, 32_000, 31_999), (user, 32_000, 2_000), (user, 1_025, 1_024)]
    for who, most, budget in [*cases, (nearly, 32_000, 4_000)]:
        thinking = {"type": "enabled", "budget_tokens": budget}
        body = body_of("messages", most=most, thinking=thinking)
        assert relay(gate, who.key, "messages", body).status_code == 200
        got = gate.upstream.asked()[-1].json()
        assert 1024 <= got["thinking"]["budget_tokens"] < got["max_tokens"] <= MAX_MODEL_LEN
        assert budget > 3_000 or got["thinking"] == thinking
    answer = relay(gate, poor.key, "messages", body)
    refused("messages", answer, 429, "insufficient_quota")
    assert len(gate.upstream.asked()) == 4
    assert chat(gate, poor.key, thinking=thinking, max_tokens=32_000).status_code == 200
    assert gate.upstream.asked()[-1].json()["thinking"] == thinking  # a field like any other there


LEFT_MODELS = ["prefill", "slow", "tool", "thinking", "silent", "hidden", "nostreamopts"]
LEFT = list(itertools.product(LEFT_MODELS, (True, False), (leave_with_fin, leave_with_reset)))


@pytest.mark.parametrize("scale_out", [True, False, None], ids=["scale-out", "off", "older vLLM"])
@pytest.mark.parametrize("endpoint", ["completions", *ENDPOINTS])
def test_request_that_is_left_ends_and_is_charged(
    make_gate: MakeGate, endpoint: str, scale_out: bool | None
) -> None:
    """To the token where vLLM can end it; else a stream to its last count or a marked estimate."""
    prompt = 20 if endpoint == "completions" else 10
    told = ["slow", "silent", "thinking"] if endpoint not in AGENTS else []  # a count in each event
    cases = LEFT
    if not scale_out:  # of a call only some tokens have an event
        cases = [x for x in LEFT if (x[0] != "tool" or not told if x[1] else x[0] == "tool")]
    gate = make_gate(MAX_REQUESTS_PER_USER=str(len(cases)))
    user, upstream = register(gate), gate.upstream
    upstream.scale_out = scale_out

    def ask_and_leave(number: int) -> tuple[str, float, int]:
        model, stream, leave = cases[number]
        body = body_of(endpoint, model, stream=stream, seed=number)
        if endpoint == "chat/completions":
            body["n"] = 3
        connection = connected(gate)
        connection.sendall(raw_chat(user.key, body, endpoint))
        wait_until(lambda: any(x.json()["seed"] == number for x in upstream.asked()))
        asked = next(x for x in upstream.asked() if x.json()["seed"] == number)
        name = asked.headers["X-Request-Id"]
        if model == "prefill" or (model, stream) == ("silent", False):
            wait_until(after_seconds(0.25))
        else:
            made = 25 if model == "tool" else 3
            wait_until(lambda: upstream.tokens()[name] >= prompt + made)
        (reserved,) = [row.reserved for row in gate.usage() if row.request_id == name]
        leave(connection)
        return name, time.monotonic(), reserved

    left = in_parallel(len(cases), ask_and_leave)
    wait_until(lambda: {row.status for row in gate.usage()} == {"aborted"}, 2)
    rows, seen = {row.request_id: row for row in gate.usage()}, exchanges(gate)
    assert len(rows) == len(seen) == len(cases)
    for case, (name, left_at, reserved) in zip(cases, left, strict=True):
        (model, stream, _), row, exchange = case, rows[name], seen[name]
        assert exchange.left == (stream and not scale_out), case
        if stream or scale_out:
            assert exchange.closed_at - left_at < 1, case
        if scale_out or not stream or model in told:
            assert (row.estimated, row.prompt_tokens) == (0, prompt), case  # and vLLM's total
            nothing_made = model == "prefill" or case[:2] == ("silent", False)
            assert (row.completion_tokens == 0) == nothing_made, case
        else:  # above the prompt alone, once vLLM has begun
            event = rb"(?m)^event: (?!message).*delta$" if endpoint in AGENTS else rb'":"\w+ "'
            shown = len(re.findall(event, exchange.answer()))
            assert row.estimated == 1 and shown - 2 <= row.completion_tokens, case
            assert (0 if model == "prefill" else prompt) < row.total <= reserved, case
            assert row.prompt_tokens == 10 or endpoint != "messages" or model == "prefill", case


def test_prompts_without_answers_are_charged(gate: Gate) -> None:
    """vLLM has read all of a list, but tells each prompt with its own answers only."""
    gate.upstream.pace_s = 2.0  # a second until the first one's token
    body: JSONObject = {"model": "ok", "stream": True, "prompt": [[1] * 300, [2] * 400]}
    with relay(gate, register(gate).key, "completions", body) as running:
        next(stream_events(running))
    row = gate.row(running)
    assert (row.status, row.estimated) == ("aborted", 1)
    assert row.prompt_tokens >= 700 and row.completion_tokens == 1


def test_restarted_vllm_is_asked_anew(gate: Gate, user: User) -> None:
    """With --enable-scale-out now: the next row is exact."""
    gate.expected_5xx, upstream = {502}, gate.upstream

    def leave(model: str = "slow") -> UsageRow:
        answer = relay(gate, user.key, "messages", body_of("messages", model, stream=True))
        answer.close()
        return gate.row(answer)

    assert leave().estimated == 1
    upstream.stop()
    assert chat(gate, user.key).status_code == 502
    upstream.scale_out = True
    upstream.start()
    wait_until(lambda: leave("prefill").status == "aborted", 5)
    assert leave().estimated == 0


def test_silent_stream_is_kept_alive(make_gate: MakeGate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its headers come with vLLM's; then a comment after so much silence, never inside an event."""
    monkeypatch.setattr(llmgate, "PING_S", 0.07)
    all_begun = threading.Barrier(1 + len(ENDPOINTS))

    def say(upstream: UpstreamHandler, body: JSONObject) -> None:
        told = PROTOCOLS[upstream.path](body, Behaviour(), "x")
        told.made = 20
        events = b"".join(event for _, event in told.events()) + told.end
        upstream.start_stream()
        upstream.exchange.tokens = 30
        all_begun.wait(10)
        for piece in (events[:300], events[300:340], events[340:]):
            upstream.wait(0.25)
            upstream.chunk(piece)
        upstream.wfile.write(b"0\r\n\r\n")

    gate = make_gate()
    gate.upstream.say, key = say, register(gate).key
    answers = [relay(gate, key, name, body_of(name, stream=True)) for name in ENDPOINTS]
    all_begun.wait(10)  # all headers are here, before any event can be
    for endpoint, answer in zip(ENDPOINTS, answers, strict=True):
        received = list(stream_events(answer))
        said = [event for event in received if not event.startswith(b":")]
        assert b"".join(said) == passed_on(gate, endpoint, answer)
        assert received[0] not in said and 3 <= len(received) - len(said) <= 15


def test_counting_is_free_and_bounded(gate: Gate) -> None:
    """Claude Code asks 24 times for /context: beside 16 relays, and even without a quota."""
    gate.expected_5xx, go_on = {503}, threading.Event()
    user, poor = register(gate), register(gate, token_limit=1)
    body, path = body_of("messages", "llm-user-managed"), "messages/count_tokens"
    silent = body_of("messages", "silent", stream=True)

    def count_late(upstream: UpstreamHandler, body: JSONObject) -> None:
        assert go_on.wait(10)
        upstream.reply_json(200, {"input_tokens": sum(prompt_tokens(body))})

    running = [relay(gate, user.key, "messages", silent) for _ in range(16)]
    with ThreadPoolExecutor(24) as pool:
        gate.upstream.say = count_late
        counts = [pool.submit(relay, gate, user.key, path, body) for _ in range(24)]
        wait_until(lambda: gate.upstream.running() == 16 + 24)
        refused(path, relay(gate, user.key, path, body), 503)  # for they hold 24 of 32 threads
        go_on.set()
    for endpoint in AGENTS:
        answer = relay(gate, user.key, endpoint, body_of(endpoint))
        refused(endpoint, answer, 429, "rate_limit_exceeded")
    answers = [count.result() for count in counts] + [relay(gate, poor.key, path, body)]
    assert {answer.json()["input_tokens"] for answer in answers} == {10}
    for answer in running:
        answer.close()
    assert len(gate.usage()) == 16 and gate.usage(poor) == []
    counted = [x for x in gate.upstream.exchanges if x.path == COUNT_PATH]
    assert {x.json()["model"] for x in counted} == {"ok"}
    assert answers[-1].content == counted[-1].answer()
    gate.upstream.say = None
    for model, status in (("no-such", 404), (5, 400)):
        refused(path, relay(gate, user.key, path, body | {"model": model}), status)
    refused(path, relay(gate, "", path, body), 401)


def test_configurations_of_all_clients_work(make_gate: MakeGate, upstream: Upstream) -> None:
    """Whatever the model is called: they parse, and name the gate and the true context."""
    hostile = "we\"ird]\\/'mistral\x7f{x}\t#é"
    cases = [("llm-user-managed", "llm-user-managed=", ""), ('al"i\\as', 'al"i\\as=', "")]
    cases.append((hostile, "gone=no-such-model", "https://example.org/llm/"))
    upstream.listed = [listing(hostile)]
    for model, aliases, public in cases:
        gate = make_gate(MODEL_ALIASES=aliases, PUBLIC_URL=public)
        user, url = register(gate), public.rstrip("/") or gate.url
        env = call(gate, "GET", "/claude.json", user.key).json()["env"]
        models = [value for name, value in env.items() if name.endswith("_MODEL")]
        assert models == [model] * 4
        assert env["ANTHROPIC_BASE_URL"] == url
        assert env["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == str(MAX_MODEL_LEN)
        assert 0 < int(env["CLAUDE_CODE_MAX_OUTPUT_TOKENS"]) < MAX_MODEL_LEN
        config = tomllib.loads(call(gate, "GET", "/codex.toml", user.key).content.decode())
        assert (config["model"], config["model_context_window"]) == (model, MAX_MODEL_LEN)
        provider = config["model_providers"][config["model_provider"]]
        assert provider["base_url"] == f"{url}/v1"
        assert (provider["wire_api"], provider["env_key"]) == ("responses", "LLMGATE_API_KEY")
        shown = call(gate, "GET", "/.well-known/opencode").json()
        assert shown["auth"]["env"] == "LLMGATE_API_KEY"
        for config in (call(gate, "GET", "/opencode.json", user.key).json(), shown["config"]):
            ((name, provider),) = config["provider"].items()
            assert provider["options"]["baseURL"] == f"{url}/v1"
            assert provider["options"]["apiKey"] == "{env:LLMGATE_API_KEY}"
            assert config["model"] in [f"{name}/{model}" for model in provider["models"]]
            assert provider["models"][model].get("id", model) == hostile  # for its repairs
        assert f"{url}/auth/register" in call(gate, "GET", "/").text
        for endpoint in AGENTS:
            asked = relay(gate, user.key, endpoint, body_of(endpoint, model))
            assert gate.row(asked).model == hostile
        for path in ("/claude.json", "/codex.toml", "/opencode.json"):
            assert_error(call(gate, "GET", path), 401)
        gate.settle()
    upstream.listed = [listing(name) for name in BEHAVIOURS]
    gate = make_gate(OPENCODE_DISCOVERY="off")  # for it shows models' names without a key
    assert_error(call(gate, "GET", "/.well-known/opencode"), 404)
    config = call(gate, "GET", "/opencode.json", user.key).json()
    (models,) = [provider["models"] for provider in config["provider"].values()]
    assert set(models) == {*BEHAVIOURS, "llm-user-managed"}
    for name, model in models.items():
        assert 0 < model["limit"]["output"] <= model["limit"]["context"]
        assert model["limit"]["context"] == BEHAVIOURS.get(name, Behaviour()).max_model_len
        assert model["tool_call"] is True


# ---------------------------------------------------------------------------------------------
# Quota: `tokens_used` never passes `token_limit`, and what is left can be used.


def test_one_request_does_not_claim_the_whole_quota(gate: Gate) -> None:
    """Eight without max_tokens all run; so do OpenCode's two, which ask for 32,000 tokens each."""
    user = register(gate, token_limit=100_000)
    answers = in_parallel(8, lambda _: chat(gate, user.key, "long"))
    assert [answer.status_code for answer in answers] == [200] * 8
    user = register(gate, token_limit=50_000)
    texts = [PROMPT, PROMPT + " word" * 2000]
    ask = functools.partial(chat, gate, user.key, "long", max_tokens=32000)
    answers = in_parallel(2, lambda i: ask(messages=user_says(texts[i])))
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text


BOUNDS: list[tuple[JSONObject, int]] = [  # and what is made where 15 tokens are left for it
    ({"max_tokens": 5, "max_completion_tokens": 8000}, 15),
    ({"max_tokens": 8000, "max_completion_tokens": 5}, 5),
    ({"max_tokens": None, "max_completion_tokens": None}, 15),
    ({"max_completion_tokens": 8000}, 15),
    ({"max_tokens": 10**18}, 15),
    ({"n": 5}, 15),
    ({"n": 5, "max_tokens": 2}, 10),
]


def test_no_field_yields_more_than_is_left(gate: Gate) -> None:
    """Whichever vLLM obeys, also of one that stands twice; `n: 5` costs the prompt once."""
    user = register(gate)
    assert chat(gate, user.key, max_tokens=0).status_code == 400
    gate.settle()
    assert gate.tokens_used(user) == 0
    for (asked, made), stream in itertools.product(BOUNDS, (False, True)):
        gate.rows("UPDATE users SET token_limit = tokens_used + 25")
        with chat(gate, user.key, stream=stream, **asked) as answer:
            assert answer.status_code == 200 and answer.content, asked
            row = gate.row(answer)
        charged = (row.prompt_tokens, row.completion_tokens, row.estimated)
        assert (asked, charged) == (asked, (10, made, 0))
    body = json.dumps(chat_body())[:-1] + ', "max_tokens": 8000, "max_tokens": 5}'
    gate.rows("UPDATE users SET token_limit = tokens_used + 25")
    answer = post_text(gate, "/v1/chat/completions", user.key, body)
    assert answer.status_code == 200, answer.text
    got = gate.upstream.asked()[-1]
    assert got.body.count(b'"max_tokens"') == 1 and got.json()["max_tokens"] == 5


TOLD: list[tuple[int, str, JSONObject, int, int]] = [  # limit, what is asked, told, charged
    (1_000_000, "chat/completions", chat_body(max_tokens=20), 900, 901),
    (600, "chat/completions", chat_body(max_tokens=20), 900, 600),  # marked, for it is no count
    (1_000_000, "chat/completions", chat_body(max_tokens=20), 10**30, 0),  # nor is this one
    (1_000_000, "embeddings", {"model": "ok", "input": ["word" * 230] * 1000}, 230_000, 230_001),
    (300_000, "embeddings", {"model": "ok", "input": [[*range(230)]] * 1000}, 230_000, 230_001),
    (300, "embeddings", {"model": "ok", "input": [*range(230)]}, 230, 231),
    (500_000, "embeddings", {"model": "ok", "input": "word" * 20_000}, 20_000, 20_001),
]


def test_true_count_is_charged_within_the_quota(gate: Gate) -> None:
    """Also above the claim, as with a chat template, or of a batch; an absurd one is no count."""
    counts, costs = iter([told for *_, told, _ in TOLD]), []
    gate.upstream.say = lambda handler, _: handler.say_whole(next(counts), 1)
    for limit, endpoint, body, told, charged in TOLD:
        answer = relay(gate, register(gate, token_limit=limit).key, endpoint, body)
        assert answer.status_code == 200, answer.text
        row, exact = gate.row(answer), told < charged
        assert row.estimated == (not exact), (limit, endpoint)
        assert row.total == charged or told == 10**30 and 0 < row.total <= MAX_MODEL_LEN
        cost = rf"{row.prompt_tokens}\+{row.completion_tokens} tokens"
        costs.append(f"{row.request_id} .* {cost}" + ("," if exact else r" \(estimated\),"))
    wait_until(lambda: all(re.search(cost, gate.log.read_text()) for cost in costs))


def test_prompt_is_counted_exactly_near_the_limit(gate: Gate) -> None:
    """200 tokens left, a prompt of 150 in 600 bytes, or in 3,600 with escapes: it is relayed."""
    for letter, stream in itertools.product(("`", "\\u0060"), (False, True)):
        user = register(gate, token_limit=200)
        body = json.dumps(chat_body(messages=user_says("`" * 600), max_tokens=20, stream=stream))
        body = body.replace("`", letter)
        answer = post_text(gate, "/v1/chat/completions", user.key, body)
        assert answer.status_code == 200, answer.text
        row = gate.row(answer)
        assert (row.prompt_tokens, row.completion_tokens) == (150, 20)
    assert any(x.path == "/tokenize" for x in gate.upstream.exchanges)
    user = register(gate, token_limit=200)
    refused = chat(gate, user.key, messages=user_says("." * 1200))
    assert_error(refused, 429, "insufficient_quota")
    assert len(gate.upstream.asked()) == 4


def test_used_up_is_said_only_when_it_is(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands count at once, also a reset of more than a running stream has made at last."""
    monkeypatch.setattr(gate.upstream, "scale_out", True)
    user = register(gate, token_limit=30)
    spend_all(gate, user)
    run_command(gate, "set-limit", user.name, "60")
    assert chat(gate, user.key, max_tokens=10).status_code == 200
    gate.settle()
    refused = assert_error(chat(gate, user.key, messages=user_says("word" * 2000)), 429)
    assert "used up" not in refused["message"].lower()
    assert {"50", "10", "2001"} <= set(re.findall(r"\d+", refused["message"].replace(",", "")))
    run_command(gate, "reset-usage", user.name)
    assert gate.tokens_used(user) == 0
    assert chat(gate, user.key, max_tokens=50).json()["usage"]["completion_tokens"] == 20
    user = register(gate)
    body = body_of("responses", "silent", stream=True, input="word " * 400)
    with relay(gate, user.key, "responses", body) as running:
        wait_until(lambda: gate.tokens_used(user) > 503, 6)  # booked so far: an estimate
        run_command(gate, "reset-usage", user.name)
        assert gate.tokens_used(user) == 0
    assert gate.row(running).status == "aborted" and 0 <= gate.tokens_used(user) <= 503


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
    said = user_says([{"type": shape} | parts[shape]])
    if shape.startswith("input"):
        return "responses", {"model": "ok", "max_output_tokens": 16, "input": said}
    endpoint = "chat/completions" if shape == "image_url" else "messages"
    return endpoint, {"model": "ok", "max_tokens": 16, "messages": said}


def test_picture_is_not_counted_by_its_bytes(gate: Gate) -> None:
    """Relayed near the limit; left in the prefill it costs what most models make of one."""

    def ask(number: int) -> None:
        user, size = users[number], 10_240 if number % 2 else len(PICTURE)
        endpoint, body = with_picture(PICTURE_SHAPES[number // 2], size)
        answer = relay(gate, user.key, endpoint, body)
        assert answer.status_code == 200, answer.text
        assert gate.row(answer).total == 256 + 16
        with relay(gate, user.key, endpoint, body | {"model": "prefill", "stream": True}) as answer:
            assert answer.status_code == 200
        row = gate.row(answer)
        assert (row.status, row.estimated) == ("aborted", 1)
        assert row.total in range(1001, 1500)

    limits = [1_000_000, 30_000] * len(PICTURE_SHAPES)
    users = [register(gate, token_limit=limit) for limit in limits]
    in_parallel(len(users), ask)


SAID = "word" * 2000
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"data": SAID}}}
RESULT = {"type": "tool_result", "content": [{"type": "image", "source": {"data": SAID}}]}
NO_PICTURES: list[JSONObject] = [  # beside a picture
    {"tools": [TOOL]},
    {"mm_processor_kwargs": {"min_pixels": 10**8}},
    *user_says(SAID + "x", image_url=0, output={"image_url": "A" * 9000}),
    *user_says([{"type": "tool_use", "input": {"url": SAID}, "image_url": 0}]),
    {"role": "assistant", "content": [RESULT]},
    *user_says([{"type": "video_url", "video_url": {"url": SAID}, "image_url": None}]),
]
RENDERED = ("documents", "reasoning_effort", "response_format", "tool_choice", "what_comes_next")
NAMESPACE: JSONObject = {"type": "namespace", "name": "n" * 200}  # stands before each tool's name
NAMESPACE["tools"] = [{"type": "function", "name": "f"}] * 20
LARGE: list[tuple[str, JSONObject]] = [
    ("completions", {"prompt": "x" * 40000, "messages": [{"role": "user"}]}),
    ("embeddings", {"input": "x" * 40000, "prompt": [1]}),
    ("completions", {"prompt": [[1] * 4000]}),
    ("completions", {"prompt": ["x" * 5000, "y" * 9000]}),
    ("completions", {"prompt": "", "prompt_embeds": [PICTURE[:9000]] * 9}),
    ("completions", {"prompt_embeds": ["QUJD"], "max_tokens": 1}),  # of any length
    ("chat/completions", {"messages": user_says([{"type": "prompt_embeds", "data": "QUJD"}])}),
    ("completions", {"prompt": "a", "suffix": "x" * 40000}),
    ("completions", {"prompt": ["a"] * 100, "suffix": "x" * 100, "max_tokens": 1}),
    ("embeddings", {"messages": [user_says([{"type": "image_url", "image_url": {"url": "/a"}}])]}),
    ("completions", {"prompt": [[1]] * 120, "n": 16, "max_tokens": 0, "echo": True}),  # one each
    ("responses", {"input": "7" * 3000, "max_output_tokens": 1}),  # which this vLLM cannot count
    ("responses", {"input": "hi", "max_output_tokens": 1, "tools": [NAMESPACE]}),
    ("chat/completions", {"": [1], "messages": user_says("word " * 20_000)}),
    *[("chat/completions", {name: {"type": "text", "text": "word" * 20_000}}) for name in RENDERED],
]


def test_nothing_that_vllm_reads_escapes_the_count(make_gate: MakeGate, upstream: Upstream) -> None:
    """What a template may render counts by its bytes; so does what no model sees as a picture."""
    endpoint, pictured = with_picture("image_url", 1000)
    url = "data:image/png;base64," + PICTURE[:200_000]
    near = [chat_body(messages=user_says(url))]
    for other in NO_PICTURES:
        said = {"messages": [*pictured["messages"], other]} if "role" in other else other
        near.append(pictured | said)
    upstream.say = lambda handler, _: handler.say_whole()
    upstream.listed = [{"id": "ok", "max_model_len": 131072}]
    gate = make_gate()
    user, rich = register(gate, token_limit=2000), register(gate, token_limit=20_000)
    cases = [(rich, endpoint, body) for body in near]
    for name, large in LARGE:
        small = chat_body(max_tokens=1) if name == endpoint else {"model": "ok"}
        cases.append((user, name, small | large))
    for who, name, body in cases:
        refused = relay(gate, who.key, name, body)
        assert_error(refused, 429, "insufficient_quota")
    assert gate.upstream.asked() == []
    assert relay(gate, rich.key, endpoint, pictured).status_code == 200
    assert chat(gate, user.key, reasoning_effort="low", max_tokens=5).status_code == 200
    template = "{% for i in range(9999) %}x{% endfor %}"  # of few bytes: vLLM counts it
    assert chat(gate, register(gate).key, chat_template=template).status_code == 200
    got = [x.path for x in gate.upstream.exchanges if template.encode() in x.body]
    assert got == ["/tokenize", "/v1/chat/completions"]


MANY: list[tuple[str, JSONObject, int]] = [  # endpoint, what asks for many answers, how many
    ("chat/completions", {"n": 16, "messages": user_says("hi"), "user": "x" * 8110}, 16),
    ("completions", {"prompt": ["word" * 200] * 50}, 50),
    ("completions", {"prompt": [[1] * 200] * 50}, 50),
    ("completions", {"prompt": "hi", "prompt_embeds": ["AAAA"] * 20}, 21),
    ("completions", {"prompt": [[1], [1] * 8000]}, 2),
]


def test_gate_asks_for_what_the_context_and_the_quota_hold(
    make_gate: MakeGate, upstream: Upstream
) -> None:
    """Never for more, which some servers refuse, nor less; of many answers each has the context."""
    asked: list[int] = []
    odd: list[Any] = [None, "ok", {"object": "model"}, {"id": 7}]  # without a name: passed over

    def say(upstream: UpstreamHandler, body: JSONObject) -> None:
        asked.append(body.get("max_tokens") or MAX_MODEL_LEN)
        many = body["model"] == "ok"
        upstream.say_whole(10 if many else 9007, 1 if many else min(asked[-1], 180_000))

    told, untold = {"id": "told", "max_model_len": 32768}, {"id": "untold"}
    listed = [told, told | {"id": "lora"}, untold, {"id": "odd"}]
    listed.append({"id": "ok", "max_model_len": MAX_MODEL_LEN})
    odd += [told, {"id": "lora", "parent": "told", "max_model_len": None}, untold]  # its parent's
    odd += [{"id": "odd", "max_model_len": "8", "parent": [1]}, listed[-1]]  # no number: not told
    upstream.say = say
    upstream.listed = odd
    gate = make_gate()
    poor, rich = register(gate, token_limit=400_000), register(gate)
    seen = call(gate, "GET", "/v1/models", rich.key).json()["data"]
    assert seen == [*listed, {"id": "llm-user-managed", "max_model_len": 32768}]
    limits = (50_000, 100_000, 115_000, 131_000, 1_000_000)
    for limit, model in itertools.product(limits, ("told", "lora")):
        key, said = register(gate, token_limit=limit).key, user_says("word" * 9007)
        assert chat(gate, key, model, messages=said).status_code == 200
    assert max(asked) <= 32768 - 9007
    assert chat(gate, poor.key, "untold", max_tokens=550_000).status_code == 200
    assert 9007 < asked[-1] < 400_000
    for model in ("untold", "odd"):
        assert chat(gate, rich.key, model, max_tokens=200_000).status_code == 200
        assert asked[-1] == 200_000
    gate.settle()
    assert gate.tokens_used(rich) == 2 * 189_007  # all, though the prompt looked short
    for (endpoint, body, answers), limit in itertools.product(MANY, (12_000, 1_000_000)):
        user, case = register(gate, token_limit=limit), (endpoint, answers, limit)
        answer = relay(gate, user.key, endpoint, body_of(endpoint, most=8000) | body)
        if "prompt_embeds" in body and limit == 12_000:  # each may fill the context
            assert_error(answer, 429, "insufficient_quota")
            continue
        assert answer.status_code == 200, answer.text
        assert answers < answers * asked[-1] <= limit, case
        longest = max(map(len, body.get("prompt", [""])))
        assert limit < 10**6 or 500 < asked[-1] or longest == 8000, case
        assert limit > 12_000 or asked[-1] + longest <= MAX_MODEL_LEN, case
    no_prompts = {"prompt": [True, None]}  # which vLLM refuses
    key, body = register(gate, token_limit=12_000).key, body_of("completions", most=8000)
    assert relay(gate, key, "completions", body | no_prompts).status_code == 200
    body |= {"max_tokens": None, "prompt": "a"}  # of which vLLM and OpenAI make 16
    assert relay(gate, key, "completions", body).status_code == 200 and asked[-1] == 16


def test_counting_costs_vllm_little(make_gate: MakeGate, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at once as requests; none for who has nothing left or has gone, nor of thousands."""
    gate = make_gate(MAX_REQUESTS_PER_USER="3")
    upstream = gate.upstream
    monkeypatch.setattr(upstream, "count_s", 0.3)
    user, spent = register(gate, token_limit=100), register(gate, token_limit=30)
    spend_all(gate, spent)

    def counts() -> list[Exchange]:
        return [x for x in upstream.exchanges if x.path == "/tokenize"]

    long = user_says("x" * 1_000_000)
    answers = in_parallel(20, lambda _: chat(gate, user.key, messages=long))
    assert {answer.status_code for answer in answers} == {429}
    first = counts()
    at_once = [sum(x.opened_at <= at.opened_at < x.closed_at for x in first) for at in first]
    assert 2 <= max(at_once) <= 3
    for size in (101, 3000):
        batch = {"model": "ok", "input": ["a"] * size}
        assert_error(relay(gate, user.key, "embeddings", batch), 429, "insufficient_quota")
    for _ in range(3):
        assert_error(chat(gate, spent.key), 429, "insufficient_quota")
    assert (counts(), len(upstream.asked())) == (first, 1)
    with connected(gate) as connection:
        body = {"model": "ok", "input": ["a" * 60] * 90}
        connection.sendall(raw_chat(user.key, body, "embeddings"))
        wait_until(lambda: len(counts()) > len(first))
    wait_until(lambda: not gate.server.app.watcher.running)
    assert len(counts()) < len(first) + 9


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
    return sorted((x.user_id, x.total) for x in gate.usage() if x.endpoint == "reset-usage")


def spend_all(gate: Gate, user: User) -> None:
    """Use a quota of 30 tokens up."""
    wait_until(lambda: chat(gate, user.key, max_tokens=20).status_code == 200, 5)
    gate.settle()
    assert_error(chat(gate, user.key, max_tokens=20), 429, "insufficient_quota")


def test_quota_begins_again_each_day(start_process: StartProcess, tmp_path: Path) -> None:
    """At the first request or soon after midnight, only once, also if the gate was down then."""
    clock = Clock(tmp_path, "2028-02-28 12:00:00")
    gate = start_process(QUOTA_PERIOD="day", **clock.env)
    user, other = register(gate, token_limit=30), register(gate)
    idle = register(gate)  # who uses nothing has nothing to balance
    for night in ("2028-02-28 23:59:50", "2028-02-29 23:59:50"):
        spend_all(gate, user)
        clock.set(night)
        assert_error(chat(gate, user.key, max_tokens=20), 429, "insufficient_quota")
        clock.set(str(datetime.fromisoformat(night) + timedelta(seconds=12)))
    spend_all(gate, user)
    with chat(gate, other.key, "slow", stream=True, max_tokens=60) as running:
        events = stream_events(running)
        wait_until(lambda: next(events) and gate.tokens_used(other) > 0, 5)
        clock.set("2028-03-02 00:00:00")
        assert chat(gate, idle.key, max_tokens=1).status_code == 200  # the first of the new day
        assert len(resets(gate)) == 4
        assert list(events)[-1] == DONE
    assert gate.row(running).total == 70
    *_, (_, day_before) = resets(gate)  # the stream's first part
    assert 0 < gate.tokens_used(other) == 70 + day_before < 70
    spend_all(gate, user)
    gate.stop()
    clock.set("2029-01-01 00:00:00")  # wrong, and set right after
    start_process(QUOTA_PERIOD="day", **clock.env).stop()
    clock.set("2028-04-09 09:00:00")
    gate = start_process(QUOTA_PERIOD="day", **clock.env)
    spend_all(gate, user)
    clock.set("2028-04-10 00:00:00")
    spend_all(gate, user)
    gate.stop()
    gate = start_process(QUOTA_PERIOD="day", **clock.env)
    assert_error(chat(gate, user.key, max_tokens=20), 429, "insufficient_quota")
    assert [tokens for who, tokens in resets(gate) if who == user.id] == [-30] * 5
    assert sum(tokens for who, tokens in resets(gate) if who == other.id) == -70


def test_gates_on_one_database_are_one(
    shared_env: dict[str, str], start_process: StartProcess, tmp_path: Path
) -> None:
    """A gate and one of four processes: one quota, period and five guesses. SIGTERM ends all."""
    clock = Clock(tmp_path, "2027-03-31 23:59:00")
    env = shared_env | clock.env | {"QUOTA_PERIOD": "month", "MAX_REQUESTS_PER_USER": "64"}
    one, two = start_two(start_process, env, tmp_path, processes="14")
    racer, users = register(one, token_limit=1000), [register(one, token_limit=30) for _ in "abc"]
    tries = [try_login((one, two)[i % 2], racer.name, "wrong-password") for i in range(6)]
    assert [answer.status_code for answer in tries] == [401] * 5 + [429]
    for user in users:
        spend_all(one, user)
    clock.set("2027-04-01 00:00:01")
    for user, gate in zip(users, (one, two, two), strict=True):
        spend_all(gate, user)
    ask = functools.partial(chat, key=racer.key, model="slow", max_tokens=40)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(in_parallel, 64, lambda i: ask((one, two)[i % 2]))
        while not asking.done():
            assert one.tokens_used(racer) <= 1000
            time.sleep(0.02)
    answered = [answer for answer in asking.result() if answer.status_code == 200]
    assert len(answered) >= 18
    others = [assert_error(x, 429)["code"] for x in asking.result() if x not in answered]
    assert set(others) <= {"quota_reserved", "insufficient_quota"}
    one.settle()  # and all have looked at the clock
    spent = sum(answer.json()["usage"]["total_tokens"] for answer in answered)
    assert one.tokens_used(racer) == spent <= 1000
    assert resets(one) == [(user.id, -30) for user in users]
    assert {one.tokens_used(user) for user in users} == {30}
    workers = two.workers()
    two.stop()
    assert len(workers) == 4
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


PERIODS = [  # a moment, and when the quota begins again
    ("month", "2027-01-31 23:59:30", "2027-02-01"),
    ("month", "2028-02-29 12:00:00", "2028-03-01"),
    ("month", "2027-12-01 00:00:05", "2028-01-01"),
    ("day", "2028-02-28 23:59:30", "2028-02-29"),
    ("day", "2027-12-31 00:00:00", "2028-01-01"),
    ("week", "2026-11-30 00:00:05", "2026-12-07"),
    ("week", "2027-12-28 12:00:00", "2028-01-03"),
    ("never", "2028-02-28 23:59:30", None),
]


def test_end_of_a_period_is_told(start_process: StartProcess, tmp_path: Path) -> None:
    """In the reports, in the 429's sentence, in OpenAI's header; null if it never does."""
    clock, begins = Clock(tmp_path, "2026-11-27 12:00:30"), "begins again on Tuesday 1 December"
    for period, moments in itertools.groupby(PERIODS, key=lambda moment: moment[0]):
        gate = start_process(QUOTA_PERIOD=period, **clock.env)
        user = register(gate, token_limit=30)
        if period == "month":
            spend_all(gate, user)
            text = {"Accept": "text/plain"}
            drawn = call(gate, "GET", "/users/usage", user.key, headers=text).text
            refused = chat(gate, user.key)
            assert f"{begins}, in 4 days" in drawn and begins in refused.json()["error"]["message"]
            assert re.fullmatch(r"83h59m[23]\ds", refused.headers["x-ratelimit-reset-tokens"])
            clock.set("2026-11-30 20:47:55")
            refused = chat(gate, user.key)
            assert re.fullmatch(r"3h12m\ds", refused.headers["x-ratelimit-reset-tokens"])
        for _, now, then in moments:
            clock.set(now)
            told = call(gate, "GET", "/users/usage", user.key).json()["resets_at"]
            assert (period, now, told) == (period, now, then and unix(f"{then} 00:00:00"))
        gate.stop()


# ---------------------------------------------------------------------------------------------
# Faults: vLLM, the client, the database, the disk or the gate itself fails, and the books stay
# right.


def broken_off(gate: Gate, endpoint: str, answer: Reply) -> JSONObject:
    """Fail unless a stream shows all and then one error of its protocol; return the error."""
    content, passed, row = answer.content, passed_on(gate, endpoint, answer), gate.row(answer)
    assert content.startswith(passed) and content.endswith(b"\n\n")
    assert content.count(b"\n\n") <= passed.count(b"\n\n") + 1
    *before, kind = re.findall(r"^event: (\S+)$", answer.text, re.MULTILINE) or [None]
    assert not {"error", "response.failed", "message_stop", "response.completed"} & {*before}
    last = json.loads(content[:-2].rpartition(b"\ndata: ")[2])
    kinds = {"messages": "error", "responses": "response.failed"}
    assert last.get("type") == kind == kinds.get(endpoint)
    failed, told = last.get("response", last), endpoint == "chat/completions"  # each event counts
    assert endpoint != "responses" or failed["status"] == "failed"
    error = cast(JSONObject, failed["error"])
    assert error["message"] and not LEAKS.search(error["message"])
    assert told == (set(error) == {"message", "type", "param", "code"})
    assert (row.status, row.estimated) == ("error", not told)
    assert row.prompt_tokens >= 10 and 3 <= row.completion_tokens <= (3 if told else 30)
    return error


def test_answer_that_breaks_off_is_told_and_booked(make_gate: MakeGate) -> None:
    """A stream never ends cleanly then, for agents would ask again without end; plain it is 5xx."""
    gate = make_gate(UPSTREAM_TIMEOUT="1")
    gate.expected_5xx, user = {502, 504}, register(gate)

    def ask(number: int) -> None:
        endpoint = ENDPOINTS[number]
        for model, status in (("die", 502), ("dieclean", 502), ("silent", 504)):
            code = "upstream_timeout" if status == 504 else "upstream_error"
            began = time.monotonic()
            answer = relay(gate, user.key, endpoint, body_of(endpoint, model, 30, stream=True))
            assert broken_off(gate, endpoint, answer).get("code", code) == code
            waited = time.monotonic() - began
            answer = relay(gate, user.key, endpoint, body_of(endpoint, model, 30))
            refused(endpoint, answer, status, code)
            assert model != "silent" or 1 <= min(waited, answer.elapsed.total_seconds())
            assert time.monotonic() - began < 8, model
            row, begun = gate.row(answer), model != "silent"  # free, if no byte of it came
            assert (row.status, row.estimated, row.total > 0) == ("error", begun, begun)

    in_parallel(len(ENDPOINTS), ask)
    assert all(x.left for x in gate.upstream.asked() if x.json()["model"] == "silent")
    for endpoint in AGENTS:  # vLLM's own error, which is not doubled; responses have none
        body = body_of(endpoint, "midstream", 30, stream=True)
        broken_off(gate, endpoint, relay(gate, user.key, endpoint, body))
    passed = b"".join(streamed(gate, user.key, "midstream"))  # with a [DONE] after the error
    assert passed == said_by_vllm(gate.upstream.asked()[-1])
    gate.settle()
    kept = [row for row in gate.usage() if (row.endpoint, row.estimated) == ("chat/completions", 0)]
    assert {(row.status, row.total) for row in kept if row.stream} == {("error", 13)}


def test_request_that_vllm_never_answered_is_free(gate: Gate, user: User) -> None:
    """As behind a tunnel whose far end is down; but what comes with the break is shown, and counts.

    An event without an end does not fill the gate's memory.
    """
    counted = TEXT.replace(b"]}", b'],"usage":%s}' % COUNT)
    ends = {"fin": leave_with_fin, "reset": leave_with_reset}

    def say(upstream: UpstreamHandler, body: JSONObject) -> None:
        if body["user"] in ends:
            ends[body["user"]](upstream.connection)
            raise ConnectionAbortedError
        upstream.start_stream()
        upstream.exchange.tokens = 13
        chunk = b"%x\r\n%s\r\n" % (len(counted), counted)
        upstream.wfile.write(chunk * 3 + b"no size\r\n" * (body["user"] == "torn"))  # one packet
        while body["user"] == "endless":
            upstream.chunk(b"x" * 65536)

    gate.upstream.say, gate.expected_5xx = say, {502}
    for end, stream in itertools.product([*ends] * 3, (False, True)):
        with chat(gate, user.key, stream=stream, user=end) as answer:
            assert_error(answer, 502)
    for end in ("torn", "endless"):
        *events, last = streamed(gate, user.key, user=end)
        assert events == [TEXT] * 3
        assert data(last)["error"]["code"] == "upstream_error"
    totals = Counter((row.status, row.total) for row in gate.usage())
    assert totals == {("error", 0): 12, ("error", 13): 2}
    assert len(gate.upstream.asked()[-1].answer()) < 40_000_000


def test_clients_that_leave_at_once_leave_nothing_reserved(make_gate: MakeGate) -> None:
    """200 of them, 0 to 30 ms after asking; whatever had begun is closed as aborted."""
    gate = make_gate(MAX_REQUESTS_PER_USER="200")
    user = register(gate)
    request = raw_chat(user.key, chat_body("slow", stream=True))

    def ask_and_leave(_: int) -> None:
        for leave in (leave_with_fin, leave_with_reset) * 5:
            connection = socket.create_connection(gate.address, timeout=10)
            connection.sendall(request)
            time.sleep(random.uniform(0, 0.03))
            leave(connection)

    in_parallel(20, ask_and_leave)
    gate.settle(10)
    assert {row.status for row in gate.usage(user)} == {"aborted"}
    assert chat(gate, user.key).status_code == 200


def test_caller_who_never_reads_is_given_up(start_process: StartProcess) -> None:
    """Megabytes for sockets that nobody reads: others are served, vLLM and the places are freed."""
    gate = start_process(UPSTREAM_TIMEOUT="1")
    gate.may_log_traceback = True
    user, other = register(gate, token_limit=100_000_000), register(gate)
    body = chat_body("echo", stream=True, n=16, messages=user_says("x" * 30_000))
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(contextlib.closing(socket.socket()))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(gate.address)
            connection.sendall(raw_chat(user.key, body))
        wait_until(lambda: len(gate.usage(user)) == 3)
        assert seconds_until(chat(gate, other.key)) < 2
        wait_until(lambda: {row.status for row in gate.usage(user)} == {"aborted"}, 20)
    wait_until(lambda: not gate.upstream.running() and gate.reserved() == 0)
    counted = gate.upstream.tokens()  # what the gate had not read yet may be missing
    assert all(7500 < row.total <= counted[row.request_id] for row in gate.usage(user))
    assert gate.tokens_used(user) == sum(row.total for row in gate.usage(user))
    gate.stop()  # for its books are not vLLM's


def test_killed_gate_loses_no_row(start_process: StartProcess, tmp_path: Path) -> None:
    """Five kills under load; within a minute, by the gate's own clock, nothing is pending."""
    clock, many = Clock(tmp_path, "2027-01-01 12:00:00"), {"MAX_REQUESTS_PER_USER": "400"}
    gate = start_process(**clock.env, **many)
    user, painter = register(gate), register(gate)
    endpoint, picture = with_picture("image_url", 20_000)
    picture |= {"stream": True, "model": "prefill"}
    whole = set()

    def ask(number: int) -> None:
        fields = {"stream": number % 2 == 0, "max_tokens": number // 2 + 1}
        with contextlib.suppress(requests.RequestException):
            answer = chat(gate, user.key, "slow", **fields)
            assert answer.status_code == 200, answer.text
            if number % 2 or DONE in answer.content:
                whole.add(answer.headers["X-Request-Id"])

    for number in range(1, 6):
        with ThreadPoolExecutor(1) as pool, relay(gate, painter.key, endpoint, picture):
            asking = pool.submit(in_parallel, 40, ask)
            wait_until(lambda gate=gate, count=41 * number: len(gate.usage()) == count, 10)
            wait_until(after_seconds(0.08 * number))
            gate.kill()
            asking.result()
        if number == 5:
            clock.set("2027-01-01 12:01:10")
        began = time.monotonic()
        gate = start_process(**clock.env, **many, PORT=str(gate.address[1]))  # which nothing holds
        assert call(gate, "GET", "/health").status_code == 200
        assert time.monotonic() - began < 5
        assert gate.rows("PRAGMA integrity_check") == [("ok",)]
    names = {row.request_id for row in gate.usage()}
    assert len(names) == 205
    assert len(whole) > 20 and whole <= names
    assert chat(gate, user.key).status_code == 200
    gate.settle(10)
    statuses = Counter(row.status for row in gate.usage(user))
    assert set(statuses) == {"ok", "lost"} and statuses["lost"] > 20
    assert all(row.total > 0 for row in gate.usage())
    assert {row.status for row in gate.usage(painter)} == {"lost"}  # never for the base64
    assert max(row.total for row in gate.usage(painter)) <= MAX_MODEL_LEN


def test_killed_process_is_replaced(start_process: StartProcess, tmp_path: Path) -> None:
    """PROCESSES=2: both write one log, and both end with the first one, though it is killed."""
    child = "import os\nif os.fork() == 0:\n    os.execvp('true', ['true'])\n"
    other = customized(tmp_path / "other", child)  # which a shell may leave: it is not mistaken
    gate = start_process(PROCESSES="2", MAX_REQUESTS_PER_USER="64", **other)
    user = register(gate)
    wait_until(lambda: len(gate.workers()) == 2)
    before = gate.workers()
    cores = [os.sched_getaffinity(pid) for pid in before]
    assert list(map(len, cores)) == [1, 1]  # each on one core, if it can be on one of its own
    assert len(set.union(*cores)) == min(2, len(os.sched_getaffinity(0)))
    answers = in_parallel(40, lambda _: chat(gate, user.key))
    assert {answer.status_code for answer in answers} == {200}
    names = [answer.headers["X-Request-Id"] for answer in answers]
    wait_until(lambda: all(gate.log.read_text().count(name) == 1 for name in names))
    assert not list(gate.directory.glob("server-*.log"))
    os.kill(min(before), signal.SIGKILL)
    wait_until(lambda: len(gate.workers() - before) == 1, 5)
    wait_until(lambda: chat(gate, user.key).status_code == 200, 5)
    after = gate.workers()
    gate.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in after), 10)


@pytest.mark.parametrize(("name", "processes"), [("SIGTERM", 1), ("SIGHUP", 1), ("SIGHUP", 2)])
def test_told_to_end_the_gate_lets_answers_end(
    start_process: StartProcess, tmp_path: Path, name: str, processes: int
) -> None:
    """What comes with the signal is answered or refused, never cut or left pending; status 0."""
    closed = "import os\nreader, writer = os.pipe()\nos.close(reader)\nos.dup2(writer, 2)\n"
    terminal = customized(tmp_path / "gone", closed)  # that takes no more words
    gate = start_process(PROCESSES=str(processes), **terminal)
    gate.expected_5xx = {503}
    user, whole = register(gate), []

    def ask_until_refused(number: int) -> None:
        endpoint = ENDPOINTS[number % len(ENDPOINTS)]
        body = body_of(endpoint, stream=True)
        with contextlib.suppress(requests.ConnectionError):  # nobody listens any more
            while True:
                with relay(gate, user.key, endpoint, body) as answer:
                    if answer.status_code != 200:
                        refused(endpoint, answer, 503, "draining")
                        return
                    last = list(stream_events(answer))[-1]
                    assert re.search(rb"\[DONE\]|message_stop|response.completed", last)
                    whole.append(answer.headers["X-Request-Id"])

    with connected(gate), ThreadPoolExecutor(1) as pool:
        asking = pool.submit(in_parallel, 12, ask_until_refused)
        wait_until(lambda: len(whole) > 20)
        with chat(gate, user.key, "slow", stream=True, max_tokens=12) as running:
            gate.stopped = True
            for pid in [*gate.workers(), gate.process.pid] * 2:  # a closed terminal tells all
                wait_until(after_seconds(0.02))
                with contextlib.suppress(ProcessLookupError):  # a worker ended at the first
                    os.kill(pid, signal.Signals[name])
            assert asking.result() == [None] * 12
            assert gate.upstream.running() == 1
            assert list(stream_events(running))[-1] == DONE
            whole.append(running.headers["X-Request-Id"])
        assert gate.process.wait(10) == 0
    assert {row.request_id: row.status for row in gate.usage()} == dict.fromkeys(whole, "ok")
    assert gate.complaints() == []


def test_second_ctrl_c_ends_the_gate_at_once(start_process: StartProcess, tmp_path: Path) -> None:
    """The first one lets answers end, so does one sent twice; nohup's SIGHUP does not end it."""
    nohup = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    gate = start_process(**customized(tmp_path / "nohup", nohup))
    user = register(gate)
    with chat(gate, user.key, "silent", stream=True) as running:
        events = stream_events(running)
        assert next(events)
        gate.process.send_signal(signal.SIGHUP)
        over = after_seconds(0.3)
        while not over():
            assert chat(gate, user.key).status_code == 200
        gate.process.send_signal(signal.SIGINT)
        later = after_seconds(1.1)
        wait_until(after_seconds(0.1))
        gate.process.send_signal(signal.SIGINT)
        wait_until(later)
        assert not gate.ended()
        gate.stopped = True
        gate.process.send_signal(signal.SIGINT)
        assert gate.process.wait(2) == 1
        with pytest.raises(requests.RequestException):
            list(events)


def test_processes_that_cannot_live(start_process: StartProcess, tmp_path: Path) -> None:
    """They are started again each second, and end with the first one: it heeds a signal."""
    dies = "import os, threading\nend = lambda: threading.Timer(0.6, os._exit, [1]).start()\n"
    dies += "os.register_at_fork(after_in_child=end)\n"
    gate = start_process(PROCESSES="2", **customized(tmp_path / "dies", dies))
    wait_until(lambda: gate.log.read_text().count("starting another"), 5)
    gate.stopped = True
    gate.process.terminate()
    gate.process.wait(3)


def test_drain_ends_what_takes_too_long(gate: ThreadedGate) -> None:
    """A stream gets an error event, a plain request 503, and /health as well; all is booked."""
    gate.expected_5xx, user = {503}, register(gate)
    silent = [body_of(name, "silent", 30, stream=True) for name in ENDPOINTS]
    with ThreadPoolExecutor(1) as pool, connected(gate) as connection:
        running = [relay(gate, user.key, *asked) for asked in zip(ENDPOINTS, silent, strict=True)]
        waiting = pool.submit(chat, gate, user.key, "silent")
        with connected(gate) as leaving:  # whose request is not awaited longer than it may take
            leaving.sendall(raw_chat(user.key, chat_body("silent")))
            wait_until(
                lambda: sorted(x.tokens for x in gate.upstream.asked()) == [0, 0, 13, 13, 13]
            )
        connection.sendall(raw_request("GET", "/health", {}))
        assert read_reply(connection).status_code == 200
        gate.drain(0.3)
        connection.sendall(raw_request("GET", "/health", {}))
        assert_error(read_reply(connection), 503, "draining")
        for endpoint, answer in zip(ENDPOINTS, running, strict=True):
            assert broken_off(gate, endpoint, answer).get("code", "draining") == "draining"
        assert_error(waiting.result(), 503, "draining")
    gate.thread.join(5)
    assert not gate.thread.is_alive()
    assert gate.complaints() == []
    plain = [(row.status, row.estimated) for row in gate.usage(user) if not row.stream]
    assert plain == [("error", 1)] * 2


@contextlib.contextmanager
def database_locked(gate: Gate) -> Iterator[None]:
    """This process holds the write lock of another one's database."""
    path = gate.database_url.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield
        database.execute("ROLLBACK")


def test_locked_database_is_waited_for(start_process: StartProcess) -> None:
    """Three seconds are bridged, and who only reads does not wait; after five it is 503."""
    gate = start_process()
    gate.expected_5xx, gate.may_log_traceback = {503}, True
    user = register(gate)
    running = chat(gate, user.key, "slow", stream=True, max_tokens=5)
    with ThreadPoolExecutor(9) as pool, database_locked(gate):
        began = time.monotonic()
        logins = [pool.submit(try_login, gate, user.name, PASSWORD) for _ in range(4)]
        early = pool.submit(chat, gate, user.key)
        setting = ("set-limit", user.name, "5")
        told = pool.submit(command, gate.directory, gate.env, *setting, status=1)
        assert seconds_until(call(gate, "GET", "/v1/models", user.key)) < 1
        wait_until(after_seconds(2))
        late, over = pool.submit(chat, gate, user.key), after_seconds(3)
        assert_error(early.result(), 503, "database_unavailable")
        assert len(told.result().stderr.strip().splitlines()) == 1
        assert {login.result().status_code for login in logins} == {503}
        assert 4 < time.monotonic() - began < 8
        wait_until(over)
        assert not late.done()
    assert late.result().status_code == 200
    assert spoken(list(stream_events(running))).startswith(" ".join(WORDS[:4]))
    gate.settle(10)  # what ended meanwhile is booked
    assert gate.tokens_used(user) == 15 + 30
    assert len(gate.upstream.asked()) == 2  # vLLM saw nothing of what was refused


@contextlib.contextmanager
def database_altered(gate: Gate, change: str, back: str) -> Iterator[None]:
    """PostgreSQL ends every connection to this database, and new ones are as the change says."""
    name = sqlalchemy.make_url(gate.database_url).database
    server = os.environ["LLMGATE_TEST_POSTGRES_URL"].replace("+psycopg", "")
    end_all = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} {change}".encode())
        try:
            connection.execute(end_all.encode())
            yield
        finally:
            connection.execute(f"ALTER DATABASE {name} {back}".encode())
            connection.execute(end_all.encode())


def test_database_that_is_away_or_takes_no_writes(
    postgres_env: dict[str, str], make_gate: MakeGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers get 503 and vLLM sees nothing new; what ran is booked when the database is back."""
    monkeypatch.setattr(llmgate, "DB_TIMEOUT_S", 1)
    monkeypatch.setattr(llmgate, "UPKEEP_S", 0.5)
    postgres_env["DATABASE_URL"] += "&password=password-marker-77"  # which nobody sees
    gate = make_gate(**postgres_env)
    odd = postgres_env | {"DATABASE_URL": gate.database_url + "&odd=x"}
    assert "odd" in refusal(gate.directory, **odd)
    gate.secrets.add("password-marker-77")
    gate.expected_5xx, gate.may_log_traceback = {503}, True
    user, poor = register(gate), register(gate, token_limit=85)
    token = login(gate, user)
    read_only = "default_transaction_read_only"  # as a standby is: who only reads is served
    with database_altered(gate, f"SET {read_only} = on", f"RESET {read_only}"):
        for answer in (call(gate, "GET", "/health"), chat(gate, user.key)):
            assert_error(answer, 503, "database_unavailable")
        assert call(gate, "GET", "/users/usage", user.key).status_code == 200
        assert "read-only" in refusal(gate.directory, 1, **postgres_env)
    assert chat(gate, user.key).status_code == 200
    with psycopg.connect(gate.database_url.replace("+psycopg", "")) as other:
        other.execute("SELECT * FROM users FOR UPDATE")  # waited for, but not for ever
        assert_error(chat(gate, user.key), 503, "database_unavailable")
    with ThreadPoolExecutor(3) as pool:
        plain = pool.submit(chat, gate, user.key, "slow", max_tokens=10)
        short = pool.submit(streamed, gate, user.key, "slow", max_tokens=20)
        long = pool.submit(streamed, gate, poor.key, "slow", max_tokens=70)
        wait_until(lambda: len(gate.upstream.asked()) == 4)
        expire_leases(gate)
        over, tries = after_seconds(1.2), 0
        with database_altered(gate, "ALLOW_CONNECTIONS false", "ALLOW_CONNECTIONS true"):
            while not over() or tries < 10:
                began, tries = time.monotonic(), tries + 1
                answers = [call(gate, "GET", "/health"), call(gate, "GET", "/users/me", token)]
                answers += [chat(gate, user.key), try_login(gate, user.name, PASSWORD)]
                for answer in answers:
                    assert_error(answer, 503, "database_unavailable")
                assert time.monotonic() - began < 5
            assert plain.done() and short.done() and not long.done()
        assert call(gate, "GET", "/health").status_code == 200
        assert login(gate, user) and chat(gate, user.key).status_code == 200  # no guesses, those
        over = after_seconds(0.7)  # the gate has looked after its rows
        while not over():  # but what still runs keeps its reservation, whatever time has passed
            assert_error(chat(gate, poor.key), 429, "quota_reserved")
        assert plain.result().status_code == 200
        assert short.result()[-1] == long.result()[-1] == DONE
    assert len(gate.upstream.asked()) == 5
    gate.settle(10)
    assert sorted(row.total for row in gate.usage()) == [20, 30, 30, 30, 80]
    assert {row.status for row in gate.usage()} == {"ok"}


def expire_leases(gate: Gate) -> None:
    """Make every lease end now, as if the time had passed."""
    gate.rows("UPDATE usage SET lease_until = lease_until - 60")


def freeze(gate: ProcessGate) -> None:
    """SIGSTOP, but not while it holds the only write lock of SQLite."""
    on_sqlite = gate.database_url.startswith("sqlite")
    with database_locked(gate) if on_sqlite else contextlib.nullcontext():
        gate.process.send_signal(signal.SIGSTOP)


def test_frozen_gate_that_goes_on_books_nothing_twice(
    shared_env: dict[str, str], start_process: StartProcess, tmp_path: Path
) -> None:
    """SIGSTOP under load; another gate closes its rows as lost and gives their room away."""
    one, two = start_two(start_process, shared_env, tmp_path)
    rich, poor = register(one), register(one, token_limit=400)
    ask = functools.partial(chat, one, model="slow", stream=True, max_tokens=30)
    running = [ask(user.key) for user in (rich, rich, poor, poor)]
    streams = [stream_events(answer) for answer in running]
    for events in streams:
        assert all(next(events) for _ in range(4))
    freeze(one)
    expire_leases(two)
    wait_until(lambda: [row.status for row in two.usage()] == ["lost"] * 4, 10)
    assert [found for found in two.complaints() if "still answers" not in found] == []
    answers = iter(lambda: chat(two, poor.key, max_tokens=20), None)
    refused = next(answer for answer in answers if answer.status_code != 200)
    assert_error(refused, 429, "insufficient_quota")
    wait_until(lambda: not two.upstream.running(), 20)
    one.process.send_signal(signal.SIGCONT)
    assert [list(events)[-1] for events in streams] == [DONE] * 4
    two.settle(10)
    assert two.tokens_used(poor) <= 400
    late = [two.row(answer) for answer in running]
    assert [row.total for row in late[:2]] == [40, 40]
    assert all(row.total <= 40 for row in late)


@contextlib.contextmanager
def limited(gate: ProcessGate, what: int, most: int) -> Iterator[None]:
    """A process has less than it needs of a resource, whoever runs it."""
    before = resource.prlimit(gate.process.pid, what)
    resource.prlimit(gate.process.pid, what, (most, before[1]))
    yield
    resource.prlimit(gate.process.pid, what, before)


def test_full_disk_loses_nothing_that_runs(start_process: StartProcess) -> None:
    """What begins is 503, vLLM sees none of it; answers reach their callers, and are booked."""
    gate = start_process(LOG_FILE="/dev/full")
    gate.expected_5xx, gate.may_log_traceback = {503}, True
    user = register(gate)
    hidden = f"/v1/models/{user.key}"  # in the log, and so it is not shown elsewhere instead
    assert call(gate, "GET", hidden, user.key).status_code == 404
    running = chat(gate, user.key, "slow", stream=True, max_tokens=20)
    with ThreadPoolExecutor(1) as pool:
        plain = pool.submit(chat, gate, user.key, "slow", max_tokens=20)
        wait_until(lambda: gate.upstream.running() == 2)
        with limited(gate, resource.RLIMIT_FSIZE, 0):  # each write fails with EFBIG
            for _ in range(3):
                assert_error(chat(gate, user.key), 503, "database_unavailable")
            body = {"username": "late", "password": PASSWORD}
            assert_error(call(gate, "POST", "/auth/register", json=body), 503)
            assert_error(call(gate, "GET", "/health"), 503, "database_unavailable")
            assert list(stream_events(running))[-1] == DONE
            assert plain.result().json()["usage"]["completion_tokens"] == 20
            assert len(gate.upstream.asked()) == 2
    assert call(gate, "GET", "/health").status_code == 200
    assert chat(gate, user.key).status_code == 200
    gate.settle(10)
    assert [row.status for row in gate.usage(user)] == ["ok"] * 3
    assert gate.tokens_used(user) == 30 + 30 + 30
    assert gate.rows("PRAGMA integrity_check") == [("ok",)]


def test_frozen_gate_is_not_taken_for_dead(start_process: StartProcess, tmp_path: Path) -> None:
    """Not by itself, nor by another that sees the clock jump: its stream goes on and ends right."""
    clock = Clock(tmp_path, "2027-01-01 12:00:00")
    env = {"DATABASE_URL": f"sqlite:///{tmp_path / 'both.db'}", "JWT_SECRET_KEY": JWT_SECRET}
    gate, other = start_two(start_process, env | clock.env, tmp_path)
    user = register(gate, token_limit=125)
    with chat(gate, user.key, "slow", stream=True, max_tokens=110) as running:
        events = stream_events(running)
        next(events)
        freeze(gate)
        clock.set("2027-01-01 13:00:00")
        over = after_seconds(2.2)  # a gate looks after its rows every 2 s
        while not over():
            assert_error(chat(other, user.key), 429, "quota_reserved")
        gate.process.send_signal(signal.SIGCONT)
        over = after_seconds(2.2)
        while not over():
            assert next(events) and [row.status for row in gate.usage()] == ["pending"]
            assert_error(chat(gate, user.key), 429, "quota_reserved")
        assert list(events)[-1] == DONE
    row = gate.row(running)
    assert (row.status, row.total, gate.tokens_used(user)) == ("ok", 120, 120)


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_vllm_behind_tls(
    make_gate: MakeGate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who leaves is charged there, too. The log says why vLLM is not reached, a caller does not."""
    with Upstream() as gone:
        reasons = {gone.url: "refused", "http://no-such-host.invalid:8001": "no-such-host.invalid"}
    make_certificate(tmp_path)
    context, lines = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), []
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with Upstream() as secure:
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        secure.url = f"https://localhost:{secure.server_address[1]}"
        reasons[secure.url] = "certificate verify failed"
        for url, reason in reasons.items():
            gate = make_gate(VLLM_ENDPOINT=url)
            gate.expected_5xx, gate.upstream, user = {502}, secure, register(gate)
            assert_error(chat(gate, user.key), 502, "upstream_unavailable")
            lines.append(f"{user.name} .*{reason}")
        wait_until(lambda: all(re.search(line, gate.log.read_text()) for line in lines))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        gate = make_gate(VLLM_ENDPOINT=secure.url)
        gate.upstream, user = secure, register(gate)
        assert chat(gate, user.key).status_code == 200
        assert streamed(gate, user.key)[-1] == DONE
        for _ in range(5):
            with chat(gate, user.key, "paced", stream=True) as running:
                next(running.iter_content(100))
        gate.settle()
        assert Counter(row.status for row in gate.usage(user)) == {"ok": 2, "aborted": 5}


def test_gate_out_of_descriptors(start_process: StartProcess, tmp_path: Path) -> None:
    """`ulimit -n 256` and 400 connections: little CPU and output; the log says what is missing."""
    few = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
    gate = start_process(**customized(tmp_path / "code", few))
    user = register(gate)

    def seconds() -> float:
        times = Path(f"/proc/{gate.process.pid}/stat").read_text().split()
        return (int(times[13]) + int(times[14])) / os.sysconf("SC_CLK_TCK")  # user and system mode

    with contextlib.ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(connected(gate))
        before = seconds()
        wait_until(after_seconds(0.6))
        assert seconds() - before < 0.3
    assert call(gate, "GET", "/v1/models", user.key, timeout=2).status_code == 200
    assert sum(path.stat().st_size for path in (gate.log, gate.output, gate.errors)) < 200_000
    with connected(gate) as connection:
        connection.sendall(raw_request("GET", "/", {}))
        assert read_reply(connection).status_code == 200
        with limited(gate, resource.RLIMIT_NOFILE, 3):
            connection.sendall(raw_chat(user.key, chat_body()))
            assert_error(read_reply(connection), 502, "upstream_unavailable")
    wait_until(lambda: re.search(f"{user.name} .*Too many open files", gate.log.read_text()))
    assert chat(gate, user.key).status_code == 200
    gate.settle()
    gate.check_output(gate.output, gate.errors)
    gate.stopped = gate.may_log_traceback = True
    resource.prlimit(gate.process.pid, resource.RLIMIT_NOFILE, (0, 0))  # now poll() fails: EINVAL
    assert gate.process.wait(10) not in (0, 2)  # and so systemd starts it again
    said = gate.errors.read_text() + gate.log.read_text()
    assert "Traceback" in said and "Invalid argument" in said


def test_fault_in_sql_is_logged(postgres_env: dict[str, str], start_process: StartProcess) -> None:
    """A stack and 500, not "the database does not answer"; no value of a row is written."""
    gate = start_process(**postgres_env)
    gate.expected_5xx, gate.may_log_traceback = {500}, True
    user = register(gate)
    token, body = login(gate, user), {"old_password": PASSWORD, "new_password": PASSWORD + "2"}
    for fault in ("ADD CHECK (jwt_version < 2)", "RENAME COLUMN password_hash TO renamed"):
        gate.rows(f"ALTER TABLE users {fault}")
        answer = call(gate, "POST", "/auth/password", token, json=body)
        assert_error(answer, 500, "internal_error")
    wait_until(lambda: gate.log.read_text().count(", in auth_password\n") == 2)
    gate.secrets |= {"$2b$", "Failing row", "does not answer"}
    assert chat(gate, user.key).status_code == 200


# ---------------------------------------------------------------------------------------------
# Load and hygiene: many at once, hostile clients, and what is left on the disk.


os.umask(0o022)  # the usual one
FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))  # often it begins with 1,024


def seconds_until(answer: Reply) -> float:
    """Return how long an answer took, which must be a 200."""
    assert answer.status_code == 200, answer.text
    return answer.elapsed.total_seconds()


def after_seconds(seconds: float) -> Callable[[], bool]:
    """Return a condition that holds when the time is over."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def test_hundred_streams_run_side_by_side(start_process: StartProcess) -> None:
    """None fails or is mixed up, p99 of the added delay < 100 ms, login and usage < 1 s."""

    def account_s() -> float:
        wait_until(after_seconds(0.3))
        began = time.monotonic()
        assert call(gate, "GET", "/users/usage", login(gate, users[1])).status_code == 200
        return time.monotonic() - began

    def read(number: int) -> list[float]:
        said, delays, event = user_says(f"{PROMPT} marker-{number}"), [], b""
        with chat(gate, users[number % 7].key, "paced", messages=said, stream=True) as answer:
            for event in stream_events(answer):
                now = time.monotonic()
                for echoed, at in re.findall(rb'"content":"marker-(\d+) ([\d.]+)', event):
                    assert int(echoed) == number
                    delays.append(now - float(at))
        assert event == DONE and len(delays) == 50
        return delays

    def share_of_bounds() -> float:
        with ThreadPoolExecutor(1) as pool:
            waits = [pool.submit(account_s) for _ in range(3)]  # one after the other
            delays = list(itertools.chain(*in_parallel(100, read)))
        p99 = statistics.quantiles(delays, n=100)[98]
        return max(p99 / 0.1, *[wait.result() / 1.0 for wait in waits])

    vllm = [sys.executable, __file__, "upstream", "0"]  # which does not share this process's lock
    process = subprocess.Popen(vllm, stdout=subprocess.PIPE, text=True)
    with process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        (url,) = re.findall(r"http://[\d.:]+", process.stdout.readline())
        gate = start_process(VLLM_ENDPOINT=url)
        users = [register(gate) for _ in range(7)]
        assert best_of_six(share_of_bounds, 1) < 1
        wait_until(lambda: gate.reserved() == 0)
        rows = gate.usage()
        gate.stop()
    assert {(row.status, row.estimated, row.total) for row in rows} == {("ok", 0, 60)}
    assert len(rows) % 100 == 0


def test_user_and_gate_have_their_bounds(make_gate: MakeGate) -> None:
    """The 17th request of one user at a time is a 429, also on another gate; others are served."""
    gate = make_gate(THREADS="64")  # of which 32 are kept free of relays
    gate.expected_5xx = {503}
    user, other, third = register(gate), register(gate), register(gate)
    keys = [user.key] * 17 + [other.key] * 16 + [third.key] * 2
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(chat(gate, key, "silent", stream=True)) for key in keys]
        statuses = [answer.status_code for answer in running]
        assert statuses == [200] * 16 + [429] + [200] * 16 + [503] * 2
        assert_error(running[16], 429, "rate_limit_exceeded")
        assert_error(chat(make_gate(), user.key), 429, "rate_limit_exceeded")
        assert_error(running[34], 503, "overloaded")
        assert seconds_until(call(gate, "GET", "/users/me", login(gate, user))) < 1
        assert seconds_until(call(gate, "GET", "/health")) < 1
    wait_until(lambda: chat(gate, user.key).status_code == 200)


def test_idle_and_slow_connections_do_no_harm(start_process: StartProcess) -> None:
    """1,200 that say nothing and 200 that say a byte at a time; all are freed in the end."""
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
            assert seconds_until(chat(gate, user.key)) < 2
    wait_until(lambda: gate.descriptors() <= before + 2, 5)
    assert chat(gate, user.key).status_code == 200


def test_large_request_is_refused_or_leaves_no_memory(start_process: StartProcess) -> None:
    """31 MB: none without a key, with one it returns; more is refused, and a million values."""
    gate = start_process(REGISTRATION="closed")
    made = run_command(gate, "create-user", "alice", "--token-limit", "50000000", stdin=PASSWORD)
    path, key, json_type = "/v1/chat/completions", made.split()[-1], "application/json"
    gate.secrets.add(key)

    def ask_without_key(size: int) -> None:
        body = b'{"username": "' + b"x" * size + b'"}'
        statuses = {"/auth/token": 413, "/auth/register": 403, "/users/me/keys": 401}
        for path, status in statuses.items():
            request = raw_request("POST", path, {"Content-Type": json_type}, body)
            assert_error(send_raw(gate, request), status)

    assert chat(gate, key).status_code == 200
    ask_without_key(1 << 20)
    before = gate.memory_kb("VmHWM")  # the most that it ever held
    ask_without_key(31 << 20)
    assert gate.memory_kb("VmHWM") - before < 5_000
    headers = {"Authorization": f"Bearer {key}", "Content-Type": json_type}
    declared = raw_request("POST", path, headers | {"Content-Length": str(2 * 10**9)})
    assert_error(send_raw(gate, declared), 413)
    chunk = b"%x\r\n%s\r\n" % (1 << 20, b" " * (1 << 20))
    begun = raw_request("POST", path, headers | {"Transfer-Encoding": "chunked"})
    assert_error(send_raw(gate, begun, *[chunk] * 33, b"0\r\n\r\n"), 413)
    filler = {f"X-Filler-{number}": "x" * 3000 for number in range(100)}
    refused = send_raw(gate, raw_request("GET", "/v1/models", filler))
    assert refused.status_code == 431
    assert f"{refused.headers['X-Request-Id']} 127.0.0.1 431" in gate.log.read_text()
    logged = gate.log.stat().st_size
    assert_error(chat(gate, key, "x" * (1 << 20)), 404, "model_not_found")
    assert gate.log.stat().st_size - logged < 5_000  # or some such requests were all that is there
    values = '{"model": "ok", "messages": [' + "[]," * 600_000 + "[]]}"  # 100 bytes of memory each
    assert_error(post_text(gate, path, key, values), 413)
    assert len(gate.upstream.asked()) == 1
    body = json.dumps(chat_body(messages=user_says("x" * (31 << 20))))
    for _ in range(2):
        answer = post_text(gate, path, key, body)
        assert answer.status_code == 400
        assert "maximum context length" in answer.json()["error"]["message"]  # vLLM's own words
    wait_until(lambda: gate.memory_kb() < before + 20_000, 8)


def test_flood_of_logins_does_not_hold_up_keys(start_process: StartProcess) -> None:
    """300 at once: a key's request is answered in a second, the right login soon after."""
    gate = start_process()
    user, json_type = register(gate), {"Content-Type": "application/json"}
    in_parallel(8, lambda _: login(gate, user))  # which are no guesses
    with contextlib.ExitStack() as stack:
        flood = [stack.enter_context(connected(gate)) for _ in range(300)]
        for number, connection in enumerate(flood):
            body = json.dumps({"username": f"flood-{number}", "password": PASSWORD}).encode()
            connection.sendall(raw_request("POST", "/auth/token", json_type, body))
        for _ in range(5):
            assert seconds_until(call(gate, "GET", "/v1/models", user.key)) < 1
        wait_until(lambda: try_login(gate, user.name, PASSWORD).status_code == 200, 15)
        statuses = Counter(read_reply(connection).status_code for connection in flood)
    assert set(statuses) == {401, 429} and statuses[401] >= 8


ROUTES = [f"POST {path}" for path in READS_JSON] + [
    "GET /", "GET /users/me", "GET /users/usage", "GET /users/me/keys", "POST /users/me/api-key",
    "DELETE /users/me/keys/2", "POST /auth/refresh", "GET /health", "GET /.well-known/opencode",
    "GET /v1/models", "GET /v1/models/org/tiny", "GET /opencode.json", "GET /claude.json",
    "GET /codex.toml",
]  # fmt: skip
USUAL_FIELDS = {
    "model": '"ok"', "messages": json.dumps(user_says(PROMPT)), "prompt": '"Hi"',
    "input": '"Hi"', "username": '"fuzz"', "password": f'"{PASSWORD}"', "name": '"laptop"',
}  # fmt: skip
FIELDS = [
    *USUAL_FIELDS, *BAD_FIELDS, "old_password", "token_limit", "registration_token", "min_tokens",
    "max_output_tokens", "tools", "priority", "response_format", "stop", "seed", "user", "echo",
    "thinking", "store", "system",
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
ODD_METHODS = ["HEAD", "OPTIONS", "PUT", "TRACE", "get", "G%T", "CONNECT"]
ODD_PATHS = [
    "*", "//health", "/%00", "/%0d%0aFORGED", "/%e2%80%a8/%1b[2J", "/health/", "/health;x", "/\xff",
    "http://localhost/health", "http://[/health", "/x" + "y" * 60000, "/v1", "/v1/../health", "/ FORGED",
    "/users/usage?days=" + "9" * 900, "/users/usage?days=%00", "/users/usage?ascii&days=366", "/?%ff=%",
    "/v1/models/%ff%0d%0aFORGED", "/users/me/keys/" + "9" * 5000,
]  # fmt: skip


def strange_request(chance: random.Random, key: str, token: str) -> tuple[str, bytes, bool]:
    """Return a method, a request with one or two oddities, and whether its framing is right."""
    method, path = chance.choice(ROUTES).split()
    headers = {"Host": "localhost", "Content-Type": "application/json"}
    headers["Authorization"] = f"Bearer {token if path.startswith(('/users', '/auth')) else key}"
    fields, body, framed = [*USUAL_FIELDS.items()], "", True
    for _ in range(chance.randint(1, 2)):
        odd = chance.choice(ODDITIES)
        match chance.choice(["method", "path", "header", "field", "field", "field", "body"]):
            case "method":
                method = chance.choice(ODD_METHODS)
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
    """Any method, path, header and body: an answer that README knows, one log line, right books."""
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
            except (http.client.HTTPException, OSError):  # it waits for the rest, or hung up
                assert not framed, request[:3000]
                continue
        statuses[reply.status_code] += 1
        said_by_vllm_itself = {x.answer() for x in gate.upstream.exchanges[-3:]}
        assert reply.status_code // 100 in (2, 4), request[:3000]
        if reply.status_code < 400 or reply.content in said_by_vllm_itself:
            continue
        if method == "HEAD":
            assert reply.headers["Content-Type"] == "application/json", request[:3000]
        else:
            print(request[:3000])  # pytest shows it if this fails
            endpoint = "chat/completions" if b'"param"' in reply.content else "messages"
            refused(endpoint, reply, reply.status_code)
            assert endpoint != "messages" or b" /v1/messages" in request[:20]
    assert call(gate, "GET", "/health").status_code == 200
    assert {200, 201, 400, 401, 404, 405, 409, 415} <= set(statuses), statuses
    assert {f"POST {x.path}" for x in gate.upstream.asked()} <= set(ROUTES)
    lines = gate.log.read_bytes().split(b"\n")
    assert len(lines) > 250 and all(line.decode().isprintable() for line in lines)
    assert not any(line.startswith(b"FORGED") for line in lines)


def test_log_that_cannot_be_rotated_goes_on(make_gate: MakeGate, tmp_path: Path) -> None:
    """As one that may be written, but not renamed: in the file that is there."""
    (tmp_path / "server.log").touch()
    os.truncate(tmp_path / "server.log", 10 << 20)
    (tmp_path / "server.log.4").touch()
    (tmp_path / "server.log.5").mkdir()  # which no file can replace
    gate = make_gate()
    for _ in range(3):
        answer = call(gate, "GET", "/users/me")
        wait_until(lambda name=answer.headers["X-Request-Id"]: name in gate.log.read_text())
    assert gate.log.stat().st_size > 10 << 20


def test_names_cannot_steer_a_terminal(start_process: StartProcess) -> None:
    """ESC and line breaks in a model's or a key's name are escaped in log, report and commands."""
    evil = "evil\x1b[2J\r\nname"
    with Upstream() as upstream:
        upstream.listed = [{"id": evil}]
        upstream.say = lambda handler, _: handler.say_whole()
        gate = start_process(VLLM_ENDPOINT=upstream.url)
        gate.upstream, user = upstream, register(gate)
        refused = call(gate, "POST", "/users/me/keys", login(gate, user), json={"name": evil})
        assert_error(refused, 400, param="name")
        gate.rows("UPDATE api_keys SET name = ?", evil)  # as an older gate let it in
        assert chat(gate, user.key, evil).status_code == 200
        gate.settle()
        asked = dict.fromkeys([f"usage {user.name}", f"keys {user.name}"], 0)
        shown = outputs(gate.directory, gate.env, asked)
        text = {"Accept": "text/plain"}
        shown.append(call(gate, "GET", "/users/usage", user.key, headers=text).text)
        assert all("evil" in said for said in shown)
        gate.stop()
    shown += [path.read_text() for path in (gate.log, gate.output, gate.errors)]
    for line in "\n".join(shown).split("\n"):
        assert line.isprintable() and not line.startswith("name"), line


TABLES = ["users", "api_keys", "usage", "login_attempts", "quota_periods"]


def test_files_are_private_and_hold_no_secret(start_process: StartProcess, tmp_path: Path) -> None:
    """0600 under any umask, at the second start JWT and key still work, never without the secret."""
    gate, secret = start_process(), tmp_path / "llmgate.secret"
    gate.expected_5xx, user = {502}, register(gate)
    token = login(gate, user)
    key = replace_key(gate, token)
    for model in ("ok", "nousage", "badusage", "die", "nope"):
        for stream in (False, True):
            with chat(gate, key, model, stream=stream) as answer:
                assert answer.content
    chat(gate, user.key)
    chat(gate, key, priority=1)
    call(gate, "GET", f"/users/me?token={token}")
    call(gate, "GET", f"/v1/models/none?key={key}", key)
    try_login(gate, PASSWORD + "!", PASSWORD)  # typed into the wrong field
    call(gate, "POST", "/auth/register", json={"username": user.name, "password": PASSWORD})
    gate.settle()
    made = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    files = {"llmgate.db", "llmgate.db-wal", "llmgate.db-shm", "llmgate.secret", "server.log"}
    others = {"stdout": 0o644, "stderr": 0o644}  # such is the umask here
    assert made == dict.fromkeys(files, 0o600) | others
    gate.secrets |= {JWT_SECRET, secret.read_text().strip()}
    stored = "".join(str(gate.rows(f"SELECT * FROM {name}")) for name in TABLES)
    assert f"'$2b${ROUNDS}$" in stored and ROUNDS >= 10  # OWASP's least
    assert [secret for secret in gate.secrets if secret in stored] == []
    gate.stop()
    gate.check_output(gate.output, gate.errors)
    kept = secret.rename(tmp_path / "kept")
    assert "llmgate.secret" in refusal(tmp_path)
    assert not secret.exists()  # or no key could be shown again
    kept.rename(secret).chmod(0o644)
    again = start_process()
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert "llmgate.secret was open to other users" in again.log.read_text()
    again.secrets |= gate.secrets
    assert call(again, "GET", "/users/me", token).json()["api_key"] == key
    assert chat(again, key).status_code == 200


GOOD_MODELS = ["ok", "lumpy", "echo", "paced", "badusage", "org/tiny", "llm-user-managed"]
BAD_MODELS = ["die", "dieclean", "midstream", "nope"]
REFUSALS = ("insufficient_quota", "quota_reserved", "rate_limit_exceeded", "invalid_api_key")


def mixed_load(gate: Gate, users: list[User], until: Callable[[], bool]) -> None:
    """Let twelve threads chat, hang up and take new keys until the condition holds."""
    gate.expected_5xx |= {502}
    tokens = [login(gate, user) for user in users]
    keys = [call(gate, "GET", "/users/me", token).json()["api_key"] for token in tokens]

    def ask(chance: random.Random, key: str, **asked: object) -> None:
        good, stream = chance.random() < 0.83, chance.random() < 0.5
        model = chance.choice(GOOD_MODELS if good else BAD_MODELS)
        with chat(gate, key, model, stream=stream, **asked) as answer:
            if answer.status_code != 200:
                assert answer.json()["error"]["code"] in REFUSALS or not good, answer.text
            elif stream:
                assert list(stream_events(answer))[-1] == DONE or not good

    def leave(chance: random.Random, key: str, **asked: object) -> None:
        model = chance.choice(["ok", "slow", "silent", "paced"])
        body = chat_body(model, **asked | {"stream": True})
        if chance.random() < 0.2:
            body = chat_body("slow", max_tokens=5)
        with connected(gate) as connection:
            connection.sendall(raw_chat(key, body))
            connection.settimeout(chance.uniform(0, 0.3))
            with contextlib.suppress(TimeoutError):
                for _ in range(chance.randrange(6)):
                    connection.recv(400)
            if chance.random() < 0.5:
                leave_with_reset(connection)

    def work(number: int) -> None:
        chance = random.Random(number)
        while not until():
            who = chance.randrange(len(users))
            if chance.random() < 0.03:
                keys[who] = replace_key(gate, tokens[who])  # the old one may be in use
            bound, choices = chance.choice([None, 1, 5, 20, 4000]), chance.choice([1, 1, 1, 1, 3])
            act = chance.choice([ask, ask, ask, leave])
            act(chance, keys[who], max_tokens=bound, n=choices)

    in_parallel(12, work)


def test_mixed_load_leaves_the_books_right(shared_env: dict[str, str], make_gate: MakeGate) -> None:
    """A few hundred requests of all kinds: vLLM's own count, rows, counters and `check` agree."""
    gate = make_gate(**shared_env)
    limits = [600, 3000, 20_000, 1_000_000, 1_000_000]
    users = [register(gate, token_limit=limit) for limit in limits]
    requests_left = itertools.count(150, -1)

    def start_and_end(_: int) -> None:
        llmgate.Gate(gate.server.app.settings).database.close()

    with ThreadPoolExecutor(1) as pool:
        commands = pool.map(start_and_end, range(20))  # which hold nobody up
        mixed_load(gate, users, until=lambda: next(requests_left) <= 0)
        assert list(commands) == [None] * 20
    gate.settle(5)
    assert "not booked yet" not in gate.log.read_text()  # as after a deadlock
    counted = gate.upstream.tokens()
    exact = [row for row in gate.usage() if not row.estimated]
    assert sum(row.total for row in exact) == sum(counted.get(row.request_id, 0) for row in exact)
    assert len(exact) > 50
    for user, limit in zip(users, limits, strict=True):
        assert 0 < gate.tokens_used(user) <= limit
    report = call(gate, "GET", "/users/usage", login(gate, users[0])).json()
    assert report["tokens_used"] == gate.tokens_used(users[0])
    run_command(gate, "check")
    body = {"username": users[0].name.upper(), "password": PASSWORD}
    assert_error(call(gate, "POST", "/auth/register", json=body), 409, "username_taken")


@soak
@pytest.mark.skipif("'soak' not in config.option.markexpr", reason="ten minutes; give -m soak")
def test_ten_minutes_of_mixed_load(start_process: StartProcess) -> None:
    """The same for ten minutes; after each the books are right, and nothing has grown."""
    seconds = float(os.environ.get("LLMGATE_TEST_SOAK_S", "600"))
    gate = start_process()
    users = [register(gate, token_limit=100_000_000) for _ in range(8)]
    gate.upstream.keeps_bytes = False
    sizes = []
    for minute in range(1, 11):
        mixed_load(gate, users, until=after_seconds(seconds / 10))
        gate.settle(10)
        sizes.append((gate.memory_kb(), gate.descriptors(), gate.threads()))
        print("minute {}: {} kB, {} files, {} threads".format(minute, *sizes[-1]))
    kilobytes, descriptors, threads = map(max, zip(*sizes[1:], strict=True))
    assert kilobytes < sizes[0][0] + 30_000
    assert descriptors <= sizes[0][1] + 12  # connections of callers who came at the same time
    assert threads <= sizes[0][2] + 12


# ---------------------------------------------------------------------------------------------
# The operator and the newcomer: settings, the first start, the usage report, the commands, the
# schema.

BAD_SETTINGS = """VLLM_ENDPOINT=not a url,PORT=http,DATABASE_URL=mysql://root@db/x,THREADS=0,
JWT_SECRET_KEY=secret-marker-short,JWT_EXPIRATION_HOURS=0,DEFAULT_TOKEN_LIMIT=-5,PROCESSES=0,
MAX_TOKEN_LIMIT=many,QUOTA_PERIOD=year,REGISTRATION=maybe,MODEL_ALIASES=no-equals-sign,
MAX_REQUESTS_PER_USER=0,UPSTREAM_TIMEOUT=soon,MAX_BODY_MB=-1,OPENCODE_DISCOVERY=perhaps,
VLLM_API_KEY=schlüssel,TRUSTED_PROXY=cafe,ALLOWED_HOSTS=bücher.example,PUBLIC_URL=http://[abc]/x,
PUBLIC_URL=example.org/llm,
VLLM_ENDPOINT=http://a..b:8001,DATABASE_URL=sqlite:////no/such/x.db,DATABASE_URL=sqlite:////tmp,
DATABASE_URL=sqlite:///x.db?mode=ro,
DATABASE_URL=postgresql+psycopg://x@secret-marker:y/z"""


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
    with pytest.raises(llmgate.SettingsError, match="JWT_SECRET_KEY"):  # which all gates must share
        llmgate.Settings.from_env({"DATABASE_URL": "postgresql+psycopg://x@/y"})
    settings, outside = llmgate.Settings.from_env, {"HOST": "0.0.0.0"}
    assert settings({}).registration == "open"
    assert settings(outside).registration == "closed"
    assert settings(outside | {"REGISTRATION": "open"}).registration == "open"
    assert settings({"HOST": "[::1]"}) == settings({"HOST": "::1"})
    assert settings({"DEFAULT_TOKEN_LIMIT": "5"}).max_token_limit == 5  # so it bounds grants, too


def test_every_setting_is_documented() -> None:
    """Each field of Settings stands in .env.example and in the README."""
    example, readme = (HERE / name for name in (".env.example", "README.md"))
    for item in fields(llmgate.Settings):
        name = item.name.upper()
        assert re.search(rf"^#? ?{name}=", example.read_text(), re.MULTILINE), name
        assert re.search(rf"\b{name}\b", readme.read_text()), name


def test_start_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    """A bad value, a port in use, a name in .env that is nearly a setting's, with what was meant."""
    taken = socket.create_server(("127.0.0.1", 0))
    away = {"DATABASE_URL": "postgresql+psycopg://nobody@/x?host=/no-such-directory"}
    away["JWT_SECRET_KEY"] = "x" * 32
    without = customized(tmp_path / "without", "import sys\nsys.modules['psycopg'] = None\n")
    cases = [  # what is said, settings, .env
        ("LOG_FILE", {"LOG_FILE": "/no-such-directory/server.log", "PROCESSES": "3"}, ""),
        ("PORT", {"PORT": str(taken.getsockname()[1])}, ""),
        ("REGISTRATON .*REGISTRATION", {}, "REGISTRATON=closed\n"),
        ("not a database", {"DATABASE_URL": "sqlite:///.env"}, "# A text.\n" * 50),
        (r"pip install 'psycopg\[binary\]'", away | without, ""),
    ]
    if "psycopg" in sys.modules:  # it may come back: exit status 1, for a service manager
        cases.append(("database does not answer", away, ""))

    def start(number: int) -> None:
        words, settings, text = cases[number]
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / ".env").write_text(text)
        said = refusal(directory, 1 if "not answer" in words else 2, **settings)
        assert re.search(words, said), said

    with taken:
        in_parallel(len(cases), start)


BAD_LINES = [  # what is said, and the file
    ("MODELS_ALIASES .* MODEL_ALIASES", "MODELS_ALIASES=my=ok\n"),
    ("Line 2 of .env", "THREADS=99\nREGISTRATION closed\n"),
    ("Line 1 of .env", "export REGISTRATION\n"),
    ("Line 1 of .env", 'REGISTRATION="closed\n'),
]


def test_env_file_is_private_if_it_has_a_secret_and_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning. The environment wins over it; a line that sets nothing is refused."""
    env_file = tmp_path / ".env"
    env_file.write_text(f"THREADS=0\nJWT_SECRET_KEY={JWT_SECRET}\n")
    env_file.chmod(0o644)
    said = command(tmp_path, {"THREADS": "90"}, "create-tables").stderr
    assert ".env was open to other users" in said and JWT_SECRET not in said
    assert stat.S_IMODE(env_file.stat().st_mode) == 0o600
    assert "THREADS" in refusal(tmp_path)
    for words, text in BAD_LINES:
        env_file.write_text(text)
        with pytest.raises(llmgate.SettingsError, match=words):
            llmgate.read_dotenv(env_file)
    env_file.write_text("THREADS=90\nCOMPOSE_PROJECT_NAME=a${b}c\nLLMGATE_API_KEY=x\n")
    env_file.chmod(0o644)  # as it may stay; names like no setting are somebody else's
    found = {"THREADS": "90", "COMPOSE_PROJECT_NAME": "a${b}c", "LLMGATE_API_KEY": "x"}
    assert llmgate.read_dotenv(env_file) == found
    assert stat.S_IMODE(env_file.stat().st_mode) == 0o644 and caplog.text == ""
    env_file.write_text(f"JWT_SECRET_KEY={JWT_SECRET}\n")

    def forbid(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", forbid)
    assert llmgate.read_dotenv(env_file) == {"JWT_SECRET_KEY": JWT_SECRET}
    assert ".env was open to other users" in caplog.text


def test_usage_report_adds_up(gate: Gate) -> None:
    """By model, key and day, with the last rows; of the caller only; drawn for curl."""
    user, other = register(gate, token_limit=10_000), register(gate)
    for model in ("ok", "org/tiny", "ok"):
        assert chat(gate, user.key, model, max_tokens=5).status_code == 200
    assert streamed(gate, user.key, "ok", max_tokens=5)
    gate.settle()
    report = call(gate, "GET", "/users/usage?days=7", user.key).json()
    totals = {"tokens_used": 60, "token_limit": 10_000, "remaining": 9_940, "reserved": 0}
    assert report.items() >= totals.items() and report["requests"] == 4
    by_model = {item["model"]: item for item in report["by_model"]}
    assert by_model["ok"]["requests"] == 3 and by_model["org/tiny"]["completion_tokens"] == 5
    (day,), today = report["by_day"], time.strftime("%Y-%m-%d", time.gmtime())
    sums = {"date": today, "prompt_tokens": 40, "completion_tokens": 20, "requests": 4}
    assert day.items() >= sums.items()
    assert [item["requests"] for item in report["by_key"]] == [4]
    assert [row["status"] for row in report["recent"]] == ["ok"] * 4
    report = call(gate, "GET", "/users/usage", other.key).json()
    assert (report["tokens_used"], report["requests"], report["recent"]) == (0, 0, [])
    for days in ("0", "-1", "many", "1.5", "", "99999999999"):
        assert_error(call(gate, "GET", f"/users/usage?days={days}", user.key), 400, param="days")
    with chat(gate, user.key, "silent", stream=True, max_tokens=100):
        report = call(gate, "GET", "/users/usage", user.key).json()
        drawn = call(gate, "GET", "/users/usage", user.key, headers={"Accept": "text/plain"})
    assert report["reserved"] >= 100
    assert sorted(row["status"] for row in report["recent"]) == ["ok"] * 4 + ["pending"]
    assert drawn.headers["Content-Type"].startswith("text/plain")
    text = drawn.content.decode()
    assert user.name in text and today in text and "█" in text
    assert max(map(len, text.splitlines())) <= 80


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


COMMANDS = "create-tables create-user users usage set-limit reset-usage disable enable check keys"


def outputs(directory: Path, env: Mapping[str, str], asked: dict[str, int]) -> list[str]:
    """Run commands side by side, each of which must exit with its status; return what they say."""

    def run(number: int) -> str:
        arguments, status = list(asked.items())[number]
        ended = command(directory, env, *arguments.split(), stdin=f"{PASSWORD}\n", status=status)
        return (ended.stdout + ended.stderr).strip()

    return in_parallel(len(asked), run)


def test_command_in_an_empty_folder_makes_nothing(tmp_path: Path) -> None:
    """Help explains every command; one for later is status 1, where it would be called a success."""
    asked = {"--help": 0, "create-user --help": 0, "--version": 0, "no-such-command": 2}
    asked |= {"users": 1, "reset-usage --all": 1, "keys bob": 1}
    text, of_one, version, wrong, *refused = outputs(tmp_path, {}, asked)
    for name in ["set-password", *COMMANDS.split()]:
        assert re.search(rf"^\s+{name}\b.*\w", text, re.MULTILINE), name
    assert "--token-limit" in of_one and wrong
    assert re.search(r"llmgate\D+\d+\.\d+", version)
    for said in refused:
        assert len(said.splitlines()) == 1 and "llmgate.db" in said
    assert list(tmp_path.iterdir()) == []
    command(tmp_path, {}, "create-tables")  # which is for an empty folder
    assert query(f"sqlite:///{tmp_path / 'llmgate.db'}", "SELECT count(*) FROM users") == [(0,)]
    assert stat.S_IMODE((tmp_path / "llmgate.db").stat().st_mode) == 0o600


def test_operator_manages_users_while_the_gate_runs(gate: Gate) -> None:
    """What a command does is seen at once."""
    limit = ("--token-limit", "50000")
    made = run_command(gate, "create-user", "olga", *limit, stdin=PASSWORD + "\r\n")
    user = User(1, "olga", PASSWORD, made.split()[-1])
    gate.secrets.add(user.key)
    assert me(gate, user)["token_limit"] == 50_000
    token, body = login(gate, user), {"name": "laptop"}
    key = call(gate, "POST", "/users/me/keys", token, json=body).json()["api_key"]
    assert chat(gate, key, max_tokens=5).status_code == 200
    gate.settle()
    shown = run_command(gate, "keys", "olga")
    (number,) = re.findall(r"^\s*(\d+)\b.*laptop.*\b15\b", shown, re.MULTILINE)
    assert user.key not in shown and key not in shown
    assert "laptop" not in run_command(gate, "keys", "olga", "--revoke", number)
    assert_error(chat(gate, key), 401, "invalid_api_key")
    assert chat(gate, user.key).status_code == 200
    run_command(gate, "set-password", "olga", stdin=PASSWORD + "-2\n")
    assert_error(call(gate, "GET", "/users/me", token), 401)
    assert try_login(gate, "olga", PASSWORD + "-2").status_code == 200


def test_operator_sees_all_users_and_resets_them(gate: Gate) -> None:
    """`usage` draws the heaviest first, `check` recounts; what cannot be done is one line."""
    users = [register(gate, name, token_limit=100) for name in ("ann.x", "bob.x", "cyd.x")]
    for at in (0, 1, 1, 1, 2, 2):
        assert chat(gate, users[at].key, max_tokens=20).status_code == 200
    gate.settle()
    add = "UPDATE users SET tokens_used = tokens_used + ? WHERE username = 'bob.x'"
    gate.rows(add, 7)
    asked = {"users": 0, "usage": 0, "check": 1, "set-limit nobody 5": 1, "reset-usage nobody": 1}
    asked |= {"create-user ANN.X": 1, "keys ann.x --revoke 2": 1, "usage b\udcffb": 1}
    asked |= {"set-limit ann.x 0": 2, "set-limit ann.x 5x": 2}
    listed, drawn, differs, *refused = outputs(gate.directory, gate.env, asked)
    assert re.search(r"bob\.x +97 +100\b", listed)
    found = [line for line in drawn.splitlines() if ".x" in line]
    assert re.findall(r"\w+(?=\.x)", "".join(found)) == ["bob", "cyd", "ann"]
    bars = [line.count("█") for line in found]
    assert bars == sorted(bars, reverse=True) and bars[0] > bars[1] > 0
    assert re.search(r"\b3 +30 +60\b", found[0]) and max(map(len, drawn.splitlines())) <= 80
    assert "bob.x" in differs and "ann.x" not in differs
    assert [len(said.splitlines()) for said in refused[:-2]] == [1] * 5 and all(refused)
    assert me(gate, users[0])["token_limit"] == 100
    gate.rows(add, -7)
    run_command(gate, "reset-usage", "--all")
    assert [gate.tokens_used(user) for user in users] == [0, 0, 0]
    assert [chat(gate, user.key).status_code for user in users] == [200] * 3
    assert len([row for row in gate.usage() if row.endpoint == "chat/completions"]) == 9


def structure(url: str) -> list[str]:
    """Return what a database says of its columns, constraints and indexes, line by line."""
    engine, metadata = sqlalchemy.create_engine(url), sqlalchemy.MetaData()
    with warnings.catch_warnings():  # SQLite's reflection leaves out indexes of expressions
        warnings.filterwarnings("ignore", "Skipped unsupported reflection of expression-based")
        metadata.reflect(engine)
    engine.dispose()
    found = []
    for table in metadata.tables.values():
        text = str(sqlalchemy.schema.CreateTable(table))
        text = re.sub(r"GENERATED BY DEFAULT AS IDENTITY \(.*\)", "NOT NULL", text)
        text = re.sub(r"CONSTRAINT \w+key |::text|(?<=CHECK) .*|, $", "", text, flags=re.MULTILINE)
        indexes = {str(index.name) for index in table.indexes} - {"users_username", "usage_by_day"}
        found += [f"{table.name} {line.strip()}" for line in [*text.splitlines(), *indexes]]
    return sorted(found)


def test_both_databases_have_the_same_tables(postgres_env: dict[str, str], tmp_path: Path) -> None:
    """schema.sql makes them on SQLite and PostgreSQL, and may run at every start."""
    on_sqlite = postgres_env | {"DATABASE_URL": f"sqlite:///{tmp_path / 'a.db'}"}
    envs = (on_sqlite, postgres_env) * 2
    in_parallel(4, lambda number: command(tmp_path, envs[number], "create-tables"))
    one, other = structure(on_sqlite["DATABASE_URL"]), structure(postgres_env["DATABASE_URL"])
    assert one == other and set(TABLES) <= {line.split()[0] for line in one}


OLD_ROWS = """
INSERT INTO users (username, password_hash, token_limit, tokens_used, tokens_reserved, created_at)
 VALUES ('Alice', '$2b$04$NAdhogkqxasNimUsIDXYpOlSsVZwpa9knpv/DXl0n1d9hM.0u6zrm', 1000, 30, 60, 1);
INSERT INTO api_keys (user_id, name, nonce, key_hash, created_at) VALUES
 (1, 'first', '{nonce}', '{first}', 1), (1, 'second', '{nonce}', '{second}', 2);
INSERT INTO usage (request_id, user_id, api_key_id, model, endpoint, status, estimated, reserved,
 prompt_estimate, prompt_tokens, completion_tokens, created_at, lease_until) VALUES
 ('old-1', 1, 1, 'ok', 'chat/completions', 'ok', 1, 0, 10, 10, 20, 1790000000, 1790000020),
 ('old-2', 1, 1, 'ok', 'chat/completions', 'pending', 0, 60, 12, 0, 0, 1790000000, 1790000020);
CREATE INDEX usage_by_user ON usage (user_id, created_at, model, api_key_id, prompt_tokens,
 completion_tokens);
"""
SECRET_PART = "sk-llmgate-kBnKzFezxprwls0Csn9ZdwfoD6jRXVLYCyki12X8ngI"  # of JWT_SECRET and a nonce


def test_database_of_an_older_version_works_on(
    shared_env: dict[str, str], make_gate: MakeGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The account, keys with both kinds of checksum, old rows, and one that was left pending."""
    old_keys, url = [SECRET_PART + "2wk5Co", SECRET_PART + "ae3980"], shared_env["DATABASE_URL"]
    tables = re.compile(r"CREATE TABLE IF NOT EXISTS (?:users|api_keys|usage) .*?\n\);", re.DOTALL)
    script = "\n".join(tables.findall((HERE / "schema.sql").read_text()))
    first, second = (hashlib.sha256(key.encode()).hexdigest() for key in old_keys)
    script += OLD_ROWS.format(nonce="5f" * 32, first=first, second=second)
    if "postgresql" in url:
        identity = "INTEGER PRIMARY KEY GENERATED BY DEFAULT AS IDENTITY"
        script = script.replace("INTEGER PRIMARY KEY NOT NULL", identity)
    for statement in script.split(";\n")[:-1]:
        query(url, statement)
    monkeypatch.setattr(llmgate, "UPKEEP_S", 0.5)
    gate = make_gate(QUOTA_PERIOD="month", **shared_env)
    user = User(1, "alice", PASSWORD, old_keys[0])
    gate.secrets.update(old_keys)
    wait_until(lambda: gate.reserved() == 0, 6)
    for key in old_keys:
        assert chat(gate, key, max_tokens=5).status_code == 200
        assert streamed(gate, key, max_tokens=5)
    assert me(gate, user)["token_limit"] == 1000 and register(gate).id == 2
    shown = call(gate, "GET", "/users/me/keys", login(gate, user)).json()["data"]
    assert [key["api_key"] for key in shown] == old_keys
    gate.settle()
    statuses = Counter(row.status for row in gate.usage(user) if row.endpoint != "reset-usage")
    assert statuses == {"ok": 5, "lost": 1}
    assert call(gate, "GET", "/users/usage?days=366", user.key).json()["requests"] == 6


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


def test_wrong_key_for_vllm_is_called_so(
    make_gate: MakeGate, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first request on, and in the log; the right one works at once."""
    monkeypatch.setattr(upstream, "key", "another")
    gate = make_gate()
    gate.expected_5xx, user = {502}, register(gate)
    answers = [chat(gate, user.key), call(gate, "GET", "/v1/models", user.key)]
    answers.append(relay(gate, user.key, "messages/count_tokens", body_of("messages")))
    for answer in answers:
        assert answer.status_code == 502 and "VLLM_API_KEY" in answer.text
    assert "refuses the gate's key" in gate.log.read_text()
    monkeypatch.setattr(gate.upstream, "key", UPSTREAM_KEY)
    wait_until(lambda: chat(gate, user.key).status_code == 200)


def test_health_tells_what_is_up(make_gate: MakeGate, upstream: Upstream) -> None:
    """How many of the servers answer; that one does not is no fault of the gate, nor awaited."""
    with Upstream() as gone:
        gate = make_gate(VLLM_ENDPOINT=f"{upstream.url},{gone.url}")
    expected = {"status": "ok", "upstreams": {"up": 1, "of": 2}}  # and it is a 200
    wait_until(lambda: call(gate, "GET", "/health").json() == expected, 5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        gate = make_gate(VLLM_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
        for _ in range(3):
            assert seconds_until(call(gate, "GET", "/health")) < 1


# ---------------------------------------------------------------------------------------------
# The edge: the real nginx with README's own configuration, gates behind it, and a vLLM behind TLS.

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")


def readme_block(start: str) -> str:
    """Return the indented block of README.md that starts with these words."""
    blocks = re.findall(r"(?:^    .*\n)+", (HERE / "README.md").read_text(), re.MULTILINE)
    (found,) = [block for block in blocks if block.lstrip().startswith(start)]
    return found


def readme_env() -> dict[str, str]:
    """Return README's settings for a gate behind a proxy, with an open registration."""
    lines = readme_block("TRUSTED_PROXY").split()
    return dict(line.split("=", 1) for line in lines) | {"REGISTRATION": "open"}


def nginx_config(directory: Path, port: int, gates: tuple[Gate, ...]) -> str:
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


def test_forwarded_headers_count_only_from_the_proxy(make_gate: MakeGate) -> None:
    """TRUSTED_PROXY: what it says of host and protocol is believed, nobody else's word is."""
    gate = make_gate()
    for host, status in (("localhost:8000", 200), ("[::1]", 200), ("evil.example", 400)):
        assert call(gate, "GET", "/", headers={"Host": host}).status_code == status
    headers = {"X-Forwarded-Host": "gate.example", "X-Forwarded-Proto": "https"}
    for proxy, url in (("", None), ("127.0.0.1", "https://gate.example/v1")):
        gate = make_gate(ALLOWED_HOSTS="gate.example,127.0.0.1", TRUSTED_PROXY=proxy)
        answer = call(gate, "GET", "/opencode.json", register(gate).key, headers=headers)
        (provider,) = answer.json()["provider"].values()
        assert provider["options"]["baseURL"] == (url or f"{gate.url}/v1")
        bad = {"X-Forwarded-Host": '"x', "X-Forwarded-Proto": "https,http", "X-Forwarded-For": "?"}
        answer = call(gate, "GET", "/users/me", headers=bad)
        assert_error(answer, 401)


@contextlib.contextmanager
def nginx(*gates: Gate) -> Iterator[Gate]:
    """The real nginx in front of gates; it is used like a gate, by https."""
    if not NGINX or not shutil.which("openssl"):
        pytest.skip("nginx or openssl is not installed: nothing to test with")
    directory = gates[0].directory / "nginx"
    directory.mkdir()
    make_certificate(directory)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    edge = Gate(f"https://localhost:{port}", gates[0].env, directory, gates[0].upstream)
    edge.database_url, edge.verify = gates[0].database_url, str(directory / "cert.pem")
    edge.log, errors = directory / "error.log", directory / "stderr"
    (directory / "nginx.conf").write_text(nginx_config(directory, port, gates))
    program = [NGINX, "-p", str(directory), "-c", "nginx.conf"]
    with errors.open("wb") as file, subprocess.Popen(program, stderr=file) as process:
        try:
            wait_until(lambda: process.poll() is not None or (directory / "pid").exists(), 10)
            assert process.poll() is None, errors.read_text()
            yield edge
            edge.settle()
            edge.check_output(errors)
        finally:
            process.terminate()


def secured(edge: Gate) -> socket.socket:
    """Return a raw connection to nginx, inside TLS."""
    context = ssl.create_default_context(cafile=cast(str, edge.verify))
    return context.wrap_socket(connected(edge), server_hostname="localhost")


def test_gate_behind_nginx_is_as_good(start_process: StartProcess) -> None:
    """Events pass at once, who hangs up is `aborted`; of a thousand slow callers it sees none."""
    gate = start_process(**readme_env())
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # the first bytes of a TLS handshake
    with nginx(gate) as edge:
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
        before, request = gate.descriptors(), raw_chat(user.key, chat_body())
        begun = [(connected, hello[:6])]
        begun += [(secured, request[:sent]) for sent in (90, len(request) - 20)]
        with contextlib.ExitStack() as stack:
            for connect, words in begun * 333:
                stack.enter_context(connect(edge)).sendall(words)
            for _ in range(3):
                assert seconds_until(chat(edge, user.key)) < 2
                assert gate.descriptors() <= before + 2
        assert edge.upstream.asked()[-4] is exchange  # and vLLM none


def test_two_gates_behind_nginx_are_one_until_one_is_killed(
    postgres_env: dict[str, str], start_process: StartProcess, tmp_path: Path
) -> None:
    """What one made the other knows; a kill takes its own streams along, but no login, no row."""
    one, two = start_two(start_process, postgres_env | readme_env(), tmp_path)
    with nginx(one, two) as edge, ThreadPoolExecutor(32) as pool:
        edge.expected_5xx = {502}  # nginx's own, for plain requests on the dead gate
        user = register(edge)
        token = login(edge, user)
        key = replace_key(edge, token)
        for _ in range(2):
            assert call(edge, "GET", "/users/me", token).status_code == 200
            assert chat(edge, user.key).status_code == 401
        jwts: list[str] = []

        def read(_: int) -> tuple[str, bool]:
            answer, content = chat(edge, key, "slow", stream=True, max_tokens=50), b""
            with answer, contextlib.suppress(requests.RequestException):
                for piece in answer.iter_content(None):
                    content += piece
            return answer.headers["X-Request-Id"], content.endswith(DONE)

        streams = pool.map(read, range(20))
        wait_until(lambda: sum(bool(x.sent) for x in edge.upstream.asked()) == 20)
        plain = [pool.submit(chat, edge, key, "slow", max_tokens=30) for _ in range(10)]
        wait_until(lambda: len(edge.upstream.asked()) == 30)
        logins = pool.map(lambda _: [jwts.append(login(edge, user)) for _ in range(8)], "ab")
        wait_until(lambda: len(jwts) > 3)
        one.kill()
        broken = {name for name, whole in streams if not whole}
        assert len(broken) == 10
        statuses = Counter(answer.result().status_code for answer in plain)
        assert statuses == {200: 5, 502: 5}
        assert len([*logins]) == 2 and len(jwts) == 16
        assert len(edge.upstream.asked()) == 30  # each ran once
        assert [chat(edge, key).status_code for _ in range(10)] == [200] * 10
        expire_leases(edge)  # 20 s later, so to say
        wait_until(lambda: login(edge, user) and edge.complaints() == [], 10)
        rows = {row.request_id: row.status for row in edge.usage(user)}
        assert broken < {name for name, status in rows.items() if status == "lost"}
        assert Counter(rows.values()) == {"ok": 25, "lost": 15}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["upstream", *port]:
            serve_upstream(int(*port or ["8001"]))
        case _:
            sys.exit(__doc__)
