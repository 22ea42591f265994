"""serve: a server that draws."""

from typing import TYPE_CHECKING, Annotated

import typer

from fastdiff.cli.options import (
    Config,
    Device,
    Dtype,
    Lora,
    Pipeline,
    Scheduler,
    Steps,
    Variant,
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
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for one that is free.")] = 8000,
    capacity: Annotated[int, typer.Option(help="Pictures drawn at the same time.")] = 4,
    queue: Annotated[int, typer.Option(help="Pictures that may wait; above it 429.")] = 32,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="FASTDIFF_API_KEY",
            show_envvar=True,
            help="What clients must send as a bearer token. Others can read a command line, so"
            " rather set the variable.",
        ),
    ] = None,
    steps: Steps = 25,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Of requests that give none. Default: the pipeline's own, 4 for the demo."
        ),
    ] = None,
    max_steps: Annotated[int, typer.Option(help="The most that a request may ask for.")] = 100,
    max_pictures: Annotated[int, typer.Option(help="The most that one request may ask for.")] = 4,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            help="Of a picture. Default: half as many again as the pipeline's own size has."
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Draw by Ray. local starts a cluster on this machine, auto joins the one that"
            " runs here, HOST:PORT another one that this machine belongs to.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="With --ray: processes that draw, at most. Default: as many as the GPUs hold, or"
            " one for each CPU.",
            min=1,
        ),
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(
            help="With --ray: GPUs of a worker; 0.5 lets two share one. Default: 1, or 0 where"
            " there are none.",
            min=0.0,
        ),
    ] = None,
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
        raise UserError(f"--steps is {steps}, but --max-steps is {max_steps}; give fewer, or more")
    finite_guidance(guidance_scale)
    if max_pictures > capacity + queue:
        raise UserError(
            f"--max-pictures is {max_pictures}, but only {capacity + queue} may be drawn or wait;"
            " give a larger --queue"
        )
    for name in ("workers", "gpus_per_worker"):
        if was_given(context, name) and ray is None:
            raise UserError(f"--{name.replace('_', '-')} goes with --ray")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key):
        raise UserError("--api-key is empty or has characters that HTTP has not; give another")
    from fastdiff.serve.app import make
    from fastdiff.serve.limits import Limits
    from fastdiff.serve.opening import Opening
    from fastdiff.serve.run import listening, run, url_of

    bound = listening(host, port)
    source = source_of(context)
    opening = Opening(source, dtype, device, capacity, steps, guidance_scale, max_pixels)
    engine: Engine
    if ray is not None:
        from fastdiff.serve.replicas import Replicas

        engine = Replicas(opening, ray, workers, gpus_per_worker, queue)
    else:
        engine = opening.painter()
    limits = Limits(queue=queue, steps=max_steps, pictures=max_pictures)
    web = make(engine, source.name, limits, api_key)
    bound.listen()  # who reads the next line may connect
    typer.echo(f"fastdiff: {source.name} at {url_of(bound)}", err=True)
    try:
        run(web, bound, limits.patience)
    finally:
        engine.close()
