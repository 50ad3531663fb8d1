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
import fcntl
import hashlib
import hmac
import http.client
import json
import logging.handlers
import os
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
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import quote, urlsplit

import bcrypt
import click
import jwt
import requests
import sqlalchemy as sa
import waitress
from dotenv import dotenv_values
from flask import Blueprint, Flask, Response, current_app, g, request
from flask_sqlalchemy import SQLAlchemy
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.task import ErrorTask
from waitress.wasyncore import close_all, loop
from werkzeug.exceptions import HTTPException

JSONObject = dict[str, Any]
Execute = Callable[..., list[Any]]  # (sql with :names, {name: value}) -> its rows, as tuples

VERSION = "1.0.0"
LEASE_S = 20  # a pending row whose gate has not renewed it for so long is taken for dead
UPKEEP_S = 2  # between two rounds of checkpoints, leases and recovery
PING_S = 15.0  # of silence, after which a stream's caller gets a comment
DB_TIMEOUT_S = 5  # waiting for a database that others have locked, or that is away
CONNECT_TIMEOUT_S = 2
ABORT_GRACE_S = 2.0  # for vLLM to end a request that it was told to abort
HANGUP_GRACE_S = 0.6  # for vLLM to notice that its caller has gone, and to send its counts
MODELS_TTL_S = 10  # age at which a list of models is fetched anew
RETRY_OPTION_S = 600  # until vLLM is asked again for what it has refused
JWT_LEEWAY_S = 10  # how far the clocks of two gates may differ
MAX_EVENT_BYTES = 4 << 20
MAX_ACCOUNT_BODY_BYTES = 64 << 10  # of /auth and /users
MAX_KEYS = 100  # live ones of a user
MAX_BIGINT = 2**63 - 1
TEMPLATE_TOKENS = 256  # what a chat template may add beyond the bytes of the JSON around it
PICTURE_TOKENS = 16384  # the most that a common model makes of one picture (Qwen-VL)
PICTURE_ESTIMATE = 1000  # what most models make of it
UNKNOWN_CONTEXT = 131072  # tokens, for a model whose server does not tell
SILENT_TOKENS_PER_S = 20  # the guess for a vLLM that has begun but shows nothing
LOCAL_PORTS = (8001, 8000, 11434, 8080, 9931, 1234, 30000)  # vLLM, Ollama, llama.cpp, ...
SECRET_FILE = "llmgate.secret"

log = logging.getLogger("llmgate")


# ---- 1 Settings -----------------------------------------------------------------------------------
# The environment, read once. What cannot be right stops the start with one line that names the
# variable, and never shows its value: it may be a secret in the wrong place.

PORT = r":([1-5]?\d{1,4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])"
URL = rf"https?://(\[.+\]|[^/?#@\s:]+)({PORT})?(/[^?#\s]*)?"
HOST = rf"(\[(?=.*:.*:)[0-9A-Fa-f:.]+\]|[\w.-]+)({PORT})?"
DATABASE = (r"sqlite:///.*[^/].*|postgresql\+psycopg://.+", "sqlite:/// or postgresql+psycopg://")
COUNT = range(1, MAX_BIGINT + 1)
SECRET_SETTINGS = ("JWT_SECRET_KEY", "VLLM_API_KEY", "REGISTRATION_TOKEN", "DATABASE_URL")


class SettingsError(Exception):
    """One line for the operator: which variable is wrong, and what it must be."""


def setting(default: str, rule: str | range = ".*", must_be: str = "printable UTF-8") -> Any:
    """A field: its variable's default, the pattern or range it must be in, and that in words."""
    return field(metadata={"default": default, "rule": rule, "must_be": must_be})


@dataclass(frozen=True)
class Settings:
    """All settings; each field is read from the variable of its name in upper case."""

    vllm_endpoint: tuple[str, ...] = setting("", URL, "a URL like http://127.0.0.1:8001")
    vllm_api_key: str = setting("")  # the gate's own key for vLLM
    host: str = setting("127.0.0.1")
    port: int = setting("8000", range(65536))  # 0: the kernel chooses
    database_url: str = setting("sqlite:///llmgate.db", *DATABASE)
    jwt_secret_key: str = setting("", "|.{32,}", "32 bytes or more: openssl rand -hex 32")
    jwt_expiration_hours: int = setting("24", range(1, 87601))
    default_token_limit: int = setting("1000000", COUNT)
    max_token_limit: int = setting("1000000", COUNT)  # DEFAULT_TOKEN_LIMIT if not set
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
    trusted_proxy: str = setting("", "[0-9a-fA-F.:]*", "an address")  # X-Forwarded-* counts
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
        if not env.get("MAX_TOKEN_LIMIT", "").strip():
            values["max_token_limit"] = values["default_token_limit"]
        derive(values)
        return cls(**values)


def derive(values: JSONObject) -> None:
    """Puts in what follows from other settings; SettingsError where two do not fit."""
    local = re.fullmatch(r"localhost|::1|127\..*", values["host"])
    if values["registration"] == "invite" and not values["registration_token"]:
        raise SettingsError("REGISTRATION_TOKEN must be set when REGISTRATION is invite")
    if values["default_token_limit"] > values["max_token_limit"]:
        raise SettingsError("DEFAULT_TOKEN_LIMIT must be MAX_TOKEN_LIMIT or less")
    _, sqlite, path = values["database_url"].partition("sqlite:///")
    if sqlite:  # Flask-SQLAlchemy would look for it elsewhere
        values["database_url"] = f"sqlite:///{Path(path).absolute()}"
    elif not values["jwt_secret_key"]:
        raise SettingsError("JWT_SECRET_KEY must be set beside PostgreSQL, alike for all gates")
    hosts = list(values["allowed_hosts"])
    if local and not hosts:
        hosts = ["localhost", "127.0.0.1", "[::1]", values["host"]]
        hosts.append(urlsplit(values["public_url"]).netloc)
    values["allowed_hosts"] = tuple(host_name(host) for host in hosts)
    values["vllm_endpoint"] = tuple(re.sub("(/v1)?/*$", "", url) for url in values["vllm_endpoint"])
    values["model_aliases"] = dict(re.split(r"\s*=\s*", pair) for pair in values["model_aliases"])
    values["public_url"] = values["public_url"].rstrip("/")
    values["registration"] = values["registration"] or ("open" if local else "closed")


def host_name(host: str) -> str:
    """A host as it is compared: in lower case, without a port; "" for what is no host."""
    found = re.fullmatch(HOST, host, re.ASCII)
    return found[1].lower() if found else ""


def read_dotenv(path: Path) -> dict[str, str]:
    """The variables of .env; SettingsError for a misspelt name; hides a file that has secrets."""
    try:
        found = {name: value or "" for name, value in dotenv_values(path).items()}
    except UnicodeDecodeError:
        raise SettingsError(".env must be a text file in UTF-8") from None
    known = [item.name.upper() for item in fields(Settings)]
    for name in found:
        near = difflib.get_close_matches(name.upper(), known, 1, cutoff=0.8)
        if near and name not in known and not name.startswith("LLMGATE_"):
            raise SettingsError(f"{name} in .env is no setting; did you mean {near[0]}?")
    if any(found.get(name) for name in SECRET_SETTINGS):
        make_private(path)
    return found


def make_private(path: Path) -> None:
    """Takes a file with a secret out of the sight of other users of this machine."""
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
        log.warning("%s was open to other users of this machine; repaired", path)


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
    "missing_api_key": (401, "Send the header 'Authorization: Bearer KEY'."),
    "invalid_api_key": (401, "This API key is not valid; GET /users/me shows the right one."),
    "invalid_token": (401, "This JWT is not valid; log in again at /auth/token."),
    "token_expired": (401, "This JWT has expired; log in again at /auth/token."),
    "invalid_credentials": (401, "Wrong username or password."),
    "registration_closed": (403, "{why}."),
    "account_disabled": (403, "This account is disabled; ask the operator."),
    "not_found": (404, "There is nothing at this path; {hint}."),
    "model_not_found": (404, "No model {model!r} here; GET /v1/models lists them."),
    "key_not_found": (404, "No such key; GET /users/me/keys lists yours."),
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
# The first code of each status, for what Flask and waitress refuse by themselves.
CODES = {status: code for code, (status, _) in reversed(ERRORS.items())}


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


# ---- 3 Database -----------------------------------------------------------------------------------
# schema.sql makes the tables. All else is SQL in short transactions on the driver's own cursor: it
# costs a tenth of an ORM session's, and one way to the database is enough.

db = SQLAlchemy()


class Database:
    """The database: short write transactions, one at a time on SQLite, and reads beside them."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._sqlite = engine.dialect.name == "sqlite"
        driver = cast(Any, engine.dialect).dbapi
        no_connection = (sa.exc.OperationalError, sa.exc.TimeoutError)
        self._unavailable = (driver.OperationalError, driver.InterfaceError, *no_connection)
        self._lock = threading.Lock()  # protects SQLite's write lock, so that nobody polls for it
        if self._sqlite:
            folder = Path(engine.url.database or "").parent
            self._folder = os.open(folder, os.O_RDONLY)  # other processes lock it
            pragmas = "PRAGMA synchronous = NORMAL; PRAGMA foreign_keys = ON"
            sa.event.listen(engine, "connect", lambda made, _: made.executescript(pragmas))

    def create_tables(self) -> None:
        """Runs schema.sql in one transaction, through the driver: its comments have ";". 503."""
        ddl = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")
        with self._connected() as (connection, _):
            driver = connection.driver_connection
            if self._sqlite:
                driver.executescript(f"PRAGMA journal_mode = WAL; BEGIN IMMEDIATE; {ddl} COMMIT")
            else:  # SQLite counts an INTEGER PRIMARY KEY by itself; two gates may start at once
                counted = "INTEGER PRIMARY KEY GENERATED BY DEFAULT AS IDENTITY"
                ddl = ddl.replace("INTEGER PRIMARY KEY NOT NULL", counted)
                driver.execute("SELECT pg_advisory_xact_lock(7435623);" + ddl)
                driver.commit()

    @contextmanager
    def begin(self) -> Iterator[Execute]:
        """A write transaction's execute(sql, {name: value}); an exception undoes it all. 503."""
        with self.exclusive() as left_ms, self._connected() as (connection, execute):
            if self._sqlite:
                execute(f"PRAGMA busy_timeout = {left_ms}")  # other programs may have it locked
                execute("BEGIN IMMEDIATE")  # an upgrade of a reader would just fail
            yield execute
            connection.commit()

    def write(self, sql: str, **values: object) -> list[Any]:
        """What one statement returns (RETURNING), in a transaction of its own. 503."""
        with self.begin() as execute:
            return execute(sql, values)

    def query(self, sql: str, **values: object) -> list[Any]:
        """The rows of one SELECT, as tuples; it waits for no writer. 503."""
        with self._connected() as (_, execute):
            return execute(sql, values)

    @contextmanager
    def _connected(self) -> Iterator[tuple[Any, Execute]]:
        """A connection and its execute(). 503 for a database that is away, locked or full."""

        def execute(sql: str, values: Mapping[str, object] = {}) -> list[Any]:
            if self._sqlite:  # it has one writer, so there are no rows to lock
                sql = sql.replace(" FOR UPDATE", "")
            else:
                sql = re.sub(r":(\w+)", r"%(\1)s", sql)
            cursor.execute(sql, values)
            return cursor.fetchall() if cursor.description else []

        try:
            with closing(self._engine.raw_connection()) as connection:
                cursor: Any = connection.cursor()
                yield connection, execute
        except self._unavailable as error:
            if getattr(error, "sqlite_errorname", "") == "SQLITE_ERROR":
                raise  # our own SQL is wrong
            raise APIError("database_unavailable", reason=words_of(error)) from None

    @contextmanager
    def exclusive(self) -> Iterator[int]:
        """Keeps SQLite's other writers out, threads and processes; 503 after DB_TIMEOUT_S.

        Gives the milliseconds of that time that are left.
        """
        if not self._sqlite:
            yield 0
            return
        deadline = time.monotonic() + DB_TIMEOUT_S
        if not self._lock.acquire(timeout=DB_TIMEOUT_S):
            raise APIError("database_unavailable", reason="another thread writes for too long")
        try:
            # By SQLite's own waiting, two processes would do 1.2 times the requests of one, not 1.5.
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() > deadline:
                    raise APIError("database_unavailable", reason="another process has it locked")
                time.sleep(0.0003)
            yield max(1, int((deadline - time.monotonic()) * 1000))
        finally:
            fcntl.flock(self._folder, fcntl.LOCK_UN)
            self._lock.release()

    def close(self) -> None:
        """Closes what is open; on SQLite the last one to close moves the log into the file."""
        self._engine.dispose()
        if self._sqlite:
            os.close(self._folder)


def gate() -> Gate:
    """The gate that serves the current request or command."""
    return cast(Gate, cast(Any, current_app)._get_current_object())


