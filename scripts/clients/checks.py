"""What the clients' checks share: a text, prompts, and how a check is said.

A client's file runs alone, python scripts/clients/peft_lora.py CHECKPOINT, and prints a check a line, as JSON.
"""

import contextlib
import heapq
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, logging


GUIDE = Path(__file__).parents[2] / "docs" / "using.md"
# A module of the standard library, which is on every machine: ordinary Python, with a few characters beyond ASCII.
TEXT = Path(heapq.__file__)
PROMPTS = ("def ", "import os\n\n\nclass Stack:\n    ", "# naïve\n")
NEW_TOKENS = 48
# Tokens seen at once.
WINDOW = 256
LOGITS, TEXTS = "largest difference of a logit", f"of {len(PROMPTS)} texts differ"


class Check(NamedTuple):
    """Two things that have to agree.

    Attributes:
        what: what was done, and what is compared.
        value: how far apart they are.
        limit: how far apart they may be; 0 is not at all.
        unit: what that is a number of.
    """

    what: str
    value: float
    limit: float
    unit: str


def run(check: Callable[[Path, Path], Iterator[Check]]) -> None:
    """Print what `check(checkpoint, an empty folder)` yields. Whatever else is printed goes to stderr."""
    logging.disable_progress_bar()
    checks = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as scratch:
        for found in check(Path(sys.argv[1]).absolute(), Path(scratch)):
            print(json.dumps(found._asdict()), file=checks, flush=True)


def snippet(heading: str) -> str:
    """The Python under a heading of `docs/using.md`."""
    section = GUIDE.read_text("utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


def follow(heading: str, folder: Path, scratch: Path, address: str = "http://localhost:8000") -> Check:
    """Run the snippet under a heading of `docs/using.md` as printed, where `runs/quickstart/model` is the checkpoint.

    One that fails ends its client.

    Args:
        heading: of the guide.
        folder: the checkpoint.
        scratch: the snippet's working directory is made in it.
        address: of the server; the guide's own may be somebody else's.
    """
    place = scratch / "guide"
    (place / "runs" / "quickstart").mkdir(parents=True)
    (place / "runs" / "quickstart" / "model").symlink_to(folder)
    code = snippet(heading).replace("http://localhost:8000", address)
    with contextlib.chdir(place):
        exec(compile(code, f"{GUIDE.name}: {heading}", "exec"), {"__name__": "__main__"})
    return Check("the snippet of docs/using.md, as printed", 0, 0, "of 1 fails")


def load(folder: Path, **how) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The checkpoint's model, ready to be used, by the class of this package; and its tokenizer."""
    # Not above: one client first loads without it.
    from rezero_hf import ReZeroForCausalLM

    return ReZeroForCausalLM.from_pretrained(folder, **how).eval(), AutoTokenizer.from_pretrained(folder)


def windows(tokenizer: PreTrainedTokenizerBase, count: int) -> torch.Tensor:
    """The text's first tokens, (count, WINDOW)."""
    return tokenizer(TEXT.read_text("utf-8"), return_tensors="pt").input_ids[0, : count * WINDOW].view(count, WINDOW)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """(rows, tokens, vocab_size) of a model that is in eval mode."""
    return model(input_ids=ids, use_cache=False).logits


def continued(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """What `generate` writes after a prompt, the most likely token each time."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two tensors."""
    return (one - other).abs().max().item()
