"""Measures what the gate costs: beside a bare relay, on this machine, without a model.

    python .ci/bench.py                          # three minutes, on Linux; prints a Markdown table
    python .ci/bench.py --rounds 1 --seconds 0.5
    python .ci/bench.py --gate OTHER/llmgate.py  # another build

Callers (this process) -> the server that is measured -> an upstream that writes what vLLM writes.
The servers take turns in each round; the table has the medians of the rounds:

    direct              the upstream alone: what callers and upstream could do
    bare                a relay of Flask, waitress and requests, without users and database
    gate                llmgate.py with its own defaults
    gate, PROCESSES=2   the same with two processes

How to read it: all run on the same cores, so only the ratios say something about the gate. More is
better for requests/s and events/s, less is better in the other rows. "Added" is what direct does
not take. The lag of an event is the time from when the upstream writes it to when the caller reads
it; each stream gets one every 20 ms, and all get it at once, as from vLLM. A burst is a stream that
is written as fast as it is read. A wrong answer or a broken stream ends its measurement: a line
below the table tells of it, and the exit status is 1. Runs differ by 10 % and more, by much more
while other programs run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

MOST_STREAMS = {"bare": 256, "gate": 256}  # 288 threads, of which the gate keeps 32 free
PACE_S = 0.02  # between two events of a paced stream
ENDLESS = 100_000  # tokens: more than a paced stream can reach in a measurement
BURSTS = 8  # streams at a time that are written as fast as they are read
BURST_TOKENS = 2000
RAMP_S = 0.004  # between the starts of two paced streams
REST_S = 0.3  # until a server is at rest, or its load is even

RATES = {count: f"requests/s, {count} at a time" for count in (1, 16, 64)}
ADDED = "ms added to an answer"
ADDED_FIRST = "ms added to the first token"
STREAMS = (100, 150, 200, 256, 400)  # at a time; 256 is vLLM's default max_num_seqs
LAGS = {count: f"p99 lag of an event, ms, {count} streams" for count in STREAMS}
BURST = f"events/s, {BURSTS} bursts at a time"
CPU = "CPU seconds per 1,000 requests"
IDLE = "MB of memory, idle"
USED = "MB of memory, after 64 at a time"
START = "seconds from start to first answer"
ROWS = dict.fromkeys(RATES.values(), 0) | {ADDED: 2, ADDED_FIRST: 2}  # in order, with digits
ROWS |= dict.fromkeys(LAGS.values(), 1) | {BURST: 0, CPU: 2, IDLE: 0, USED: 0, START: 2}
Found = dict[str, float]  # by row

BARE_RELAY = """
import sys, flask, requests, waitress
app = flask.Flask("bare")
session = requests.Session()
session.trust_env = False
session.mount("http://", requests.adapters.HTTPAdapter(1, 288))

@app.post("/v1/chat/completions")
def chat():
    body = flask.request.get_data()
    headers = {"Content-Type": "application/json"}
    url = sys.argv[1] + flask.request.path
    answer = session.post(url, body, headers=headers, stream=True, timeout=(5, 600))
    content_type = answer.headers["Content-Type"]
    streams = content_type.startswith("text/event-stream")
    content = answer.iter_content(None) if streams else answer.content
    response = flask.Response(content, answer.status_code, content_type=content_type)
    response.call_on_close(answer.close)
    return response

