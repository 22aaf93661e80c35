"""Records of writes with a write id, so that a write that is sent again is not made again."""

SQLITE = """
CREATE TABLE writes (
    "key" BLOB NOT NULL,
    uid INTEGER NOT NULL,
    at INTEGER NOT NULL,
    kind TEXT NOT NULL,
    answer TEXT,
    PRIMARY KEY ("key")
) STRICT;
CREATE INDEX writes_at ON writes (at);
CREATE INDEX writes_uid ON writes (uid);
"""

POSTGRESQL = """
CREATE TABLE writes (
    key BYTEA NOT NULL,
    uid BIGINT NOT NULL,
    at BIGINT NOT NULL,
    kind TEXT NOT NULL,
    answer TEXT,
    PRIMARY KEY (key)
);
CREATE INDEX writes_at ON writes (at);
CREATE INDEX writes_uid ON writes (uid);
"""
