"""Let a language model write: PROMPT and what it makes of it go to the terminal word by word.

    python scripts/generate.py runs/quickstart/model "def main("
    printf 'class Stack' | python scripts/generate.py runs/quickstart/model --temperature 0

MODEL is a folder, or ORG/NAME[@REVISION] on the Hub: a causal language model of any architecture in Transformers, none
of whose code is run. Only text goes to stdout. The prompt is taken as it is, also its line ends (echo adds one). Ctrl-C
ends it with what there is.
"""

import os
import sys
from typing import Annotated

import torch
import typer
from transformers import TextStreamer, set_seed

from rezero_hf.cli import run
from rezero_hf.errors import UserError
from rezero_hf.opening import open_model, tokenizer_of


# 128 + SIGINT, as shells report it.
INTERRUPTED = 130


def main(
    *,
    model: Annotated[str, typer.Argument(help="a folder, or ORG/NAME[@REVISION] on the Hub")],
    prompt: Annotated[str | None, typer.Argument(help="how the text begins; - or nothing reads what is piped")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="write at most so many")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token every time")] = 0.8,
    top_p: Annotated[float, typer.Option("--top-p", help="draw from the most likely tokens of this share")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="fix the random draw")] = None,
) -> None:
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {temperature}: must be a finite number, 0 or more.")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p}: must be above 0 and at most 1.")
    piped = prompt == "-" or (prompt is None and not sys.stdin.isatty())
    try:
        prompt = (sys.stdin.buffer.read() if piped else os.fsencode(prompt or "")).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8 text ({error}).") from error
    opened = open_model(model)
    tokenizer = tokenizer_of(opened)
    if opened.task != "causal-lm":
        raise UserError(
            f"{model} holds {type(opened.model).__name__}, which names classes; a language model is needed."
        )
    # What looks like the name of a special token is text.
    inputs = tokenizer(prompt, split_special_tokens=True, return_tensors="pt", return_token_type_ids=False)
    if not inputs["input_ids"].numel():
        begin = tokenizer.bos_token or tokenizer.eos_token
        if begin is None:
            raise UserError(f"{model}: no prompt, and its tokenizer has no token that begins a text; give a PROMPT.")
        print(f"no prompt: it begins a text of its own, after {begin}", file=sys.stderr)
        inputs = tokenizer(begin, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
    given = inputs["input_ids"].shape[1]
    room = max_new_tokens if opened.positions is None else opened.positions - given
    if room < 1:
        raise UserError(
            f"{model}: the prompt's {given} tokens fill its {opened.positions} positions; shorten the prompt."
        )
    if room < max_new_tokens:
        print(f"{room} tokens at most: it has positions for {opened.positions}, prompt included", file=sys.stderr)

    def finite(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(scores.max() / (temperature or 1)):
            raise UserError(f"{model}: the model's logits are not finite at --temperature {temperature}.")
        return scores

    if seed is not None:
        set_seed(seed)
    drawing = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    # It holds a word back until it is over, and with it characters whose last bytes are still to come.
    streamer = TextStreamer(tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    try:
        opened.model.generate(
            **inputs.to(opened.model.device),
            max_new_tokens=min(room, max_new_tokens),
            num_beams=1,
            logits_processor=[finite],
            streamer=streamer,
            **(drawing if temperature else {"do_sample": False}),
        )
    except KeyboardInterrupt:
        streamer.end()
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    run(main)