waitress.serve(app, host="127.0.0.1", port=int(sys.argv[2]), threads=288, connection_limit=1000)
"""

# ---------------------------------------------------------------------------------------------
# The upstream: the bytes of vLLM 0.32, at as little cost as Python allows. The content of a token
# is the time at which it was written (ns; one monotonic clock serves all processes).

MODELS = b'{"object":"list","data":[{"id":"bench","object":"model","max_model_len":1000000}]}'
ANSWER = (
    b'{"id":"chatcmpl-becf7aad712615b3","object":"chat.completion","created":1795332929,'
    b'"model":"bench","choices":[{"index":0,"message":{"role":"assistant","content":"The quick '
    b'brown fox jumps over the lazy dog.","refusal":null,"annotations":null,"audio":null,'
    b'"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"length",'
    b'"stop_reason":null,"token_ids":null,"routed_experts":null}],"service_tier":null,'
    b'"system_fingerprint":"vllm-0.32.0-b18e3f0e","usage":{"prompt_tokens":20,"total_tokens":32,'
    b'"completion_tokens":12,"prompt_tokens_details":null,"completion_tokens_details":null},'
    b'"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,'
    b'"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}'
)
EVENT = (
    b'data: {"id":"chatcmpl-87a9ed9543adbc6e","object":"chat.completion.chunk",'
    b'"created":1795332948,"model":"bench","choices":[%b]%b}\n\n'
)
OPENING = (
    b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
)
TOKEN = b'{"index":0,"delta":{"content":"%d"},"logprobs":null,"finish_reason":%b,"token_ids":null}'
USAGE = b',"usage":{"prompt_tokens":20,"total_tokens":%d,"completion_tokens":%d}'
STREAM_END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
OK_HEAD = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: "
JSON_HEAD = OK_HEAD + b"application/json\r\ncontent-length: %d\r\n\r\n"
STREAM_HEAD = OK_HEAD + b"text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
PLAIN_ANSWERS = {
    b"/v1/chat/completions": JSON_HEAD % len(ANSWER) + ANSWER,
    b"/v1/models": JSON_HEAD % len(MODELS) + MODELS,
}
CONTENT_LENGTH = re.compile(rb"(?i)\r\ncontent-length: (\d+)")
STREAM_ASKED = re.compile(rb'(?s)(?=.*"max_tokens": ?(\d+)).*"stream": ?true')


class Upstream(asyncio.Protocol):
    """A connection of the upstream."""

    transport: asyncio.Transport
    received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send every event at once, as vLLM does."""
        self.transport = cast(asyncio.Transport, transport)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        """Answer a request once it is whole."""
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        length = CONTENT_LENGTH.search(head)
        if not end or (length and len(body) < int(length[1])):
            return
        self.received = b""
        stream = STREAM_ASKED.search(body)
        if not stream:
            path = head.split(b" ", 2)[1]
            self.transport.write(PLAIN_ANSWERS.get(path, NOT_FOUND))
            return
        self.tokens = int(stream[1])
        self.written = 0  # tokens
        self.continuous_usage = b"continuous_usage_stats" in body
        self.transport.write(STREAM_HEAD + self.event(OPENING))
        if b"paced" in body:
            paced_streams.append(self)
        else:
            self.write_burst()

    def event(self, choice: bytes) -> bytes:
        """Return an event as one HTTP chunk; one without a choice has the usage."""
        usage = b""
        if self.continuous_usage or not choice:
            usage = USAGE % (self.written + 20, self.written)
        data = EVENT % (choice, usage)
        return b"%x\r\n%b\r\n" % (len(data), data)

    def write_tokens(self, count: int) -> bool:
        """Write so many tokens; return whether the stream goes on."""
        if self.transport.is_closing():  # the caller has left
            return False
        events = b""
        for _ in range(count):
            self.written += 1
            reason = b'"length"' if self.written == self.tokens else b"null"
            events += self.event(TOKEN % (time.monotonic_ns(), reason))
        if self.written < self.tokens:
            self.transport.write(events)
            return True
        self.transport.write(events + self.event(b"") + STREAM_END)
        return False

    def write_burst(self) -> None:
        """Write 20 tokens, unless the relay is behind, and go on when the others had a turn."""
        loop = asyncio.get_running_loop()
        if self.transport.get_write_buffer_size() > 65536:
            loop.call_later(0.001, self.write_burst)
        elif self.write_tokens(min(20, self.tokens - self.written)):
            loop.call_soon(self.write_burst)


paced_streams: list[Upstream] = []


async def serve_upstream(listening: socket.socket) -> None:
    """Serve until the process is ended."""
    loop = asyncio.get_running_loop()
    await loop.create_server(Upstream, sock=listening, backlog=1024)
    while True:
        await asyncio.sleep(PACE_S - loop.time() % PACE_S)
        # vLLM makes one token for each of its streams in a step.
        paced_streams[:] = [stream for stream in paced_streams if stream.write_tokens(1)]


