"""What a server tells at /metrics."""

from prometheus_client.parser import text_string_to_metric_families

from kit.client import get


async def scrape(url: str) -> dict[str, float]:
    """A server's samples, by name and labels as they appear in the text."""
    answer = await get(url + "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    return {
        sample.name + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }
