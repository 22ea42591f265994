"""Limits of what a server accepts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, and how many pictures may wait.

    Attributes:
        queue: pictures that wait while `capacity` others are drawn; beyond it the answer is 429.
        steps: denoising steps of a picture.
        pictures: `n` of a request.
        prompt: characters of a prompt, and of a negative one.
        body: bytes of a request's body.
        patience: seconds in which the head of a request must arrive, and then its body.
    """

    queue: int = 32
    steps: int = 100
    pictures: int = 4
    prompt: int = 4000
    body: int = 128 * 1024
    patience: float = 10.0