def run_upstream(listening: socket.socket) -> None:
    """Be the upstream's process, in a session of its own."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    asyncio.run(serve_upstream(listening))


# ---------------------------------------------------------------------------------------------
# The callers: many connections, read by one loop. Each asks again when it has its answer.

PLAIN_HEAD = re.compile(rb"(?is)HTTP/1.1 200 .*?\r\ncontent-length: (\d+).*?\r\n\r\n")
WRITTEN_AT = re.compile(rb'"content":"(\d+)"')


@dataclass(frozen=True)
class Server:
    """A server that runs; its processes are those of its session."""

    name: str
    port: int
    session: int
    key: str


@dataclass
class Load:
    """What callers saw in a measurement; times in seconds."""

    answers: list[float] = field(default_factory=list)  # from the request to the last byte
    first_tokens: list[float] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)  # of each event


class Caller:
    """A connection that waits for an answer."""

    def __init__(self, server: Server, tokens: int, prompt: str) -> None:
        """Connect and ask for a stream of so many tokens, or for a plain answer (0)."""
        self.connection = socket.create_connection(("127.0.0.1", server.port), timeout=5)
        self.request = chat_request(server.key, tokens, prompt)
        self.tokens = tokens
        self.ask()

    def ask(self) -> None:
        """Send the request."""
        self.unread = b""
        self.events = 0
        self.asked_at = time.monotonic()
        self.connection.sendall(self.request)

    def read(self, load: Load) -> bool:
        """Read what has come; return whether the answer is whole. ValueError if it is wrong."""
        data = self.connection.recv(1 << 18)
        now = time.monotonic()
        if not data or (data.startswith(b"HTTP/") and b" 200 " not in data[:16]):
            raise ValueError(f"{data[:300]!r} after {self.events} events")
        self.unread += data
        if self.tokens:
            whole = self.read_events(now, load)
        else:
            head = PLAIN_HEAD.match(self.unread)
            whole = head is not None and len(self.unread) >= head.end() + int(head[1])
        if whole:
            load.answers.append(now - self.asked_at)
        return whole

    def read_events(self, now: float, load: Load) -> bool:
        """Note the lags of the events that are whole; return whether the stream has ended."""
        events, _, self.unread = self.unread.rpartition(b"\n\n")
        written_at = WRITTEN_AT.findall(events)
        if written_at and not self.events:
            load.first_tokens.append(now - self.asked_at)
        self.events += len(written_at)
        load.lags += [now - int(at) / 1e9 for at in written_at]
        ended = self.unread.endswith(b"\r\n0\r\n\r\n")
        if ended and self.events != self.tokens:
            raise ValueError(f"{self.events} of {self.tokens} events, then {events[-300:]!r}")
        return ended


class Callers:
    """All callers of a measurement. A stream is asked for on a new connection each time."""

    def __init__(self, server: Server, count: int, tokens: int = 0, prompt: str = "Go on.") -> None:
        """Let so many ask, with `tokens` as for a Caller, until the load is even."""
        self.server = server
        self.tokens = tokens
        self.prompt = prompt
        self.connected: dict[int, Caller] = {}  # by file number
        self.poll = select.epoll()
        for _ in range(count):
            self.add()
        self.run(REST_S)

    def add(self) -> None:
        """Let one more ask."""
        caller = Caller(self.server, self.tokens, self.prompt)
        self.connected[caller.connection.fileno()] = caller
        self.poll.register(caller.connection, select.EPOLLIN)

    def run(self, seconds: float) -> Load:
        """Read answers for so long. ValueError or OSError if one of them is wrong."""
        load = Load()
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            for number, _ in self.poll.poll(until - now):
                caller = self.connected[number]
                if not caller.read(load):
                    continue
                if self.tokens:
                    self.connected.pop(number).connection.close()
                    self.add()
                else:
                    caller.ask()
        return load

    def close(self) -> None:
        """Let all connections go."""
        for caller in self.connected.values():
            caller.connection.close()
        self.poll.close()


def chat_request(key: str, tokens: int, prompt: str) -> bytes:
    """Return a request for a stream of so many tokens, or for a plain answer (0)."""
    messages = [{"role": "user", "content": prompt}]
    body = {"model": "bench", "messages": messages, "max_tokens": tokens or 12}
    if tokens:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    content = json.dumps(body)
    return (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n{content}"
    ).encode()


# ---------------------------------------------------------------------------------------------
# The measurements.


def resources(session: int) -> tuple[float, float]:
    """Return CPU seconds and MB of memory of a session (PSS: what is shared counts once)."""
    ticks = 0
    kilobytes = 0
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.getsid(int(path.name)) == session:
                times = (path / "stat").read_text().rpartition(")")[2].split()
                ticks += int(times[11]) + int(times[12])
                pss = re.search(r"\nPss: +(\d+)", (path / "smaps_rollup").read_text())
                kilobytes += int(pss[1]) if pss else 0
    return ticks / os.sysconf("SC_CLK_TCK"), kilobytes / 1024


def measure_answers(server: Server, seconds: float, found: Found) -> None:
    """Measure short streams and plain answers, and the memory before and after them."""
    _, found[IDLE] = resources(server.session)
    with contextlib.closing(Callers(server, 1, tokens=3)) as callers:
        found[ADDED_FIRST] = statistics.median(callers.run(seconds).first_tokens) * 1000
    for count, row in RATES.items():
        with contextlib.closing(Callers(server, count)) as callers:
            before_s, _ = resources(server.session)
            load = callers.run(seconds)
            after_s, found[USED] = resources(server.session)
        found[row] = len(load.answers) / seconds
        if count == 1:
            found[ADDED] = statistics.median(load.answers) * 1000
        if count == 16:
            found[CPU] = (after_s - before_s) / len(load.answers) * 1000


def measure_bursts(server: Server, seconds: float, found: Found) -> None:
    """Measure streams that are written as fast as they are read."""
    with contextlib.closing(Callers(server, BURSTS, BURST_TOKENS)) as callers:
        found[BURST] = len(callers.run(seconds).lags) / seconds


def measure_streams(server: Server, seconds: float, found: Found) -> None:
    """Measure the lag of events while more and more paced streams run."""
    with contextlib.closing(Callers(server, 0, ENDLESS, "paced")) as callers:
        for count, row in LAGS.items():
            if count > MOST_STREAMS.get(server.name, count):
                return
            while len(callers.connected) < count:
                callers.add()
                callers.run(RAMP_S)
            callers.run(REST_S)
            lags = callers.run(seconds).lags
            found[row] = statistics.quantiles(lags, n=100)[98] * 1000


def measure(server: Server, seconds: float, failures: list[str]) -> Found:
    """Return what can be measured of a server; add to `failures` what goes wrong."""
    found: Found = {}
    time.sleep(REST_S)
    for part in (measure_answers, measure_bursts, measure_streams):
        try:
            part(server, seconds, found)
        except (OSError, ValueError) as error:
            failures.append(f"{server.name}, {part.__name__}: {error}")
        time.sleep(REST_S)
    return found


# ---------------------------------------------------------------------------------------------
# The servers, and the table.


@contextlib.contextmanager
def upstream_served() -> Iterator[Server]:
    """Run the upstream in a process of its own; it is gone afterwards."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        process = multiprocessing.Process(target=run_upstream, args=(listening,), daemon=True)
        process.start()
        port = listening.getsockname()[1]
    try:
        yield Server("direct", port, process.pid or 0, "none")
    finally:
        process.terminate()
        process.join()


