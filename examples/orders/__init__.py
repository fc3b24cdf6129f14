"""Orders and the stock that they are taken from: keyed reads, a list, and writes. See docs/orders.md."""
