"""The API fuzzed from its own document: whatever is sent, the server never breaks, and keeps to what it declares."""

import pytest
import schemathesis
import small_server
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

import compose.digest as digest
from compose.app.jobs import Limits
from compose.app.server.api import make_app
from compose.app.server.orders import Bounds

EXAMPLES = 12  # per route


@pytest.fixture
def document(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "CACHE", tmp_path / "digests.json")
    small_server.encoder(tmp_path, monkeypatch)
    bounds, limits = Bounds(count=2, steps=2, pixels=64 * 64), Limits(waiting=8, kept=20)
    workshop = small_server.workshop(tmp_path, bounds=bounds, limits=limits)
    yield schemathesis.openapi.from_asgi("/openapi.json", make_app(workshop), headers={"Host": "127.0.0.1"})
    workshop.close()


def test_nothing_that_is_sent_breaks_the_server(document):
    sent = 0

    def check(case):
        nonlocal sent
        sent += 1
        headers = dict(case.headers or {}) | {"Host": "127.0.0.1"}
        case.call_and_validate(headers=headers, checks=[not_a_server_error, status_code_conformance])

    quiet = settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    operations = [found.ok() for found in document.get_all_operations()]
    for operation in operations:
        quiet(given(case=operation.as_strategy())(check))()
    assert len(operations) >= 18 and sent > 5 * len(operations)
