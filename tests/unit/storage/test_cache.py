"""Singular vectors on disk: found again by content, never stale, never needed. CPU, seconds."""

import os
import subprocess
import sys

import pytest
import torch
from harness import peak_bytes

from trl_tinylora.maths.decomposition import truncated_svd
from trl_tinylora.storage import cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_TINYLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def computed(monkeypatch):
    """Counts the SVDs that are really computed."""
    calls = []

    def counting(weight, rank):
        calls.append(rank)
        return truncated_svd(weight, rank)

    monkeypatch.setattr(cache, "truncated_svd", counting)
    return calls


def weight(rows=300, columns=280, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def same(first, second):
    return torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]) and first[2] == second[2]


def test_a_second_time_costs_no_svd_and_gives_the_same_bits(folder, computed):
    first, second = cache.cached_svd(weight(), 2), cache.cached_svd(weight(), 2)
    assert computed == [2] and same(first, second) and same(first, truncated_svd(weight(), 2))
    assert len(list(folder.iterdir())) == 1


def test_another_rank_dtype_or_a_single_changed_bit_is_another_entry(folder, computed):
    cache.cached_svd(weight(), 2)
    changed = weight()
    changed[7, 11] += 1e-6 * changed[7, 11].abs().clamp_min(1e-3)
    for other, rank in ((weight(), 3), (weight().double(), 2), (weight().bfloat16(), 2), (changed, 2)):
        cache.cached_svd(other, rank)
    assert computed == [2, 3, 2, 2, 2]


def test_permuted_and_transposed_weights_have_other_keys():
    original = weight(300, 300)
    others = [
        original,
        original.T,
        original.flip(0),
        original.flip(1),
        original[torch.randperm(300, generator=torch.Generator().manual_seed(1))],
        original + 0.0 * original.roll(1, 0) + 1e-7,
        -original,
        torch.zeros(300, 300),
        torch.zeros(300, 301),
        torch.zeros(301, 300),
    ]
    assert len({cache.content_key(other) for other in others}) == len(others)
    assert cache.content_key(original.T) == cache.content_key(original.T.contiguous())


def test_a_key_does_not_depend_on_the_size_of_the_pieces(monkeypatch):
    whole = cache.content_key(weight())
    monkeypatch.setattr(cache, "_LARGEST_CHUNK", 1000)
    assert cache.content_key(weight()) == whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [280, 281, 282])
def test_every_entry_is_in_the_key_whatever_the_width(dtype, columns):
    original = weight(8, columns).to(dtype)
    keys = {cache.content_key(original)}
    for column in range(columns):
        changed = original.clone()
        changed[column % 8, column] *= -1
        keys.add(cache.content_key(changed))
    assert len(keys) == columns + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_two_signs_of_a_row_do_not_cancel_out_in_a_key(dtype):
    original = weight(8, 280).to(dtype)
    keys = {cache.content_key(original)}
    for column in range(1, 280):
        changed = original.clone()
        changed[3, [0, column]] *= -1
        keys.add(cache.content_key(changed))
    assert len(keys) == 280


def test_a_key_needs_little_beside_the_weight():
    large = weight(512, 3584).bfloat16()
    assert peak_bytes(lambda: cache.content_key(large)) < 0.05 * large.nbytes


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty"])
def test_a_damaged_entry_is_computed_again_and_mended(folder, computed, damage):
    first = cache.cached_svd(weight(), 2)
    (path,) = folder.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    path.write_bytes({"truncated": content[:-9], "flipped": content, "foreign": b"foreign" * 9, "empty": b""}[damage])

    assert same(cache.cached_svd(weight(), 2), first)
    assert same(cache.cached_svd(weight(), 2), first)
    assert computed == [2, 2]


def test_it_can_be_switched_off(folder, computed, monkeypatch):
    monkeypatch.setenv("TRL_TINYLORA_CACHE", "off")
    cache.cached_svd(weight(), 2), cache.cached_svd(weight(), 2)
    assert computed == [2, 2] and not folder.exists()


def test_small_weights_are_not_kept(folder):
    cache.cached_svd(weight(64, 300), 2)
    assert not folder.exists()


def test_it_keeps_within_its_size_and_drops_what_was_not_used_for_longest(folder, computed, monkeypatch):
    for seed in range(3):
        cache.cached_svd(weight(seed=seed), 2)
    (size,) = {path.stat().st_size for path in folder.iterdir()}
    for age, path in enumerate(sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, (1000 + age, 1000 + age))
    # The oldest is used, so that the second is now the oldest.
    cache.cached_svd(weight(seed=0), 2)
    monkeypatch.setenv("TRL_TINYLORA_CACHE_GB", str(3.5 * size / 1e9))
    cache.cached_svd(weight(seed=3), 2)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3.5 * size
    del computed[:]
    for seed in (0, 2, 3):
        cache.cached_svd(weight(seed=seed), 2)
    assert computed == []
    cache.cached_svd(weight(seed=1), 2)
    assert computed == [2]


def test_a_size_that_is_no_number_is_refused(folder, monkeypatch):
    monkeypatch.setenv("TRL_TINYLORA_CACHE_GB", "much")
    with pytest.raises(ValueError, match="TRL_TINYLORA_CACHE_GB must be a number of gigabytes, at least 0, got 'much'"):
        cache.cached_svd(weight(), 2)


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, computed, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRL_TINYLORA_CACHE", str(tmp_path / "file" / "below"))
    assert same(cache.cached_svd(weight(), 2), truncated_svd(weight(), 2))


def test_processes_at_the_same_time_leave_whole_entries(folder):
    code = (
        "import torch; from trl_tinylora.storage.cache import cached_svd\n"
        "for seed in (0, 1, 2, 0, 1, 2):\n"
        "    cached_svd(torch.randn(300, 280, generator=torch.Generator().manual_seed(seed)), 2)\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert len(list(folder.iterdir())) == 3
    for seed in range(3):
        assert same(cache.cached_svd(weight(seed=seed), 2), truncated_svd(weight(seed=seed), 2))
