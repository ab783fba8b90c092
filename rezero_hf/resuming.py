"""A `Trainer` whose checkpoints are whole or not there, and from which a run goes on as if it had never stopped."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, save_fsdp_model, save_fsdp_optimizer
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from .arguments import sequences_per_step
from .checkpoints import (
    begin_checkpoint,
    checkpoints_in,
    finish_checkpoint,
    newest_complete,
    partial_of,
    record_of,
    rotate,
    verify_checkpoint,
)
from .durable import write_whole
from .errors import UserError, one_line
from .export import temporarily
from .launching import is_sharded, sharding_of
from .together import everywhere, on_main


PROGRESS = "progress.json"
LOG = "metrics.jsonl"


class ResumableTrainer(Trainer):
    """`Trainer` with its own saving and resuming; everything else is the library's.

    A save has all of the library's parts (weights with code and tokenizer, optimiser, schedule, loss scaler, random
    numbers of every process, trainer state), the sums that wait for the next log line, what a subclass adds by
    `own_state`, and the run's `metrics.jsonl` as it is at that step. Processes agree after each part: if one of them
    cannot write, all of them say so and stop.

    Resumed on as many processes the run goes on bit for bit. On another number the data keep their order; random
    numbers (dropout) and the order of summation differ, and it says so.
    """

    log_file: Path | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._resuming: dict[str, Any] | None = None
        self.add_callback(_RestoreProgress(self))

    @property
    def told_to_stop(self) -> bool:
        """Whether this launch ends before the run does, to be gone on with."""
        return False

    def own_state(self) -> dict[str, Any]:
        """What a subclass wants saved, as JSON: `shared`, the same on all processes, and `each`, this process's own."""
        return {"shared": {}, "each": {}}

    def restore_own_state(self, shared: dict[str, Any], each: list[dict[str, Any]]) -> None:
        """Put back what `own_state` gave; `each` has one entry for every process there was."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest complete one in `output_dir`. It is
                verified; newer ones that are not whole are named and passed over.
            kwargs: as in Transformers.

        Raises:
            UserError: no checkpoint is whole, or it does not fit this launch; a save failed.
        """
        self._resuming = None
        if resume_from_checkpoint:
            folder, record, progress, skipped = on_main(lambda: self._open_checkpoint(resume_from_checkpoint))
            if self.is_world_process_zero():
                print("\n".join([*(f"passed over: {line}" for line in skipped), f"going on from {folder}"]), flush=True)
            self._check_fits(folder, record)
            self._resuming = {"record": record, "progress": progress, "folder": folder}
            resume_from_checkpoint = str(folder)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _open_checkpoint(self, where: str | bool) -> tuple[Path, dict, dict, list[str]]:
        if where is True:
            folder, skipped = newest_complete(self.args.output_dir)
            if folder is None:
                there = "\n  ".join(skipped) or "there is none"
                where = self.args.output_dir
                raise UserError(f"{where} has no complete checkpoint to go on from; --restart begins anew:\n  {there}")
            record = record_of(folder)
        else:
            folder, skipped = Path(where), []
            record = verify_checkpoint(folder)
        if not record["resumable"]:
            raise UserError(f"{folder} holds weights alone (save_only_model); a run cannot go on from it.")
        progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        # The list of files is long and of no more use.
        return folder, {**record, "files": None}, progress, skipped

    def _check_fits(self, folder: Path, record: dict[str, Any]) -> None:
        if record["sequences_per_step"] != sequences_per_step(self.args):
            raise UserError(
                f"{folder} was trained with {record['sequences_per_step']} sequences a step, this launch has "
                f"{sequences_per_step(self.args)}: set training.global_batch_size={record['sequences_per_step']}."
            )
        data, now = record.get("data"), self._data()
        # A checkpoint of an older version does not say, nor does every data set.
        if None not in (data, now) and data != now:
            raise UserError(
                f"{folder} was trained on other data ({data}, now {now}): files, a tokenizer or, for python-stdlib, "
                "Python have changed; put them back as they were, or start a new run."
            )
        if is_sharded(record["sharding"]) != self.is_fsdp_enabled or record["state_dict"] != self._state_dict_kind():
            now = f"under FSDP ({self._state_dict_kind()})" if self.is_fsdp_enabled else "not under FSDP"
            raise UserError(
                f"{folder} was written under {record['sharding']}, this launch is {now}: launch it as before, or start "
                "a new run."
            )
        if record["world_size"] != self.args.world_size and self.is_world_process_zero():
            print(
                f"the checkpoint is of {record['world_size']} process(es), this launch has {self.args.world_size}: the "
                "data keep their order, but random numbers (dropout) and the order of sums differ, so losses agree "
                "only to rounding",
                flush=True,
            )

    def _save_checkpoint(self, model, trial) -> None:
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial)).absolute() / f"checkpoint-{step}"
        partial, main = partial_of(folder), self.is_world_process_zero()
        self.store_flos()
        progress = self._progress()
        if self.state.best_global_step:
            best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
            if on_main(lambda: best == folder or best.is_dir()):
                self.state.best_model_checkpoint = str(best)
        parts = [lambda: begin_checkpoint(folder) if main else None]
        parts += [lambda: self.save_model(str(partial), _internal_call=True)]
        if self._saves_everything():
            parts += self._optimizer_parts(partial)
            parts += [lambda: self._save_scaler(str(partial)), lambda: self._save_rng_state(str(partial))]
        parts += [lambda: self._finish_checkpoint(folder, progress) if main else None]
        way_out = f"the checkpoint of step {step} was not saved; make room and rights for it, then start the same "
        try:
            for part in parts:
                everywhere(part, way_out + "command again: it goes on from the last complete checkpoint")
        except UserError:
            on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        super().save_model(output_dir, _internal_call)
        if self._state_dict_kind() == "SHARDED_STATE_DICT" and self.args.should_save:
            # The library leaves this folder empty; the weights follow in shards, which `scripts/export.py` joins.
            self.accelerator.unwrap_model(self.model).save_architecture(output_dir or self.args.output_dir)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir or self.args.output_dir)

    def _finish_checkpoint(self, folder: Path, progress: dict[str, Any]) -> None:
        partial = partial_of(folder)
        # A pickle of the arguments; the resolved recipe beside the run says the same in words.
        (partial / "training_args.bin").unlink(missing_ok=True)
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        # Where this machine keeps the best one is nobody else's business; resuming finds it by its step.
        with temporarily(self.state, best_model_checkpoint=None):
            self.state.save_to_json(str(partial / "trainer_state.json"))
        write_whole(partial / PROGRESS, json.dumps(progress, indent=1) + "\n")
        if self.log_file is not None and self.log_file.exists():
            write_whole(partial / LOG, self.log_file.read_text(encoding="utf-8"))
        record = {
            "step": self.state.global_step,
            "resumable": self._saves_everything(),
            "world_size": self.args.world_size,
            "sequences_per_step": sequences_per_step(self.args),
            "data": self._data(),
            "sharding": sharding_of(self.model_wrapped),
            "state_dict": self._state_dict_kind(),
        }
        finish_checkpoint(folder, record)
        rotate(folder.parent, self.state.global_step, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _data(self) -> str | None:
        """The fingerprint of what is trained on, of data sets that have one."""
        return getattr(self.train_dataset, "fingerprint", None)

    def _saves_everything(self) -> bool:
        """`save_only_model` is for checkpoints along the way; the last one before a stop is there to go on from."""
        return self.told_to_stop or not self.args.save_only_model

    def _state_dict_kind(self) -> str | None:
        """The word of accelerate's configuration for how FSDP writes its state; None without FSDP."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return None if plugin is None else plugin.state_dict_type.name

    def _optimizer_parts(self, partial: Path) -> list[Callable[[], Any]]:
        """Saving optimiser and schedule, under FSDP in pieces of one collective each.

        A process that fails between two collectives would otherwise meet the others in the wrong one.
        """
        if not self.is_fsdp_enabled:
            return [lambda: self._save_optimizer_and_scheduler(str(partial))]
        plugin, scheduler = self.accelerator.state.fsdp_plugin, partial / "scheduler.pt"
        return [
            lambda: save_fsdp_model(plugin, self.accelerator, self.model, str(partial)),
            lambda: save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, str(partial)),
            lambda: torch.save(self.lr_scheduler.state_dict(), scheduler) if self.args.should_save else None,
        ]

    def _finalize_training(self, *args):
        """The library would delete checkpoints here, and load the best model of a run that is not over."""
        kept = self.args.save_total_limit, self.args.load_best_model_at_end
        self.args.save_total_limit = None
        self.args.load_best_model_at_end = kept[1] and not self.told_to_stop
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit, self.args.load_best_model_at_end = kept

    def _progress(self) -> dict[str, Any]:
        """What the library keeps in memory alone, and `own_state`."""
        state = self.own_state()
        each = {"loss": float(self._tr_loss), **state["each"]}
        return {
            "last_logged": self._globalstep_last_logged,
            "shared": state["shared"],
            "each": gather_object([each]) if self.args.world_size > 1 else [each],
        }

    def restore_progress(self) -> None:
        """Put back what the library has just reset. Called once the model is wrapped, before the first step."""
        if self._resuming is None:
            return
        record, progress, folder = (self._resuming[name] for name in ("record", "progress", "folder"))
        each = progress["each"]
        if record["world_size"] == self.args.world_size:
            loss = each[self.args.process_index]["loss"]
        else:
            # What a log line shows is the mean over processes.
            loss = sum(own["loss"] for own in each) / len(each)
        self._tr_loss += loss
        self._globalstep_last_logged = progress["last_logged"]
        # The library divides by the steps of this launch, to which this sum does not belong.
        self._total_loss_scalar = -loss
        if self.log_file is not None and (folder / LOG).exists():
            on_main(lambda: self._restore_log(folder / LOG))
        self.restore_own_state(progress["shared"], each)

    def _restore_log(self, saved: Path) -> None:
        """Put the log back to the checkpoint's step, but keep what it says of stops, resumes and saves until then."""
        text = saved.read_text(encoding="utf-8")
        known = set(text.splitlines())
        lines = self.log_file.read_text(encoding="utf-8").splitlines() if self.log_file.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                # The last one, torn by a kill.
                continue
            # A step that was left out comes again, and so does its row.
            stop = row["event"] == "nonfinite" and not row["skipped"]
            save = row["event"] == "save" and row["step"] <= self.state.global_step
            past = row["event"] == "resume" or stop or save
            if past and line not in known:
                text += line + "\n"
        write_whole(self.log_file, text)

    def _load_from_checkpoint(self, *args, **kwargs):
        try:
            return super()._load_from_checkpoint(*args, **kwargs)
        except RuntimeError as error:
            what = one_line(error)
            raise UserError(f"the checkpoint does not fit this model ({what}); --restart begins anew.") from error

    def _init_training_state(self, *args, **kwargs):
        found = super()._init_training_state(*args, **kwargs)
        # The intervals of logging, evaluating and saving are this launch's, not the checkpoint's.
        self.state.compute_steps(self.args, self.state.max_steps)
        if self._resuming is not None and self.state.best_global_step:
            # The path is the other machine's; the step is not.
            best = self._resuming["folder"].with_name(f"checkpoint-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(best) if best in checkpoints_in(best.parent) else None
        return found

    def _load_rng_state(self, checkpoint) -> None:
        if checkpoint is None or self._resuming is None:
            return
        record = self._resuming["record"]
        if record["world_size"] == self.args.world_size:
            super()._load_rng_state(checkpoint)
        else:
            # Another number of processes has no states to go on with: new ones, the same every time.
            torch.manual_seed(self.args.seed + 1_000_003 * record["step"] + 7919 * self.args.process_index)

    def _issue_warnings_after_load(self, load_result) -> None:
        """The library only warns of weights that a checkpoint lacks; here that is the wrong checkpoint."""
        tied = self.model.all_tied_weights_keys
        wrong = [name for name in (*load_result.missing_keys, *load_result.unexpected_keys) if name not in tied]
        if wrong:
            raise UserError(f"the checkpoint does not fit this model: {len(wrong)} names differ, such as {wrong[0]}.")
        self.model.tie_weights()


class _RestoreProgress(TrainerCallback):
    def __init__(self, trainer: ResumableTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.restore_progress()
