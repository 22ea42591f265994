"""Draws in replicas on Ray Serve; the routes stay in this process."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from fastdiff.errors import UserError, first_line
from fastdiff.serve.drawing import Drawing, Event
from fastdiff.serve.opening import Opening
from fastdiff.serve.refused import Refused

APPLICATION = "fastdiff"
TRIES = 3
"""Replicas that a picture is begun on, where each dies with it."""
PATIENCE = 60.0
"""Seconds in which some replica must accept a picture."""
LOG = logging.getLogger("fastdiff")


class Replica:
    """A painter in a process of its own. Ray Serve starts it, and another when it dies."""

    def __init__(self, opening: Opening) -> None:
        self._painter = opening.painter()

    async def draw(self, drawing: Drawing) -> AsyncIterator[Event]:
        """See `Engine.draw`."""
        async for event in self._painter.draw(drawing):
            yield event


class Replicas:
    """An `Engine`: 1 to `most` replicas, more as more is drawn, on a cluster that is there (named
    by RAY_ADDRESS) or on one that is started here and ends with this process.

    queue: pictures that may wait.

    Raises:
        UserError: the replicas do not start.
    """

    def __init__(self, opening: Opening, most: int, queue: int) -> None:
        opening.source.check()
        self.places = most * opening.capacity
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        serve.start(proxy_location="Disabled")
        device = opening.device or ("cuda" if ray.cluster_resources().get("GPU") else "cpu")
        takes: dict[str, Any] = {"num_cpus": 1} if device == "cpu" else {"num_gpus": 1}
        deployed = serve.deployment(
            name="Replica",
            # all that is accepted may come to one replica, whose batch takes it in turn
            max_ongoing_requests=self.places + queue,
            autoscaling_config={
                "min_replicas": 1,
                "max_replicas": most,
                "target_ongoing_requests": opening.capacity,
            },
            ray_actor_options=takes,
            health_check_period_s=2,
        )(Replica)
        try:
            self._handle: Any = serve.run(
                deployed.bind(opening), name=APPLICATION, route_prefix=None
            )
        except (RuntimeError, RayError) as error:
            self.close()
            raise UserError(f"the replicas do not start: {first_line(error)}") from error

    async def draw(self, drawing: Drawing) -> AsyncIterator[Event]:
        """See `Engine.draw`. A replica that dies loses nothing: seeds are the request's, so another
        draws the same picture from its first step."""
        for _ in range(TRIES):
            answers = self._handle.options(stream=True).draw.remote(drawing)
            try:
                async with asyncio.timeout(PATIENCE):
                    yield await anext(answers)
                async for event in answers:
                    yield event
                return
            except RayTaskError as error:  # what drawing raised
                raise error.cause from None
            except (RayActorError, RayServeException) as error:
                LOG.warning("a replica was lost: %s", first_line(error))
            except TimeoutError:
                break
            finally:
                answers.cancel()
        raise Refused(503, "no replica draws now; try again", "no_replica", 10)

    def close(self) -> None:
        """See `Engine.close`."""
        serve.shutdown()
        ray.shutdown()
