"""What a finished run shows: some of its writing, its numbers, and what to type next."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from .runs import cores


NEXT = """
The model is in {folder}, with its card and figures. Next:
  write text     {bin}/python -c "import rezero_hf; from transformers import pipeline; \
print(pipeline('text-generation', '{folder}')('class ', max_new_tokens=200)[0]['generated_text'])"
  train longer   {bin}/accelerate launch --quiet --num_cpu_threads_per_process {threads} {again}
  publish        {bin}/python {publish} {folder} USER/NAME --push"""


def sample(folder: Path, tokenizer: PreTrainedTokenizerBase, block: torch.Tensor) -> str:
    """The first quarter of a held-out block (tokens,), continued to its length by the published model, which so loads.

    At temperature 0.8: text that is neither the same every time nor all noise.
    """
    given = max(1, len(block) // 4)
    model = AutoModelForCausalLM.from_pretrained(folder)
    new = {"max_new_tokens": max(1, len(block) - given), "do_sample": True, "temperature": 0.8}
    written = tokenizer.decode(model.generate(block[None, :given], **new)[0], skip_special_tokens=True)
    return f"\n--- {given} held-out tokens, continued by the model ---\n{written}\n---\n"


def farewell(folder: Path, results: dict[str, dict[str, Any]], max_steps: int) -> str:
    """Numbers of each split, and commands that work as they stand from the current directory.

    Args:
        folder: the published model.
        results: split -> what `ReZeroTrainer.measure` measured.
        max_steps: of the run; twice as many are suggested.
    """
    lines = [
        f"{split}: {measured['bits_per_byte']:.3f} bits per byte over {measured['bytes']:,} bytes"
        for split, measured in results.items()
    ]
    longer = [word for word in sys.argv[1:] if not word.startswith("training.max_steps=")]
    again = shlex.join([sys.argv[0], *longer, f"training.max_steps={2 * max_steps}"])
    where, bin = os.path.relpath(folder), os.path.relpath(Path(sys.executable).parent)
    publish = shlex.quote(str(Path(sys.argv[0]).with_name("publish.py")))
    return "\n".join(lines) + "\n" + NEXT.format(folder=where, bin=bin, threads=cores(), again=again, publish=publish)
