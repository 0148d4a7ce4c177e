"""What a film is made of, clip by clip: one prompt each."""

import itertools
from dataclasses import FrozenInstanceError

import pytest

from diffusers_svi.clips import ClipSpec, one_per_clip


def test_the_last_prompt_holds():
    assert list(one_per_clip(["a", "b"], 4)) == ["a", "b", "b", "b"]
    assert list(one_per_clip(["a", "b"], 2)) == ["a", "b"]
    assert list(one_per_clip(["a", "b"], None)) == ["a", "b"]


def test_endless_prompts_are_asked_for_one_at_a_time():
    asked = []

    def endless():
        for index in itertools.count():
            asked.append(index)
            yield str(index)

    prompts = one_per_clip(endless(), None)
    assert [next(prompts), next(prompts)] == ["0", "1"]
    assert asked == [0, 1]


def test_what_a_clip_is_to_show_does_not_change():
    with pytest.raises(FrozenInstanceError):
        ClipSpec("a cat").prompt = "a dog"


def test_a_missing_prompt_is_no_end():
    assert list(one_per_clip([None, "a"], None)) == [None, "a"]
    assert list(one_per_clip([], 2)) == [None, None]
