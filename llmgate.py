"""llmgate: user accounts, API keys and token quotas in front of a vLLM server.

    python llmgate.py                    serve on http://127.0.0.1:8000
    python llmgate.py create-user NAME   make an account, print its API key
    python llmgate.py --help             all commands; README.md has the settings

caller -> waitress thread -> API key -> reserve the worst case -> vLLM
   ^                                                                |
   +---- bytes as they arrive <--- relay <--- meter <---------------+ at the end: book its count

A watcher thread looks after running relays. Each part of the file uses only the parts above it.
"""

# waitress has no types: what comes from it is Any.
# mypy: disable-error-code="import-untyped, misc"
from __future__ import annotations

import ctypes
import difflib
import hashlib
import hmac
import http.client
import io
import json
import logging.handlers
import math
import multiprocessing
import os
import re
import resource
import secrets
import select
import signal
import socket
import sqlite3
import ssl
import string
import sys
import threading
import time
import traceback
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import quote, urlsplit

import bcrypt
import click
import jwt
import requests
import sqlalchemy as sa
import waitress
from dotenv.parser import parse_stream
from flask import Blueprint, Flask, Response, current_app, g, request
from flask_sqlalchemy import SQLAlchemy
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.task import ErrorTask
from waitress.wasyncore import close_all, loop
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.proxy_fix import ProxyFix

JSONObject = dict[str, Any]
Row = Any  # a named tuple of a query's columns
Execute = Callable[..., list[Row]]  # (sql with :names, {name: value}) -> its rows

VERSION = "1.0.0"
LEASE_S = 20  # a pending row whose gate has not renewed it for so long is taken for dead
UPKEEP_S = 2  # between two rounds of checkpoints, leases and recovery
PING_S = 15.0  # of silence, after which a stream's caller gets a comment
DB_TIMEOUT_S = 5  # waiting for a database that others have locked, or that is away
CONNECT_TIMEOUT_S = 2
ABORT_GRACE_S = 2.0  # for vLLM to end a request that it was told to abort
HANGUP_GRACE_S = 0.6  # for vLLM to notice that its caller has gone, and to send its counts
MODELS_TTL_S = 10  # after which the lists of models are fetched anew
JWT_LEEWAY_S = 10  # how far the clocks of two gates may differ
MAX_EVENT_BYTES = 16 << 20  # the last one of responses holds all of the answer
MAX_ACCOUNT_BODY_BYTES = 64 << 10  # of /auth and /users
MAX_JSON_VALUES = 1_000_000  # commas and brackets of a body: each value takes some 100 bytes
MAX_KEYS = 100  # live ones of a user
MAX_BIGINT = 2**63 - 1
TEMPLATE_TOKENS = 256  # what a chat template may add beyond the bytes of the JSON around it
PICTURE_TOKENS = 16384  # the most that a common model makes of one picture (Qwen-VL)
PICTURE_ESTIMATE = 1000  # what most models make of it
MAX_COUNTED_PROMPTS = 2048  # of one request, near the limit; OpenAI takes no more of embeddings
UNKNOWN_CONTEXT = 131072  # tokens, for a model whose server does not tell
SILENT_TOKENS_PER_S = 20  # the guess for a vLLM that has begun but shows nothing
LOCAL_PORTS = (8001, 8000, 11434, 8080, 9931, 1234, 30000)  # vLLM, Ollama, llama.cpp, ...
SECRET_FILE = "llmgate.secret"

CORES = os.sched_getaffinity(0)  # that this process may use

log = logging.getLogger("llmgate")


def run_on(cores: set[int]) -> None:
    """Lets this thread, and those that it starts, run on these cores only."""
    with suppress(OSError):  # where that is forbidden
        os.sched_setaffinity(0, cores)


# ---- 1 Settings -----------------------------------------------------------------------------------
# The environment, read once. What cannot be right stops the start with one line that names the
# variable, and never shows its value: it may be a secret in the wrong place.

PORT = r":([1-5]?\d{1,4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])"
HOST = rf"(?a:(\[(?=.*:.*:)[0-9A-Fa-f:.]+\]|[\w-]+(?:\.[\w-]+)*\.?)({PORT})?)"
ADDRESS = r"(\d+(\.\d+){3}|(?=.*:.*:)[0-9A-Fa-f:.]+)?"
URL = rf"https?://{HOST}(/[^?#\s]*)?"
DATABASE = (r"sqlite:///[^?]*[^?/]|postgresql\+psycopg://.+", "sqlite:/// or postgresql+psycopg://")
COUNT = range(1, MAX_BIGINT + 1)
SECRET_SETTINGS = ("JWT_SECRET_KEY", "VLLM_API_KEY", "REGISTRATION_TOKEN", "DATABASE_URL")


class SettingsError(click.ClickException):
    """One line for the operator: which variable is wrong, and what it must be."""

    exit_code = 2  # another start would not mend it


def setting(default: str, rule: str | range = ".*", must_be: str = "printable UTF-8") -> Any:
    """A field: its variable's default, the pattern or range it must be in, and that in words."""
    return field(metadata={"default": default, "rule": rule, "must_be": must_be})


@dataclass(frozen=True)
class Settings:
    """All settings; each field is read from the variable of its name in upper case."""

    vllm_endpoint: tuple[str, ...] = setting("", URL, "a URL like http://127.0.0.1:8001")
    vllm_api_key: str = setting("", "[!-~]*", "printable ASCII")  # the gate's own key for vLLM
    host: str = setting("127.0.0.1")
    port: int = setting("8000", range(65536))  # 0: the kernel chooses
    database_url: str = setting("sqlite:///llmgate.db", *DATABASE)
    jwt_secret_key: str = setting("", "|.{32,}", "32 bytes or more: openssl rand -hex 32")
    jwt_expiration_hours: int = setting("24", range(1, 87601))
    default_token_limit: int = setting("1000000", COUNT)
    max_token_limit: int = setting("", COUNT)  # DEFAULT_TOKEN_LIMIT if not set
    quota_period: str = setting("never", "never|day|week|month", "never, day, week or month")
    public_url: str = setting("", f"({URL})?", "a URL like https://example.org/llm")
    registration: str = setting("", "(open|closed|invite)?", "open, closed or invite")
    registration_token: str = setting("")
    model_aliases: Mapping[str, str] = setting("llm-user-managed=", "[^=]+=[^=]*", "alias=model")
    log_file: str = setting("server.log")  # "-": standard error only
    threads: int = setting("288", range(4, 10001))  # a running relay holds one
    processes: int = setting("1", range(1, 65))  # each with THREADS, on one port
    max_requests_per_user: int = setting("16", COUNT)  # relays at a time
    upstream_timeout: int = setting("600", range(1, 86401))  # seconds without a byte from vLLM
    max_body_mb: int = setting("32", range(1, 1025))
    trusted_proxy: str = setting("", ADDRESS, "an address")  # whose X-Forwarded-* counts
    opencode_discovery: str = setting("on", "on|off", "on or off")
    allowed_hosts: tuple[str, ...] = setting("", HOST, "a name or [IPv6]")  # in Host; (): any

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """Settings from variables; SettingsError names the first one that cannot be right."""
        values: JSONObject = {}
        for item in fields(cls):
            name = item.name.upper()
            rule = item.metadata["rule"]
            must_be = item.metadata["must_be"]
            value: Any = env.get(name, "").strip() or item.metadata["default"]
            if name == "MAX_TOKEN_LIMIT" and not value:
                value = str(values["default_token_limit"])
            if isinstance(rule, range):
                value = int(value) if re.fullmatch("[0-9]{1,19}", value) else -1
                right = value in rule
                must_be = f"a whole number from {rule[0]} to {rule[-1]}"
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
        complete_settings(values)
        return cls(**values)


def complete_settings(values: JSONObject) -> None:
    """Puts in what follows from other settings; SettingsError where two do not fit."""
    if values["registration"] == "invite" and not values["registration_token"]:
        raise SettingsError("REGISTRATION_TOKEN must be set when REGISTRATION is invite")
    if values["default_token_limit"] > values["max_token_limit"]:
        raise SettingsError("DEFAULT_TOKEN_LIMIT must be MAX_TOKEN_LIMIT or less")
    try:
        url = sa.make_url(values["database_url"])
    except (ValueError, sa.exc.ArgumentError):
        raise SettingsError("DATABASE_URL must be a database's URL") from None
    if url.drivername == "sqlite":
        path = Path(url.database or "").absolute()
        if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
            raise SettingsError("DATABASE_URL must name a file in a folder that one may write to")
        # Flask-SQLAlchemy would look for it elsewhere.
        values["database_url"] = url.set(database=str(path)).render_as_string()
    elif not values["jwt_secret_key"]:
        raise SettingsError("JWT_SECRET_KEY must be set beside PostgreSQL, alike for all gates")
    values["host"] = values["host"].strip("[]")
    local = re.fullmatch(r"localhost|::1|127\..*", values["host"])
    values["registration"] = values["registration"] or ("open" if local else "closed")
    hosts = values["allowed_hosts"]
    if local and not hosts:
        public_host = urlsplit(values["public_url"]).netloc
        hosts = ("localhost", "127.0.0.1", "[::1]", values["host"], public_host)
    values["allowed_hosts"] = tuple(map(host_name, hosts))
    values["vllm_endpoint"] = tuple(re.sub("(/v1)?/*$", "", url) for url in values["vllm_endpoint"])
    values["model_aliases"] = dict(re.split(r"\s*=\s*", pair) for pair in values["model_aliases"])
    values["public_url"] = values["public_url"].rstrip("/")


def host_name(host: str) -> str:
    """A host as it is compared: in lower case, without a port; "" for what is no host."""
    found = re.fullmatch(HOST, host)
    return found[1].lower() if found else ""


def read_dotenv(path: Path) -> dict[str, str]:
    """The variables of .env; SettingsError for a misspelt name; hides a file that has secrets."""
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError):
        raise SettingsError(".env must be a text file in UTF-8 that the gate may read") from None
    known = [item.name.upper() for item in fields(Settings)]
    found: dict[str, str] = {}
    for line in parse_stream(io.StringIO(text)):  # dotenv_values() would pass over errors
        name = line.key or ""
        if line.error or (name in known and line.value is None):
            number = line.original.line
            raise SettingsError(f"Line {number} of .env must be written as NAME=value")
        if name:
            found[name] = line.value or ""
        near = difflib.get_close_matches(name.upper(), known, 1, cutoff=0.8)
        if near and name not in known and not name.startswith("LLMGATE_"):
            raise SettingsError(f"{name} in .env is no setting; did you mean {near[0]}?")
    if any(found.get(name) for name in SECRET_SETTINGS):
        make_private(path)
    return found


def make_private(path: Path) -> None:
    """Takes a file with a secret out of the sight of other users of this machine."""
    if path.stat().st_mode & 0o077:
        log.warning("%s was open to other users of this machine; its mode should be 0600", path)
        with suppress(OSError):  # it is another user's
            path.chmod(0o600)


# ---- 2 Errors -------------------------------------------------------------------------------------
# One exception and one shape, OpenAI's: {"error": {"message", "type", "param", "code"}}; Anthropic's
# on /v1/messages. No text has "token limit exceeded", "too many tokens" or "exceeds the limit of":
# OpenCode takes these for a full context window, and starts to compact.

