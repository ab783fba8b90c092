"""One real optimiser step of a small model with a recipe's own words, so that an error in them shows before a run."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from .errors import UserError, one_line
from .launching import outside_the_launch
from .models import ReZeroConfig, ReZeroForCausalLM
from .recipe import Recipe, load_recipe
from .training import ReZeroTrainer


SMALL_MODEL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Small, alone on a CPU, and leaving nothing behind.
SMALL_RUN = {
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "global_batch_size": None,
    "fp16": False,
    "tf32": None,
    "torch_compile": False,
    # Either of them switches it on again.
    "torch_compile_backend": None,
    "torch_compile_mode": None,
    "fsdp": None,
    "fsdp_config": None,
    "deepspeed": None,
    "parallelism_config": None,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": None,
    "dataloader_persistent_workers": False,
    "report_to": "none",
    "disable_tqdm": True,
    "push_to_hub": False,
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
}


class RandomTokens(Dataset):
    """Items as in `TrainBlocks`, of tokens drawn from the item's number."""

    def __init__(self, vocab_size: int, block_size: int, num_blocks: int):
        self._vocab_size, self._block_size, self._num_blocks = vocab_size, block_size, num_blocks

    def __len__(self) -> int:
        return self._num_blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(self._vocab_size, (self._block_size + 1,), generator=generator)
        return {"input_ids": tokens[:-1], "labels": tokens[:-1].clone(), "shift_labels": tokens[1:].clone()}


def rehearse(recipe: Recipe, config: ReZeroConfig) -> None:
    """Train a shrunken model of the recipe's words for one step on random tokens; takes about ten seconds.

    Optimiser, schedule, precision (fp16 as bf16, which CPUs have), checkpointing and accumulation (2 passes) are the
    recipe's; what needs other processes, a GPU, a compiler, a tracker or the Hub is left out. It happens in another
    process and a temporary folder, so the caller's random numbers and distributed state stay as they are.

    Args:
        recipe: what to rehearse.
        config: its model's configuration, `recipe.model_config(tokenizer)`.

    Raises:
        UserError: the step failed; one line with the reason.
    """
    environment = outside_the_launch()
    environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.yaml").write_text(recipe.resolved(config), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", f"from {__name__} import _rehearse_here; _rehearse_here()"],
            capture_output=True,
            env=environment,
            cwd=folder,
            check=False,
        )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with {done.returncode}"]
        raise UserError(f"{recipe.path}: a rehearsal of one step failed: {said[-1]}")


def _rehearse_here() -> None:
    """The rehearsal, in the process and folder made for it; a failure's one line is the last on stderr."""
    recipe = load_recipe("recipe.yaml")
    config = ReZeroConfig(**recipe.model)
    grouped = config.num_key_value_heads < config.num_attention_heads
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1 if grouped else 2}
    small = ReZeroConfig.from_dict({**config.to_dict(), **SMALL_MODEL, **heads})
    # The schedule is the whole run's, of which one step is taken; passes over an unknown text become 100 steps.
    steps = max(recipe.training.get("max_steps", -1), -1)
    halves = bool(recipe.training.get("bf16") or recipe.training.get("fp16"))
    recipe.training |= {**SMALL_RUN, "bf16": halves, "max_steps": steps if steps > 0 else 100}
    try:
        trainer = ReZeroTrainer(
            ReZeroForCausalLM(small),
            recipe.training_arguments("out"),
            train_dataset=RandomTokens(small.vocab_size, small.max_position_embeddings, 8),
            token_bytes=np.ones(small.vocab_size, dtype=np.int64),
            callbacks=[_OneStep()],
        )
        trainer.train()
    except UserError as error:
        sys.exit(str(error).removeprefix(f"{recipe.path}: "))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {one_line(error, None)}")


class _OneStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True
