"""The keys of tenants."""

SQLITE = """
CREATE TABLE keys (
    kid INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL,
    digest BLOB NOT NULL,
    tenant TEXT NOT NULL,
    user_id TEXT,
    scopes TEXT NOT NULL,
    label TEXT,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    used_at INTEGER,
    revoked_at INTEGER,
    UNIQUE (id)
) STRICT;
CREATE INDEX keys_tenant ON keys (tenant, kid);
"""

POSTGRESQL = """
CREATE TABLE keys (
    kid BIGSERIAL NOT NULL,
    id TEXT NOT NULL,
    digest BYTEA NOT NULL,
    tenant TEXT COLLATE "C" NOT NULL,
    user_id TEXT COLLATE "C",
    scopes TEXT NOT NULL,
    label TEXT,
    created_at BIGINT NOT NULL,
    expires_at BIGINT,
    used_at BIGINT,
    revoked_at BIGINT,
    PRIMARY KEY (kid),
    UNIQUE (id)
);
CREATE INDEX keys_tenant ON keys (tenant, kid);
"""
