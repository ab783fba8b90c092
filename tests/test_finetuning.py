"""Every task trains from a checkpoint by one command and leaves a folder that loads; what cannot be is said in one line."""

import csv
import json
import re
import runpy
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from test_portable import finish, start
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from rezero_hf import (
    ReZeroForSequenceClassification,
    ReZeroMLPConfig,
    ReZeroMLPForImageClassification,
    ReZeroTrainingArguments,
    push_queue,
)
from rezero_hf.blocks import IGNORE_INDEX
from rezero_hf.errors import UserError
from rezero_hf.finetuning import add_lora, find_base, load_base, read_task, register_lora_targets
from rezero_hf.hub import render_card
from rezero_hf.images import image_processor
from rezero_hf.labelled import STDLIB, read_labelled
from rezero_hf.runs import read_metrics
from rezero_hf.tasks import TaskConfig, labelled_rows, text_blocks
from rezero_hf.training import ReZeroTrainer
from rezero_hf.verification import verify_folder


SCRIPT = Path(__file__).parents[1] / "scripts" / "finetune.py"
AUTO = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "image-classification": AutoModelForImageClassification,
}
SMALL = ("training.max_steps=2", "training.per_device_train_batch_size=4", "training.disable_tqdm=true")
TEXTS = [(f"def f{n}(x): return x", "good") if n % 2 else (f"class C{n}: pass", "bad") for n in range(20)]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model, tokenizer):
    """Checkpoints of text and of images, and a file of rows for each task."""
    folder = tmp_path_factory.mktemp("place")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tiny_model(**ids).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    mlp = ReZeroMLPConfig(num_channels=1, image_size=8, hidden_size=8, num_hidden_layers=2, num_labels=3, gate_init=0.5)
    torch.manual_seed(0)
    ReZeroMLPForImageClassification(mlp).save_pretrained(folder / "images")
    image_processor((8, 8), [0.3], [0.4]).save_pretrained(folder / "images")
    for name in ("text", "images"):
        (folder / name / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    (folder / "notes.txt").write_text("".join(f"line {n} of this text\n" for n in range(400)))
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *TEXTS])
    (folder / "docs.jsonl").write_text("".join(json.dumps({"body": text * 9}) + "\n" for text, _ in TEXTS))
    tags = [{"tokens": ["def", f"f{n}", "(", ")"], "tags": ["key", "name", "sign", "sign"]} for n in range(20)]
    types = Features({"tokens": List(Value("string")), "tags": List(Value("string"))})
    Dataset.from_list(tags, features=types).to_parquet(folder / "tags.parquet")
    return folder


@pytest.fixture
def finetune(place, tmp_path, monkeypatch):
    """Runs the script on files of `place` by their names; returns its output folder."""

    def run(model, data, *words):
        data = str(place / data) if (place / data).exists() else data
        argv = [place / model if (place / model).exists() else model, data, *words, *SMALL]
        argv += ["--output", tmp_path / "run", "--cache-dir", place / "cache", "--block-size", 32]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, argv)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        return tmp_path / "run"

    return run


