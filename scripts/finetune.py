"""Fine-tune a ReZero model on text, labelled text, tagged words or images, and leave a folder that loads anywhere.

    python scripts/finetune.py runs/quickstart/model notes/ --task causal-lm
    python scripts/finetune.py runs/quickstart/model reviews.csv --lora 8 training.learning_rate=1.0e-3
    python scripts/finetune.py ORG/NAME@REVISION hub:ORG/TAGS --task token-classification --gates held

MODEL is a folder or a repository of the Hub; none of its code is run. DATA is a file of rows (.csv, .json, .jsonl,
.parquet), a folder of them, hub:ORG/NAME, or on every machine stdlib-functions (sequences) and digits (images); for
causal-lm also text as data.sources names it. A validation or test split that is not there is taken from the rest.
training.KEY=value sets any of Trainer's arguments, and those of ReZeroTrainingArguments, as in a recipe.
"""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from transformers import set_seed

from rezero_hf.arguments import sequences_per_step
from rezero_hf.cli import run
from rezero_hf.durable import write_whole
from rezero_hf.errors import UserError, refused
from rezero_hf.export import export_folder, rescue
from rezero_hf.finetuning import add_lora, check_gates, check_lora, find_base, hold_gates, load_base, read_task
from rezero_hf.launching import check_launch
from rezero_hf.licences import license_there
from rezero_hf.markdown import number, table
from rezero_hf.optim import gates as gates_of
from rezero_hf.recipe import script_arguments
from rezero_hf.run_folder import check_empty, new_folder
from rezero_hf.runs import now, provenance, read_metrics
from rezero_hf.tasks import TASKS, TaskConfig
from rezero_hf.together import on_main
from rezero_hf.training import ReZeroTrainer, steps_over
from rezero_hf.watch import PREEMPTED, NotFiniteError


Name = StrEnum("Name", list(TASKS))
Gates = StrEnum("Gates", ["trained", "held"])
# About a tenth of what pretraining takes, and more for adapters, which start at 0; three passes, linear decay.
DEFAULTS = {"learning_rate": 3e-4, "num_train_epochs": 3.0, "eval_strategy": "steps", "eval_steps": 0.1}
DEFAULTS |= {"save_strategy": "no", "warmup_steps": 0.05, "seed": 0}
LORA_RATE = 1e-3


