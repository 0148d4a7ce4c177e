"""What a film is made of, clip by clip: one prompt each, and which of them is the last."""

import itertools
from dataclasses import FrozenInstanceError

import pytest

from diffusers_svi.clips import ClipSpec, one_per_clip, with_last


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


def test_nothing_is_asked_for_before_its_turn():
    """Without a look ahead, or where the number is known; with one, a single item ahead of what was given out."""
    for num_items, look_ahead, ahead in ((None, False, 0), (None, True, 1), (3, True, 0), (3, False, 0)):
        asked = []
        items = with_last((asked.append(index) or index for index in range(3)), num_items, look_ahead)
        assert next(items) == (0, False) and len(asked) == 1 + ahead
        assert list(items) == [(1, False), (2, look_ahead or num_items == 3)]
    assert list(with_last([7], None, True)) == [(7, True)] and list(with_last([], None, True)) == []


def test_what_a_clip_is_to_show_does_not_change():
    with pytest.raises(FrozenInstanceError):
        ClipSpec("a cat").prompt = "a dog"


def test_a_missing_prompt_is_no_end():
    assert list(with_last([None, "a"], None, True)) == [(None, False), ("a", True)]
    assert list(one_per_clip([], 2)) == [None, None]
