"""Every base of docs/bases.md is trained, loaded, exported and merged, or refused, as its table says. CPU, seconds."""

import pytest
import torch
from bases import BASES, tokens
from peft import PeftModel, get_peft_model
from plain_autograd import values_of
from tiny import layers_of

from trl_tinylora import TinyLoraConfig, export_lora


KINDS = {f"{row.base.split(',')[0]}: {kind}": (row, kind) for row in BASES for kind in row.kinds}
# What is refused altogether has one cell.
CELLS = [
    (name, column)
    for name, (row, _) in KINDS.items()
    for column, says in row.cells.items()
    if says and column != "base"
]
ON_DISK = "with layers that accelerate keeps on the disk"
# Of the loss: roundings of the dtype's.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}

pytestmark = pytest.mark.filterwarnings("ignore:target_modules", "ignore:2 linear layers have fewer")


@pytest.fixture
def make(base_folder, tmp_path_factory):
    """Makes the base of a kind, every time the same."""
    return lambda name: KINDS[name][0].kinds[KINDS[name][1]](base_folder, tmp_path_factory.mktemp("made"))


def config_of(name):
    return TinyLoraConfig(**{"n_tie": 4, "u": 2, **KINDS[name][0].fields})


def loss_of(model, name):
    row, kind = KINDS[name]
    inputs = row.inputs.get(kind, tokens)(next(p.dtype for p in model.parameters() if p.is_floating_point()))
    return model(**inputs).loss.double()


def without_gradient(model, name):
    with torch.no_grad():
        return loss_of(model.eval(), name)


def close(found, expected, model):
    dtype = next(p.dtype for p in model.get_base_model().parameters() if p.is_floating_point())
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.fixture
def trained(make):
    """A model with an adapter that a few steps have taken away from zero."""

    def train(name):
        model = get_peft_model(make(name), config_of(name)).train()
        optimizer = torch.optim.AdamW([values_of(model)], lr=0.05, weight_decay=0.0)
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model, name).backward()
            optimizer.step()
        return model

    return train


def train_it(name, trained, make, tmp_path):
    model = trained(name)
    before, after = without_gradient(make(name), name), without_gradient(model, name)
    assert after < before - 1e-3
    assert values_of(model).dtype == torch.float32 and values_of(model).grad.abs().max() > 0
    with model.disable_adapter():
        assert torch.equal(without_gradient(model, name), before)


def load_it(name, trained, make, tmp_path):
    model = trained(name)
    model.save_pretrained(tmp_path)
    loaded = make(name)
    if name.startswith(ON_DISK):
        # PEFT takes accelerate's hooks off such a model, and transformers does not.
        loaded.load_adapter(str(tmp_path))
    else:
        loaded = PeftModel.from_pretrained(loaded, tmp_path)
        assert torch.equal(values_of(loaded), values_of(model))
    assert torch.equal(without_gradient(loaded, name), without_gradient(model, name))


def export_it(name, trained, make, tmp_path):
    model = trained(name)
    export_lora(model, tmp_path)
    # PEFT's LoRA does not run on a base with layers on the disk.
    base = make("in float64: float32" if name.startswith(ON_DISK) else name)
    lora = PeftModel.from_pretrained(base, tmp_path)
    close(without_gradient(lora, name), without_gradient(model, name), model)


def merge_it(name, trained, make, tmp_path):
    model = trained(name)
    expected, before = without_gradient(model, name), without_gradient(make(name), name)
    model.merge_adapter()
    assert all(layer.merged for layer in layers_of(model))
    close(without_gradient(model, name), expected, model)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(without_gradient(model, name), before)


COLUMNS = {"trained": train_it, "loaded": load_it, "exported": export_it, "merged": merge_it}


@pytest.mark.parametrize(("name", "column"), CELLS)
def test_a_base_does_what_the_table_says(name, column, trained, make, tmp_path):
    says = KINDS[name][0].cells[column]
    if says.startswith("yes"):
        COLUMNS[column](name, trained, make, tmp_path)
    else:
        assert says.startswith("refused")
        model = make(name)
        with pytest.raises((ValueError, NotImplementedError), match="`|docs/bases.md"):
            COLUMNS[column](name, trained, lambda name: model, tmp_path)
        assert column != "trained" or layers_of(model) == []


def test_a_wrong_cell_would_be_found(trained, make, tmp_path):
    name = "bitsandbytes 8 bits (`load_in_8bit=True`): 8 bits"
    with pytest.raises(NotImplementedError):
        COLUMNS["merged"](name, trained, make, tmp_path)
