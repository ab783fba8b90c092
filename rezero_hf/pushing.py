"""A `Trainer` whose every save is a folder for others, and goes to the Hub if the arguments say so."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy

from .checkpoints import checkpoints_in
from .descriptions import DESCRIBED
from .errors import UserError
from .export import caching, describe_folder, write_records
from .hub import user_section
from .publishing import Repository, check_access
from .push_queue import JOURNAL, LAST_PATIENCE, WITH_CHECKPOINTS, PushQueue
from .resuming import ResumableTrainer
from .together import on_main


class PushingTrainer(ResumableTrainer):
    """`ResumableTrainer` that adds a card to each save, and pushes by `PushQueue` in place of the library's way.

    The library's leaves out code and card during training and does not say when it failed. Its words are kept:
    `push_to_hub`, `hub_model_id`, `hub_strategy`, `hub_revision`, `hub_private_repo`, `hub_token`.

    Takes what `Trainer` takes, and:

    Args:
        run_dir: where the journal of pushes goes; default `output_dir`.
        run: what is known of the run before it ends (as in `run.json`), for the card in every checkpoint.
        recipe_text: the resolved recipe, for the same.
    """

    def __init__(
        self,
        *args,
        run_dir: str | Path | None = None,
        run: dict[str, Any] | None = None,
        recipe_text: str | None = None,
        **kwargs,
    ):
        self.pushes: PushQueue | None = None
        super().__init__(*args, **kwargs)
        self.run, self.recipe_text = run, recipe_text
        # A script that exports the trained model pushes that, and waits itself.
        self.waits_for_pushes = True
        if self.args.push_to_hub and self.is_world_process_zero():
            journal = Path(run_dir or self.args.output_dir) / JOURNAL
            self.pushes = PushQueue(self._repository(), journal, self.args.output_dir, self.args.hub_strategy)
            self.add_callback(self.pushes)

    def run_so_far(self) -> dict[str, Any]:
        """What the card of a save says of the run: `run`, and how far it is."""
        state, run = self.state, dict(self.run or {})
        if state.global_step < state.max_steps:
            run["unfinished"] = {"step": state.global_step, "max_steps": state.max_steps}
        return run

    @property
    def describes(self) -> bool:
        """Whether the model is one that there is a card for; the saves of other heads are the library's."""
        return isinstance(self.accelerator.unwrap_model(self.model), DESCRIBED)

    def train(self, *args, **kwargs):
        try:
            done = super().train(*args, **kwargs)
        except BaseException:
            # What pushes ends with this process.
            self._end_pushes(over=False)
            raise
        if self.waits_for_pushes or self.told_to_stop:
            self._end_pushes(over=not self.told_to_stop)
        return done

    def _end_pushes(self, over: bool) -> None:
        """Wait for what is still to be pushed, of a run that is not over a few seconds, and say what came of it."""
        if self.pushes is not None:
            line = self.pushes.close(LAST_PATIENCE) if over else self.pushes.stop()
            if line is not None:
                print(line, flush=True)

    def restore_progress(self) -> None:
        super().restore_progress()
        if self._resuming is not None and self.pushes is not None:
            self.pushes.resumed(self._resuming["folder"])

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        """Every save is a folder for others to load: with a card, and with the cache on that training switches off."""
        folder = Path(output_dir or self.args.output_dir)
        with caching(self.accelerator.unwrap_model(self.model)) if self.describes else nullcontext():
            super().save_model(output_dir, _internal_call=True)
        if self.describes and self.args.should_save:
            write_records(folder, self.run_so_far(), self.recipe_text)
            card = folder / "README.md"
            if not card.exists() or user_section(card.read_text(encoding="utf-8")) is not None:
                describe_folder(folder, figures=False)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub()

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.pushes is not None:
            self.pushes.saved(Path(self._get_output_dir(trial)).absolute() / f"checkpoint-{self.state.global_step}")

    def _repository(self) -> Repository:
        args = self.args
        return Repository(args.hub_model_id or "", args.hub_revision, args.hub_private_repo, args.hub_token)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Look whether pushing will work while nothing is lost yet. A run that goes on is not stopped by it."""
        if not self.args.hub_model_id:
            raise UserError("push_to_hub=True needs hub_model_id, the repository ORG/NAME to push to.")
        self._check_pushable()
        try:
            problem = on_main(lambda: check_access(self._repository()))
        except UserError as error:
            if not on_main(lambda: bool(checkpoints_in(self.args.output_dir))):
                raise UserError(f"{error}; or set push_to_hub=False.") from error
            problem = str(error)
        if problem and self.is_world_process_zero():
            print(f"the Hub cannot be pushed to now ({problem}); training goes on, and every save will try", flush=True)

    def _check_pushable(self) -> None:
        """Whether there will be saves that can be pushed, before a repository is made for them."""
        strategy = HubStrategy(self.args.hub_strategy)
        if not self.describes or self.processing_class is None:
            raise UserError(
                f"push_to_hub=True pushes {', '.join(model_class.__name__ for model_class in DESCRIBED)}, which a card "
                "can describe, with tokenizer or image processor as processing_class; push another model when it is "
                "trained, by its own push_to_hub."
            )
        if strategy != HubStrategy.END and self._state_dict_kind() == "SHARDED_STATE_DICT":
            raise UserError(
                "push_to_hub during training needs whole weights, and FSDP's SHARDED_STATE_DICT saves shards: choose "
                "FULL_STATE_DICT in accelerate's file, or training.hub_strategy=end."
            )
        if strategy in WITH_CHECKPOINTS and self.args.save_only_model:
            raise UserError(f"hub_strategy={strategy.value} pushes what a run goes on from: set save_only_model=false.")

    def push_to_hub(self, commit_message: str | None = None, blocking: bool = True, **unknown) -> str | None:
        """Push the model as it is now, by the same way as saves during training.

        Args:
            commit_message: default, the step.
            blocking: wait for it, at most `push_queue.LAST_PATIENCE` seconds.
            unknown: the library's other words are refused: the arguments say where to push, and the card is made from
                the run.

        Returns:
            On the main process and when blocking, the line that says which commit it is; else None.

        Raises:
            UserError: `push_to_hub` is not switched on; a word is not known here; it was not pushed.
        """
        if not self.args.push_to_hub:
            raise UserError("push_to_hub=False: set push_to_hub and hub_model_id in the training arguments.")
        if unknown := {name: value for name, value in unknown.items() if value is not None}:
            raise UserError(f"push_to_hub({', '.join(unknown)}=...): say it in the training arguments (hub_...).")
        folder = Path(self.args.output_dir) / ".push-now"
        self.save_model(str(folder), _internal_call=True)

        def push() -> str | None:
            self.pushes.put(folder, self.state.global_step, commit_message)
            shutil.rmtree(folder, ignore_errors=True)
            line = self.pushes.close(LAST_PATIENCE) if blocking else None
            if blocking and not self.pushes.arrived:
                raise UserError(line)
            return line

        return on_main(push)
