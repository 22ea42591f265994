"""serve: a server that draws."""

from typing import TYPE_CHECKING, Annotated

import typer

from fastdiff.cli.options import (
    Config,
    Device,
    Dtype,
    GpusPerWorker,
    Lora,
    Pipeline,
    RayAddress,
    Scheduler,
    Steps,
    Variant,
    Workers,
    app,
    at_least,
    finite_guidance,
    source_of,
    was_given,
)
from fastdiff.errors import UserError

if TYPE_CHECKING:
    from fastdiff.serve.drawing import Engine


@app.command()
def serve(
    context: typer.Context,
    pipeline: Pipeline = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.")] = 8000,
    capacity: Annotated[
        int, typer.Option(help="Pictures that a worker draws at the same time.")
    ] = 4,
    queue: Annotated[
        int, typer.Option(help="Pictures that may wait; requests beyond them get status 429.")
    ] = 32,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="FASTDIFF_API_KEY",
            show_envvar=True,
            help="The bearer token that clients must send. Other users of the machine can read a"
            " command line, so better set the variable.",
        ),
    ] = None,
    steps: Steps = 25,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="For requests that give none. Default: the pipeline's own, 4 for the demo."
        ),
    ] = None,
    max_steps: Annotated[
        int, typer.Option(help="The most steps that a request may ask for.")
    ] = 100,
    max_pictures: Annotated[
        int, typer.Option(help="The most pictures that a request may ask for.")
    ] = 4,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            help="The most pixels of a picture. Default: 1.5 times those of the pipeline's size."
        ),
    ] = None,
    ray: RayAddress = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    scheduler: Scheduler = None,
    lora: Lora = None,
    variant: Variant = None,
    config: Config = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Serve OpenAI's images API and a page to draw with, until Ctrl+C or SIGTERM."""
    for option, value in (("--capacity", capacity), ("--max-steps", max_steps)):
        at_least(option, value, 1)
    for option, value in (("--max-pictures", max_pictures), ("--steps", steps)):
        at_least(option, value, 1)
    at_least("--queue", queue, 0)
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}; give a number from 0 to 65535")
    if steps > max_steps:
        raise UserError(f"--steps is {steps}, but --max-steps is {max_steps}; change one of them")
    finite_guidance(guidance_scale)
    if ray is None or workers is not None:  # else the cluster decides how many workers there are
        _check_room(max_pictures, capacity * (workers or 1) + queue)
    if was_given(context, "gpus_per_worker") and ray is None:
        raise UserError("--gpus-per-worker needs --ray")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key):
        raise UserError(
            "--api-key is empty or has characters that an HTTP header cannot hold; give printable"
            " ASCII"
        )
    from fastdiff.serve.app import make
    from fastdiff.serve.limits import Limits
    from fastdiff.serve.opening import Opening
    from fastdiff.serve.run import listening, run, url_of

    bound = listening(host, port)
    source = source_of(context)
    here = 1 if ray is not None else workers or 1
    opening = Opening(source, dtype, device, capacity, here, steps, guidance_scale, max_pixels)
    engine: Engine
    if ray is not None:
        from fastdiff.serve.replicas import Replicas

        engine = Replicas(opening, ray, workers, gpus_per_worker, queue)
    else:
        engine = opening.painter()
    limits = Limits(queue=queue, steps=max_steps, pictures=max_pictures)
    try:
        _check_room(max_pictures, engine.places + queue)
        web = make(engine, source.name, limits, api_key)
        bound.listen()  # before the next line, which tells users that they can connect
        typer.echo(f"fastdiff: {source.name} at {url_of(bound)}", err=True)
        run(web, bound, limits.patience)
    finally:
        engine.close()


def _check_room(pictures: int, room: int) -> None:
    """UserError unless a request for this many pictures fits into the workers and the queue."""
    if pictures > room:
        raise UserError(
            f"--max-pictures is {pictures}, but only {room} can be drawn or wait at once; give a"
            " larger --queue"
        )
