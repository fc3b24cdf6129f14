"""Event loops for tests of what depends on time."""

import asyncio
import selectors


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop that does not wait: its clock jumps to the next timer, and nothing else takes time."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = selectors.DefaultSelector()
        selector.select = self.skip  # type: ignore[method-assign]
        super().__init__(selector)

    def skip(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0
        return []

    def time(self) -> float:
        return self.now
