"""
An adapter trained on quantised weights used on full-precision ones, and the other way round.

On the toy's base, whose weights are those of a trained model. CPU, seconds; skipped where a library is not installed.
"""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from plain_autograd import set_values, values_of
from quantisations import quantisation
from tiny import layers_of
from transformers import AutoModelForCausalLM

from trl_tinylora import TinyLoraConfig, export_lora


TOY = Path(__file__).parents[3] / "recipes" / "toy" / "base"
IDS = torch.arange(5, 25)[None]
# Of the weights, as a fraction of their size, and of the updates where the folder settles the signs. Measured: 9.0e-2
# and 8.7e-2 with 4 bits, 6.2e-3 and 6.0e-3 with 8.
DISTANCES = {"nf4": (0.05, 0.12), "8 bits": (0.004, 0.01)}


def load(kind=None, dtype=torch.float32, folder=TOY):
    options = {} if kind is None else {"quantization_config": quantisation(kind)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def saved(folder, kind=None, dtype=torch.float32):
    """An adapter of drawn values, saved on one base; returns its model."""
    model = get_peft_model(load(kind, dtype), TinyLoraConfig(task_type="CAUSAL_LM"))
    set_values(model)
    model.save_pretrained(folder)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def difference_of_updates(first, second):
    """Root mean square over the modules, as a fraction of the update."""
    pairs = zip(layers_of(first), layers_of(second), strict=True)
    updates = [(one.get_delta_weight("default"), other.get_delta_weight("default")) for one, other in pairs]
    return torch.stack([((a - b).norm() / a.norm()) ** 2 for a, b in updates]).mean().sqrt().item()


@pytest.mark.parametrize("kind", ["nf4", "8 bits"])
def test_an_adapter_is_loaded_on_its_own_quantised_base(tmp_path, kind):
    expected = logits(saved(tmp_path, kind))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.testing.assert_close(logits(PeftModel.from_pretrained(load(kind), tmp_path)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind, distance", [("nf4", "2.2e-02"), ("8 bits", "4.6e-03")])
def test_what_is_quantised_from_rounded_weights_is_another_base(tmp_path, kind, distance):
    saved(tmp_path / "adapter", kind)
    # A code next to the middle of two falls to the other one.
    with pytest.raises(
        ValueError, match=f"by {distance} of their size.*quantised in the same way and from the same dtype"
    ):
        PeftModel.from_pretrained(load(kind, torch.bfloat16), tmp_path / "adapter")
    # Weights that are kept in bfloat16 are quantised alike in either dtype.
    load(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = get_peft_model(load(kind, torch.bfloat16, tmp_path / "base"), TinyLoraConfig())
    model.save_pretrained(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(load(kind, torch.float32, tmp_path / "base"), tmp_path / "again")


@pytest.mark.parametrize("there", ["nf4", "8 bits"])
@pytest.mark.parametrize("is_trained_quantised", [True, False])
def test_other_weights_are_refused_and_taken_by_one_argument(tmp_path, there, is_trained_quantised):
    own, other = (there, None) if is_trained_quantised else (None, there)
    trained, base = saved(tmp_path, own), load(other)
    with pytest.raises(
        ValueError, match="not the base model of the adapter.*a quantised.*export_lora.*other_base=True"
    ):
        PeftModel.from_pretrained(base, tmp_path)
    assert layers_of(base) == []
    with pytest.warns(UserWarning, match=r"another base than its own: the weights of .* by \d\.\de-0\d of") as caught:
        moved = PeftModel.from_pretrained(base, tmp_path, other_base=True)
    (message,) = (str(warning.message) for warning in caught if "another base" in str(warning.message))
    assert torch.equal(values_of(moved), values_of(trained))
    stated = float(message.partition(": by ")[2].partition(" of")[0])
    low, high = DISTANCES[there]
    assert low < stated < high
    # Trained on quantised weights, the folder settles the signs of all vectors.
    assert ("28 modules the folder does not settle signs" in message) == (not is_trained_quantised)
    if is_trained_quantised:
        assert low / 2 < difference_of_updates(trained, moved) < high


def test_the_factors_are_those_of_the_weights_that_the_adapter_is_used_on(tmp_path):
    saved(tmp_path, "8 bits")
    with pytest.warns(UserWarning, match="another base"):
        moved = PeftModel.from_pretrained(load(), tmp_path, other_base=True)
    for layer in layers_of(moved):
        (left_OR, right_RI), weight_OI = layer.factors_of(moved.base_model.bank.plans[0]), layer.unmerged_weight()
        torch.testing.assert_close(weight_OI @ right_RI.T, left_OR, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(right_RI @ right_RI.T, torch.eye(2), rtol=0, atol=1e-5)
        # The leading singular vectors' own space.
        top = torch.linalg.svd(weight_OI)[2][:2]
        assert torch.linalg.svdvals(right_RI @ top.T).min() > 1 - 1e-5


def test_without_the_settled_signs_an_update_on_other_weights_is_another_one(tmp_path):
    trained = saved(tmp_path, "nf4")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(fields["singular_bases"]) == 28
    config = TinyLoraConfig.from_pretrained(tmp_path, other_base=True)
    config.singular_bases = {}
    with pytest.warns(UserWarning, match="28 modules the folder does not settle signs"):
        moved = PeftModel.from_pretrained(load(), tmp_path, config=config)
    # Five of 56 pairs of vectors turn over.
    assert difference_of_updates(trained, moved) > 0.3


def test_saved_again_it_is_an_adapter_of_the_other_base(tmp_path):
    saved(tmp_path, "nf4")
    with pytest.warns(UserWarning, match="another base"):
        moved = PeftModel.from_pretrained(load(), tmp_path, other_base=True)
    moved.save_pretrained(tmp_path / "again")
    assert "other_base" not in (tmp_path / "again" / "adapter_config.json").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = PeftModel.from_pretrained(load(), tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(moved.eval()), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="not the base model"):
        PeftModel.from_pretrained(load("nf4"), tmp_path / "again")


def test_the_argument_takes_no_model_of_other_modules(tmp_path, make_model):
    saved(tmp_path, "nf4")
    with pytest.raises(ValueError, match="trained on 28 modules, and its configuration matches 14 here"):
        PeftModel.from_pretrained(make_model(), tmp_path, other_base=True)


def test_on_its_own_base_the_argument_says_nothing(tmp_path):
    saved(tmp_path, "nf4")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(load("nf4"), tmp_path, other_base=True)


@pytest.mark.parametrize("kind", ["nf4", "8 bits", "torchao int8"])
def test_the_lora_written_on_a_quantised_base_is_its_update(tmp_path, kind):
    model = saved(tmp_path / "own", kind)
    expected = logits(model)
    export_lora(model, tmp_path / "lora")
    served = PeftModel.from_pretrained(load(kind), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(served), expected, rtol=1e-3, atol=1e-3)
    # On full-precision weights it adds the very same update.
    served = PeftModel.from_pretrained(load(), tmp_path / "lora").base_model
    for layer in layers_of(model):
        found = served.get_submodule(f"model.{layer.name}").get_delta_weight("default")
        torch.testing.assert_close(found, layer.get_delta_weight("default"), rtol=1e-4, atol=1e-5)
