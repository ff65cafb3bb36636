"""Groups and counts against the numbers that the paper's figures name. Pure Python, exact."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_tinylora import TinyLoraConfig
from trl_tinylora.maths.tying import assign_groups, count_groups, kinds_of, module_type
from trl_tinylora.tuner.targets import resolve_target_modules


LAYERS = {"Qwen2.5-0.5B": 24, "Qwen2.5-1.5B": 28, "Qwen2.5-3B": 36, "Qwen2.5-7B": 28, "Llama-3.2-3B": 28}
TYPES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def names_of(model):
    return [f"model.layers.{depth}.{kind}" for depth in range(LAYERS[model]) for kind in TYPES]


def depth_of(name):
    return int(name.split(".")[2])


def members_by_group(names, groups):
    members = [[] for _ in range(max(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        members[group].append(name)
    return members


@pytest.mark.parametrize(
    ("model", "tying", "counts"),
    [
        ("Qwen2.5-7B", "tiled", {256: 1, 128: 2, 64: 4, 32: 7, 16: 13, 8: 25, 4: 49, 2: 98, 1: 196}),
        ("Llama-3.2-3B", "tiled", {256: 1, 128: 2, 64: 4, 32: 7, 16: 13, 8: 25, 4: 49, 2: 98, 1: 196}),
        ("Qwen2.5-1.5B", "tiled", {196: 1, 195: 2, 16: 13, 15: 14, 1: 196}),
        ("Qwen2.5-3B", "tiled", {16: 16, 4: 63, 1: 252}),
        ("Qwen2.5-0.5B", "tiled", {168: 1, 167: 2, 16: 11, 13: 13, 12: 14, 1: 168}),
        ("Qwen2.5-3B", "structured", {36: 7, 35: 14, 32: 14, 16: 21, 8: 35, 4: 63, 2: 126, 1: 252}),
        ("Qwen2.5-7B", "structured", {28: 7, 16: 14, 8: 28, 4: 49, 2: 98, 1: 196}),
        ("Qwen2.5-0.5B", "structured", {24: 7, 16: 14, 8: 21, 4: 42, 2: 84, 1: 168}),
    ],
)
def test_the_number_of_groups_is_the_papers(model, tying, counts):
    names = names_of(model)

    assert {n_tie: count_groups(names, n_tie, tying) for n_tie in counts} == counts


def test_two_values_a_module_on_252_modules_are_504():
    assert count_groups(names_of("Qwen2.5-3B"), 1, "tiled") * 2 == 504


@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.parametrize("tying", ["tiled", "structured"])
@pytest.mark.parametrize("n_tie", [1, 2, 3, 5, 16, 1000, "all"])
def test_every_group_is_taken_and_no_larger_than_n_tie(model, tying, n_tie):
    names = names_of(model)

    members = members_by_group(names, assign_groups(names, n_tie, tying))

    assert len(members) == count_groups(names, n_tie, tying)
    assert all(members)
    if n_tie != "all":
        assert max(map(len, members)) <= n_tie


@pytest.mark.parametrize("n_tie", [3, 16, 64])
def test_tiled_groups_are_consecutive_modules_whatever_their_type(n_tie):
    names = names_of("Qwen2.5-7B")

    groups = assign_groups(names, n_tie, "tiled")

    assert groups == [position // n_tie for position in range(len(names))]
    assert any(len({module_type(name) for name in group}) > 1 for group in members_by_group(names, groups))


@pytest.mark.parametrize("n_tie", [2, 3, 16])
def test_structured_groups_hold_one_type_at_consecutive_depths(n_tie):
    names = names_of("Qwen2.5-3B")

    members = members_by_group(names, assign_groups(names, n_tie, "structured"))

    for group in members:
        assert len({module_type(name) for name in group}) == 1
        depths = [depth_of(name) for name in group]
        assert depths == list(range(depths[0], depths[0] + len(depths)))
        assert depths[0] % n_tie == 0


def test_structured_groups_leave_the_remainder_to_the_last_group_of_each_type():
    names = names_of("Qwen2.5-3B")

    members = members_by_group(names, assign_groups(names, 32, "structured"))

    assert [len(group) for group in members] == [32, 4] * 7


def test_depth_ten_follows_depth_nine_in_a_model(tiny_qwen2):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_qwen2(num_hidden_layers=12).config)

    names = resolve_target_modules(model, TinyLoraConfig())

    assert [depth_of(name) for name in names] == [depth for depth in range(12) for _ in TYPES]
    assert names != sorted(names), "text order would be the same here: the model is too shallow to tell"
    for group in members_by_group(names, assign_groups(names, 3, "structured")):
        assert [depth_of(name) for name in group] == list(range(depth_of(group[0]), depth_of(group[0]) + 3))


def test_all_ties_every_module_or_every_module_of_a_type():
    names = names_of("Qwen2.5-3B")

    assert assign_groups(names, "all", "tiled") == [0] * 252
    assert assign_groups(names, "all", "structured") == list(range(7)) * 36


def test_structured_types_may_be_of_different_sizes():
    names = ["blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.2.a"]

    assert assign_groups(names, 2, "structured") == [0, 2, 0, 1]
    assert assign_groups(names, "all", "structured") == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.*.mlp.up_proj"),
        ("model.layers.31.mlp.up_proj", "model.layers.*.mlp.up_proj"),
        ("model.layers.3.experts.5.w1", "model.layers.*.experts.5.w1"),
        ("transformer.h.0.attn.c_attn", "transformer.h.*.attn.c_attn"),
        ("proj_2", "proj_2"),
    ],
)
def test_the_first_number_of_a_name_is_its_depth(name, expected):
    assert module_type(name) == expected


ATTENTION_AND_MLP = {"attention": "self_attn", "mlp": "mlp"}


def test_expressions_tie_by_part_of_the_block_whatever_their_order():
    names = names_of("Qwen2.5-7B")
    groups = assign_groups(names, "all", ATTENTION_AND_MLP)
    assert groups == [int("mlp" in name) for name in names]
    # A saved configuration holds its keys in the order of the alphabet.
    assert assign_groups(names, "all", dict(reversed(ATTENTION_AND_MLP.items()))) == groups
    assert count_groups(names, 16, ATTENTION_AND_MLP) == 7 + 6


def test_tying_by_the_names_of_all_types_is_structured_tying():
    names = names_of("Qwen2.5-0.5B")
    by_type = {kind: rf"\.{kind.replace('.', '[.]')}$" for kind in TYPES}
    for n_tie in (1, 5, "all"):
        assert assign_groups(names, n_tie, by_type) == assign_groups(names, n_tie, "structured")


@pytest.mark.bad_input("a model or a configuration that does not fit")
@pytest.mark.parametrize(
    ("tying", "words"),
    [
        ({"attention": "self_attn"}, r"for 72: model.layers.0.mlp.gate_proj \(none\)"),
        ({"all": "layers", "mlp": "mlp"}, r"for 72: model.layers.0.mlp.gate_proj \(all and mlp\)"),
        ({"typo": "atention"}, "for 168: .*, ...\\. Change the expressions"),
    ],
)
def test_expressions_that_find_a_module_not_exactly_once_are_refused_with_the_modules(tying, words):
    with pytest.raises(ValueError, match=words):
        kinds_of(names_of("Qwen2.5-0.5B"), tying)
