"""llmgate: user accounts, API keys and token quotas in front of a vLLM server.

    python llmgate.py                    serve on http://127.0.0.1:8000
    python llmgate.py create-user NAME   make an account, print its API key
    python llmgate.py --help             all commands; README.md has the settings

client -> waitress thread -> API key -> reserve the worst case -> vLLM
   ^                                                                |
   +---- bytes as they arrive <--- relay <--- meter <---------------+ at the end: book its count

A watcher thread looks after running relays. Each part of the file uses only the parts above it.
"""

# waitress has no types: what comes from it is Any.
# mypy: disable-error-code="import-untyped, misc"
from __future__ import annotations

import fcntl
import gc
import hashlib
import hmac
import http.client
import json
import logging.handlers
import os
import random
import re
import resource
import secrets
import select
import signal
import socket
import ssl
import string
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast
from urllib.parse import quote, urlsplit

import bcrypt
import click
import jwt
import sqlalchemy as sa
import waitress.channel
import waitress.parser
import waitress.server
import waitress.task
import waitress.wasyncore
from dotenv import dotenv_values
from flask import Blueprint, Flask, Response, current_app, g, request
from flask_sqlalchemy import SQLAlchemy
from werkzeug.exceptions import HTTPException, SecurityError

JSONObject = dict[str, Any]
P = ParamSpec("P")
T = TypeVar("T")
Execute = Callable[..., Any]  # (sql with :names, {name: value}) -> the driver's cursor

LEASE_S = 20  # a pending row whose gate has not renewed it for so long is taken for dead
UPKEEP_S = 2  # between two rounds of checkpoints, leases and recovery
LAST_WORDS_S = 0.6  # how long vLLM may take to notice that its caller has gone
DB_TIMEOUT_S = 5  # waiting for a database that others have locked, or that is away
MAX_LOG_PAGES = 4000  # 8 MB: in a longer log SQLite takes long to find a page
CONNECT_TIMEOUT_S = 2
MODELS_TTL_S = 10  # age at which a list of models is fetched anew
MAX_EVENT_BYTES, MAX_ANSWER_BYTES = 4 << 20, 256 << 20
MAX_BIGINT = 2**63 - 1
TEMPLATE_TOKENS = 256  # what a chat template may add beyond the bytes of the JSON around it
UNKNOWN_CONTEXT = 131072  # tokens, for a model whose server does not tell
LOCAL_PORTS = (8001, 11434, 8080, 1234, 30000)  # vLLM, Ollama, llama.cpp, LM Studio, SGLang
SECRET_FILE = "llmgate.secret"

log = logging.getLogger("llmgate")


# ---- 1 Settings -----------------------------------------------------------------------------------
# The environment, read once. What cannot be right stops the start with one line that names the
# variable, and never shows its value: it may be a secret in the wrong place.

PORT = r":([1-5]?\d{1,4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])"
URL = rf"https?://(\[.+\]|[^/?#@\s:]+)({PORT})?(/[^?#\s]*)?"
DATABASE = r"sqlite:///.*[^/].*|postgresql\+psycopg://.+"
COUNT = range(1, MAX_BIGINT + 1)


class SettingsError(Exception):
    """One line for the operator: which variable is wrong, and what it must be."""


def _setting(default: str, rule: str | range = ".*", must_be: str = "printable UTF-8") -> Any:
    """A field: its variable's default, the pattern or range it must be in, and that in words."""
    return field(metadata={"setting": (default, rule, must_be)})


@dataclass(frozen=True)
class Settings:
    """All settings; each field is read from the variable of its name in upper case."""

    vllm_endpoint: tuple[str, ...] = _setting("", URL, "a URL like http://127.0.0.1:8001")
    vllm_api_key: str = _setting("")  # the gate's own key for vLLM
    host: str = _setting("127.0.0.1")
    port: int = _setting("8000", range(65536))  # 0: the kernel chooses
    database_url: str = _setting(
        "sqlite:///llmgate.db", DATABASE, "sqlite:/// or postgresql+psycopg://"
    )
    jwt_secret_key: str = _setting("", "|.{32,}", "32 bytes or more: openssl rand -hex 32")
    jwt_expiration_hours: int = _setting("24", range(1, 87601))
    default_token_limit: int = _setting("1000000", COUNT)
    max_token_limit: int = _setting("100000000", COUNT)
    registration: str = _setting("", "(open|closed|invite)?", "open, closed or invite")
    registration_token: str = _setting("")
    model_aliases: Mapping[str, str] = _setting("llm-user-managed=", "[^=]+=[^=]*", "alias=model")
    log_file: str = _setting("server.log")  # "-": standard error only
    threads: int = _setting("544", range(4, 10001))  # a running relay holds one
    processes: int = _setting("1", range(1, 65))  # each with THREADS, on one port
    max_requests_per_user: int = _setting("16", COUNT)  # relays at a time
    upstream_timeout: int = _setting("600", range(1, 86401))  # seconds without a byte from vLLM
    max_body_mb: int = _setting("32", range(1, 1025))
    trusted_proxy: str = _setting("", "[0-9a-fA-F.:]*", "an address")  # X-Forwarded-* counts
    opencode_discovery: str = _setting("on", "on|off", "on or off")
    allowed_hosts: tuple[str, ...] = _setting("", r"[\w.:\[\]-]+", "a name")  # in Host; (): any

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """Settings from variables; SettingsError names the first one that cannot be right."""
        values: JSONObject = {}
        for item in fields(cls):
            name, (default, rule, must_be) = item.name.upper(), item.metadata["setting"]
            value: Any = env.get(name, "").strip() or default
            if isinstance(rule, range):
                value = int(value) if re.fullmatch("[0-9]{1,19}", value) else -1
                right, must_be = value in rule, f"a whole number from {rule[0]} to {rule[-1]}"
            elif item.type == "str":
                # Bytes of the environment that are not UTF-8 are not printable, either.
                right = value.isprintable() and bool(re.fullmatch(rule, value))
            else:
                value = tuple(part.strip() for part in value.split(",") if part.strip())
                right = all(re.fullmatch(rule, part) for part in value)
                must_be += ", or several with commas between"
            if not right:
                raise SettingsError(f"{name} must be {must_be}")
            values[item.name] = value
        return cls(**values)._completed()

    def _completed(self) -> Settings:
        """The settings with what follows from others; SettingsError where two do not fit."""
        local = re.fullmatch(r"localhost|::1|127\..*", self.host)
        names = ("localhost", "127.0.0.1", "[::1]", self.host) if local else ()
        _, sqlite, path = self.database_url.partition("sqlite:///")
        if self.registration == "invite" and not self.registration_token:
            raise SettingsError("REGISTRATION_TOKEN must be set when REGISTRATION is invite")
        if not sqlite and not self.jwt_secret_key:
            raise SettingsError("JWT_SECRET_KEY must be set beside PostgreSQL, alike for all gates")
        if self.default_token_limit > self.max_token_limit:
            raise SettingsError("DEFAULT_TOKEN_LIMIT must be MAX_TOKEN_LIMIT or less")
        return replace(
            self,
            vllm_endpoint=tuple(re.sub("(/v1)?/*$", "", url) for url in self.vllm_endpoint),
            model_aliases=dict(re.split(r"\s*=\s*", pair) for pair in self.model_aliases),
            # Flask-SQLAlchemy would look for a relative path elsewhere.
            database_url=f"sqlite:///{Path(path).absolute()}" if sqlite else self.database_url,
            registration=self.registration or ("open" if local else "closed"),
            allowed_hosts=self.allowed_hosts or names,
        )


# ---- 2 Errors -------------------------------------------------------------------------------------
# One exception and one shape, OpenAI's: {"error": {"message", "type", "param", "code"}}. No text has
# "token limit exceeded", "too many tokens" or "exceeds the limit of": OpenCode takes these for a
# full context window, and starts to compact.

ERRORS = {  # code: (status, message)
    "bad_request": (400, "This is not a request that the gate can read."),
    "host_not_allowed": (400, "The operator's ALLOWED_HOSTS does not have this Host."),
    "invalid_value": (400, "{param} must be {must_be}."),
    "invalid_json": (400, "The body must be a JSON object, and valid JSON."),
    "unsupported_value": (400, "This gate does not accept {param}."),
    "missing_api_key": (401, "Send the header 'Authorization: Bearer KEY'."),
    "invalid_api_key": (401, "This API key is not valid; GET /users/me shows the right one."),
    "invalid_token": (401, "This JWT is not valid; log in again at /auth/token."),
    "token_expired": (401, "This JWT has expired; log in again at /auth/token."),
    "invalid_credentials": (401, "Wrong username or password."),
    "registration_closed": (403, "Ask the operator for an account, or for a registration_token."),
    "account_disabled": (403, "This account is disabled; ask the operator."),
    "not_found": (404, "There is nothing at this path; the README lists the routes."),
    "model_not_found": (404, "No model {model!r} here; GET /v1/models lists them."),
    "key_not_found": (404, "No such key; GET /users/me/keys lists yours."),
    "method_not_allowed": (405, "This path takes other methods; see the header Allow."),
    "username_taken": (409, "This username is taken; choose another."),
    "request_too_large": (413, "The body is larger than this gate accepts."),
    "unsupported_media_type": (415, "Send the header 'Content-Type: application/json'."),
    "rate_limit_exceeded": (429, "{why}; try again later."),
    "quota_reserved": (429, "Running requests hold the rest of the quota; try again soon."),
    "insufficient_quota": (429, "Quota used up: {used} of {limit} tokens; this needs {needed}."),
    "headers_too_large": (431, "The headers are larger than this gate accepts."),
    "internal_error": (500, "The gate failed; its log says why."),
    "upstream_unavailable": (502, "No vLLM at VLLM_ENDPOINT; start it with: vllm serve MODEL"),
    "upstream_error": (502, "vLLM failed: {why}."),
    "database_unavailable": (503, "The gate's database does not answer; try again."),
    "overloaded": (503, "All places of the gate are taken; try again in a moment."),
    "draining": (503, "The gate is restarting; try again in a moment."),
    "upstream_timeout": (504, "vLLM was silent for too long."),
}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
HEADERS = {  # by status or code; a used-up quota makes OpenCode try five times more: at once
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "2"},
    "insufficient_quota": {"x-should-retry": "false", "retry-after-ms": "1"},
}
# The first code of each status, for what Flask and waitress refuse by themselves.
CODES = {status: code for code, (status, _) in reversed(ERRORS.items())}


class APIError(Exception):
    """An answer that is an error: its code's line of ERRORS, and the values for the message."""

    def __init__(self, code: str, param: str | None = None, **values: object) -> None:
        self.code, self.param = code, param
        self.status, message = ERRORS[code]
        super().__init__(message.format(param=param, **values))
        self.headers = dict(HEADERS.get(code) or HEADERS.get(self.status, {}))
        if "wait_s" in values:
            self.headers["Retry-After"] = str(values["wait_s"])

    def body(self) -> bytes:
        """OpenAI's error object as JSON."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = self.code if self.code in HEADERS else TYPES.get(self.status, default)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def show_error(error: Exception) -> Response:
    """Any exception in the contract's shape; the unforeseen is logged, and a 500."""
    if isinstance(error, APIError):
        shown = error
    elif isinstance(error, HTTPException):
        host = isinstance(error, SecurityError)
        shown = APIError("host_not_allowed" if host else CODES.get(error.code or 0, "bad_request"))
        shown.headers |= {k: v for k, v in error.get_headers() if k == "Allow"}
    else:
        lost = isinstance(error, gate().ledger.errors)
        shown = APIError("database_unavailable" if lost else "internal_error")
        log.error("%s: %s", g.request_id, error, exc_info=None if lost else error)
    return Response(shown.body(), shown.status, shown.headers, content_type="application/json")


# ---- 3 Database -----------------------------------------------------------------------------------
# schema.sql makes the tables. All else is SQL in short transactions on the driver's own cursor: it
# costs a tenth of an ORM session's, and one way to the database is enough.

db = SQLAlchemy()
# Each of the nine pages that a request writes goes to the log whole, so they are half the usual
# size. No checkpoint by itself: the watcher makes them, where no caller waits.
PRAGMAS = """PRAGMA page_size = 2048; PRAGMA synchronous = NORMAL; PRAGMA foreign_keys = ON;
PRAGMA wal_autocheckpoint = 0"""
LOCKED_OR_FULL = ("SQLITE_BUSY", "SQLITE_FULL", "SQLITE_IOERR")


