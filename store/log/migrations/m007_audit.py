"""The events of the audit, the size of each tenant, and the limits of keys."""

SQLITE = """
ALTER TABLE keys ADD COLUMN requests_per_minute INTEGER;
ALTER TABLE keys ADD COLUMN tokens_per_minute INTEGER;
CREATE TABLE tenants (
    tenant TEXT NOT NULL,
    part INTEGER NOT NULL,
    memories INTEGER NOT NULL,
    text_bytes INTEGER NOT NULL,
    PRIMARY KEY (tenant, part)
) STRICT;
INSERT INTO tenants SELECT tenant, 0, sum(live), sum(text_bytes) FROM users GROUP BY tenant;
CREATE TABLE events (
    eid INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    at INTEGER NOT NULL,
    tenant TEXT NOT NULL,
    key_id TEXT,
    action TEXT NOT NULL,
    uid INTEGER,
    ids TEXT,
    count INTEGER NOT NULL,
    status INTEGER,
    code TEXT
) STRICT;
CREATE INDEX events_tenant ON events (tenant, eid);
CREATE INDEX events_uid ON events (uid) WHERE uid IS NOT NULL;
"""

POSTGRESQL = """
ALTER TABLE keys ADD COLUMN requests_per_minute BIGINT;
ALTER TABLE keys ADD COLUMN tokens_per_minute BIGINT;
CREATE TABLE tenants (
    tenant TEXT COLLATE "C" NOT NULL,
    part BIGINT NOT NULL,
    memories BIGINT NOT NULL,
    text_bytes BIGINT NOT NULL,
    PRIMARY KEY (tenant, part)
);
INSERT INTO tenants SELECT tenant, 0, sum(live), sum(text_bytes) FROM users GROUP BY tenant;
CREATE TABLE events (
    eid BIGSERIAL NOT NULL,
    at BIGINT NOT NULL,
    tenant TEXT COLLATE "C" NOT NULL,
    key_id TEXT,
    action TEXT NOT NULL,
    uid BIGINT,
    ids TEXT,
    count BIGINT NOT NULL,
    status BIGINT,
    code TEXT,
    PRIMARY KEY (eid)
);
CREATE INDEX events_tenant ON events (tenant, eid);
CREATE INDEX events_uid ON events (uid) WHERE uid IS NOT NULL;
"""
