"""The tokens of index snapshots that were made from the log."""

SQLITE = """
CREATE TABLE index_snapshots (
    number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    uid INTEGER NOT NULL,
    token TEXT NOT NULL
) STRICT;
CREATE INDEX index_snapshots_uid ON index_snapshots (uid);
"""

POSTGRESQL = """
CREATE TABLE index_snapshots (
    number BIGSERIAL NOT NULL,
    uid BIGINT NOT NULL,
    token TEXT NOT NULL,
    PRIMARY KEY (number)
);
CREATE INDEX index_snapshots_uid ON index_snapshots (uid);
"""
