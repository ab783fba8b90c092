"""Measure what a layer costs as a network gets deeper: time and memory of a training step, beside its products alone.

python scripts/measure_depth.py [--only LM] [--output depth.json]

A process for each depth, in which the step (forward, backward, update) and its products take turns: `torch.mm` on the
step's matrices, forward and backward, and nothing else. The clock is the time that one thread had its core, so what
else the machine does hardly shows.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel, set_seed

from rezero_hf import ReZeroConfig, ReZeroForCausalLM, ReZeroMLPConfig, ReZeroMLPForImageClassification
from rezero_hf.benchmark_cases import matrices, peak_allocation, step_products
from rezero_hf.benchmarks import alone
from rezero_hf.cli import result_file, run
from rezero_hf.durable import write_whole
from rezero_hf.errors import UserError
from rezero_hf.runs import provenance
from rezero_hf.strict import check_names
from rezero_hf.turns import by_turns


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Family:
    """Nets of one kind: how one of a depth is made, what it is fed, and as how many rows that goes through a layer."""

    build: Callable[[int], PreTrainedModel]
    batch: Callable[[], dict[str, torch.Tensor]]
    rows: int
    depths: tuple[int, ...]


def language_model(depth: int) -> PreTrainedModel:
    words = {"vocab_size": 320, "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 64}
    return ReZeroForCausalLM(ReZeroConfig(num_hidden_layers=depth, **words))


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(320, (4, 64))
    return {"input_ids": ids, "labels": ids}


def fully_connected(depth: int) -> PreTrainedModel:
    """As wide as the study `mlp_10000`."""
    return ReZeroMLPForImageClassification(ReZeroMLPConfig(num_hidden_layers=depth, hidden_size=150, num_labels=10))


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(128, 3, 32, 32), "labels": torch.randint(10, (128,))}


FAMILIES = {
    "LM": Family(language_model, tokens, 4 * 64, (10, 100, 1000)),
    "MLP": Family(fully_connected, images, 128, (100, 1000, 10000)),
}


class Net:
    """A net at work: one step, and its products."""

    def __init__(self, family: Family, depth: int):
        set_seed(0)
        self.model, self.batch = family.build(depth).train(), family.batch()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.products = step_products(matrices(self.model), family.rows)

    def step(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds(action: Callable[[], Any]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def measure(name: str, depth: int, budget: float) -> dict[str, Any]:
    """One depth, in this process."""
    torch.set_num_threads(1)
    net = Net(FAMILIES[name], depth)
    costs = by_turns(
        {"step": partial(seconds, net.step), "products": partial(seconds, net.products)}, budget, warm_up=2
    )
    taken = {what: median(each) for what, each in costs.items()}
    return {
        "family": name,
        "layers": depth,
        **taken,
        "turns": len(costs["step"]),
        "peak": peak_allocation(net.step, CPU),
    }


def main(
    only: Annotated[str | None, typer.Option(help="LM or MLP")] = None,
    budget: Annotated[float, typer.Option("--seconds", min=0, help="of a depth's turns, after which none begins")] = 20,
    output: Annotated[Path | None, typer.Option(help="where the numbers go as JSON")] = None,
    case: Annotated[str | None, typer.Option(hidden=True)] = None,
):
    if case is not None:
        name, depth = case.split(":")
        print(json.dumps(measure(name, int(depth), budget)))
        return
    output = output and result_file(output, "--output")
    if only is not None:
        check_names([only], FAMILIES, "--only: family")
    # torch's profiler tells when it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    rows = []
    print("| net | layers | ms a layer | KiB a layer | step / products alone |")
    print("| --- | --- | --- | --- | --- |")
    for name in [only] if only else FAMILIES:
        for depth in FAMILIES[name].depths:
            words = ["--case", f"{name}:{depth}", "--seconds", str(budget)]
            found, failed = alone([sys.executable, __file__, *words])
            if failed:
                raise UserError(f"{name} of {depth} layers could not be measured: {failed}")
            rows.append(row := found[-1])
            numbers = [1e3 * row["step"] / depth, row["peak"] / depth / 1024, row["step"] / row["products"]]
            print("| {} | {:,} | {:.3f} | {:,.0f} | {:.2f} |".format(name, depth, *numbers), flush=True)
            if output:
                write_whole(output, json.dumps({**provenance(CPU), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
