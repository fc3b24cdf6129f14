-- The tables of the order service, with sample stock. `python -m examples.orders.order_service --apply-schema` applies
-- this file in one transaction, whenever its text is new to the database, and records that. So it must be idempotent: it
-- meets what its earlier versions have made.
CREATE TABLE IF NOT EXISTS stock (
    item text PRIMARY KEY,
    quantity integer NOT NULL CONSTRAINT enough_stock CHECK (quantity >= 0)
);
CREATE TABLE IF NOT EXISTS orders (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer text NOT NULL,
    item text NOT NULL CONSTRAINT known_item REFERENCES stock,
    quantity integer NOT NULL CHECK (quantity > 0),
    idempotency_key text UNIQUE
);
CREATE INDEX IF NOT EXISTS orders_of_customer ON orders (customer, id);
INSERT INTO stock (item, quantity)
VALUES ('tea', 1000), ('coffee', 500), ('cup', 20)
ON CONFLICT DO NOTHING;
