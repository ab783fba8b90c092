"""Pretrain a ReZero language model from a recipe, and leave a folder that can go to the Hub as it is.

python scripts/pretrain.py scripts/recipes/quickstart.yaml [training.seed=1 ...]

A run that was interrupted goes on with the same command. --dry-run says what a run needs, and trains nothing.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from transformers import set_seed

from rezero_hf.arguments import sequences_per_step
from rezero_hf.blocks import EvalBlocks, TrainBlocks, held_out_blocks
from rezero_hf.checkpoints import fetch_checkpoint
from rezero_hf.cli import run
from rezero_hf.data import prepare
from rezero_hf.durable import write_whole
from rezero_hf.errors import UserError, refused
from rezero_hf.export import export_folder, rescue
from rezero_hf.farewell import farewell, sample
from rezero_hf.launching import LaunchReport, asks_for_fsdp, check_launch
from rezero_hf.licences import license_there
from rezero_hf.planning import describe, make_plan
from rezero_hf.recipe import load_language_recipe
from rezero_hf.rehearsal import rehearse
from rezero_hf.run_folder import check_goes_on, claim_run_dir, is_interrupted
from rezero_hf.runs import now, provenance, read_metrics
from rezero_hf.starting import InitFrom, begin
from rezero_hf.together import everywhere, on_main
from rezero_hf.tokenization import load_tokenizer, token_byte_lengths
from rezero_hf.training import ReZeroTrainer, training_steps
from rezero_hf.watch import PREEMPTED, NotFiniteError


def main(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the recipe")] = None,
    output: Annotated[Path | None, typer.Option(help="the run's folder (default runs/NAME)")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="the recipe's version of a few CPU seconds")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="move an interrupted run aside and begin anew")] = False,
    resume_from: Annotated[
        str | None, typer.Option(help="in an empty run folder: checkpoint folder, or ORG/NAME[@REVISION] on the Hub")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what the run needs; train nothing")] = False,
    mfu: Annotated[float, typer.Option(help="with --dry-run: model FLOPs utilisation to expect")] = 0.4,
    devices: Annotated[
        int | None, typer.Option(min=1, help="with --dry-run: number of devices, instead of this launch's")
    ] = None,
    shards: Annotated[int, typer.Option(min=1, help="with --dry-run: devices that share the weights under FSDP")] = 1,
    device: Annotated[str | None, typer.Option(help="with --dry-run: cpu or cuda, instead of what is here")] = None,
):
    started = time.perf_counter()
    check_launch()
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu}: must be above 0 and at most 1.")
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device}: take cpu or cuda.")
    asked = {"mfu": mfu != 0.4, "devices": devices is not None, "shards": shards != 1, "device": device is not None}
    if not dry_run and any(asked.values()):
        name = next(name for name, given in asked.items() if given)
        raise UserError(f"--{name} goes with --dry-run; a run has the devices that it is launched on.")
    plan = load_language_recipe(recipe, overrides or (), smoke)
    output = (output or Path("runs") / plan.name).expanduser()
    if resume_from is not None and output.resolve() in Path(resume_from).expanduser().resolve().parents:
        raise UserError(
            f"--resume-from {resume_from} lies in {output}: an interrupted run there goes on without it; to go on with "
            "a finished one, choose another folder with --output."
        )
    args = plan.training_arguments(output / "checkpoints")
    main_process = args.process_index == 0
    record = provenance(args.device)
    set_seed(args.seed)

    # Everything that can be wrong with the request shows before the run's folder is made.
    tokenizer = load_tokenizer(plan.data.tokenizer)
    token_bytes = token_byte_lengths(tokenizer)
    config = plan.model_config(tokenizer)
    resolved = plan.resolved(config)
    # A run that goes on has its own weights, and may outlive those it began with.
    has_weights = resume_from is not None or (not restart and on_main(lambda: is_interrupted(output)))
    sharded = asks_for_fsdp(args)
    init_from = InitFrom() if has_weights else plan.init_from
    if dry_run:
        if init_from.path is not None:
            begin(init_from, config, args.optimizer, tokenizer, sharded)
        if main_process:
            steps, looked = args.max_steps, ""
            if steps < 1:
                steps = training_steps(args, prepare(plan.data, tokenizer))
            else:
                looked = "; the text was not looked at, which scripts/prepare_data.py does"
            rehearse(plan, config)
            planned = make_plan(config, args, plan.data.block_size, steps, devices, shards, device)
            print(describe(planned, mfu))
            if planned.peak is None:
                print("time    no device's peak is known; training.peak_flops, its FLOP/s, would tell")
            print(f"a rehearsal of one step with these words went well{looked}")
        return
    # Whoever comes second waits for the lock of the first, which no collective times out on.
    prepared = prepare(plan.data, tokenizer, progress=main_process)
    first = on_main(lambda: prepared.fingerprint)
    way_out = "every process has to read the same text"
    everywhere(lambda: prepared.verify(args.process_index, args.world_size, first), way_out)
    prepared.check_vocab(config.vocab_size)
    args.max_steps = training_steps(args, prepared)
    blocks_per_step = sequences_per_step(args)
    train_blocks = TrainBlocks(prepared, args.seed, args.max_steps * blocks_per_step)
    eval_blocks = EvalBlocks(prepared, "validation", args.eval_blocks)
    held_out = held_out_blocks(prepared, args.final_eval_blocks)
    model, optimizer_state, begins_from = begin(init_from, config, args.optimizer, tokenizer, sharded)
    record |= {
        "name": plan.name,
        "recipe_file": str(recipe),
        "overrides": overrides or [],
        "smoke": smoke,
        "world_size": args.world_size,
        "seed": args.seed,
        "parameters": model.num_parameters(),
        "tokens": args.max_steps * blocks_per_step * plan.data.block_size,
        "data": prepared.record(),
    }
    if plan.init_from.path is not None:
        record |= {"init_from": asdict(plan.init_from), "license": license_there(plan.init_from.path)}

    # Its lock is held for as long as this process lives.
    claimed = []
    aside, goes_on = on_main(lambda: claimed.append(claim_run_dir(output, resolved, restart)) or claimed[0][1:3])
    if has_weights and resume_from is None and not goes_on:
        now_in = f" and is kept in {os.path.relpath(aside)}" if aside else ""
        raise UserError(f"{output}: the run there ended meanwhile{now_in}; the same command again begins another")
    if resume_from is not None and not goes_on:
        fits = partial(check_goes_on, recipe=resolved)
        fetch = partial(fetch_checkpoint, resume_from, output / "checkpoints", fits)
        everywhere(fetch, "no process can begin without it")
        goes_on = True
    with refused(f"{recipe}: training"):
        trainer = ReZeroTrainer(
            model,
            args,
            train_dataset=train_blocks,
            eval_dataset=eval_blocks,
            processing_class=tokenizer,
            token_bytes=token_bytes,
            run_dir=output,
            run=record,
            recipe_text=resolved,
            optimizer_state=optimizer_state,
        )
    # The optimiser alone is to hold it from here on.
    del optimizer_state
    # The model that is exported at the end takes the place of what then still waits.
    trainer.waits_for_pushes = False
    if main_process:
        print(f"{plan.name}: on {record['device']}")
        if begins_from:
            print(begins_from)
        if aside:
            print(f"an earlier run is kept in {os.path.relpath(aside)}")
    trainer.add_callback(LaunchReport(trainer, plan.data.block_size))
    try:
        trained = trainer.train(resume_from_checkpoint=goes_on)
    except NotFiniteError as error:
        raise UserError(f"{error} The same command goes on from the last checkpoint.") from error
    training_seconds = trainer.throughput.seconds()
    if trainer.told_to_stop:
        if main_process:
            print(f"told to stop: saved at step {trained.global_step} of {args.max_steps}; the same command goes on")
        sys.exit(PREEMPTED)

    # Under FSDP all processes give up their shards for the export.
    whole = trainer.accelerator.get_state_dict(trainer.model)
    with rescue(model, tokenizer, output / "rescued-model", whole):
        results = {split: trainer.measure(blocks) for split, blocks in held_out.items()}
        if not main_process:
            return
        record |= {
            "finished": now(),
            "wall_seconds": round(time.perf_counter() - started, 1),
            "training_seconds": training_seconds,
            **trainer.energy.record(),
            "results": results,
        }
        metrics = read_metrics(output / "metrics.jsonl")
        export_folder(
            model, tokenizer, output / "model", run=record, metrics=metrics, recipe_text=resolved, state_dict=whole
        )
        # The mark of a finished run, so it comes last.
        write_whole(output / "run.json", json.dumps(record, indent=2) + "\n")

    print(sample(output / "model", tokenizer, eval_blocks[0]["input_ids"]))
    print(farewell(output / "model", results, args.max_steps))
    if trainer.pushes is not None:
        print(trainer.pushes.finish(output / "model", args.max_steps))


if __name__ == "__main__":
    run(main)
