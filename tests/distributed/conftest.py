"""What every launch of a test run shares."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def extensions_folder(tmp_path_factory):
    """
    The folder that DeepSpeed compiles into: this test run's own, of all its workers.

    The user's may hold the lock of a build that was killed, for whose end torch waits for ever.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(shared / "torch-extensions"))
        yield shared / "torch-extensions"
