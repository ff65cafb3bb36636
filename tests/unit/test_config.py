"""Every check of a field, the budgets of the paper's figures on the real models' shapes, and the configuration on disk.

The models are built on the meta device: no weights, under a second each.
"""

import functools
import json
import pickle
from collections import Counter

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, Qwen2Config

from trl_tinylora import TinyLoraConfig, TinyLoraPeftType
from trl_tinylora.maths.tying import assign_groups, count_groups
from trl_tinylora.tuner.targets import resolve_target_modules, skeleton


REAL = {
    "Qwen2.5-0.5B": (Qwen2Config, 896, 4864, 24, 14, 2),
    "Qwen2.5-1.5B": (Qwen2Config, 1536, 8960, 28, 12, 2),
    "Qwen2.5-3B": (Qwen2Config, 2048, 11008, 36, 16, 2),
    "Qwen2.5-7B": (Qwen2Config, 3584, 18944, 28, 28, 4),
    "Llama-3.2-3B": (LlamaConfig, 3072, 8192, 28, 24, 8),
}
MODULES = {"Qwen2.5-0.5B": 168, "Qwen2.5-1.5B": 196, "Qwen2.5-3B": 252, "Qwen2.5-7B": 196, "Llama-3.2-3B": 196}


def real_config(name):
    config, hidden, intermediate, layers, heads, kv_heads = REAL[name]
    return config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=151936,
        tie_word_embeddings=name != "Qwen2.5-7B",
    )


@functools.cache
def real_model(name):
    return skeleton(real_config(name))


def count_of(model, config):
    return count_groups(resolve_target_modules(model, config), config.n_tie, config.tying) * config.u


