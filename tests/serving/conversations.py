"""Pictures of one colour, questions about them, and the requests that a server and `generate` answer alike."""

import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 40),
    "blue": (40, 60, 220),
    "yellow": (230, 220, 40),
    "black": (15, 15, 15),
    "white": (240, 240, 240),
}
QUESTION = "Which colours?"
NOTHING = "none"
SIDES = (24, 100)


@dataclass(frozen=True)
class Request:
    """A question about images and videos, in a conversation of one turn.

    Attributes:
        name: What the table of results calls it.
        images: Colour, width and height of each image.
        videos: The same of the frames of each video.
        text_first: Whether the question is before the images.
    """

    name: str
    images: tuple[tuple[str, int, int], ...] = ()
    videos: tuple[tuple[tuple[str, int, int], ...], ...] = ()
    text_first: bool = False
    seed: int = field(default=0, kw_only=True)

    @property
    def conversation(self) -> list[dict]:
        media = [{"type": "image"}] * len(self.images) + [{"type": "video"}] * len(self.videos)
        text = [{"type": "text", "text": QUESTION}]
        return [{"role": "user", "content": text + media if self.text_first else media + text}]

    @property
    def answer(self) -> str:
        names = [colour for colour, *_ in self.images] + [colour for video in self.videos for colour, *_ in video]
        return " ".join(names) or NOTHING

    def draw_images(self) -> list[Image.Image]:
        return [picture(*one, seed=self.seed) for one in self.images]

    def draw_videos(self) -> list[list[Image.Image]]:
        return [[picture(*frame, seed=self.seed) for frame in video] for video in self.videos]


IMAGES = (
    Request("one", (("red", 64, 64),)),
    Request("one, wide", (("green", 120, 40),)),
    Request("one, tall", (("yellow", 33, 97),)),
    Request("two", (("white", 64, 64), ("black", 64, 64))),
    Request("two, swapped", (("black", 64, 64), ("white", 64, 64))),
    Request("three of mixed sizes", (("blue", 100, 48), ("red", 40, 40), ("yellow", 56, 90))),
    Request("text first", (("blue", 50, 70), ("green", 64, 64)), text_first=True),
    Request("no image"),
)
VIDEOS = (
    Request("video", videos=((("red", 60, 60), ("blue", 60, 60)),)),
    Request("video, other order", videos=((("blue", 60, 60), ("red", 60, 60)),)),
    Request("two videos", videos=((("green", 60, 60),), (("white", 56, 84), ("black", 56, 84)))),
    Request("image and video", (("green", 64, 80),), ((("white", 50, 70), ("black", 50, 70), ("red", 50, 70)),)),
)


def picture(colour: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of one colour with noise."""
    noise = np.random.default_rng((seed, width, height)).normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8))


def random_request(rng: random.Random, videos: bool) -> Request:
    """A request to train on: up to three images of random sizes, or a video of as many frames."""
    count = rng.choice([0, 1, 1, 1, 2, 2, 3])
    seed, text_first = rng.randrange(10**6), rng.random() < 0.3
    if videos and count and rng.random() < 0.4:
        side = rng.randint(*SIDES)
        frames = tuple((rng.choice(list(COLOURS)), side, side) for _ in range(count))
        return Request("", videos=(frames,), text_first=text_first, seed=seed)
    images = tuple((rng.choice(list(COLOURS)), rng.randint(*SIDES), rng.randint(*SIDES)) for _ in range(count))
    return Request("", images, text_first=text_first, seed=seed)
