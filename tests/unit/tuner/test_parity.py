"""
A reference in float64 NumPy, written from the paper's formula, against the tuner on whole models.

    W' = W + U S (sum_k v_k P_k) V^T      v in R^u, shared by n_tie modules; S on the U side

Nothing of `trl_tinylora` is used to compute an expected value. CPU; one test starts a fresh process.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers.pytorch_utils import Conv1D

from trl_tinylora import TinyLoraConfig


# Every variant is named by what it asks for; module order and grouping are worked out again below.
VARIANTS = {
    "one value a module": {},
    "thirteen of the fourteen": {"n_tie": 1, "exclude_modules": ["model.layers.1.mlp.down_proj"]},
    "tied by 3": {"n_tie": 3, "u": 2},
    "tied by 4, structured": {"n_tie": 4, "u": 3, "tying": "structured"},
    "structured, one vector a type": {"n_tie": "all", "tying": "structured"},
    "attention and MLP, one vector each": {"n_tie": "all", "u": 3, "tying": {"mlp": "mlp", "attention": "self_attn"}},
    "attention and MLP, tied by 3": {"n_tie": 3, "u": 2, "tying": {"attention": r"\.self_attn\.", "rest": r"\.mlp\."}},
    "all tied": {"n_tie": "all", "u": 5},
    "rank 1": {"r": 1, "n_tie": 2},
    "rank 3": {"r": 3, "u": 4, "n_tie": 5},
    "rank 4": {"r": 4, "u": 7},
    "another seed": {"projection_seed": 12345, "n_tie": 2},
    "LoRA-XS": {"projection": "basis", "u": 4},
    "LoRA-XS rank 3, tied": {"projection": "basis", "r": 3, "u": 9, "n_tie": 2},
    "queries of one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1], "u": 2},
}
variants = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
QWEN_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Reference:
    """The adapter in float64 NumPy, of a plain model and the fields of its configuration."""

    def __init__(self, model, **fields):
        self.r, self.u = fields.get("r", 2), fields.get("u", 1)
        self.seed, self.is_basis = fields.get("projection_seed", 0), fields.get("projection") == "basis"
        linear = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D)) and name != "lm_head"
        }
        if "target_modules" in fields:
            linear = {n: m for n, m in linear.items() if n.split(".")[-1] in fields["target_modules"]}
        if "layers_to_transform" in fields:
            linear = {n: m for n, m in linear.items() if self.depth(n) in fields["layers_to_transform"]}
        linear = {n: m for n, m in linear.items() if n not in fields.get("exclude_modules", [])}
        self.is_transposed = {name: isinstance(module, Conv1D) for name, module in linear.items()}
        self.names = list(linear)
        self.weights = {
            name: (module.weight.T if self.is_transposed[name] else module.weight).detach().double().numpy().copy()
            for name, module in linear.items()
        }
        self.groups = self.tie(fields.get("n_tie", 1), fields.get("tying", "tiled"))
        self.n_groups = len(set(self.groups.values()))

    @staticmethod
    def depth(name):
        return next(int(part) for part in name.split(".") if part.isdigit())

    def tie(self, n_tie, tying):
        """Neighbours in depth order share; structured, those of one type; by expressions, those of one part."""
        if tying == "tiled":
            runs = [self.names]
        elif isinstance(tying, dict):
            # In depth order attention comes first, whatever the mapping's order.
            runs = [[n for n in self.names if part in n] for part in ("self_attn", "mlp")]
        else:
            types = list(dict.fromkeys(name.replace(f".{self.depth(name)}.", ".") for name in self.names))
            runs = [[n for n in self.names if n.replace(f".{self.depth(n)}.", ".") == kind] for kind in types]
        groups, count = {}, 0
        for run in runs:
            size = len(run) if n_tie == "all" else n_tie
            for start in range(0, len(run), size):
                for name in run[start : start + size]:
                    groups[name] = count
                count += 1
        return groups

    def factors(self, name):
        left, sigma, right = np.linalg.svd(self.weights[name], full_matrices=False)
        left, sigma, right = left[:, : self.r], sigma[: self.r], right[: self.r]
        for k in range(self.r):
            sign = 1 if left[np.abs(left[:, k]).argmax(), k] > 0 else -1
            left[:, k], right[k] = sign * left[:, k], sign * right[k]
        return left @ np.diag(sigma), right

    def projections(self, name):
        if self.is_basis:
            matrices = np.zeros((self.u, self.r, self.r))
            for k in range(self.u):
                matrices[k, k // self.r, k % self.r] = 1
            return matrices
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 32, 4)]
        drawn = np.random.RandomState(words).standard_normal((self.u, self.r, self.r)) / self.r**0.5
        # The matrices are constants of the method in float32.
        return drawn.astype(np.float32).astype(np.float64)

    def delta(self, name, values):
        left, right = self.factors(name)
        mixing = sum(v * p for v, p in zip(values[self.groups[name]], self.projections(name), strict=True))
        return left @ mixing @ right

    def adapted(self, values):
        return {name: self.weights[name] + self.delta(name, values) for name in self.names}

    def gradient(self, weight_grads):
        """dL/dv_k = sum over the modules of the group of <U S P_k V^T, dL/dW'>."""
        grads = np.zeros((self.n_groups, self.u))
        for name in self.names:
            left, right = self.factors(name)
            for k, matrix in enumerate(self.projections(name)):
                grads[self.groups[name], k] += ((left @ matrix @ right) * weight_grads[name]).sum()
        return grads

    def put_into(self, model, values):
        """Gives a plain model the adapted weights; returns it."""
        with torch.no_grad():
            for name, weight in self.adapted(values).items():
                parameter = model.get_submodule(name).weight
                parameter.copy_(torch.from_numpy(weight.T if self.is_transposed[name] else weight))
        return model


