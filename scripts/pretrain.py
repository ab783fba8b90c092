"""Pretrain a ReZero language model from a recipe, and leave a folder that can go to the Hub as it is.

accelerate launch scripts/pretrain.py scripts/recipes/quickstart.yaml [training.seed=1 ...]
"""

import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer
from transformers import set_seed

from rezero_hf.checkpoints import export_folder
from rezero_hf.cli import run
from rezero_hf.data import EvalBlocks, TrainBlocks, prepare
from rezero_hf.models import ReZeroForCausalLM
from rezero_hf.recipe import load_recipe
from rezero_hf.runs import new_run_dir, now, provenance, read_metrics
from rezero_hf.tokenization import load_tokenizer, token_byte_lengths
from rezero_hf.training import ReZeroTrainer, sequences_per_step, training_steps


NEXT = """
The model is in {folder}, ready for the Hub. Next:
  look at the gates   {folder}/figures/gates.png
  write more text     python -c "import rezero_hf; from transformers import pipeline; \
print(pipeline('text-generation', '{folder}')('class ', max_new_tokens=200)[0]['generated_text'])"
  train longer        accelerate launch scripts/pretrain.py {recipe} training.max_steps={steps}"""


def main(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the recipe")] = None,
    output: Annotated[Path | None, typer.Option(help="the run's folder (default runs/NAME)")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="the recipe's version of a few CPU seconds")] = False,
):
    started = time.perf_counter()
    record = provenance()
    plan = load_recipe(recipe, overrides or (), smoke)
    output = output or Path("runs") / plan.name
    args = plan.training_arguments(output / "checkpoints")
    set_seed(args.seed)

    tokenizer = load_tokenizer(plan.data.tokenizer)
    config = plan.model_config(tokenizer)
    with args.main_process_first(desc="preparing data"):
        prepared = prepare(plan.data, tokenizer)
        prepared.check_vocab(config.vocab_size)
        args.max_steps = training_steps(args, prepared)
        if args.process_index == 0:
            aside = new_run_dir(output)
            (output / "recipe.yaml").write_text(plan.resolved(config), encoding="utf-8")

    model = ReZeroForCausalLM(config)
    blocks_per_step = sequences_per_step(args)
    trainer = ReZeroTrainer(
        model,
        args,
        train_dataset=TrainBlocks(prepared, args.seed, args.max_steps * blocks_per_step),
        eval_dataset=EvalBlocks(prepared, "validation", args.eval_blocks),
        processing_class=tokenizer,
        token_bytes=token_byte_lengths(tokenizer),
        run_dir=output,
    )
    main_process = trainer.is_world_process_zero()
    tokens_per_step = blocks_per_step * plan.data.block_size
    if main_process:
        size = f"{model.num_parameters():,} parameters"
        print(f"{plan.name}: {size}, {args.max_steps:,} steps of {tokens_per_step:,} tokens")
        print(f"on {record['device']}, {args.world_size} process(es), {'bf16' if args.bf16 else 'fp32'}")
        if aside:
            print(f"an earlier run is kept in {aside}")
    trained = trainer.train()

    held_out = {split: EvalBlocks(prepared, split, args.final_eval_blocks) for split in ("validation", "test")}
    results = {split: trainer.evaluate_text(blocks) for split, blocks in held_out.items()}
    if not main_process:
        return
    record |= {
        "name": plan.name,
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
    folder = export_folder(
        model,
        tokenizer,
        output / "model",
        run=record,
        metrics=read_metrics(output / "metrics.jsonl"),
        recipe_text=plan.resolved(config),
    )

    given = plan.data.block_size // 4
    prompt = held_out["test"][0]["input_ids"][None, :given].to(model.device)
    new = {"max_new_tokens": plan.data.block_size - given, "do_sample": True, "temperature": 0.8, "use_cache": True}
    written = tokenizer.decode(model.eval().generate(prompt, **new)[0], skip_special_tokens=True)
    print(f"\n--- {given} held-out tokens, continued by the model ---\n{written}\n---\n")
    for split, measured in results.items():
        print(f"{split}: {measured['bits_per_byte']:.3f} bits per byte over {measured['bytes']:,} bytes")
    print(NEXT.format(folder=os.path.relpath(folder), recipe=recipe, steps=2 * args.max_steps))


if __name__ == "__main__":
    run(main)