def main(
    *,
    model: Annotated[str, typer.Argument(help="a folder, or ORG/NAME[@REVISION] on the Hub")],
    data: Annotated[str, typer.Argument(help="rows: a file, a folder, hub:ORG/NAME, stdlib-functions, digits")],
    overrides: Annotated[list[str] | None, typer.Argument(help="training.KEY=value")] = None,
    task: Annotated[Name, typer.Option(help="what to learn")] = Name["sequence-classification"],
    text_column: Annotated[str | None, typer.Option("--text-column", help="[text, or tokens for tags]")] = None,
    label_column: Annotated[str | None, typer.Option("--label-column", help="[label, or tags]")] = None,
    config_name: Annotated[str | None, typer.Option("--config-name", help="configuration of a Hub data set")] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a Hub data set")] = None,
    block_size: Annotated[int, typer.Option("--block-size", min=2, help="tokens of a row at most")] = 256,
    lora: Annotated[
        int | None, typer.Option(min=1, help="train adapters of this rank and a new head (gates with --gates trained)")
    ] = None,
    gates: Annotated[Gates | None, typer.Option(help="train or hold the gates [trained; held with --lora]")] = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="MODEL's configuration, random weights")] = False,
    output: Annotated[Path, typer.Option(help="the run's folder, new")] = Path("runs/finetuned"),
    license: Annotated[str | None, typer.Option(help="licence of the model, e.g. mit [MODEL's]")] = None,
    cache_dir: Annotated[str | None, typer.Option("--cache-dir", help="where prepared data live")] = None,
) -> None:
    check_launch()
    output = output.expanduser()
    rate = {} if lora is None else {"learning_rate": LORA_RATE}
    args = script_arguments(output / "checkpoints", DEFAULTS | rate, overrides or ())
    if lora is not None:
        check_lora(args, from_scratch)
    on_main(lambda: check_empty(output))
    base = find_base(model, task)
    about = TaskConfig(task, data, text_column, label_column, config_name, revision)
    rows = read_task(base, about, args, block_size, cache_dir)
    args.max_steps = steps_over(args, rows.rows)
    train_rows = rows.train(args.seed, args.max_steps * sequences_per_step(args))
    set_seed(args.seed)
    network = load_base(base, task, rows.id2label, from_scratch)
    if gates is not None:
        check_gates(network)
    has_gates = bool(gates_of(network))
    # Of what is exported, into which adapters are merged.
    parameters = network.num_parameters()
    if lora is not None:
        network = add_lora(network, task, lora, gates == Gates.trained, base.commit)
    elif gates == Gates.held:
        hold_gates(network)
    on_main(lambda: new_folder(output))
    record = provenance(args.device) | {
        "name": output.name,
        "task": str(task),
        "data": rows.record,
        "seed": args.seed,
        "parameters": parameters,
        "trained_parameters": network.num_parameters(only_trainable=True),
        "lora": lora,
        "gates": (gates or (Gates.held if lora else Gates.trained)) if has_gates else None,
        "license": license or (None if from_scratch else license_there(base.folder)),
    }
    if not from_scratch:
        record["init_from"] = {"path": model, "commit": base.commit}
    words = {"train_dataset": train_rows, "processing_class": rows.processor, **rows.words}
    with refused("training"):
        trainer = ReZeroTrainer(network, args, run_dir=output, run=record, **words)
    # The model that is exported at the end takes the place of what then still waits.
    trainer.waits_for_pushes = False
    try:
        trainer.train()
    except NotFiniteError as error:
        raise UserError(f"{error} Nothing is exported; begin anew, with another --output.") from error
    record |= {"finished": now(), "training_seconds": trainer.throughput.seconds(), **trainer.energy.record()}
    main_process = trainer.is_world_process_zero()
    if trainer.told_to_stop:
        if main_process:
            step = f"step {trainer.state.global_step} of {args.max_steps}"
            print(f"told to stop at {step}: nothing is exported; begin anew, with another --output")
        sys.exit(PREEMPTED)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if lora is not None:
        if main_process:
            trained.save_pretrained(output / "adapter", save_embedding_layers=False)
        # What is measured is what is exported.
        trained = trainer.model = trainer.model_wrapped = trained.merge_and_unload()
    with rescue(trained, rows.processor, output / "rescued-model"):
        record["results"] = {split: trainer.measure(held_out) for split, held_out in rows.held_out.items()}
        if not main_process:
            return
        metrics = read_metrics(output / "metrics.jsonl")
        export_folder(trained, rows.processor, output / "model", run=record, metrics=metrics)
        write_whole(output / "run.json", json.dumps(record, indent=2) + "\n")

    columns = list(next(iter(record["results"].values())))
    lines = [[split, *(number(found[name]) for name in columns)] for split, found in record["results"].items()]
    print(table(("split", *(name.replace("_", " ") for name in columns)), lines))
    print(f"The model is in {output / 'model'}. Next:\n  {next_command(task, output / 'model')}")
    if trainer.pushes is not None:
        print(trainer.pushes.finish(output / "model", args.max_steps))


def next_command(task: str, folder: Path) -> str:
    """How to use what was made."""
    if task == "causal-lm":
        return f'python scripts/generate.py {folder} "def "'
    what = "'IMAGE.png'" if task == "image-classification" else "'def close(self):'"
    use = f"print(pipeline('{TASKS[task].pipeline}', '{folder}')({what}))"
    if task == "token-classification":
        # The pipeline names a class at every token, and only that of a word's last was trained.
        found = f"pipeline('{TASKS[task].pipeline}', '{folder}', ignore_labels=[])(text)"
        last = "not text[each['end']:each['end'] + 1].strip()"
        use = f"text = {what}; print([(text[:each['end']].split()[-1], each['entity']) for each in {found} if {last}])"
    return f'python -c "import rezero_hf; from transformers import pipeline; {use}"'


if __name__ == "__main__":
    run(main)
