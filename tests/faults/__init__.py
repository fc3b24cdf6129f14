"""What the system does when it is broken on purpose while clients keep asking: a test for each fault.

The quick ones run with all other tests, the whole matrix with `make faults`, which also writes the README's table.
Each test tells its row of that table with the marker `fault`: where it belongs, what happens, what a client sees.
"""
