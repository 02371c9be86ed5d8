"""Servers that are shared by the tests of a session: one starts in seconds."""

import pytest

from tests.tracking.servers import server

PASSWORD = "planted-admin-password"


@pytest.fixture(scope="session")
def http(_migrated_store, tmp_path_factory):
    """The address of a real MLflow server."""
    with server(tmp_path_factory.mktemp("http"), _migrated_store) as address:
        yield address


@pytest.fixture(scope="session")
def guarded(_migrated_store, tmp_path_factory):
    """The address of a real MLflow server behind basic auth, and its folder."""
    folder = tmp_path_factory.mktemp("guarded")
    with server(folder, _migrated_store, password=PASSWORD) as address:
        yield address, folder
