"""A step as the compiled programs that it is on a platform: one, two, or a chain."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxserve.engine.step import DeviceState, StepOutput
from jaxserve.model.sampling import Asks
from jaxserve.model.sharding import Params


class WholeStep:
    """A step as one compiled program: it cannot begin before it has its masks."""

    kinds = (Asks.ANYTHING,)

    def __init__(self, program: Any):
        self._program = program

    def begin(
        self, params: Params, state: DeviceState, vector: jax.Array, *, warm_up: bool = False
    ) -> tuple[DeviceState, jax.Array]:
        del warm_up  # one run of the one program
        return state, vector

    def finish(
        self, params: Params, state: DeviceState, vector: jax.Array, masks: jax.Array, asks: Asks
    ) -> tuple[DeviceState, StepOutput]:
        del asks  # the device sees for itself
        return self._program(params, state, vector, masks)


class SplitStep:
    """A step as two compiled programs, the second of which is there once for everything that its rows may ask for: none
    that is usual has a branch, at which a GPU's host waits instead of launching the next step."""

    kinds = tuple(Asks)

    def __init__(self, forward: Any, samples: Mapping[Asks, Any]):
        self._forward, self._samples = forward, samples

    def begin(
        self, params: Params, state: DeviceState, vector: jax.Array, *, warm_up: bool = False
    ) -> tuple[DeviceState, Any]:
        del warm_up  # one run of the one program
        cache, *begun = self._forward(params.embed, params.layers, state.cache, state.last_token, vector)
        return replace(state, cache=cache), begun

    def finish(
        self, params: Params, state: DeviceState, begun: Any, masks: jax.Array, asks: Asks
    ) -> tuple[DeviceState, StepOutput]:
        hidden, rows, prefilled = begun
        last_token, sampling, output = self._samples[asks](
            params.embed, params.head, hidden, state.last_token, state.sampling, rows, masks
        )
        return DeviceState(state.cache, last_token, sampling), replace(output, hidden=prefilled)


@dataclass(frozen=True)
class StagedStep:
    """A step as a chain of compiled programs, one of which runs several times, on n layers each.

    XLA's CPU compiler takes 0.4 s a layer on two cores and shares nothing between equal layers; a call costs 0.1 ms.
    All but the last program runs before the masks are known.
    """

    kinds = (Asks.ANYTHING,)

    first: Any  # step.begin
    layers: Any
    pick: Any | None  # None: every token is a row's last one
    sample: Any  # step.finish
    firsts: tuple[jax.Array, ...]  # the number of the first layer of each run

    def begin(
        self, params: Params, state: DeviceState, vector: jax.Array, *, warm_up: bool = False
    ) -> tuple[DeviceState, Any]:
        """warm_up: every program once, on the first layers only; the tokens mean nothing."""
        hidden, shared = self.first(params.embed, state.last_token, vector)
        cache, size = state.cache, len(params.layers) // len(self.firsts)
        for run, first in enumerate(self.firsts[:1] if warm_up else self.firsts):
            hidden, cache = self.layers(params.layers[run * size : (run + 1) * size], hidden, cache, first, shared)
        prefilled = None
        if self.pick is not None:
            hidden, prefilled = self.pick(hidden, shared)
        return replace(state, cache=cache), (hidden, shared.rows, prefilled)

    def finish(
        self, params: Params, state: DeviceState, begun: Any, masks: jax.Array, asks: Asks
    ) -> tuple[DeviceState, StepOutput]:
        del asks  # the device sees for itself
        hidden, rows, prefilled = begun
        last_token, sampling, output = self.sample(
            params.embed, params.head, hidden, state.last_token, state.sampling, rows, masks
        )
        return DeviceState(state.cache, last_token, sampling), replace(output, hidden=prefilled)


Step = WholeStep | SplitStep | StagedStep
