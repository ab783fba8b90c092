"""Measure a finished model: bits per byte, perplexity, accuracy and loss on held-out text; of classes, the last two.

    python scripts/evaluate_model.py runs/quickstart/model
    python scripts/evaluate_model.py runs/quickstart/model 'notes/**/*.txt' --split all --stride 64
    python scripts/evaluate_model.py ORG/NAME@REVISION hub:ORG/TEXT --output result.json
    python scripts/evaluate_model.py runs/finetuned/model reviews.csv --text-column review --label-column stars

MODEL is a folder or a repository of the Hub: a causal language model of any architecture in Transformers, with a
byte-level tokenizer, or a classifier of rezero_hf, of texts, words or images. None of its code is run. DATA is what
finetune.py takes for such a model, split as there, or a recipe; without it, what the model was trained on, as long as
that is still the same here.

Text is measured in one of two ways. Blockwise (default), as training does: blocks of --window tokens side by side, each
seen alone, so its first token is predicted from the one before it and nothing else. Sliding (--stride below --window):
blocks overlap, and after the first of a source every token is predicted from at least window - stride + 1 before it.
Both score every token, and so every byte, exactly once; the first token of a source is predicted from the separator.
"""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rezero_hf.cli import result_file, run
from rezero_hf.durable import write_whole
from rezero_hf.errors import UserError
from rezero_hf.evaluation import evaluate_images, evaluate_labels, evaluate_text, keep, why_not_kept
from rezero_hf.evaluation_data import data_for
from rezero_hf.markdown import number, table
from rezero_hf.opening import open_model
from rezero_hf.runs import now, provenance


Split = StrEnum("Split", ["validation", "test", "train", "all"])


def main(
    *,
    model: Annotated[str, typer.Argument(help="a folder, or ORG/NAME[@REVISION] on the Hub")],
    data: Annotated[str | None, typer.Argument(help="text, rows or images, as for finetune.py, or a recipe")] = None,
    split: Annotated[
        list[Split] | None, typer.Option(help="any number of times; all is all text in one number [validation, test]")
    ] = None,
    window: Annotated[int | None, typer.Option(min=2, help="tokens seen at once [the recipe's block size]")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="tokens from block to block [the window]")] = None,
    text_column: Annotated[str | None, typer.Option("--text-column", help="[text, or tokens for tags]")] = None,
    label_column: Annotated[str | None, typer.Option("--label-column", help="[label, or tags]")] = None,
    config_name: Annotated[str | None, typer.Option("--config-name", help="configuration of a Hub data set")] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a Hub data set")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="blocks, rows or images at once")] = 8,
    cache_dir: Annotated[str | None, typer.Option("--cache-dir", help="where prepared data live")] = None,
    output: Annotated[Path | None, typer.Option(help="where the record goes too, as JSON")] = None,
) -> None:
    # Measuring takes long, so whether its result has a place comes first.
    if output is not None:
        output = result_file(output, "--output")
    opened = open_model(model)
    if reason := why_not_kept(opened):
        print(f"will not be kept beside the model: {reason}" + ("" if output else " (--output FILE keeps it)"))
    splits = list(dict.fromkeys(map(str, split or [Split.validation, Split.test])))
    record = provenance(opened.model.device)
    said = {"text_column": text_column, "label_column": label_column, "config_name": config_name, "revision": revision}
    source, fingerprint = data_for(opened, data, cache_dir, **{name: value for name, value in said.items() if value})
    if opened.task == "causal-lm":
        record |= evaluate_text(opened, source, splits, window, stride, batch_size, fingerprint)
        what = f"{record['way']}, windows of {record['window']} tokens, one every {record['stride']}"
    elif not opened.of_images and stride:
        raise UserError("--stride is for language models; of rows each is measured once, alone.")
    elif not opened.of_images:
        record |= evaluate_labels(opened, source, splits, window, batch_size, fingerprint)
        what = f"{record['way']}, of {record['window']} tokens at most"
    elif window or stride or Split.all in splits:
        raise UserError("--window, --stride and --split all are for text; images are measured one by one.")
    else:
        record |= evaluate_images(opened, source, splits, batch_size, fingerprint)
        what = "images"
    record |= {"model": model, "commit": opened.commit, "finished": now(), "precision": str(opened.model.dtype)}
    print(f"{model} on {', '.join(record['source'])}: {what}")
    columns = list(next(iter(record["results"].values())))
    rows = [[split, *(number(found[column]) for column in columns)] for split, found in record["results"].items()]
    print(table(("split", *(column.replace("_", " ") for column in columns)), rows))
    if output is not None:
        write_whole(output, json.dumps(record, indent=2) + "\n")
    if not reason:
        keep(opened, record)
        print(f"kept in {opened.folder / 'run.json'}, and shown by the card beside it")


if __name__ == "__main__":
    run(main)
