"""The cache: what is saved is loaded, whole or not at all, whoever else writes."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from diffusers_svi.training.cache import CachedSamples, TensorCache, fingerprint


KEY = fingerprint("an entry")


def test_fingerprints():
    assert fingerprint("a", 1) == fingerprint("a", 1) != fingerprint("a1")
    assert fingerprint({"a": 1, "b": (2, None)}) == fingerprint({"b": [2, None], "a": 1})
    assert len({fingerprint(b"a"), fingerprint("a"), fingerprint("a", ""), fingerprint("", "a"), fingerprint()}) == 5


def test_tensors_come_back_from_the_cache(tmp_path):
    cache = TensorCache(tmp_path / "cache")
    assert KEY not in cache
    whole = torch.arange(12.0).view(3, 4)
    cache.save(KEY, {"row": whole[1], "column": whole.T[2], "half": whole.bfloat16()})
    assert KEY in cache and cache.path(KEY) == tmp_path / "cache" / KEY[:2] / f"{KEY}.safetensors"
    entry = cache.load(KEY)
    assert torch.equal(entry["row"], whole[1]) and torch.equal(entry["column"], whole[:, 2])
    assert torch.equal(entry["half"], whole.bfloat16())
    assert [file.name for file in cache.path(KEY).parent.iterdir()] == [f"{KEY}.safetensors"]


def test_what_the_cache_refuses(tmp_path):
    cache = TensorCache(tmp_path)
    with pytest.raises(ValueError, match="`key` must be a `fingerprint`, 64 hexadecimal digits, got '../a'."):
        cache.path("../a")
    with pytest.raises(FileNotFoundError):
        cache.load(KEY)
    cache.save(KEY, {"a": torch.zeros(100)})
    content = cache.path(KEY).read_bytes()
    for damaged in (content[:-30], content[:5], b""):
        cache.path(KEY).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{KEY}.safetensors is damaged .* Delete it, and it is made anew."):
            cache.load(KEY)


def test_a_failed_save_leaves_nothing(tmp_path):
    cache = TensorCache(tmp_path)
    cache.path(KEY).mkdir(parents=True)
    with pytest.raises(OSError, match=KEY):
        cache.save(KEY, {"a": torch.zeros(3)})
    assert KEY not in cache and list(cache.path(KEY).parent.iterdir()) == [cache.path(KEY)]


def write_forever(folder: Path, value: float) -> None:
    while True:
        TensorCache(folder).save(KEY, {"a": torch.full((20_000,), value)})


def test_processes_may_write_the_same_entry(tmp_path):
    """While two processes write it again and again and one is killed, an entry is always whole."""
    cache = TensorCache(tmp_path)
    # Forked, as importing torch twice more would take longer than everything else here.
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_forever, args=(tmp_path, value), daemon=True) for value in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    try:
        seen = set()
        while seen != {1.0, 2.0}:
            assert all(writer.is_alive() for writer in writers)
            if KEY in cache:
                (value,) = cache.load(KEY)["a"].unique().tolist()
                seen.add(value)
        writers[0].kill()
        for _ in range(50):
            assert len(cache.load(KEY)["a"].unique()) == 1
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    assert len(cache.load(KEY)["a"].unique()) == 1


def test_a_stray_temporary_file_does_no_harm(tmp_path):
    cache = TensorCache(tmp_path)
    cache.path(KEY).parent.mkdir()
    stray = cache.path(KEY).parent / f".{KEY}.0.tmp"
    stray.write_bytes(b"half")
    assert KEY not in cache
    cache.save(KEY, {"a": torch.ones(2)})
    assert torch.equal(cache.load(KEY)["a"], torch.ones(2)) and stray.read_bytes() == b"half"


def test_cached_samples_hold_the_tensors_of_all_their_parts(tmp_path):
    cache, other = TensorCache(tmp_path), fingerprint("a caption")
    cache.save(KEY, {"latents": torch.ones(2), "condition": torch.zeros(3)})
    cache.save(other, {"prompt_embeds": torch.full((4,), 2.0)})
    samples = CachedSamples(cache, [(KEY,), (KEY, other)])
    assert len(samples) == 2 and samples[0].keys() == {"latents", "condition"}
    assert {name: value.tolist() for name, value in samples[1].items()} == {
        "latents": [1, 1],
        "condition": [0, 0, 0],
        "prompt_embeds": [2, 2, 2, 2],
    }