ERRORS = {  # code: (status, message)
    "bad_request": (400, "This is not a request that the gate can read."),
    "host_not_allowed": (400, "The operator's ALLOWED_HOSTS does not have this Host."),
    "invalid_value": (400, "{param} must be {must_be}."),
    "invalid_json": (400, "The body must be a JSON object, and valid JSON."),
    "unsupported_value": (400, "This gate does not accept {param}."),
    "too_many_keys": (400, "You have 100 keys, the most there can be; revoke one first."),
    "missing_api_key": (401, "Send 'Authorization: Bearer KEY'; for an account: 'Bearer JWT'."),
    "invalid_api_key": (401, "This API key is not valid; GET /users/me shows the right one."),
    "invalid_token": (401, "This JWT is not valid; log in again at /auth/token."),
    "token_expired": (401, "This JWT has expired; log in again at /auth/token."),
    "invalid_credentials": (401, "Wrong username or password."),
    "registration_closed": (403, "{why}."),
    "account_disabled": (403, "This account is disabled; ask the operator."),
    "not_found": (404, "There is nothing at this path; {hint}."),
    "model_not_found": (404, "No model {model!r} here; GET /v1/models lists them."),
    "key_not_found": (404, "No key has this id; the list of keys shows them."),
    "method_not_allowed": (405, "This path takes other methods; see the header Allow."),
    "username_taken": (409, "This username is taken; choose another."),
    "request_too_large": (413, "The body is larger than this gate accepts."),
    "unsupported_media_type": (415, "Send plain JSON with 'Content-Type: application/json'."),
    "rate_limit_exceeded": (429, "{why}; try again later."),
    "quota_reserved": (429, "Running requests hold the rest of the quota; try again soon: {why}."),
    "insufficient_quota": (429, "{why}."),
    "headers_too_large": (431, "The headers are larger than this gate accepts."),
    "internal_error": (500, "The gate failed; its log says why."),
    "upstream_unavailable": (502, "No vLLM at VLLM_ENDPOINT; start it with: vllm serve MODEL"),
    "upstream_error": (502, "vLLM failed: {why}."),
    "database_unavailable": (503, "The gate's database does not answer; try again."),
    "overloaded": (503, "All places of the gate are taken; try again in a moment."),
    "draining": (503, "The gate is restarting; try again in a moment."),
    "upstream_busy": (503, "vLLM takes no more requests now; try again in a moment."),
    "upstream_timeout": (504, "vLLM was silent for too long."),
}
TYPES = {4: "invalid_request_error", 5: "server_error"}  # by status, or by its first digit
TYPES |= {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ANTHROPIC_TYPES = TYPES | {5: "api_error", 404: "not_found_error", 503: "overloaded_error"}
ANTHROPIC_TYPES |= {413: "request_too_large"}
HEADERS = {  # by status or code; a used-up quota makes OpenCode try five times more: at once
    401: {"WWW-Authenticate": "Bearer", "x-should-retry": "false"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "2"},
    "insufficient_quota": {"x-should-retry": "false", "retry-after-ms": "1"},
}
CODES = {  # for what Flask and waitress refuse by themselves
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    431: "headers_too_large",
    500: "internal_error",
}


class APIError(Exception):
    """An answer that is an error: its code's line of ERRORS, and the values for the message."""

    def __init__(self, code: str, param: str | None = None, **values: Any) -> None:
        """`values` fill the message; but `reason` is for the log alone, `wait_s` is Retry-After."""
        self.code = code
        self.param = param
        self.status, message = ERRORS[code]
        super().__init__(message.format(param=param, **values))
        self.for_log = f"{code}: {values.get('reason') or self}"
        self.headers: dict[str, str] = dict(HEADERS.get(code) or HEADERS.get(self.status, {}))
        if "wait_s" in values:
            self.headers["Retry-After"] = str(values["wait_s"])

    def body(self, anthropic: bool = False) -> bytes:
        """The error object of OpenAI or of Anthropic as JSON, and a newline."""
        types = ANTHROPIC_TYPES if anthropic else TYPES
        kind = types.get(self.status) or types[self.status // 100]
        if anthropic:
            body: JSONObject = {"type": "error", "error": {"type": kind, "message": str(self)}}
        else:
            kind = self.code if self.code == "insufficient_quota" else kind
            error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
            body = {"error": error}
        return json.dumps(body).encode() + b"\n"


def words_of(error: BaseException) -> str:
    """An exception in one line for the log, a database's without the values of its rows."""
    diagnosis = getattr(getattr(error, "orig", None) or error, "diag", None)
    text = getattr(diagnosis, "message_primary", None)  # PostgreSQL's other lines show rows
    return f"{type(error).__name__}: {str(text or error).strip().partition(chr(10))[0][:300]}"


def parse_json(text: bytes | bytearray) -> Any:
    """JSON's value; None for what is no JSON. A byte order mark before it is read over."""
    with suppress(ValueError, RecursionError):
        return json.loads(text.decode("utf-8-sig"))
    return None


def to_json(body: object) -> bytes:
    """A value as JSON, in UTF-8 as vLLM's; 400 for what it cannot say (1e999, a lone surrogate)."""
    try:
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text.encode()
    except (ValueError, RecursionError):
        raise APIError("invalid_json") from None


def utf8(value: object) -> bytes:
    """A string's bytes; none for what is no string, or no UTF-8 (a lone surrogate)."""
    with suppress(UnicodeEncodeError):
        return value.encode() if isinstance(value, str) else b""
    return b""


def whole_number(body: JSONObject, name: str, least: int, most: int | None = None) -> int | None:
    """body[name] if it is a whole number in bounds, None if it is absent or null; else 400."""
    value = body.get(name)
    if value is not None and (type(value) is not int or value < least or value > (most or value)):
        must_be = f"a whole number from {least}" + (f" to {most}" if most else " on")
        raise APIError("invalid_value", name, must_be=must_be)
    return value


# ---- 3 Database -----------------------------------------------------------------------------------
# schema.sql makes the tables. All else is SQL in short transactions on the driver's own cursor: it
# costs a tenth of an ORM session's, and one way to the database is enough.

db = SQLAlchemy()
# A transaction begins where we say.
SQLITE = {"isolation_level": None, "check_same_thread": False, "timeout": DB_TIMEOUT_S}


@cache
def row_type(columns: tuple[str, ...]) -> Any:
    """The type of a query's rows: a named tuple."""
    return namedtuple("Row", columns, rename=True)


def begin_sqlite(cursor: Any, script: str, deadline: float) -> None:
    """Runs what begins a transaction, when no other process has one; SQLite's error.

    Its own way to wait makes pauses of up to 100 ms: two processes would do no more than one.
    """
    while True:
        try:
            cursor.executescript(script)
            return
        except sqlite3.OperationalError as error:
            is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not is_busy or time.monotonic() > deadline:
                raise
        time.sleep(0.0003)


class Database:
    """The database: short write transactions, one at a time on SQLite, and reads beside them."""

    def __init__(self, engine: sa.Engine) -> None:
        """Makes the tables that are missing; 503, SettingsError."""
        self._readers = engine
        self._writers = engine
        self._driver = cast(Any, engine.dialect).dbapi
        self._sqlite = engine.dialect.name == "sqlite"
        ddl = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")
        if self._sqlite:  # has one writer: threads wait for the one connection of this pool
            pool = {"pool_size": 1, "max_overflow": 0, "pool_timeout": DB_TIMEOUT_S}
            self._writers = sa.create_engine(engine.url, connect_args=SQLITE, **pool)
            pragmas = "PRAGMA synchronous=NORMAL; PRAGMA foreign_keys=ON; PRAGMA busy_timeout=0"
            sa.event.listen(self._writers, "connect", lambda made, _: made.executescript(pragmas))
            first = f"PRAGMA journal_mode = WAL; BEGIN IMMEDIATE; {ddl}"
        else:  # SQLite counts an INTEGER PRIMARY KEY by itself; two gates may start at once
            counted = "INTEGER PRIMARY KEY GENERATED BY DEFAULT AS IDENTITY"
            ddl = ddl.replace("INTEGER PRIMARY KEY NOT NULL", counted)
            limit = f"SET lock_timeout = {DB_TIMEOUT_S * 1000}; COMMIT"
            sa.event.listen(engine, "connect", lambda made, _: made.execute(limit))
            first = f"SELECT pg_advisory_xact_lock(7435623); {ddl}"
        try:
            with self.begin(first):
                pass
        except self._driver.ProgrammingError as error:  # PostgreSQL: no right to make tables
            raise SettingsError(f"DATABASE_URL: {words_of(error)}") from None

    @contextmanager
    def _connected(self, engine: sa.Engine) -> Iterator[Any]:
        """A connection; what is not committed is undone. 503: the database is away, locked, full."""
        driver = self._driver  # InternalError: PostgreSQL takes no writes now
        away = (driver.OperationalError, driver.InterfaceError, driver.InternalError)
        try:
            with closing(engine.raw_connection()) as connection:
                yield connection
        except (*away, sa.exc.OperationalError, sa.exc.TimeoutError) as error:
            if getattr(error, "sqlite_errorname", "") == "SQLITE_ERROR":
                raise  # our own SQL is wrong
            raise APIError("database_unavailable", reason=words_of(error)) from None

    @contextmanager
    def begin(self, first: str = "") -> Iterator[Execute]:
        """A write transaction's execute(sql, {name: value}); an exception undoes it all. 503."""
        deadline = time.monotonic() + DB_TIMEOUT_S
        with self._connected(self._writers) as connection:
            cursor = connection.cursor()
            if self._sqlite:
                begin_sqlite(cursor, first or "BEGIN IMMEDIATE", deadline)
            elif first:
                cursor.execute(first)
            yield partial(self._execute, cursor)
            connection.commit()

    def write(self, sql: str, **values: object) -> list[Row]:
        """What one statement returns (RETURNING), in a transaction of its own. 503."""
        with self.begin() as execute:
            return execute(sql, values)

    def query(self, sql: str, **values: object) -> list[Row]:
        """The rows of one SELECT; it waits for no writer. 503."""
        with self._connected(self._readers) as connection:
            return self._execute(connection.cursor(), sql, values)

    def _execute(self, cursor: Any, sql: str, values: Mapping[str, object] = {}) -> list[Row]:
        """Runs one statement; its rows."""
        if self._sqlite:
            sql = sql.removesuffix("FOR UPDATE")  # it has one writer, so no rows to lock
        else:
            sql = re.sub(r":(\w+)", r"%(\1)s", sql)
        cursor.execute(sql, values)
        if not cursor.description:
            return []
        columns = tuple([column[0] for column in cursor.description])
        return list(map(row_type(columns)._make, cursor.fetchall()))

    def close(self) -> None:
        """Closes what is open; on SQLite the last one to close moves the log into the file."""
        self._writers.dispose()
        self._readers.dispose()


gate = cast("Gate", current_app)  # the one that serves the current request or command


# ---- 4 Accounts and keys --------------------------------------------------------------------------
# Passwords, JWTs, API keys, and who sent one: g.caller, a row of users. Neither a key nor a JWT is
# stored: the one is derived again when it is shown, the other is signed.

BASE62 = string.digits + string.ascii_letters
USERNAME = re.compile(r"[A-Za-z0-9_.-]{3,64}")
BCRYPT_ROUNDS = 10  # OWASP's least, about 60 ms
NO_PASSWORD = "$2b$10$abcdefghijklmnopqrstuu4T826PRnz0Hu6YlprUuxkZxOOj5Fw5S"  # nobody's hash
HASHING_AT_ONCE = max(1, len(CORES) - 1)  # leaves a core for the streams
# On all cores: serve() keeps the other threads on one.
HASHERS = ThreadPoolExecutor(HASHING_AT_ONCE, "hash", run_on, (CORES,))
HASHING_PLACES = threading.Semaphore(HASHING_AT_ONCE + 8)  # of those who hash or wait for it
# Of the tries of one name, or of those that share its place: fewer than hold the name back.
LOGIN_PLACES = [threading.Semaphore(4) for _ in range(64)]

USER_BY_JWT = "SELECT * FROM users WHERE id = :user_id AND jwt_version = :version"
USER_BY_KEY = """SELECT u.*, k.id AS api_key_id, k.last_used_at AS key_used_at FROM api_keys k
 JOIN users u ON u.id = k.user_id WHERE k.key_hash = :key_hash AND k.revoked_at IS NULL"""
USER_BY_NAME = "SELECT * FROM users WHERE lower(username) = :name"
LOCK_USER = "SELECT id FROM users WHERE id = :user_id FOR UPDATE"
INSERT_USER = """INSERT INTO users (username, password_hash, token_limit, created_at)
 VALUES (:username, :hash, :limit, :now) ON CONFLICT DO NOTHING RETURNING id"""
INSERT_KEY = """INSERT INTO api_keys (user_id, name, nonce, key_hash, created_at)
 VALUES (:user_id, :name, :nonce, :key_hash, :now) RETURNING id"""
LIVE_KEYS = "SELECT * FROM api_keys WHERE user_id = :user_id AND revoked_at IS NULL ORDER BY id"
COUNT_TRY = """INSERT INTO login_attempts (name_hash, tries, held_until_ms)
 VALUES (:name_hash, 1, 0) ON CONFLICT (name_hash) DO UPDATE SET tries = login_attempts.tries + 1
 RETURNING tries, held_until_ms"""
HOLD_NAME = "UPDATE login_attempts SET held_until_ms = :held WHERE name_hash = :name_hash"
FORGET_OLD_LOGINS = "DELETE FROM login_attempts WHERE held_until_ms < :before"
FORGET_LOGINS = "DELETE FROM login_attempts WHERE name_hash = :name_hash"


def base62(number: int, digits: int) -> str:
    """A number in base 62, so many digits long."""
    return "".join(BASE62[number // 62**place % 62] for place in reversed(range(digits)))


def keys_with(secret_part: str) -> tuple[str, str]:
    """The API keys with these 43 characters, as made today and at first: their checksums differ."""
    crc = zlib.crc32(secret_part.encode())
    key = f"sk-llmgate-{secret_part}"
    return f"{key}{crc & 0xFFFFFF:06x}", key + base62(crc, 6)


def sha256_of(text: str) -> str:
    """SHA-256: what the database holds of a key, whose 256 random bits need no slow hash."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


class Keyring:
    """The gate's secret and what is made from it: JWTs and API keys, each by a sub-key."""

    def __init__(self, secret: str, jwt_hours: int) -> None:
        self._jwt_key = hmac.digest(secret.encode(), b"llmgate jwt", "sha256")
        self._api_key_key = hmac.digest(secret.encode(), b"llmgate api key", "sha256")
        self._jwt_life_s = jwt_hours * 3600

    def _keys_of(self, nonce: str) -> tuple[str, str]:
        """The API keys of a nonce, today's first."""
        digest = hmac.digest(self._api_key_key, nonce.encode(), "sha256")
        return keys_with(base62(int.from_bytes(digest, "big"), 43))

    def new_key(self, **row: object) -> tuple[str, JSONObject]:
        """An API key, and its row: these values with its nonce, hash and time."""
        nonce = secrets.token_hex(32)
        api_key = self._keys_of(nonce)[0]
        made = {"nonce": nonce, "key_hash": sha256_of(api_key), "now": int(time.time())}
        return api_key, row | made

    def stored_key(self, row: Row) -> str | None:
        """The API key of a row; None when it was made with another secret."""
        keys = self._keys_of(row.nonce)
        return next((key for key in keys if sha256_of(key) == row.key_hash), None)

    def jwt_answer(self, user_id: int, jwt_version: int) -> JSONObject:
        """RFC 6749's {"access_token", "token_type", "expires_in" (seconds)}."""
        now = int(time.time())
        life_s = self._jwt_life_s
        claims = {"sub": str(user_id), "ver": jwt_version, "iat": now, "exp": now + life_s}
        token = jwt.encode(claims, self._jwt_key, algorithm="HS256")
        return {"access_token": token, "token_type": "bearer", "expires_in": life_s}

    def read_jwt(self, token: str) -> JSONObject:
        """The parameters of USER_BY_JWT; 401 `token_expired` or `invalid_token`."""
        required: Any = {"require": ["sub", "ver", "iat", "exp"]}
        try:
            claims = jwt.decode(token, self._jwt_key, ["HS256"], required, leeway=JWT_LEEWAY_S)
            return {"user_id": min(int(claims["sub"]), MAX_BIGINT), "version": int(claims["ver"])}
        except jwt.ExpiredSignatureError:
            raise APIError("token_expired") from None
        except (jwt.InvalidTokenError, ValueError, TypeError) as error:
            raise APIError("invalid_token", reason=words_of(error)) from None


@contextmanager
def a_place(places: threading.Semaphore, error: APIError, wait_s: float = 0) -> Iterator[None]:
    """One of so many places; this error when all are taken for so long."""
    if not places.acquire(timeout=wait_s):
        raise error
    try:
        yield
    finally:
        places.release()


def hash_password(password: object, param: str = "password") -> str:
    """bcrypt's hash; 400 unless the password has 8 characters to 72 bytes: bcrypt reads no more."""
    password_bytes = utf8(password)
    if len(password_bytes.decode()) < 8 or len(password_bytes) > 72:
        raise APIError("invalid_value", param, must_be="a string of 8 characters to 72 bytes")
    busy = APIError("rate_limit_exceeded", why="Too many logins at once")
    with a_place(HASHING_PLACES, busy):
        hashing = HASHERS.submit(bcrypt.hashpw, password_bytes, bcrypt.gensalt(BCRYPT_ROUNDS))
        return hashing.result().decode()


def log_in(username: object, password: object) -> Row:
    """The row of users; 401, 403, 429. An unknown name costs the same as a known one."""
    database = gate.database
    password_bytes = utf8(password)
    name = username.lower()[:65] if isinstance(username, str) else ""
    g.login_name = name if USERNAME.fullmatch(name) else "(no well-formed name)"
    values: JSONObject = {"name_hash": sha256_of(name)}  # people type passwords as names, too
    busy = APIError("rate_limit_exceeded", why="Too many logins at once")
    with a_place(HASHING_PLACES, busy), a_place(LOGIN_PLACES[hash(name) % 64], busy, wait_s=2):
        found = database.query(USER_BY_NAME, name=g.login_name)
        with database.begin() as execute:  # before it is known whether the password is right
            (attempt,) = execute(COUNT_TRY, values)
            now_ms = int(time.time() * 1000)
            held_ms = attempt.held_until_ms - now_ms  # too long: a clock was wrong
            if attempt.tries > 5 and 0 < held_ms <= 900_000:
                wait_s = held_ms // 1000 + 1
                why = "Too many wrong passwords for this name"
                raise APIError("rate_limit_exceeded", why=why, wait_s=wait_s)  # and not counted
            # Held back for 1 s after the fifth try, for 2 s after the sixth, ... for 15 minutes.
            held_ms = min(1000 * 2 ** (attempt.tries - 5), 900_000) if attempt.tries >= 5 else 0
            execute(HOLD_NAME, values | {"held": now_ms + held_ms})
        stored = found[0].password_hash if found else NO_PASSWORD
        checking = HASHERS.submit(bcrypt.checkpw, password_bytes[:72], stored.encode())
        right = checking.result()
        if not found or not right or len(password_bytes) > 72:
            raise APIError("invalid_credentials")
        database.write(FORGET_LOGINS, **values)
    if found[0].disabled_at is not None:
        raise APIError("account_disabled")
    return found[0]


def register(username: object, password: object, token_limit: int) -> tuple[int, str]:
    """A new account's id and API key; 400, or 409 `username_taken`."""
    if not isinstance(username, str) or not USERNAME.fullmatch(username):
        raise APIError("invalid_value", "username", must_be="3 to 64 of A-Z a-z 0-9 _ . -")
    api_key, row = gate.keyring.new_key(name="default", username=username, limit=token_limit)
    row["hash"] = hash_password(password)
    with gate.database.begin() as execute:
        made = execute(INSERT_USER, row)
        if not made:
            raise APIError("username_taken", "username")
        row["user_id"] = made[0].id
        execute(INSERT_KEY, row)
    return row["user_id"], api_key


def sent_credential() -> str:
    """The API key or JWT of `Authorization: Bearer` or of `x-api-key` (Anthropic's); 401."""
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    bearer = bearer.strip() if scheme.lower() == "bearer" else ""
    api_key = request.headers.get("x-api-key", "").strip()
    if not bearer and not api_key:
        raise APIError("missing_api_key")
    if api_key and "Authorization" in request.headers and bearer != api_key:
        raise APIError("invalid_api_key", reason="Authorization and x-api-key differ")
    return bearer or api_key


def require_caller() -> None:
    """Puts the caller into g.caller; 401, 403. The Blueprint's name says what it accepts."""
    accepted = request.blueprint  # "key", "jwt" or "key or jwt"
    credential = sent_credential()
    if accepted == "key" or (accepted != "jwt" and credential.startswith("sk-llmgate-")):
        code = "invalid_api_key"
        if credential not in keys_with(credential[len("sk-llmgate-") : -6]):  # costs no query
            raise APIError(code, reason="its form or its checksum is wrong")
        rows = gate.database.query(USER_BY_KEY, key_hash=sha256_of(credential))
    else:
        code = "invalid_token"
        rows = gate.database.query(USER_BY_JWT, **gate.keyring.read_jwt(credential))
    if not rows:
        raise APIError(code, reason="nobody has it, or has it any more")
    g.caller = rows[0]
    if g.caller.disabled_at is not None:
        raise APIError("account_disabled")


# ---- 5 Quota and metering -------------------------------------------------------------------------
# What a request may cost (Claim) and what it does cost (Meter). reserve() holds the worst case before
# vLLM is asked; book() puts the true count in its place. The counters move by nothing else, and only
# by SQL arithmetic under a guard.


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

    def at_most(self, most: int) -> Counts:
        """The counts, cut to `most` tokens and then `estimated`."""
        if self.total <= most:
            return self
        prompt = min(self.prompt_tokens, most)
        return Counts(prompt, most - prompt, min(self.cached_tokens, prompt), estimated=1)


class Protocol(NamedTuple):
    """How an endpoint's requests differ from those of the others."""

    bounds: tuple[str, ...]  # fields that bound the output; the first is put in
    prompt_field: str = ""  # the one of a prompt that is a text, token ids, or a list of these
    counter: tuple[str, str] = ("/tokenize", "count")  # where vLLM counts a prompt, and its answer
    counted: str = ""  # the fields that are sent there
    upstream_ids: str = "chatcmpl-{0}"  # vLLM's name for request {0}, or for its prompt {1}
    in_context: bool = False  # clients ask for more than the context, and vLLM would refuse it
    reports: bool = False  # usage while it runs, by stream_options


RENDERED = """model messages tools chat_template chat_template_kwargs add_generation_prompt
 continue_final_message add_special_tokens mm_processor_kwargs"""
READ = "model messages system tools tool_choice thinking"
COUNT_TOKENS = ("/v1/messages/count_tokens", "input_tokens")
RENDER = ("/v1/responses/render", "token_ids")
CHAT_BOUNDS = ("max_tokens", "max_completion_tokens")
PROTOCOLS = {
    "chat/completions": Protocol(CHAT_BOUNDS, counted=RENDERED, reports=True),
    "completions": Protocol(("max_tokens",), "prompt", upstream_ids="cmpl-{0}-{1}", reports=True),
    "embeddings": Protocol((), "input", upstream_ids="embd-{0}-{1}"),
    "messages": Protocol(("max_tokens",), "", COUNT_TOKENS, READ, in_context=True),
    "responses": Protocol(("max_output_tokens",), "", RENDER, "", "resp_{0}_0", in_context=True),
}


# Types of a part, or fields of one without a type, by which a model sees a picture or a medium.
PICTURES = {"image_url", "image_pil", "image", "input_image"}
MEDIA = PICTURES | {"audio_url", "input_audio", "audio", "video_url", "video"}
MEDIA |= {"file", "input_file", "document"}
MEDIA |= {"image_embeds", "audio_embeds", "video_embeds", "prompt_embeds"}  # of any length
DATA_FIELDS = ("url", "data", "file_data")


def as_list(value: object) -> list[Any]:
    """A list as it is, anything else as the only one of a list."""
    return value if isinstance(value, list) else [value]


def objects_in(value: object) -> list[JSONObject]:
    """The objects in a list, or the only one."""
    return [x for x in as_list(value) if isinstance(x, dict)]


def content_parts(body: JSONObject) -> Iterator[JSONObject]:
    """The parts in which a model sees media: of messages, of input, and of a user's tool results."""
    conversations = as_list(body.get("messages")) + as_list(body.get("input"))
    for item in [x for conversation in conversations for x in objects_in(conversation)]:
        for part in objects_in(item.get("content")) + objects_in(item.get("output")):
            yield part
            if part.get("type") == "tool_result" and item.get("role") == "user":
                yield from objects_in(part.get("content"))


def media_in(body: JSONObject) -> tuple[int, int, int]:
    """Pictures, other media, and bytes of their data, in all shapes of OpenAI and Anthropic."""
    pictures = 0
    others = 0
    data_bytes = 0
    for part in content_parts(body):
        kinds = MEDIA & {*part, str(part.get("type"))}
        if kinds:
            pictures += kinds <= PICTURES
            others += not kinds <= PICTURES
            holders = [part, *map(part.get, (*MEDIA, "source"))]
            data = [x.get(name) for x in holders if isinstance(x, dict) for name in DATA_FIELDS]
            data_bytes += sum(len(text) for text in holders + data if isinstance(text, str))
    return pictures, others, data_bytes


def prompts_of(body: JSONObject, field: str) -> list[Any]:
    """What vLLM answers, each for itself: texts, lists of token ids; [None] for a conversation."""
    prompt = body.get(field) if field else None
    if not isinstance(prompt, list) or not prompt or type(prompt[0]) is int:
        prompt = [prompt]
    if field == "prompt" and body.get("prompt_embeds"):
        return as_list(body["prompt_embeds"]) + [text for text in prompt if text is not None]
    return prompt


class Claim:
    """The worst case of one request, in tokens: a token has a byte or more.

    A picture counts as what models make of it, never as its base64; nothing is above the context.
    """

    def __init__(self, body: JSONObject, raw: bytes, endpoint: str, context: int | None) -> None:
        """Of a body, and of its bytes as they came; 400."""
        self.body = body
        self.protocol = PROTOCOLS[endpoint]
        assumed_context = context or UNKNOWN_CONTEXT
        # Without an end, if it is not known; of embeddings vLLM may read more, in chunks.
        self.context = (context if self.protocol.bounds else None) or MAX_BIGINT
        self.prompts = prompts_of(body, self.protocol.prompt_field)
        n = whole_number(body, "n", 1, 16) or 1
        self.choices = len(self.prompts) * (n if self.protocol.reports else 1)
        self._measure_prompt(raw, assumed_context)
        # What one choice may write: as asked for, or up to the model's context.
        asked = [whole_number(body, name, 0) for name in self.protocol.bounds]
        most = assumed_context if asked else 0
        # vLLM makes a token when it is asked for none, too.
        most = max((number or 1 for number in asked if number is not None), default=most)
        self.output_bound = min(most, self.context)
        thinking = body.get("thinking") if endpoint == "messages" else None
        thinks = isinstance(thinking, dict) and type(thinking.get("budget_tokens")) is int
        self.least_output = 1025 if thinks else 1  # thoughts have 1,024 tokens or more

    def _measure_prompt(self, raw: bytes, assumed_context: int) -> None:
        """The prompt's upper bound, and an estimate: what is charged when no count ever comes."""
        field = self.protocol.prompt_field
        pictures, others, data_bytes = media_in(self.body)
        of_picture = min(PICTURE_TOKENS, assumed_context)
        if "mm_processor_kwargs" in self.body:  # it may ask for larger ones
            of_picture = assumed_context
        text_bytes = len(raw) - data_bytes
        bound = text_bytes + TEMPLATE_TOKENS + pictures * of_picture + others * assumed_context
        estimate = text_bytes // 4 + (pictures + others) * PICTURE_ESTIMATE
        # vLLM may read messages and prompt_embeds in completions and embeddings, too.
        is_odd = field and not self.body.keys().isdisjoint(("messages", "prompt_embeds", "suffix"))
        is_ids = all(isinstance(x, list) and set(map(type, x)) <= {int} for x in self.prompts)
        if is_ids and not is_odd:
            bound = estimate = sum(map(len, self.prompts)) + len(self.prompts)
        has_embeds = field == "prompt" and self.body.get("prompt_embeds")
        if has_embeds or self.body.get("chat_template"):  # few bytes may be many tokens
            bound = assumed_context * len(self.prompts)
        for tool in objects_in(self.body.get("tools")):
            if tool.get("type") == "namespace":  # whose name stands before each of its tools
                bound += len(utf8(tool.get("name"))) * len(as_list(tool.get("tools")))
        bound += len(utf8(self.body.get("suffix"))) * (len(self.prompts) - 1)  # stands in each
        self.prompt_bound = min(bound, self.context * len(self.prompts))
        self.estimate = min(max(1, estimate), self.prompt_bound)
        too_many = len(self.prompts) > MAX_COUNTED_PROMPTS
        self._countable = not (is_ids or is_odd or pictures or others or too_many)

    def granted(self, room: int) -> int:
        """Output for each choice: at most a quarter of `room`, always up to 1,024; -1: no room."""
        left = (room - self.prompt_bound) // self.choices
        if left < min(self.output_bound, self.least_output):
            return -1
        most = max(room // 4, 1024, self.least_output, self.choices) // self.choices
        return min(self.output_bound, left, most)

    def count_if_near(self, room: int, server: Upstream, is_stopped: Callable[[], object]) -> None:
        """Near the limit, of the quota or the context, lets vLLM count the prompt."""
        granted = self.granted(room)
        sends_bound = granted < self.output_bound or self.protocol.in_context
        is_near_context = sends_bound and granted + self.prompt_bound > self.context
        is_near = is_near_context or self.prompt_bound > room // 8
        if room < len(self.prompts) or not self._countable or not is_near:
            return
        counted = None
        with suppress(APIError):  # vLLM says why when it gets the request
            counted = self._counted(server, is_stopped)
        if counted is not None:
            self.prompt_bound = counted
            self.estimate = max(1, counted)
            if self.choices == 1:  # of several, each has the context for itself
                self.output_bound = min(self.output_bound, max(self.context - counted, 1))

    def _counted(self, server: Upstream, is_stopped: Callable[[], object]) -> int | None:
        """The prompt's tokens, by vLLM; None where it cannot tell. 502, 504."""
        path, answer = self.protocol.counter
        names = self.protocol.counted.split()
        if self.protocol.prompt_field:
            questions = [{"model": self.body["model"], "prompt": prompt} for prompt in self.prompts]
        elif names:
            questions = [{name: self.body[name] for name in names if name in self.body}]
        else:
            questions = [self.body]
        total = 0
        for question in questions:
            count = server.get_object(path, question, wait_s=30).get(answer)
            count = len(count) if isinstance(count, list) else count
            if type(count) is not int or is_stopped():
                return None
            total += count
        unknown = self.body.keys() - names if names else set()
        for name in unknown:  # a template may render them
            if isinstance(self.body[name], str | list | dict):
                total += len(to_json(self.body[name]))
        return total

    def limit_output(self, granted: int) -> None:
        """Lowers or puts in the body's bound where the quota, or the context, asks for it."""
        body = self.body
        given = [name for name in self.protocol.bounds if body.get(name) is not None]
        limit = self.context if self.protocol.in_context else MAX_BIGINT
        too_high = any(body[name] > limit for name in given)
        if granted >= self.output_bound and not too_high:
            return
        prompt = self.estimate
        if len(self.prompts) > 1:  # the longest one's ids or characters
            prompt = max((len(x) for x in self.prompts if isinstance(x, str | list)), default=0)
        most = min(granted, max(self.context - prompt, 1))
        self.output_bound = most
        for name in given or self.protocol.bounds[:1]:
            body[name] = min(body.get(name) or most, most)
        if type(body.get("min_tokens")) is int:
            body["min_tokens"] = min(body["min_tokens"], most)
        if self.least_output > 1:
            budget = min(body["thinking"]["budget_tokens"], most - 1)
            body["thinking"] = body["thinking"] | {"budget_tokens": budget}


def read_usage(usage: object) -> Counts | None:
    """A usage block of any protocol as counts; None when it is missing or cannot be right."""
    if not isinstance(usage, dict):
        return None
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    written = usage.get("completion_tokens", usage.get("output_tokens", 0))
    # Anthropic's cached tokens stand beside the others, OpenAI's are some of them.
    read = usage.get("cache_read_input_tokens") or 0
    made = usage.get("cache_creation_input_tokens") or 0
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    cached = details.get("cached_tokens") or 0 if isinstance(details, dict) else read
    numbers: Any = (prompt, written, read, made, cached)
    if not all(type(number) is int and number >= 0 for number in numbers) or not any(numbers):
        return None
    whole_prompt = numbers[0] + read + made
    return Counts(whole_prompt, numbers[1], min(cached, whole_prompt))


class Meter:
    """Counts one answer's tokens in passing, and hides usage that the caller did not ask for.

    vLLM reports usage in each event of chat and completions (if asked to, each choice for itself),
    the prompt at the beginning and the rest at the end of messages, all at the end of responses.
    """

    EVENT_END = re.compile(rb"(\n\r?\n)")
    # What an event that only adds text has once; no text can have it, for JSON escapes " and \n.
    ADDS_TEXT = (b'"finish_reason":null', b"content_block_delta\n", b".delta\n")
    USAGE_LAST = re.compile(rb',"usage":\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}(?=\}\n\n)')
    TEXT = re.compile(
        rb'"(?:content|reasoning|reasoning_content|arguments|text|thinking|partial_json|delta)"'
        rb':\s*"([^"\\]*(?:\\.[^"\\]*)*)"'
    )
    UNBEGUN = ("response.created", "response.in_progress")
    LAST = ("message_stop", "response.completed", "response.incomplete", "response.failed")

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        options = claim.body.get("stream_options") or {}
        self._show_last = options.get("include_usage") is True
        self._show_all = self._show_last and options.get("continuous_usage_stats") is True
        self.answered = False  # vLLM's answer has begun
        self.working_since: float | None = None  # monotonic: an event has shown that it generates
        self.complete = False  # the protocol's last event has come
        self.failed = False  # vLLM has reported an error
        self._finished: set[int] = set()  # choices that have said why they ended
        self._deltas = 0
        self._text_bytes = 0
        self._usage: Any = {}  # the block at the end, or what is known of it
        self._choices: dict[int, Any] = {}  # the last block of each
        self._rest = b""  # the event that is not complete

    def feed(self, piece: bytes) -> bytes:
        """The events that are complete now, as the caller shall see them; 502 if one is endless."""
        text = self._rest + piece
        if self.working_since and text.endswith(b"\n\n"):
            shown = self._texts(text)
            if shown is not None:
                self._rest = b""
                return shown
        *parts, self._rest = self.EVENT_END.split(text)
        if len(self._rest) > MAX_EVENT_BYTES:
            raise APIError("upstream_error", why="it sent an event without an end")
        events = zip(parts[::2], parts[1::2], strict=True)
        return b"".join([self._event(event + end) for event, end in events])

    def _texts(self, events: bytes) -> bytes | None:
        """All events at once, as the caller shall see them, if each only adds text; else None.

        It takes a third of the time, and less when many events come together.
        """
        count = events.count(b"\n\n")
        if self._claim.choices > 1 or count not in map(events.count, self.ADDS_TEXT):
            return None
        if b'"usage"' not in events:
            self._count_text(events)
            return events
        cut, cuts = self.USAGE_LAST.subn(b"", events)
        if not self._claim.protocol.reports or not count == cuts == events.count(b'"usage"'):
            return None
        self._choices[0] = parse_json(events.rpartition(b',"usage":')[2][:-3])
        return events if self._show_all else cut

    def _count_text(self, events: bytes) -> None:
        """Adds deltas to what an estimate goes by."""
        self._deltas += events.count(b"\n\n")
        self._text_bytes += sum(map(len, self.TEXT.findall(events)))

    def _event(self, event: bytes) -> bytes:
        """Takes note of an event; what the caller shall see of it."""
        if self.complete:  # nothing belongs behind the last event
            return b""
        data = event.partition(b"data:")[2]
        value = parse_json(data)
        if not isinstance(value, dict):
            self.complete = data.strip() == b"[DONE]"  # else it is a comment
            return event
        kind = value.get("type")  # events of messages and responses have one
        self.complete = kind in self.LAST
        self.failed |= kind in ("error", "response.failed") or bool(value.get("error"))
        if kind not in self.UNBEGUN:
            self.working_since = self.working_since or time.monotonic()
        inner = value.get("message") or value.get("response") or value
        usage = inner.get("usage") if isinstance(inner, dict) else None
        if not usage and ("delta" in value or "choices" in value):
            self._count_text(event)
        if kind is None:
            return self._chat_event(event, value)
        if isinstance(usage, dict):  # the last block with input_tokens is right
            self._usage = usage if "input_tokens" in usage else self._usage | usage
        return event

    def _chat_event(self, event: bytes, value: JSONObject) -> bytes:
        """The same for chat and completions: without usage unless the caller asked for it."""
        choices = value.get("choices")
        usage = value.get("usage")
        shows = self._show_last
        choice = choices[0] if isinstance(choices, list) and choices else None
        if isinstance(choice, dict):
            index = choice["index"] if type(choice.get("index")) is int else 0
            finishes = isinstance(choice.get("finish_reason"), str)
            if usage:  # some servers send it here, at the end, and nowhere else
                is_last = finishes and index not in self._choices
                shows = self._show_all or (self._show_last and is_last)
                self._choices[index] = usage
            if finishes:
                self._finished.add(index)
        elif read_usage(usage):
            self._usage = usage
        if shows or "usage" not in value:
            return event
        if not choice:
            return b""
        del value["usage"]
        cut, cuts = self.USAGE_LAST.subn(b"", event)
        return cut if cuts else b"data: " + to_json(value) + b"\n\n"

    def finished(self) -> bool:
        """Whether the answer is complete, though the last event may be missing."""
        return self.complete or self.failed or len(self._finished) >= self._claim.choices

    def read_whole(self, answer: JSONObject, size: int) -> None:
        """Takes note of a plain answer and its bytes."""
        self._usage = answer.get("usage") or {}
        self._text_bytes = size
        self.complete = True

    def counts(self, at_end: bool = False) -> Counts:
        """The tokens so far: vLLM's count, or an estimate; none before the answer has begun.

        A stream that shows no output yet may hide it: silence is not "no work".
        """
        if not self.answered or not (at_end or self.working_since):
            return Counts()
        claim = self._claim
        known = read_usage(self._usage) or self._running_counts()
        if known.completion_tokens or (known.total and self.complete):
            return known.at_most(claim.choices * claim.context)  # else it is absurd
        output = max(self._deltas, self._text_bytes // 4)
        if at_end and self.working_since and not self._text_bytes:
            silent_s = time.monotonic() - self.working_since
            output = max(output, 1, int(silent_s * SILENT_TOKENS_PER_S))
        output = min(output, claim.output_bound * claim.choices)
        prompt = known.prompt_tokens or claim.estimate
        return Counts(prompt, output, estimated=1)

    def _running_counts(self) -> Counts:
        """What the choices have reported up to now."""
        claim = self._claim
        prompts: dict[int, int] = {}  # of a list, each once
        written = 0
        for index, usage in list(self._choices.items()):
            seen = read_usage(usage) or Counts()
            prompts[index * len(claim.prompts) // claim.choices] = seen.prompt_tokens
            written += seen.completion_tokens
        read = sum(prompts.values())
        if 0 < len(prompts) < len(claim.prompts):  # vLLM has read the others, too
            return Counts(max(read, claim.estimate), written, estimated=1)
        return Counts(read, written)


READ_QUOTA = """SELECT token_limit, tokens_used, tokens_reserved, (SELECT count(*) FROM usage
 WHERE user_id = u.id AND status = 'pending' AND lease_until >= :now) AS running
 FROM users u WHERE id = :user_id"""
RESERVE = """UPDATE users SET tokens_reserved = tokens_reserved + :reserved WHERE id = :user_id
 AND tokens_used + tokens_reserved + :reserved <= token_limit RETURNING id"""
INSERT_ROW = """INSERT INTO usage (request_id, user_id, api_key_id, model, endpoint, stream,
 reserved, prompt_estimate, created_at, lease_until) VALUES (:request_id, :user_id, :api_key_id,
 :model, :endpoint, :stream, :reserved, :prompt_estimate, :now, :lease_until)"""
TOUCH_KEY = "UPDATE api_keys SET last_used_at = :now WHERE id = :api_key_id"
READ_ROW = """SELECT user_id, tokens_used, token_limit - tokens_used - tokens_reserved AS free,
 status, reserved, prompt_tokens + completion_tokens AS booked, lease_until
 FROM usage r JOIN users u ON u.id = r.user_id WHERE r.request_id = :request_id FOR UPDATE"""
UPDATE_ROW = """UPDATE usage SET status = :status, reserved = :reserved, lease_until = :lease_until,
 prompt_tokens = :prompt_tokens, completion_tokens = :completion_tokens, estimated = :estimated,
 cached_tokens = :cached_tokens, first_byte_ms = :first_byte_ms, duration_ms = :duration_ms
 WHERE request_id = :request_id"""
MOVE_TOKENS = """UPDATE users SET tokens_used = tokens_used + :more,
 tokens_reserved = tokens_reserved - :released WHERE id = :user_id"""


def reserve(
    execute: Execute, user: Row, claim: Claim, row: JSONObject, most: int, resets_at: int | None
) -> int:
    """Writes the row and bounds the output; how many requests of the user run already. 429.

    `row` has request_id, model, endpoint, stream, and gets the rest.
    """
    now = int(time.time())
    row |= {"user_id": user.id, "api_key_id": user.api_key_id, "now": now}
    row |= {"prompt_estimate": claim.estimate, "lease_until": now + LEASE_S}
    execute(LOCK_USER, row)  # what PostgreSQL reads behind it is as of now
    ((limit, used, reserved, running),) = execute(READ_QUOTA, row)
    if running >= most:
        raise APIError("rate_limit_exceeded", why=f"{most} requests of yours are running")
    granted = claim.granted(limit - used - reserved)
    least = min(claim.output_bound, claim.least_output)
    needed = claim.prompt_bound + claim.choices * max(granted, least)
    row["reserved"] = needed
    # The guard repeats what was just computed: no mistake above can overspend.
    if granted < 0 or not execute(RESERVE, row):
        left = max(0, limit - used)
        why = f"{used} of {limit} tokens are used, {left} are left, this request may need {needed}"
        if needed <= left:
            raise APIError("quota_reserved", why=why)
        why = f"Not enough quota: {why}" if left else f"Quota used up: {used} of {limit} tokens"
        if resets_at:
            why += f"; it begins again on {when(resets_at)}"
        raise APIError("insufficient_quota", why=why)
    execute(INSERT_ROW, row)
    if now - (user.key_used_at or 0) >= 60:
        execute(TOUCH_KEY, row)
    claim.limit_output(granted)
    return cast(int, running)


def book(
    execute: Execute, request_id: str, status: str, counts: Counts, times: JSONObject
) -> tuple[Counts, int]:
    """Books a request's tokens as known now; (what was booked, the user's `tokens_used` after it).

    Serves checkpoints (`pending`), the end, recovery (`lost`: only once the lease has run out) and
    the late return of a gate whose row was closed as lost: what counts is the difference.
    """
    now = int(time.time())
    new: JSONObject = {"request_id": request_id, "status": status, "lease_until": now + LEASE_S}
    (old,) = execute(READ_ROW, new)
    alive = old.status == "pending" and old.lease_until >= now
    if old.status not in ("pending", "lost") or (status == "lost" and alive):
        return counts, old.tokens_used
    # What was held may be used up; more only if nobody else holds it. (A lost row's
    # reservation may have gone to others by the time its gate comes back.)
    counts = counts.at_most(old.booked + old.reserved + max(0, old.free))
    least = old.booked - old.tokens_used  # or tokens_used would fall below 0
    if counts.total < least:  # a reset came between estimate and count
        counts = Counts(least, estimated=1)
    more = counts.total - old.booked
    new["reserved"] = max(0, old.reserved - max(0, more)) if status == "pending" else 0
    released = old.reserved - new["reserved"]
    # In this order, as everywhere: schema.sql, too, locks first users and then usage.
    execute(MOVE_TOKENS, {"user_id": old.user_id, "more": more, "released": released})
    execute(UPDATE_ROW, new | counts._asdict() | times)
    return counts, old.tokens_used + more


RESET = (  # a balancing row: tokens_used stays the sum of the rows, and they stay
    "UPDATE users SET tokens_used = tokens_used WHERE :user_id IN (0, id)",  # locks them
    """INSERT INTO usage (request_id, user_id, model, endpoint, status, prompt_tokens, created_at,
 lease_until) SELECT :name || id, id, '', 'reset-usage', 'ok', -tokens_used, :now, :now FROM users
 WHERE :user_id IN (0, id) AND tokens_used > 0""",
    "UPDATE users SET tokens_used = 0 WHERE :user_id IN (0, id)",
)


def reset_usage(execute: Execute, user_id: int = 0) -> None:
    """Sets tokens_used of a user, or of all, to 0."""
    values = {"user_id": user_id, "name": f"{secrets.token_hex(12)}-", "now": int(time.time())}
    for sql in RESET:
        execute(sql, values)


def period_of(period: str, now: float) -> tuple[int, int | None]:
    """When the period of QUOTA_PERIOD that holds `now` begins and ends (UTC, Unix seconds)."""
    if period == "never":
        return 0, None
    today = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    monday = today - timedelta(days=today.weekday())
    first = today.replace(day=1)
    next_month = (first + timedelta(days=31)).replace(day=1)
    begins, ends = {
        "day": (today, today + timedelta(days=1)),
        "week": (monday, monday + timedelta(days=7)),
        "month": (first, next_month),
    }[period]
    return int(begins.timestamp()), int(ends.timestamp())


BEGIN_PERIOD = """INSERT INTO quota_periods (begins_at) VALUES (:begins_at)
 ON CONFLICT DO NOTHING RETURNING begins_at"""


def duration(seconds: int) -> str:
    """A time in OpenAI's units, like "3h12m0s"."""
    return f"{seconds // 3600}h{seconds // 60 % 60}m{seconds % 60}s"


def when(moment: int) -> str:
    """A moment to come (Unix seconds), like "Tuesday 1 December, in 4 days"."""
    seconds = max(0, moment - int(time.time()))
    wait = f"{math.ceil(seconds / 86400)} days" if seconds > 86400 else duration(seconds)
    return f"{datetime.fromtimestamp(moment, UTC):%A %-d %B}, in {wait}"


def date_of(seconds: int | None) -> str:
    """A day like 2026-12-01 (UTC); "" for never."""
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"


SUMS = ("requests", "prompt_tokens", "completion_tokens")
USAGE_BY_DAY = """SELECT created_at / 86400 AS day, model, api_key_id, count(*) AS requests,
 CAST(sum(prompt_tokens) AS BIGINT) AS prompt_tokens,
 CAST(sum(completion_tokens) AS BIGINT) AS completion_tokens FROM usage
 WHERE user_id = :id AND model <> '' AND created_at / 86400 >= :since
 GROUP BY created_at / 86400, model, api_key_id ORDER BY 1, 2, 3"""
USAGE_BY_USER = """SELECT u.username, count(r.request_id),
 CAST(coalesce(sum(r.prompt_tokens), 0) AS BIGINT),
 CAST(coalesce(sum(r.completion_tokens), 0) AS BIGINT) FROM users u
 LEFT JOIN usage r ON r.user_id = u.id AND r.model <> '' AND r.created_at / 86400 >= :since
 GROUP BY u.id ORDER BY sum(r.prompt_tokens + r.completion_tokens) DESC NULLS LAST, u.username"""
RECENT_ROWS = """SELECT request_id, created_at, model, api_key_id, endpoint, stream, status,
 estimated, prompt_tokens, completion_tokens, cached_tokens, first_byte_ms, duration_ms
 FROM usage WHERE user_id = :id AND model <> ''
 ORDER BY created_at / 86400 DESC, created_at DESC LIMIT 20"""  # the day: as in the index


def usage_report(database: Database, user: Row, days: int, resets_at: int | None) -> JSONObject:
    """The last `days` days (UTC) by day, model and key, and the newest rows; counts are tokens."""
    rows = database.query(USAGE_BY_DAY, id=user.id, since=int(time.time()) // 86400 - days + 1)
    names = dict(database.query("SELECT id, name FROM api_keys WHERE user_id = :id", id=user.id))

    def by(column: str, name: str, label: Callable[[Any], object]) -> list[JSONObject]:
        found: dict[Any, JSONObject] = {}
        for row in rows:
            of = getattr(row, column)
            entry = found.setdefault(of, {name: label(of)} | dict.fromkeys(SUMS, 0))
            for total in SUMS:
                entry[total] += getattr(row, total)
        return list(found.values())

    return {
        "tokens_used": user.tokens_used,
        "token_limit": user.token_limit,
        "remaining": max(0, user.token_limit - user.tokens_used),
        "reserved": user.tokens_reserved,
        "resets_at": resets_at,
        "requests": sum(row.requests for row in rows),
        "by_model": by("model", "model", str),
        "by_key": by("api_key_id", "key", names.get),
        "by_day": by("day", "date", lambda day: date_of(day * 86400)),
        "recent": [row._asdict() for row in database.query(RECENT_ROWS, id=user.id)],
    }


# ---- 6 Upstreams ----------------------------------------------------------------------------------
# The model servers: what they serve, which one gets a request, one request's exchange with one, and
# the gate's own calls. Nothing here knows of users or tokens.

KEY_REFUSED = "what answers there refuses the gate's key; set VLLM_API_KEY, or start vLLM"


@contextmanager
def upstream_errors(code: str) -> Iterator[None]:
    """504 when time is over; `code`, a 502, when the connection breaks off or makes no sense."""
    try:
        yield
    except (TimeoutError, requests.Timeout) as error:
        raise APIError("upstream_timeout", reason=words_of(error)) from None
    except (OSError, ValueError, OverflowError, http.client.HTTPException) as error:
        raise APIError(code, why="it broke the connection off", reason=words_of(error)) from None


class Exchange(io.RawIOBase):
    """A connection to a server, and a request's exchange on it: what http.client reads from."""

    response: http.client.HTTPResponse

    def __init__(self, server: Upstream) -> None:
        """Connects; OSError."""
        self.server = server
        parts = urlsplit(server.url)
        place = (parts.hostname or "", parts.port or (443 if server.tls else 80))
        self._sock = socket.create_connection(place, CONNECT_TIMEOUT_S)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if server.tls:
            self._sock = server.tls.wrap_socket(self._sock, server_hostname=parts.hostname)
        self._waits = math.ceil(server.timeout_s / PING_S)
        self.on_silence: Callable[[], object] = lambda: None  # called after each PING_S of it

    def makefile(self, mode: str) -> io.BufferedReader:
        """http.client's reader of an answer."""
        return io.BufferedReader(self, 65536)

    def readable(self) -> bool:
        """BufferedReader asks for this."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Bytes that have come; TimeoutError."""
        for silences in range(self._waits):
            if silences:
                with suppress(Exception):  # the caller has gone, as the watcher will see
                    self.on_silence()
            with suppress(TimeoutError):
                return self._sock.recv_into(buffer)
        raise TimeoutError("nothing came")

    def close(self) -> None:
        """Nothing: the reader calls it at an answer's end, and the connection may be kept."""

    def send(self, path: str, body: bytes, headers: dict[str, str]) -> None:
        """Sends a request and waits for the answer's status and headers; 502, 504."""
        server = self.server
        lines = [f"POST {urlsplit(server.url).path}{path} HTTP/1.1", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (server.headers | headers).items()]
        with upstream_errors("upstream_error"):
            self._sock.settimeout(server.timeout_s)
            self._sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            self._sock.settimeout(server.timeout_s / self._waits)
            self.response = http.client.HTTPResponse(cast(Any, self), method="POST")
            self.response.begin()
            answered = self.response.headers
            has_bad_length = self.response.length is None and "content-length" in answered
            if has_bad_length or any({"\r", "\n"} & {*value} for value in answered.values()):
                raise ValueError("headers that make no sense")

    def pieces(self) -> Iterator[bytes]:
        """The body as it arrives, up to 100 chunks that came together in one piece; 502, 504."""
        response = self.response
        chunks: list[bytes] = []
        with upstream_errors("upstream_error"):
            try:
                while chunk := response.read1(65536):
                    chunks.append(chunk)
                    # The reader holds the end of the chunk's line, and what came behind it.
                    more_has_come = response.chunked and response.fp.peek(1).lstrip()
                    if not more_has_come or len(chunks) == 100:
                        piece = b"".join(chunks)
                        chunks.clear()
                        yield piece
                if response.length:
                    raise ValueError("the body is shorter than its Content-Length")
            finally:
                if chunks:  # they came with the end, or before a fault
                    yield b"".join(chunks)

    def is_idle(self) -> bool:
        """Whether nothing has come, not even the connection's end."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    def shutdown(self, how: int) -> None:
        """Ends the connection, or our half of it, from another thread."""
        with suppress(OSError):
            socket.socket.shutdown(self._sock, how)  # not as TLS: another thread reads

    def hang_up(self) -> None:
        """Closes the connection."""
        self._sock.close()


class Upstream:
    """One model server: what it serves, what is known of its ways, its idle connections."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.url = url
        self.timeout_s = settings.upstream_timeout
        self.tls = ssl.create_default_context() if url.startswith("https") else None
        self.headers = {"Host": urlsplit(url).netloc, "Content-Type": "application/json"}
        self.headers["Accept-Encoding"] = "identity"
        if settings.vllm_api_key:
            self.headers["Authorization"] = f"Bearer {settings.vllm_api_key}"
        self.session = requests.Session()  # for the gate's own calls
        self.session.trust_env = False
        paths = ssl.get_default_verify_paths()  # the system's, as for relayed requests
        self.session.verify = paths.cafile or paths.capath or True
        self.models: dict[str, JSONObject] = {}  # id: what callers may see of its entry
        self.why_down = "not asked yet"  # "" while it is up
        self.idle: list[Exchange] = []  # kept, for 0.4 ms less at the next request

    def connect(self) -> Exchange | None:
        """A connection, kept or new; None: the server is down, and `why_down` says why."""
        with suppress(IndexError):  # none is kept
            kept = self.idle.pop()
            if kept.is_idle():
                return kept
            kept.hang_up()
        try:
            return Exchange(self)
        except OSError as error:
            self.mark_down(words_of(error))
            return None

    def close_idle(self) -> None:
        """Closes the connections that are kept; vLLM would do so after 5.0 s."""
        with suppress(IndexError):
            while True:
                self.idle.pop().hang_up()

    def mark_down(self, why: str) -> None:
        """The server is not there."""
        if why != self.why_down:
            log.warning("%s is down: %s", self.url, why)
        self.why_down = why

    def call(self, path: str, body: JSONObject | None = None, wait_s: int = 2) -> requests.Response:
        """A GET or, with a body, a POST of the gate's own; 502, 504."""
        options: JSONObject = {"timeout": (CONNECT_TIMEOUT_S, wait_s), "allow_redirects": False}
        options |= {"headers": self.headers, "data": to_json(body) if body else None}
        with upstream_errors("upstream_unavailable"):
            return self.session.request("POST" if body else "GET", self.url + path, **options)

    def get_object(self, path: str, body: JSONObject | None = None, wait_s: int = 2) -> JSONObject:
        """The JSON object that a call brings; {} for anything else. 502, 504."""
        answer = self.call(path, body, wait_s)
        value = parse_json(answer.content)
        return value if answer.status_code == 200 and isinstance(value, dict) else {}

    def refresh(self) -> None:
        """Fetches the list of models; a slow answer leaves the list as it was."""
        try:
            answer = self.call("/v1/models")
            if answer.status_code in (401, 403):
                return self.mark_down(KEY_REFUSED)
            entries = parse_json(answer.content)["data"]
            models = [x for x in entries if isinstance(x, dict) and utf8(x.get("id"))]
            told = {x["id"]: public_entry(x) for x in models}
            for x in models:  # an adapter has the context of its base model
                told[x["id"]] = told.get(str(x.get("parent")), {}) | told[x["id"]]
            self.models = told
        except APIError as error:
            if self.why_down or error.code != "upstream_timeout":
                self.mark_down(error.for_log)
        except (KeyError, TypeError):
            self.mark_down(f"it answers {answer.status_code} to /v1/models, and no list")
        else:
            if self.why_down:
                log.info("%s is up: %s", self.url, ", ".join(self.models))
            self.why_down = ""

    def abort(self, upstream_ids: list[str]) -> bool:
        """Tells vLLM to end these requests; whether it does."""
        with suppress(APIError):
            path = "/inference/v1/abort_requests"
            return self.call(path, {"request_ids": upstream_ids}).ok
        return False


def public_entry(entry: JSONObject) -> JSONObject:
    """A model as callers may see it; not its `root`, a path. llama.cpp tells the context as n_ctx."""
    names = ("id", "object", "created", "owned_by")
    meta = entry.get("meta")
    context = entry.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else 0)
    told = {"max_model_len": context} if type(context) is int and context > 0 else {}
    return {name: entry[name] for name in names if name in entry} | told


class Upstreams(list[Upstream]):
    """All model servers, in the operator's order: what they serve and who gets a request."""

    def __init__(self, settings: Settings) -> None:
        ports = [port for port in LOCAL_PORTS if port != settings.port]
        urls = settings.vllm_endpoint or [f"http://127.0.0.1:{port}" for port in ports]
        super().__init__(Upstream(url, settings) for url in urls)
        self.aliases = settings.model_aliases
        self._refreshing = threading.Lock()  # protects _refreshed_at
        self._refreshed_at = 0.0  # monotonic

    def refresh(self) -> None:
        """Asks all servers for their models, side by side, unless that was done just now."""
        with self._refreshing:
            if time.monotonic() - self._refreshed_at > 1:
                asked = [threading.Thread(target=x.refresh, daemon=True) for x in self]
                for thread in asked:
                    thread.start()
                for thread in asked:  # one that dribbles would be awaited for ever
                    thread.join(2 * CONNECT_TIMEOUT_S)
                self._refreshed_at = time.monotonic()

    def models(self) -> dict[str, JSONObject]:
        """{id: entry} of the servers that are up, the first one's first."""
        if all(server.why_down for server in self):
            self.refresh()
        found: dict[str, JSONObject] = {}
        for server in self:
            for name, entry in server.models.items() if not server.why_down else ():
                found.setdefault(name, entry)
        return found

    def resolve(self, model: str) -> str:
        """The served model that a name, an alias or an alias of one stands for."""
        models = self.models()
        real = self.aliases.get(model, model)
        if real not in models:
            real = self.aliases.get(real, real)
        return real or next(iter(models), model)

    def public_models(self) -> dict[str, JSONObject]:
        """{id or alias: entry} as callers may see it; 502 while no server is up."""
        models = self.models()
        if not models:
            raise self.unavailable()
        for alias in self.aliases:
            real = self.resolve(alias)
            if real in models:
                models[alias] = models[real] | {"id": alias}
        return models

    def route(self, model: str, busy: list[Upstream]) -> list[Upstream]:
        """The servers of a model, the least busy first; 404 `model_not_found`, or 502."""
        if model not in self.models():
            self.refresh()
        servers = [server for server in self if model in server.models]
        if servers:
            return sorted(servers, key=lambda server: (server.why_down != "", busy.count(server)))
        if all(server.why_down for server in self):
            raise self.unavailable()
        raise APIError("model_not_found", "model", model=model[:200])

    def first_there(self, servers: list[Upstream]) -> Upstream:
        """The first server that takes a connection, which is kept for the request; 502."""
        for server in servers:
            exchange = server.connect()
            if exchange:
                server.idle.append(exchange)
                return server
        raise self.unavailable()

    def unavailable(self) -> APIError:
        """502 with the reason why no server is up."""
        if any(server.why_down == KEY_REFUSED for server in self):
            return APIError("upstream_error", why=KEY_REFUSED)
        reasons = [f"{server.url}: {server.why_down}" for server in self if server.why_down]
        return APIError("upstream_unavailable", reason="; ".join(reasons))


# ---- 7 Relay --------------------------------------------------------------------------------------
# One request on its way to vLLM and its answer on the way back, and the watcher of all of them. Bytes
# pass unchanged, but for the model's name, the bound of the output and hidden usage.

LEFT = "the caller left"
DRAINING = "the gate is stopping"
COMMENT = b": keep-alive\n\n"  # of SSE; clients and proxies take it for a sign of life


# They touch other users, hide tokens from the meter, or pass the bound (n_predict of llama.cpp).
REFUSED = """priority request_id kv_transfer_params ec_transfer_params vllm_xargs stream_interval
 use_beam_search n_predict"""
REFUSED_OF = {
    "responses": " store background previous_response_id previous_input_messages",
    "embeddings": " padding",
}
READ_FIELDS = (
    ("model", str, "the name of a model"),
    ("stream", bool | None, "true or false"),
    ("stream_options", dict | None, "an object"),
)


def require_relayable(body: JSONObject, endpoint: str) -> None:
    """400 naming the field that is refused, or that the gate has to read and cannot."""
    refused = REFUSED + REFUSED_OF.get(endpoint, "")
    for name in refused.split():
        if body.get(name) is not None and body[name] is not False:
            raise APIError("unsupported_value", name)
    if whole_number(body, "best_of", 1) not in (None, 1):
        raise APIError("unsupported_value", "best_of")
    if any(part.get("uuid") is not None for part in content_parts(body)):
        raise APIError("unsupported_value", "uuid")  # names a picture that may be another user's
    if endpoint == "embeddings" and body.get("encoding_format") in ("bytes", "bytes_only"):
        raise APIError("unsupported_value", "encoding_format")  # such an answer is no JSON
    for name, kind, must_be in READ_FIELDS:
        if not isinstance(body.get(name), kind) or body.get(name) == "":
            raise APIError("invalid_value", name, must_be=must_be)


def error_event(endpoint: str, error: APIError, request_id: str) -> bytes:
    """The end of a broken stream, in the endpoint's own shape."""
    if endpoint == "messages":
        return b"event: error\ndata: " + error.body(anthropic=True) + b"\n"
    if endpoint != "responses":
        return b"data: " + error.body() + b"\n"
    failure = {"code": error.code, "message": str(error)}
    response: JSONObject = {"id": f"resp_{request_id}", "object": "response", "status": "failed"}
    response |= {"output": [], "error": failure, "usage": None}
    event = {"type": "response.failed", "sequence_number": 0, "response": response}
    return b"event: response.failed\ndata: " + to_json(event) + b"\n\n"


# What OpenCode takes for a full context window, see part 2.
MISREAD = re.compile(rb"(?i)token limit exceeded|too many tokens|exceeds the limit of")
GENERATED_ANYWAY = {  # vLLM's 400 for an answer that is there, and that it cannot put into shape
    "messages": re.compile(
        rb"validation errors? for AnthropicContentBlock"
        rb'|"message": ?"(?:Unterminated|Expecting|Invalid|Extra)[^"]*\(char \d+\)"'
    ),
    "responses": re.compile(rb"validation errors? for ResponsesResponse"),
}


def require_good_answer(status: int, headers: Mapping[str, str]) -> None:
    """502 or 503 for an answer of vLLM that is not for the caller: all but 200 and most 4xx."""
    if status in (401, 403):
        raise APIError("upstream_error", why=KEY_REFUSED)
    if status == 503:
        raise APIError("upstream_busy", wait_s=headers.get("retry-after", "2"))
    if status != 200 and not 400 <= status < 500:
        why = "it answered with an error of its own"
        raise APIError("upstream_error", why=why, reason=f"vLLM answers {status}")


def plain_answer(body: bytes, status: int, headers: Mapping[str, str]) -> Response:
    """vLLM's 200 or 4xx, its body unchanged; 429 in our words where OpenCode would misread it."""
    content_type = headers.get("content-type", "application/json")
    response = Response(body, status, content_type=content_type)
    wait_s = headers.get("retry-after", "1" if status == 429 else "")
    if wait_s:
        response.headers["Retry-After"] = wait_s
    if status == 429 and MISREAD.search(body):
        why = "vLLM takes no more requests now"
        raise APIError("rate_limit_exceeded", why=why, wait_s=wait_s)
    return response


class Relay:
    """One running request: open, then a plain answer or a stream, then ended by end(), once.

    Its own thread writes the fields. Who wants it to stop (the watcher for a caller who left,
    drain()) calls stop(): that ends vLLM's work, so its own thread sees an end, and calls end().
    """

    def __init__(self, watcher: Watcher, user: Row, endpoint: str, body: JSONObject) -> None:
        self.watcher = watcher
        self.user = user
        self.endpoint = endpoint
        self.request_id: str = g.request_id
        self.started_at: float = g.started_at
        self.is_gone: Callable[[], bool] = request.environ["waitress.client_disconnected"]
        self.model: str = body["model"]
        self.stream = body.get("stream") is True
        self.ids_at_vllm: list[str] = []  # by which its abort_requests knows this request
        self.meter: Meter | None = None  # None: the row is not written yet
        self.server: Upstream | None = None  # that gets the request
        self.exchange: Exchange | None = None  # vLLM has the request, or gets it now
        self.stopped_by = ""  # LEFT or DRAINING
        self.status = "pending"
        self.counts = Counts()  # as booked last
        self.times: JSONObject = {"first_byte_ms": None, "duration_ms": None}
        self.tokens_used: int = user.tokens_used  # of the user, after save()
        self.ended = threading.Event()  # status and counts are final
        self._lock = threading.RLock()  # protects them, and the connection until then

    def answer(self, body: JSONObject, raw: bytes) -> Response:
        """vLLM's answer; 400, 404, 429, 502, 503, 504. `raw` is the body as it came."""
        try:
            running = list(self.watcher.running)
            busy = [other.server for other in running if other.server]
            servers = self.watcher.upstreams.route(self.model, busy)
            self.server = self.watcher.upstreams.first_there(servers)
            self._reserve(self.server, body, raw)
            return self._read_answer(self._send(self.server, body))
        except Exception as error:
            self.end("error", error.for_log if isinstance(error, APIError) else words_of(error))
            if self.exchange:
                self.exchange.hang_up()
            if self.stopped_by == DRAINING:
                raise APIError("draining") from None
            raise

    def _reserve(self, server: Upstream, body: JSONObject, raw: bytes) -> None:
        """Writes the row, and the bound of the output into the body; 400, 429."""
        user = self.user
        context = server.models.get(self.model, {}).get("max_model_len")
        claim = Claim(body, raw, self.endpoint, context)
        room = user.token_limit - user.tokens_used - user.tokens_reserved
        claim.count_if_near(room, server, lambda: self.stopped_by)
        ids = claim.protocol.upstream_ids
        numbers = range(len(claim.prompts))
        self.ids_at_vllm = [ids.format(self.request_id, number) for number in numbers]
        row: JSONObject = {"request_id": self.request_id, "model": self.model}
        row |= {"endpoint": self.endpoint, "stream": int(self.stream)}
        most = self.watcher.settings.max_requests_per_user
        resets_at = self.watcher.begin_period()  # the first request of one waits for no upkeep()
        with self.watcher.database.begin() as execute:
            if self.stopped_by:  # drain() waits no longer
                raise APIError("draining", reason=self.stopped_by)
            self.others_running = reserve(execute, user, claim, row, most, resets_at)
        self.meter = Meter(claim)

    def _send(self, server: Upstream, body: JSONObject, running_counts: bool = True) -> bytes:
        """Asks vLLM; the body of its answer if that is a 400. 502, 503, 504."""
        if self.stopped_by:
            raise APIError("draining", reason=self.stopped_by)
        exchange = server.connect()
        if not exchange:
            raise self.watcher.upstreams.unavailable()
        self.exchange = exchange
        if self.endpoint == "responses":
            body |= {"store": False, "request_id": f"resp_{self.request_id}"}
        sent = body
        reports = self.stream and PROTOCOLS[self.endpoint].reports
        if reports:
            options = (body.get("stream_options") or {}) | {"include_usage": True}
            if running_counts:
                options["continuous_usage_stats"] = True
            sent = body | {"stream_options": options}
        headers = {"X-Request-Id": self.request_id, "X-Vllm-Priority": str(self.others_running)}
        exchange.send(f"/v1/{self.endpoint}", to_json(sent), headers)
        refusal = b"".join(exchange.pieces()) if exchange.response.status == 400 else b""
        if reports and running_counts and b"continuous_usage_stats" in refusal:
            exchange.hang_up()
            return self._send(server, body, running_counts=False)
        return refusal

    def _read_answer(self, refusal: bytes) -> Response:
        """The answer to relay: 200 or vLLM's own 4xx; 502 or 503 for all else."""
        meter = cast(Meter, self.meter)
        exchange = cast(Exchange, self.exchange)
        status = exchange.response.status
        headers = cast(Any, exchange.response.headers)
        meter.answered = status == 200
        require_good_answer(status, headers)
        content_type = headers.get("content-type", "")
        if status == 200 and "text/event-stream" in content_type:
            self.stream = True
            at_once = {"X-Accel-Buffering": "no"}  # nginx passes each event on when it comes
            return StreamResponse(cast(Any, self), 200, at_once, content_type=content_type)
        self._note_time("first_byte_ms")
        body = refusal or b"".join(exchange.pieces())
        if status == 200:
            value = parse_json(body)
            if not isinstance(value, dict):
                meter.answered = bool(body)
                raise APIError("upstream_error", why="its answer is not a JSON object")
            meter.read_whole(value, len(body))
        elif self.endpoint in GENERATED_ANYWAY and GENERATED_ANYWAY[self.endpoint].search(body):
            meter.answered = True
            meter.working_since = self.started_at
        if self.stopped_by == DRAINING:
            raise APIError("draining")
        response = plain_answer(body, status, headers)
        self.end("ok" if status == 200 else "error", f"vLLM answers {status}")  # before it is seen
        # stop() may have ended half of the connection, and what follows a refusal is not known.
        if self.stopped_by or status != 200 or exchange.response.will_close:
            exchange.hang_up()
        else:
            exchange.server.idle.append(exchange)
        return response

    def _note_time(self, name: str) -> None:
        """Writes down the milliseconds since the request's arrival, the first time."""
        if self.times[name] is None:
            self.times[name] = round((time.monotonic() - self.started_at) * 1000)

    def events(self, begin: Callable[[], Any]) -> Iterator[bytes]:
        """The events of a stream; an error event when they break off.

        `begin` is WSGI's start_response(). When the caller has left, the server closes this.
        """
        meter = cast(Meter, self.meter)
        exchange = cast(Exchange, self.exchange)
        pieces = exchange.pieces()
        try:
            write = begin()
            write(b"")  # the headers leave at once, not with the first event
            exchange.on_silence = partial(write, COMMENT)
            for piece in pieces:
                self._note_time("first_byte_ms")
                shown = meter.feed(piece)
                if meter.complete:
                    break
                if shown and self.stopped_by != DRAINING:
                    yield shown
            if self.stopped_by == DRAINING or not meter.finished():
                raise APIError("upstream_error", why="its answer ended too early")
            # Booked before the caller can see the end.
            self.end("error" if meter.failed else "ok", "vLLM reported an error")
            if meter.complete:
                yield shown
            elif not meter.failed:  # some servers leave it out
                yield b"data: [DONE]\n\n"
        except APIError as error:
            self.end("error", error.for_log)
            shown_error = APIError("draining") if self.stopped_by == DRAINING else error
            yield error_event(self.endpoint, shown_error, self.request_id)
        finally:
            if not self.ended.is_set():
                self.stop(LEFT)
                with suppress(APIError):
                    for piece in pieces:  # what vLLM last reports counts
                        meter.feed(piece)
                self.end("aborted", LEFT)
            exchange.hang_up()

    def stop(self, reason: str) -> None:
        """Wants the request to end, from any thread: LEFT or, which counts more, DRAINING."""
        if self.stopped_by not in (reason, DRAINING) and not self.ended.is_set():
            self.stopped_by = reason
            threading.Thread(target=self._end_upstream, name="stop", daemon=True).start()

    def _end_upstream(self) -> None:
        """Ends vLLM's work: by abort_requests, else by hanging up, first by half.

        What vLLM has written by then still comes, with its counts. Where it has no abort_requests, a
        plain request whose caller left runs to its end.
        """
        while not self.exchange:
            if self.ended.wait(0.02):
                return
        server = self.exchange.server
        give_up_at = time.monotonic() + ABORT_GRACE_S
        while time.monotonic() < give_up_at and server.abort(self.ids_at_vllm):
            if self.ended.wait(0.1):  # else again: the request may not have been there yet
                return
        for how in (socket.SHUT_WR, socket.SHUT_RDWR):
            with self._lock:  # when it has ended, another may use the connection
                if not self.ended.is_set() and (self.stream or self.stopped_by == DRAINING):
                    self.exchange.shutdown(how)
            if self.ended.wait(HANGUP_GRACE_S):
                return

    def end(self, status: str, why: str) -> None:
        """Ends the request with this status, books it and logs it, if it has not ended yet."""
        with self._lock:
            if self.ended.is_set():
                return
            self.status = "aborted" if self.stopped_by == LEFT else status
            self._note_time("duration_ms")
            if self.meter:
                if self.exchange and DRAINING in (self.stopped_by, why):
                    self.meter.answered = True  # vLLM was at work, though nothing of it was seen
                self.counts = self.meter.counts(at_end=True)
            self.ended.set()
            try:
                self.save()
            except APIError as error:  # the watcher tries again
                log.error("%s not booked yet: %s", self.request_id, error.for_log)
        if self.meter:
            who = f"{self.request_id} {self.user.username} key {self.user.api_key_id}"
            what = f"{self.endpoint} {self.model}{' stream' * self.stream} {self.status}"
            if self.status != "ok":
                what += f" ({self.stopped_by or why})"
            cost = f"{self.counts.prompt_tokens}+{self.counts.completion_tokens} tokens"
            cost += " (estimated)" * self.counts.estimated
            first, last = self.times.values()
            log.info("%s %s %s, first byte %s ms, end %s ms", who, what, cost, first, last)

    def save(self) -> None:
        """Books what is known now; a request whose end is booked is no longer `running`. 503."""
        with self._lock:
            ended = self.ended.is_set()
            if self.meter:
                if not ended:
                    self.counts = self.meter.counts()
                row = (self.request_id, self.status, self.counts, self.times)
                with self.watcher.database.begin() as execute:
                    self.counts, self.tokens_used = book(execute, *row)
            if ended:
                self.watcher.running.discard(self)


class StreamResponse(Response):
    """A relay's stream, which sends its headers by itself."""

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """The relay's events, for the server to iterate over and to close (PEP 3333)."""
        headers = self.get_wsgi_headers(environ).to_wsgi_list()
        return cast(Any, self.response).events(partial(start_response, self.status, headers))


LOST_ROWS = """SELECT request_id, prompt_estimate, prompt_tokens, completion_tokens, cached_tokens,
 estimated FROM usage WHERE status = 'pending' AND lease_until < :now"""


class Watcher:
    """Looks after running relays: callers who left, checkpoints, leases; and dead gates' rows."""

    def __init__(self, database: Database, upstreams: Upstreams, settings: Settings) -> None:
        self.database = database
        self.upstreams = upstreams
        self.settings = settings
        self.running: set[Relay] = set()
        self.draining = False
        self._admission = threading.Lock()  # nobody counts `running` while one is let in
        self._period = 0  # when the period of quotas began that this gate has seen to
        self._round_at = time.time()  # when the last round of upkeep was well
        self._recover_at = 0.0  # no row is taken for dead before (monotonic)
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begins to watch, in three threads: what is slow does not hold up the look at callers."""
        models = (self.upstreams.refresh, MODELS_TTL_S)
        for work in ((self._stop_left, 0.1), (self.upkeep, UPKEEP_S), models):
            self._threads.append(threading.Thread(target=self._repeat, args=work, daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """Ends the watch."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def admit(self, relay: Relay) -> None:
        """Lets a relay begin; 503 `draining`, `overloaded`; 429: too many of its user run here.

        From here on it is in `running` until it is booked, and a gate that stops waits for it.
        """
        places = max(2, self.settings.threads - 32)  # some stay free, for logins and usage
        most = self.settings.max_requests_per_user
        with self._admission:
            running = list(self.running)
            if self.draining:
                raise APIError("draining")
            if len(running) >= places:
                raise APIError("overloaded")
            if sum(other.user.id == relay.user.id for other in running) >= most:
                raise APIError("rate_limit_exceeded", why=f"{most} requests of yours are running")
            self.running.add(relay)

    def _repeat(self, work: Callable[[], None], pause_s: float) -> None:
        """Does it again and again until stop(); what fails is logged, and tried again."""
        while not self._stopping.is_set():
            try:
                work()
            except APIError as error:
                log.error("upkeep: %s", error.for_log)
            except Exception:
                log.exception("upkeep")
            self._stopping.wait(pause_s)

    def _stop_left(self) -> None:
        """Stops the relays whose callers have left."""
        for relay in list(self.running):
            if relay.is_gone():
                relay.stop(LEFT)

    def begin_period(self) -> int | None:
        """Lets quotas begin again when a period does, once for all gates; when it ends. 503."""
        begins_at, ends_at = period_of(self.settings.quota_period, time.time())
        if ends_at and begins_at != self._period:
            with self.database.begin() as execute:
                if execute(BEGIN_PERIOD, {"begins_at": begins_at}):
                    reset_usage(execute)
                    log.info("a new period of quotas has begun; the next one: %s", when(ends_at))
            self._period = begins_at
        return ends_at

    def upkeep(self) -> None:
        """Quotas, checkpoints, leases, what could not be booked, rows of dead gates. 503.

        After a gap (a suspended machine, a clock that was set, a database that was away) other gates
        get the time to renew their leases before a row of theirs is taken for dead.
        """
        self.begin_period()
        if abs(time.time() - self._round_at) > LEASE_S / 2:
            self._recover_at = time.monotonic() + LEASE_S
        for upstream in self.upstreams:
            upstream.close_idle()
        for relay in list(self.running):
            try:
                relay.save()
            except APIError:
                raise
            except Exception:  # so that the others still get booked
                log.exception("a row cannot be booked")
        if time.monotonic() >= self._recover_at:
            self._recover()
        if time.time() % 3600 < UPKEEP_S:
            self.database.write(FORGET_OLD_LOGINS, before=int(time.time() - 3600) * 1000)
        self._round_at = time.time()

    def _recover(self) -> None:
        """Closes the rows of dead gates: the last checkpoint counts, at least the prompt.

        Those of this gate were renewed just now.
        """
        times = {"first_byte_ms": None, "duration_ms": None}
        for request_id, estimate, *seen in self.database.query(LOST_ROWS, now=int(time.time())):
            counts = Counts(*seen) if seen[0] else Counts(estimate, estimated=1)
            log.warning("%s lost: its gate died", request_id)
            with self.database.begin() as execute:
                book(execute, request_id, "lost", counts, times)


# ---- 8 Routes -------------------------------------------------------------------------------------
# Accounts, the models, the report, the clients' configurations: a Blueprint for each kind of
# credential. A view reads, calls and returns; what is wrong is raised.

routes = Blueprint("open", __name__)
jwt_routes = Blueprint("jwt", __name__)
key_routes = Blueprint("key", __name__)
either_routes = Blueprint("key or jwt", __name__)
for guarded in (jwt_routes, key_routes, either_routes):
    guarded.before_request(require_caller)


def read_json() -> JSONObject:
    """The body, a JSON object; 400, 413, 415. NaN in it is refused where it is used."""
    if request.mimetype != "application/json" or "Content-Encoding" in request.headers:
        raise APIError("unsupported_media_type")
    text = request.get_data()
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise APIError("request_too_large")
    body = parse_json(text)
    if not isinstance(body, dict):
        raise APIError("invalid_json")
    return body


def base_url() -> str:
    """The gate's URL as callers see it, without a slash at its end."""
    return gate.settings.public_url or request.host_url.rstrip("/")


def how_to_register(url: str, settings: Settings) -> str:
    """The command that makes an account, or who does."""
    if settings.registration == "closed":
        return "closed; the operator makes accounts with: python llmgate.py create-user NAME"
    token = ',"registration_token":"…"' * (settings.registration == "invite")
    return f"""curl {url}/auth/register -H 'Content-Type: application/json' \\
          -d '{{"username":"alice","password":"correct horse"{token}}}'"""


@routes.get("/")
def root() -> Response:
    """What this is, and what to do next."""
    url = base_url()
    key = '-H "Authorization: Bearer $LLMGATE_API_KEY"'
    opencode = f"opencode auth login {url}"
    if gate.settings.opencode_discovery == "off":
        opencode = f"curl -sf {url}/opencode.json {key} -o opencode.json"
    text = f"""llmgate: OpenAI's and Anthropic's API with accounts, keys and quotas in front of vLLM.

register  {how_to_register(url, gate.settings)}
base URL  {url}/v1 (OpenAI), {url} (Anthropic)
usage     curl {url}/users/usage {key} -H 'Accept: text/plain'
OpenCode  {opencode}
Claude    curl -sf --create-dirs {url}/claude.json {key} -o ~/.claude/settings.json
Codex     curl -sf --create-dirs {url}/codex.toml {key} -o ~/.codex/config.toml
"""
    return Response(text, mimetype="text/plain")


@routes.post("/auth/register")
def auth_register() -> tuple[JSONObject, int]:
    """A new account with its first API key; 403 `registration_closed`."""
    settings = gate.settings
    if settings.registration == "closed":
        raise APIError("registration_closed", why="Ask the operator for an account")
    body = read_json()
    token = utf8(body.get("registration_token"))
    invited = hmac.compare_digest(token, settings.registration_token.encode())
    if settings.registration == "invite" and not invited:
        why = "This registration_token is wrong" if token else "Ask for a registration_token"
        raise APIError("registration_closed", why=why)
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
    user = log_in(body.get("username"), body.get("password"))
    return gate.keyring.jwt_answer(user.id, user.jwt_version)


@jwt_routes.post("/auth/refresh")
def auth_refresh() -> JSONObject:
    """A new JWT for one that still works."""
    return gate.keyring.jwt_answer(g.caller.id, g.caller.jwt_version)


@jwt_routes.post("/auth/password")
def auth_password() -> JSONObject:
    """A new password; every older JWT of the user stops working."""
    body = read_json()
    user = log_in(g.caller.username, body.get("old_password"))
    new_hash = hash_password(body.get("new_password"), "new_password")
    sql = """UPDATE users SET password_hash = :new, jwt_version = jwt_version + 1
 WHERE id = :id AND password_hash = :old RETURNING jwt_version"""
    changed = gate.database.write(sql, new=new_hash, id=user.id, old=user.password_hash)
    if not changed:  # another call was quicker
        raise APIError("invalid_credentials")
    return gate.keyring.jwt_answer(user.id, changed[0].jwt_version)


@jwt_routes.get("/users/me")
def users_me() -> JSONObject:
    """The account, with its first live key."""
    names = ("id", "username", "token_limit", "tokens_used", "created_at")
    account = {name: getattr(g.caller, name) for name in names}
    account["api_key"] = next((key["api_key"] for key in keys_of(g.caller.id)), None)
    if account["api_key"] is None:
        account["hint"] = "No key to show; POST /users/me/api-key makes a new one."
    return account


@jwt_routes.post("/users/me/api-key")
def replace_key() -> JSONObject:
    """A new key in the place of the one that /users/me shows: its row, and so its usage, go on."""
    api_key, row = gate.keyring.new_key(user_id=g.caller.id, name="default")
    sql = """UPDATE api_keys SET nonce = :nonce, key_hash = :key_hash, created_at = :now,
 last_used_at = NULL WHERE id = (SELECT min(id) FROM api_keys WHERE user_id = :user_id
 AND revoked_at IS NULL) RETURNING id"""
    with gate.database.begin() as execute:
        execute(LOCK_USER, row)
        if not execute(sql, row):
            execute(INSERT_KEY, row)
    return {"api_key": api_key}


def keys_of(user_id: int) -> list[JSONObject]:
    """A user's live keys with their use; times in Unix seconds."""
    sql = """SELECT api_key_id, CAST(sum(prompt_tokens + completion_tokens) AS BIGINT) FROM usage
 WHERE user_id = :user_id GROUP BY api_key_id"""
    used = dict(gate.database.query(sql, user_id=user_id))
    keys = []
    for row in gate.database.query(LIVE_KEYS, user_id=user_id):
        key = {name: getattr(row, name) for name in ("id", "name", "created_at", "last_used_at")}
        key["api_key"] = gate.keyring.stored_key(row)
        keys.append(key | {"tokens_used": used.get(row.id, 0)})
    return keys


@jwt_routes.get("/users/me/keys")
def list_keys() -> JSONObject:
    """The keys that work."""
    return {"data": keys_of(g.caller.id)}


@jwt_routes.post("/users/me/keys")
def create_key() -> tuple[JSONObject, int]:
    """One more key, by name; 400 `too_many_keys`."""
    name = utf8(read_json().get("name")).decode().strip()
    if not name.isprintable() or not 1 <= len(name) <= 64:
        raise APIError("invalid_value", "name", must_be="1 to 64 printable characters")
    _, row = gate.keyring.new_key(user_id=g.caller.id, name=name)
    with gate.database.begin() as execute:
        execute(LOCK_USER, row)
        if len(execute(LIVE_KEYS, row)) >= MAX_KEYS:
            raise APIError("too_many_keys")
        (made,) = execute(INSERT_KEY, row)
    return next(key for key in keys_of(g.caller.id) if key["id"] == made.id), 201


def revoke(user_id: int, key_id: int) -> None:
    """Ends a key at once; answers that run with it go on. 404."""
    sql = """UPDATE api_keys SET revoked_at = :now
 WHERE id = :id AND user_id = :user_id AND revoked_at IS NULL RETURNING id"""
    values = {"now": int(time.time()), "id": min(key_id, MAX_BIGINT), "user_id": user_id}
    if not gate.database.write(sql, **values):
        raise APIError("key_not_found")


@jwt_routes.delete("/users/me/keys/<int:key_id>")
def revoke_key(key_id: int) -> tuple[str, int]:
    """Ends one of the caller's keys."""
    revoke(g.caller.id, key_id)
    return "", 204


@key_routes.get("/v1/models", defaults={"model": None})
@key_routes.get("/v1/models/<path:model>")
@key_routes.get("/v1/models//<path:model>")  # a model's name may be a path on vLLM's disk
def models(model: str | None) -> JSONObject:
    """The models of all servers and the aliases, or one of them."""
    found = gate.upstreams.public_models()
    if model is None:
        return {"object": "list", "data": list(found.values())}
    model = request.path.removeprefix("/v1/models/")
    if model not in found:
        raise APIError("model_not_found", "model", model=model[:200])
    return found[model]


@key_routes.post("/v1/chat/completions", defaults={"endpoint": "chat/completions"})
@key_routes.post("/v1/completions", defaults={"endpoint": "completions"})
@key_routes.post("/v1/embeddings", defaults={"endpoint": "embeddings"})
@key_routes.post("/v1/messages", defaults={"endpoint": "messages"})
@key_routes.post("/v1/responses", defaults={"endpoint": "responses"})
def relay_request(endpoint: str) -> Response:
    """vLLM's answer, plain or streamed, within the caller's quota."""
    body = read_json()
    require_relayable(body, endpoint)
    if endpoint == "completions" and body.get("max_tokens") is None:
        body["max_tokens"] = 16  # as vLLM and OpenAI do; other servers would go on
    body["model"] = gate.upstreams.resolve(body["model"])
    relay = Relay(gate.watcher, g.caller, endpoint, body)
    gate.watcher.admit(relay)
    g.relay = relay
    response = relay.answer(body, request.get_data())
    left = relay.user.token_limit - relay.tokens_used
    response.headers["x-ratelimit-limit-tokens"] = str(relay.user.token_limit)
    response.headers["x-ratelimit-remaining-tokens"] = str(max(0, left))
    return response


COUNTING = threading.Semaphore(24)  # callers of count_tokens at a time: they hold threads


@key_routes.post("/v1/messages/count_tokens")
def count_tokens() -> Response:
    """vLLM's count of a prompt, free of charge."""
    upstreams = gate.upstreams
    body = read_json()
    require_relayable(body, "messages")
    body["model"] = upstreams.resolve(body["model"])
    server = upstreams.first_there(upstreams.route(body["model"], []))
    with a_place(COUNTING, APIError("overloaded")):
        answer = server.call("/v1/messages/count_tokens", body, 30)
    require_good_answer(answer.status_code, answer.headers)
    return plain_answer(answer.content, answer.status_code, answer.headers)


@either_routes.get("/users/usage")
def users_usage() -> JSONObject | Response:
    """The report, as JSON or, with Accept: text/plain, drawn."""
    days = request.args.get("days", "30")
    if days not in map(str, range(1, 367)):
        raise APIError("invalid_value", "days", must_be="a whole number from 1 to 366")
    report = usage_report(gate.database, g.caller, int(days), gate.resets_at())
    if request.accept_mimetypes.best_match(["application/json", "text/plain"]) == "text/plain":
        return Response(drawn_usage(g.caller.username, report), mimetype="text/plain")
    return report


@routes.get("/health")
def health() -> JSONObject:
    """200 while the database answers and takes writes; 503."""
    if gate.watcher.draining:
        raise APIError("draining")
    gate.database.write(COUNT_TRY, name_hash="health")  # no name's: FORGET_OLD_LOGINS deletes it
    up = sum(not server.why_down for server in gate.upstreams)
    return {"status": "ok", "upstreams": {"up": up, "of": len(gate.upstreams)}}


def printable(name: str) -> str:
    """A name without control characters, for a terminal or the log."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def table(title: str, rows: list[Any]) -> str:
    """Lines of (name, requests, prompt, completion) with a bar each, in 80 columns."""
    text = f"{title:<28} {'requests':>9} {'prompt':>12} {'completion':>12}\n"
    most = max((row[2] + row[3] for row in rows), default=0) or 1
    for name, count, prompt, completion in rows:
        bar = "█" * round(14 * (prompt + completion) / most)
        name = printable(str(name))[:28]
        text += f"{name:<28} {count:>9,} {prompt:>12,} {completion:>12,} {bar}\n"
    return text


def drawn_usage(username: str, report: JSONObject) -> str:
    """A usage report in 80 columns."""
    used = report["tokens_used"]
    limit = report["token_limit"]
    text = f"{username}: {used:,} of {limit:,} tokens used ({100 * used // limit} %)\n"
    if report["resets_at"]:
        text += f"begins again on {when(report['resets_at'])}\n"
    for key, title in (("by_day", "date"), ("by_model", "model"), ("by_key", "key")):
        rows = [(row[title], *(row[column] for column in SUMS)) for row in report[key]]
        text += f"\n{table(title, rows)}"
    return text


def contexts() -> dict[str, int]:
    """{id or alias: tokens of its context}, the default model first; 502 while no server is up."""
    models = gate.upstreams.public_models()
    names = [*(alias for alias in gate.upstreams.aliases if alias in models), *models]
    return {name: models[name].get("max_model_len", UNKNOWN_CONTEXT) for name in names}


@key_routes.get("/opencode.json")
def opencode_json() -> JSONObject:
    """A complete opencode.json for this gate; 502 while no server is up."""
    models: JSONObject = {}
    for name, context in contexts().items():
        limit = {"context": context, "output": min(context // 4, 32000)}
        models[name] = {"name": name, "tool_call": True, "limit": limit}
        real = gate.upstreams.resolve(name)
        # OpenCode's repairs for Mistral's models go by `id`; without it the file outlives a change.
        if real != name and re.search("mistral|devstral", real, re.IGNORECASE):
            models[name]["id"] = real
    options = {"baseURL": f"{base_url()}/v1", "apiKey": "{env:LLMGATE_API_KEY}"}
    provider: JSONObject = {"npm": "@ai-sdk/openai-compatible", "name": "llmgate"}
    provider |= {"options": options, "models": models}
    default = f"llmgate/{next(iter(models))}"
    config = {"$schema": "https://opencode.ai/config.json", "provider": {"llmgate": provider}}
    return config | {"model": default, "small_model": default}


@routes.get("/.well-known/opencode")
def well_known_opencode() -> JSONObject:
    """What `opencode auth login URL` reads, without a key; 404 if OPENCODE_DISCOVERY is off."""
    if gate.settings.opencode_discovery == "off":
        raise APIError("not_found", hint="GET / says what there is")
    ask = 'printf "llmgate API key: "; stty -echo; read -r LLMGATE_API_KEY; stty echo; echo'
    ask = f'if [ -z "$LLMGATE_API_KEY" ]; then {{ {ask}; }} < /dev/tty > /dev/tty; fi'
    command = ["sh", "-c", f'{ask}; printf %s "$LLMGATE_API_KEY"']
    return {"auth": {"command": command, "env": "LLMGATE_API_KEY"}, "config": opencode_json()}


@key_routes.get("/claude.json")
def claude_json() -> JSONObject:
    """A complete settings.json for Claude Code; it holds the caller's key."""
    model, context = next(iter(contexts().items()))
    variables = {
        "ANTHROPIC_BASE_URL": base_url(),
        "ANTHROPIC_AUTH_TOKEN": sent_credential(),
        "ANTHROPIC_MODEL": model,
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(context),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(min(context // 4, 32000)),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_MAX_RETRIES": "3",  # or it is silent for minutes while vLLM is down
    }
    sizes = {f"ANTHROPIC_DEFAULT_{size}_MODEL": model for size in ("OPUS", "SONNET", "HAIKU")}
    return {"env": variables | sizes}


@key_routes.get("/codex.toml")
def codex_toml() -> Response:
    """A complete config.toml for Codex; the key comes from LLMGATE_API_KEY."""
    model, context = next(iter(contexts().items()))
    quoted = json.dumps(model, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML escapes DEL
    text = f"""model = {quoted}
model_provider = "llmgate"
model_context_window = {context}

[model_providers.llmgate]
name = "llmgate"
base_url = {json.dumps(base_url() + "/v1")}
env_key = "LLMGATE_API_KEY"
wire_api = "responses"
"""
    return Response(text, content_type="application/toml; charset=utf-8")


@routes.before_app_request
def begin_request() -> None:
    """When the request began, and its id; 400 `host_not_allowed`. Bodies of accounts are small."""
    g.started_at = time.monotonic()
    g.request_id = secrets.token_hex(16)
    allowed = gate.settings.allowed_hosts
    host = host_name(request.environ.get("HTTP_HOST", ""))
    if request.path != "/health" and (not host or (allowed and host not in allowed)):
        raise APIError("host_not_allowed")
    if not request.path.startswith("/v1/"):
        request.max_content_length = MAX_ACCOUNT_BODY_BYTES


@routes.after_app_request
def end_request(response: Response) -> Response:
    """The headers of every answer; the log line of those that were not relayed."""
    response.headers["X-Request-Id"] = g.request_id
    response.headers.setdefault("Cache-Control", "no-store")
    resets_at = gate.resets_at()
    is_metered = response.status_code == 429 or "x-ratelimit-limit-tokens" in response.headers
    if resets_at and is_metered:
        wait = duration(max(0, resets_at - int(time.time())))
        response.headers["x-ratelimit-reset-tokens"] = wait
    if "relay" not in g or not g.relay.meter:  # else the relay's own line tells
        who = f"{request.remote_addr} {g.get('login_name', '')}".strip()
        if "caller" in g:
            who = g.caller.username
        what = f"{request.method} {quote(request.path)} {response.status_code}{g.get('why', '')}"
        milliseconds = (time.monotonic() - g.started_at) * 1000
        log.info("%s %s %s, end %d ms", g.request_id, who, what, milliseconds)
    return response


def show_error(error: Exception) -> Response:
    """Any exception in the contract's shape; the unforeseen is logged, and a 500."""
    if isinstance(error, APIError):
        shown = error
    elif isinstance(error, HTTPException):
        hint = "GET / says what there is"
        if cast(Any, gate.create_url_adapter(request)).allowed_methods(f"/v1{request.path}"):
            hint = f"it is /v1{request.path}: a client's base URL ends in /v1"
        shown = APIError(CODES.get(error.code or 0, "bad_request"), hint=hint)
        shown.headers |= {name: value for name, value in error.get_headers() if name == "Allow"}
    else:
        shown = APIError("internal_error", reason=words_of(error))
        log.error("%s", g.request_id, exc_info=error)
    g.why = f" ({shown.for_log})"
    body = shown.body(anthropic=request.path.startswith("/v1/messages"))
    return Response(body, shown.status, shown.headers, content_type="application/json")


# ---- 9 App, server, command line ------------------------------------------------------------------
# Gate joins the parts; Server runs it under waitress and ends without losing a row; the operator's
# commands work beside a running gate.


def load_secret(settings: Settings, database: Database) -> str:
    """The secret, from the settings or its 0600 file, made on first start; SettingsError."""
    if settings.jwt_secret_key:
        return settings.jwt_secret_key
    path = Path(SECRET_FILE)
    if path.is_symlink():
        raise SettingsError(f"{SECRET_FILE} must be a file, not a link")
    with database.begin() as execute:  # of several gates one makes it
        if not path.exists():
            if execute("SELECT id FROM users LIMIT 1"):
                why = "bring it back, or (keys work, but are shown no more) openssl rand -hex 32"
                raise SettingsError(f"{path} is missing, but there are users: {why} > {path}")
            unfinished = path.with_suffix(".unfinished")  # a crash leaves no half of a secret
            unfinished.write_text(secrets.token_hex(32))
            unfinished.rename(path)
    make_private(path)
    secret = path.read_text(errors="replace").strip()
    if len(secret) < 32 or "\N{REPLACEMENT CHARACTER}" in secret:
        raise SettingsError(f"{SECRET_FILE} must hold 32 bytes or more: openssl rand -hex 32")
    return secret


# libpq notices within seconds that a host has vanished.
LIBPQ = {"connect_timeout": DB_TIMEOUT_S, "tcp_user_timeout": DB_TIMEOUT_S * 1000}
LIBPQ |= {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 2}
POOL = {"pool_timeout": DB_TIMEOUT_S, "pool_size": 32, "max_overflow": 32, "pool_use_lifo": True}
POOL |= {"pool_pre_ping": True}  # a connection may have ended since


class Gate(Flask):
    """The WSGI application; makes the tables and the secret where they are missing."""

    def __init__(self, settings: Settings) -> None:
        super().__init__("llmgate", static_folder=None)
        self.settings = settings
        self.url_map.merge_slashes = False  # or /v1//models would be answered by a redirect
        cast(Any, self.json).sort_keys = False
        self.config["SQLALCHEMY_DATABASE_URI"] = settings.database_url
        arguments = SQLITE if settings.database_url.startswith("sqlite") else LIBPQ
        self.config["SQLALCHEMY_ENGINE_OPTIONS"] = POOL | {"connect_args": arguments}
        self.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
        for blueprint in (routes, jwt_routes, key_routes, either_routes):
            self.register_blueprint(blueprint)
        self.register_error_handler(Exception, show_error)
        try:
            db.init_app(self)
            with self.app_context():
                self.database = Database(db.engine)
            secret = load_secret(settings, self.database)
        except (OSError, sqlite3.DatabaseError) as error:
            raise SettingsError(f"DATABASE_URL or {SECRET_FILE}: {error}") from None
        except (ImportError, ValueError, sa.exc.ArgumentError):
            why = "a database's URL; PostgreSQL's also needs: pip install 'psycopg[binary]'"
            raise SettingsError(f"DATABASE_URL must be {why}") from None
        self.keyring = Keyring(secret, settings.jwt_expiration_hours)
        self.upstreams = Upstreams(settings)
        self.watcher = Watcher(self.database, self.upstreams, settings)
        self.watcher.begin_period()

    def wsgi_app(self, environ: JSONObject, start_response: Any) -> Any:
        """Flask's; X-Forwarded-* counts where it comes from TRUSTED_PROXY."""
        environ["PATH_INFO"] = environ["PATH_INFO"] or "/"  # or Flask would answer by a redirect
        app: Any = super().wsgi_app
        if environ["REMOTE_ADDR"] == self.settings.trusted_proxy:
            app = ProxyFix(app, x_host=1, x_port=1)
        return app(environ, start_response)

    def resets_at(self) -> int | None:
        """When quotas begin again (Unix seconds); None: never."""
        return period_of(self.settings.quota_period, time.time())[1]


class LineFormatter(logging.Formatter):
    """One line per record, without control characters, keys and JWTs; tracebacks without values."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line; what could begin another one is escaped."""
        line = super().formatMessage(record)[:2000]
        return printable(re.sub(r"(sk-llmgate-|eyJ)[\w.-]+", r"\1...", line))

    def formatException(self, ei: Any) -> str:
        """A traceback; a driver's message may hold a row, and is cut to its first part."""
        return "".join(traceback.format_tb(ei[2])) + words_of(ei[1])


class LogFile(logging.handlers.RotatingFileHandler):
    """A file that is rotated at 10 MB; where it may not be renamed, it grows on."""

    def doRollover(self) -> None:
        """Begins a new file."""
        with suppress(OSError):
            super().doRollover()


def log_to(file: str, number: int) -> logging.Handler:
    """Begins the log; of several processes the first one rotates the file. SettingsError."""
    handler: logging.Handler = logging.StreamHandler()
    try:
        if file != "-" and number == 1:
            handler = LogFile(file, "a", 10 << 20, 5, "utf-8")
        elif file != "-":
            handler = logging.handlers.WatchedFileHandler(file, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"LOG_FILE must be writable: {error.strerror}") from None
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname).1s %(message)s"))
    logging.raiseExceptions = False  # or a full disk would bring each line to standard error
    logging.getLogger().addHandler(handler)
    log.setLevel(logging.INFO)
    for noisy in ("waitress.queue", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return handler


class JSONErrorTask(ErrorTask):
    """waitress's own refusals (a body or headers too large, no HTTP) in the contract's shape."""

    def execute(self) -> None:
        """Writes the error and closes the connection."""
        error = APIError(CODES.get(self.request.error.code, "bad_request"))
        request_id = secrets.token_hex(16)
        why = f"{error.code}: {self.request.error.body}"
        log.info("%s %s %d (%s)", request_id, self.channel.addr[0], error.status, why)
        status = f"{error.status} {http.client.responses[error.status]}"
        headers = [("Content-Type", "application/json"), ("X-Request-Id", request_id)]
        body = error.body(anthropic=getattr(self.request, "path", "").startswith("/v1/messages"))
        self.request.error.to_response = lambda _: (status, headers, body)
        super().execute()


class Parser(HTTPRequestParser):
    """A request; waitress lets urlsplit's ValueError end the connection without an answer."""

    def parse_header(self, header_plus: bytes) -> None:
        """Reads the request's head; refuses what cannot be its target."""
        try:
            super().parse_header(header_plus)
        except ValueError:
            raise ParsingError("Bad URI") from None


class Channel(HTTPChannel):
    """A connection whose errors are JSON."""

    error_task_class = JSONErrorTask
    parser_class = Parser

    def send_continue(self) -> None:
        """Asks for the body, unless there is none or it is refused."""
        if not self.request.completed:
            super().send_continue()


def bind(settings: Settings) -> socket.socket:
    """The listening socket; SettingsError."""
    address = (settings.host, settings.port)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server(address, family=family, backlog=1024)
    except (OSError, TypeError) as error:  # TypeError: a name that is none
        hint = "; if vLLM has port 8000, start the gate with PORT=8002" * (settings.port == 8000)
        why = f"an address of this machine, with a free PORT: {words_of(error)}{hint}"
        raise SettingsError(f"HOST must be {why}") from None
    timeout_ms = settings.upstream_timeout * 1000  # gives up a caller who never reads
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
    return listening


class Server:
    """One gate on a bound socket: serving in run(), ended by drain() from any thread."""

    def __init__(self, settings: Settings, listening: socket.socket) -> None:
        self.app = Gate(settings)
        host, port = listening.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._grace_s = 0.0  # what running answers get after drain()
        self._sockets: dict[int, Any] = {}  # all that waitress's loop looks at
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # a relay has two connections
        self._waitress = waitress.create_server(
            self.app,
            self._sockets,
            sockets=[listening],
            threads=settings.threads,
            channel_request_lookahead=1,  # sees within 0.1 s that a caller has left
            asyncore_use_poll=True,  # select() ends the process at descriptor 1024
            connection_limit=max(16, min(4000, (files - 100) // 2)),
            max_request_header_size=65536,
            max_request_body_size=settings.max_body_mb << 20,
            outbuf_high_watermark=1 << 20,  # what a slow reader may leave unread
            ident=None,
            clear_untrusted_proxy_headers=False,  # Gate.wsgi_app looks at them
        )
        self._waitress.channel_class = Channel

    def run(self) -> None:
        """Serves until drain() was called and all is answered and booked."""
        watcher = self.app.watcher
        watcher.start()
        while not watcher.draining:
            loop(0.1, True, self._sockets, 1)
        self._let_answers_end(self._grace_s)
        for relay in list(watcher.running):
            relay.stop(DRAINING)
        self._let_answers_end(5)
        for relay in list(watcher.running):
            if relay.meter:  # its caller does not read; without a row it ends by itself
                relay.end("error", DRAINING)
        self._waitress.task_dispatcher.shutdown()
        close_all(self._sockets)
        watcher.stop()
        with suppress(APIError):
            watcher.upkeep()
        for upstream in self.app.upstreams:
            upstream.close_idle()
            upstream.session.close()
        self.app.database.close()

    def drain(self, grace_s: float = 30) -> None:
        """Refuses new relays from now on; running ones get `grace_s`, then run() ends."""
        self._grace_s = grace_s
        self.app.watcher.draining = True

    def _let_answers_end(self, wait_s: float) -> None:
        """Serves on until all is answered, but not for longer than this."""
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            channels = list(self._waitress.active_channels.values())
            unsent = any(c.requests or c.total_outbufs_len for c in channels)
            if not unsent and not self.app.watcher.running:
                return
            loop(0.1, True, self._sockets, 1)


# What ends a gate; but what nohup ignores stays ignored.
ENDING = {signal.SIGTERM}
ENDING |= {x for x in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(x) != signal.SIG_IGN}


def serve(settings: Settings, listening: socket.socket, number: int = 1) -> None:
    """Runs one gate, of PROCESSES the one with this number, until a signal of ENDING.

    A second signal ends it at once.
    """
    with suppress(AttributeError):  # glibc would keep the memory of large bodies for good
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    # Of a process's threads one runs Python at a time; on one core it hands on to the next in half
    # the time. Each of several processes takes another one.
    first = os.getpid() if settings.processes == 1 else os.getppid()
    run_on({sorted(CORES)[(first + number) % len(CORES)]})
    if multiprocessing.parent_process():
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: ends when that one does
        logging.getLogger().handlers.clear()  # that one's
    log_to(settings.log_file, number)
    server = Server(settings, listening)
    signals_at: list[float] = []  # monotonic

    def end(*_: object) -> None:
        signals_at.append(time.monotonic())
        server.drain()
        # A terminal, a shell or a service manager may send two at once; what comes later is a wish.
        if signals_at[-1] > signals_at[0] + 1:
            os._exit(1)

    for name in ENDING:
        signal.signal(name, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    if number == 1:
        urls = ", ".join(upstream.url for upstream in server.app.upstreams)
        port = urlsplit(server.app.upstreams[0].url).port or 80
        start_one = f"none yet at {urls}\n          start one: vllm serve MODEL --port {port}"
        click.echo(f"""llmgate   {server.url}
models    {", ".join(map(printable, server.app.upstreams.models())) or start_one}
database  {sa.make_url(settings.database_url).set(query={}).render_as_string()}
register  {how_to_register(server.url, settings)}
stop      Ctrl-C: running answers get 30 s; once more: at once""")
    server.run()


def serve_all(settings: Settings, listening: socket.socket) -> None:
    """Runs PROCESSES gates on one socket, and another for one that dies, until a signal of ENDING."""
    log_to(settings.log_file, 0)
    Gate(settings).database.close()  # makes the tables and the secret, while nobody else does
    awaited = ENDING | {signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)  # for sigwait(); a gate unblocks its own
    fork = multiprocessing.get_context("fork")
    gates: dict[int, BaseProcess] = {}
    while True:
        for number in range(1, settings.processes + 1):
            old = gates.get(number)
            if old and old.is_alive():
                continue
            if old:
                log.warning("Process %d ended (%d); starting another.", number, old.exitcode)
                time.sleep(1)  # it may be one that cannot live
            arguments = (settings, listening, number)
            gates[number] = fork.Process(target=serve, args=arguments, daemon=True)
            gates[number].start()
        if signal.sigwait(awaited) != signal.SIGCHLD:
            break
    for process in gates.values():
        process.terminate()
    for process in gates.values():
        process.join()
    sys.exit(any(process.exitcode for process in gates.values()))


@click.group(invoke_without_command=True)
@click.version_option(VERSION, prog_name="llmgate")
@click.pass_context
def cli(context: click.Context) -> None:
    """User accounts, API keys and token quotas in front of a vLLM server.

    Without a command: serves. Settings are environment variables or lines in .env; .env.example
    lists them. Every command works while the gate runs.
    """
    if "--help" in sys.argv:  # help makes no database
        return
    settings = Settings.from_env(read_dotenv(Path(".env")) | os.environ)
    command = context.invoked_subcommand
    if command is None:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # 1024 are too few for 500 relays
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536), most))
        run = serve if settings.processes == 1 else serve_all
        return run(settings, bind(settings))
    url = sa.make_url(settings.database_url)
    is_missing = url.drivername == "sqlite" and not Path(url.database or "").exists()
    if is_missing and command not in ("create-tables", "create-user"):
        raise click.ClickException(f"There is no database {url.database}; is this its folder?")
    context.with_resource(Gate(settings).app_context())


TOKENS = click.IntRange(1, MAX_BIGINT)


def account(_: click.Context, __: click.Parameter, name: str | None) -> Row:
    """The account of a name, None where none was given; a click error if nobody has it."""
    if name is None:
        return None
    found = utf8(name) and gate.database.query(USER_BY_NAME, name=name.lower())
    if not found:
        raise click.ClickException(f"There is no user {name!r}; see: python llmgate.py users")
    return found[0]


USER = click.argument("user", metavar="NAME", callback=account)
USER_OR_ALL = click.argument("user", metavar="[NAME]", callback=account, required=False)


def update(user: Row, said: str, assignments: str, value: object) -> None:
    """UPDATEs an account's row by these SQL assignments of :value, and says so."""
    sql = f"UPDATE users SET {assignments} WHERE id = :id RETURNING id"
    gate.database.write(sql, value=value, id=user.id)
    click.echo(f"{user.username} {said}.")


def asked_password() -> str:
    """A password typed twice, or the first line of standard input."""
    if sys.stdin.isatty():
        return str(click.prompt("Password", hide_input=True, confirmation_prompt=True))
    return sys.stdin.readline().rstrip("\r\n")


@cli.command()
def create_tables() -> None:
    """Make the tables and the secret where they are missing."""
    click.echo("The tables are there.")


@cli.command()
@click.argument("name")
@click.option("--token-limit", type=TOKENS, help="The quota.")
def create_user(name: str, token_limit: int | None) -> None:
    """Make an account (password asked, or on stdin); print its key."""
    limit = token_limit or gate.settings.default_token_limit
    click.echo(register(name, asked_password(), limit)[1])


@cli.command()
def users() -> None:
    """List all accounts with their quotas."""
    click.echo(f"{'id':>5} {'username':<24} {'used':>13} {'limit':>13}")
    for user in gate.database.query("SELECT * FROM users ORDER BY id"):
        used = user.tokens_used
        limit = user.token_limit
        state = "disabled" if user.disabled_at else ""
        click.echo(f"{user.id:>5} {user.username:<24} {used:>13,} {limit:>13,} {state}")


@cli.command()
@USER_OR_ALL
@click.option("--days", type=click.IntRange(1, 366), default=30, show_default=True)
def usage(user: Row, days: int) -> None:
    """Draw the usage of one account, or of all, the heaviest first."""
    if user is None:
        rows = gate.database.query(USAGE_BY_USER, since=int(time.time()) // 86400 - days + 1)
        return click.echo(table("username", rows), nl=False)
    report = usage_report(gate.database, user, days, gate.resets_at())
    click.echo(drawn_usage(user.username, report), nl=False)


@cli.command()
@USER
@click.option("--revoke", "key_id", type=click.IntRange(1), metavar="ID", help="End this key.")
def keys(user: Row, key_id: int | None) -> None:
    """List the keys of an account, or end one."""
    if key_id:
        revoke(user.id, key_id)
    click.echo(f"{'id':>5} {'name':<28} {'created':<10} {'last used':<10} {'tokens':>13}")
    for key in keys_of(user.id):
        made = date_of(key["created_at"])
        used = date_of(key["last_used_at"])
        label = printable(key["name"])[:28]
        click.echo(f"{key['id']:>5} {label:<28} {made:<10} {used:<10} {key['tokens_used']:>13,}")


@cli.command()
@USER
@click.argument("token_limit", type=TOKENS)
def set_limit(user: Row, token_limit: int) -> None:
    """Set the quota of an account."""
    update(user, f"may use {token_limit:,} tokens", "token_limit = :value", token_limit)


@cli.command()
@USER
def disable(user: Row) -> None:
    """Refuse an account's keys and logins from now on."""
    update(user, "is disabled", "disabled_at = :value", int(time.time()))


@cli.command()
@USER
def enable(user: Row) -> None:
    """Let a disabled account in again, with the same keys."""
    update(user, "is enabled", "disabled_at = :value", None)


@cli.command("reset-usage")
@USER_OR_ALL
@click.option("--all", "everyone", is_flag=True, help="All accounts.")
def reset_usage_command(user: Row, everyone: bool) -> None:
    """Set the used tokens to 0; the rows stay, balanced by one more."""
    if bool(user) == everyone:
        raise click.UsageError("Give a NAME, or --all.")
    with gate.database.begin() as execute:
        reset_usage(execute, user.id if user else 0)
    who = user.username if user else "Every account"
    click.echo(f"{who} begins again at 0 tokens.")


@cli.command()
@USER
def set_password(user: Row) -> None:
    """Set a password (asked, or on stdin) and end the account's JWTs."""
    assignments = "password_hash = :value, jwt_version = jwt_version + 1"
    update(user, "has a new password", assignments, hash_password(asked_password()))


@cli.command()
def check() -> None:
    """Recount tokens_used from the rows; say what differs (exit status 1)."""
    sums = """SELECT username, tokens_used, coalesce(sum(prompt_tokens + completion_tokens), 0),
 tokens_reserved, coalesce(sum(reserved), 0) FROM users u LEFT JOIN usage r ON r.user_id = u.id
 GROUP BY u.id ORDER BY u.id"""
    rows = [row for row in gate.database.query(sums) if row[1] != row[2] or row[3] != row[4]]
    for row in rows:
        click.echo("{}: {} used, rows say {}; {} reserved, rows say {}".format(*row))
    click.echo(f"{len(rows)} accounts differ from their rows.")
    sys.exit(bool(rows))


def main() -> None:
    """The command line."""
    os.umask(0o077)  # database, -wal, -shm, log and secret are the gate's alone
    cast(Any, sys.stdout).reconfigure(errors="replace")  # a terminal may know no bars
    try:
        cli()
    except APIError as error:
        why = "" if str(error) in error.for_log else f" ({error.for_log})"
        sys.exit(f"llmgate: {error}{why}")


if __name__ == "__main__":
    main()
