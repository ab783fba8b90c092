"""A finished model measured: as training measures, token by token as a slow reference, and kept where the card reads."""

import json
import math
import runpy
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from hub_server import httpx
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

from rezero_hf import (
    ReZeroForMaskedLM,
    ReZeroForSequenceClassification,
    ReZeroForTokenClassification,
    ReZeroMLPConfig,
    ReZeroMLPForImageClassification,
    ReZeroTrainer,
    ReZeroTrainingArguments,
    evaluation,
    export_folder,
    opening,
    verify_folder,
)
from rezero_hf.blocks import IGNORE_INDEX, EvalBlocks
from rezero_hf.checkpoints import MANIFEST
from rezero_hf.data import DataConfig, prepare
from rezero_hf.errors import UserError
from rezero_hf.evaluation import evaluate_images, evaluate_labels, evaluate_text, why_not_kept
from rezero_hf.evaluation_data import data_for
from rezero_hf.image_data import EvalImages, ImageDataConfig, accuracy_metrics, prepare_images
from rezero_hf.opening import open_model
from rezero_hf.sources import Source
from rezero_hf.tasks import TaskConfig, labelled_rows, text_blocks
from rezero_hf.tokenization import token_byte_lengths, train_bpe


TEXT = "".join(f"line {n} says {n * n}, “ñ”\n" for n in range(90))
WINDOW = 16


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return DataConfig([Source(str(tmp_path / "text.txt"))], block_size=WINDOW, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def opened(tiny_model, tokenizer, tmp_path):
    """A model large enough in its weights that context matters."""
    return opened_from(tiny_model(initializer_range=0.3), tokenizer, tmp_path / "model")


def opened_from(model, tokenizer, folder):
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return open_model(str(folder))


def trainer(model, tmp_path, **words):
    return ReZeroTrainer(
        model, ReZeroTrainingArguments(str(tmp_path / "out"), disable_tqdm=True, report_to="none"), **words
    )


def test_blockwise_is_what_training_measures(opened, config, tokenizer, tmp_path):
    """The same loss, bits per byte, tokens and bytes, whatever the batch size; all bytes of the split are scored."""
    prepared = prepare(config, tokenizer, progress=False)
    of_training = trainer(opened.model, tmp_path, token_bytes=token_byte_lengths(tokenizer))
    for size in (8, 3):
        measured = evaluate_text(opened, config, ["validation", "test"], None, None, size)
        assert (measured["way"], measured["window"], measured["stride"]) == ("blockwise", WINDOW, WINDOW)
        for split, found in measured["results"].items():
            expected = of_training.measure(EvalBlocks(prepared, split))
            assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
            assert found["bytes"] == prepared.totals(split)["bytes"] > 0
            assert found["perplexity"] == pytest.approx(math.exp(expected["loss"]), rel=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(WINDOW, 1), (WINDOW, 5), (WINDOW, WINDOW), (512, 512)])
def test_every_token_is_scored_once_from_the_context_that_is_promised(
    opened, config, tokenizer, window, stride, tmp_path
):
    """Against one call of the model for each token, with the context that its block gives it; the last case is all.

    No block reaches from one source into the other.
    """
    (tmp_path / "other.txt").write_text(TEXT[300:1300])
    config = replace(config, sources=[*config.sources, Source(str(tmp_path / "other.txt"))])
    prepared = prepare(config, tokenizer, progress=False)
    streams = [prepared.stream("test", source) for source in range(2)]
    assert min(map(len, streams)) > WINDOW
    nats, right, least = 0.0, 0, window
    for stream in streams:
        text = torch.from_numpy(stream.read(-1, len(stream)))
        for token in range(len(stream)):
            # The first block that holds the token, which is the one with most of the text before it.
            start = max(0, math.ceil((token - window + 1) / stride)) * stride
            with torch.no_grad():
                logits = opened.model(text[None, start : token + 1]).logits[0, -1]
            nats -= logits.log_softmax(-1)[text[token + 1]].item()
            right += int(logits.argmax() == text[token + 1])
            least = min(least, token - start + 1 if token >= window else window)
    assert least >= window - stride + 1
    found = evaluate_text(opened, config, ["test"], window, stride, 8)["results"]["test"]
    tokens = sum(map(len, streams))
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"], rel=1e-5)
    assert found["accuracy"] == right / tokens