class Turn:
    """One of a few places, held for a `with`; 503 `overloaded` when none is free in time."""

    def __init__(self, places: int, wait_s: int) -> None:
        self._places, self._wait_s = threading.Semaphore(places), wait_s

    def __enter__(self) -> None:
        """Waits for a place."""
        if not self._places.acquire(timeout=self._wait_s):
            raise APIError("overloaded")

    def __exit__(self, *_: object) -> None:
        """Gives it back."""
        self._places.release()


@cache
def positional(sql: str, mark: str) -> tuple[str, list[str]]:
    """SQL with the driver's marks for :names, and the names in their order."""
    # Bound by name, sqlite3 would let go of the interpreter's lock once for each of them.
    sql = sql.replace(" FOR UPDATE", "") if mark == "?" else sql  # SQLite has one writer
    return re.sub(r":\w+", mark, sql), re.findall(r":(\w+)", sql)


class Job:
    """Work for a transaction; once it is `done`, its value or the error that it raised."""

    def __init__(self, work: Callable[[Execute], Any]) -> None:
        self.work, self.done, self.value = work, False, None
        self.error: Exception | None = None
        self.woken = threading.Lock()  # free once it is done, or is to do what others wait for
        self.woken.acquire()

    def do(self, execute: Execute) -> None:
        """Does the work, from its start if there was a try before; a refusal fails nobody else."""
        self.error = None
        try:
            self.value = self.work(execute)
        except APIError as error:
            self.error = error


