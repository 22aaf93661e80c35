"""The time that a memory tells of, and the thread that it is a part of."""

SQLITE = """
ALTER TABLE memories ADD COLUMN happened_at INTEGER;
ALTER TABLE memories ADD COLUMN thread INTEGER;
CREATE INDEX memories_thread ON memories (uid, thread, created_at, label) WHERE thread IS NOT NULL;
"""

POSTGRESQL = """
ALTER TABLE memories ADD COLUMN happened_at BIGINT;
ALTER TABLE memories ADD COLUMN thread BIGINT;
CREATE INDEX memories_thread ON memories (uid, thread, created_at, label) WHERE thread IS NOT NULL;
"""
