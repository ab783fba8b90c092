"""Memory of one training step, found without taking it.

It is not a formula but the step itself, run on tensors that have a shape and no data (torch's `FakeTensorMode`) while
every storage that comes and goes is counted. So it follows the model, the optimisers and the installed libraries by
itself, for every residual form, and takes seconds whatever the size.
"""

import weakref
from dataclasses import dataclass
from functools import partial

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .arguments import CHECKPOINTING, ReZeroTrainingArguments, compute_dtype, optimizer_for
from .glibc_heap import GlibcHeap
from .models import ReZeroConfig, ReZeroForCausalLM, ReZeroForMaskedLM


# The library leaves out a mask that only says "causal", but not before it has read the positions, which have no data
# here. For a name it does not know it makes no mask.
AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device. They do not add up to the peak: gradients appear while activations go.

    Attributes:
        weights, gradients, optimizer: the device's share under FSDP. `optimizer` is its state.
        gathered: under FSDP, weights in whole, in the type of the computation: two layers (one computes, the next one
            is fetched) and whatever is in no layer. Reckoned, not measured.
        buckets: under DDP, the second copy of the gradients that is sent. Reckoned, not measured.
        copies: 16-bit weights that autocast keeps until the backward pass; none under FSDP, which has its own.
        activations: what all layers keep for the backward pass, with their output.
        loss: logits and their copies at the most.
        peak: the highest sum at any moment of a step.
        resident: what a process on a CPU holds at the most, the holes between its tensors with them, since the model
            was made; None where that is not known.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    buckets: int
    copies: int
    activations: int
    loss: int
    peak: int
    resident: int | None


def language_model(config: ReZeroConfig) -> nn.Module:
    """A new model of that configuration with a head over the vocabulary: causal, or masked where it looks both ways."""
    return ReZeroForCausalLM(config) if config.is_causal else ReZeroForMaskedLM(config)


def _read_no_data(model: PreTrainedModel) -> None:
    """Take away what looks at the values of inputs: masks, the check of learned positions, and the library's look at
    whether a sequence is longer than any before it.
    """
    model.set_attn_implementation("sdpa_without_mask")
    if (positions := model.model.embed_positions) is not None:
        positions.forward = partial(nn.Embedding.forward, positions)
    if (rotary := model.model.rotary_emb) is not None:
        rotary.rope_type = "default"


def plan_memory(
    config: ReZeroConfig,
    args: ReZeroTrainingArguments,
    block_size: int,
    passes: int,
    distributed: bool,
    shards: int,
    checkpointing: bool,
    heap: GlibcHeap | None = None,
) -> MemoryPlan:
    """Take two optimiser steps as Trainer does, on tensors without data, and count.

    The first step makes the optimiser's state, the second finds it there.

    Args:
        config: the model's configuration, with `use_cache` as while training.
        args: precision, optimiser, sequences per device, how to checkpoint.
        block_size: tokens of a sequence.
        passes: forward and backward passes per step.
        distributed: other devices hold the same weights.
        shards: devices that share one copy under FSDP, else 1.
        checkpointing: recompute activations, whatever `args` says.
        heap: a new one, where the tensors are to lie; None (default) plans no resident bytes.
    """
    dtype = compute_dtype(args)
    with FakeTensorMode(), _LiveBytes(heap) as count:
        model = language_model(config).train()
        _read_no_data(model)
        if checkpointing:
            how = dict(args.activation_checkpointing_kwargs or {})
            settings = {name: how.pop(name) for name in CHECKPOINTING if name in how}
            model.activation_checkpointing_enable(how or None, **settings)
        optimizer = optimizer_for(model, args)
        weights = list(model.parameters())
        # FSDP gathers in the type of the computation, so autocast finds nothing to copy.
        count.watch(weights, copies=shards == 1)
        seen = {}

        def gradient_done(weight):
            count.share(weight.grad, shards)

        def backbone_done(module, inputs, output):
            seen["copies"] = count.copies
            seen["activations"] = count.live - seen["before"] - count.copies
            seen["start"], earlier, count.peak = count.live, count.peak, count.live

            def loss_done(gradient):
                seen["loss"] = count.peak - seen["start"]
                count.peak = max(count.peak, earlier)

            output.last_hidden_state.register_hook(loss_done)

        model.model.register_forward_hook(backbone_done)
        for weight in weights:
            weight.register_post_accumulate_grad_hook(gradient_done)
        if dtype is not torch.float32:
            # As Accelerator prepares a model, with one more copy of the logits.
            model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype)(model.forward))
        tokens = torch.zeros(args.per_device_train_batch_size, block_size, dtype=torch.long)
        words = {
            "num_items_in_batch": torch.tensor(tokens.numel()),
            **({"skip_logits": True} if config.is_causal else {}),
        }

        def take_step():
            for _ in range(passes):
                seen["before"] = count.live
                count.records = True
                # As in ReZeroTrainer, the logits are gone when the backward pass starts.
                loss = model(input_ids=tokens, labels=tokens, shift_labels=tokens, **words).loss
                count.records = False
                loss.backward()
                count.free_graph()
            seen["passed"], count.peak = count.peak, count.live
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()

        take_step()
        optimizer.zero_grad()
        states = [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, torch.Tensor)]
        held = [sum(count.share(tensor, shards) for tensor in tensors) for tensors in (weights, states)]
        count.peak = count.live
        take_step()
        gradients = sum(count.share(weight.grad, shards) for weight in weights)
        buckets = gradients if distributed and shards == 1 else 0
        gathered = _gathered_elements(model) * dtype.itemsize if shards > 1 else 0
        return MemoryPlan(
            weights=held[0],
            gradients=gradients,
            optimizer=held[1],
            gathered=gathered,
            buckets=buckets,
            copies=seen["copies"],
            activations=seen["activations"],
            loss=seen["loss"],
            peak=buckets + max(seen["passed"] + gathered, count.peak),
            resident=None if heap is None else heap.peak,
        )