class Ledger:
    """The database; on SQLite writers take turns, those of other gates too if it is `shared`."""

    def __init__(self, engine: sa.Engine, shared: bool = False) -> None:
        self.engine, self.sqlite = engine, engine.dialect.name == "sqlite"
        self.driver = cast(Any, engine.dialect).dbapi
        self.errors = (self.driver.Error, sa.exc.SQLAlchemyError)
        self._mark = "?" if self.sqlite else "%s"
        self.checkpoints = self.sqlite  # one process of several does it
        self._checked_at = 0  # when the log was last written before a checkpoint (ns)
        self._readers: list[Any] = []  # SQLite's connections that nobody uses now
        self._writers: list[Any] = []  # its one writer: a write by another would empty its cache
        self._jobs: list[Job] = []  # that wait for SQLite's writer: its own waiting is to poll
        self._busy, self._mutex = False, threading.Lock()  # whether it has work, or is to have it
        self._turn = threading.Lock()  # of those who write and who checkpoint
        self._folder = 0  # the database's, open: other processes lock it, too
        if self.sqlite and shared:
            self._folder = os.open(Path(engine.url.database or "").parent, os.O_RDONLY)
        if self.sqlite:
            sa.event.listen(engine, "connect", lambda made, _: made.executescript(PRAGMAS))

    def create_tables(self) -> None:
        """Runs schema.sql through the driver: split at ";" it would break on its comments."""
        ddl = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")
        try:
            with closing(self.engine.raw_connection()) as connection:
                driver = cast(Any, connection.driver_connection)
                if self.sqlite:
                    driver.executescript("PRAGMA journal_mode = WAL;" + ddl)
                else:  # SQLite counts an INTEGER PRIMARY KEY by itself; two gates may start at once
                    counted = "INTEGER PRIMARY KEY GENERATED BY DEFAULT AS IDENTITY"
                    ddl = ddl.replace("INTEGER PRIMARY KEY NOT NULL", counted)
                    driver.execute("SELECT pg_advisory_xact_lock(7435623);" + ddl)
                    driver.commit()
        except self.errors as error:
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            if self.sqlite:
                raise SettingsError(f"DATABASE_URL must be a usable database: {reason}") from None
            raise click.ClickException(f"PostgreSQL does not answer: {reason}") from None

    @contextmanager
    def _cursor(self, free: list[Any]) -> Iterator[Execute]:
        """A connection for a moment; after an error the pool rolls back, or makes a new one."""
        try:
            connection = free.pop()
        except IndexError:
            connection = self.engine.raw_connection()
        kept = False
        try:
            run = connection.cursor().execute

            def execute(sql: str, values: Mapping[str, object] = {}) -> Any:
                text, names = positional(sql, self._mark)
                return run(text, [values[name] for name in names])

            yield execute
            kept = self.sqlite  # SQLAlchemy's checks are worth their time over a network
        finally:
            if kept:
                free.append(connection)
            else:
                connection.close()

    def transaction(
        self, work: Callable[Concatenate[Execute, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What `work(execute, ...)` returns, in a write transaction: `execute(sql, {name: value})`.

        On SQLite one does what all who wait for the writer want, in one transaction. So work
        refuses, by an APIError, before it writes; and it may be done again from its start.
        """
        return cast(T, self._value(Job(lambda execute: work(execute, *args, **kwargs))))

    def _value(self, job: Job) -> Any:
        """What the job returns or raises, done here or by another who waits."""
        if not self.sqlite:
            self._commit([job])
        else:
            with self._mutex:
                self._jobs.append(job)
                busy, self._busy = self._busy, True
            if busy:
                job.woken.acquire()
            if job in self._jobs:  # so it is woken to do all, not because it is done
                self._do_all()
        if not job.done:
            raise RuntimeError("whoever had the writer was interrupted")
        try:
            if job.error:
                raise job.error
            return job.value
        finally:
            job.error = None  # its traceback has this frame: a cycle, with the request's body

    def _do_all(self) -> None:
        """Does what all want who wait by now."""
        with self._mutex:
            jobs, self._jobs = self._jobs, []
        try:
            self._commit(jobs)
        finally:
            self._pass_on(jobs)

    def _pass_on(self, done: list[Job]) -> None:
        """Wakes those whose jobs these are, and gives the writer to the next who waits for it."""
        with self._mutex:
            self._busy = bool(self._jobs)
            for job in done + self._jobs[:1]:
                job.woken.release()

    def _commit(self, jobs: list[Job]) -> None:
        """Does these jobs together; if one is at fault, each by itself, so that no other fails.

        A database that is locked or full is nobody's fault: then all fail.
        """
        try:
            with self._locked(), self._cursor(self._writers) as execute:
                if self.sqlite:
                    execute("BEGIN IMMEDIATE")  # an upgrade of a reader would just fail
                for job in jobs:
                    job.do(execute)
                execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - it is raised again by whoever waits for it
            nobodys = getattr(error, "sqlite_errorname", "").startswith(LOCKED_OR_FULL)
            for job in jobs:
                if nobodys or len(jobs) == 1:
                    job.error = error
                else:
                    self._commit([job])
        for job in jobs:
            job.done = True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other writers out, those of other processes, too."""
        with self._turn if self.sqlite else nullcontext():
            if self._folder:
                fcntl.flock(self._folder, fcntl.LOCK_EX)
            try:
                yield
            finally:
                if self._folder:
                    fcntl.flock(self._folder, fcntl.LOCK_UN)

    def checkpoint(self) -> None:
        """Moves SQLite's log into its file, where no caller waits: a busy disk may take seconds."""
        # Only a log that has grown: a checkpoint with nothing to do that meets a commit may damage
        # the database, up to SQLite 3.51.2 (sqlite.org/wal.html#walresetbug).
        if self.checkpoints:
            written_at = Path(f"{self.engine.url.database}-wal").stat().st_mtime_ns
            if written_at != self._checked_at:
                self._checked_at = written_at
                ((_, pages, _),) = self.query("PRAGMA wal_checkpoint(PASSIVE)")
                if pages > MAX_LOG_PAGES:  # for want of a quiet moment; what is left is little
                    with self._locked():
                        self.query("PRAGMA wal_checkpoint(RESTART)")

    def close(self) -> None:
        """Closes what is open; on SQLite the last one to close moves the log into the file."""
        for connection in self._readers + self._writers:
            connection.close()
        self.engine.dispose()
        if self._folder:
            os.close(self._folder)

    def query(self, sql: str, **values: object) -> list[Any]:
        """The rows of one SELECT, as tuples."""
        with self._cursor(self._readers) as execute:
            return cast("list[Any]", execute(sql, values).fetchall())

    def look_up(self, sql: str, **values: object) -> list[Any]:
        """query() for a few rows: the writer, when it is free, has them in its cache."""
        with self._mutex:
            busy, self._busy = self._busy, True
        if busy:
            return self.query(sql, **values)
        try:
            with self._cursor(self._writers) as execute:
                return cast("list[Any]", execute(sql, values).fetchall())
        finally:
            self._pass_on([])

    def write(self, sql: str, **values: object) -> list[Any]:
        """One statement with RETURNING in a transaction of its own; its rows, as tuples."""
        return self.transaction(lambda execute: cast("list[Any]", execute(sql, values).fetchall()))


def gate() -> Gate:
    """The gate that serves the current request or command."""
    return cast(Gate, cast(Any, current_app)._get_current_object())  # the proxy costs each use


# ---- 4 Accounts and keys --------------------------------------------------------------------------
# Passwords, JWTs, API keys, and the decorators that turn a bearer credential into g.caller. Neither
# a key nor a JWT is stored: the one is derived again when it is shown, the other is signed.

BASE62 = string.digits + string.ascii_letters
USERNAME = re.compile(r"[A-Za-z0-9_.-]{3,64}")
BCRYPT_ROUNDS = 10  # OWASP's least, about 60 ms: 200 logins at once are done in seconds
NOBODY = "$2b$10$abcdefghijklmnopqrstuu4T826PRnz0Hu6YlprUuxkZxOOj5Fw5S"  # costs like a real hash
HASHING = Turn(max(1, (os.cpu_count() or 2) - 1), wait_s=20)  # leaves a core for the streams


class Caller(NamedTuple):
    """Who asks, as plain values that need no database. Counts are tokens."""

    id: int
    username: str
    token_limit: int
    tokens_used: int
    tokens_reserved: int
    jwt_version: int
    created_at: int
    disabled_at: int | None
    api_key_id: int | None
    key_used_at: int | None  # Unix seconds, to the minute


CALLER = """
SELECT u.id, username, token_limit, tokens_used, tokens_reserved, jwt_version, u.created_at,
 disabled_at, k.id, k.last_used_at FROM users u LEFT JOIN api_keys k """
CALLER_BY_KEY = CALLER + "ON k.user_id = u.id WHERE k.key_hash = :value AND k.revoked_at IS NULL"
CALLER_BY_ID = CALLER + "ON k.id = 0 WHERE u.id = :value"
CALLER_BY_JWT = CALLER_BY_ID + " AND u.jwt_version = :version"
LIVE_KEYS = """
SELECT id, name, created_at, last_used_at, nonce, key_hash FROM api_keys
 WHERE user_id = :user_id AND revoked_at IS NULL ORDER BY id"""
INSERT_KEY = """
INSERT INTO api_keys (user_id, name, nonce, key_hash, created_at)
 VALUES (:user_id, :name, :nonce, :key_hash, :now) RETURNING id"""


def spelled(secret_part: str) -> str:
    """An API key: the checksum at its end shows a mistyped one without a query."""
    return f"sk-llmgate-{secret_part}{zlib.crc32(secret_part.encode()) & 0xFFFFFF:06x}"


def key_hash(api_key: str) -> str:
    """What the database holds of a key: its 256 random bits need no slow hash."""
    return hashlib.sha256(api_key.encode()).hexdigest()


class Keyring:
    """The gate's secret and what is made from it: JWTs and API keys, each by a sub-key."""

    def __init__(self, secret: str, jwt_hours: int) -> None:
        self._jwt_key = hmac.digest(secret.encode(), b"llmgate jwt", "sha256")
        self._api_key_key = hmac.digest(secret.encode(), b"llmgate api key", "sha256")
        self.jwt_seconds = jwt_hours * 3600

    def api_key(self, nonce: str) -> str:
        """The API key of a nonce; its secret part is an HMAC in 43 digits of base 62."""
        number = int.from_bytes(hmac.digest(self._api_key_key, nonce.encode(), "sha256"), "big")
        return spelled("".join(BASE62[number // 62**place % 62] for place in reversed(range(43))))

    def new_key(self) -> tuple[str, JSONObject]:
        """An API key, and its nonce, hash and time as a row has them."""
        api_key = self.api_key(nonce := secrets.token_hex(32))
        return api_key, {"nonce": nonce, "key_hash": key_hash(api_key), "now": int(time.time())}

    def shown(self, nonce: str, stored_hash: str) -> str | None:
        """The key again; None when it was made with another secret."""
        api_key = self.api_key(nonce)
        return api_key if key_hash(api_key) == stored_hash else None

    def jwt_answer(self, user_id: int, jwt_version: int) -> JSONObject:
        """RFC 6749's {"access_token", "token_type", "expires_in" (seconds)}."""
        claims: JSONObject = {"sub": str(user_id), "ver": jwt_version, "iat": int(time.time())}
        claims["exp"] = claims["iat"] + self.jwt_seconds
        token = jwt.encode(claims, self._jwt_key, algorithm="HS256")
        return {"access_token": token, "token_type": "bearer", "expires_in": self.jwt_seconds}

    def read_jwt(self, token: str) -> JSONObject:
        """The parameters of CALLER_BY_JWT; 401 `token_expired` or `invalid_token`."""
        required: Any = {"require": ["sub", "ver", "iat", "exp"]}
        try:
            claims = jwt.decode(token, self._jwt_key, ["HS256"], required)
            return {"value": min(int(claims["sub"]), MAX_BIGINT), "version": int(claims["ver"])}
        except (jwt.InvalidTokenError, ValueError, TypeError) as error:
            expired = isinstance(error, jwt.ExpiredSignatureError)
            raise APIError("token_expired" if expired else "invalid_token") from None


class Throttle(dict[str, tuple[int, float]]):
    """{typed name: (tries, held back until)}; a right password takes its name out."""

    lock = threading.Lock()

    def admit(self, name: str) -> None:
        """Counts a try before its password is hashed; 429 while the name is held back."""
        now = time.monotonic()
        with self.lock:
            tries, until = self.pop(name, (0, now))
            held = until > now  # for 1 s after the fifth try, for 2 s after the sixth, ...
            self[name] = (tries, until) if held else (tries + 1, now + min(2**tries // 16, 900))
            if len(self) > 10000:  # the name that was tried longest ago
                del self[next(iter(self))]
        if held:
            why = "Too many wrong passwords for this name"
            raise APIError("rate_limit_exceeded", why=why, wait_s=int(until - now) + 1)


def utf8(value: object) -> bytes:
    """A string's bytes; none for what is no string, or no UTF-8 (a lone surrogate)."""
    with suppress(UnicodeEncodeError):
        return value.encode() if isinstance(value, str) else b""
    return b""


def hash_password(password: object, param: str = "password") -> str:
    """bcrypt's hash; 400 unless the password has 8 characters to 72 bytes: bcrypt reads no more."""
    encoded = utf8(password)
    if len(encoded.decode()) < 8 or len(encoded) > 72:
        raise APIError("invalid_value", param, must_be="a string of 8 characters to 72 bytes")
    with HASHING:
        return bcrypt.hashpw(encoded, bcrypt.gensalt(BCRYPT_ROUNDS)).decode()


def log_in(username: object, password: object) -> tuple[int, int, str]:
    """id, jwt_version, password_hash; 401, 403, 429. An unknown name costs the same as a known."""
    name, encoded = username.lower()[:65] if isinstance(username, str) else "", utf8(password)
    sql = "SELECT id, jwt_version, password_hash, disabled_at FROM users WHERE lower(username) = :n"
    found = gate().ledger.query(sql, n=name) if USERNAME.fullmatch(name) else []
    gate().throttle.admit(name)  # not before: a lost database is nobody's wrong password
    user_id, jwt_version, stored, disabled_at = found[0] if found else (0, 0, NOBODY, None)
    with HASHING:
        right = bcrypt.checkpw(encoded[:72], stored.encode()) and len(encoded) <= 72
    if not found or not right:
        raise APIError("invalid_credentials")
    gate().throttle.pop(name, None)
    if disabled_at is not None:
        raise APIError("account_disabled")
    return user_id, jwt_version, stored


def register(username: object, password: object, token_limit: int) -> tuple[int, str]:
    """A new account's id and API key; 400, or 409 `username_taken`."""
    if not isinstance(username, str) or not USERNAME.fullmatch(username):
        raise APIError("invalid_value", "username", must_be="3 to 64 of A-Z a-z 0-9 _ . -")
    ledger, (api_key, row) = gate().ledger, gate().keyring.new_key()
    row |= {"username": username, "hash": hash_password(password), "token_limit": token_limit}
    sql = """INSERT INTO users (username, password_hash, token_limit, created_at)
 VALUES (:username, :hash, :token_limit, :now) RETURNING id"""

    def insert(execute: Execute) -> int:
        ((user_id,),) = execute(sql, row).fetchall()
        execute(INSERT_KEY, row | {"user_id": user_id, "name": "default"})
        return cast(int, user_id)

    try:
        return ledger.transaction(insert), api_key
    except ledger.driver.IntegrityError:
        raise APIError("username_taken", "username") from None


@contextmanager
def identified(by_key: bool | None) -> Iterator[None]:
    """Puts the caller by API key or JWT (None: either) into g.caller; 401 or 403."""
    scheme, _, credential = request.headers.get("Authorization", "").partition(" ")
    credential = credential.strip()
    if scheme.lower() != "bearer" or not credential:
        raise APIError("missing_api_key")
    by_key = credential.startswith("sk-llmgate-") if by_key is None else by_key
    if by_key and credential != spelled(credential[11:-6]):
        raise APIError("invalid_api_key")
    found = {"value": key_hash(credential)} if by_key else gate().keyring.read_jwt(credential)
    rows = gate().ledger.look_up(CALLER_BY_KEY if by_key else CALLER_BY_JWT, **found)
    if not rows:
        raise APIError("invalid_api_key" if by_key else "invalid_token")
    g.caller = Caller(*rows[0])
    if g.caller.disabled_at is not None:
        raise APIError("account_disabled")
    yield


# As decorators: what @contextmanager makes can be one, and begins anew at each call.
jwt_required, api_key_required = identified(by_key=False), identified(by_key=True)
jwt_or_api_key_required = identified(by_key=None)


# ---- 5 Quota and metering -------------------------------------------------------------------------
# reserve() holds a request's worst case before vLLM is asked; book() puts the true count in its
# place. The counters move by nothing else, and only by SQL arithmetic under a guard.


class Counts(NamedTuple):
    """What one answer cost, in tokens; `estimated` when vLLM's own count did not come."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    estimated: int = 0

    @property
    def total(self) -> int:
        """What the quota is charged."""
        return self.prompt_tokens + self.completion_tokens

    def within(self, most: int) -> Counts:
        """The counts, cut to `most` tokens and then `estimated`."""
        if self.total <= most:
            return self
        prompt = min(self.prompt_tokens, most)
        return Counts(prompt, most - prompt, min(self.cached_tokens, prompt), estimated=1)


class Claim(NamedTuple):
    """The worst case of one request, in tokens."""

    prompt: int  # an upper bound
    prompt_estimate: int  # a likely value, charged when no count ever comes
    output: int  # what one choice may write: as asked for, or up to the model's context
    choices: int  # n, times the prompts of a list

    def granted(self, room: int) -> int:
        """Output for each choice: at most a quarter of `room`, always up to 1,024; -1: no room."""
        left = (room - self.prompt) // self.choices
        if left < min(self.output, 1):
            return -1
        return min(self.output, left, max(room // 4, 1024, self.choices) // self.choices)

    def total(self, granted: int) -> int:
        """Tokens to reserve for a granted output."""
        return self.prompt + self.choices * granted


LOCK_USER = """
SELECT token_limit, tokens_used, tokens_reserved FROM users WHERE id = :user_id FOR UPDATE"""
RESERVE = """
UPDATE users SET tokens_reserved = tokens_reserved + :reserved WHERE id = :user_id
 AND tokens_used + tokens_reserved + :reserved <= token_limit
 AND (SELECT count(*) FROM usage WHERE user_id = :user_id AND status = 'pending'
 AND lease_until >= :now) < :most"""
INSERT_ROW = """
INSERT INTO usage (request_id, user_id, api_key_id, model, endpoint, stream, reserved,
 prompt_estimate, created_at, lease_until) VALUES (:request_id, :user_id, :api_key_id, :model,
 :endpoint, :stream, :reserved, :prompt_estimate, :now, :lease_until)"""
READ_ROW = """
SELECT u.id, u.tokens_used, u.token_limit - u.tokens_used - u.tokens_reserved, r.status, r.reserved,
 r.prompt_tokens + r.completion_tokens FROM usage r JOIN users u ON u.id = r.user_id
 WHERE r.request_id = :request_id FOR UPDATE"""
UPDATE_ROW = """
UPDATE usage SET status = :status, estimated = :estimated, reserved = :reserved,
 prompt_tokens = :prompt_tokens, completion_tokens = :completion_tokens,
 cached_tokens = :cached_tokens, first_byte_ms = :first_byte_ms, duration_ms = :duration_ms,
 lease_until = :lease_until WHERE request_id = :request_id"""
MOVE_TOKENS = """
UPDATE users SET tokens_used = tokens_used + :booked, tokens_reserved = tokens_reserved - :released
 WHERE id = :user_id"""


def reserve(execute: Execute, caller: Caller, claim: Claim, row: JSONObject, most: int) -> int:
    """Writes the pending row; the tokens granted to each choice. 429: the quota, `most` running."""
    now = int(time.time())
    row |= {"user_id": caller.id, "api_key_id": caller.api_key_id, "most": most, "now": now}
    row |= {"prompt_estimate": claim.prompt_estimate, "lease_until": now + LEASE_S}
    limit, used, reserved = execute(LOCK_USER, row).fetchone()
    granted = claim.granted(limit - used - reserved)
    row["reserved"] = claim.total(granted)
    if granted < 0:
        needed = claim.total(min(claim.output, 1))
        code = "quota_reserved" if needed <= limit - used else "insufficient_quota"
        raise APIError(code, used=used, limit=limit, needed=needed)
    if execute(RESERVE, row).rowcount != 1:
        raise APIError("rate_limit_exceeded", why=f"{most} requests of yours are running")
    execute(INSERT_ROW, row)
    if now - (caller.key_used_at or 0) >= 60:
        execute("UPDATE api_keys SET last_used_at = :now WHERE id = :api_key_id", row)
    return granted


def book(
    execute: Execute, /, request_id: str, status: str, counts: Counts, **times: int | None
) -> int:
    """Books a request's tokens as known now; the user's `tokens_used` after it."""
    found = execute(READ_ROW, {"request_id": request_id}).fetchone()
    user_id, used, free, old_status, reserved, before = found
    if old_status not in ("pending", "lost"):
        return cast(int, used)
    # What was held may be used up; more only if nobody else holds it. (A lost row's
    # reservation may have gone to others by the time its gate comes back.)
    counts = counts.within(before + max(reserved, reserved + free))
    if counts.total < before - used:  # reset-usage came between an estimate and the count
        counts = Counts(before - used, estimated=1)
    # The difference: so this serves checkpoints, the end, recovery and the late return, too.
    booked = counts.total - before
    kept = max(0, reserved - max(0, booked)) if status == "pending" else 0
    row = {"request_id": request_id, "status": status, "reserved": kept, **counts._asdict()}
    row |= {"first_byte_ms": None, "duration_ms": None, **times}
    execute(UPDATE_ROW, row | {"lease_until": int(time.time()) + LEASE_S})
    execute(MOVE_TOKENS, {"user_id": user_id, "booked": booked, "released": reserved - kept})
    return cast(int, used + booked)


def reset_usage(execute: Execute, user_id: int) -> None:
    """Sets tokens_used to 0 by a balancing row: it stays the sum of the rows, and they stay."""
    row = {"request_id": secrets.token_hex(16), "user_id": user_id, "now": int(time.time())}
    sql = """
INSERT INTO usage (request_id, user_id, model, endpoint, status, prompt_tokens, created_at,
 lease_until) VALUES (:request_id, :user_id, '', 'reset-usage', 'ok', :booked, :now, :now)"""
    _, used, _ = execute(LOCK_USER, row).fetchone()
    row |= {"booked": -used, "released": 0}
    execute(sql, row)
    execute(MOVE_TOKENS, row)


SUMS = ("requests", "prompt_tokens", "completion_tokens")
USAGE_BY_DAY = """
SELECT created_at / 86400, model, api_key_id, count(*), CAST(sum(prompt_tokens) AS BIGINT),
 CAST(sum(completion_tokens) AS BIGINT) FROM usage WHERE user_id = :id AND model <> ''
 AND created_at / 86400 >= :since GROUP BY created_at / 86400, model, api_key_id"""
RECENT = """request_id, created_at, model, api_key_id, endpoint, stream, status, estimated, \
prompt_tokens, completion_tokens, cached_tokens, first_byte_ms, duration_ms"""
# The index alone tells since when; or all rows of a day would be read, to sort them.
RECENT_ROWS = f"""
WITH bound AS (SELECT min(created_at) AS since FROM (
 SELECT created_at FROM usage WHERE user_id = :id AND model <> ''
 ORDER BY created_at / 86400 DESC, created_at DESC LIMIT 20) AS newest)
SELECT {RECENT} FROM bound, usage WHERE user_id = :id AND model <> '' AND created_at >= since
 AND created_at / 86400 >= since / 86400 ORDER BY created_at DESC LIMIT 20"""


def usage_report(ledger: Ledger, caller: Caller, days: int) -> JSONObject:
    """The report of contract section 5 over the last `days` days (UTC); counts are tokens."""
    rows = ledger.query(USAGE_BY_DAY, id=caller.id, since=int(time.time()) // 86400 - days + 1)
    names = dict(ledger.query("SELECT id, name FROM api_keys WHERE user_id = :id", id=caller.id))
    recent = ledger.query(RECENT_ROWS, id=caller.id)

    def by(column: int, name: str, shown: Callable[[Any], object]) -> list[JSONObject]:
        sums: dict[Any, list[int]] = {}
        for row in rows:
            so_far = sums.get(row[column], [0, 0, 0])
            sums[row[column]] = [a + b for a, b in zip(so_far, row[3:], strict=True)]
        lines = sorted(sums.items())
        return [{name: shown(of)} | dict(zip(SUMS, line, strict=True)) for of, line in lines]

    by_model = by(1, "model", str)
    return {
        "tokens_used": caller.tokens_used,
        "token_limit": caller.token_limit,
        "remaining": max(0, caller.token_limit - caller.tokens_used),
        "reserved": caller.tokens_reserved,
        "requests": sum(row["requests"] for row in by_model),
        "by_model": by_model,
        "by_key": by(2, "key", names.get),
        "by_day": by(0, "date", lambda day: str(date.fromordinal(719163 + day))),
        "recent": [dict(zip(RECENT.split(", "), row, strict=True)) for row in recent],
    }


# ---- 6 Upstream and relay -------------------------------------------------------------------------
# Which server gets a request, the meter that reads usage in passing, the relay itself, and the
# watcher. Bytes pass unchanged but for what contract section 3 lists.

# What decides how vLLM renders a conversation.
TEMPLATE_FIELDS = (
    "model", "messages", "tools", "chat_template", "chat_template_kwargs", "add_generation_prompt",
    "continue_final_message", "add_special_tokens", "mm_processor_kwargs",
)  # fmt: skip
COUNTING = Turn(16, wait_s=5)  # calls of /tokenize at a time: they hold threads, and are free


def parsed(text: bytes | bytearray) -> Any:
    """JSON's value; None for what is no JSON."""
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def encoded(body: JSONObject) -> bytes:
    """JSON for vLLM, with each field once; 400 for what JSON cannot say (1e999)."""
    try:
        return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise APIError("invalid_json") from None


class Translated:
    """502 when the connection to vLLM breaks off or makes no sense, 504 when it is silent."""

    def __enter__(self) -> None:
        """Nothing to begin."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """The error as the caller may see it."""
        if isinstance(error, TimeoutError | BlockingIOError):  # by settimeout(), by the kernel
            raise APIError("upstream_timeout") from None
        if isinstance(error, OSError | ValueError):
            raise APIError("upstream_error", why="it broke the connection off") from None


translated = Translated()


# A chunk's size, after the end of the chunk before it.
CHUNK_SIZE = re.compile(rb"(?:\r\n)?([^\r\n;]+)[^\r\n]*\r\n")


class Answer:
    """vLLM's answer: its status and headers, and the body as it arrives. OSError, ValueError."""

    # Not http.client's: it reads headers by the parser for mail, and gives out each chunk alone.

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._rest, self.status = sock, b"", 100
        while self.status < 200:  # "Continue" comes before the answer
            while b"\r\n\r\n" not in self._rest:
                if len(self._rest) > 65536:
                    raise ValueError("headers without an end")
                self._rest += self._more()
            head, _, self._rest = self._rest.partition(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            version, status, *_ = first.split(" ")
            self.status = int(status)
        parts = (line.partition(":") for line in lines)
        self.headers = {name.lower(): value.strip() for name, _, value in parts}
        self.chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        self.left = -1 if self.chunked else int(self.headers.get("content-length", -1))
        closes = self.headers.get("connection", "").lower() == "close"
        self.keeps_open = version == "HTTP/1.1" and not closes

    def _more(self) -> bytes:
        """What arrives next; ConnectionError at the end."""
        if arrived := self._sock.recv(16384):
            return arrived
        raise ConnectionError

    def pieces(self) -> Iterator[bytes]:
        """The body, as much at a time as has arrived; `left` is 0 when that was its whole length."""
        if self.chunked:
            yield from self._chunks()
        elif self.left < 0:  # as much as comes
            yield self._rest
            yield from iter(partial(self._sock.recv, 16384), b"")
        while self.left > 0:
            piece, self._rest = self._rest or self._more(), b""
            yield piece[: self.left]
            self.left -= len(piece)

    def _chunks(self) -> Iterator[bytes]:
        """A body in chunks, several at a time."""
        rest, left = self._rest, 0  # `left` of the current chunk
        while True:
            payload, end = [rest[:left]], left
            while size := CHUNK_SIZE.match(rest, end):
                start, length = size.end(), int(size[1], 16)
                if length <= 0:  # the last chunk; what may follow is nobody's
                    yield b"".join(payload)
                    return
                end = start + length
                payload.append(rest[start:end])
            left, rest = max(0, end - len(rest)), rest[end:]
            if len(rest) > 99:
                raise ValueError("no chunk's size")
            yield b"".join(payload)
            rest += self._more()


def whole(pieces: Iterator[bytes]) -> bytes:
    """A body that has an end; 502 when it has none."""
    body = bytearray()
    for piece in pieces:
        body += piece
        if len(body) > MAX_ANSWER_BYTES:
            raise APIError("upstream_error", why="its answer has no end")
    return bytes(body)


class Upstream:
    """One model server: what it serves, what is known of its ways, its idle connections."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.url, parts = url, urlsplit(url)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if self.tls else 80)
        self.path, self.address = parts.path, (parts.hostname or "", port)
        self.headers = f"Host: {parts.netloc}\r\nAccept-Encoding: identity\r\n"
        self.headers += "Content-Type: application/json\r\n"
        if settings.vllm_api_key:
            self.headers += f"Authorization: Bearer {settings.vllm_api_key}\r\n"
        self.timeout_s = settings.upstream_timeout
        self.models: dict[str, JSONObject] = {}  # id: its entry in /v1/models
        self.up = False
        self.continuous: dict[str, bool] = {}  # model: whether it takes continuous_usage_stats
        self.idle: list[socket.socket] = []

    def take_idle(self) -> Iterator[socket.socket]:
        """The connections that wait for a next request, for whoever is first to take them."""
        with suppress(IndexError):
            while True:
                yield self.idle.pop()

    def connect(self) -> socket.socket:
        """A connection that waited here and is still open, or a new one; ConnectionRefusedError."""
        for sock in self.take_idle():
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            if not poll.poll(0):  # nothing to read, so not even its end
                return sock
            sock.close()
        try:
            sock = socket.create_connection(self.address, CONNECT_TIMEOUT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.tls:
                sock = self.tls.wrap_socket(sock, server_hostname=self.address[0])
        except OSError:
            self.up, self.continuous = False, {}  # the next to come may be another server
            raise ConnectionRefusedError from None
        sock.settimeout(self.timeout_s if self.tls else None)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # no poll() before each read
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", self.timeout_s, 0))
        return sock

    def send(self, sock: socket.socket, path: str, body: bytes, headers: str = "") -> Answer:
        """An answer whose body is still to be read; 502, 504."""
        head = f"{'POST' if body else 'GET'} {self.path}{path} HTTP/1.1\r\n{self.headers}{headers}"
        with translated:
            sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            return Answer(sock)

    def fetch(self, path: str, body: bytes = b"", timeout_s: float = 2) -> JSONObject:
        """A JSON answer for the gate itself; {} for anything else."""
        with suppress(APIError, ConnectionRefusedError), closing(self.connect()) as sock:
            sock.settimeout(timeout_s)
            answer = self.send(sock, path, body)
            with translated:
                value = parsed(whole(answer.pieces()))
            if answer.status == 200 and isinstance(value, dict):
                return value
        return {}

    def refresh(self) -> None:
        """Fetches the list of models; a slow answer leaves the list as it was."""
        entries = self.fetch("/v1/models").get("data")
        if isinstance(entries, list):
            models = [entry for entry in entries if isinstance(entry, dict)]
            self.models, self.up = {str(entry.get("id")): entry for entry in models}, True

    def count_prompt(self, body: JSONObject, endpoint: str) -> int | None:
        """The exact tokens of a prompt, by vLLM's /tokenize; None where it cannot tell."""
        if endpoint == "chat/completions":
            question = {name: body[name] for name in TEMPLATE_FIELDS if name in body}
        elif "messages" in body or "prompt_embeds" in body:  # vLLM may read these there, too
            return None
        else:
            prompt = body.get("input" if endpoint == "embeddings" else "prompt")
            question = {"model": body["model"], "prompt": prompt}
        with COUNTING:
            counted = self.fetch("/tokenize", encoded(question), 30).get("count")
        return counted if type(counted) is int else None


class Upstreams(list[Upstream]):
    """All model servers: the merged list of models, and which server gets a request."""

    def __init__(self, settings: Settings) -> None:
        ports = [port for port in LOCAL_PORTS if port != settings.port]
        urls = settings.vllm_endpoint or [f"http://127.0.0.1:{port}" for port in ports]
        super().__init__(Upstream(url, settings) for url in urls)
        self.aliases = settings.model_aliases
        self._refreshing, self._refreshed_at = threading.Lock(), 0.0

    def refresh(self) -> None:
        """Asks all servers for their models, side by side, unless that was done just now."""
        with self._refreshing:
            if time.monotonic() - self._refreshed_at > 1:
                with ThreadPoolExecutor(len(self)) as pool:
                    list(pool.map(Upstream.refresh, self))
                self._refreshed_at = time.monotonic()

    def models(self) -> dict[str, JSONObject]:
        """{id: entry} of the servers that are up; an old list is refreshed in the background."""
        if not any(server.up for server in self):
            self.refresh()
        elif time.monotonic() - self._refreshed_at > MODELS_TTL_S and not self._refreshing.locked():
            threading.Thread(target=self.refresh, daemon=True).start()
        up = [server.models for server in reversed(self) if server.up]
        return {name: entry for models in up for name, entry in models.items()}

    def resolved(self, model: str) -> str:
        """The served model that a name or an alias stands for."""
        return self.aliases.get(model, model) or next(iter(self.models()), model)

    def shown(self) -> dict[str, JSONObject]:
        """{id or alias: entry} as callers may see it; 502 while no server is up."""
        if not (models := self.models()):
            raise APIError("upstream_unavailable")
        for alias in self.aliases:
            if (real := self.resolved(alias)) in models:
                models[alias] = {**models[real], "id": alias}
        keys = ("id", "object", "created", "owned_by", "max_model_len")  # not root, a path
        return {name: {k: e[k] for k in keys if k in e} for name, e in models.items()}

    def route(self, model: str, running: set[Relay]) -> list[Upstream]:
        """The servers of a model, the least busy first; 404 `model_not_found`, or 502."""
        if model not in self.models():
            self.refresh()
        servers = [server for server in self if model in server.models]
        if not servers:
            code = "model_not_found" if any(s.up for s in self) else "upstream_unavailable"
            raise APIError(code, "model", model=model)
        busy = [relay.upstream for relay in list(running)] if len(servers) > 1 else []
        return sorted(servers, key=lambda server: (not server.up, busy.count(server)))


def context_of(entry: JSONObject) -> int:
    """Tokens of a model's context: vLLM's max_model_len, llama.cpp's n_ctx, or a guess."""
    meta = entry.get("meta")
    known = entry.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else 0)
    return known if type(known) is int and known > 0 else UNKNOWN_CONTEXT


def read_usage(usage: object) -> Counts | None:
    """vLLM's usage block as counts; None when it is missing or cannot be right."""
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    numbers = [usage.get("prompt_tokens"), usage.get("completion_tokens", 0), cached or 0]
    right = all(type(number) is int and number >= 0 for number in numbers) and any(numbers)
    return Counts(*numbers) if right else None


class Meter:
    """Counts one answer's tokens in passing, and hides usage that the caller did not ask for."""

    EVENT_END = re.compile(rb"\n\r?\n")
    # An unescaped "usage": can only be a key, and the first "index": is that of the choice.
    USAGE = re.compile(rb',\s*"usage":\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|null)(?=\s*[,}])')
    INDEX = re.compile(rb'"index":\s*(\d{1,6})')
    NO_CHOICES = re.compile(rb'"choices":\s*\[\s*\]')

    def __init__(self, claim: Claim, granted: int, body: JSONObject, context: int) -> None:
        self.claim, self.n, self.reserved = claim, body.get("n") or 1, claim.total(granted)
        self.most = max(self.reserved, claim.choices * context)  # what a true count can be
        options = body.get("stream_options") or {}
        self.show_last = options.get("include_usage") is True
        self.show_all = self.show_last and options.get("continuous_usage_stats") is True
        self.asked = False  # vLLM may have begun to work
        self.done = self.failed = False  # [DONE] has come; vLLM reported an error before it
        self.output_seen = 0  # events, or a quarter of a plain body's bytes: when no count comes
        self.last: Counts | None = None
        self._choices: dict[int, bytes] = {}  # the last usage block of each, to be added up
        self._rest = b""

    def feed(self, piece: bytes) -> bytes:
        """The events that are complete now, as the caller shall see them; 502 if one is endless."""
        shown, start, searched = [], 0, max(0, len(self._rest) - 3)
        self._rest += piece
        for end in self.EVENT_END.finditer(self._rest, searched):
            shown.append(self._event(self._rest[start : end.end()]))
            start = end.end()
        self._rest = self._rest[start:]
        if len(self._rest) > MAX_EVENT_BYTES:
            raise APIError("upstream_error", why="it sent an event without an end")
        return b"".join(shown)

    def _event(self, event: bytes) -> bytes:
        """One event with its usage counted, and cut out unless the caller asked for it."""
        found = self.USAGE.search(event)
        self.output_seen += event.startswith(b"data:")
        if not found:
            self.done |= event[5:].strip() == b"[DONE]"
            self.failed |= event.startswith(b'data: {"error"')
            return event
        index, usage = self.INDEX.search(event), found[1]
        if not index and self.NO_CHOICES.search(event):  # the block at the end
            self.last = read_usage(parsed(usage)) or self.last
            return event if self.show_last else b""
        if usage == b"null":
            shown = self.show_last
        else:
            self._choices[int(index[1]) if index else 0] = usage
            shown = self.show_all
        return event if shown else event[: found.start()] + event[found.end() :]

    def counts(self) -> Counts:
        """The tokens so far: vLLM's count if it can be right, or an estimate."""
        if not self.asked:
            return Counts()
        prompts, written = {}, 0
        for index, block in dict(self._choices).items():  # the relay may write meanwhile
            if seen := read_usage(parsed(block)):
                prompts[index // self.n] = seen.prompt_tokens  # once for each prompt of a list
                written += seen.completion_tokens
        counts = self.last or Counts(sum(prompts.values()), written)
        if not self.last and not prompts:
            counts = Counts(self.claim.prompt_estimate, self.output_seen, estimated=1)
        return counts.within(self.reserved if counts.estimated else self.most)


class Relay:
    """One running request as plain values; settle() ends it once, whoever comes first."""

    status = "pending"
    upstream: Upstream | None = None
    sock: socket.socket | None = None  # to vLLM; that of a stream is never used again
    pieces: Iterator[bytes]  # of its body, to be read by whoever comes next
    left_at: float | None = None  # when the caller was seen gone (monotonic)
    cut_by: APIError | None = None  # why the gate itself broke the answer off
    tokens_used = 0  # of the user, after settle()

    def __init__(self, watcher: Watcher, caller: Caller, row: JSONObject, meter: Meter) -> None:
        self.watcher, self.caller, self.row, self.meter = watcher, caller, row, meter
        self.stream, self.lock = bool(row["stream"]), threading.Lock()
        self.started: float = g.started
        self.times: dict[str, int | None] = {"first_byte_ms": None, "duration_ms": None}
        self.gone = request.environ.get("waitress.client_disconnected", bool)

    def read(self, answer: Answer) -> Iterator[bytes]:
        """The body's bytes as they arrive; 502 or 504 when it breaks off."""
        with translated:
            for piece in filter(None, answer.pieces()):
                if self.times["first_byte_ms"] is None:
                    self.times["first_byte_ms"] = self._ms()
                yield piece

    def _ms(self) -> int:
        """Milliseconds since the request's arrival."""
        return round((time.monotonic() - self.started) * 1000)

    def leave(self) -> None:
        """The caller has gone: vLLM sees a half-close, and has a moment to report its counts."""
        self.left_at = self.left_at or time.monotonic()
        late = time.monotonic() - self.left_at > LAST_WORDS_S
        self.shutdown(socket.SHUT_RDWR if late else socket.SHUT_WR)

    def shutdown(self, how: int) -> None:
        """Shuts the connection to vLLM; a thread that waits for its bytes wakes up."""
        with suppress(OSError, TypeError):
            # Not TLS's own, which would also end the reading.
            socket.socket.shutdown(cast(socket.socket, self.sock), how)

    def release(self, reuse: bool = False) -> None:
        """Closes the connection, or keeps it for another request."""
        if self.upstream and self.sock and reuse:
            self.upstream.idle.append(self.sock)
        elif self.sock:
            self.sock.close()

    def close(self) -> None:
        """The end of a stream, also of one that was never begun; what vLLM last reported counts."""
        if self.status == "pending":
            self.leave()
            with suppress(APIError):
                for piece in self.pieces:
                    self.meter.feed(piece)
            self.settle("aborted")
        self.release()

    def settle(self, status: str) -> None:
        """Ends the request with this status and books it, if it has not ended yet."""
        try:
            self.book(status)
        except (*self.watcher.ledger.errors, APIError) as error:  # the watcher tries again
            log.error("%s not booked yet: %s", self.row["request_id"], type(error).__name__)

    def book(self, status: str = "pending") -> None:
        """Books what is known now, until the end is booked; then writes the log's line."""
        row, meter, times = self.row, self.meter, self.times
        ledger, running = self.watcher.ledger, self.watcher.running
        with self.lock:
            if self not in running:
                return
            if self.status == "pending":
                self.status, times["duration_ms"] = status, self._ms()
            ended = self.status != "pending"
            # Not even an estimate before the first event.
            counts = meter.counts() if ended or meter.output_seen else Counts()
            self.tokens_used = ledger.transaction(
                book, row["request_id"], self.status, counts, **times
            )
            if ended:
                running.discard(self)
                log.info(
                    f"{row['request_id']} {self.caller.username} key {row['api_key_id']} "
                    f"{row['endpoint']} {row['model']}{' stream' * self.stream} {self.status} "
                    f"{counts.prompt_tokens}+{counts.completion_tokens} tokens"
                    f"{' (estimated)' * counts.estimated}, "
                    f"first byte {times['first_byte_ms']} ms, end {times['duration_ms']} ms"
                )


LOST_ROWS = """
SELECT request_id, prompt_estimate, prompt_tokens, completion_tokens, cached_tokens, estimated
 FROM usage WHERE status = 'pending' AND lease_until < :now"""


class Watcher(threading.Thread):
    """Looks after running relays: callers who left, checkpoints, leases; and dead gates' rows."""

    def __init__(self, ledger: Ledger, upstreams: Upstreams) -> None:
        super().__init__(name="watcher", daemon=True)
        self.ledger, self.upstreams, self.stopping = ledger, upstreams, threading.Event()
        self.running: set[Relay] = set()
        self.write_log: Callable[[], object] = bool  # nothing to do, unless there is a log file

    def run(self) -> None:
        """Until stopping is set: the callers each 0.1 s, the upkeep each 2 s."""
        upkeep_at = 0.0
        while not self.stopping.wait(0.1):
            self.write_log()
            try:
                for relay in list(self.running):  # but a plain request runs to its end
                    if relay.stream and (relay.left_at or relay.gone()):
                        relay.leave()  # again, too: there may have been no connection yet
                if time.monotonic() >= upkeep_at:
                    upkeep_at = time.monotonic() + UPKEEP_S
                    self.upkeep()
            except Exception as error:  # the next round tries again
                foreseen = isinstance(error, (*self.ledger.errors, APIError))
                log.error("watcher: %s", type(error).__name__, exc_info=not foreseen)

    def upkeep(self) -> None:
        """Checkpoints and leases of what runs, what could not be booked, rows of dead gates."""
        for upstream in self.upstreams:
            for sock in upstream.take_idle():  # vLLM would close them after 5.0 s
                sock.close()
        lost = self.ledger.query(LOST_ROWS, now=int(time.time()))
        recoveries = [partial(self.recover, *row) for row in lost]
        for job in [relay.book for relay in list(self.running)] + recoveries:
            try:
                job()
            except self.ledger.driver.IntegrityError:  # so that the others still get booked
                log.exception("a row cannot be booked")
        self.ledger.checkpoint()

    def recover(self, request_id: str, prompt_estimate: int, *seen: int) -> None:
        """Closes a dead gate's row: its last checkpoint counts, at least the prompt."""
        log.warning("%s lost: its gate died", request_id)
        counts = Counts(*seen) if seen[0] else Counts(prompt_estimate, estimated=1)
        self.ledger.transaction(book, request_id, "lost", counts)


OUTPUT_FIELDS = ("max_completion_tokens", "max_tokens")
REFUSED_FIELDS = (
    "priority", "request_id", "kv_transfer_params", "vllm_xargs", "stream_interval",
    "use_beam_search", "best_of",
)  # fmt: skip
READ_FIELDS = (
    ("model", str, "the name of a model"),
    ("stream", bool | None, "true or false"),
    ("stream_options", dict | None, "an object"),
)


def whole_number(body: JSONObject, name: str, least: int, most: int | None = None) -> int | None:
    """body[name] if it is a whole number in bounds, None if it is absent or null; else 400."""
    value = body.get(name)
    if value is not None and (type(value) is not int or value < least or value > (most or value)):
        must_be = f"a whole number from {least}" + (f" to {most}" if most else " on")
        raise APIError("invalid_value", name, must_be=must_be)
    return value


def require_relayable(body: JSONObject) -> None:
    """400 naming the field that is refused, or that the gate has to read and cannot."""
    for name in REFUSED_FIELDS:
        if body.get(name) not in (None, False):
            raise APIError("unsupported_value", name)
    for name, kind, must_be in READ_FIELDS:
        if not isinstance(body.get(name), kind) or body.get(name) == "":
            raise APIError("invalid_value", name, must_be=must_be)
    options = body.get("stream_options") or {}
    for name in ("include_usage", "continuous_usage_stats"):
        if not isinstance(options.get(name), bool | None):
            raise APIError("invalid_value", "stream_options", must_be=f"{name}: true or false")


def claim_of(
    body: JSONObject, raw: bytes, endpoint: str, context: int, room: int, server: Upstream
) -> Claim:
    """The worst case of a request whose JSON is `raw`, a token being a byte or more; 400."""
    chat, prompts = endpoint == "chat/completions", body.get("prompt")
    n = whole_number(body, "n", 1, 16) or 1
    listed = isinstance(prompts, list) and prompts and not isinstance(prompts[0], int)
    several = len(cast("list[object]", prompts)) if listed else 1
    asked = [whole_number(body, name, 1 if chat else 0) for name in OUTPUT_FIELDS]
    output = max((number for number in asked if number is not None), default=context)
    output = 0 if endpoint == "embeddings" else min(output, context)
    # An image may be a short URL: only the context bounds it. (Quoted, its name has a backslash.)
    media = re.search(rb'"(image|audio|video)_url"|"input_audio"|"image_pil"|\\u00[4-7]', raw)
    prompt = max(len(raw), context if media else 0) + TEMPLATE_TOKENS
    claim = Claim(prompt, max(1, len(raw) // 4), output, n * several)
    far = claim.total(max(claim.granted(room), 0)) <= room // 16
    if far or room <= 0 or media:
        return claim
    counted = server.count_prompt(body, endpoint)
    if counted is None:  # a token is guessed to be 3 bytes
        return claim._replace(prompt=len(raw) // 3 + 1) if chat else claim
    return claim._replace(prompt=counted, prompt_estimate=max(1, counted))


def limit_output(body: JSONObject, granted: int) -> None:
    """Lowers the fields that bound the answer to what was granted; vLLM obeys them."""
    given = [name for name in OUTPUT_FIELDS if body.get(name) is not None]
    for name in given or ["max_tokens"]:
        body[name] = min(body.get(name) or granted, granted)
    if isinstance(body.get("min_tokens"), int):
        body["min_tokens"] = min(body["min_tokens"], granted)


def ask(relay: Relay, servers: list[Upstream], body: JSONObject) -> Answer:
    """The answer of the first server that is there; a stream's is to report its usage. 502, 504."""
    row, model = relay.row, body["model"]
    fewer = {**(body.get("stream_options") or {}), "include_usage": True}
    fewer.pop("continuous_usage_stats", None)
    all_options = fewer | {"continuous_usage_stats": True}
    path, headers = f"/v1/{row['endpoint']}", f"X-Request-Id: {row['request_id']}\r\n"
    for server in servers:
        known = server.continuous.get(model)
        for continuous in (True, False) if relay.stream and known is None else (known,):
            if relay.stream:
                body["stream_options"] = all_options if continuous else fewer
            data = encoded(body)
            try:
                relay.upstream, relay.sock = server, server.connect()
            except ConnectionRefusedError:
                relay.meter.asked = False
                break
            relay.meter.asked = True
            answer = server.send(relay.sock, path, data, headers)
            if relay.stream and answer.status == 200:
                server.continuous[model] = bool(continuous)
            if answer.status != 400 or known or not continuous:
                return answer
            relay.release()  # it may refuse that option
    raise APIError("upstream_unavailable")


# What OpenCode takes for a full context window, see part 2.
MISREAD = re.compile(rb"(?i)token limit exceeded|too many tokens|exceeds the limit of")


def answered(relay: Relay, answer: Answer) -> Response:
    """The answer to relay: 200 or vLLM's own 4xx; 502 for all else."""
    content_type, status = answer.headers.get("content-type", ""), answer.status
    relay.meter.asked = status < 300
    if status in (401, 403):
        raise APIError("upstream_error", why="it refuses the gate's own key, see VLLM_API_KEY")
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise APIError("upstream_error", why="it compressed its answer though asked not to")
    if status != 200 and not 400 <= status < 500:
        raise APIError("upstream_error", why="it answered with an error of its own")
    relay.pieces = relay.read(answer)
    if status == 200 and "text/event-stream" in content_type:
        relay.stream, response = True, Response(events(relay), content_type=content_type)
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"  # nginx passes each event on at once
        response.call_on_close(relay.close)  # a generator not begun would not run its finally
        return response
    body = whole(relay.pieces)
    if status == 429 and MISREAD.search(body):
        raise APIError("rate_limit_exceeded", why="vLLM takes no more requests now")
    if status == 200:
        relay.meter.output_seen, value = len(body) // 4, parsed(body)
        if not isinstance(value, dict):
            raise APIError("upstream_error", why="its answer is not a JSON object")
        relay.meter.last = read_usage(value.get("usage"))
    relay.settle("ok" if status == 200 else "error")  # before the caller has it
    # Not a stream's, which may yet be cut.
    relay.release(reuse=answer.left == 0 and answer.keeps_open and not relay.stream)
    return Response(body, status, content_type=content_type)


def events(relay: Relay) -> Iterator[bytes]:
    """vLLM's events; one error event, and no [DONE], when they break off."""
    meter = relay.meter
    try:
        for piece in relay.pieces:
            shown = meter.feed(piece)
            if meter.done:  # booked before the caller can see the end
                relay.settle("error" if meter.failed else "ok")
            if shown:
                yield shown
        if not meter.done:
            raise APIError("upstream_error", why="its answer ended too early")
    except APIError as error:
        if not meter.done and relay.left_at is None:
            relay.settle("error")
            yield b"data: " + (relay.cut_by or error).body() + b"\n\n"


# ---- 7 Routes -------------------------------------------------------------------------------------
# One Blueprint: accounts, the OpenAI side, the report, OpenCode. A view reads, calls and returns;
# what is wrong is raised.

routes = Blueprint("llmgate", __name__)


STRICT_JSON = json.JSONDecoder(parse_constant=int)  # int() refuses NaN and Infinity


def read_json() -> JSONObject:
    """The body, a JSON object; 415 for another content type, 400 for anything else."""
    if request.mimetype != "application/json":
        raise APIError("unsupported_media_type")
    with suppress(ValueError, RecursionError):
        body = STRICT_JSON.decode(request.get_data().decode())
        if isinstance(body, dict):
            return body
    raise APIError("invalid_json")


@routes.post("/auth/register")
def auth_register() -> tuple[JSONObject, int]:
    """A new account with its first API key; 403 `registration_closed`."""
    settings, body = gate().settings, read_json()
    token = utf8(body.get("registration_token"))
    invited = hmac.compare_digest(token, settings.registration_token.encode())
    if not {"open": True, "invite": invited, "closed": False}[settings.registration]:
        raise APIError("registration_closed")
    wanted = whole_number(body, "token_limit", 1) or settings.default_token_limit
    limit = min(wanted, settings.max_token_limit)
    user_id, api_key = register(body.get("username"), body.get("password"), limit)
    account = {"id": user_id, "username": body["username"], "token_limit": limit, "tokens_used": 0}
    return account | {"api_key": api_key}, 201


@routes.post("/auth/token")
def auth_token() -> JSONObject:
    """A JWT for a name and a password, by JSON or by form (RFC 6749)."""
    form = request.mimetype == "application/x-www-form-urlencoded"
    body = request.form if form else read_json()
    user_id, jwt_version, _ = log_in(body.get("username"), body.get("password"))
    return gate().keyring.jwt_answer(user_id, jwt_version)


@routes.post("/auth/refresh")
@jwt_required
def auth_refresh() -> JSONObject:
    """A new JWT for one that still works."""
    return gate().keyring.jwt_answer(g.caller.id, g.caller.jwt_version)


@routes.post("/auth/password")
@jwt_required
def auth_password() -> JSONObject:
    """A new password; every older JWT of the user stops working."""
    body = read_json()
    _, _, old_hash = log_in(g.caller.username, body.get("old_password"))
    new_hash = hash_password(body.get("new_password"), "new_password")
    sql = """UPDATE users SET password_hash = :new, jwt_version = jwt_version + 1
 WHERE id = :id AND password_hash = :old RETURNING jwt_version"""
    changed = gate().ledger.write(sql, new=new_hash, id=g.caller.id, old=old_hash)
    if not changed:  # another call was quicker
        raise APIError("invalid_credentials")
    return gate().keyring.jwt_answer(g.caller.id, changed[0][0])


@routes.get("/users/me")
@jwt_required
def users_me() -> JSONObject:
    """The account, with its first live key."""
    keys = gate().ledger.query(LIVE_KEYS, user_id=g.caller.id)
    names = ("id", "username", "token_limit", "tokens_used", "created_at")
    api_key = gate().keyring.shown(*keys[0][4:]) if keys else None
    hint = {} if api_key else {"hint": "No key to show; POST /users/me/api-key makes a new one."}
    return {name: getattr(g.caller, name) for name in names} | {"api_key": api_key} | hint


@routes.post("/users/me/api-key")
@jwt_required
def replace_key() -> JSONObject:
    """A new key in the place of the one that /users/me shows: its row, and so its usage, go on."""
    api_key, row = gate().keyring.new_key()
    row |= {"user_id": g.caller.id, "name": "default"}

    def replace_first(execute: Execute) -> None:
        execute(LOCK_USER, row)
        sql = """UPDATE api_keys SET nonce = :nonce, key_hash = :key_hash, created_at = :now,
 last_used_at = NULL WHERE id = (SELECT min(id) FROM api_keys WHERE user_id = :user_id
 AND revoked_at IS NULL)"""
        if execute(sql, row).rowcount == 0:
            execute(INSERT_KEY, row)

    gate().ledger.transaction(replace_first)
    return {"api_key": api_key}


KEY_FIELDS = ("id", "name", "created_at", "last_used_at", "tokens_used", "api_key")


@routes.get("/users/me/keys")
@jwt_required
def list_keys() -> JSONObject:
    """The keys that work; times in Unix seconds."""
    sums = """SELECT api_key_id, sum(prompt_tokens + completion_tokens) FROM usage
 WHERE user_id = :id GROUP BY api_key_id"""
    used, data = dict(gate().ledger.query(sums, id=g.caller.id)), []
    for *row, nonce, stored_hash in gate().ledger.query(LIVE_KEYS, user_id=g.caller.id):
        counted = int(used.get(row[0], 0)), gate().keyring.shown(nonce, stored_hash)
        data.append(dict(zip(KEY_FIELDS, (*row, *counted), strict=True)))
    return {"data": data}


@routes.post("/users/me/keys")
@jwt_required
def create_key() -> tuple[JSONObject, int]:
    """One more key, by name."""
    name = utf8(read_json().get("name")).decode().strip()
    if not name.isprintable() or not 1 <= len(name) <= 64:
        raise APIError("invalid_value", "name", must_be="1 to 64 printable characters")
    api_key, row = gate().keyring.new_key()
    ((key_id,),) = gate().ledger.write(INSERT_KEY, **row, user_id=g.caller.id, name=name)
    return dict(zip(KEY_FIELDS, (key_id, name, row["now"], None, 0, api_key), strict=True)), 201


@routes.delete("/users/me/keys/<int:key_id>")
@jwt_required
def revoke_key(key_id: int) -> tuple[str, int]:
    """Ends a key at once; answers that run with it go on."""
    sql = """UPDATE api_keys SET revoked_at = :now
 WHERE id = :id AND user_id = :user_id AND revoked_at IS NULL RETURNING id"""
    values = {"now": int(time.time()), "id": min(key_id, MAX_BIGINT), "user_id": g.caller.id}
    if not gate().ledger.write(sql, **values):
        raise APIError("key_not_found")
    return "", 204


@routes.get("/v1/models", defaults={"model": None})
@routes.get("/v1/models/<path:model>")
@api_key_required
def models(model: str | None) -> JSONObject:
    """The models of all servers and the aliases, or one of them."""
    shown = gate().upstreams.shown()
    if model is None:
        return {"object": "list", "data": list(shown.values())}
    if model not in shown:
        raise APIError("model_not_found", "model", model=model)
    return shown[model]


@routes.post("/v1/chat/completions", defaults={"endpoint": "chat/completions"})
@routes.post("/v1/completions", defaults={"endpoint": "completions"})
@routes.post("/v1/embeddings", defaults={"endpoint": "embeddings"})
@api_key_required
def relay_request(endpoint: str) -> Response:
    """vLLM's answer, plain or streamed, within the caller's quota."""
    app, body, caller = gate(), read_json(), g.caller
    settings, watcher = app.settings, app.watcher
    require_relayable(body)
    if app.draining:
        raise APIError("draining")
    if len(watcher.running) >= settings.threads - max(2, min(32, settings.threads // 8)):
        raise APIError("overloaded")  # some threads stay free of relays, for logins and usage
    model = body["model"] = app.upstreams.resolved(body["model"])
    if endpoint == "completions" and "max_completion_tokens" not in body:
        body.setdefault("max_tokens", 16)  # as vLLM and OpenAI do; other servers would go on
    servers = app.upstreams.route(model, watcher.running)
    context = max(context_of(server.models.get(model, {})) for server in servers)
    room = caller.token_limit - caller.tokens_used - caller.tokens_reserved
    claim = claim_of(body, request.get_data(), endpoint, context, room, servers[0])
    row = {"request_id": g.request_id, "model": model, "endpoint": endpoint}
    row["stream"] = int(body.get("stream") is True)
    granted = app.ledger.transaction(reserve, caller, claim, row, settings.max_requests_per_user)
    g.relay = relay = Relay(watcher, caller, row, Meter(claim, granted, body, context))
    watcher.running.add(relay)
    try:
        if granted < claim.output:
            limit_output(body, granted)
        response = answered(relay, ask(relay, servers, body))
    except BaseException:
        relay.settle("aborted" if relay.left_at else "error")
        relay.release()
        if relay.cut_by:
            raise relay.cut_by from None
        raise
    left = caller.token_limit - max(relay.tokens_used, caller.tokens_used)
    response.headers["x-ratelimit-limit-tokens"] = str(caller.token_limit)
    response.headers["x-ratelimit-remaining-tokens"] = str(max(0, left))
    return response


@routes.get("/users/usage")
@jwt_or_api_key_required
def users_usage() -> JSONObject | Response:
    """The report, as JSON or, with Accept: text/plain, drawn."""
    days = request.args.get("days", "30")
    if days not in map(str, range(1, 367)):
        raise APIError("invalid_value", "days", must_be="a whole number from 1 to 366")
    report = usage_report(gate().ledger, g.caller, int(days))
    if request.accept_mimetypes.best_match(["application/json", "text/plain"]) == "text/plain":
        return Response(drawn_usage(g.caller.username, report), mimetype="text/plain")
    return report


@routes.get("/health")
def health() -> JSONObject:
    """200 once the database answers."""
    gate().ledger.query("SELECT 1")
    return {"status": "ok"}


def bar(part: int, whole: int, width: int) -> str:
    """`width` characters, filled by part / whole."""
    filled = min(width, -(-part * width // max(whole, 1)))
    return "█" * filled + "░" * (width - filled)


def drawn_usage(username: str, report: JSONObject) -> str:
    """A usage report in 80 columns."""
    used, limit = report["tokens_used"], report["token_limit"]
    lines = [f"{username}: {used:,} of {limit:,} tokens used, {report['remaining']:,} left"]
    lines.append(f"{bar(used, limit, 72)} {100 * used // limit:>5} %")
    for by, name in (("by_day", "date"), ("by_model", "model"), ("by_key", "key")):
        lines += ["", f"{name:<28} {'requests':>9} {'prompt':>12} {'completion':>12}"]
        rows = [(str(row[name])[:28], *(row[column] for column in SUMS)) for row in report[by]]
        most = max((prompt + completion for *_, prompt, completion in rows), default=0)
        for group, count, prompt, completion in rows:
            drawn = bar(prompt + completion, most, 14)
            lines.append(f"{group:<28} {count:>9,} {prompt:>12,} {completion:>12,} {drawn}")
    return "\n".join(lines) + "\n"


def opencode_config() -> JSONObject:
    """OpenCode's configuration for this gate; 502 while no server is up."""
    upstreams, models = gate().upstreams, {}
    for name in upstreams.shown():
        real = upstreams.resolved(name)  # as `id`: OpenCode's repairs for some models go by it
        context = context_of(upstreams.models().get(real, {}))
        limit = {"context": context, "output": min(context // 4, 32000)}
        models[name] = {"id": real, "name": name, "tool_call": True, "limit": limit}
    default = next((alias for alias in upstreams.aliases if alias in models), next(iter(models)))
    options = {"baseURL": f"{request.host_url}v1", "apiKey": "{env:LLMGATE_API_KEY}"}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "llmgate", "options": options}
    config = dict.fromkeys(("model", "small_model"), f"llmgate/{default}")
    config["$schema"] = "https://opencode.ai/config.json"
    return {**config, "provider": {"llmgate": {**provider, "models": models}}}


@routes.get("/opencode.json")
@api_key_required
def opencode_json() -> JSONObject:
    """A complete opencode.json for this gate."""
    return opencode_config()


@routes.get("/.well-known/opencode")
def well_known_opencode() -> JSONObject:
    """What `opencode auth login URL` reads, without a key; 404 if OPENCODE_DISCOVERY is off."""
    if gate().settings.opencode_discovery == "off":
        raise APIError("not_found")
    ask = 'printf "llmgate API key: "; stty -echo; read -r LLMGATE_API_KEY; stty echo; echo'
    ask = f'if [ -z "$LLMGATE_API_KEY" ]; then {{ {ask}; }} < /dev/tty > /dev/tty; fi'
    command = ["sh", "-c", f'{ask}; printf %s "$LLMGATE_API_KEY"']
    return {"auth": {"command": command, "env": "LLMGATE_API_KEY"}, "config": opencode_config()}


@routes.before_app_request
def begin_request() -> None:
    """When the request began, and its id."""
    g.started, g.request_id = time.monotonic(), f"{random.getrandbits(128):032x}"


@routes.after_app_request
def end_request(response: Response) -> Response:
    """The headers of every answer; the log line of those that were not relayed."""
    response.headers["X-Request-Id"] = g.request_id
    response.headers.setdefault("Cache-Control", "no-store")
    if "relay" not in g:
        name, ms = getattr(g.get("caller"), "username", "-"), (time.monotonic() - g.started) * 1000
        what = f"{request.method} {quote(request.path)} {response.status_code}"
        log.info("%s %s %s, end %d ms", g.request_id, name, what, ms)
    return response


# ---- 8 App, server, command line ------------------------------------------------------------------
# Gate joins the parts; Server runs it under waitress and ends without losing a row; the operator's
# commands work beside a running gate.


def load_secret(settings: Settings, ledger: Ledger) -> str:
    """The secret, from the settings or its 0600 file, made on first start; SettingsError."""
    if settings.jwt_secret_key:
        return settings.jwt_secret_key
    path = Path(SECRET_FILE)
    if not path.exists() and ledger.query("SELECT id FROM users LIMIT 1"):
        why = "bring it back, or let all users make new keys after: openssl rand -hex 32"
        raise SettingsError(f"{SECRET_FILE} is missing, but there are users: {why} > {SECRET_FILE}")
    with suppress(FileExistsError):
        path.touch(0o600, exist_ok=False)
        path.write_text(secrets.token_hex(32))
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
        log.warning("%s was open to other users of this machine; repaired", SECRET_FILE)
    secret = path.read_text(errors="replace").strip()
    if len(secret) < 32 or "\N{REPLACEMENT CHARACTER}" in secret:
        raise SettingsError(f"{SECRET_FILE} must hold 32 bytes or more: openssl rand -hex 32")
    return secret


POSTGRESQL_OPTIONS = {  # libpq's: a host that vanishes is noticed within seconds, too
    "connect_timeout": DB_TIMEOUT_S, "tcp_user_timeout": DB_TIMEOUT_S * 1000,
    "keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 2,
}  # fmt: skip


class Gate(Flask):
    """The WSGI application; makes the tables and the secret where they are missing."""

    draining = False

    def __init__(self, settings: Settings) -> None:
        super().__init__("llmgate", static_folder=None)
        self.url_map.merge_slashes = False  # or /v1//models would be answered by a redirect
        cast(Any, self.json).sort_keys = False
        options: JSONObject = {"hide_parameters": True}  # or an error would log password hashes
        if settings.database_url.startswith("postgresql"):
            options |= {"pool_size": 16, "max_overflow": 48, "pool_timeout": DB_TIMEOUT_S}
            options |= {"pool_pre_ping": True, "connect_args": POSTGRESQL_OPTIONS}
        else:  # the ledger keeps connections; a transaction begins where we say
            connect_args: JSONObject = {"isolation_level": None, "check_same_thread": False}
            connect_args["timeout"] = DB_TIMEOUT_S
            options |= {"poolclass": sa.NullPool, "connect_args": connect_args}
        self.config["SQLALCHEMY_DATABASE_URI"] = settings.database_url
        self.config["SQLALCHEMY_ENGINE_OPTIONS"] = options
        self.config["TRUSTED_HOSTS"] = list(settings.allowed_hosts) or None
        self.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
        try:
            db.init_app(self)
        except (ImportError, ValueError, sa.exc.ArgumentError):
            why = "a database's URL; PostgreSQL's also needs: pip install 'psycopg[binary]'"
            raise SettingsError(f"DATABASE_URL must be {why}") from None
        self.register_blueprint(routes)
        self.register_error_handler(Exception, show_error)
        with self.app_context():
            self.settings, self.ledger = settings, Ledger(db.engine, settings.processes > 1)
        self.ledger.create_tables()
        self.keyring = Keyring(load_secret(settings, self.ledger), settings.jwt_expiration_hours)
        self.throttle, self.upstreams = Throttle(), Upstreams(settings)
        self.watcher = Watcher(self.ledger, self.upstreams)
        newest = "SELECT nonce, key_hash FROM api_keys ORDER BY id DESC LIMIT 1"
        if any(self.keyring.shown(*key) is None for key in self.ledger.query(newest)):
            log.warning("Another secret made the newest key: do all gates have one JWT_SECRET_KEY?")


class LineFormatter(logging.Formatter):
    """One line per record, without control characters, keys and JWTs."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line; what could begin another one is escaped."""
        line = re.sub(r"(sk-llmgate-|eyJ)[\w.-]+", r"\1...", super().formatMessage(record))
        return line if line.isprintable() else line.encode("unicode_escape").decode()


class LogFile(logging.handlers.RotatingFileHandler):
    """server.log, with five old ones of 10 MB. The watcher writes the lines out, by flush()."""

    def emit(self, record: logging.LogRecord) -> None:
        """Adds a line, which costs a caller no wait for the disk."""
        with suppress(OSError, ValueError):
            if not self.stream or self.stream.closed:  # it could not be opened when it was full
                self.stream = self._open()
            self.stream.write(self.format(record) + "\n")

    def flush(self) -> None:
        """Writes out what there is; on a full disk it is lost."""
        with suppress(OSError, ValueError), self.lock or nullcontext():
            super().flush()
            if self.stream and self.stream.tell() >= self.maxBytes:
                self.doRollover()


class JSONErrorTask(waitress.task.ErrorTask):
    """waitress's own refusals (a body or headers too large, no HTTP) in the contract's shape."""

    def execute(self) -> None:
        """Writes the error and closes the connection."""
        error = APIError(CODES.get(self.request.error.code, "bad_request"))
        status = f"{error.status} {http.client.responses[error.status]}"
        headers = [("Content-Type", "application/json"), ("X-Request-Id", secrets.token_hex(16))]
        self.request.error.to_response = lambda _: (status, headers, error.body())
        super().execute()


class Parser(waitress.parser.HTTPRequestParser):
    """A request; what cannot be its target is refused as waitress refuses all else."""

    def parse_header(self, header_plus: bytes) -> None:
        """Reads the request's head; waitress lets urlsplit's ValueError end the connection."""
        try:
            super().parse_header(header_plus)
        except ValueError:
            raise waitress.parser.ParsingError("Bad URI") from None


class Task(waitress.task.WSGITask):
    """An answer whose headers leave together with the first bytes of its body."""

    def build_response_header(self) -> bytes:
        """Leaves them with the channel, and gives waitress nothing to send yet."""
        self.channel.head = super().build_response_header()
        return b""

    def finish(self) -> None:
        """Ends the answer; sends the headers of one that has no body."""
        super().finish()
        self.channel.send_now(b"")


class Channel(waitress.channel.HTTPChannel):
    """A connection whose errors are JSON, and whose bytes leave at once."""

    task_class, error_task_class, parser_class, head = Task, JSONErrorTask, Parser, b""

    def write_soon(self, data: bytes) -> int:
        """Sends an answer's next bytes, if there are any: its headers wait for them."""
        return self.send_now(data) if data else 0

    def send_now(self, data: bytes) -> int:
        """Sends what the kernel takes; only the rest goes through waitress's buffers."""
        unsent, self.head = self.head + data, b""
        with self.outbuf_lock:
            if self.connected and unsent and not self.total_outbufs_len:
                with suppress(OSError):  # write_soon() meets it again, if it lasts
                    unsent = unsent[self.socket.send(unsent) :]
                    self.last_activity = time.time()
            super().write_soon(unsent)
        return len(data)

    def check_client_disconnected(self) -> bool:
        """Whether the caller has hung up; waitress itself does not look while a request runs."""
        poll = select.poll()
        with suppress(TypeError, ValueError):  # closed
            poll.register(self.socket, select.POLLRDHUP)
            return not self.connected or bool(poll.poll(0))
        return True


class Dispatcher(waitress.task.ThreadedTaskDispatcher):
    """Starts a thread when all others work; waitress would start them all, each with its memory."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.most = threads

    def add_task(self, task: object) -> None:
        """Gives a connection's requests to a thread that waits, or to a new one."""
        with self.lock:
            self.queue.append(task)
            number = len(self.threads)
            if len(self.queue) > number - self.active_count and number < self.most:
                with suppress(RuntimeError):  # the system has no more: wait for one of ours
                    self.start_new_thread(self.handler_thread, number)
                    self.threads.add(number)
                    self.active_count += 1
                    return
            self.queue_cv.notify()


WAITRESS: JSONObject = {
    "connection_limit": 4000,
    "max_request_header_size": 65536,
    "outbuf_high_watermark": 1 << 20,  # what a slow reader may leave unread
    "ident": None,
    "clear_untrusted_proxy_headers": False,  # nobody reads them
}


def bind(settings: Settings) -> socket.socket:
    """The listening socket; SettingsError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise SettingsError(f"HOST and PORT must be free: {error.strerror}") from None
    # Gives up a caller who never reads.
    timeout_ms = settings.upstream_timeout * 1000
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
    return listening


class Server:
    """One gate on a bound socket: serving in run(), ended by drain() from any thread."""

    def __init__(self, settings: Settings, listening: socket.socket) -> None:
        self.handler: logging.Handler = logging.StreamHandler()
        if settings.log_file != "-":
            try:
                self.handler = LogFile(settings.log_file, "a", 10 << 20, 5, encoding="utf-8")
            except OSError as error:
                raise SettingsError(f"LOG_FILE must be writable: {error.strerror}") from None
        self.handler.setFormatter(LineFormatter("%(asctime)s %(levelname).1s %(message)s"))
        logging.raiseExceptions = False  # or a full disk would bring each line to standard error
        log.addHandler(self.handler)
        log.setLevel(logging.INFO)
        self.app = Gate(settings)
        if isinstance(self.handler, LogFile):
            self.app.watcher.write_log = self.handler.flush
        host, port = listening.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        options = WAITRESS | {"_dispatcher": Dispatcher(settings.threads), "sockets": [listening]}
        options["max_request_body_size"] = settings.max_body_mb << 20
        if settings.trusted_proxy:
            names = {f"x-forwarded-{name}" for name in ("for", "host", "proto", "port")}
            options |= {"trusted_proxy": settings.trusted_proxy, "trusted_proxy_headers": names}
        self.sockets: dict[int, Any] = {}  # waitress's loop runs while it has any
        self.waitress = waitress.server.create_server(self.app, self.sockets, **options)
        self.waitress.channel_class = Channel

    def run(self) -> None:
        """Serves until drain() has ended it and all is booked."""
        watcher = self.app.watcher
        watcher.start()
        pool = self.waitress.task_dispatcher
        while self.sockets:
            before = len(self.sockets)
            # Not select(), which ends the process at descriptor 1024.
            waitress.wasyncore.poll2(1, self.sockets)
            # A turn looks at all connections: let several get ready, but accept new ones at once.
            if pool.active_count > 8 and len(self.sockets) <= before:
                time.sleep(0.001)
        self.drainer.join()  # it may still be pulling the trigger that is closed now
        self.waitress.task_dispatcher.shutdown()
        self.waitress.asyncore.close_all(self.waitress.active_channels)
        self.waitress.close()
        watcher.stopping.set()
        watcher.join()
        with suppress(APIError, *watcher.ledger.errors):
            watcher.upkeep()
        watcher.ledger.close()
        log.removeHandler(self.handler)
        with suppress(OSError):  # a full disk
            self.handler.close()

    def drain(self, grace_s: float = 30) -> None:
        """Refuses new relays from now on, breaks off the running ones after `grace_s`, then stops."""
        self.app.draining = True
        self.drainer = threading.Thread(target=self._drain, args=(grace_s,), name="drain")
        self.drainer.start()

    def _drain(self, grace_s: float) -> None:
        """The rest of drain(), beside waitress, which goes on serving meanwhile."""
        running, channels = self.app.watcher.running, self.waitress.active_channels
        wait_until(lambda: not running, grace_s)
        for relay in list(running):
            relay.cut_by = APIError("draining")
            relay.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: not running, 5)
        for relay in list(running):  # its caller does not read, or vLLM is not even reached
            relay.settle("error")
        wait_until(
            lambda: not any(c.requests or c.total_outbufs_len for c in [*channels.values()]), 2
        )
        self.waitress.trigger.pull_trigger(self.sockets.clear)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Polls until the condition holds or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}


def forked(count: int) -> int:
    """Returns 1, 2, ... in as many new processes; looks after them here: a dead one is replaced.

    They share what is open, the listening socket, so nothing else may be: no thread, no database.
    SIGNALS are blocked from here on: sigwait() takes them, a new process when it has its handlers.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    missing, running, ending = list(range(1, count + 1)), dict[int, int](), False
    while missing or running:
        while missing:
            if not (pid := os.fork()):
                import ctypes  # a megabyte that only several processes need

                ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: end with the parent
                return missing[0]
            running[pid] = missing.pop(0)
        if signal.sigwait(SIGNALS) != signal.SIGCHLD:
            ending = True
            for pid in running:
                os.kill(pid, signal.SIGTERM)
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            number, code = running.pop(ended[0]), os.waitstatus_to_exitcode(ended[1])
            if code == 2 and not ending:  # a setting is wrong
                ending = True
                os.kill(os.getpid(), signal.SIGTERM)
            elif not ending:
                click.echo(f"Process {number} ended ({code}); starting another.", err=True)
                time.sleep(1)
                missing.append(number)
    sys.exit(code)


def serve(settings: Settings) -> None:
    """Runs the gate until SIGTERM or Ctrl-C; a second signal stops it at once."""
    listening, number = bind(settings), 1
    if settings.processes > 1:
        Gate(settings).ledger.close()  # makes the tables and the secret, while nobody else does
        number = forked(settings.processes)
    if number > 1 and settings.log_file != "-":
        path = Path(settings.log_file)
        settings = replace(settings, log_file=str(path.with_stem(f"{path.stem}-{number}")))
    server = Server(settings, listening)
    server.app.ledger.checkpoints &= number == 1

    def end(*_: object) -> None:
        if server.app.draining:
            os._exit(1)
        if number == 1:
            click.echo("Waiting up to 30 s for running answers; once more to stop now.", err=True)
        server.drain()

    signal.signal(signal.SIGTERM, end)
    # A terminal's Ctrl-C reaches all processes, and the first one passes it on.
    signal.signal(signal.SIGINT, end if settings.processes == 1 else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # 1024 would be too few for 500 relays
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536), most))
    if number == 1:
        click.echo(banner(server))
    gc.freeze()  # what is there now stays: the collector need not look at it again
    gc.set_threshold(20000)  # requests leave no cycles behind but for tracebacks
    server.run()


def banner(server: Server) -> str:
    """The first lines: where the gate is, what it found, what to type next."""
    app = server.app
    urls = ", ".join(upstream.url for upstream in app.upstreams)
    start_one = f"none yet at {urls}\n          start one: vllm serve MODEL --port 8001"
    invitation = ',"registration_token":"…"' * (app.settings.registration == "invite")
    to_register = f"""curl {server.url}/auth/register -H 'Content-Type: application/json' \\
          -d '{{"username":"alice","password":"correct horse"{invitation}}}'"""
    if app.settings.registration == "closed":
        to_register = "closed; make accounts with: python llmgate.py create-user NAME"
    return f"""llmgate   {server.url}
models    {", ".join(app.upstreams.models()) or start_one}
database  {app.ledger.engine.url}
register  {to_register}"""


@click.group(invoke_without_command=True)
@click.pass_context
def cli(context: click.Context) -> None:
    """User accounts, API keys and token quotas in front of a vLLM server.

    Without a command: serves. Settings are environment variables or lines in .env; .env.example
    lists them. Every command works while the gate runs.
    """
    if "--help" in sys.argv:  # help makes no database
        return
    try:
        from_file = {name: value or "" for name, value in dotenv_values(".env").items()}
    except UnicodeDecodeError:
        raise SettingsError(".env must be a text file in UTF-8") from None
    settings = Settings.from_env(from_file | os.environ)
    if context.invoked_subcommand is None:
        serve(settings)
    else:
        context.with_resource(Gate(settings).app_context())


NAME = click.argument("name")
NAME_OR_ALL = click.argument("name", required=False)
TOKENS = click.IntRange(1, MAX_BIGINT)


def accounts(name: str | None) -> list[Caller]:
    """The account of a name, or all of them; a click error if nobody has the name."""
    everyone = gate().ledger.query(CALLER + "ON k.id = 0 ORDER BY u.id")
    found = [Caller(*row) for row in everyone if name is None or row[1].lower() == name.lower()]
    if name and not found:
        raise click.ClickException(f"There is no user {name!r}; see: python llmgate.py users")
    return found


def update(name: str, said: str, assignments: str, value: object) -> None:
    """UPDATEs an account's row by these SQL assignments of :value, and says so."""
    (user,) = accounts(name)
    sql = f"UPDATE users SET {assignments} WHERE id = :id RETURNING id"
    gate().ledger.write(sql, value=value, id=user.id)
    click.echo(f"{user.username} {said}.")


def asked_password() -> str:
    """A password typed twice, or the first line of standard input."""
    if sys.stdin.isatty():
        return str(click.prompt("Password", hide_input=True, confirmation_prompt=True))
    return sys.stdin.readline().rstrip("\n")


@cli.command()
def create_tables() -> None:
    """Make the tables and the secret where they are missing."""
    click.echo("The tables are there.")


@cli.command()
@NAME
@click.option("--token-limit", type=TOKENS, help="The quota, in tokens.")
def create_user(name: str, token_limit: int | None) -> None:
    """Make an account (password asked, or on stdin); print its key."""
    limit = token_limit or gate().settings.default_token_limit
    click.echo(register(name, asked_password(), limit)[1])


@cli.command()
def users() -> None:
    """List all accounts with their quotas."""
    click.echo(f"{'id':>5} {'username':<24} {'used':>13} {'limit':>13}")
    for user in accounts(None):
        used, limit = user.tokens_used, user.token_limit
        drawn = bar(used, limit, 12) + (" disabled" if user.disabled_at else "")
        click.echo(f"{user.id:>5} {user.username[:24]:<24} {used:>13,} {limit:>13,} {drawn}")


@cli.command()
@NAME_OR_ALL
@click.option("--days", type=click.IntRange(1, 366), default=30, show_default=True)
def usage(name: str | None, days: int) -> None:
    """Draw the usage of one account, or of all."""
    for user in accounts(name):
        click.echo(drawn_usage(user.username, usage_report(gate().ledger, user, days)))


@cli.command()
@NAME
@click.argument("token_limit", type=TOKENS)
def set_limit(name: str, token_limit: int) -> None:
    """Set the quota of an account, in tokens."""
    update(name, f"may use {token_limit:,} tokens", "token_limit = :value", token_limit)


@cli.command()
@NAME
def disable(name: str) -> None:
    """Refuse an account's keys and logins from now on."""
    update(name, "is disabled", "disabled_at = :value", int(time.time()))


@cli.command()
@NAME
def enable(name: str) -> None:
    """Let a disabled account in again, with the same keys."""
    update(name, "is enabled", "disabled_at = :value", None)


@cli.command("reset-usage")
@NAME_OR_ALL
@click.option("--all", "everyone", is_flag=True, help="All accounts.")
def reset_usage_command(name: str | None, everyone: bool) -> None:
    """Set the used tokens to 0; the rows stay, balanced by one more."""
    if bool(name) == everyone:
        raise click.UsageError("Give a NAME, or --all.")
    for user in accounts(name):
        gate().ledger.transaction(reset_usage, user.id)
        click.echo(f"{user.username} begins again at 0 tokens.")


@cli.command()
@NAME
def set_password(name: str) -> None:
    """Set a password (asked, or on stdin) and end the account's JWTs."""
    accounts(name)  # or a password would be asked for nobody
    hashed = hash_password(asked_password())
    assignments = "password_hash = :value, jwt_version = jwt_version + 1"
    update(name, "has a new password", assignments, hashed)


@cli.command()
def check() -> None:
    """Recount tokens_used from the rows; say what differs (exit status 1)."""
    sums = """
SELECT username, tokens_used, coalesce(sum(r.prompt_tokens + r.completion_tokens), 0),
 tokens_reserved, coalesce(sum(r.reserved), 0) FROM users u LEFT JOIN usage r ON r.user_id = u.id
 GROUP BY u.id ORDER BY u.id"""
    rows = [r for r in gate().ledger.query(sums) if r[1] != r[2] or r[3] != r[4]]
    for row in rows:
        click.echo("{}: {} used, rows say {}; {} reserved, rows say {}".format(*row))
    click.echo(f"{len(rows)} accounts differ from their rows.")
    sys.exit(bool(rows))


def main() -> None:
    """The command line; what the operator can mend is one line and exit status 2."""
    os.umask(0o077)  # database, -wal, -shm, log and secret are the gate's alone
    cast(Any, sys.stdout).reconfigure(errors="replace")  # a terminal may know no bars
    try:
        cli()
    except (SettingsError, APIError, OSError) as error:
        click.echo(f"llmgate: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
