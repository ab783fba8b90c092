"""Pretrain a ReZero language model from a recipe, and leave a folder that can go to the Hub as it is.

accelerate launch --quiet scripts/pretrain.py scripts/recipes/quickstart.yaml [training.seed=1 ...]
"""

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import set_seed

from rezero_hf.checkpoints import export_folder, rescue
from rezero_hf.cli import run
from rezero_hf.data import SPLITS, EvalBlocks, TrainBlocks, prepare
from rezero_hf.errors import UserError
from rezero_hf.models import ReZeroForCausalLM
from rezero_hf.recipe import load_recipe
from rezero_hf.runs import cores, new_run_dir, now, provenance, read_metrics
from rezero_hf.tokenization import load_tokenizer, token_byte_lengths
from rezero_hf.training import ReZeroTrainer, sequences_per_step, training_steps


NEXT = """
The model is in {folder}, with its card and figures. Next:
  write text     {bin}/python -c "import rezero_hf; from transformers import pipeline; \
print(pipeline('text-generation', '{folder}')('class ', max_new_tokens=200)[0]['generated_text'])"
  train longer   {bin}/accelerate launch --quiet --num_cpu_threads_per_process {threads} {again}
  publish        {bin}/hf upload USER/NAME {folder}"""


def main(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the recipe")] = None,
    output: Annotated[Path | None, typer.Option(help="the run's folder (default runs/NAME)")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="the recipe's version of a few CPU seconds")] = False,
):
    started = time.perf_counter()
    plan = load_recipe(recipe, overrides or (), smoke)
    output = output or Path("runs") / plan.name
    args = plan.training_arguments(output / "checkpoints")
    record = provenance(args.device)
    set_seed(args.seed)

    # Everything that can be wrong with the request shows before the run's folder is made.
    tokenizer = load_tokenizer(plan.data.tokenizer)
    token_bytes = token_byte_lengths(tokenizer)
    config = plan.model_config(tokenizer)
    resolved = plan.resolved(config)
    with args.main_process_first(desc="preparing data"):
        prepared = prepare(plan.data, tokenizer)
        if args.process_index == 0:
            prepared.verify()
    prepared.check_vocab(config.vocab_size)
    args.max_steps = training_steps(args, prepared)
    blocks_per_step = sequences_per_step(args)
    train_blocks = TrainBlocks(prepared, args.seed, args.max_steps * blocks_per_step)
    eval_blocks = EvalBlocks(prepared, "validation", args.eval_blocks)
    held_out = {
        split: EvalBlocks(prepared, split, args.final_eval_blocks)
        for split in SPLITS
        if split != "train" and prepared.totals(split)["tokens"]
    }
    model = ReZeroForCausalLM(config)

    if args.process_index == 0:
        run_dir = new_run_dir(output)
        (output / "recipe.yaml").write_text(resolved, encoding="utf-8")
    try:
        trainer = ReZeroTrainer(
            model,
            args,
            train_dataset=train_blocks,
            eval_dataset=eval_blocks,
            processing_class=tokenizer,
            token_bytes=token_bytes,
            run_dir=output,
        )
    except (RuntimeError, ImportError) as error:
        raise UserError(f"{recipe}: training: {error}") from error
    tokens_per_step = blocks_per_step * plan.data.block_size
    if args.process_index == 0:
        size = f"{model.num_parameters():,} parameters"
        print(f"{plan.name}: {size}, {args.max_steps:,} steps of {tokens_per_step:,} tokens")
        print(f"on {record['device']}, {args.world_size} process(es), {'bf16' if args.bf16 else 'fp32'}")
        if args.use_cpu and torch.get_num_threads() < cores() // args.world_size:
            print(f"using {torch.get_num_threads()} thread(s); more: accelerate launch --num_cpu_threads_per_process N")
        if run_dir.aside:
            print(f"an earlier run is kept in {os.path.relpath(run_dir.aside)}")
    trained = trainer.train()

    with rescue(model, tokenizer, output / "rescued-model"):
        results = {split: trainer.evaluate_text(blocks) for split, blocks in held_out.items()}
        if args.process_index != 0:
            return
        record |= {
            "name": plan.name,
            "recipe_file": str(recipe),
            "overrides": overrides or [],
            "smoke": smoke,
            "finished": now(),
            "wall_seconds": round(time.perf_counter() - started, 1),
            "training_seconds": trained.metrics["train_runtime"],
            "world_size": args.world_size,
            "seed": args.seed,
            "parameters": model.num_parameters(),
            "tokens": args.max_steps * tokens_per_step,
            "data": prepared.record(),
            "results": results,
        }
        (output / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        metrics = read_metrics(output / "metrics.jsonl")
        export_folder(model, tokenizer, output / "model", run=record, metrics=metrics, recipe_text=resolved)

    given = max(1, plan.data.block_size // 4)
    prompt = eval_blocks[0]["input_ids"][None, :given].to(model.device)
    new = {"max_new_tokens": max(1, plan.data.block_size - given), "do_sample": True, "temperature": 0.8}
    written = tokenizer.decode(model.eval().generate(prompt, **new, use_cache=True)[0], skip_special_tokens=True)
    print(f"\n--- {given} held-out tokens, continued by the model ---\n{written}\n---\n")
    for split, measured in results.items():
        print(f"{split}: {measured['bits_per_byte']:.3f} bits per byte over {measured['bytes']:,} bytes")
    longer = [word for word in sys.argv[1:] if not word.startswith("training.max_steps=")]
    again = shlex.join([sys.argv[0], *longer, f"training.max_steps={2 * args.max_steps}"])
    folder, bin = os.path.relpath(output / "model"), os.path.relpath(Path(sys.executable).parent)
    print(NEXT.format(folder=folder, bin=bin, threads=cores(), again=again))


if __name__ == "__main__":
    run(main)
