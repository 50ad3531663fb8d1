-- The tables of llmgate, for SQLite and PostgreSQL. This file is their only creator; it is run at
-- every start, so each statement leaves alone what is already there.
-- Times are Unix seconds unless a name says otherwise. Counts are model tokens.

-- One person or agent with a quota.
CREATE TABLE IF NOT EXISTS users (
    id INTEGER PRIMARY KEY NOT NULL,
    username TEXT NOT NULL,                     -- 3 to 64 of [A-Za-z0-9_.-], as typed
    password_hash TEXT NOT NULL,                -- bcrypt
    token_limit BIGINT NOT NULL,                -- the quota
    tokens_used BIGINT DEFAULT 0 NOT NULL,      -- the sum of the user's usage rows
    tokens_reserved BIGINT DEFAULT 0 NOT NULL,  -- worst case of the requests that run now
    jwt_version BIGINT DEFAULT 1 NOT NULL,      -- a JWT with another version is refused
    disabled_at BIGINT,                         -- NULL: may log in and use the keys
    created_at BIGINT NOT NULL,
    CONSTRAINT users_token_limit_positive CHECK (token_limit > 0),
    CONSTRAINT users_tokens_used_not_negative CHECK (tokens_used >= 0),
    CONSTRAINT users_tokens_reserved_not_negative CHECK (tokens_reserved >= 0)
);
CREATE UNIQUE INDEX IF NOT EXISTS users_username ON users (lower(username));

-- One API key. The key itself is derived from the gate's secret and the nonce, and never stored.
CREATE TABLE IF NOT EXISTS api_keys (
    id INTEGER PRIMARY KEY NOT NULL,
    user_id INTEGER NOT NULL,
    name TEXT NOT NULL,
    nonce TEXT NOT NULL,                        -- 32 random bytes, hexadecimal
    key_hash TEXT UNIQUE NOT NULL,              -- SHA-256 of the key, hexadecimal
    created_at BIGINT NOT NULL,
    last_used_at BIGINT,                        -- to the minute
    revoked_at BIGINT,                          -- NULL: the key works
    FOREIGN KEY (user_id) REFERENCES users (id)
);
CREATE INDEX IF NOT EXISTS api_keys_user_id ON api_keys (user_id);

-- One relayed request: written before vLLM is asked, completed after. A row whose endpoint is
-- 'reset-usage' is not a request: its negative count brings the user's sum back to zero.
CREATE TABLE IF NOT EXISTS usage (
    request_id TEXT PRIMARY KEY NOT NULL,       -- the X-Request-Id of the answer
    user_id INTEGER NOT NULL,
    api_key_id INTEGER,
    model TEXT NOT NULL,                        -- the name vLLM serves, never an alias
    endpoint TEXT NOT NULL,                     -- the path after /v1/
    stream INTEGER DEFAULT 0 NOT NULL,          -- 1: the answer was asked for as a stream
    status TEXT DEFAULT 'pending' NOT NULL,
    estimated INTEGER DEFAULT 0 NOT NULL,       -- 1: vLLM's own count never came, or made no sense
    reserved BIGINT DEFAULT 0 NOT NULL,         -- tokens still held in users.tokens_reserved
    prompt_estimate BIGINT DEFAULT 0 NOT NULL,  -- tokens; charged if the gate dies before a count
    prompt_tokens BIGINT DEFAULT 0 NOT NULL,
    completion_tokens BIGINT DEFAULT 0 NOT NULL,
    cached_tokens BIGINT DEFAULT 0 NOT NULL,    -- of the prompt, when vLLM tells
    created_at BIGINT NOT NULL,
    first_byte_ms BIGINT,                       -- from the request's arrival, milliseconds
    duration_ms BIGINT,                         -- to the answer's end, milliseconds
    lease_until BIGINT NOT NULL,                -- a pending row past this time has lost its gate
    CONSTRAINT usage_status CHECK (status IN ('pending', 'ok', 'aborted', 'error', 'lost')),
    CONSTRAINT usage_tokens_not_negative
        CHECK (prompt_tokens >= 0 AND completion_tokens >= 0 OR endpoint = 'reset-usage'),
    FOREIGN KEY (user_id) REFERENCES users (id),
    FOREIGN KEY (api_key_id) REFERENCES api_keys (id)
);
-- The index of the first version, which the next one replaces.
DROP INDEX IF EXISTS usage_by_user;
-- In the order in which a usage report groups, with all that it adds up: it never touches the table.
CREATE INDEX IF NOT EXISTS usage_by_day ON usage
    (user_id, (created_at / 86400), model, api_key_id, created_at, prompt_tokens, completion_tokens);
CREATE INDEX IF NOT EXISTS usage_pending ON usage (user_id, lease_until) WHERE status = 'pending';

-- Logins that failed, by the name as it was typed; a right password takes its row out.
CREATE TABLE IF NOT EXISTS login_attempts (
    name_hash TEXT PRIMARY KEY NOT NULL,        -- SHA-256: people type passwords as names, too
    tries INTEGER NOT NULL,
    held_until_ms BIGINT NOT NULL               -- Unix milliseconds; until then no try is made
);

-- The periods of QUOTA_PERIOD that have begun; who writes one lets all quotas begin again.
CREATE TABLE IF NOT EXISTS quota_periods (
    begins_at BIGINT PRIMARY KEY NOT NULL
);
