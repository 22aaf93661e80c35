"""Users, their memories with contents and history, and the models that made the vectors."""

SQLITE = """
CREATE TABLE meta (
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (name)
) STRICT;

CREATE TABLE users (
    uid INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL,
    user_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    live INTEGER NOT NULL,
    removed_version INTEGER NOT NULL,
    erased_at INTEGER NOT NULL,
    UNIQUE (tenant, user_id)
) STRICT;

CREATE TABLE memories (
    label INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    uid INTEGER NOT NULL,
    "key" BLOB NOT NULL,
    version INTEGER NOT NULL,
    event TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    expires_at INTEGER,
    deleted INTEGER NOT NULL,
    content_hash BLOB NOT NULL,
    id TEXT NOT NULL
) STRICT;
CREATE INDEX memories_content ON memories (content_hash);
CREATE INDEX memories_created ON memories (uid, created_at, label);
CREATE INDEX memories_expiry ON memories (expires_at) WHERE expires_at IS NOT NULL;
CREATE UNIQUE INDEX memories_key ON memories ("key");
CREATE UNIQUE INDEX memories_version ON memories (uid, version);

CREATE TABLE contents (
    cid INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    blank INTEGER NOT NULL,
    uid INTEGER NOT NULL,
    version INTEGER NOT NULL,
    model INTEGER NOT NULL,
    vector_crc INTEGER NOT NULL,
    text TEXT NOT NULL,
    metadata TEXT NOT NULL,
    embedding BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX contents_state ON contents (uid, version, model) WHERE blank = 0;

CREATE TABLE history (
    label INTEGER NOT NULL,
    version INTEGER NOT NULL,
    uid INTEGER NOT NULL,
    event TEXT NOT NULL,
    at INTEGER NOT NULL,
    PRIMARY KEY (label, version)
) STRICT;
CREATE INDEX history_uid ON history (uid);

CREATE TABLE models (
    model INTEGER NOT NULL,
    name TEXT NOT NULL,
    PRIMARY KEY (model),
    UNIQUE (name)
) STRICT;
"""

POSTGRESQL = """
CREATE TABLE meta (
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (name)
);

CREATE TABLE users (
    uid BIGSERIAL NOT NULL,
    tenant TEXT COLLATE "C" NOT NULL,
    user_id TEXT COLLATE "C" NOT NULL,
    version BIGINT NOT NULL,
    epoch BIGINT NOT NULL,
    live BIGINT NOT NULL,
    removed_version BIGINT NOT NULL,
    erased_at BIGINT NOT NULL,
    PRIMARY KEY (uid),
    UNIQUE (tenant, user_id)
);

CREATE TABLE memories (
    label BIGSERIAL NOT NULL,
    uid BIGINT NOT NULL,
    key BYTEA NOT NULL,
    version BIGINT NOT NULL,
    event TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    expires_at BIGINT,
    deleted BIGINT NOT NULL,
    content_hash BYTEA NOT NULL,
    id TEXT NOT NULL,
    PRIMARY KEY (label)
);
CREATE INDEX memories_content ON memories (content_hash);
CREATE INDEX memories_created ON memories (uid, created_at, label);
CREATE INDEX memories_expiry ON memories (expires_at) WHERE expires_at IS NOT NULL;
CREATE UNIQUE INDEX memories_key ON memories (key);
CREATE UNIQUE INDEX memories_version ON memories (uid, version);

CREATE TABLE contents (
    cid BIGSERIAL NOT NULL,
    blank BIGINT NOT NULL,
    uid BIGINT NOT NULL,
    version BIGINT NOT NULL,
    model BIGINT NOT NULL,
    vector_crc BIGINT NOT NULL,
    text TEXT NOT NULL,
    metadata TEXT NOT NULL,
    embedding BYTEA NOT NULL,
    PRIMARY KEY (cid)
);
CREATE UNIQUE INDEX contents_state ON contents (uid, version, model) WHERE blank = 0;

CREATE TABLE history (
    label BIGINT NOT NULL,
    version BIGINT NOT NULL,
    uid BIGINT NOT NULL,
    event TEXT NOT NULL,
    at BIGINT NOT NULL,
    PRIMARY KEY (label, version)
);
CREATE INDEX history_uid ON history (uid);

CREATE TABLE models (
    model BIGSERIAL NOT NULL,
    name TEXT NOT NULL,
    PRIMARY KEY (model),
    UNIQUE (name)
);
"""
