"""Evaluates a closure several times in one step, each time as if for the first time."""

import torch


class Replay:
    """Every evaluation starts from the same buffers (batch-norm statistics) and random states (dropout masks)."""

    def __init__(self, optimizer, closure):
        if closure is None:
            raise ValueError(
                f"closure is None; integrator={optimizer.integrator!r} evaluates the loss more than once and needs it"
            )
        self._optimizer, self._closure = optimizer, closure
        self._buffers = [(b, b.clone()) for b in optimizer.model.buffers()]
        devices = {p.device.index for p in optimizer.model.parameters() if p.is_cuda}
        self._random = torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices}

    def __call__(self):
        for buffer, before in self._buffers:
            buffer.copy_(before)
        cpu, cuda = self._random
        torch.set_rng_state(cpu)
        for device, state in cuda.items():
            torch.cuda.set_rng_state(state, device)
        self._optimizer.zero_grad()
        with torch.enable_grad():
            loss = self._closure()
        self._optimizer.reducer.average_gradients(self._optimizer.layers_with_gradient().values())
        return loss