# ---- 4 Accounts and keys --------------------------------------------------------------------------
# Passwords, JWTs, API keys, and who sent one: g.caller. Neither a key nor a JWT is stored: the one is
# derived again when it is shown, the other is signed.

BASE62 = string.digits + string.ascii_letters
USERNAME = re.compile(r"[A-Za-z0-9_.-]{3,64}")
API_KEY = re.compile(r"sk-llmgate-([0-9A-Za-z]{43})([0-9A-Za-z]{6})")
BCRYPT_ROUNDS = 10  # OWASP's least, about 60 ms
# id, jwt_version, password_hash (of no password), disabled_at of a name that nobody has.
NOBODY = (0, 0, "$2b$10$abcdefghijklmnopqrstuu4T826PRnz0Hu6YlprUuxkZxOOj5Fw5S", None)
HASHING_AT_ONCE = max(1, (os.cpu_count() or 2) - 1)  # leaves a core for the streams
HASHING = threading.Semaphore(HASHING_AT_ONCE)
HASHING_PLACES = threading.Semaphore(HASHING_AT_ONCE + 8)  # of those who hash or wait for it


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
    api_key_id: int | None = None
    key_used_at: int | None = None  # Unix seconds, to the minute


USER = """u.id, u.username, u.token_limit, u.tokens_used, u.tokens_reserved, u.jwt_version,
 u.created_at, u.disabled_at"""
CALLER_BY_JWT = f"SELECT {USER} FROM users u WHERE u.id = :user_id AND u.jwt_version = :version"
CALLER_BY_KEY = f"""SELECT {USER}, k.id, k.last_used_at FROM api_keys k
 JOIN users u ON u.id = k.user_id WHERE k.key_hash = :key_hash AND k.revoked_at IS NULL"""
LIVE_KEYS = """SELECT id, name, created_at, last_used_at, nonce, key_hash FROM api_keys
 WHERE user_id = :user_id AND revoked_at IS NULL ORDER BY id"""
INSERT_KEY = """INSERT INTO api_keys (user_id, name, nonce, key_hash, created_at)
 VALUES (:user_id, :name, :nonce, :key_hash, :now) RETURNING id"""
INSERT_USER = """INSERT INTO users (username, password_hash, token_limit, created_at)
 VALUES (:username, :hash, :limit, :now) ON CONFLICT DO NOTHING RETURNING id"""
USER_BY_NAME = """SELECT id, jwt_version, password_hash, disabled_at FROM users
 WHERE lower(username) = :name"""
COUNT_TRY = """INSERT INTO login_attempts (name_hash, tries, held_until_ms)
 VALUES (:name_hash, 1, 0) ON CONFLICT (name_hash) DO UPDATE SET tries = login_attempts.tries + 1
 RETURNING tries, held_until_ms"""
HOLD_NAME = "UPDATE login_attempts SET held_until_ms = :held WHERE name_hash = :name_hash"
FORGET_OLD_LOGINS = "DELETE FROM login_attempts WHERE held_until_ms < :before"
FORGET_LOGINS = "DELETE FROM login_attempts WHERE name_hash = :name_hash"


