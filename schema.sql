-- The table that the message service reads, with sample strings. `python -m message_service --apply-schema` applies this
-- file in one transaction, whenever its text is new to the database, and records that. So it must be idempotent: it
-- meets what its earlier versions have made. A changed message is kept.
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
        (3, 'The third sample string, which any encoding can hold.')
) AS samples (position, content)
WHERE NOT EXISTS (SELECT FROM messages)
ORDER BY position;
