"""The reader of colour and motion: right on moving discs of every kind, at chance where a clip did not listen."""

import pytest
import torch

from core.attributes import UNREAD, WORDS, read, report, scores, words_of
from core.slots.metric import COLOURS, DIRECTIONS, SPEEDS, ColourAndMotion

SIDE, FRAMES = 48, 8


def disc(colour, direction, speed, *, backdrop=0.15, bright=1.0, frames=FRAMES, radius=0.15):
    """A clip (3, T, H, W) in [-1, 1] of a disc that is where it is in the middle of the clip."""
    step = sum(SPEEDS[speed]) / 2
    rows, columns = torch.meshgrid(torch.linspace(0, 1, SIDE), torch.linspace(0, 1, SIDE), indexing="ij")
    rgb = torch.tensor(COLOURS[colour]) / 255 * bright
    clip = torch.full((3, frames, SIDE, SIDE), backdrop)
    for t in range(frames):
        at = [0.5 + (t - frames / 2) * step * d for d in DIRECTIONS[direction]]
        alpha = ((radius - torch.hypot(rows - at[0], columns - at[1])) / 0.05 + 0.5).clamp(0, 1)
        clip[:, t] += alpha * (rgb[:, None, None] - clip[:, t])
    return clip * 2 - 1


EVERYTHING = [(c, d, s) for c in COLOURS for d in DIRECTIONS for s in SPEEDS]
CAPTIONS = [f"a {c} thing goes {d}, {s}" for c, d, s in EVERYTHING]


@pytest.fixture(scope="module")
def clips():
    return torch.stack([disc(*words) for words in EVERYTHING])


@pytest.mark.parametrize(
    "look", [{"backdrop": 0.0}, {"backdrop": 0.3}, {"bright": 0.75}, {"radius": 0.08}, {"frames": 2}]
)
def test_every_colour_direction_and_speed_is_read_whatever_the_light_and_size(look):
    found = scores(torch.stack([disc(*words, **look) for words in EVERYTHING]), CAPTIONS)
    assert found == {"colour_score": 1.0, "direction_score": 1.0, "speed_score": 1.0}


def test_a_clip_played_backwards_goes_the_other_way_at_the_same_speed(clips):
    found = scores(clips.flip(2), CAPTIONS)
    assert (found["colour_score"], found["direction_score"], found["speed_score"]) == (1.0, 0.0, 1.0)


def test_grain_does_not_mislead(clips):
    noisy = clips + 0.08 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    assert min(scores(noisy, CAPTIONS).values()) > 0.95


def test_clips_that_did_not_listen_are_at_chance_and_the_report_says_so(clips):
    found = report(clips, CAPTIONS, clips, CAPTIONS)
    for name, words in WORDS.items():
        assert found[f"{name}_score"] == found[f"{name}_score_real"] == 1.0
        assert abs(found[f"{name}_score_shuffled"] - 1 / len(words)) < 0.15
        assert found[f"{name}_score_mean_clip"] <= 1 / len(words) + 1e-6


def test_where_there_is_nothing_nothing_is_read():
    empty = torch.full((2, 3, 4, 16, 16), -0.5)
    assert all(index.tolist() == [UNREAD, UNREAD] for index in read(empty).values())
    assert set(scores(empty, CAPTIONS[:2]).values()) == {0.0}


def test_a_thing_in_a_single_frame_has_a_colour_and_no_motion(clips):
    clip = clips[:1].clone()
    clip[:, :, 1:] = -0.7
    seen = read(clip)
    assert seen["colour"].item() == 0
    assert seen["direction"].item() == seen["speed"].item() == UNREAD


def test_pictures_are_scored_by_colour_alone(clips):
    assert scores(clips[:, :, :1], CAPTIONS) == {"colour_score": 1.0}


def test_captions_are_read_by_whole_words_and_only_where_they_say_one():
    texts = ["A RED cloud", "a reddish cloud", "red and blue", "up, up and away", "", "quickly!"]
    assert words_of(texts, "colour").tolist() == [0, UNREAD, UNREAD, UNREAD, UNREAD, UNREAD]
    assert words_of(texts, "direction").tolist() == [UNREAD] * 3 + [2] + [UNREAD] * 2
    assert words_of(texts, "speed").tolist() == [UNREAD] * 5 + [1]


def test_attributes_that_no_caption_names_have_no_score(clips):
    assert scores(clips[:2], ["altocumulus", "over a white lake"]).keys() == {"colour_score"}


def test_the_slot_builds_the_report():
    assert ColourAndMotion().build() is report
