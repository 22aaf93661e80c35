"""The space of erased rows, tombstones by age, and the deletions that each user's indexes cannot catch up with."""

SQLITE = """
ALTER TABLE users ADD COLUMN forgotten_version INTEGER DEFAULT 0 NOT NULL;
CREATE INDEX memories_tombstones ON memories (updated_at) WHERE deleted = 1;
INSERT INTO meta
SELECT 'erased_bytes', coalesce(sum(4096 * (size / 4096) + 4096 / max(1, 4088 / (size % 4096 + 4))), 0)
FROM (SELECT length(text) + length(metadata) + length(embedding) + 30 AS size FROM contents WHERE blank = 1);
"""

POSTGRESQL = """
ALTER TABLE users ADD COLUMN forgotten_version BIGINT DEFAULT 0 NOT NULL;
CREATE INDEX memories_tombstones ON memories (updated_at) WHERE deleted = 1;
DELETE FROM contents WHERE blank = 1;
"""