def test_all_is_all_of_the_text_in_one_number(opened, config):
    parts = evaluate_text(opened, config, ["train", "validation", "test", "all"], None, None, 8)["results"]
    whole = parts.pop("all")
    assert whole["bytes"] == len(TEXT.encode()) == sum(part["bytes"] for part in parts.values())
    assert whole["loss"] * whole["tokens"] == pytest.approx(
        sum(part["loss"] * part["tokens"] for part in parts.values())
    )


def test_another_librarys_model_with_its_own_tokenizer(config, tmp_path):
    """GPT-2 on a BPE: the same bytes over fewer tokens, and no window beyond its positions."""
    bpe = train_bpe([TEXT], 300)
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=12))
    opened = opened_from(gpt2, bpe, tmp_path / "gpt2")
    measured = evaluate_text(opened, config, ["test"], None, None, 8)
    found = measured["results"]["test"]
    assert measured["window"] == 12 and found["tokens"] < found["bytes"]
    # Random weights know nothing: about one of 300.
    assert found["loss"] == pytest.approx(math.log(300), rel=0.02)
    with pytest.raises(UserError, match=r"--window 13: .*gpt2 has positions for 12 tokens"):
        evaluate_text(opened, config, ["test"], 13, None, 8)


def test_a_model_that_looks_ahead_is_refused(config, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertLMHeadModel(BertConfig(vocab_size=300, initializer_range=1.0, **sizes))
    with pytest.raises(UserError, match="depends on later ones"):
        evaluate_text(opened_from(bert, train_bpe([TEXT], 300), tmp_path / "bert"), config, ["test"], None, None, 8)


def test_a_diverged_model_is_measured_as_it_is(opened, config):
    """It does not look ahead; its loss is no number."""
    torch.nn.init.constant_(opened.model.get_output_embeddings().weight, math.nan)
    assert math.isnan(evaluate_text(opened, config, ["test"], None, None, 8)["results"]["test"]["loss"])


def test_images_as_training_measures_them(tmp_path):
    """Loss and accuracy of a classifier of digits; other images are refused."""
    data = ImageDataConfig("digits", augmentation="none", cache_dir=str(tmp_path / "cache"))
    images = prepare_images(data, progress=False)
    model = ReZeroMLPForImageClassification(ReZeroMLPConfig(image_size=8, num_channels=1, hidden_size=8, num_labels=10))
    opened = opened_from(model, images.image_processor(), tmp_path / "digits")
    results = evaluate_images(opened, data, ["validation", "test"], 8)["results"]
    of_training = trainer(opened.model, tmp_path, compute_metrics=accuracy_metrics)
    for split, found in results.items():
        expected = of_training.measure(EvalImages(images, split))
        assert found == pytest.approx({**expected, "images": len(EvalImages(images, split))}, rel=1e-5)
    other = ReZeroMLPForImageClassification(ReZeroMLPConfig(image_size=8, num_channels=1, hidden_size=8, num_labels=9))
    with pytest.raises(UserError, match="10 classes, which is not what"):
        evaluate_images(opened_from(other, images.image_processor(), tmp_path / "other"), data, ["test"], 8)


ROWS = [
    {"text": f"def f{n}(x): return x" if n % 2 else f"class C{n}: pass", "label": "odd" if n % 2 else "even"}
    for n in range(30)
]
TAGS = [{"tokens": ["def", f"f{n}", "(", ")"], "tags": ["key", "name", "sign", "sign"]} for n in range(30)]


def written(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def classifier(tiny_model, tokenizer, tmp_path):
    """A classifier of texts, exported, whose classes are in another order than the data's."""
    model = tiny_model(ReZeroForSequenceClassification, initializer_range=0.3, id2label={0: "odd", 1: "even", 2: "?"})
    return export_folder(model, tokenizer, tmp_path / "classifier", run={"name": "classifier"})


@pytest.mark.parametrize(
    "names", [["sign", "name", "key"], ["LABEL_0", "LABEL_1", "LABEL_2"]], ids=["names", "numbers"]
)
def test_words_are_classified_as_one_by_one(tiny_model, tokenizer, tmp_path, names):
    """Classes are those of the same name, or number where they have none; every row alone gives the same numbers."""
    rows = TAGS if "key" in names else [row | {"tags": [2, 0, 1, 1]} for row in TAGS]
    task = TaskConfig("token-classification", str(written(rows, tmp_path / "tags.jsonl")))
    model = tiny_model(ReZeroForTokenClassification, initializer_range=0.3, id2label=dict(enumerate(names)))
    opened = opened_from(model, tokenizer, tmp_path / "model")
    data, fingerprint = data_for(opened, task.data)
    assert fingerprint is None and data.task == task
    found = evaluate_labels(opened, data, ["test", "all"], None, 8)["results"]
    assert found["all"]["words"] == 4 * len(rows)
    prepared, nats, right = labelled_rows(task, tokenizer, 64), 0.0, 0
    for row in prepared.held_out["test"]:
        with torch.no_grad():
            scores = opened.model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for place, label in enumerate(row["labels"]):
            if label != IGNORE_INDEX:
                number = names.index(prepared.id2label[label]) if "key" in names else label
                nats, right = nats - scores[place, number].item(), right + int(scores[place].argmax() == number)
    words = found["test"]["words"]
    assert found["test"] == pytest.approx({"loss": nats / words, "accuracy": right / words, "words": words}, rel=1e-5)


def test_a_classifiers_accuracy_is_what_fine_tuning_measures(classifier, tokenizer, tmp_path, evaluate):
    """By the script, and kept in its card; of the same rows under another class the model says that it is not its."""
    rows = written(ROWS, tmp_path / "rows.jsonl")
    status, said, error = evaluate(classifier, rows, "--split", "test", "--batch-size", 2)
    assert status == 0 and "row by row, of 64 tokens at most" in said, error
    (kept,) = json.loads((classifier / "run.json").read_text())["evaluations"]
    prepared = labelled_rows(TaskConfig("sequence-classification", str(rows)), tokenizer, 64)
    model = open_model(str(classifier)).model
    right = 0
    for row in prepared.held_out["test"]:
        with torch.no_grad():
            guess = model(torch.tensor([row["input_ids"]])).logits.argmax().item()
        right += model.config.id2label[guess] == prepared.id2label[row["labels"]]
    assert kept["results"]["test"]["texts"] == len(prepared.held_out["test"]) == 3
    assert kept["results"]["test"]["accuracy"] == right / 3
    card = (classifier / "README.md").read_text()
    assert "| rows.jsonl | test | row by row, 64 tokens |" in card
    verify_folder(classifier)
    other = written([row | {"label": row["label"].upper()} for row in ROWS], tmp_path / "other.jsonl")
    for words, message in [
        ((other,), "classifier does not know the class 'EVEN', only odd, even, ?"),
        ((rows, "--stride", 2), "--stride is for language models"),
        ((rows, "--label-column", "stars"), "has no column 'stars' in train"),
        (("scripts/recipes/quickstart.yaml",), "its data are not what ReZeroForSequenceClassification reads"),
        (
            ("scripts/recipes/quickstart.yaml", "--text-column", "x"),
            "--text-column: scripts/recipes/quickstart.yaml says",
        ),
    ]:
        status, _, error = evaluate(classifier, *words)
        assert status == 2 and message in error, (words, error)


def test_data_are_read_as_fine_tuning_reads_them(opened, tokenizer, tmp_path):
    """A file of rows by its column of text, not as the text of the file; images by class from a folder."""
    rows = written([{"body": row["text"] * 9} for row in ROWS], tmp_path / "rows.jsonl")
    data, _ = data_for(opened, str(rows), str(tmp_path / "cache"), text_column="body")
    found = evaluate_text(opened, data, ["all"], None, None, 8)["results"]["all"]
    assert found["bytes"] == sum(len(row["text"]) * 9 for row in ROWS)
    of_training = text_blocks(TaskConfig("causal-lm", str(rows), "body"), tokenizer, WINDOW, str(tmp_path / "cache"))
    assert of_training.record["fingerprint"] == prepare(data, tokenizer).fingerprint
    with pytest.raises(UserError, match="--label-column is for classes"):
        data_for(opened, str(rows), label_column="label")
    mlp = opened_from(ReZeroMLPForImageClassification(ReZeroMLPConfig(image_size=4)), None, tmp_path / "mlp")
    for name in ("a/1.png", "b/2.png", "parquet/train.parquet"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / name).touch()
    assert data_for(mlp, str(tmp_path / "pictures" / "a"))[0].source == f"hub:{tmp_path / 'pictures' / 'a'}"
    data, _ = data_for(mlp, str(tmp_path / "pictures" / "parquet"))
    assert (data.source, data.path) == ("parquet", str(tmp_path / "pictures" / "parquet"))
    with pytest.raises(UserError, match=r"--text-column, .* are for text"):
        data_for(mlp, "digits", text_column="text")


@pytest.fixture
def evaluate(monkeypatch, capsys, tmp_path):
    """Runs the script as the command line does; gives its exit status, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["evaluate_model.py", *map(str, arguments), "--cache-dir", str(tmp_path / "c")]
        )
        with pytest.raises(SystemExit) as exit:
            runpy.run_path("scripts/evaluate_model.py", run_name="__main__")
        return exit.value.code, *capsys.readouterr()

    return run


def test_the_script_writes_where_the_card_reads(tiny_model, tokenizer, tmp_path, evaluate, config, monkeypatch):
    """On what the recipe says: into `run.json`, table and metadata of the card; the same again takes its place."""
    run = tmp_path / "runs" / "tiny"
    text = tmp_path / "text.txt"
    recipe = f"data: {{sources: [{{source: {text}}}], block_size: {WINDOW}}}\n"
    known = {"name": "tiny", "repo_id": "org/tiny", "data": prepare(config, tokenizer, progress=False).record()}
    export_folder(tiny_model(), tokenizer, run / "model", run=known, recipe_text=recipe)
    (run / "recipe.yaml").write_text(recipe)
    monkeypatch.setenv("HOME", str(tmp_path))
    status, said, error = evaluate(run / "model", "--output", "~/new/result.json")
    assert status == 0 and "blockwise, windows of 16 tokens" in said, error
    for words in (("--stride", 8, "--split", "test"), ("--split", "test")):
        assert evaluate(run / "model", *words)[0] == 0
    kept = json.loads((run / "model" / "run.json").read_text())
    assert kept["name"] == "tiny"
    assert [(found["way"], list(found["results"])) for found in kept["evaluations"]] == [
        ("blockwise", ["validation"]),
        ("sliding", ["test"]),
        ("blockwise", ["test"]),
    ]
    card = (run / "model" / "README.md").read_text()
    bits = kept["evaluations"][1]["results"]["test"]["bits_per_byte"]
    assert f"value: {bits}\n      name: bits per byte (sliding, 16 tokens every 8)" in card
    assert "| text.txt | test | sliding, 16 tokens every 8 |" in card
    verify_folder(run / "model")
    assert '"org/tiny"' in card and "USER/NAME" not in card
    record = json.loads((tmp_path / "new" / "result.json").read_text())
    assert f"| validation | {record['results']['validation']['loss']:.4f} |" in said
    assert {"command", "started", "versions", "device", "model", "precision"} <= set(record)

    text.write_text(TEXT * 2)
    status, _, error = evaluate(run / "model", "--split", "test")
    assert status == 2 and "what its recipe names is not what it was trained on (fingerprint" in error
    # Other text is another result, in blocks as long as in training.
    status, said, _ = evaluate(run / "model", text, "--split", "test")
    assert status == 0 and "windows of 16 tokens" in said
    assert len(json.loads((run / "model" / "run.json").read_text())["evaluations"]) == 4


def test_a_model_from_the_hub_by_its_revision(opened, hub, tmp_path, config):
    """What is measured is what that commit holds, and the commit is recorded."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("org/name")
    commit = api.upload_folder(repo_id="org/name", folder_path=opened.folder).oid
    fetched = open_model(f"org/name@{commit}")
    assert fetched.commit == commit
    expected = evaluate_text(opened, config, ["test"], None, None, 8)["results"]
    assert evaluate_text(fetched, config, ["test"], None, None, 8)["results"] == expected


def test_a_users_mistake_is_one_line(tiny_model, tokenizer, tmp_path, evaluate):
    (tmp_path / "text.txt").write_text(TEXT)
    opened_from(tiny_model(), tokenizer, tmp_path / "lm")
    shutil.copytree(tmp_path / "lm", tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    tiny_model(ReZeroForMaskedLM).save_pretrained(tmp_path / "masked")
    ReZeroMLPForImageClassification(ReZeroMLPConfig(image_size=4, hidden_size=8)).save_pretrained(tmp_path / "mlp")
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    for name, words in (
        ("headless", {"architectures": 5}),
        ("gptq", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ):
        shutil.copytree(tmp_path / "lm", tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | words))
    shutil.copytree(tmp_path / "lm", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    export_folder(tiny_model(), tokenizer, tmp_path / "torn")
    (tmp_path / "torn" / "run.json").write_text('{"name":')
    text = tmp_path / "text.txt"
    for words, message in [
        ((tmp_path / "none", text), "there is no such folder"),
        (("no/such", text), "no/such: there is no such folder, and it cannot be had from the Hub"),
        ((tmp_path, text), "holds no model"),
        ((tmp_path / "mute", text), "holds no tokenizer; put the model's own there"),
        ((tmp_path / "headless", text), "headless holds no model (architectures is 5 in its config.json"),
        ((tmp_path / "gptq", text), "gptq: its weights cannot be loaded (Loading a GPTQ quantized model requires"),
        ((tmp_path / "adapter", text), "adapter holds an adapter; merge it into its model"),
        ((tmp_path / "torn", text), "run.json is damaged (Expecting value"),
        ((tmp_path / "lm", text, "--output", tmp_path), "this is a folder; name a file"),
        ((tmp_path / "masked", text), "holds ReZeroForMaskedLM, which is neither a causal language model nor"),
        ((tmp_path / "mlp", "digits"), "holds no image processor"),
        ((tmp_path / "mlp", "digits", "--stride", 2), "are for text"),
        ((tmp_path / "lm",), "no recipe beside it says what it was trained on"),
        ((tmp_path / "lm", "no.txt"), "'no.txt' is no file, folder"),
        ((tmp_path / "lm", "scripts/recipes/cifar_resnets.yaml"), "its data are not what ReZeroForCausalLM reads"),
        ((tmp_path / "lm", text, "--stride", 65), "stride 65: must be at least 1 and at most the window, 64 tokens"),
    ]:
        status, _, error = evaluate(*words)
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(lines) == 1 and message in lines[0], (words, error)


def test_what_has_no_card_of_ours_is_left_as_it_is(opened, tmp_path, evaluate):
    (tmp_path / "text.txt").write_text(TEXT)
    before = {path: path.read_bytes() for path in opened.folder.iterdir()}
    status, said, _ = evaluate(opened.folder, tmp_path / "text.txt", "--split", "test")
    assert status == 0 and "has no card of rezero_hf" in said
    assert {path: path.read_bytes() for path in opened.folder.iterdir()} == before


def test_where_an_evaluation_is_not_kept(tiny_model, tokenizer, tmp_path, monkeypatch):
    """Only an export that can be written keeps it; that is known before the work."""
    opened = open_model(str(export_folder(tiny_model(), tokenizer, tmp_path / "model")))
    assert why_not_kept(opened) is None
    assert "only an export on this machine" in why_not_kept(opened._replace(commit="abc"))

    def full(dir):
        raise OSError("Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr("tempfile.TemporaryFile", full)
        assert "cannot write into" in why_not_kept(opened)
    (opened.folder / MANIFEST).touch()
    assert "only an export on this machine" in why_not_kept(opened)


def test_a_recipe_from_the_hub_names_corpora_and_nothing_else(opened, tmp_path):
    """Neither files nor folders of this machine, nor where its cache lies; of a folder here it does."""
    fetched = opened._replace(commit="abc")

    def write(source):
        (opened.folder / "recipe.yaml").write_text(f"data: {{sources: [{source!r}], cache_dir: {tmp_path}/theirs}}\n")

    for source in ("python-stdlib", "enwik8", "hub:org/text"):
        write(source)
        assert data_for(opened, None)[0].cache_dir == f"{tmp_path}/theirs"
        data, _ = data_for(fetched, None)
        assert (data.sources[0].source, data.cache_dir) == (source, None)
        assert data_for(fetched, None, "mine")[0].cache_dir == "mine"
    for source in ("enwik8:/etc/passwd", "text.txt", "digits", "hub:/etc", "hub:rezero_hf/models"):
        write(source)
        with pytest.raises(UserError, match=f"its recipe names files, '{source}'; name text or images of yours, DATA"):
            data_for(fetched, None)


def test_no_code_of_a_folder_is_run(tmp_path, monkeypatch):
    """Not even where somebody says yes to the library's question."""
    ReZeroMLPForImageClassification(ReZeroMLPConfig(image_size=8, num_channels=1, hidden_size=8)).save_pretrained(
        tmp_path
    )
    (tmp_path / "preprocessor_config.json").write_text('{"auto_map": {"AutoImageProcessor": "theirs.Theirs"}}')
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Theirs: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="holds no image processor"):
        evaluate_images(open_model(str(tmp_path)), ImageDataConfig("digits"), ["test"], 8)
    assert not (tmp_path / "ran").exists()


def test_a_lost_connection_is_one_line(monkeypatch):
    def lost(*_, **__):
        raise httpx.RemoteProtocolError("peer closed connection without sending complete message body")

    monkeypatch.setattr(opening, "snapshot_download", lost)
    with pytest.raises(UserError, match=r"org/name: .*cannot be had from the Hub \(peer closed connection"):
        open_model("org/name")


def test_text_needs_a_package(opened, config, monkeypatch):
    monkeypatch.setattr(evaluation, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"pip install 'rezero_hf\[eval\]'"):
        evaluate_text(opened, config, ["test"], None, None, 8)