def values_of(model):
    (values,) = (p for name, p in model.named_parameters() if name.endswith("default.lora_magnitude_vector"))
    return values


def drawn_values(shape, seed=0):
    # Rounded to float32, in which a checkpoint is loaded, so that a rounded value is no part of any difference.
    return (np.random.RandomState(seed).standard_normal(shape) * 0.5).astype(np.float32).astype(np.float64)


def make_pair(base, fields, dtype=torch.float64):
    """An adapted model whose values are drawn, its reference, and these values as float64 NumPy."""
    reference = Reference(base, **fields)
    model = get_peft_model(base.to(dtype), TinyLoraConfig(**fields))
    if dtype == torch.float64:
        model.double()
    values = drawn_values((reference.n_groups, reference.u))
    with torch.no_grad():
        values_of(model).copy_(torch.from_numpy(values))
    return model, reference, values_of(model).detach().double().numpy()


@variants
def test_the_number_of_trained_values_is_the_references(tiny_qwen2, fields):
    model, reference, _ = make_pair(tiny_qwen2(), fields)

    assert model.get_nb_trainable_parameters()[0] == reference.n_groups * reference.u
    assert tuple(values_of(model).shape) == (reference.n_groups, reference.u)


@variants
def test_forward_equals_the_formula(tiny_qwen2, token_ids, fields):
    model, reference, values = make_pair(tiny_qwen2(), fields)
    plain = tiny_qwen2().double()

    logits = model(input_ids=token_ids).logits

    untouched = plain(input_ids=token_ids).logits
    expected = reference.put_into(plain, values)(input_ids=token_ids).logits
    # float64 throughout; the two orders of summation differ by some 1e-15 of logits of the order of ten.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)
    # Negative control: the adapter does something that this tolerance sees.
    assert (untouched - expected).abs().max() > 1e-3


@variants
def test_gradient_of_v_equals_the_chain_rule(tiny_qwen2, token_ids, fields):
    model, reference, values = make_pair(tiny_qwen2(), fields)
    plain = reference.put_into(tiny_qwen2().double(), values)

    model(input_ids=token_ids, labels=token_ids).loss.backward()
    plain(input_ids=token_ids, labels=token_ids).loss.backward()

    expected = reference.gradient({n: plain.get_submodule(n).weight.grad.numpy() for n in reference.names})
    # Relative to the largest component: a sum over modules cancels, its terms do not get more exact by that.
    np.testing.assert_allclose(values_of(model).grad, expected, rtol=0, atol=1e-11 * np.abs(expected).max())
    assert np.abs(expected).min() > 0


