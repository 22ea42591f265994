"""A request's body: OpenAI's fields and our own, checked before anything is drawn."""

import json
import re
import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastdiff.serve.drawing import Drawing
from fastdiff.serve.limits import Limits
from fastdiff.serve.refused import Refused

LARGEST_SEED = 2**63 - 1
SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


class Asked(BaseModel):
    """The body of `POST /v1/images/generations`. null means the same as an absent field."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(description="What to draw.")
    model: str | None = Field(None, description="The name that /v1/models lists.")
    n: int | None = Field(None, ge=1, description="How many pictures; each seed is one higher.")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto.")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json.")
    output_format: Literal["png"] | None = None
    user: str | None = Field(None, description="Ignored.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="With stream: pictures to show before the final one."
    )
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, description="Default: a random one.")
    steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=-1000, le=1000)
    negative_prompt: str | None = None
    scheduler: str | None = Field(None, description="A scheduler class of diffusers.")
    progress: bool | None = Field(
        None, description="With stream: an event after each step, fastdiff.progress."
    )


def read(body: bytes) -> Asked:
    """The request in a JSON body; Refused with one sentence if it is not a valid request."""
    try:
        return Asked.model_validate_json(body)
    except ValidationError as error:
        raise Refused(400, _sentence(error.errors(include_url=False)[0])) from None


def drawings(asked: Asked, served: str, limits: Limits) -> list[Drawing]:
    """The pictures that a request asks for, each with its own seed.

    served: the only model there is.
    """
    if asked.model not in (None, served):
        sentence = f"model is {_shown(asked.model)}; this server has {_shown(served)} only"
        raise Refused(404, sentence, "model_not_found")
    if asked.response_format == "url":
        raise Refused(400, "response_format is 'url', but this server keeps no files; use b64_json")
    texts = (("prompt", asked.prompt), ("negative_prompt", asked.negative_prompt or ""))
    for name, text in texts:
        if len(text) > limits.prompt:
            sentence = f"{name} has {len(text)} characters; give at most {limits.prompt}"
            raise Refused(400, sentence)
    if not asked.prompt.strip():
        raise Refused(400, "prompt is empty; say what to draw")
    n, previews = asked.n or 1, asked.partial_images or 0
    _at_most("n", n, limits.pictures)
    if asked.steps is not None:
        _at_most("steps", asked.steps, limits.steps)
    if asked.stream and n > 1:
        raise Refused(400, f"n is {n}; with stream give 1")
    for name, value in (("partial_images", previews), ("progress", asked.progress)):
        if value and not asked.stream:
            raise Refused(400, f"{name} is {value}, which needs stream; set stream to true")
    width, height = _sides(asked.size)
    seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
    return [
        Drawing(
            asked.prompt,
            (seed + i) % (LARGEST_SEED + 1),
            asked.negative_prompt,
            asked.steps,
            asked.guidance_scale,
            height,
            width,
            asked.scheduler,
            previews,
        )
        for i in range(n)
    ]


def _at_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise Refused(400, f"{name} is {_shown(value)}; give at most {most}")


def _sides(size: str | None) -> tuple[int | None, int | None]:
    """Width and height, None for the pipeline's own."""
    if size in (None, "auto"):
        return None, None
    found = SIZE.fullmatch(str(size))
    if found is None:
        raise Refused(400, f"size is {_shown(size)}; give WIDTHxHEIGHT in pixels, or auto")
    return int(found[1]), int(found[2])


def _sentence(error: Any) -> str:
    """One error of pydantic's in a sentence that names field, value and what is expected."""
    name = ".".join(map(str, error["loc"]))
    said = error["msg"].split("\n")[0]
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {said.removeprefix('Invalid JSON: ')}"
    if not name:
        return "the body is not a JSON object; give one with a prompt"
    if error["type"] == "missing":
        return f"{name} is missing; say what to draw"
    if error["type"] == "extra_forbidden":
        return f"{_shown(name)} is not a field of this request; leave it out"
    expected = said.replace("Input should be", "it should be", 1)
    return f"{name} is {_shown(error['input'])}; {expected[0].lower()}{expected[1:]}"


def _shown(value: Any) -> str:
    """A value as JSON has it, at most 40 characters of it."""
    try:
        text = json.dumps(value)
    except ValueError:  # an integer of thousands of digits
        text = "a number that is too long to be shown"
    return text if len(text) <= 40 else f"{text[:37]}..."
