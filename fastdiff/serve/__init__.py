"""A server that draws: OpenAI's images API, a page, metrics; in one process or on Ray.

`fastdiff serve` starts it; docs/serve.md is its manual.

>>> from fastdiff.serve.app import make
>>> from fastdiff.serve.limits import Limits
>>> from fastdiff.serve.painter import Painter
>>> app = make(Painter(fastdiff.compile(pipe)), "mine", Limits())  # for an ASGI server of your own
"""