def base62(number: int, digits: int) -> str:
    """A number in base 62, so many digits long."""
    return "".join(BASE62[number // 62**place % 62] for place in reversed(range(digits)))


def checksums(secret_part: str) -> tuple[str, str]:
    """The six characters at a key's end that show a mistyped one: as made today, and at first."""
    crc = zlib.crc32(secret_part.encode())
    return f"{crc & 0xFFFFFF:06x}", base62(crc, 6)


def sha256_of(text: str) -> str:
    """SHA-256: what the database holds of a key, whose 256 random bits need no slow hash."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


class Keyring:
    """The gate's secret and what is made from it: JWTs and API keys, each by a sub-key."""

    def __init__(self, secret: str, jwt_hours: int) -> None:
        self._jwt_key = hmac.digest(secret.encode(), b"llmgate jwt", "sha256")
        self._api_key_key = hmac.digest(secret.encode(), b"llmgate api key", "sha256")
        self._jwt_life_s = jwt_hours * 3600

    def _keys_of(self, nonce: str) -> list[str]:
        """The API keys of a nonce, today's first; they differ in their checksum."""
        digest = hmac.digest(self._api_key_key, nonce.encode(), "sha256")
        secret_part = base62(int.from_bytes(digest, "big"), 43)
        return [f"sk-llmgate-{secret_part}{checksum}" for checksum in checksums(secret_part)]

    def new_key(self, **row: object) -> tuple[str, JSONObject]:
        """An API key, and its row: that of the caller with nonce, hash and time."""
        nonce = secrets.token_hex(32)
        api_key = self._keys_of(nonce)[0]
        made = {"nonce": nonce, "key_hash": sha256_of(api_key), "now": int(time.time())}
        return api_key, row | made

    def stored_key(self, nonce: str, key_hash: str) -> str | None:
        """The API key of a row; None when it was made with another secret."""
        return next((key for key in self._keys_of(nonce) if sha256_of(key) == key_hash), None)

    def jwt_answer(self, user_id: int, jwt_version: int) -> JSONObject:
        """RFC 6749's {"access_token", "token_type", "expires_in" (seconds)}."""
        now = int(time.time())
        life_s = self._jwt_life_s
        claims = {"sub": str(user_id), "ver": jwt_version, "iat": now, "exp": now + life_s}
        token = jwt.encode(claims, self._jwt_key, algorithm="HS256")
        return {"access_token": token, "token_type": "bearer", "expires_in": life_s}

    def read_jwt(self, token: str) -> JSONObject:
        """The parameters of CALLER_BY_JWT; 401 `token_expired` or `invalid_token`."""
        required: Any = {"require": ["sub", "ver", "iat", "exp"]}
        try:
            claims = jwt.decode(token, self._jwt_key, ["HS256"], required, leeway=JWT_LEEWAY_S)
            return {"user_id": min(int(claims["sub"]), MAX_BIGINT), "version": int(claims["ver"])}
        except jwt.ExpiredSignatureError:
            raise APIError("token_expired") from None
        except (jwt.InvalidTokenError, ValueError, TypeError) as error:
            raise APIError("invalid_token", reason=words_of(error)) from None


@contextmanager
def hashing() -> Iterator[None]:
    """A turn to hash a password; 429 at once when 8 wait for theirs already."""
    if not HASHING_PLACES.acquire(blocking=False):
        raise APIError("rate_limit_exceeded", why="Too many logins at once")
    try:
        with HASHING:
            yield
    finally:
        HASHING_PLACES.release()


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
    with hashing():
        return bcrypt.hashpw(encoded, bcrypt.gensalt(BCRYPT_ROUNDS)).decode()


def log_in(username: object, password: object) -> tuple[int, int, str]:
    """id, jwt_version, password_hash; 401, 403, 429. An unknown name costs the same as a known."""
    database = gate().database
    encoded = utf8(password)
    name = username.lower()[:65] if isinstance(username, str) else ""
    g.login_name = name if USERNAME.fullmatch(name) else "(no well-formed name)"
    values: JSONObject = {"name_hash": sha256_of(name)}  # people type passwords as names, too
    with hashing():
        found = database.query(USER_BY_NAME, name=g.login_name)
        with database.begin() as execute:  # before it is known whether the password is right
            ((tries, held_until_ms),) = execute(COUNT_TRY, values)
            now_ms = int(time.time() * 1000)
            if held_until_ms > now_ms:
                wait_s = (held_until_ms - now_ms) // 1000 + 1
                why = "Too many wrong passwords for this name"
                raise APIError("rate_limit_exceeded", why=why, wait_s=wait_s)  # and not counted
            # Held back for 1 s after the fifth try, for 2 s after the sixth, ... for 15 minutes.
            held_ms = min(1000 * 2 ** (tries - 5), 900_000) if tries >= 5 else 0
            execute(HOLD_NAME, values | {"held": now_ms + held_ms})
        user_id, jwt_version, stored, disabled_at = found[0] if found else NOBODY
        right = bcrypt.checkpw(encoded[:72], stored.encode()) and len(encoded) <= 72
    if not found or not right:
        raise APIError("invalid_credentials")
    database.write(FORGET_LOGINS, **values)
    if disabled_at is not None:
        raise APIError("account_disabled")
    return user_id, jwt_version, stored


def register(username: object, password: object, token_limit: int) -> tuple[int, str]:
    """A new account's id and API key; 400, or 409 `username_taken`."""
    if not isinstance(username, str) or not USERNAME.fullmatch(username):
        raise APIError("invalid_value", "username", must_be="3 to 64 of A-Z a-z 0-9 _ . -")
    api_key, row = gate().keyring.new_key(name="default", username=username, limit=token_limit)
    row["hash"] = hash_password(password)
    with gate().database.begin() as execute:
        made = execute(INSERT_USER, row)
        if not made:
            raise APIError("username_taken", "username")
        row["user_id"] = made[0][0]
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
        found = API_KEY.fullmatch(credential)
        if not found or found[2] not in checksums(found[1]):  # mistyped: costs no query
            raise APIError(code, reason="its form or its checksum is wrong")
        rows = gate().database.query(CALLER_BY_KEY, key_hash=sha256_of(credential))
    else:
        code = "invalid_token"
        values = gate().keyring.read_jwt(credential)
        rows = gate().database.query(CALLER_BY_JWT, **values)
    if not rows:
        raise APIError(code, reason="nobody has it, or has it any more")
    g.caller = Caller(*rows[0])
    if g.caller.disabled_at is not None:
        raise APIError("account_disabled")


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

    def at_most(self, most: int) -> Counts:
        """The counts, cut to `most` tokens and then `estimated`."""
        if self.total <= most:
            return self
        prompt = min(self.prompt_tokens, most)
        return Counts(prompt, most - prompt, min(self.cached_tokens, prompt), estimated=1)


class Claim(NamedTuple):
    """The worst case of one request, in tokens."""

    prompt: int  # an upper bound
    estimate: int  # of the prompt: charged when no count ever comes
    output: int  # what one choice may write: as asked for, or up to the model's context
    choices: int  # n, times the prompts of a list
    countable: bool  # vLLM can tell the prompt's tokens better

    def granted(self, room: int) -> int:
        """Output for each choice: at most a quarter of `room`, always up to 1,024; -1: no room."""
        left = (room - self.prompt) // self.choices
        if left < min(self.output, 1):
            return -1
        return min(self.output, left, max(room // 4, 1024, self.choices) // self.choices)


LOCK_USER = """SELECT token_limit, tokens_used, tokens_reserved FROM users
 WHERE id = :user_id FOR UPDATE"""
COUNT_RUNNING = """SELECT count(*) FROM usage WHERE user_id = :user_id AND status = 'pending'
 AND lease_until >= :now"""
RESERVE = """UPDATE users SET tokens_reserved = tokens_reserved + :reserved WHERE id = :user_id
 AND tokens_used + tokens_reserved + :reserved <= token_limit RETURNING id"""
INSERT_ROW = """INSERT INTO usage (request_id, user_id, api_key_id, model, endpoint, stream,
 reserved, prompt_estimate, created_at, lease_until) VALUES (:request_id, :user_id, :api_key_id,
 :model, :endpoint, :stream, :reserved, :prompt_estimate, :now, :lease_until)"""
TOUCH_KEY = "UPDATE api_keys SET last_used_at = :now WHERE id = :api_key_id"
READ_ROW = """SELECT u.id, u.tokens_used, u.token_limit - u.tokens_used - u.tokens_reserved,
 r.status, r.reserved, r.prompt_tokens + r.completion_tokens, r.lease_until
 FROM usage r JOIN users u ON u.id = r.user_id WHERE r.request_id = :request_id FOR UPDATE"""
MOVE_TOKENS = """UPDATE users SET tokens_used = tokens_used + :booked,
 tokens_reserved = tokens_reserved - :released WHERE id = :user_id"""


def reserve(
    execute: Execute, caller: Caller, claim: Claim, row: JSONObject, most: int, renews: str
) -> tuple[int, int]:
    """Writes the row; (the output granted to each choice, requests of the user that run). 429.

    `row` has request_id, model, endpoint, stream, and gets the rest. `renews` ends the quota's 429.
    """
    now = int(time.time())
    row |= {"user_id": caller.id, "api_key_id": caller.api_key_id, "now": now}
    row |= {"prompt_estimate": claim.estimate, "lease_until": now + LEASE_S}
    # The lock comes first: what the statements behind it see on PostgreSQL is as of now.
    ((limit, used, reserved),) = execute(LOCK_USER, row)
    ((running,),) = execute(COUNT_RUNNING, row)
    if running >= most:
        raise APIError("rate_limit_exceeded", why=f"{most} requests of yours are running")
    granted = claim.granted(limit - used - reserved)
    needed = claim.prompt + claim.choices * max(granted, min(claim.output, 1))
    row["reserved"] = needed
    # The guard repeats what was just computed: no mistake above can overspend.
    if granted < 0 or not execute(RESERVE, row):
        left = max(0, limit - used)
        why = f"{used} of {limit} tokens are used, {left} are left, this request may need {needed}"
        if needed <= left:
            raise APIError("quota_reserved", why=why)
        why = f"Not enough quota: {why}" if left else f"Quota used up: {used} of {limit} tokens"
        raise APIError("insufficient_quota", why=why + renews)
    execute(INSERT_ROW, row)
    if now - (caller.key_used_at or 0) >= 60:
        execute(TOUCH_KEY, row)
    return granted, running


def book(execute: Execute, request_id: str, status: str, counts: Counts, times: JSONObject) -> int:
    """Books a request's tokens as known now; the user's `tokens_used` after it.

    Serves checkpoints (`pending`), the end, recovery (`lost`: only once the lease has run out) and
    the late return of a gate whose row was closed as lost: what counts is the difference.
    """
    now = int(time.time())
    (found,) = execute(READ_ROW, {"request_id": request_id})
    user_id, used, free, old_status, reserved, before, lease_until = found
    alive = old_status == "pending" and lease_until >= now
    if old_status not in ("pending", "lost") or (status == "lost" and alive):
        return cast(int, used)
    # What was held may be used up; more only if nobody else holds it. (A lost row's
    # reservation may have gone to others by the time its gate comes back.)
    counts = counts.at_most(before + max(reserved, reserved + free))
    if counts.total < before - used:  # a reset came between an estimate and the count
        counts = Counts(before - used, estimated=1)
    booked = counts.total - before
    kept = max(0, reserved - max(0, booked)) if status == "pending" else 0
    row = {"status": status, "reserved": kept, "lease_until": now + LEASE_S}
    row |= counts._asdict() | times
    columns = ", ".join(f"{column} = :{column}" for column in row)
    execute(f"UPDATE usage SET {columns} WHERE request_id = :id", row | {"id": request_id})
    moved = {"user_id": user_id, "booked": booked, "released": reserved - kept}
    execute(MOVE_TOKENS, moved)
    return cast(int, used + booked)


def reset_usage(execute: Execute, user_id: int) -> None:
    """Sets tokens_used to 0 by a balancing row: it stays the sum of the rows, and they stay."""
    row = {"request_id": secrets.token_hex(16), "user_id": user_id, "now": int(time.time())}
    ((_, used, _),) = execute(LOCK_USER, row)
    row |= {"booked": -used, "released": 0}
    balance = """INSERT INTO usage (request_id, user_id, model, endpoint, status,
 prompt_tokens, created_at, lease_until)
 VALUES (:request_id, :user_id, '', 'reset-usage', 'ok', :booked, :now, :now)"""
    execute(balance, row)
    execute(MOVE_TOKENS, row)


def renew_quotas(execute: Execute, begins_at: int) -> bool:
    """Lets every quota begin again, unless some gate did it for this period or a later one."""
    begin = """INSERT INTO quota_periods (begins_at) SELECT :begins_at WHERE NOT EXISTS
 (SELECT 1 FROM quota_periods WHERE begins_at >= :begins_at) ON CONFLICT DO NOTHING RETURNING 1"""
    if not execute(begin, {"begins_at": begins_at}):
        return False
    for (user_id,) in execute("SELECT id FROM users WHERE tokens_used > 0 ORDER BY id"):
        reset_usage(execute, user_id)
    return True


def period_of(period: str, now: float) -> tuple[int, int | None]:
    """When the period of QUOTA_PERIOD that holds `now` begins and ends (UTC, Unix seconds)."""
    if period == "never":
        return 0, None
    today = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    monday = today - timedelta(days=today.weekday())
    first = today.replace(day=1)
    begins = {"day": today, "week": monday, "month": first}[period]
    ends = begins + timedelta(days={"day": 1, "week": 7, "month": 31}[period])
    if period == "month":
        ends = ends.replace(day=1)
    return int(begins.timestamp()), int(ends.timestamp())


def duration(seconds: int) -> str:
    """A time in OpenAI's units, like "3h12m0s"."""
    return f"{seconds // 3600}h{seconds // 60 % 60}m{seconds % 60}s"


def when(moment: int) -> str:
    """A moment to come (Unix seconds), like "Tuesday 1 December, in 4 days"."""
    seconds = max(0, moment - int(time.time()))
    wait = f"{-(-seconds // 86400)} days" if seconds > 86400 else duration(seconds)
    return f"{datetime.fromtimestamp(moment, UTC):%A %-d %B}, in {wait}"


SUMS = ("requests", "prompt_tokens", "completion_tokens")
USAGE_BY_DAY = """SELECT created_at / 86400, model, api_key_id, count(*),
 CAST(sum(prompt_tokens) AS BIGINT), CAST(sum(completion_tokens) AS BIGINT) FROM usage
 WHERE user_id = :id AND model <> '' AND created_at / 86400 >= :since
 GROUP BY created_at / 86400, model, api_key_id ORDER BY 1, 2, 3"""
USAGE_BY_USER = """SELECT u.username, count(r.request_id),
 CAST(coalesce(sum(r.prompt_tokens), 0) AS BIGINT),
 CAST(coalesce(sum(r.completion_tokens), 0) AS BIGINT) FROM users u
 LEFT JOIN usage r ON r.user_id = u.id AND r.model <> '' AND r.created_at / 86400 >= :since
 GROUP BY u.id ORDER BY sum(r.prompt_tokens + r.completion_tokens) DESC NULLS LAST, u.username"""
RECENT = """request_id, created_at, model, api_key_id, endpoint, stream, status, estimated, \
prompt_tokens, completion_tokens, cached_tokens, first_byte_ms, duration_ms"""
# The index alone tells since when; or all rows of a day would be read, to sort them.
RECENT_ROWS = f"""WITH bound AS (SELECT min(created_at) AS since FROM (
 SELECT created_at FROM usage WHERE user_id = :id AND model <> ''
 ORDER BY created_at / 86400 DESC, created_at DESC LIMIT 20) AS newest)
SELECT {RECENT} FROM bound, usage WHERE user_id = :id AND model <> '' AND created_at >= since
 AND created_at / 86400 >= since / 86400 ORDER BY created_at DESC LIMIT 20"""


def usage_report(
    database: Database, caller: Caller, days: int, resets_at: int | None
) -> JSONObject:
    """The last `days` days (UTC) by day, model and key, and the newest rows; counts are tokens."""
    rows = database.query(USAGE_BY_DAY, id=caller.id, since=int(time.time()) // 86400 - days + 1)
    names = dict(database.query("SELECT id, name FROM api_keys WHERE user_id = :id", id=caller.id))
    recent = database.query(RECENT_ROWS, id=caller.id)

    def by(column: int, name: str, label: Callable[[Any], object]) -> list[JSONObject]:
        sums: dict[Any, list[int]] = {}
        for row in rows:
            so_far = sums.get(row[column], [0, 0, 0])
            sums[row[column]] = [a + b for a, b in zip(so_far, row[3:], strict=True)]
        return [{name: label(of)} | dict(zip(SUMS, sums[of], strict=True)) for of in sums]

    return {
        "tokens_used": caller.tokens_used,
        "token_limit": caller.token_limit,
        "remaining": max(0, caller.token_limit - caller.tokens_used),
        "reserved": caller.tokens_reserved,
        "resets_at": resets_at,
        "requests": sum(row[3] for row in rows),
        "by_model": by(1, "model", str),
        "by_key": by(2, "key", names.get),
        "by_day": by(0, "date", lambda day: date_of(day * 86400)),
        "recent": [dict(zip(RECENT.split(", "), row, strict=True)) for row in recent],
    }


def date_of(seconds: int | None) -> str:
    """A day like 2026-12-01 (UTC); "" for never."""
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"


# ---- 6 Upstreams ----------------------------------------------------------------------------------
# The model servers: what they serve, which one gets a request, one request's exchange with one, and
# the gate's own calls. Nothing here knows of users or tokens.


def parsed(text: bytes | bytearray) -> Any:
    """JSON's value; None for what is no JSON."""
    with suppress(ValueError, RecursionError):
        return json.loads(text.decode())
    return None


def encoded(body: object) -> bytes:
    """JSON for vLLM, with each field once; 400 for what JSON cannot say (1e999)."""
    try:
        return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise APIError("invalid_json") from None


class Exchange:
    """One connection to a server, and a request's exchange on it, by http.client. 502, 504."""

    response: http.client.HTTPResponse

    def __init__(self, url: str, tls: ssl.SSLContext | None, timeout_s: int) -> None:
        """Connects; OSError."""
        parts = urlsplit(url)
        place = (parts.hostname or "", parts.port)
        self._connection = http.client.HTTPConnection(*place, timeout=CONNECT_TIMEOUT_S)
        if tls:
            made = http.client.HTTPSConnection(*place, timeout=CONNECT_TIMEOUT_S, context=tls)
            self._connection = made
        self._connection.connect()
        self._sock: socket.socket = self._connection.sock  # which a last answer makes it forget
        self._sock.settimeout(None)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # the kernel's: no poll() each time
            self._sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", timeout_s, 0))
        self._timeout_s = timeout_s
        self._heard_at = time.monotonic()
        self._poll = select.poll()
        self._poll.register(self._sock, select.POLLIN)

    def send(self, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Sends the request and waits for the answer's status and headers."""
        self._heard_at = time.monotonic()
        with self._translated():
            self._connection.request("POST", path, body, headers)
            if not self.arrives(self._timeout_s):
                raise TimeoutError("no answer came")
            self.response = self._connection.getresponse()
            if self.response.length is None and "content-length" in self.response.headers:
                raise ValueError("a Content-Length that is no number")

    def pieces(self) -> Iterator[bytes]:
        """The body as it arrives; b"" after each PING_S of silence."""
        response = self.response
        self._heard_at = time.monotonic()
        with self._translated():
            # The body's first bytes may be in the reader already, where poll() cannot see them.
            self._sock.setblocking(False)
            ready = False
            with suppress(ssl.SSLWantReadError):
                ready = not response.isclosed() and bool(response.fp.peek(1))
            self._sock.setblocking(True)
            while not response.isclosed() and response.length != 0:
                left_s = self._heard_at + self._timeout_s - time.monotonic()
                wait_s = min(PING_S, max(0.0, left_s))
                if not ready and not self.arrives(wait_s):
                    if left_s <= PING_S:
                        raise TimeoutError("its answer stopped")
                    yield b""
                    continue
                # Up to 100 chunks that came together at a time: 3.5 times the events in a burst.
                # Behind a chunk's data the reader holds the end of its line, and what came after.
                pieces = [response.read1(65536)]
                while pieces[-1] and len(pieces) < 100 and response.chunked:
                    if not response.fp.peek(1).lstrip():
                        break
                    pieces.append(response.read1(65536))
                ready = len(pieces) == 100
                self._heard_at = time.monotonic()
                if pieces[0]:
                    yield b"".join(pieces)
            if response.length:
                raise ValueError("the body is shorter than its Content-Length")

    def arrives(self, seconds: float) -> bool:
        """Whether bytes, or the end, are there within so many seconds."""
        in_tls = isinstance(self._sock, ssl.SSLSocket) and self._sock.pending()
        return bool(in_tls or self._poll.poll(seconds * 1000))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """502 when the connection breaks off or makes no sense, 504 when time is over."""
        try:
            yield
        except (OSError, ValueError, OverflowError, http.client.HTTPException) as error:
            silent_s = time.monotonic() - self._heard_at
            if isinstance(error, TimeoutError) or silent_s > self._timeout_s - 0.1:
                raise APIError("upstream_timeout", reason=words_of(error)) from None
            why = "it broke the connection off"
            raise APIError("upstream_error", why=why, reason=words_of(error)) from None

    def shutdown(self, how: int) -> None:
        """Ends the connection, or our half of it, from another thread."""
        with suppress(OSError):
            socket.socket.shutdown(self._sock, how)  # not as TLS: another thread reads

    def close(self) -> None:
        """Ends the connection."""
        self._sock.close()
        self._connection.close()


class Upstream:
    """One model server: what it serves, what is known of its ways, its idle connections."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.url = url
        self._timeout_s = settings.upstream_timeout
        self._tls = ssl.create_default_context() if url.startswith("https") else None
        self.headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if settings.vllm_api_key:
            self.headers["Authorization"] = f"Bearer {settings.vllm_api_key}"
        self.session = requests.Session()  # for the gate's own calls
        self.session.trust_env = False
        paths = ssl.get_default_verify_paths()  # the system's, as for relayed requests
        self.session.verify = paths.cafile or paths.capath or True
        self.models: dict[str, JSONObject] = {}  # id: its entry in /v1/models
        self.up = False
        self.why_down = ""
        self._idle: list[Exchange] = []
        self.can_abort: bool | None = None  # None: not known yet
        self.no_running_counts_until: dict[str, float] = {}  # model: monotonic

    def connect(self) -> Exchange | None:
        """A connection, new or kept; None: the server is down, and `why_down` says why."""
        with suppress(IndexError):  # none is there, or another thread was quicker
            while True:
                kept = self._idle.pop()
                if not kept.arrives(0):  # nothing to read, so not even its end
                    return kept
                kept.close()
        try:
            return Exchange(self.url, self._tls, self._timeout_s)
        except OSError as error:
            self.mark_down(words_of(error))
            return None

    def keep(self, exchange: Exchange) -> None:
        """Keeps the connection of a whole answer: 0.4 ms less for the next request."""
        if exchange.response.status != 200 or exchange.response.will_close:
            exchange.close()
        else:
            exchange.response.close()
            self._idle.append(exchange)

    def close_idle(self) -> None:
        """Closes the connections that are kept; vLLM would do so after 5.0 s."""
        with suppress(IndexError):
            while True:
                self._idle.pop().close()

    def mark_down(self, why: str) -> None:
        """The server is not there: who comes back may be another one."""
        if self.up or why != self.why_down:
            log.warning("%s is down: %s", self.url, why)
        self.up = False
        self.why_down = why
        self.can_abort = None
        self.no_running_counts_until = {}

    def call(self, path: str, body: bytes | None = None, wait_s: float = 2) -> requests.Response:
        """A GET or a POST of the gate's own; 502, 504."""
        times = (CONNECT_TIMEOUT_S, wait_s)
        options: JSONObject = {"headers": self.headers, "timeout": times, "allow_redirects": False}
        method = "POST" if body else "GET"
        try:
            return self.session.request(method, self.url + path, data=body, **options)
        except requests.Timeout as error:
            raise APIError("upstream_timeout", reason=words_of(error)) from None
        except requests.RequestException as error:
            raise APIError("upstream_unavailable", reason=words_of(error)) from None

    def ask(self, path: str, body: JSONObject | None = None, wait_s: float = 30) -> JSONObject:
        """The JSON object that a call brings; {} for anything else. 502, 504."""
        answer = self.call(path, encoded(body) if body else None, wait_s)
        value = parsed(answer.content)
        return value if answer.status_code == 200 and isinstance(value, dict) else {}

    def refresh(self) -> None:
        """Fetches the list of models; a slow answer leaves the list as it was."""
        try:
            entries = self.ask("/v1/models", wait_s=2).get("data")
        except APIError as error:
            if not self.up or error.code != "upstream_timeout":
                self.mark_down(error.for_log)
            return
        if not isinstance(entries, list):
            return self.mark_down("it answers /v1/models without a list of models")
        models = [entry for entry in entries if isinstance(entry, dict)]
        self.models = {str(entry.get("id")): entry for entry in models if utf8(entry.get("id"))}
        if not self.up:
            log.info("%s is up: %s", self.url, ", ".join(self.models))
        self.up = True

    def abort(self, upstream_ids: list[str]) -> None:
        """Tells vLLM to end these requests; whether it can is remembered."""
        asked = encoded({"request_ids": upstream_ids})
        with suppress(APIError):
            answer = self.call("/inference/v1/abort_requests", asked)
            if answer.status_code in (200, 403, 404, 405):
                self.can_abort = answer.status_code == 200

    def context(self, model: str) -> int | None:
        """Tokens of a model's context: vLLM's max_model_len, llama.cpp's n_ctx; None: not told."""
        entry = self.models.get(model, {})
        meta = entry.get("meta")
        known = entry.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else 0)
        return known if type(known) is int and known > 0 else None


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
                with ThreadPoolExecutor(len(self)) as pool:
                    list(pool.map(Upstream.refresh, self))
                self._refreshed_at = time.monotonic()

    def models(self) -> dict[str, JSONObject]:
        """{id: entry} of the servers that are up, the first one's first.

        An old list is refreshed in the background, at once what nobody knows yet.
        """
        if not any(server.up for server in self):
            self.refresh()
        elif time.monotonic() - self._refreshed_at > MODELS_TTL_S and not self._refreshing.locked():
            threading.Thread(target=self.refresh, daemon=True).start()
        found: dict[str, JSONObject] = {}
        for server in self:
            for name, entry in server.models.items() if server.up else ():
                found.setdefault(name, entry)
        return found

    def resolve(self, model: str) -> str:
        """The served model that a name or an alias stands for."""
        return self.aliases.get(model, model) or next(iter(self.models()), model)

    def unavailable(self) -> APIError:
        """502 with the reason why no server is up."""
        reasons = [f"{server.url}: {server.why_down}" for server in self if not server.up]
        return APIError("upstream_unavailable", reason="; ".join(reasons))

    def public_models(self) -> dict[str, JSONObject]:
        """{id or alias: entry} as callers may see it; 502 while no server is up."""
        models = self.models()
        if not models:
            raise self.unavailable()
        for alias in self.aliases:
            real = self.resolve(alias)
            if real in models:
                models[alias] = {**models[real], "id": alias}
        keys = ("id", "object", "created", "owned_by", "max_model_len")  # not root, a path
        return {name: {k: e[k] for k in keys if k in e} for name, e in models.items()}

    def route(self, model: str, busy: list[Upstream | None]) -> list[Upstream]:
        """The servers of a model, the least busy first; 404 `model_not_found`, or 502."""
        if model not in self.models():
            self.refresh()
        servers = [server for server in self if model in server.models]
        if not servers and any(server.up for server in self):
            raise APIError("model_not_found", "model", model=model)
        if not servers:
            raise self.unavailable()
        return sorted(servers, key=lambda server: (not server.up, busy.count(server)))

    def context(self, model: str) -> int | None:
        """Tokens of a model's context, by the first server that has it; None: not told."""
        model = self.resolve(model)
        return next((server.context(model) for server in self if model in server.models), None)


# ---- 7 Relay --------------------------------------------------------------------------------------
# What one request may cost (claim), what it does cost (meter), the relay itself, and the watcher.
# Bytes pass unchanged, but for the model's name, the bound of the output and hidden usage.

LEFT = "the caller left"
DRAINING = "the gate is stopping"
COMMENT = b": keep-alive\n\n"  # of SSE; clients and proxies take it for a sign of life


def whole_number(body: JSONObject, name: str, least: int, most: int | None = None) -> int | None:
    """body[name] if it is a whole number in bounds, None if it is absent or null; else 400."""
    value = body.get(name)
    if value is not None and (type(value) is not int or value < least or value > (most or value)):
        must_be = f"a whole number from {least}" + (f" to {most}" if most else " on")
        raise APIError("invalid_value", name, must_be=must_be)
    return value


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

    EVENT_END = re.compile(rb"\n\r?\n")
    # vLLM's usual event of chat and completions has its counts last: read in a quarter of the time.
    COUNTS_LAST = re.compile(rb',"usage":(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})\}\n\n\Z')
    INDEX = re.compile(rb'"index":(\d{1,6})')
    USAGE = re.compile(rb',\s*"usage":\s*(?:null|\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
    TEXT = re.compile(
        rb'"(?:content|reasoning|reasoning_content|arguments|text|thinking|partial_json|delta)"'
        rb':\s*"([^"\\]*(?:\\.[^"\\]*)*)"'
    )
    UNBEGUN = ("response.created", "response.in_progress")
    LAST = ("message_stop", "response.completed", "response.incomplete", "response.failed")

    def __init__(self, claim: Claim, reserved: int, body: JSONObject, context: int | None) -> None:
        self._claim = claim
        self._reserved = reserved
        self._most = claim.choices * context if context else MAX_BIGINT  # what can be true
        self._n = body.get("n") or 1
        options = body.get("stream_options") or {}
        self._show_last = options.get("include_usage") is True
        self._show_all = self._show_last and options.get("continuous_usage_stats") is True
        self.begun = False  # vLLM's answer has begun
        self._ended: set[int] = set()  # choices that have said why they ended
        self.finished = False  # all of them have
        self.done = False  # the protocol's last event has come
        self.failed = False  # vLLM has reported an error
        self.worked_since: float | None = None  # monotonic: an event has shown that it generates
        self._deltas = 0
        self._text_bytes = 0
        self._usage: JSONObject = {}  # the block at the end, or what is known of it
        self._choices: dict[int, bytes] = {}  # the last block of each, to be added up
        self._rest = b""

    def feed(self, piece: bytes) -> bytes:
        """The events that are complete now, as the caller shall see them; 502 if one is endless."""
        shown = []
        start = 0
        searched = max(0, len(self._rest) - 3)
        self._rest += piece
        for end in self.EVENT_END.finditer(self._rest, searched):
            if self.done:  # nothing belongs behind the last event
                break
            shown.append(self._event(self._rest[start : end.end()]))
            start = end.end()
        self._rest = self._rest[start:]
        if len(self._rest) > MAX_EVENT_BYTES:
            raise APIError("upstream_error", why="it sent an event without an end")
        return b"".join(shown)

    def _event(self, event: bytes) -> bytes:
        """Takes note of an event; what the caller shall see of it."""
        counts = self.COUNTS_LAST.search(event) if self.worked_since else None
        index = self.INDEX.search(event)
        if counts and index and b'"finish_reason":null' in event:
            self._choices[int(index[1])] = counts[1]
            return event if self._show_all else event[: counts.start()] + event[counts.end(1) :]
        data = event.partition(b"data:")[2]
        value = parsed(data)
        if not isinstance(value, dict):  # a comment, or the end
            self.done |= data.strip() == b"[DONE]"
            return event
        kind = value.get("type")  # events of messages and responses have one
        self.done |= kind in self.LAST
        self.failed |= kind in ("error", "response.failed") or bool(value.get("error"))
        if kind not in self.UNBEGUN:
            self.worked_since = self.worked_since or time.monotonic()
        inner = value.get("message") or value.get("response") or value
        usage = inner.get("usage") if isinstance(inner, dict) else None
        if not isinstance(usage, dict) and ("delta" in value or "choices" in value):
            self._deltas += 1
            found = self.TEXT.search(event)
            self._text_bytes += len(found[1]) if found else 0
        if kind is None:
            return self._chat_event(event, value)
        if isinstance(usage, dict):  # the prompt as the last event tells it that tells it
            self._usage = usage if "input_tokens" in usage else self._usage | usage
        return event

    def _chat_event(self, event: bytes, value: JSONObject) -> bytes:
        """An event of chat or completions, without usage unless the caller asked for it."""
        choices = value.get("choices")
        usage = value.get("usage")
        shows = self._show_last
        choice = choices[0] if isinstance(choices, list) and choices else None
        if isinstance(choice, dict):
            index = choice["index"] if type(choice.get("index")) is int else 0
            finish = isinstance(choice.get("finish_reason"), str)
            if finish:
                self._ended.add(index)
            self.finished = len(self._ended) >= self._claim.choices
            if isinstance(usage, dict):
                only_here = finish and index not in self._choices  # of a server that sends it once
                shows = self._show_all or (self._show_last and only_here)
                self._choices[index] = encoded(usage)
        elif read_usage(usage):
            self._usage = cast(JSONObject, usage)
        if shows or "usage" not in value:
            return event
        if not choice:
            return b""
        cut, cuts = self.USAGE.subn(b"", event)
        if cuts == event.count(b'"usage"') == 1:
            return cut
        del value["usage"]  # it stands where vLLM does not put it
        return b"data: " + encoded(value) + b"\n\n"

    def read_whole(self, answer: JSONObject, size: int) -> None:
        """Takes note of a plain answer and its bytes."""
        self._usage = answer.get("usage") or {}
        self._text_bytes = size
        self.done = True

    def counts(self, at_end: bool = False) -> Counts:
        """The tokens so far: vLLM's count, or an estimate; none before the answer has begun.

        A stream that shows no output yet may hide it: silence is not "no work".
        """
        if not self.begun or not (at_end or self.worked_since):
            return Counts()
        prompts: dict[int, int] = {}
        written = 0
        for index, usage in list(self._choices.items()):
            seen = read_usage(parsed(usage)) or Counts()
            prompts[index // self._n] = seen.prompt_tokens  # once for each prompt of a list
            written += seen.completion_tokens
        known = read_usage(self._usage) or Counts(sum(prompts.values()), written)
        if known.completion_tokens or (known.total and self.done):
            return known.at_most(self._most)
        output = max(self._deltas, self._text_bytes // 4)
        if at_end and self.worked_since and not self._text_bytes:
            silent_s = time.monotonic() - self.worked_since
            output = max(output, 1, int(silent_s * SILENT_TOKENS_PER_S))
        output = min(output, self._claim.output * self._claim.choices)
        prompt = known.prompt_tokens or self._claim.estimate
        return Counts(prompt, output, estimated=1).at_most(self._reserved)


class Protocol(NamedTuple):
    """How an endpoint's requests differ from those of the others."""

    bounds: tuple[str, ...]  # fields that bound the output; the first is put in
    prompt: str = ""  # the field of a prompt that is a text, token ids, or a list of these
    counter: tuple[str, str] = ("/tokenize", "count")  # where vLLM counts a prompt, and its answer
    counted: str = ""  # the fields that are sent there
    in_context: bool = False  # clients ask for more than the context, and vLLM would refuse it
    reports: bool = False  # usage while it runs, by stream_options


RENDERED = """model messages tools chat_template chat_template_kwargs add_generation_prompt
 continue_final_message add_special_tokens mm_processor_kwargs"""
READ = "model messages system tools tool_choice thinking"
COUNT_TOKENS = ("/v1/messages/count_tokens", "input_tokens")
RENDER = ("/v1/responses/render", "token_ids")
PROTOCOLS = {
    "chat/completions": Protocol(
        ("max_tokens", "max_completion_tokens"), counted=RENDERED, reports=True
    ),
    "completions": Protocol(("max_tokens",), "prompt", reports=True),
    "embeddings": Protocol((), "input"),
    "messages": Protocol(("max_tokens",), "", COUNT_TOKENS, READ, in_context=True),
    "responses": Protocol(("max_output_tokens",), "", RENDER, in_context=True),
}

# They touch other users, or hide tokens from the meter.
REFUSED = """priority request_id kv_transfer_params ec_transfer_params vllm_xargs stream_interval
 use_beam_search"""
REFUSED_OF_RESPONSES = " store background previous_response_id previous_input_messages"
READ_FIELDS = (
    ("model", str, "the name of a model"),
    ("stream", bool | None, "true or false"),
    ("stream_options", dict | None, "an object"),
)


def require_relayable(body: JSONObject, endpoint: str) -> None:
    """400 naming the field that is refused, or that the gate has to read and cannot."""
    refused = REFUSED + REFUSED_OF_RESPONSES * (endpoint == "responses")
    for name in refused.split():
        if body.get(name) is not None and body[name] is not False:
            raise APIError("unsupported_value", name)
    if whole_number(body, "best_of", 1) not in (None, 1):
        raise APIError("unsupported_value", "best_of")
    for name, kind, must_be in READ_FIELDS:
        if not isinstance(body.get(name), kind) or body.get(name) == "":
            raise APIError("invalid_value", name, must_be=must_be)
    options = body.get("stream_options") or {}
    for name in ("include_usage", "continuous_usage_stats"):
        if not isinstance(options.get(name), bool | None):
            raise APIError("invalid_value", "stream_options", must_be=f"{name}: true or false")


MEDIA_KEYS = {"image_url", "image_pil", "image_embeds", "audio_url", "input_audio", "video_url"}
MEDIA_TYPES = MEDIA_KEYS | {"image", "input_image", "audio", "video"}
MEDIA_TYPES |= {"file", "input_file", "document"}
DATA_FIELDS = ("url", "data", "file_data", "image_url", "audio_url", "video_url")
MEDIA_WORD = re.compile(rb'"(image|audio|video|input_|file|document)[a-z_]*"|\\u00[4-7]')


def media_in(body: JSONObject) -> tuple[int, int, int]:
    """Pictures, other media, and bytes of their data, in all shapes of OpenAI and Anthropic."""
    pictures = 0
    others = 0
    data_bytes = 0
    stack: list[Any] = [body]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack += value
        elif isinstance(value, dict):
            stack += value.values()
            words = MEDIA_KEYS & value.keys()
            if isinstance(value.get("type"), str):
                words |= MEDIA_TYPES & {value["type"]}
            is_picture = any("image" in word for word in words)
            pictures += is_picture
            others += bool(words) and not is_picture
            data = [value[name] for name in DATA_FIELDS if isinstance(value.get(name), str)]
            data_bytes += sum(map(len, data))
    return pictures, others, data_bytes


def prompts_of(body: JSONObject, endpoint: str) -> list[Any]:
    """The prompts of a completion or an embedding, texts or token ids; [None] for all else."""
    prompt = body.get(PROTOCOLS[endpoint].prompt)
    several = isinstance(prompt, list) and prompt and type(prompt[0]) is not int
    return cast("list[Any]", prompt) if several else [prompt]


def claim_of(body: JSONObject, raw: bytes, endpoint: str, context: int | None) -> Claim:
    """The worst case of a request whose JSON is `raw`: a token has a byte or more; 400.

    A picture counts as what models make of it, never as its base64; nothing is above the context.
    """
    protocol = PROTOCOLS[endpoint]
    prompts = prompts_of(body, endpoint)
    n = whole_number(body, "n", 1, 16) or 1
    least = 0 if endpoint == "completions" else 1
    asked = [whole_number(body, name, least) for name in protocol.bounds]
    unbounded = context or UNKNOWN_CONTEXT
    most = unbounded if protocol.bounds else 0
    output = max((number for number in asked if number is not None), default=most)
    pictures, others, data_bytes = media_in(body) if MEDIA_WORD.search(raw) else (0, 0, 0)
    text_bytes = len(raw) - data_bytes * bool(pictures or others)
    prompt = text_bytes + TEMPLATE_TOKENS + pictures * PICTURE_TOKENS + others * unbounded
    estimate = text_bytes // 4 + (pictures + others) * PICTURE_ESTIMATE
    # vLLM may read messages and prompt_embeds in completions and embeddings, too.
    is_odd = bool(protocol.prompt) and ("messages" in body or "prompt_embeds" in body)
    is_ids = all(isinstance(ids, list) and set(map(type, ids)) <= {int} for ids in prompts)
    if is_ids and not is_odd:
        prompt = estimate = sum(map(len, prompts)) + len(prompts)
    if context:
        prompt = min(prompt, context * len(prompts))
        output = min(output, context)
    choices = len(prompts) * (n if protocol.reports else 1)
    countable = not (is_ids or is_odd or pictures or others)
    return Claim(prompt, min(max(1, estimate), prompt), output, choices, countable)


# Fields that no template renders; others that vLLM's count does not know count by their bytes.
NEVER_RENDERED = {"stream_options", "metadata", "stop", "stop_sequences", "logit_bias", "include"}


def count_prompt(server: Upstream, endpoint: str, body: JSONObject) -> int | None:
    """A prompt's tokens, by vLLM; None where it cannot tell. 502, 504."""
    protocol = PROTOCOLS[endpoint]
    path, answer = protocol.counter
    counted = protocol.counted.split()
    questions = [{name: body[name] for name in counted if name in body}] if counted else [body]
    if protocol.prompt:
        prompts = prompts_of(body, endpoint)
        questions = [{"model": body["model"], "prompt": prompt} for prompt in prompts]
    total = 0
    for question in questions:
        count = server.ask(path, question).get(answer)
        count = len(count) if isinstance(count, list) else count
        if type(count) is not int:
            return None
        total += count
    for name in body.keys() - counted - NEVER_RENDERED if counted else ():
        if isinstance(body[name], str | list | dict):
            total += len(encoded(body[name]))
    return total


def limit_output(
    body: JSONObject, endpoint: str, claim: Claim, granted: int, context: int | None
) -> None:
    """Lowers or puts in the bound of the output where the quota, or the context, asks for it."""
    protocol = PROTOCOLS[endpoint]
    given = [name for name in protocol.bounds if body.get(name) is not None]
    too_high = protocol.in_context and context and any(body[name] > context for name in given)
    if granted >= claim.output and not too_high:
        return
    most = min(granted, max(context - claim.estimate, 1)) if context else granted
    for name in given or protocol.bounds[:1]:
        body[name] = min(body.get(name) or most, most)
    if type(body.get("min_tokens")) is int:
        body["min_tokens"] = min(body["min_tokens"], most)
    thinking = body.get("thinking")
    if isinstance(thinking, dict) and type(thinking.get("budget_tokens")) is int:
        body["thinking"] = thinking | {"budget_tokens": min(thinking["budget_tokens"], most - 1)}


def upstream_ids(endpoint: str, request_id: str, body: JSONObject) -> list[str]:
    """The ids by which vLLM's abort_requests knows this request."""
    if endpoint == "completions":
        numbers = range(len(prompts_of(body, endpoint)))
        return [f"cmpl-{request_id}-{number}" for number in numbers]
    return [f"resp_{request_id}_0" if endpoint == "responses" else f"chatcmpl-{request_id}"]


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
    return b"event: response.failed\ndata: " + encoded(event) + b"\n\n"


class Relay:
    """One running request: open, then a plain answer or a stream, then ended by end(), once.

    Its own thread writes the fields. Who wants it to stop (the watcher for a caller who left,
    drain()) sets `reason` by stop(); the watcher ends vLLM's work, the thread sees it and ends.
    """

    def __init__(self, watcher: Watcher, caller: Caller, endpoint: str, body: JSONObject) -> None:
        self.watcher = watcher
        self.caller = caller
        self.endpoint = endpoint
        self.request_id: str = g.request_id
        self.started_at: float = g.started_at
        self.is_gone: Callable[[], bool] = request.environ.get("waitress.client_disconnected", bool)
        self.model: str = body["model"]
        self.stream = body.get("stream") is True
        self.meter: Meter | None = None  # None: the row is not written yet
        self.upstream: Upstream | None = None
        self.exchange: Exchange | None = None
        self.upstream_ids: list[str] = []  # once the request is sent
        self.reason = ""  # LEFT or DRAINING; the first one counts
        self.stopped_at = 0.0  # monotonic
        self.aborting: Future[None] | None = None  # the watcher's
        self.status, self.why = "pending", ""  # written by end()
        self.times: JSONObject = {"first_byte_ms": None, "duration_ms": None}
        self.tokens_used = caller.tokens_used  # of the user, after book()
        self._lock = threading.Lock()  # protects status, and the order of bookings

    def reserve(self, app: Gate, server: Upstream, body: JSONObject, raw: bytes) -> None:
        """Writes the row, and the bound of the output into the body; 400, 429, 502, 504."""
        caller = self.caller
        endpoint = self.endpoint
        protocol = PROTOCOLS[self.endpoint]
        context = server.context(self.model)
        claim = claim_of(body, raw, endpoint, context)
        room = caller.token_limit - caller.tokens_used - caller.tokens_reserved
        granted = claim.granted(room)
        sends_bound = granted < claim.output or protocol.in_context
        passes_context = context and sends_bound and granted + claim.prompt > context
        if room > 0 and claim.countable and (claim.prompt > room // 8 or passes_context):
            counted = None
            with suppress(APIError):  # ask() says it, if no other server is there
                counted = count_prompt(server, endpoint, body)
            if counted is None and not protocol.prompt:
                counted = min(claim.prompt, len(raw) // 3 + 1)  # a token is guessed to be 3 bytes
            if counted is not None:
                output = min(claim.output, max(context - counted, 1)) if context else claim.output
                claim = claim._replace(prompt=counted, estimate=max(1, counted), output=output)
        row: JSONObject = {"request_id": self.request_id, "model": self.model, "endpoint": endpoint}
        row["stream"] = int(self.stream)
        most = app.settings.max_requests_per_user
        with app.database.begin() as execute:
            if self.reason:  # drain() waits no longer
                raise APIError("draining", reason=self.reason)
            granted, self.running = reserve(execute, caller, claim, row, most, app.renews())
        self.meter = Meter(claim, row["reserved"], body, context)
        limit_output(body, endpoint, claim, granted, context)

    def ask(self, servers: list[Upstream], body: JSONObject) -> Response:
        """The answer of the first server that is there; 502, 503, 504."""
        for server in servers:
            exchange = server.connect()
            if exchange:
                break
        else:
            raise self.watcher.upstreams.unavailable()
        self.upstream = server
        self.exchange = exchange
        if self.reason:
            raise APIError("draining", reason=self.reason)
        if self.endpoint == "responses":
            body |= {"store": False, "request_id": f"resp_{self.request_id}"}
        running_counts = False
        if self.stream and PROTOCOLS[self.endpoint].reports:
            running_counts = server.no_running_counts_until.get(self.model, 0) < time.monotonic()
            options = {"include_usage": True, "continuous_usage_stats": True}
            options = (body.get("stream_options") or {}) | options
            if not running_counts:
                del options["continuous_usage_stats"]
            body = body | {"stream_options": options}
        self.upstream_ids = upstream_ids(self.endpoint, self.request_id, body)
        headers = {"X-Request-Id": self.request_id, "X-Vllm-Priority": str(self.running)}
        path = f"{urlsplit(server.url).path}/v1/{self.endpoint}"
        exchange.send(path, encoded(body), server.headers | headers)
        refusal = b"".join(exchange.pieces()) if exchange.response.status == 400 else b""
        if running_counts and b"continuous_usage_stats" in refusal:
            server.no_running_counts_until[self.model] = time.monotonic() + RETRY_OPTION_S
            exchange.close()
            return self.ask([server], body)
        return self._answer(exchange, refusal)

    def _answer(self, exchange: Exchange, refusal: bytes) -> Response:
        """The answer to relay: 200 or vLLM's own 4xx; 502 or 503 for all else."""
        meter = cast(Meter, self.meter)
        status = exchange.response.status
        headers = cast(Any, exchange.response.headers)
        meter.begun = status == 200
        require_good_answer(status, headers)
        content_type = headers.get("content-type", "")
        if status == 200 and "text/event-stream" in content_type:
            self.stream = True
            self._pieces = exchange.pieces()
            response = StreamResponse(self._events(), content_type=content_type)
            response.headers["Cache-Control"] = "no-cache"
            response.headers["X-Accel-Buffering"] = "no"  # nginx passes each event on at once
            response.call_on_close(self.close)  # a generator not begun would not run its finally
            return response
        self._note_time("first_byte_ms")
        body = refusal or b"".join(exchange.pieces())
        if status == 200:
            value = parsed(body)
            if not isinstance(value, dict):
                meter.begun = bool(body)
                raise APIError("upstream_error", why="its answer is not a JSON object")
            meter.read_whole(value, len(body))
        elif GENERATED_ANYWAY.search(body):
            meter.begun = True
            meter.worked_since = self.started_at
        if self.reason == DRAINING:
            raise APIError("draining")
        self.end("ok" if status == 200 else "error", f"vLLM answers {status}")  # before it is seen
        if self.reason:  # end_upstream() may have ended half of it
            exchange.close()
        else:
            cast(Upstream, self.upstream).keep(exchange)
        return plain_answer(body, status, headers)

    def _note_time(self, name: str) -> None:
        """Writes down the milliseconds since the request's arrival, the first time."""
        if self.times[name] is None:
            self.times[name] = round((time.monotonic() - self.started_at) * 1000)

    def _events(self) -> Iterator[bytes]:
        """vLLM's events, and a comment in long silence; an error event when they break off."""
        meter = cast(Meter, self.meter)
        try:
            for piece in self._pieces:
                if piece:
                    self._note_time("first_byte_ms")
                shown = meter.feed(piece) if piece else COMMENT
                if meter.done:
                    break
                if shown and self.reason != DRAINING:
                    yield shown
            if self.reason == DRAINING or not (meter.done or meter.failed or meter.finished):
                raise APIError("upstream_error", why="its answer ended too early")
            # Booked before the caller can see the end.
            self.end("error" if meter.failed else "ok", "vLLM reported an error")
            if not meter.done:  # some servers leave it out
                shown = b"" if meter.failed else b"data: [DONE]\n\n"
            yield shown
        except APIError as error:
            self.end("error", self.reason or error.for_log)
            if self.reason == DRAINING:
                error = APIError("draining")
            yield error_event(self.endpoint, error, self.request_id)

    def close(self) -> None:
        """The end of a stream, also of one that was never begun; what vLLM last reported counts."""
        if self.status == "pending":
            self.stop(LEFT)
            with suppress(APIError):
                for piece in self._pieces:
                    cast(Meter, self.meter).feed(piece)
            self.end("aborted", LEFT)
        cast(Exchange, self.exchange).close()

    def stop(self, reason: str) -> None:
        """Wants the request to end, from any thread: LEFT or DRAINING."""
        if not self.reason:
            self.stopped_at = time.monotonic()
            self.reason = reason

    def end_upstream(self) -> None:
        """Ends vLLM's work, one step at each call: by abort_requests, else by hanging up.

        The watcher calls it each 0.1 s once there is a reason. Where vLLM has no abort_requests, a
        plain request whose caller left runs to its end.
        """
        server = self.upstream
        exchange = self.exchange
        if server is None or exchange is None or not self.upstream_ids:
            return
        waited_s = time.monotonic() - self.stopped_at
        can_abort = server.can_abort is not False
        if can_abort and waited_s < ABORT_GRACE_S:  # again, too: the request may not be there yet
            if self.aborting is None or self.aborting.done():
                self.aborting = self.watcher.pool.submit(server.abort, self.upstream_ids)
        elif self.stream or self.reason == DRAINING:
            # Half of it first: what vLLM has written by then still comes, with its counts.
            late = can_abort or waited_s > HANGUP_GRACE_S
            if self._lock.acquire(blocking=False):  # not when it ends: another may use it then
                if self.status == "pending":
                    exchange.shutdown(socket.SHUT_RDWR if late else socket.SHUT_WR)
                self._lock.release()

    def end(self, status: str, why: str) -> None:
        """Ends the request with this status and books it, if it has not ended yet."""
        with self._lock:
            if self.status != "pending":
                return
            self.why = f" ({why})" if status != "ok" else ""
            self._note_time("duration_ms")
            if self.meter and self.upstream_ids and DRAINING in (self.reason, why):
                self.meter.begun = True  # vLLM was at work, though nothing of it was seen
            self.counts = self.meter.counts(at_end=True) if self.meter else Counts()
            self.status = "aborted" if self.reason == LEFT else status
        try:
            self.book()
        except APIError as error:  # the watcher tries again
            log.error("%s not booked yet: %s", self.request_id, error.for_log)

    def book(self) -> None:
        """Books what is known now, until the end is booked; then writes the log's line. 503."""
        with self._lock:
            ended = self.status != "pending"
            meter = self.meter
            if self not in self.watcher.running:
                return
            if meter:
                counts = self.counts if ended else meter.counts()
                row = (self.request_id, self.status, counts, self.times)
                with self.watcher.database.begin() as execute:
                    self.tokens_used = book(execute, *row)
            if ended:
                self.watcher.running.discard(self)
        if ended and meter:
            who = f"{self.request_id} {self.caller.username} key {self.caller.api_key_id}"
            what = f"{self.endpoint} {self.model}{' stream' * self.stream} {self.status}{self.why}"
            cost = f"{counts.prompt_tokens}+{counts.completion_tokens} tokens"
            cost += " (estimated)" * counts.estimated
            first, last = self.times.values()
            log.info("%s %s %s, first byte %s ms, end %s ms", who, what, cost, first, last)


class StreamResponse(Response):
    """A stream whose headers leave at once, not with its first bytes."""

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """WSGI's write() sends them (PEP 3333)."""
        app_iter, status, headers = self.get_wsgi_response(environ)
        try:
            start_response(status, headers)(b"")
        except Exception:  # the caller has gone, and nobody else would close the stream
            self.close()
            raise
        return app_iter


# What OpenCode takes for a full context window, see part 2.
MISREAD = re.compile(rb"(?i)token limit exceeded|too many tokens|exceeds the limit of")
# vLLM's 400 for a forced tool of messages whose arguments are no object: all was generated by then.
GENERATED_ANYWAY = re.compile(rb"validation errors? for AnthropicContentBlock")


def require_good_answer(status: int, headers: Mapping[str, str]) -> None:
    """502 or 503 for an answer of vLLM that is not for the caller."""
    if status in (401, 403):
        raise APIError("upstream_error", why="it refuses the gate's own key, see VLLM_API_KEY")
    if headers.get("content-encoding", "identity") != "identity":
        raise APIError("upstream_error", why="it compressed its answer though asked not to")
    if status == 503:
        raise APIError("upstream_busy", wait_s=headers.get("retry-after", "2"))
    if status != 200 and not 400 <= status < 500:
        why = "it answered with an error of its own"
        raise APIError("upstream_error", why=why, reason=f"vLLM answers {status}")


def plain_answer(body: bytes, status: int, headers: Mapping[str, str]) -> Response:
    """vLLM's 200 or 4xx, its body unchanged; 429 in our words where OpenCode would misread it."""
    response = Response(body, status, content_type=headers.get("content-type"))
    if status == 429:
        response.headers["Retry-After"] = headers.get("retry-after", "1")
        if MISREAD.search(body):
            wait_s = response.headers["Retry-After"]
            why = "vLLM takes no more requests now"
            raise APIError("rate_limit_exceeded", why=why, wait_s=wait_s)
    return response


LOST_ROWS = """SELECT request_id, prompt_estimate, prompt_tokens, completion_tokens, cached_tokens,
 estimated FROM usage WHERE status = 'pending' AND lease_until < :now"""


class Watcher(threading.Thread):
    """Looks after running relays: callers who left, checkpoints, leases; and dead gates' rows."""

    def __init__(self, database: Database, upstreams: Upstreams, quota_period: str) -> None:
        super().__init__(name="watcher", daemon=True)
        self.database = database
        self.upstreams = upstreams
        self._quota_period = quota_period
        self.stopping = threading.Event()
        self.pool = ThreadPoolExecutor(5, "watcher")  # for what may take long
        self.running: set[Relay] = set()
        self.draining = False
        self._admission = threading.Lock()  # protects draining, and counts of `running`
        self._renew_at: float | None = 0.0  # when the next period of quotas begins; None: never
        self._round_at = time.time()  # when the last round of upkeep was well
        self._recover_at = 0.0  # no row is taken for dead before (monotonic)

    def admit(self, relay: Relay, places: int, most: int) -> None:
        """Lets a relay begin; 503 `draining`, `overloaded`; 429: `most` of its user run here.

        From here on it is in `running` until it is booked, and a gate that stops waits for it.
        """
        with self._admission:
            running = list(self.running)
            if self.draining:
                raise APIError("draining")
            if len(running) >= places:
                raise APIError("overloaded")
            if sum(other.caller.id == relay.caller.id for other in running) >= most:
                raise APIError("rate_limit_exceeded", why=f"{most} requests of yours are running")
            self.running.add(relay)

    def refuse_relays(self) -> None:
        """No relay is admitted any more."""
        with self._admission:
            self.draining = True

    def run(self) -> None:
        """Looks at the callers each 0.1 s until stopping is set; a slow disk does not hold it up."""
        self.pool.submit(self._keep_up)
        while not self.stopping.wait(0.1):
            for relay in list(self.running):
                if not relay.reason and relay.is_gone():
                    relay.stop(LEFT)
                if relay.reason and relay.status == "pending":
                    relay.end_upstream()
        self.pool.shutdown(cancel_futures=True)

    def _keep_up(self) -> None:
        """Renews quotas when their period begins, and does the upkeep each 2 s."""
        upkeep_at = 0.0
        while not self.stopping.wait(0.1):
            try:
                self.renew_quotas()
                if time.monotonic() >= upkeep_at:
                    upkeep_at = time.monotonic() + UPKEEP_S
                    self.upkeep()
            except APIError as error:  # the next round tries again
                log.error("upkeep: %s", error.for_log)
            except Exception:
                log.exception("upkeep")

    def renew_quotas(self) -> None:
        """Lets quotas begin again when a period does, once for all gates. 503."""
        if self._renew_at is None or time.time() < self._renew_at:
            return
        self._renew_at = time.time() + UPKEEP_S  # the next try, if this one fails
        begins_at, ends_at = period_of(self._quota_period, time.time())
        if ends_at:
            with self.database.begin() as execute:
                begun = renew_quotas(execute, begins_at)
            if begun:
                log.info("a new period of quotas has begun; the next one: %s", when(ends_at))
        self._renew_at = ends_at

    def upkeep(self) -> None:
        """Checkpoints and leases of what runs, what could not be booked, rows of dead gates. 503.

        After a gap (a suspended machine, a clock that was set, a database that was away) other gates
        get the time to renew their leases before a row of theirs is taken for dead.
        """
        if abs(time.time() - self._round_at) > LEASE_S / 2:
            self._recover_at = time.monotonic() + LEASE_S
        for upstream in self.upstreams:
            upstream.close_idle()
        for relay in list(self.running):
            try:
                relay.book()
            except APIError:
                raise
            except Exception:  # so that the others still get booked
                log.exception("a row cannot be booked")
        lost = self.database.query(LOST_ROWS, now=int(time.time()))
        here = {relay.request_id for relay in list(self.running)}
        times = {"first_byte_ms": None, "duration_ms": None}
        for request_id, estimate, *seen in lost if time.monotonic() >= self._recover_at else ():
            # The last checkpoint counts, at least the prompt.
            counts = Counts(*seen) if seen[0] else Counts(estimate, estimated=1)
            if request_id not in here:
                log.warning("%s lost: its gate died", request_id)
                with self.database.begin() as execute:
                    book(execute, request_id, "lost", counts, times)
        if time.time() % 3600 < UPKEEP_S:
            self.database.write(FORGET_OLD_LOGINS, before=int(time.time() - 3600) * 1000)
        self._round_at = time.time()


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
    with suppress(ValueError, RecursionError):
        body = json.loads(request.get_data().decode("utf-8-sig"))
        if isinstance(body, dict):
            return body
    raise APIError("invalid_json")


def base_url() -> str:
    """The gate's URL as callers see it, without a slash at its end."""
    return gate().settings.public_url or request.host_url.rstrip("/")


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
    text = f"""llmgate: OpenAI's and Anthropic's API with accounts, keys and quotas in front of vLLM.

register  {how_to_register(url, gate().settings)}
base URL  {url}/v1 (OpenAI), {url} (Anthropic)
usage     curl {url}/users/usage {key} -H 'Accept: text/plain'
OpenCode  opencode auth login {url}
Claude    curl -sf --create-dirs {url}/claude.json {key} -o ~/.claude/settings.json
Codex     curl -sf --create-dirs {url}/codex.toml {key} -o ~/.codex/config.toml
"""
    return Response(text, mimetype="text/plain")


@routes.post("/auth/register")
def auth_register() -> tuple[JSONObject, int]:
    """A new account with its first API key; 403 `registration_closed`."""
    settings = gate().settings
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
    user_id, jwt_version, _ = log_in(body.get("username"), body.get("password"))
    return gate().keyring.jwt_answer(user_id, jwt_version)


@jwt_routes.post("/auth/refresh")
def auth_refresh() -> JSONObject:
    """A new JWT for one that still works."""
    return gate().keyring.jwt_answer(g.caller.id, g.caller.jwt_version)


@jwt_routes.post("/auth/password")
def auth_password() -> JSONObject:
    """A new password; every older JWT of the user stops working."""
    body = read_json()
    _, _, old_hash = log_in(g.caller.username, body.get("old_password"))
    new_hash = hash_password(body.get("new_password"), "new_password")
    sql = """UPDATE users SET password_hash = :new, jwt_version = jwt_version + 1
 WHERE id = :id AND password_hash = :old RETURNING jwt_version"""
    changed = gate().database.write(sql, new=new_hash, id=g.caller.id, old=old_hash)
    if not changed:  # another call was quicker
        raise APIError("invalid_credentials")
    return gate().keyring.jwt_answer(g.caller.id, changed[0][0])


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
    api_key, row = gate().keyring.new_key(user_id=g.caller.id, name="default")
    sql = """UPDATE api_keys SET nonce = :nonce, key_hash = :key_hash, created_at = :now,
 last_used_at = NULL WHERE id = (SELECT min(id) FROM api_keys WHERE user_id = :user_id
 AND revoked_at IS NULL) RETURNING id"""
    with gate().database.begin() as execute:
        execute(LOCK_USER, row)
        if not execute(sql, row):
            execute(INSERT_KEY, row)
    return {"api_key": api_key}


def keys_of(user_id: int) -> list[JSONObject]:
    """A user's live keys with their use; times in Unix seconds."""
    sql = """SELECT api_key_id, CAST(sum(prompt_tokens + completion_tokens) AS BIGINT) FROM usage
 WHERE user_id = :user_id GROUP BY api_key_id"""
    used = dict(gate().database.query(sql, user_id=user_id))
    rows = gate().database.query(LIVE_KEYS, user_id=user_id)
    keys = []
    for key_id, name, created_at, last_used_at, nonce, key_hash in rows:
        key = {"id": key_id, "name": name, "created_at": created_at, "last_used_at": last_used_at}
        key["api_key"] = gate().keyring.stored_key(nonce, key_hash)
        keys.append(key | {"tokens_used": used.get(key_id, 0)})
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
    api_key, row = gate().keyring.new_key(user_id=g.caller.id, name=name)
    with gate().database.begin() as execute:
        execute(LOCK_USER, row)
        if len(execute(LIVE_KEYS, row)) >= MAX_KEYS:
            raise APIError("too_many_keys")
        ((key_id,),) = execute(INSERT_KEY, row)
    key = {"id": key_id, "name": name, "created_at": row["now"], "last_used_at": None}
    return key | {"tokens_used": 0, "api_key": api_key}, 201


def revoke(user_id: int, key_id: int) -> None:
    """Ends a key at once; answers that run with it go on. 404."""
    sql = """UPDATE api_keys SET revoked_at = :now
 WHERE id = :id AND user_id = :user_id AND revoked_at IS NULL RETURNING id"""
    values = {"now": int(time.time()), "id": min(key_id, MAX_BIGINT), "user_id": user_id}
    if not gate().database.write(sql, **values):
        raise APIError("key_not_found")


@jwt_routes.delete("/users/me/keys/<int:key_id>")
def revoke_key(key_id: int) -> tuple[str, int]:
    """Ends one of the caller's keys."""
    revoke(g.caller.id, key_id)
    return "", 204


@key_routes.get("/v1/models", defaults={"model": None})
@key_routes.get("/v1/models/<path:model>")
def models(model: str | None) -> JSONObject:
    """The models of all servers and the aliases, or one of them."""
    found = gate().upstreams.public_models()
    if model is None:
        return {"object": "list", "data": list(found.values())}
    if model not in found:
        raise APIError("model_not_found", "model", model=model)
    return found[model]


@key_routes.post("/v1/chat/completions", defaults={"endpoint": "chat/completions"})
@key_routes.post("/v1/completions", defaults={"endpoint": "completions"})
@key_routes.post("/v1/embeddings", defaults={"endpoint": "embeddings"})
@key_routes.post("/v1/messages", defaults={"endpoint": "messages"})
@key_routes.post("/v1/responses", defaults={"endpoint": "responses"})
def relay_request(endpoint: str) -> Response:
    """vLLM's answer, plain or streamed, within the caller's quota."""
    app = gate()
    body = read_json()
    require_relayable(body, endpoint)
    if endpoint == "completions":
        body.setdefault("max_tokens", 16)  # as vLLM and OpenAI do; other servers would go on
    body["model"] = app.upstreams.resolve(body["model"])
    relay = Relay(app.watcher, g.caller, endpoint, body)
    places = max(2, app.settings.threads - 32)  # some stay free, for logins and usage
    app.watcher.admit(relay, places, app.settings.max_requests_per_user)
    try:
        busy = [other.upstream for other in list(app.watcher.running)]
        servers = app.upstreams.route(relay.model, busy)
        relay.reserve(app, servers[0], body, request.get_data())
        g.relay = relay
        response = relay.ask(servers, body)
    except Exception as error:
        relay.end("error", error.for_log if isinstance(error, APIError) else words_of(error))
        if relay.exchange:
            relay.exchange.close()
        if relay.reason == DRAINING:
            raise APIError("draining") from None
        raise
    left = relay.caller.token_limit - relay.tokens_used
    response.headers["x-ratelimit-limit-tokens"] = str(relay.caller.token_limit)
    response.headers["x-ratelimit-remaining-tokens"] = str(max(0, left))
    return response


COUNTING = threading.Semaphore(24)  # callers of count_tokens at a time: they hold threads


@key_routes.post("/v1/messages/count_tokens")
def count_tokens() -> Response:
    """vLLM's count of a prompt, free of charge."""
    upstreams = gate().upstreams
    body = read_json()
    require_relayable(body, "messages")
    body["model"] = upstreams.resolve(body["model"])
    server = upstreams.route(body["model"], [])[0]
    if not COUNTING.acquire(blocking=False):
        raise APIError("overloaded")
    try:
        answer = server.call("/v1/messages/count_tokens", encoded(body), 30)
    finally:
        COUNTING.release()
    require_good_answer(answer.status_code, answer.headers)
    return plain_answer(answer.content, answer.status_code, answer.headers)


@either_routes.get("/users/usage")
def users_usage() -> JSONObject | Response:
    """The report, as JSON or, with Accept: text/plain, drawn."""
    days = request.args.get("days", "30")
    if days not in map(str, range(1, 367)):
        raise APIError("invalid_value", "days", must_be="a whole number from 1 to 366")
    report = usage_report(gate().database, g.caller, int(days), gate().resets_at())
    if request.accept_mimetypes.best_match(["application/json", "text/plain"]) == "text/plain":
        return Response(drawn_usage(g.caller.username, report), mimetype="text/plain")
    return report


@routes.get("/health")
def health() -> JSONObject:
    """200 while the database answers and takes writes; 503."""
    upstreams = gate().upstreams
    if gate().watcher.draining:
        raise APIError("draining")
    sql = """INSERT INTO login_attempts (name_hash, tries, held_until_ms) VALUES ('health', 0, :now)
 ON CONFLICT (name_hash) DO UPDATE SET held_until_ms = :now RETURNING tries"""
    gate().database.write(sql, now=int(time.time()) * 1000)
    upstreams.models()  # keeps the list fresh
    up = sum(server.up for server in upstreams)
    return {"status": "ok", "upstreams": {"up": up, "of": len(upstreams)}}


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


def default_model() -> tuple[str, int]:
    """The first alias that stands for a model, else the first model, and its context; 502."""
    upstreams = gate().upstreams
    models = upstreams.public_models()
    name = next((alias for alias in upstreams.aliases if alias in models), next(iter(models)))
    return name, upstreams.context(name) or UNKNOWN_CONTEXT


@key_routes.get("/opencode.json")
def opencode_json() -> JSONObject:
    """A complete opencode.json for this gate; 502 while no server is up."""
    upstreams = gate().upstreams
    models: JSONObject = {}
    for name in upstreams.public_models():
        context = upstreams.context(name) or UNKNOWN_CONTEXT
        limit = {"context": context, "output": min(context // 4, 32000)}
        models[name] = {"name": name, "tool_call": True, "limit": limit}
        real = upstreams.resolve(name)
        # OpenCode's repairs for Mistral's models go by `id`; without it the file outlives a change.
        if real != name and re.search("mistral|devstral", real, re.IGNORECASE):
            models[name]["id"] = real
    options = {"baseURL": f"{base_url()}/v1", "apiKey": "{env:LLMGATE_API_KEY}"}
    provider: JSONObject = {"npm": "@ai-sdk/openai-compatible", "name": "llmgate"}
    provider |= {"options": options, "models": models}
    default = f"llmgate/{default_model()[0]}"
    config = {"$schema": "https://opencode.ai/config.json", "provider": {"llmgate": provider}}
    return config | {"model": default, "small_model": default}


@routes.get("/.well-known/opencode")
def well_known_opencode() -> JSONObject:
    """What `opencode auth login URL` reads, without a key; 404 if OPENCODE_DISCOVERY is off."""
    if gate().settings.opencode_discovery == "off":
        raise APIError("not_found", hint="GET / says what there is")
    ask = 'printf "llmgate API key: "; stty -echo; read -r LLMGATE_API_KEY; stty echo; echo'
    ask = f'if [ -z "$LLMGATE_API_KEY" ]; then {{ {ask}; }} < /dev/tty > /dev/tty; fi'
    command = ["sh", "-c", f'{ask}; printf %s "$LLMGATE_API_KEY"']
    return {"auth": {"command": command, "env": "LLMGATE_API_KEY"}, "config": opencode_json()}


@key_routes.get("/claude.json")
def claude_json() -> JSONObject:
    """A complete settings.json for Claude Code; it holds the caller's key."""
    model, context = default_model()
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
    model, context = default_model()
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
    allowed = gate().settings.allowed_hosts
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
    resets_at = gate().resets_at()
    is_metered = response.status_code == 429 or "x-ratelimit-limit-tokens" in response.headers
    if resets_at and is_metered:
        wait = duration(max(0, resets_at - int(time.time())))
        response.headers["x-ratelimit-reset-tokens"] = wait
    if "relay" not in g:
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
        if request.path[1:] in ("models", *PROTOCOLS):
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
    with database.exclusive():  # of several gates one makes it
        if not path.exists():
            if database.query("SELECT id FROM users LIMIT 1"):
                why = "bring it back, or let all users make new keys after: openssl rand -hex 32"
                raise SettingsError(f"{path} is missing, but there are users: {why} > {path}")
            unfinished = path.with_suffix(".unfinished")  # a crash leaves no half of a secret
            unfinished.write_text(secrets.token_hex(32))
            unfinished.chmod(0o600)
            unfinished.rename(path)
    make_private(path)
    secret = path.read_text(errors="replace").strip()
    if len(secret) < 32 or "\N{REPLACEMENT CHARACTER}" in secret:
        raise SettingsError(f"{SECRET_FILE} must hold 32 bytes or more: openssl rand -hex 32")
    return secret


# SQLite: a transaction begins where we say. libpq: a host that vanishes is noticed within seconds.
SQLITE = {"isolation_level": None, "check_same_thread": False, "timeout": DB_TIMEOUT_S}
LIBPQ = {"connect_timeout": DB_TIMEOUT_S, "tcp_user_timeout": DB_TIMEOUT_S * 1000}
LIBPQ |= {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 2}
POOL = {"pool_timeout": DB_TIMEOUT_S, "pool_size": 32, "max_overflow": 32, "hide_parameters": True}
POOL["pool_use_lifo"] = True  # the connection that was used last has its pages at hand


class Gate(Flask):
    """The WSGI application; makes the tables and the secret where they are missing."""

    def __init__(self, settings: Settings) -> None:
        super().__init__("llmgate", static_folder=None)
        self.settings = settings
        self.url_map.merge_slashes = False  # or /v1//models would be answered by a redirect
        cast(Any, self.json).sort_keys = False
        self.config["SQLALCHEMY_DATABASE_URI"] = settings.database_url
        options: JSONObject = POOL | {"connect_args": SQLITE}
        if settings.database_url.startswith("postgresql"):
            options = POOL | {"connect_args": LIBPQ, "pool_pre_ping": True}
        self.config["SQLALCHEMY_ENGINE_OPTIONS"] = options
        self.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
        for blueprint in (routes, jwt_routes, key_routes, either_routes):
            self.register_blueprint(blueprint)
        self.register_error_handler(Exception, show_error)
        try:
            db.init_app(self)
            with self.app_context():
                self.database = Database(db.engine)
            with self.database.exclusive():
                self.database.create_tables()
            secret = load_secret(settings, self.database)
        except OSError as error:
            raise SettingsError(f"DATABASE_URL or {SECRET_FILE}: {error}") from None
        except (ImportError, ValueError, sa.exc.ArgumentError):
            why = "a database's URL; PostgreSQL's also needs: pip install 'psycopg[binary]'"
            raise SettingsError(f"DATABASE_URL must be {why}") from None
        self.keyring = Keyring(secret, settings.jwt_expiration_hours)
        self.upstreams = Upstreams(settings)
        self.watcher = Watcher(self.database, self.upstreams, settings.quota_period)
        self.watcher.renew_quotas()

    def resets_at(self) -> int | None:
        """When quotas begin again (Unix seconds); None: never."""
        return period_of(self.settings.quota_period, time.time())[1]

    def renews(self) -> str:
        """When quotas begin again, for the end of a sentence."""
        resets_at = self.resets_at()
        return f"; it begins again on {when(resets_at)}" if resets_at else ""


class LineFormatter(logging.Formatter):
    """One line per record, without control characters, keys and JWTs; tracebacks without values."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line; what could begin another one is escaped."""
        line = super().formatMessage(record)
        return printable(re.sub(r"(sk-llmgate-|eyJ)[\w.-]+", r"\1...", line))

    def formatException(self, ei: Any) -> str:
        """A traceback; a driver's message may hold a row, and is cut to its first part."""
        return "".join(traceback.format_tb(ei[2])) + words_of(ei[1])


def log_to(file: str, number: int) -> logging.Handler:
    """Begins the log; of several processes the first one rotates the file. SettingsError."""
    handler: logging.Handler = logging.StreamHandler()
    try:
        if file != "-" and number == 1:
            handler = logging.handlers.RotatingFileHandler(file, "a", 10 << 20, 5, "utf-8")
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
        status = f"{error.status} {http.client.responses[error.status]}"
        headers = [("Content-Type", "application/json"), ("X-Request-Id", secrets.token_hex(16))]
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


def bind(settings: Settings) -> socket.socket:
    """The listening socket; SettingsError."""
    address = (settings.host, settings.port)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server(address, family=family, backlog=1024)
    except OSError as error:
        hint = "; if vLLM has port 8000, start the gate with PORT=8002" * (settings.port == 8000)
        raise SettingsError(f"HOST and PORT must be free: {error.strerror}{hint}") from None
    timeout_ms = settings.upstream_timeout * 1000  # gives up a caller who never reads
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
    return listening


class Server:
    """One gate on a bound socket: serving in run(), ended by drain() from any thread."""

    def __init__(self, settings: Settings, listening: socket.socket, number: int = 1) -> None:
        """`number` is that of the process, of PROCESSES."""
        self._handler = log_to(settings.log_file, number)
        self.app = Gate(settings)
        host, port = listening.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._sockets: dict[int, Any] = {}  # waitress's loop runs while it has any
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # a relay has two connections
        forwarded = [f"x-forwarded-{name}" for name in ("for", "host", "proto", "port")]
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
            trusted_proxy=settings.trusted_proxy or "nobody",
            trusted_proxy_headers=forwarded,
            clear_untrusted_proxy_headers=False,  # nobody reads them
        )
        self._waitress.channel_class = Channel

    def run(self) -> None:
        """Serves until drain() has ended it and all is booked."""
        watcher = self.app.watcher
        watcher.start()
        try:
            while self._sockets:
                before = len(self._sockets)
                loop(1, True, self._sockets, 1)
                # A turn looks at all connections: let several get ready, but accept new ones at
                # once. 64 callers get a quarter more done, 200 streams a third of the p99 lag.
                if len(watcher.running) > 8 and len(self._sockets) <= before:
                    time.sleep(0.001)
        finally:
            watcher.stopping.set()  # or its threads would keep a broken gate from ending
        self._drainer.join()  # it may still be pulling the trigger that is closed now
        self._waitress.task_dispatcher.shutdown()
        close_all(self._waitress.active_channels)
        self._waitress.close()
        watcher.join()
        with suppress(APIError):
            watcher.upkeep()
        for upstream in self.app.upstreams:
            upstream.close_idle()
            upstream.session.close()
        self.app.database.close()
        logging.getLogger().removeHandler(self._handler)
        with suppress(OSError):  # a full disk
            self._handler.close()

    def drain(self, grace_s: float = 30) -> None:
        """Refuses new relays from now on, breaks off the running ones after `grace_s`, then stops."""
        self.app.watcher.refuse_relays()
        self._drainer = threading.Thread(target=self._drain, args=(grace_s,), name="drain")
        self._drainer.start()

    def _drain(self, grace_s: float) -> None:
        """The rest of drain(), beside waitress, which goes on serving meanwhile."""
        running = self.app.watcher.running
        channels = self._waitress.active_channels
        wait_until(lambda: not running, grace_s)
        for relay in list(running):
            relay.stop(DRAINING)
        wait_until(lambda: not running, 5)
        for relay in list(running):  # its caller does not read; one without a row sees `reason`
            if relay.meter:
                relay.end("error", DRAINING)
        wait_until(
            lambda: not any(c.requests or c.total_outbufs_len for c in [*channels.values()]), 2
        )
        self._waitress.trigger.pull_trigger(self._sockets.clear)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Polls until the condition holds or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def serve(settings: Settings, listening: socket.socket, number: int = 1) -> None:
    """Runs one gate until SIGTERM, SIGHUP or Ctrl-C; a second signal stops it at once."""
    with suppress(AttributeError):  # glibc would keep the memory of large bodies for good
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    server = Server(settings, listening, number)

    def end(*_: object) -> None:
        if server.app.watcher.draining:
            os._exit(1)
        if number == 1:
            click.echo("Waiting up to 30 s for running answers; once more to stop now.", err=True)
        server.drain()

    for name in ENDING:
        signal.signal(name, end)
    if settings.processes > 1:  # a terminal's Ctrl-C reaches all; the first one passes it on
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    if number == 1:
        urls = ", ".join(upstream.url for upstream in server.app.upstreams)
        start_one = f"none yet at {urls}\n          start one: vllm serve MODEL --port 8001"
        click.echo(f"""llmgate   {server.url}
models    {", ".join(map(printable, server.app.upstreams.models())) or start_one}
database  {sa.make_url(settings.database_url).render_as_string()}
register  {how_to_register(server.url, settings)}""")
    server.run()


def serve_all(settings: Settings, listening: socket.socket) -> None:
    """Starts PROCESSES gates on one socket and looks after them: a dead one is replaced."""
    Gate(settings).database.close()  # makes the tables and the secret, while nobody else does
    workers: dict[int, int] = {}  # process id: its number
    missing = list(range(1, settings.processes + 1))
    supervisor = os.getpid()
    code = 0
    ending = False

    def end(*_: object) -> None:
        nonlocal ending
        ending = True
        for pid in list(workers):
            os.kill(pid, signal.SIGTERM)

    for name in ENDING:
        signal.signal(name, end)
    while workers or (missing and not ending):
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until a new process has its own
        while missing and not ending:
            pid = os.fork()
            if pid == 0:
                ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: it ends with us
                if os.getppid() == supervisor:
                    serve(settings, listening, missing[0])
                return
            workers[pid] = missing.pop(0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        pid, wait_status = os.wait()
        number = workers.pop(pid)
        code = os.waitstatus_to_exitcode(wait_status)
        if not ending and code == 2:  # a setting is wrong
            end()
        elif not ending:
            click.echo(f"Process {number} ended ({code}); starting another.", err=True)
            time.sleep(1)
            missing.append(number)
    sys.exit(code)


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
    _, sqlite, path = settings.database_url.partition("sqlite:///")
    if sqlite and command not in ("create-tables", "create-user") and not Path(path).exists():
        raise click.ClickException(f"There is no database {path}; is this the gate's folder?")
    context.with_resource(Gate(settings).app_context())


def token_count(text: str) -> int:
    """A number of tokens, also as 50k, 2M or 1,000,000; click's error for what is none."""
    digits = re.sub("M$", "000000", re.sub("k$", "000", text.replace(",", "")))
    if not re.fullmatch("[0-9]{1,19}", digits) or int(digits) not in COUNT:
        raise click.BadParameter("must be a whole number above 0, like 50000, 50k or 2M")
    return int(digits)


NAME = click.argument("name")
NAME_OR_ALL = click.argument("name", required=False)


def accounts(name: str | None = None) -> list[Caller]:
    """The account of a name, or all; a click error if nobody has the name."""
    everyone = gate().database.query(f"SELECT {USER} FROM users u ORDER BY u.id")
    found = [Caller(*row) for row in everyone if name is None or row[1].lower() == name.lower()]
    if name is not None and not found:
        raise click.ClickException(f"There is no user {name!r}; see: python llmgate.py users")
    return found


def update(name: str, said: str, assignments: str, value: object) -> None:
    """UPDATEs an account's row by these SQL assignments of :value, and says so."""
    (user,) = accounts(name)
    sql = f"UPDATE users SET {assignments} WHERE id = :id RETURNING id"
    gate().database.write(sql, value=value, id=user.id)
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
@click.option("--token-limit", type=token_count, help="The quota, like 50000, 50k or 2M.")
def create_user(name: str, token_limit: int | None) -> None:
    """Make an account (password asked, or on stdin); print its key."""
    limit = token_limit or gate().settings.default_token_limit
    click.echo(register(name, asked_password(), limit)[1])


@cli.command()
def users() -> None:
    """List all accounts with their quotas."""
    click.echo(f"{'id':>5} {'username':<24} {'used':>13} {'limit':>13}")
    for user in accounts():
        used = user.tokens_used
        limit = user.token_limit
        state = "disabled" if user.disabled_at else ""
        click.echo(f"{user.id:>5} {user.username[:24]:<24} {used:>13,} {limit:>13,} {state}")


@cli.command()
@NAME_OR_ALL
@click.option("--days", type=click.IntRange(1, 366), default=30, show_default=True)
def usage(name: str | None, days: int) -> None:
    """Draw the usage of one account, or of all, the heaviest first."""
    if name is None:
        rows = gate().database.query(USAGE_BY_USER, since=int(time.time()) // 86400 - days + 1)
        return click.echo(table("username", rows), nl=False)
    (user,) = accounts(name)
    report = usage_report(gate().database, user, days, gate().resets_at())
    click.echo(drawn_usage(user.username, report), nl=False)


@cli.command()
@NAME
@click.option("--revoke", "key_id", type=click.IntRange(1), metavar="ID", help="End this key.")
def keys(name: str, key_id: int | None) -> None:
    """List the keys of an account, or end one."""
    (user,) = accounts(name)
    if key_id:
        revoke(user.id, key_id)
    click.echo(f"{'id':>5} {'name':<28} {'created':<10} {'last used':<10} {'tokens':>13}")
    for key in keys_of(user.id):
        made = date_of(key["created_at"])
        used = date_of(key["last_used_at"])
        label = printable(key["name"])[:28]
        click.echo(f"{key['id']:>5} {label:<28} {made:<10} {used:<10} {key['tokens_used']:>13,}")


@cli.command()
@NAME
@click.argument("token_limit", type=token_count)
def set_limit(name: str, token_limit: int) -> None:
    """Set the quota of an account, like 50000, 50k or 2M."""
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
        with gate().database.begin() as execute:
            reset_usage(execute, user.id)
        click.echo(f"{user.username} begins again at 0 tokens.")


@cli.command()
@NAME
def set_password(name: str) -> None:
    """Set a password (asked, or on stdin) and end the account's JWTs."""
    accounts(name)  # or a password would be asked for nobody
    assignments = "password_hash = :value, jwt_version = jwt_version + 1"
    update(name, "has a new password", assignments, hash_password(asked_password()))


@cli.command()
def check() -> None:
    """Recount tokens_used from the rows; say what differs (exit status 1)."""
    sums = """SELECT username, tokens_used, coalesce(sum(prompt_tokens + completion_tokens), 0),
 tokens_reserved, coalesce(sum(reserved), 0) FROM users u LEFT JOIN usage r ON r.user_id = u.id
 GROUP BY u.id ORDER BY u.id"""
    rows = [row for row in gate().database.query(sums) if row[1] != row[2] or row[3] != row[4]]
    for row in rows:
        click.echo("{}: {} used, rows say {}; {} reserved, rows say {}".format(*row))
    click.echo(f"{len(rows)} accounts differ from their rows.")
    sys.exit(bool(rows))


def main() -> None:
    """The command line. Exit status 2: a setting is wrong, another start would not mend it."""
    os.umask(0o077)  # database, -wal, -shm, log and secret are the gate's alone
    cast(Any, sys.stdout).reconfigure(errors="replace")  # a terminal may know no bars
    try:
        cli()
    except SettingsError as error:
        click.echo(f"llmgate: {error}", err=True)
        sys.exit(2)
    except APIError as error:
        why = "" if str(error) in error.for_log else f" ({error.for_log})"
        sys.exit(f"llmgate: {error}{why}")


if __name__ == "__main__":
    main()
