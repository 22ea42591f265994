"""Draws in replicas on Ray Serve; the routes stay in this process."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

# Ray reads these when it is imported
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from fastdiff.errors import UserError, first_line
from fastdiff.serve.drawing import Drawing, Event
from fastdiff.serve.opening import Opening
from fastdiff.serve.refused import Refused
from fastdiff.workers import LOCAL, join, workers_of

APPLICATION = "fastdiff"
TRIES = 3
"""How many replicas may die with a picture before it is given up."""
PATIENCE = 60.0
"""Seconds in which some replica must accept a picture."""
LOG = logging.getLogger("fastdiff")


class Replica:
    """A painter in its own process. Ray Serve starts it, and starts another if it dies."""

    def __init__(self, opening: Opening) -> None:
        self._painter = opening.painter()

    async def draw(self, drawing: Drawing) -> AsyncIterator[Event]:
        """See `Engine.draw`."""
        async for event in self._painter.draw(drawing):
            yield event


class Replicas:
    """An `Engine`: 1 to `workers` replicas, whose number grows with the load.

    Args:
        opening: of each replica.
        address: "local" for a cluster that this process starts and ends; "auto" for the cluster
            that this machine belongs to, or the HOST:PORT of another.
        workers: the most replicas; None: as many as the cluster has room for.
        gpus: GPUs per replica, 0.5 for half of one; None: 1 if there are any.
        queue: pictures that may wait.

    Raises:
        UserError: no Ray answers or starts, it has no room, or the replicas do not start.
    """

    def __init__(
        self,
        opening: Opening,
        address: str = LOCAL,
        workers: int | None = None,
        gpus: float | None = None,
        queue: int = 0,
    ) -> None:
        opening.source.check()
        join(ray, address)
        try:
            self._handle: Any = self._started(opening, address, workers, gpus, queue)
        except (RuntimeError, RayError) as error:
            self.close()
            raise UserError(f"the replicas do not start: {first_line(error)}") from error
        except UserError:
            self.close()
            raise

    def _started(
        self,
        opening: Opening,
        address: str,
        workers: int | None,
        gpus: float | None,
        queue: int,
    ) -> Any:
        """What replicas that run are asked by."""
        each = workers_of(ray.cluster_resources(), address, opening.device, workers, gpus)
        self.places = each.count * opening.capacity
        serve.start(proxy_location="Disabled")
        replica = serve.deployment(
            name="Replica",
            # one replica may get all accepted requests, which its batch draws in turn
            max_ongoing_requests=self.places + queue,
            autoscaling_config={
                "min_replicas": 1,
                "max_replicas": each.count,
                "target_ongoing_requests": opening.capacity,
            },
            ray_actor_options=each.needs,
            health_check_period_s=2,
        )(Replica)
        opening = replace(opening, device=each.device)
        return serve.run(replica.bind(opening), name=APPLICATION, route_prefix=None)

    async def draw(self, drawing: Drawing) -> AsyncIterator[Event]:
        """See `Engine.draw`. A replica that dies loses nothing: seeds are the request's, so another
        draws the same picture from its first step."""
        for _ in range(TRIES):
            answers = self._handle.options(stream=True).draw.remote(drawing)
            try:
                async with asyncio.timeout(PATIENCE):
                    first = await anext(answers)
                yield first
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
        raise Refused(503, "no replica is running; try again", "no_replica", 10)

    def close(self) -> None:
        """See `Engine.close`."""
        serve.shutdown()
        ray.shutdown()
