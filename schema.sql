-- The table that the message service reads, with sample strings.
-- Idempotent, and safe if several clients apply it at once: the advisory lock admits one at a time
-- (CREATE TABLE IF NOT EXISTS alone can fail on a race in the catalogue), and the strings are
-- inserted only into an empty table, so a changed message is kept.
BEGIN;
SET LOCAL statement_timeout = '1min';
SELECT pg_advisory_xact_lock(7236832837);
CREATE TABLE IF NOT EXISTS messages (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    content text NOT NULL
);
INSERT INTO messages (content)
SELECT content
FROM (
    VALUES
        (1, 'Hello from PostgreSQL! This message was read from the database.'),
        (2, 'The second sample string.'),
        (3, 'The third sample string: naïve café, 你好, مرحبا, 👋.')
) AS samples (position, content)
WHERE NOT EXISTS (SELECT FROM messages)
ORDER BY position;
COMMIT;
