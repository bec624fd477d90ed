"""Training data: fair draws, clips of training scenes only, and stored trajectories."""

from collections import Counter

import pytest
import torch

from trainer.data import (
    DataConfig,
    DataKind,
    Deck,
    ODEPairs,
    ShapesClips,
    read_ode_pairs,
    training_clips,
    training_prompts,
    write_ode_pairs,
)
from utils.errors import UserError
from utils.shapes import Scene, ShapesConfig, held_out_scenes, measure


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_item_is_drawn_once_before_any_is_drawn_again():
    deck = Deck(list("abcde"), stream())
    drawn = [item for _ in range(10) for item in deck.next(2)]
    assert all(Counter(drawn[start : start + 5]) == Counter("abcde") for start in range(0, 20, 5))
    assert drawn[:5] != drawn[5:10] or drawn[5:10] != drawn[10:15]


def test_a_deck_deals_more_than_it_holds_and_follows_its_generator():
    assert Counter(Deck([1, 2], stream()).next(6)) == {1: 3, 2: 3}
    assert Deck(list(range(50)), stream()).next(9) == Deck(list(range(50)), stream()).next(9)
    assert Deck(list(range(50)), stream()).next(9) != Deck(list(range(50)), stream(1)).next(9)
    with pytest.raises(ValueError, match="empty"):
        Deck([], stream())


def test_clips_show_their_prompts_and_never_a_held_out_scene():
    clips = ShapesClips(ShapesConfig(), stream())
    frames, prompts = clips.next(6, 13)
    assert frames.shape == (6, 13, 3, 48, 48)
    assert all(
        measure(clip, Scene.from_prompt(prompt)).colour.all() for clip, prompt in zip(frames, prompts, strict=True)
    )
    later = [prompt for _ in range(10) for prompt in clips.next(60, 1).prompts]
    assert not {scene.prompt for scene in held_out_scenes()} & {*prompts, *later}


def test_the_same_seed_gives_the_same_clips():
    first, again, other = (ShapesClips(ShapesConfig(), stream(seed)).next(2, 5) for seed in (0, 0, 1))
    assert torch.equal(first.frames, again.frames) and first.prompts == again.prompts
    assert not torch.equal(first.frames, other.frames)


def test_prompts_come_from_the_shapes_world_or_from_a_file(tmp_path):
    held_out = {scene.prompt for scene in held_out_scenes()}
    assert not held_out & set(training_prompts(DataConfig(kind=DataKind.shapes), stream()).next(480))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    deck = training_prompts(DataConfig(path=str(tmp_path / "prompts.txt")), stream())
    assert set(deck.next(2)) == {"a cat", "a dog"}


def test_missing_data_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.path is null"):
        training_prompts(DataConfig(), stream())
    with pytest.raises(UserError, match="no such prompt file"):
        training_prompts(DataConfig(path=str(tmp_path / "nowhere.txt")), stream())
    with pytest.raises(UserError, match=r"data\.kind=prompts has no videos"):
        training_clips(DataConfig(), stream())
    with pytest.raises(UserError, match=r"ode\.pairs=.*holds no pairs"):
        read_ode_pairs(tmp_path)


def test_stored_trajectories_read_back(tmp_path):
    pairs = ODEPairs(torch.randn(2, 5, 3, 4, 2, 2).half(), [1000.0, 937.5, 833.25, 625.0, 0.0], ["a", "b 🐈"])
    write_ode_pairs(tmp_path / "new" / "folder", pairs)
    again = read_ode_pairs(tmp_path / "new" / "folder")
    assert torch.equal(again.trajectories, pairs.trajectories) and again[1:] == pairs[1:]
