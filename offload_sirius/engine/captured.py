"""Draft steps that a device carries out as one launch: recorded once, then played.

A resident draft step of one token computes on the same buffers every time, so that a device can record its kernels as a graph.
Launched one by one, each for a single token, they would take the host longer than the device. One recording for each extent of
`FixedStep`, made when it is first needed: an answer needs one or two of them. Knows no CUDA; that is the recorder's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from offload_sirius.model.fixed_step import FixedStep
from offload_sirius.model.source import NeuronWeights
from offload_sirius.sparsity.hot import front_neurons
from offload_sirius.trace import Tracer, during
from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.streamer import Streamer

Work = Callable[[], None]


class Recorder(Protocol):
    """What recording needs of a device."""

    def record(self, work: Work) -> Work:
        """Do the work a few times, and return what does all of it again, on the same tensors.

        Other threads may use the device meanwhile. Raises RuntimeError where the device cannot.
        """


def recorder_on(device: torch.device) -> Recorder | None:
    """Records what a device computes; None where it is the host, whose kernels need no launch."""
    if device.type != "cuda":
        return None
    from offload_sirius.weights.cuda import CudaGraphs

    return CudaGraphs(device)


class ResidentLayers:
    """The attention blocks and hot neurons that a streamer hands out in a draft step, without a word to it: no time is taken and
    nothing written down while kernels are recorded. Satisfies the model's WeightSource."""

    def __init__(self, layers: Mapping[int, LayerBuffer], streamer: Streamer, num_drafted: int) -> None:
        """layers: all of them. num_drafted: neurons that a draft computes, those in the first places."""
        self.final_norm = streamer.final_norm
        self.head = streamer.head
        self._layers = layers
        self._neurons = {layer: front_neurons(buffer, num_drafted) for layer, buffer in layers.items()}
        self._streamer = streamer

    def embed(self, token_ids: Tensor) -> Tensor:
        """See WeightSource."""
        return self._streamer.embed(token_ids)

    def attention(self, layer: int) -> LayerBuffer:
        """See WeightSource."""
        return self._layers[layer]

    def neurons(self, layer: int) -> NeuronWeights:
        """See WeightSource: those that a draft computes."""
        return self._neurons[layer]

    def release(self, layer: int) -> None:
        """Nothing to give up: the weights stay."""


class CapturedStep:
    """A fixed step, recorded for each extent. Where a device cannot record, says so once and takes no further steps."""

    def __init__(
        self, step: FixedStep, num_drafted: int, recorder: Recorder, warn: Callable[[str], None], tracer: Tracer | None = None
    ) -> None:
        """num_drafted: neurons of each layer that the step computes."""
        self.num_drafted = num_drafted
        self._step = step
        self._recorder = recorder
        self._warn = warn
        self._tracer = tracer
        self._recordings: dict[int, Work] = {}
        self._works = True

    @property
    def nbytes(self) -> int:
        """Device bytes of what goes in and comes out; what recordings take is only bounded, by `recorded_steps_nbytes`."""
        return self._step.nbytes

    @property
    def num_recorded(self) -> int:
        """Extents for which there is a recording."""
        return len(self._recordings)

    def step(self, token_ids: Tensor) -> Tensor | None:
        """See FixedStep.step. None, and nothing is done, where there are more tokens or the device has shown that it cannot."""
        if not self._works or len(token_ids) != 1:
            return None
        try:
            return self._step.step(token_ids, self._compute)
        except _NotRecordedError as error:
            self._works = False
            self._recordings.clear()
            self._warn(
                f"the draft step could not be recorded as a CUDA graph ({_first_line(error)}): its kernels are launched one by "
                "one, which is slower; give --no-cuda-graphs to do without from the start"
            )
            return None

    def _compute(self, extent: int) -> None:
        play = self._recordings.get(extent)
        if play is None:
            play = self._recordings[extent] = self._record(extent)
        with during(self._tracer, "compute", "draft step"):
            play()

    def _record(self, extent: int) -> Work:
        try:
            return self._recorder.record(partial(self._step.compute, extent))
        except RuntimeError as error:  # memory of the device that ran out included
            raise _NotRecordedError(str(error)) from error


class _NotRecordedError(Exception):
    """The device's reason."""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no reason given"])[0]
