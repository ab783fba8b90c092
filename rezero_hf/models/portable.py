"""Checkpoints that carry their own code: what `save_pretrained` writes loads where this package is not installed."""

import re
import shutil
import sys
from pathlib import Path
from typing import ClassVar

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto


class PortablePreTrainedModel(PreTrainedModel):
    """A `PreTrainedModel` whose every save also writes the whole `auto_map` and the model's source files.

    The library's own way, `register_for_auto_class`, writes only the entry of the class being saved, finds the source
    through the class at run time (under FSDP2 that is a generated class in torch's own files, so torch's files are
    what it copies), and is switched on behind the user's back when `AutoModel` loads remote code. So it is a no-op
    here, and saving does the work itself: `Trainer`, `push_to_hub`, a PEFT merge and FSDP2 all end in
    `save_pretrained`.

    The base class of each family sets `auto_classes`: the Auto class names mapped to the class names of its module.
    """

    auto_classes: ClassVar[dict[str, str]] = {}

    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):
        # What Transformers calls it from 5.23 on.
        activation_checkpointing_enable = PreTrainedModel.gradient_checkpointing_enable
        activation_checkpointing_disable = PreTrainedModel.gradient_checkpointing_disable
        is_activation_checkpointing = PreTrainedModel.is_gradient_checkpointing

    def __init_subclass__(cls, **kwargs):
        """Enters a family's names where parts of the library look them up by task instead of asking the Auto classes.

        Trainer shifts labels for its own label smoothing only for names it finds there, and `transformers serve` and
        pipelines check their task.
        """
        super().__init_subclass__(**kwargs)
        for auto, name in cls.__dict__.get("auto_classes", {}).items():
            task = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", auto.removeprefix("Auto")).upper()
            getattr(modeling_auto, f"{task}_MAPPING_NAMES")[cls.config_class.model_type] = name

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Does nothing: see the class docstring."""

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """As in Transformers, plus source files and `auto_map`; the same arguments, the same errors."""
        if is_main_process and not Path(save_directory).is_file():
            self._save_sources(Path(save_directory))
        return super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    def save_architecture(self, save_directory) -> None:
        """Everything that `save_pretrained` writes but the weights: for checkpoints that hold those in shards."""
        self._save_sources(Path(save_directory))
        # As `save_pretrained` does, under whatever name FSDP2 has given the class.
        self.config.architectures = [type(self).__name__.removeprefix("FSDP")]
        self.config.save_pretrained(save_directory)
        if self.can_generate():
            self.generation_config.save_pretrained(save_directory)

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, **kwargs):
        """The sources too: written before the library looks which files are new, they would not be."""
        sources = {file.name for file in self._sources()}
        before = {name: time for name, time in files_timestamps.items() if name not in sources}
        return super()._upload_modified_files(working_dir, repo_id, before, **kwargs)

    def _sources(self) -> list[Path]:
        source = Path(sys.modules[self._defining_class().__module__].__file__)
        return [source, *map(Path, get_relative_import_files(source))]

    def _save_sources(self, folder: Path) -> None:
        source, *others = self._sources()
        config_class = self.config_class
        self.config.auto_map = {"AutoConfig": f"{config_class.__module__.rpartition('.')[2]}.{config_class.__name__}"}
        self.config.auto_map |= {auto: f"{source.stem}.{name}" for auto, name in self.auto_classes.items()}
        folder.mkdir(parents=True, exist_ok=True)
        for file in (source, *others):
            if file.parent.resolve() != folder.resolve():
                shutil.copyfile(file, folder / file.name)

    @classmethod
    def _defining_class(cls) -> type:
        """The class as written in a source file, under whatever FSDP2 or a quantiser derived from it at run time."""
        return next(c for c in cls.__mro__ if "auto_classes" in c.__dict__)