def state(folder, auto):
    return auto.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    ("task", "model", "data", "words", "classes", "measured"),
    [
        ("causal-lm", "text", "notes.txt", ("--license", "mit"), None, "bits_per_byte"),
        ("causal-lm", "text", "docs.jsonl", ("--text-column", "body"), None, "bits_per_byte"),
        ("sequence-classification", "text", "rows.csv", (), ["bad", "good"], "accuracy"),
        ("token-classification", "text", "tags.parquet", (), ["key", "name", "sign"], "accuracy"),
        ("image-classification", "images", "digits", (), [str(digit) for digit in range(10)], "accuracy"),
    ],
)
def test_a_task_trains_and_its_folder_loads(place, finetune, capsys, task, model, data, words, classes, measured):
    """Two steps change the weights; the folder has the head, its classes and a card with what was measured and the
    base's licence, unless another one was said, and goes to the Hub as it is; the printed command names it."""
    run = finetune(model, data, "--task", task, *words)
    trained, before = (state(folder, AUTO[task]) for folder in (run / "model", place / model))
    inner = [name for name in before if name.startswith("model.")]
    assert any(not torch.equal(trained[name], before[name]) for name in inner)
    config = AUTO[task].from_pretrained(run / "model").config
    assert classes is None or list(config.id2label.values()) == classes
    record = json.loads((run / "run.json").read_text())
    assert all(measured in record["results"][split] for split in ("validation", "test"))
    verify_folder(run / "model")
    card = (run / "model" / "README.md").read_text()
    assert "## Measured results" in card and "datasets:" not in card
    assert f"\nlicense: {'mit' if 'mit' in words else 'cc-by-4.0'}\n" in card
    assert record["init_from"]["path"] == str(place / model) and record["trained_parameters"] == record["parameters"]
    assert {row["event"] for row in read_metrics(run / "metrics.jsonl")} == {"eval"}
    command = capsys.readouterr().out.partition("Next:")[2]
    assert str(run / "model") in command
    if task == "token-classification":
        exec(shlex.split(command)[2], {})
        assert re.findall(r"'(\S+)', '(?:key|name|sign)'", capsys.readouterr().out) == ["def", "close(self):"]
    if task != "image-classification":
        assert json.loads((run / "model" / "tokenizer.json").read_text())["truncation"] is None


ALONE = """
from transformers import pipeline
classifier = pipeline("text-classification", folder, **remote)
assert classifier("def f(x): return x")[0]["label"] in ("good", "bad")
"""


def test_a_classifier_loads_where_the_package_is_not(finetune, tmp_path):
    finish(start(tmp_path, ALONE, finetune("text", "rows.csv") / "model"))


def test_a_classifiers_head_goes_on_where_it_fits_and_is_drawn_where_it_does_not(finetune, place, tmp_path):
    """Another number of classes needs a new head; of the same number the head that is there is trained on."""
    model = ReZeroForSequenceClassification.from_pretrained(place / "text", num_labels=2)
    for number in (2, 3):
        folder = tmp_path / f"classes-{number}"
        ReZeroForSequenceClassification.from_pretrained(place / "text", num_labels=number).save_pretrained(folder)
        AutoTokenizer.from_pretrained(place / "text").save_pretrained(folder)
    old = ReZeroForSequenceClassification.from_pretrained(tmp_path / "classes-2").score.weight
    words = ("training.learning_rate=0.0", "training.warmup_steps=0")
    new = finetune(str(tmp_path / "classes-2"), "rows.csv", *words) / "model"
    assert torch.equal(ReZeroForSequenceClassification.from_pretrained(new).score.weight, old)
    new.parent.rename(tmp_path / "earlier")
    new = finetune(str(tmp_path / "classes-3"), "rows.csv") / "model"
    assert ReZeroForSequenceClassification.from_pretrained(new).score.weight.shape == model.score.weight.shape


def test_gates_are_held_or_trained_by_a_flag(finetune, place, tmp_path):
    """Held, every alpha is what it was, bit for bit, while the rest moves; else it moves along."""
    before = state(place / "text", AutoModelForCausalLM)
    for flag in ("held", "trained"):
        run = finetune("text", "rows.csv", "--gates", flag)
        trained = state(run / "model", AutoModelForSequenceClassification)
        moved = {name: not torch.equal(trained[name], before[name]) for name in trained if name != "score.weight"}
        assert sum(name.endswith("alpha") for name in moved) == 2
        assert all(moved[name] == (flag == "trained") for name in moved if name.endswith("alpha"))
        assert all(moved[name] for name in moved if name.endswith("proj.weight"))
        run.rename(tmp_path / flag)


