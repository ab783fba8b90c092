"""One arm of a benchmark at work: a repeat of each measure, and of the same work as the machine could do it at best."""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from .benchmark_arms import Arm, Sizes


# Products alone of so many tokens, scaled to all of them.
PASSES = 8


@dataclass(frozen=True)
class Mode:
    """Precision, and whether compiled. In bf16 training is autocast from fp32 weights, generation has bf16 weights."""

    name: str
    dtype: torch.dtype
    compiled: bool = False


def modes(device: torch.device) -> list[Mode]:
    """fp32 and bf16; on an accelerator bf16 compiled too."""
    found = [Mode("fp32", torch.float32), Mode("bf16", torch.bfloat16)]
    return found if device.type == "cpu" else [*found, Mode("bf16, compiled", torch.bfloat16, compiled=True)]


class Case:
    """One arm in one mode: models made when first asked for, and a method for one repeat of each measure or limit."""

    def __init__(self, arm: Arm, sizes: Sizes, mode: Mode, device: torch.device):
        self.arm, self.sizes, self.mode, self.device = arm, sizes, mode, device

    @cached_property
    def learner(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        set_seed(0)
        model = self.arm.build(self.sizes, self.sizes.training_layers).to(self.device).train()
        if self.mode.compiled:
            model.compile()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    @cached_property
    def batch(self) -> torch.Tensor:
        return self._ids(self.sizes.batch, self.sizes.context)

    @cached_property
    def folder(self) -> tempfile.TemporaryDirectory:
        """Where the writer was saved, if its library does that."""
        return tempfile.TemporaryDirectory()

    @cached_property
    def writer(self) -> nn.Module:
        set_seed(0)
        model = self.arm.build(self.sizes, self.sizes.generation_layers).to(self.device).eval()
        if isinstance(model, PreTrainedModel):
            # Loaded as a user loads it: what stays fp32 in a 16-bit model, stays so here.
            model.save_pretrained(self.folder.name)
            model = self._load(type(model)).to(self.device)
        else:
            model = model.to(self.mode.dtype)
        return self.arm.prepare(model) if self.arm.prepare else model

    def _load(self, kind: type[PreTrainedModel]) -> PreTrainedModel:
        return kind.from_pretrained(self.folder.name, dtype=self.mode.dtype)

    def _ids(self, sequences: int, tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.sizes.vocab_size, (sequences, tokens), generator=generator).to(self.device)

    def seconds(self, action: Callable[[], Any]) -> float:
        """Of the action, and of what it left to do on the device."""
        self._wait()
        start = time.perf_counter()
        with self.arm.during():
            action()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def _step(self) -> None:
        model, optimizer = self.learner
        with torch.autocast(self.device.type, self.mode.dtype, enabled=self.mode.dtype is not torch.float32):
            loss = self.arm.loss(model, self.batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def train(self) -> float:
        """Forward, backward, update."""
        return self.seconds(self._step)

    def memory(self) -> float:
        """Parameters, optimiser state, and the most that a step allocates beside them."""
        model, optimizer = self.learner
        with self.arm.during():
            # The first step makes the optimiser's state.
            self._step()
            allocated = peak_allocation(self._step, self.device)
        states = [value for state in optimizer.state.values() for value in state.values()]
        return allocated + sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *states))

    @torch.inference_mode()
    def prefill(self) -> float:
        """One prompt of `context` tokens."""
        writer, ids = self.writer, self._ids(1, self.sizes.context)
        return self.seconds(lambda: self.arm.prefill(writer, ids))

    def first_token(self) -> float:
        """`generate` for one token."""
        return self._generate(1, 1)

    def decode(self, sequences: int) -> float:
        """The tokens after the first: two calls of `generate`, the longer less the shorter."""
        return self._generate(sequences, 1 + self.sizes.decoded(sequences)) - self._generate(sequences, 1)

    def _generate(self, sequences: int, tokens: int) -> float:
        writer, ids = self.writer, self._ids(sequences, self.sizes.prompt)
        return self.seconds(lambda: self.arm.generate(writer, ids, tokens, compiled=self.mode.compiled))

    def load(self) -> float:
        """`from_pretrained` of a folder that was read before."""
        kind = type(self.writer)
        return self.seconds(lambda: self._load(kind))

    def training_flops(self) -> int:
        """Of a step: a backward pass is two forward passes."""
        model, _ = self.learner
        return 3 * forward_flops(model, self.sizes, self.sizes.training_layers, self.sizes.batch)

    def prefill_flops(self) -> int:
        return forward_flops(self.writer, self.sizes, self.sizes.generation_layers, 1)

    @torch.no_grad()
    def training_products(self) -> float:
        """The step's operations at the rate that `torch.mm` reaches on its matrices, forward and backward."""
        weights, rows = matrices(self.learner[0]), self.sizes.batch * self.sizes.context
        products = step_products([weight.to(self.mode.dtype) for weight in weights], rows)
        flops = 6 * rows * sum(weight.numel() for weight in weights)
        return self.seconds(products) * self.training_flops() / flops

    @torch.no_grad()
    def prefill_products(self) -> float:
        """The same forward, on one prompt."""
        weights, rows = matrices(self.writer), self.sizes.context
        flops = 2 * rows * sum(weight.numel() for weight in weights)
        return self._products(weights, rows) * self.prefill_flops() / flops

    @torch.no_grad()
    def decode_products(self, sequences: int) -> float:
        """The product with each of the model's matrices, and nothing else, for every new token."""
        return self._products(matrices(self.writer), sequences, PASSES) * self.sizes.decoded(sequences) / PASSES

    def _products(self, weights: list[torch.Tensor], rows: int, passes: int = 1) -> float:
        inputs = _vectors(weights, rows) * passes
        return self.seconds(lambda: [torch.mm(x, weight.T, out=to_y) for weight, x, _, _, to_y in inputs])

    @torch.no_grad()
    def decode_bandwidth(self, sequences: int) -> float:
        """Reading the model's matrices for every new token at the rate at which a large tensor is read or copied."""
        source, target = self._buffers
        read = min(self.seconds(source.sum), self.seconds(lambda: target.copy_(source)) / 2)
        held = sum(weight.nbytes for weight in matrices(self.writer))
        return read * held / source.nbytes * self.sizes.decoded(sequences)

    @cached_property
    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        source = torch.ones(self.sizes.read // 4, device=self.device)
        return source, torch.zeros_like(source)


def matrices(model: nn.Module) -> list[torch.Tensor]:
    """The matrices that every token is multiplied by, each as (out, in); embeddings are looked up and do not count."""
    modules = list(model.modules())
    looked_up = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    # GPT-2 keeps (in, out).
    turned = {id(module.weight) for module in modules if isinstance(module, Conv1D)}
    found = [weight for weight in model.parameters() if weight.ndim == 2 and id(weight) not in looked_up]
    return [(weight.T if id(weight) in turned else weight).detach() for weight in found]


def step_products(weights: list[torch.Tensor], rows: int) -> Callable[[], None]:
    """The products of a training step on so many rows, and nothing else: forward, at the inputs, at the weights.

    Args:
        weights: matrices (out, in), of one device and dtype.
        rows: of the inputs.
    """
    gradients = {weight.shape: torch.empty_like(weight) for weight in weights}
    inputs = _vectors(weights, rows)

    @torch.no_grad()
    def products() -> None:
        for weight, x, y, to_x, to_y in inputs:
            torch.mm(x, weight.T, out=to_y)
            torch.mm(y, weight, out=to_x)
            torch.mm(y.T, x, out=gradients[weight.shape])

    return products


def _vectors(weights: list[torch.Tensor], rows: int) -> list[tuple[torch.Tensor, ...]]:
    """Every matrix (out, in) with x (rows, in), y (rows, out), and buffers like x and y for results."""
    widths = {width for weight in weights for width in weight.shape}
    drawn = {width: torch.randn(rows, width, device=weights[0].device, dtype=weights[0].dtype) for width in widths}
    room = {width: torch.empty_like(vectors) for width, vectors in drawn.items()}
    return [(weight, *(of[width] for of in (drawn, room) for width in weight.shape[::-1])) for weight in weights]


def forward_flops(model: nn.Module, sizes: Sizes, layers: int, sequences: int) -> int:
    """Floating point operations of a forward pass over `sequences` of `sizes.context` tokens, as `flops.py` counts."""
    products = 2 * sizes.context * sum(weight.numel() for weight in matrices(model))
    attention = 2 * sizes.hidden_size * layers * sizes.context * (sizes.context + 1)
    return sequences * (products + attention)


def peak_allocation(action: Callable[[], Any], device: torch.device) -> int:
    """The most bytes of tensors alive at once during an action, beyond those there before.

    On a CPU torch's profiler tells every allocation and release: exact, the same every time, and whatever else the
    process holds. What a library allocates for itself (oneDNN's work space) is not a tensor's and not counted. Resident
    size would count it, and with it glibc's holes and pages that are still there from before.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = action()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    now = most = 0
    for event in events:
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most
