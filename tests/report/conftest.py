"""Reports to test with, each made once."""

import pytest

from polyhead.report import ReportData
from report import synthetic


@pytest.fixture(scope="session")
def decoder() -> ReportData:
    return synthetic.report(layers=6, heads=6, kv_heads=2, tokens=300)


@pytest.fixture(scope="session")
def encoder() -> ReportData:
    return synthetic.report(layers=3, heads=4, kv_heads=4, tokens=128, encoder=True)


@pytest.fixture(scope="session")
def nasty() -> ReportData:
    """Every string is out to break a page."""
    name = "</title><script>window.bad=1</script>\"'&\ud83d"
    return synthetic.report(layers=3, heads=4, kv_heads=2, tokens=240, nasty=True, name=name)


@pytest.fixture(scope="session")
def large() -> ReportData:
    """2,000 heads on 8,192 tokens."""
    return synthetic.report(layers=80, heads=25, kv_heads=5, tokens=8192)