@contextlib.contextmanager
def relay_served(command: list[str], directory: str, env: dict[str, str]) -> Iterator[int]:
    """Run a relay; yield its session. It is gone afterwards."""
    process = subprocess.Popen(
        command, cwd=directory, env=env, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process.pid
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_answer(server: Server) -> float:
    """Return the seconds until a server gives its first answer; TimeoutError after 20."""
    began = time.monotonic()
    while time.monotonic() < began + 20:
        with contextlib.suppress(OSError, ValueError):
            caller = Caller(server, 0, "Are you there?")
            with caller.connection:
                while not caller.read(Load()):
                    pass
            return time.monotonic() - began
        time.sleep(0.005)
    raise TimeoutError(f"{server.name} does not answer")


def create_user(gate: list[str], directory: str, env: dict[str, str]) -> str:
    """Create the gate's database and a user; return the API key."""
    ended = subprocess.run(
        [*gate, "create-user", "bench"],
        cwd=directory,
        env=env,
        input="correct horse battery staple\n",
        stdout=subprocess.PIPE,
        text=True,
        timeout=20,
        check=True,
    )
    return ended.stdout.strip()


def free_port() -> int:
    """Return a port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def run_rounds(
    gate_path: Path, rounds: int, seconds: float
) -> tuple[dict[str, list[Found]], list[str]]:
    """Measure all servers in turns; return what was found by server, and what went wrong."""
    found: dict[str, list[Found]] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as directory, upstream_served() as upstream:
        url = f"http://127.0.0.1:{upstream.port}"
        port = free_port()
        env = {  # all of it: no setting of the caller's reaches the gate
            "PATH": os.environ["PATH"],
            "VLLM_ENDPOINT": url,
            "PORT": str(port),
            "DEFAULT_TOKEN_LIMIT": str(10**12),
            "MAX_TOKEN_LIMIT": str(10**12),
            "MAX_REQUESTS_PER_USER": "1000",
        }
        gate = [sys.executable, str(gate_path)]
        relays = {
            "bare": ([sys.executable, "-c", BARE_RELAY, url, str(port)], env),
            "gate": (gate, env),
            "gate, PROCESSES=2": (gate, env | {"PROCESSES": "2"}),
        }
        key = create_user(gate, directory, env)
        for number in range(1, rounds + 1):
            print(f"round {number} of {rounds}", file=sys.stderr)
            found.setdefault("direct", []).append(measure(upstream, seconds, failures))
            for name, (command, relay_env) in relays.items():
                with relay_served(command, directory, relay_env) as session:
                    server = Server(name, port, session, key)
                    start_s = wait_for_answer(server)
                    relay = measure(server, seconds, failures)
                found.setdefault(name, []).append(relay | {START: start_s})
    return found, failures


def print_table(found: dict[str, list[Found]]) -> None:
    """Print the medians of the rounds, and the ratios to the bare relay."""
    header = ["", *found, "gate / bare", "PROCESSES=2 / bare"]
    print("|", " | ".join(header), "|")
    print("|---" + "|---:" * (len(header) - 1) + "|")
    for row, digits in ROWS.items():
        medians = []
        for rounds in found.values():
            values = [values[row] for values in rounds if row in values]
            medians.append(statistics.median(values or [math.nan]))
        if row in (ADDED, ADDED_FIRST):
            medians = [value - medians[0] for value in medians]
        cells = [f"{value:,.{digits}f}" for value in medians]
        cells += [f"{value / medians[1]:.2f}" for value in medians[2:]]
        print("|", " | ".join([row, *cells]).replace("nan", "-"), "|")


def print_machine() -> None:
    """Print what the numbers depend on."""
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    words = [f"{os.cpu_count()} cores", processor[1] if processor else platform.machine()]
    words.append(f"Python {platform.python_version()}")
    for package in ("flask", "waitress", "requests"):
        words.append(f"{package} {importlib.metadata.version(package)}")
    print(", ".join(words), end="\n\n")


def main() -> int:
    """Measure and print; return the exit status."""
    gate = Path(__file__).resolve().parent.parent / "llmgate.py"
    parser = argparse.ArgumentParser(description="Measures the gate beside a bare relay.")
    parser.add_argument("--rounds", type=int, default=3, help="the table has their medians")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--gate", type=Path, default=gate, help="another llmgate.py")
    options = parser.parse_args()
    for ending in (signal.SIGINT, signal.SIGTERM):  # what was started is ended first
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    found, failures = run_rounds(options.gate.resolve(), options.rounds, options.seconds)
    print_machine()
    print_table(found)
    for failure in failures:
        print(f"\nFAILED {failure}")
    return min(len(failures), 1)


if __name__ == "__main__":
    sys.exit(main())