@pytest.mark.parametrize("flag", ["held", "trained"])
def test_lora_trains_adapters_and_the_head_alone_and_merges(finetune, place, ids, flag):
    """What the layers' matrices gained is the adapter; the rest is as it was, but gates where they are trained too. The
    merged folder says what base and adapter say."""
    run = finetune("text", "rows.csv", "--lora", 2, "--gates", flag)
    auto = AutoModelForSequenceClassification
    merged, before = state(run / "model", auto), state(place / "text", AutoModelForCausalLM)
    assert merged.keys() ^ before.keys() == {"score.weight", "lm_head.weight"}
    for name in merged.keys() & before.keys():
        adapted = name.endswith("proj.weight") or (flag == "trained" and name.endswith("alpha"))
        assert torch.equal(merged[name], before[name]) != adapted, name
    base = auto.from_pretrained(place / "text", num_labels=2)
    again = PeftModel.from_pretrained(base, run / "adapter").eval()
    torch.testing.assert_close(again(ids).logits, auto.from_pretrained(run / "model").eval()(ids).logits)
    texts = [(run / "adapter" / name).read_text() for name in ("adapter_config.json", "README.md")]
    assert not any(str(place) in text for text in texts)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [row["alpha"] for row in rows if row["event"] == "eval"][-1]
    assert logged == {name: alpha.tolist() for name, alpha in merged.items() if name.endswith("alpha")}
    record = json.loads((run / "run.json").read_text())
    assert record["lora"] == 2 and record["gates"] == flag
    assert record["trained_parameters"] < record["parameters"] / 5
    assert record["parameters"] == auto.from_pretrained(run / "model").num_parameters()


def test_an_adapter_names_the_repository_and_commit_it_belongs_to(place, tmp_path):
    base = find_base(str(place / "text"), "causal-lm")._replace(name="ORG/NAME@main", commit="c" * 40)
    add_lora(load_base(base, "causal-lm", None), "causal-lm", 2, False, base.commit).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "ORG/NAME" and said["revision"] == "c" * 40
    card = (tmp_path / "README.md").read_text()
    assert "base_model: ORG/NAME\n" in card and str(place) not in card