def _gathered_elements(model: nn.Module) -> int:
    """Of two layers and whatever is in no layer."""
    layer, *others = ([weight.numel() for weight in layer.parameters()] for layer in model.model.layers)
    outside = sum(weight.numel() for weight in model.parameters()) - (1 + len(others)) * sum(layer)
    return min(2, 1 + len(others)) * sum(layer) + outside


class _LiveBytes(TorchDispatchMode):
    """Sums the bytes of all storages alive, and places them in a heap, if it has one, with the small objects that torch
    makes for them.

    The objects matter by where they lie: what `posix_memalign` leaves beside a tensor, 96 bytes at the most, is where
    glibc puts them. While one is there, the hole of a freed tensor does not join its neighbours, and is those bytes too
    small for the next tensor of the same shape.

    Attributes:
        live: the sum now.
        peak: its highest value since somebody set it.
        copies: the part of it that casts of watched weights take.
        records: whether autograd records what is computed.
    """

    # Bytes, in torch 2.13: `StorageImpl`; then `TensorImpl`, its slot for a Python object, and `AutogradMeta`.
    STORAGE, TENSOR = 96, (176, 24, 184)
    # A node of the graph, most of them 464 to 512. Beside it an edge per tensor it came from, and sizes or strides.
    NODE, EDGE, SIZE = 488, 16, 8

    def __init__(self, heap: GlibcHeap | None):
        super().__init__()
        self.live = self.peak = self.copies = 0
        self.records = False
        self._heap = heap
        self._graph: list[int] = []
        self._sizes: dict[int, int] = {}
        self._watched: set[int] = set()
        self._count_copies = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.records and self._heap is not None:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            lists = (self.EDGE * len(tensors), self.SIZE * max((tensor.ndim for tensor in tensors), default=0))
            self._graph += [self._heap.malloc(size) for size in (self.NODE, *lists) if size]
        result = func(*args, **(kwargs or {}))
        copy = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._watched
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._sizes:
                storage = leaf.untyped_storage()
                size = storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, copy, self._place(size))
                self._resize(storage._cdata, size if self._count_copies or not copy else 0, copy)
        return result

    def watch(self, weights: list[nn.Parameter], copies: bool) -> None:
        """From now on tell apart what is cast from these, and count it or not."""
        self._watched = {weight.untyped_storage()._cdata for weight in weights}
        self._count_copies = copies

    def share(self, tensor: torch.Tensor, shards: int) -> int:
        """Count only one of `shards` parts of a tensor from now on; its bytes."""
        storage = tensor.untyped_storage()
        self._resize(storage._cdata, -(-storage.nbytes() // shards), False)
        return self._sizes[storage._cdata]

    def free_graph(self) -> None:
        """Take away what autograd recorded."""
        for block in self._graph:
            self._heap.free(block)
        self._graph.clear()

    def _place(self, size: int) -> list[int]:
        """Blocks of a storage and its objects, in the order they are freed."""
        if self._heap is None:
            return []
        storage = self._heap.malloc(self.STORAGE)
        data = [self._heap.memalign(size)] if size else []
        tensor, slot, autograd = (self._heap.malloc(part) for part in self.TENSOR)
        return [slot, autograd, *data, storage, tensor]

    def _gone(self, key: int, copy: bool, blocks: list[int]) -> None:
        self._resize(key, None, copy)
        for block in blocks:
            self._heap.free(block)

    def _resize(self, key: int, size: int | None, copy: bool) -> None:
        change = (size or 0) - self._sizes.pop(key, 0)
        if size is not None:
            self._sizes[key] = size
        self.live += change
        self.copies += change if copy else 0
        self.peak = max(self.peak, self.live)
