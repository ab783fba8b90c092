"""A `Trainer` whose every save is a folder for others, and goes to the Hub if the arguments say so."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy

from .checkpoints import checkpoints_in
from .errors import UserError
from .export import describe_folder, temporarily, write_records
from .models import ReZeroConfig
from .publishing import Repository, check_access
from .push_queue import PATIENCE, PushQueue
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
        super().__init__(*args, **kwargs)
        self.run, self.recipe_text = run, recipe_text
        self.pushes: PushQueue | None = None
        if self.args.push_to_hub:
            self._queue_pushes(run_dir or self.args.output_dir)

    def run_so_far(self) -> dict[str, Any]:
        """What the card of a save says of the run: `run`, and how far it is."""
        state, run = self.state, dict(self.run or {})
        if state.global_step < state.max_steps:
            run["unfinished"] = {"step": state.global_step, "max_steps": state.max_steps}
        return run

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        """Every save is a folder for others to load: with a card, and with the cache on that training switches off."""
        ours = isinstance(self.model.config, ReZeroConfig)
        with temporarily(self.model.config, use_cache=True) if ours else nullcontext():
            super().save_model(output_dir, _internal_call)
        if ours and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            write_records(folder, self.run_so_far(), self.recipe_text)
            describe_folder(folder, figures=False)

    def _repository(self) -> Repository:
        args = self.args
        return Repository(args.hub_model_id or "", args.hub_revision, args.hub_private_repo, args.hub_token)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Look whether pushing will work while nothing is lost yet. A run that goes on is not stopped by it."""
        if not self.args.hub_model_id:
            raise UserError("push_to_hub=True needs hub_model_id, the repository ORG/NAME to push to.")
        try:
            problem = on_main(lambda: check_access(self._repository()))
        except UserError as error:
            if not on_main(lambda: bool(checkpoints_in(self.args.output_dir))):
                raise
            problem = str(error)
        if problem and self.is_world_process_zero():
            print(f"the Hub cannot be pushed to now ({problem}); training goes on, and every save will try", flush=True)

    def _queue_pushes(self, folder: str | Path) -> None:
        """Have saves pushed from now on, by the main process."""
        strategy = self.args.hub_strategy
        if strategy != HubStrategy.END and self._state_dict_kind() == "SHARDED_STATE_DICT":
            raise UserError(
                "push_to_hub during training needs whole weights, and FSDP's SHARDED_STATE_DICT saves shards: choose "
                "FULL_STATE_DICT in accelerate's file, or training.hub_strategy=end."
            )
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS) and self.args.save_only_model:
            raise UserError(f"hub_strategy={strategy.value} pushes what a run goes on from: set save_only_model=false.")
        if self.is_world_process_zero():
            self.pushes = PushQueue(self._repository(), folder, strategy)
            self.add_callback(self.pushes)

    def push_to_hub(self, commit_message: str | None = None, blocking: bool = True, **kwargs) -> str | None:
        """Push the model as it is now, by the same way as saves during training.

        Args:
            commit_message: ignored; commits are called after their step.
            blocking: wait for it, at most `push_queue.PATIENCE` seconds.

        Returns:
            On the main process and when blocking, a line that says what came of it; else None.
        """
        if not self.args.push_to_hub:
            raise UserError("push_to_hub=False: set push_to_hub and hub_model_id in the training arguments.")
        folder = Path(self.args.output_dir) / ".push"
        self.save_model(str(folder), _internal_call=True)
        if self.pushes is None:
            return None
        self.pushes.put(folder, self.state.global_step)
        return self.pushes.close(PATIENCE) if blocking else None