def test_each_row_of_a_mixed_batch_equals_the_formula(tiny_qwen2):
    token_ids = torch.randint(3, 64, (len(VARIANTS) + 1, 9), generator=torch.Generator().manual_seed(1))
    model, expected = None, []
    for row, (name, fields) in enumerate(VARIANTS.items()):
        reference = Reference(tiny_qwen2(), **fields)
        name = name.replace(".", "")
        if model is None:
            model = get_peft_model(tiny_qwen2().double(), TinyLoraConfig(**fields), adapter_name=name)
        else:
            model.add_adapter(name, TinyLoraConfig(**fields))
        values = drawn_values((reference.n_groups, reference.u), seed=row)
        with torch.no_grad():
            model.base_model.bank.trl_tinylora_v[name].values_GK.copy_(torch.from_numpy(values))
        plain = reference.put_into(tiny_qwen2().double(), values)
        expected.append(plain(input_ids=token_ids[row : row + 1]).logits)
    expected.append(tiny_qwen2().double()(input_ids=token_ids[-1:]).logits)

    mixed = model.eval()(input_ids=token_ids, adapter_names=[*model.peft_config, "__base__"]).logits

    # R is summed in float32, in which the values are kept: 1e-7 of updates of the order of ten, through two layers.
    torch.testing.assert_close(mixed, torch.cat(expected), rtol=0, atol=1e-4)
    # Negative control: each row's adapter does something that this tolerance sees.
    untouched = tiny_qwen2().double()(input_ids=token_ids).logits
    assert (mixed - untouched).abs().amax(dim=(1, 2))[:-1].min() > 1e-2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("fields", [{"n_tie": 3, "u": 2}, {"tying": "structured", "n_tie": "all", "u": 2}])
def test_other_architectures_equal_the_formula(tiny_model, token_ids, kind, fields):
    # GPT-2 keeps its weights transposed, in `Conv1D`.
    model, reference, values = make_pair(tiny_model(kind), fields)
    plain = reference.put_into(tiny_model(kind).double(), values)

    output, expected = (m(input_ids=token_ids, labels=token_ids) for m in (model, plain))
    output.loss.backward()
    expected.loss.backward()

    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-11)
    weight_grads = {n: plain.get_submodule(n).weight.grad.numpy() for n in reference.names}
    expected_grad = reference.gradient({n: g.T if reference.is_transposed[n] else g for n, g in weight_grads.items()})
    np.testing.assert_allclose(values_of(model).grad, expected_grad, rtol=0, atol=1e-11 * np.abs(expected_grad).max())
    model.merge_adapter()
    for name, weight in reference.adapted(values).items():
        merged = model.get_submodule(f"base_model.model.{name}.base_layer").weight.detach().numpy()
        np.testing.assert_allclose(merged.T if reference.is_transposed[name] else merged, weight, rtol=0, atol=1e-12)


@variants
def test_merged_weights_equal_the_formula(tiny_qwen2, fields):
    model, reference, values = make_pair(tiny_qwen2(), fields)

    model.merge_adapter()

    for name, weight in reference.adapted(values).items():
        merged = model.get_submodule(f"base_model.model.{name}.base_layer").weight
        np.testing.assert_allclose(merged.detach(), weight, rtol=0, atol=1e-12)


@variants
def test_merge_and_unload_equals_the_formula(tiny_qwen2, token_ids, fields):
    model, reference, values = make_pair(tiny_qwen2(), fields)

    merged = model.merge_and_unload()

    expected = reference.put_into(tiny_qwen2().double(), values)
    assert list(merged.state_dict()) == list(expected.state_dict())
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        merged(input_ids=token_ids).logits, expected(input_ids=token_ids).logits, rtol=0, atol=1e-11
    )


