"""What is taken for a base model and for an adapter, before anything is loaded. CPU, no network, no model."""

import huggingface_hub
import pytest

from trl_tinylora.sources import refuse_unfit_adapter, refuse_unfit_base


@pytest.fixture
def folders(tmp_path):
    """A model's folder, an adapter's, one that holds both, an empty one, and a file."""
    for name in ("model", "adapter", "both", "empty"):
        (tmp_path / name).mkdir()
    for name in ("model", "both"):
        (tmp_path / name / "config.json").write_text("{}")
    for name in ("adapter", "both"):
        (tmp_path / name / "adapter_config.json").write_text("[")
    (tmp_path / "file").touch()
    return tmp_path


@pytest.fixture
def requests(monkeypatch):
    """Files that the Hub was asked for; it cannot be reached."""
    asked = []

    def get(url, **options):
        asked.append(url.rpartition("/")[2])
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", get)
    return asked


def test_a_models_and_an_adapters_folder_are_accepted(folders):
    refuse_unfit_base(str(folders / "model"))
    refuse_unfit_adapter(str(folders / "adapter"))


@pytest.mark.bad_input("a base model's or adapter's name")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter", "adapter is an adapter, not a base model. Name the base that its adapter_config.json names"),
        ("both", "both is an adapter, not a base model"),
        ("empty", "empty has no config.json: it is no model. Name the folder"),
        ("file", "file is a file. Name the folder that it lies in"),
        ("nothing", "nothing' is no folder, and no Hub id .owner/name.. Look for a mistyped path"),
    ],
)
def test_what_is_no_base_model_is_refused_without_a_request(folders, requests, name, message):
    with pytest.raises(ValueError, match=message):
        refuse_unfit_base(str(folders / name))
    assert requests == []


@pytest.mark.bad_input("a base model's or adapter's name")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model", "model has no adapter_config.json: it is no adapter folder. Name the folder that was saved"),
        ("file", "file is a file"),
        ("nothing", "nothing' is no folder, and no Hub id"),
    ],
)
def test_what_is_no_adapter_is_refused_without_a_request(folders, requests, name, message):
    with pytest.raises(ValueError, match=message):
        refuse_unfit_adapter(str(folders / name))
    assert requests == []


@pytest.mark.parametrize("name", ["", "nothere", "./nothere", "a/b/c", "~/adapter"])
def test_a_name_that_cannot_be_an_adapters_on_the_hub_is_not_asked_for(requests, name):
    with pytest.raises(ValueError, match="no folder, and no Hub id"):
        refuse_unfit_adapter(name)
    assert requests == []


@pytest.mark.parametrize(
    ("refuse", "name", "file"),
    [
        (refuse_unfit_base, "nobody/nothing", "config.json"),
        (refuse_unfit_base, "gpt2-of-nobody", "config.json"),
        (refuse_unfit_adapter, "nobody/nothing", "adapter_config.json"),
    ],
)
def test_the_hub_is_asked_once(requests, refuse, name, file):
    with pytest.raises(ValueError, match=f"{name} is no folder, and not to be had from the Hub: no network"):
        refuse(name)
    assert requests == [file]


def test_what_is_in_the_cache_is_not_asked_for(requests, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *name, **revision: str(tmp_path))
    refuse_unfit_base("somebody/something", "a-branch")
    refuse_unfit_adapter("somebody/something")
    assert requests == []
