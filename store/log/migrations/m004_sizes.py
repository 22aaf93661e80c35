"""The size of each user's texts and metadata, and an index of memories by the time of their last change."""

SQLITE = """
ALTER TABLE users ADD COLUMN text_bytes INTEGER NOT NULL DEFAULT 0;
UPDATE users SET text_bytes = (
    SELECT coalesce(sum(length(CAST(contents.text AS BLOB)) + length(CAST(contents.metadata AS BLOB))), 0)
    FROM memories JOIN contents ON contents.uid = memories.uid AND contents.version = memories.version
    JOIN models ON models.model = contents.model JOIN meta ON meta.name = 'model' AND meta.value = models.name
    WHERE memories.uid = users.uid AND memories.deleted = 0 AND contents.blank = 0
);
CREATE INDEX memories_updated ON memories (uid, updated_at, version);
"""

POSTGRESQL = """
ALTER TABLE users ADD COLUMN text_bytes BIGINT NOT NULL DEFAULT 0;
UPDATE users SET text_bytes = (
    SELECT coalesce(sum(octet_length(contents.text) + octet_length(contents.metadata)), 0)
    FROM memories JOIN contents ON contents.uid = memories.uid AND contents.version = memories.version
    JOIN models ON models.model = contents.model JOIN meta ON meta.name = 'model' AND meta.value = models.name
    WHERE memories.uid = users.uid AND memories.deleted = 0 AND contents.blank = 0
);
CREATE INDEX memories_updated ON memories (uid, updated_at, version);
"""