@variants
def test_float32_forward_gradient_and_merge_are_within_float32_of_the_formula(tiny_qwen2, token_ids, fields):
    model, reference, values = make_pair(tiny_qwen2(), fields, torch.float32)
    plain = reference.put_into(tiny_qwen2().double(), values)

    output, expected = (m(input_ids=token_ids, labels=token_ids) for m in (model, plain))
    output.loss.backward()
    expected.loss.backward()

    # float32 has 6e-8 of relative rounding; two layers amplify it, logits are of the order of ten.
    torch.testing.assert_close(output.logits.double(), expected.logits, rtol=0, atol=2e-4)
    expected_grad = reference.gradient({n: plain.get_submodule(n).weight.grad.numpy() for n in reference.names})
    np.testing.assert_allclose(values_of(model).grad, expected_grad, rtol=0, atol=1e-4 * np.abs(expected_grad).max())
    model.merge_adapter()
    for name, weight in reference.adapted(values).items():
        merged = model.get_submodule(f"base_model.model.{name}.base_layer").weight
        assert merged.dtype == torch.float32
        np.testing.assert_allclose(merged.detach(), weight, rtol=0, atol=1e-5)


def round_to_bfloat16(array):
    """float32 -> the nearest bfloat16, ties to even, in integer arithmetic on the bits."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


@variants
def test_a_bfloat16_merge_is_the_float32_sum_rounded_once(tiny_qwen2, fields):
    model, reference, values = make_pair(tiny_qwen2().bfloat16(), fields, torch.bfloat16)
    layers = {name: model.get_submodule(f"base_model.model.{name}") for name in reference.names}
    sums = {
        name: reference.weights[name].astype(np.float32) + layer.get_delta_weight("default").numpy()
        for name, layer in layers.items()
    }

    model.merge_adapter()

    changed = 0
    for name, layer in layers.items():
        merged = layer.base_layer.weight.detach()
        assert merged.dtype == torch.bfloat16
        assert np.array_equal(merged.float().numpy(), round_to_bfloat16(sums[name])), name
        # The float32 sum itself is that of the formula, to float32.
        np.testing.assert_allclose(sums[name], reference.adapted(values)[name], rtol=0, atol=1e-5)
        changed += int((merged.float().numpy() != reference.weights[name]).sum())
    assert changed > 0


def test_a_bfloat16_merge_is_not_the_sum_of_rounded_terms(tiny_qwen2):
    # Negative control of the test above: rounding the update before adding it gives other bits.
    model, reference, _ = make_pair(tiny_qwen2().bfloat16(), {}, torch.bfloat16)
    differs = 0
    for name in reference.names:
        delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default").numpy()
        weight = reference.weights[name].astype(np.float32)
        differs += int(
            (round_to_bfloat16(weight + round_to_bfloat16(delta)) != round_to_bfloat16(weight + delta)).sum()
        )

    assert differs > 0


LOAD_IN_A_FRESH_PROCESS = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
import trl_tinylora

folder = sys.argv[1]
outputs = []
for number in range(int(sys.argv[2])):
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float64)
    model = PeftModel.from_pretrained(base, f"{folder}/{number}").eval()
    logits = model(input_ids=torch.load(f"{folder}/ids.pt")).logits
    outputs.append((logits.detach(), model.merge_and_unload().state_dict()))
torch.save(outputs, f"{folder}/outputs.pt")
"""


def test_a_saved_adapter_is_the_formula_in_a_fresh_process(tiny_qwen2, token_ids, tmp_path):
    base = tiny_qwen2().double()
    base.save_pretrained(tmp_path / "base")
    torch.save(token_ids, tmp_path / "ids.pt")
    expected = []
    for number, fields in enumerate(VARIANTS.values()):
        model, reference, values = make_pair(tiny_qwen2().double(), fields)
        model.save_pretrained(tmp_path / str(number))
        plain = reference.put_into(tiny_qwen2().double(), values)
        expected.append((plain(input_ids=token_ids).logits, plain.state_dict()))
        del model

    root = Path(__file__).parents[3]
    subprocess.run(
        [sys.executable, "-c", LOAD_IN_A_FRESH_PROCESS, str(tmp_path), str(len(VARIANTS))],
        check=True,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        timeout=600,
    )

    outputs = torch.load(tmp_path / "outputs.pt")
    assert len(outputs) == len(expected) == len(VARIANTS)
    for (logits, weights), (expected_logits, expected_weights) in zip(outputs, expected, strict=True):
        # R = sum v P is summed in float32 where v is float32 (6e-8); everything else is float64.
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)
        for name, weight in expected_weights.items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-6)
    # Negative control: another variant's logits are outside that tolerance.
    assert (outputs[0][0] - expected[2][0]).abs().max() > 1e-2
