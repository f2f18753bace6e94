"""What tests of the studio's pages share."""

from __future__ import annotations

import pytest
import small_server

from compose import digest


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A workshop with a tiny base and a library of its own; digests are kept with it."""
    monkeypatch.setattr(digest, "CACHE", tmp_path / "digests.json")
    small_server.encoder(tmp_path, monkeypatch)
    made = small_server.workshop(tmp_path)
    yield made
    made.close()