@pytest.mark.bad_input("a field of the configuration")
@pytest.mark.parametrize("field", ["r", "u", "n_tie"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_below_one_are_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be at least 1, got {value}"):
        TinyLoraConfig(**{field: value})


@pytest.mark.bad_input("a field of the configuration")
@pytest.mark.parametrize("field", ["r", "u", "n_tie"])
@pytest.mark.parametrize("value", [2.0, True, None])
def test_counts_that_are_no_integers_are_refused(field, value):
    with pytest.raises(TypeError, match=f"`{field}` must be an integer, got {value!r} of type {type(value).__name__}"):
        TinyLoraConfig(**{field: value})


@pytest.mark.bad_input("a field of the configuration")
@pytest.mark.parametrize("field", ["r", "u"])
def test_text_for_a_count_is_refused(field):
    with pytest.raises(TypeError, match=f"`{field}` must be an integer, got '2' of type str"):
        TinyLoraConfig(**{field: "2"})


def test_the_only_text_for_n_tie_is_all():
    assert TinyLoraConfig(n_tie="all").n_tie == "all"
    with pytest.raises(ValueError, match="`n_tie` must be an integer or \"all\", got 'some'"):
        TinyLoraConfig(n_tie="some")


@pytest.mark.bad_input("a field of the configuration")
def test_unknown_tying_is_refused():
    with pytest.raises(ValueError, match=r"`tying` must be one of \('tiled', 'structured'\), or .*; got 'full'"):
        TinyLoraConfig(tying="full")


@pytest.mark.bad_input("a field of the configuration")
def test_unknown_projection_is_refused():
    with pytest.raises(ValueError, match=r"`projection` must be one of \('gaussian', 'basis'\), got 'uniform'"):
        TinyLoraConfig(projection="uniform")


@pytest.mark.bad_input("a field of the configuration")
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ValueError, match=rf"`projection_seed` must lie in \[0, 2\*\*32\), got {seed}"):
        TinyLoraConfig(projection_seed=seed)


@pytest.mark.bad_input("a field of the configuration")
@pytest.mark.parametrize("seed", [1.5, True, "1"])
def test_seeds_that_are_no_integers_are_refused(seed):
    with pytest.raises(TypeError, match=f"`projection_seed` must be an integer, got {seed!r}"):
        TinyLoraConfig(projection_seed=seed)


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_seeds_at_the_bounds_are_taken(seed):
    assert TinyLoraConfig(projection_seed=seed).projection_seed == seed


def test_layers_pattern_needs_layers_to_transform():
    with pytest.raises(ValueError, match="`layers_pattern` needs `layers_to_transform`; set both or neither"):
        TinyLoraConfig(target_modules=["q_proj"], layers_pattern="layers")


def test_layers_to_transform_needs_a_list_of_names():
    with pytest.raises(ValueError, match=r"needs `target_modules` as a list of names.*got 'all-linear'"):
        TinyLoraConfig(layers_to_transform=[0])
    assert TinyLoraConfig(target_modules=["q_proj"], layers_to_transform=[0]).layers_to_transform == [0]


def test_the_basis_has_no_more_than_r_squared_matrices():
    assert TinyLoraConfig(projection="basis", r=3, u=9).u == 9
    with pytest.raises(ValueError, match=r"has r \* r = 9 matrices, got u=10. Lower `u` or raise `r`"):
        TinyLoraConfig(projection="basis", r=3, u=10)


def test_more_values_than_a_group_has_directions_are_warned_of():
    with pytest.warns(UserWarning, match=r"u=13 is more than the r\*r\*n_tie = 12 degrees of freedom.*Lower `u` to 12"):
        TinyLoraConfig(r=2, n_tie=3, u=13)


def test_that_warning_points_at_the_line_that_made_the_configuration():
    with pytest.warns(UserWarning, match="u=5") as record:
        TinyLoraConfig(u=5)

    assert record[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_as_many_values_as_directions_are_not_warned_of():
    TinyLoraConfig(r=2, n_tie=3, u=12)


def test_n_tie_beyond_the_number_of_modules_counts_for_as_many_as_there_are(tiny_qwen2):
    # 14 modules at r=2 have 56 directions, whatever n_tie says.
    with pytest.warns(UserWarning, match="u=57 is more than the r\\*r\\*n_tie = 56 .* a group of 14 module"):
        get_peft_model(tiny_qwen2(), TinyLoraConfig(n_tie=100, u=57))
    with pytest.warns(UserWarning, match="u=57 is more than the r\\*r\\*n_tie = 56 .* a group of 14 module"):
        get_peft_model(tiny_qwen2(), TinyLoraConfig(n_tie="all", u=57))


def test_defaults_are_one_value_for_each_module_at_rank_two():
    config = TinyLoraConfig()

    assert (config.r, config.u, config.n_tie, config.tying, config.projection) == (2, 1, 1, "tiled", "gaussian")
    assert config.target_modules == "all-linear"
    assert config.peft_type.value == "TRL_TINYLORA"


@pytest.mark.parametrize("name", REAL)
def test_all_linear_means_seven_modules_a_layer_without_the_head(name):
    assert len(resolve_target_modules(real_model(name), TinyLoraConfig())) == MODULES[name]


@pytest.mark.parametrize(
    ("name", "tying", "n_values"),
    [
        *[("Qwen2.5-7B", "tiled", n) for n in (1, 2, 4, 7, 13, 25, 49, 98, 196, 392)],
        *[("Qwen2.5-1.5B", "tiled", n) for n in (1, 2, 4, 7, 13, 25, 49, 98, 196)],
        *[("Llama-3.2-3B", "tiled", n) for n in (1, 2, 4, 7, 13, 25, 49, 98, 196)],
        *[("Qwen2.5-3B", "tiled", n) for n in (1, 13, 16, 63, 252, 504)],
        *[("Qwen2.5-3B", "structured", n) for n in (7, 14, 21, 35, 63, 126, 252)],
        *[("Qwen2.5-0.5B", "tiled", n) for n in (1, 13, 84, 168, 336)],
    ],
)
@pytest.mark.filterwarnings("error")
def test_for_budget_trains_exactly_the_counts_of_the_papers_figures(name, tying, n_values):
    model = real_model(name)

    config = TinyLoraConfig.for_budget(model, n_values, exact=True, tying=tying)

    assert count_of(model, config) == n_values
    assert config.u == max(1, n_values // MODULES[name]), "u above 1 only where every module has its own already"


@pytest.mark.parametrize("name", REAL)
def test_for_budget_takes_a_transformers_configuration(name):
    config = TinyLoraConfig.for_budget(real_config(name), 13)

    assert count_of(real_model(name), config) == 13
    assert config.u == 1


@pytest.mark.parametrize("n_values", [1, 3, 13, 50, 100, 196, 197, 300, 588, 784])
@pytest.mark.parametrize("tying", ["tiled", "structured"])
@pytest.mark.filterwarnings("ignore:No TinyLoRA configuration")
def test_for_budget_is_the_nearest_with_the_least_tying(n_values, tying):
    model = real_model("Qwen2.5-7B")
    names = resolve_target_modules(model, TinyLoraConfig())
    # By trying everything: nearest first, then the fewest tied modules, then the fewest values in a group; no group has
    # more values than the r * r = 4 directions of each of its modules.
    candidates = []
    for n_tie in range(1, 197):
        sizes = Counter(assign_groups(names, n_tie, tying)).values()
        candidates += [(abs(len(sizes) * u - n_values), n_tie, u) for u in range(1, 4 * min(sizes) + 1)]
    distance, n_tie, u = min(candidates)

    config = TinyLoraConfig.for_budget(model, n_values, tying=tying)

    assert abs(count_of(model, config) - n_values) == distance
    assert config.u == u
    largest = 196 if tying == "tiled" else 28
    assert config.n_tie == ("all" if n_tie == largest else n_tie)


@pytest.mark.parametrize(("n_values", "nearest"), [(785, 784), (1000, 784)])
def test_for_budget_names_the_number_it_took_instead(n_values, nearest):
    model = real_model("Qwen2.5-7B")

    with pytest.warns(
        UserWarning, match=rf"exactly {n_values} values; the nearest, u=\d+ and n_tie=\d+, trains {nearest}\."
    ):
        config = TinyLoraConfig.for_budget(model, n_values)

    assert count_of(model, config) == nearest


@pytest.mark.bad_input("a field of the configuration")
def test_for_budget_refuses_another_number_where_it_has_to_be_exact():
    with pytest.raises(ValueError, match=r"on 196 modules trains exactly 1000 values; the nearest, u=4 and n_tie=1"):
        TinyLoraConfig.for_budget(real_model("Qwen2.5-7B"), 1000, exact=True)


@pytest.mark.bad_input("a field of the configuration")
@pytest.mark.parametrize(("n_values", "error"), [(0, ValueError), (-1, ValueError), (13.0, TypeError)])
def test_for_budget_refuses_a_number_that_is_no_count(n_values, error):
    with pytest.raises(error, match=f"`n_values` must be .*got {n_values}"):
        TinyLoraConfig.for_budget(real_model("Qwen2.5-7B"), n_values)


def test_for_budget_keeps_a_given_u():
    model = real_model("Qwen2.5-7B")

    config = TinyLoraConfig.for_budget(model, 26, u=13)

    assert (config.u, count_of(model, config)) == (13, 26)


@pytest.mark.parametrize(("n_values", "n_tie", "u"), [(26, 16, 2), (140, 15, 10)])
def test_for_budget_keeps_a_given_n_tie(n_values, n_tie, u):
    # 15 leaves a group of one module at the end, with 4 directions for its 10 values: as asked for.
    model = real_model("Qwen2.5-7B")

    config = TinyLoraConfig.for_budget(model, n_values, n_tie=n_tie)

    assert (config.u, config.n_tie, count_of(model, config)) == (u, n_tie, n_values)


def test_for_budget_keeps_n_tie_all():
    config = TinyLoraConfig.for_budget(real_model("Qwen2.5-7B"), 13, n_tie="all")

    assert (config.u, config.n_tie) == (13, "all")


def test_for_budget_with_both_given_says_what_they_make():
    with pytest.warns(UserWarning, match="exactly 14 values; the nearest, u=1 and n_tie=16, trains 13"):
        config = TinyLoraConfig.for_budget(real_model("Qwen2.5-7B"), 14, u=1, n_tie=16)

    assert (config.u, config.n_tie) == (1, 16)


def test_for_budget_passes_the_other_fields_on():
    config = TinyLoraConfig.for_budget(
        real_model("Qwen2.5-7B"),
        8,
        target_modules=["q_proj"],
        layers_to_transform=list(range(8)),
        r=3,
        projection_seed=5,
    )

    assert (config.u, config.n_tie, config.r, config.projection_seed) == (1, 1, 3, 5)
    assert config.target_modules == {"q_proj"}


def test_for_budget_stays_within_the_basis():
    with pytest.warns(UserWarning, match=r"u=4 and n_tie=1, trains 784"):
        config = TinyLoraConfig.for_budget(real_model("Qwen2.5-7B"), 10_000, projection="basis")

    assert config.u == 4


def full_config():
    return TinyLoraConfig(
        r=3,
        u=2,
        n_tie="all",
        tying="structured",
        projection="basis",
        projection_seed=7,
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["model.layers.1.self_attn.q_proj"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        modules_to_save=["lm_head"],
        trainable_token_indices=[3, 4],
        task_type="CAUSAL_LM",
        base_model_name_or_path="some/model",
    )


@pytest.mark.parametrize("loader", [PeftConfig, TinyLoraConfig])
@pytest.mark.parametrize("make", [TinyLoraConfig, full_config])
def test_every_field_survives_the_disk(tmp_path, loader, make):
    config = make()
    config.save_pretrained(tmp_path)

    loaded = loader.from_pretrained(tmp_path)

    assert type(loaded) is TinyLoraConfig
    assert loaded.to_dict() == config.to_dict()
    assert loaded.peft_type is TinyLoraPeftType.TRL_TINYLORA


def test_the_file_names_the_method_in_plain_text(tmp_path):
    full_config().save_pretrained(tmp_path)

    stored = json.loads((tmp_path / "adapter_config.json").read_text())

    assert stored["peft_type"] == "TRL_TINYLORA"
    assert sorted(stored["target_modules"]) == ["q_proj", "v_proj"]


def test_a_configuration_survives_pickle():
    config = full_config()

    copied = pickle.loads(pickle.dumps(config))

    assert copied == config
    assert copied.peft_type is TinyLoraPeftType.TRL_TINYLORA


@pytest.fixture
def saved_adapter(tiny_qwen2, tmp_path):
    get_peft_model(tiny_qwen2(), TinyLoraConfig()).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.bad_input("a field of the configuration")
def test_a_folder_of_another_method_is_refused(tmp_path):
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)

    with pytest.raises(
        ValueError, match=r"holds an adapter of type LORA, not TRL_TINYLORA. Load it with `peft\.PeftModel"
    ):
        TinyLoraConfig.from_pretrained(tmp_path)


@pytest.mark.bad_input("a field of the configuration")
@pytest.mark.parametrize("kept", [0, 5, 30, -1])
def test_a_truncated_weights_file_is_refused(saved_adapter, kept):
    weights = saved_adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:kept])

    with pytest.raises(
        ValueError, match=r"adapter_model.safetensors is no complete safetensors file .*\d+ bytes.*copy it"
    ):
        TinyLoraConfig.from_pretrained(saved_adapter)

    weights.write_bytes(whole)
    assert TinyLoraConfig.from_pretrained(saved_adapter).r == 2


@pytest.mark.bad_input("a field of the configuration")
@pytest.mark.parametrize("kept", [0, 20, -3])
def test_a_truncated_configuration_file_is_refused(saved_adapter, kept):
    stored = saved_adapter / "adapter_config.json"
    stored.write_text(stored.read_text()[:kept])

    with pytest.raises(ValueError, match=r"adapter_config.json is no complete JSON file .*copy it again"):
        TinyLoraConfig.from_pretrained(saved_adapter)


def test_a_meta_model_is_left_as_it_was():
    model = real_model("Qwen2.5-0.5B")
    before = list(model.state_dict())

    TinyLoraConfig.for_budget(model, 13)

    assert list(model.state_dict()) == before
    assert next(model.parameters()).device == torch.device("meta")


def test_a_budget_is_found_for_kinds_that_are_named(tiny_qwen2):
    tying = {"attention": "self_attn", "mlp": "mlp"}
    config = TinyLoraConfig.for_budget(tiny_qwen2(), 26, tying=tying, n_tie="all")
    assert (config.u, config.n_tie, config.tying) == (13, "all", tying)
    # 8 and 6 modules: two groups of each kind without a fixed number of modules.
    config = TinyLoraConfig.for_budget(tiny_qwen2(), 4, tying=tying)
    assert (config.u, config.n_tie) == (1, 4)


def test_kinds_that_are_named_survive_saving_and_loading(tiny_qwen2, tmp_path):
    tying = {"mlp": "mlp", "attention": "self_attn"}
    model = get_peft_model(tiny_qwen2(), TinyLoraConfig(tying=tying, n_tie="all", u=2))
    with torch.no_grad():
        model.base_model.bank.trl_tinylora_v["default"].values_GK.copy_(torch.tensor([[0.1, 0.2], [0.3, -0.4]]))
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    loaded = PeftModel.from_pretrained(tiny_qwen2(), tmp_path)
    assert loaded.peft_config["default"].tying == tying
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    # One that ties in another way is another function.
    fields["tying"]["mlp"], fields["tying"]["attention"] = "self_attn", "mlp"
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="tying"):
        PeftModel.from_pretrained(tiny_qwen2(), tmp_path)
    assert "tied by attention (`self_attn`), mlp (`mlp`)" in (tmp_path / "README.md").read_text()