def test_the_tokenizer_says_what_padding_is(place, tiny_model, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert find_base(str(tmp_path), "sequence-classification").config.pad_token_id == tokenizer.pad_token_id


def test_lora_needs_no_target_modules_once_they_are_registered(tiny_model, monkeypatch):
    monkeypatch.delitem(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "rezero", raising=False)
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(tiny_model(), LoraConfig())
    register_lora_targets()
    adapted = [
        name for name, _ in get_peft_model(tiny_model(), LoraConfig()).named_modules() if name.endswith("lora_A")
    ]
    assert len(adapted) == 2 * 6


def test_from_scratch_is_the_same_network_with_other_weights(finetune, place):
    """Those that the seed draws; at a rate of 0 they stay."""
    still = ("training.learning_rate=0.0", "training.warmup_steps=0", "training.seed=1")
    run = finetune("text", "rows.csv", "--from-scratch", *still)
    made = ReZeroForSequenceClassification.from_pretrained(run / "model")
    torch.manual_seed(1)
    fresh, before = (
        ReZeroForSequenceClassification(made.config).state_dict(),
        state(place / "text", AutoModelForCausalLM),
    )
    for name, value in made.state_dict().items():
        assert torch.equal(value, fresh[name]), name
        assert not name.endswith("proj.weight") or not torch.equal(value, before[name]), name
    assert "init_from" not in json.loads((run / "run.json").read_text())
    assert "\nlicense: apache-2.0\n" in (run / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere", "rows.csv"), "nowhere: there is no such folder"),
        (("text", "nowhere.csv"), "nowhere.csv: there is no such file or folder"),
        (("text", "rows.csv", "--text-column", "txt"), "has no column 'txt' in train, only text, label: choose another text_column"),
        (("text", "rows.csv", "--label-column", "class"), "has no column 'class' in train, only text, label"),
        (("text", "gaps.csv"), "gaps.csv: train, row 1: label is missing"),
        (("text", "empty.csv"), "empty.csv: train, row 1: text is None, not text"),
        (("text", "one.csv"), "one.csv has no two classes, only x: choose another label_column"),
        (("text", "rows.csv", "--revision", "main"), "config_name and revision are of hub: data"),
        (("text", STDLIB, "--text-column", "body"), "stdlib-functions has none: leave them out"),
        (("text", "two.csv"), "two.csv has no rows for train: add some"),
        (("text", "tags.parquet", "--text-column", "tokens", "--label-column", "tags"), "sequence-classification needs strings in"),
        (("text", "rows.csv", "--task", "token-classification", "--text-column", "text", "--label-column", "label"), "needs lists of words in"),
        (("text", "digits", "--task", "image-classification"), "holds a model that reads text, and --task image-classification is about images"),
        (("colour", "digits", "--task", "image-classification"), "digits holds images of 1 channels, and the model's preprocessor_config.json has image_mean for 3"),
        (("images", "rows.csv"), "holds a model that reads images, and --task sequence-classification is about text"),
        (("images", "digits", "--task", "image-classification", "--lora", "2"), "--lora is for language models"),
        (("no-tokenizer", "rows.csv"), "holds no tokenizer"),
        (("classifier", "notes.txt", "--task", "causal-lm"), "its weights are not those of a ReZeroForCausalLM: lm_head.weight is missing"),
        (("text", "notes.txt", "--task", "causal-lm", "--label-column", "label"), "--label-column is for classes"),
        (("learned", "rows.csv"), "--block-size 32: "),
        (("small", "rows.csv"), "its tokenizer has 259 tokens and its model 200"),
        (("no-pad", "rows.csv"), "its tokenizer has no pad_token"),
        (("plain", "rows.csv", "--lora", "2", "--gates", "trained"), "residual='plain' has no gates"),
        (("plain", "rows.csv", "--gates", "held"), "residual='plain' has no gates"),
        (("text", "rows.csv", "training.learning_rat=1"), "key 'learning_rat' is unknown; did you mean 'learning_rate'?"),
        (("text", "rows.csv", "model.hidden_size=1"), "override: 'model.hidden_size' is not section.key with a section of training"),
        (("text", "rows.csv", "--lora", "2", "--from-scratch"), "--from-scratch draws that at random: leave one of them out"),
        (("text", "rows.csv", "--lora", "2", "training.push_to_hub=true", "training.hub_model_id=me/x"), "--lora trains an adapter: leave it out"),
        (("text", "rows.csv", "training.eval_blocks=2"), "training.eval_blocks and training.final_eval_blocks are for causal-lm"),
        (("text", "few.csv", "--task", "causal-lm"), "few.csv has no text for validation: add some, or name a folder"),
        (("text", "few.csv", "--task", "causal-lm", "training.eval_strategy=no"), "few.csv has no text for validation"),
        (("text", "rows.csv", "training.learning_rate=-1.0"), "learning_rate=-1.0: must be a finite number"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(odd_places, finetune, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        finetune(*words)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(errors) == 1 and message in errors[0], errors
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def odd_places(place, tiny_model, tokenizer):
    """Models and files beside the others that something is wrong with."""
    shutil.copytree(place / "images", place / "colour")
    image_processor((8, 8), [0.3] * 3, [0.4] * 3).save_pretrained(place / "colour")
    for name, rows in {
        "gaps.csv": [("a", "x"), ("b", None), ("c", "x")],
        "empty.csv": [("a", "x"), (None, "x"), ("c", "x")],
        "one.csv": [("a", "x"), ("b", "x"), ("c", "x")],
        "two.csv": [("a", "x"), ("b", "y")],
        "few.csv": [(f"line {n} of a text\n" * 9, "x") for n in range(5)],
    }.items():
        with (place / name).open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    models = {
        "classifier": tiny_model(ReZeroForSequenceClassification, pad_token_id=257),
        "learned": tiny_model(position_embedding="learned", max_position_embeddings=16),
        "plain": tiny_model(residual="plain"),
        "small": tiny_model(vocab_size=200),
    }
    for name, model in models.items():
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    models["plain"].save_pretrained(place / "no-tokenizer")
    models["plain"].save_pretrained(place / "no-pad")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(place / "no-pad")


def test_words_that_the_library_refuses_are_one_line(finetune, tmp_path, capsys):
    """Where they show when the trainer is made; the folder can be used again."""
    with pytest.raises(SystemExit) as end:
        finetune("text", "rows.csv", "training.save_strategy=best")
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and error.startswith("error: training: `args.metric_for_best_model` must be")
    assert not any((tmp_path / "run").iterdir())


def test_evaluations_of_text_read_as_many_blocks_as_they_are_told(place, tmp_path):
    """During training `eval_blocks`, at the end `final_eval_blocks`."""
    base, about = find_base(str(place / "text"), "causal-lm"), TaskConfig("causal-lm", str(place / "notes.txt"))
    args = ReZeroTrainingArguments(tmp_path, report_to="none", eval_blocks=1, final_eval_blocks=2)
    rows = read_task(base, about, args, 32, str(place / "cache"))
    assert [len(rows.words["eval_dataset"]), *map(len, rows.held_out.values())] == [1, 2, 2]


def test_checkpoints_are_whole_models_and_saves_reach_the_hub(finetune, hub, tmp_path, monkeypatch):
    """What a run saves on the way has its tokenizer and its card, so it can be tuned further, exported and pushed."""
    for name, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(push_queue, "COMMAND", (sys.executable, "-c", NOTED))
    words = ("training.save_strategy=steps", "training.save_steps=1", "training.push_to_hub=true")
    run = finetune("text", "rows.csv", *words, "training.hub_model_id=me/tuned")
    checkpoint = run / "checkpoints" / "checkpoint-1"
    assert find_base(str(checkpoint), "sequence-classification").config.num_labels == 2
    assert "This is step 1 of 2" in (checkpoint / "README.md").read_text()
    pushed = [json.loads(line)["step"] for line in (run / "pushes.jsonl").read_text().splitlines()]
    assert pushed[-1] == 2 and not list((run / "checkpoints").glob(".push-*"))


# A push that takes the place of the real one: it notes itself.
NOTED = """
import json, sys
request = json.loads(sys.argv[1])
with open(request["journal"], "a") as journal:
    journal.write(json.dumps({"step": request["step"], "to": request["to"], "commit": "c" * 40}) + "\\n")
"""


def test_a_run_that_blows_up_says_what_helps(finetune, capsys):
    """Not that the same command goes on, which it does not."""
    words = ("training.learning_rate=1.0e+30", "training.max_grad_norm=0", "training.warmup_steps=0")
    with pytest.raises(SystemExit):
        finetune("text", "rows.csv", *words)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "Lower training.learning_rate" in error
    assert error.endswith("Nothing is exported; begin anew, with another --output.")


def test_a_run_told_to_stop_is_not_taken_for_finished(finetune, tmp_path, monkeypatch, capsys):
    """SIGTERM in step 1: nothing is measured or exported, and the status says so."""

    class Tell(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            signal.raise_signal(signal.SIGTERM)

    train = ReZeroTrainer.train
    told = lambda trainer, **words: trainer.add_callback(Tell()) or train(trainer, **words)  # noqa: E731
    monkeypatch.setattr(ReZeroTrainer, "train", told)
    with pytest.raises(SystemExit) as end:
        finetune("text", "rows.csv")
    assert end.value.code == 143
    assert "told to stop at step 1 of 2" in capsys.readouterr().out
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "run.json").exists()


def test_a_trained_model_is_not_lost_to_a_failing_export(finetune, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rezero_hf.export.export_folder", lambda *_, **__: (tmp_path / "nowhere" / "file").read_text())
    with pytest.raises(SystemExit):
        finetune("text", "rows.csv", "--lora", 2)
    assert "its weights are safe in" in capsys.readouterr().err
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "rescued-model").num_labels == 2


def test_a_folder_that_holds_something_is_left_alone(finetune, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit):
        finetune("text", "rows.csv")
    assert "run is not empty; choose another folder with --output" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_labelled_text_is_held_out_by_its_text_and_in_no_two_splits(tmp_path):
    """A missing split is a tenth of the training texts; one that is there takes its texts out of training."""
    rows = [{"text": f"text {n % 30}", "label": n % 3} for n in range(60)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_labelled(str(path), "text", "label")
    texts = {split: {row.text for row in rows} for split, rows in found.splits.items()}
    assert {split: len(rows) for split, rows in found.splits.items()} == {"train": 48, "validation": 6, "test": 6}
    assert len(set.union(*texts.values())) == sum(map(len, texts.values())) == 30
    assert found.classes == ["0", "1", "2"]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    found = read_labelled(str(tmp_path), "text", "label")
    assert [row.text for row in found.splits["test"]] == [f"text {n}" for n in range(5)]
    assert not {row.text for row in found.splits["train"]} & {f"text {n}" for n in range(5)}
    assert found.record["origin"]["rows_in_an_earlier_split"] == 10
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "new", "label": 7}) + "\n")
    with pytest.raises(UserError, match="test has the label '7', which no training row has"):
        read_labelled(str(tmp_path), "text", "label")
    path.write_text("".join(json.dumps({**row, "label": {"answer": row["label"]}}) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"column 'label' holds {'answer': \d}; a label is a word or a number"):
        read_labelled(str(path), "text", "label")


def test_minus_one_is_a_class_but_of_a_class_label_and_a_split_without_labels_is_none(tmp_path):
    """Whole numbers are in their order; a benchmark's test split, all of it -1, is carved instead."""
    rows = [{"text": f"text {n}", "label": n % 12 - 1} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_labelled(str(tmp_path / "rows.jsonl"), "text", "label")
    assert found.classes == [str(n) for n in range(-1, 11)]
    assert all(int(found.classes[row.label]) == int(row.text[5:]) % 12 - 1 for row in found.splits["train"])
    types = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    for split, labels in {"train": [0, 1] * 10, "test": [-1] * 5}.items():
        rows = [{"text": f"{split} {n}", "label": label} for n, label in enumerate(labels)]
        Dataset.from_list(rows, features=types).to_parquet(tmp_path / "glue" / f"{split}.parquet")
    found = read_labelled(str(tmp_path / "glue"), "text", "label")
    assert [row.text[:5] for row in found.splits["test"]] == ["train"] * 2
    Dataset.from_list([{"text": "train", "label": -1}], features=types).to_parquet(tmp_path / "glue" / "train.parquet")
    with pytest.raises(UserError, match="train, row 0: label is missing"):
        read_labelled(str(tmp_path / "glue"), "text", "label")


def test_a_data_set_of_several_configurations_is_read_by_name(tmp_path):
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.csv\n" for name in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in ("one", "two"):
        lines = "".join(f"{name} {n},{n % 2}\n" for n in range(20))
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{lines}")
    found = read_labelled(f"hub:{tmp_path}", "text", "label", config_name="two")
    assert all(row.text.startswith("two") for rows in found.splits.values() for row in rows)


def test_a_folder_of_rows_is_read_as_rows(tokenizer, tiny_config, tmp_path, monkeypatch):
    """Not as the text of its files, braces and all; a folder that has other files too is text. Neither is a data set of
    the Hub for the card."""
    monkeypatch.chdir(tmp_path)
    folder = Path("my/rows")
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": f"line {n} of a text"}) + "\n" for n in range(99)))
    texts, cards = [], []
    for _ in range(2):
        data = text_blocks(TaskConfig("causal-lm", "my/rows"), tokenizer, 16, str(tmp_path / "cache"))
        texts.append(tokenizer.decode(data.train(0, 1)[0]["input_ids"]))
        cards.append(render_card({"data": data.record}, tiny_config()))
        (folder / "notes.txt").write_text("text\n" * 99)
    assert "line" in texts[0] and not set('{"') & set(texts[0])
    assert data.record["sources"][0]["kind"] == "files"
    assert all(card.data.datasets is None for card in cards) and "trained on `my/rows/`." in cards[0].text


def test_a_words_label_is_at_its_last_token(place, tokenizer):
    """Where a causal network has seen the whole word; the words read as text does, with spaces between them."""
    task = TaskConfig("token-classification", str(place / "tags.parquet"))
    row = labelled_rows(task, tokenizer, 100).held_out["test"][0]
    text = tokenizer.decode(row["input_ids"])
    assert text.startswith("def f") and text.endswith(" ( )")
    ends = [place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX]
    assert ends == [n - 1 for n in range(1, len(text) + 1) if n == len(text) or text[n] == " "]
    assert [row["labels"][end] for end in ends] == [0, 1, 2, 2]


def test_words_past_the_block_are_counted_and_rows_without_a_label_left_out(tokenizer, tmp_path):
    """A row whose first word does not fit has no label, and its loss would be no number."""
    rows = [{"tokens": [f"a{n}", "b", "long" * 9], "tags": ["x", "y", "x"]} for n in range(18)]
    rows += [{"tokens": [f"{n}" * 40], "tags": ["x"]} for n in range(2)]
    for split, some in {"train": rows, "test": rows[:2] + rows[-1:], "validation": rows[2:4]}.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    found = labelled_rows(TaskConfig("token-classification", str(tmp_path)), tokenizer, 8)
    assert found.rows == 14 and len(found.held_out["test"]) == 2
    assert found.record["words_cut"] == {"train": 14 + 1, "validation": 2, "test": 2 + 1}
    with pytest.raises(UserError, match="no row of train has a first word that fits into a block"):
        labelled_rows(TaskConfig("token-classification", str(tmp_path)), tokenizer, 1)


STDLIB_MODULE = '''
def double{n}(x, *, by=2):
    """Multiply.{n}"""
    def inner():
        return None
    return by * x

def tell{n}(x): print(x)

class Stack{n}:
    def leave{n}(self): return None
    def walk{n}(self):
        yield 1
'''


def test_stdlib_functions_say_whether_something_is_given_back(tmp_path, monkeypatch):
    """Head and docstring without the body; what an inner function returns does not count. Split as the corpus is, and
    what every module has is no held-out row: a model pretrained on the corpus has read its body. Of every two rows of a
    split one gives something back."""
    for n in range(60):
        (tmp_path / f"m{n}.py").write_text(STDLIB_MODULE.format(n=n))
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    found = read_labelled(STDLIB, "text", "label", str(tmp_path / "cache"))
    labels = {row.text: found.classes[row.label] for rows in found.splits.values() for row in rows}
    assert labels["def double7(x, *, by=2):\n    Multiply.7"] == "a value"
    assert labels["def tell7(x):"] == labels["def leave7(self):"] == labels["def inner():"] == "nothing"
    assert labels["def walk7(self):"] == "a value"
    held_out = [row.text for split in ("validation", "test") for row in found.splits[split]]
    assert "def inner():" not in held_out and held_out
    assert found.record["origin"]["rows_in_an_earlier_split"] > 0
    for rows in found.splits.values():
        assert 2 * sum(row.label for row in rows) == len(rows) > 0
    numbers = [{re.search(r"\d+", row.text)[0] for row in rows if row.label} for rows in found.splits.values()]
    assert sum(map(len, numbers)) == len(set().union(*numbers)) == 60
    monkeypatch.setattr("rezero_hf.labelled.ast.parse", lambda *_: pytest.fail("read again"))
    assert read_labelled(STDLIB, "text", "label", str(tmp_path / "cache")) == found
