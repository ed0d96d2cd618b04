"""A training of one method that can be begun again. On a GPU a step is one CUDA graph: Python takes no time in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from examples.reverse_dictionary.corpus import Corpus
from examples.reverse_dictionary.encoder import Encoder
from examples.reverse_dictionary.methods import Method, loss_of

__all__ = ["Training"]

_STEPS_BEFORE_CAPTURE = 3


class Training:
    """Encoder, optimiser and loss, all of whose tensors stay where they are."""

    def __init__(self, method: Method, encoder: Encoder, corpus: Corpus) -> None:
        device = corpus.documents.device
        self.method, self.encoder = method, encoder
        self.loss = loss_of(method, encoder, corpus)
        self._pretrained = {name: values.clone() for name, values in encoder.state_dict().items()}
        self._rows = corpus.rows_of("train")[: method.batch_size].clone()
        self._rate = torch.zeros((), device=device)
        self._value = torch.zeros((), device=device)
        on_gpu = device.type == "cuda"
        self._optimizer = torch.optim.AdamW(encoder.parameters(), lr=self._rate, fused=on_gpu, capturable=on_gpu)
        self.loss.restart(0)
        for _ in range(_STEPS_BEFORE_CAPTURE - 1):
            self._step()  # libraries are loaded, kernels built, the optimiser's tensors made
        self._run = self._captured() if on_gpu else self._step
        self.restart()

    def restart(self) -> None:
        """The encoder as it was pretrained, the optimiser as it was new."""
        self.encoder.load_state_dict(self._pretrained)
        for state in self._optimizer.state.values():
            for values in state.values():
                values.zero_()

    def step(self, rows: Tensor, rate: float) -> Tensor:
        """One step of the optimiser at that learning rate; returns the loss []."""
        self._rows.copy_(rows)
        self._rate.fill_(rate)
        self._run()
        return self._value.clone()

    def _step(self) -> None:
        loss = self.loss(self._rows)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._value.copy_(loss.detach())

    def _captured(self) -> Callable[[], None]:
        """The step as a graph, after one more step on the stream that it is captured on."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._step()
        return graph.replay
