"""What every launch of a test run shares."""

import os
import shutil

import pytest


EXTENSION = "deepspeed_shm_comm"


@pytest.fixture(scope="session", autouse=True)
def extensions_folder(tmp_path_factory, pytestconfig):
    """
    The folder that DeepSpeed compiles into: this test run's own, of all its workers.

    The user's may hold the lock of a build that was killed, for whose end torch waits for ever. What an earlier run
    compiled, a minute's work, is copied from pytest's cache without its lock; where it is out of date, ninja sees it.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    built = shared / "torch-extensions" / EXTENSION
    kept = pytestconfig.cache.mkdir("torch-extensions") / EXTENSION
    copy_build(kept, built)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(built.parent))
        yield built.parent
    copy_build(built, kept)


def copy_build(source, target):
    """Copies a finished build where it is the newer one; the other worker of this test run may do the same."""
    if (source / "lock").exists() or built_at(source) <= built_at(target):
        return
    partial = target.with_name(f"{target.name}-{os.getpid()}")
    # With its times, by which ninja tells what is out of date.
    shutil.copytree(source, partial)
    shutil.rmtree(target, ignore_errors=True)
    try:
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial)


def built_at(folder):
    return max((library.stat().st_mtime for library in folder.glob("*.so")), default=0)
