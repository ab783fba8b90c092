"""Labelled images: decoded once and exactly, split the same for every seed, read in an order that a resume repeats."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, config, disable_progress_bars
from PIL import Image as Pil
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator, pipeline

from rezero_hf import (
    ReZeroResNetConfig,
    ReZeroResNetForImageClassification,
    cifar_image_processor,
    image_config,
    image_data,
    image_sources,
)
from rezero_hf.image_data import EvalImages, ImageDataConfig, TrainImages, accuracy_metrics, prepare_images
from rezero_hf.sources import SPLITS, DataError


CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FEATURES = Features({"img": Image(), "label": ClassLabel(names=CLASSES)})


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """The library's cache in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        disable_progress_bars()
        yield


def pictures(number, seed=0, size=32):
    """Random images; `labels` leave some classes rarer than others."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (number, size, size, 3), dtype=np.uint8)
    labels = rng.choice(10, number, p=np.arange(1, 11) / 55).tolist()
    # A class is told by the brightness of its images, so that something can be learned.
    pixels = (pixels * np.linspace(0.1, 1, 10)[labels][:, None, None, None]).astype(np.uint8)
    return pixels, labels


def write(path, pixels, labels, features=FEATURES, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Pil.fromarray(one) if isinstance(one, np.ndarray) else one for one in pixels]
    names = list(features)
    rows = {names[0]: images, names[1]: labels, **columns}
    Dataset.from_dict(rows, features=features).to_parquet(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """200 training and 40 test images in parquet files, as CIFAR-10's are."""
    folder = tmp_path_factory.mktemp("cifar")
    write(folder / "train-00000-of-00002.parquet", *(half[:120] for half in pictures(200)))
    write(folder / "train-00001-of-00002.parquet", *(half[120:] for half in pictures(200)))
    write(folder / "test.parquet", *pictures(40, seed=1))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def prepare(folder, cache):
    """Prepares the folder; keyword arguments change fields."""
    return lambda **fields: prepare_images(
        ImageDataConfig(**{"path": str(folder), "cache_dir": cache, **fields}), progress=False
    )


def channels_first(pixels):
    return pixels.transpose(0, 3, 1, 2)


def test_pixels_and_labels_are_those_of_the_files(prepare):
    """In the files' order, with the classes' names; nothing held out is trained on and nothing is lost."""
    prepared = prepare(validation_size=0)
    pixels, labels = pictures(200)
    np.testing.assert_array_equal(prepared.split("train").pixels(), channels_first(pixels))
    assert prepared.split("train").labels.tolist() == labels
    np.testing.assert_array_equal(prepared.split("test").pixels(), channels_first(pictures(40, seed=1)[0]))
    assert prepared.id2label == dict(enumerate(CLASSES))
    assert (prepared.num_labels, prepared.channels, prepared.size) == (10, 3, (32, 32))
    assert len(prepared.split("validation")) == 0
    prepared.verify()


def test_what_is_held_out(prepare):
    """A tenth by default; each class in proportion, a smaller number is part of a larger one, no image on both sides."""
    whole = prepare(validation_size=0).split("train").labels
    found = {}
    for size in (20, 55, 100):
        prepared = prepare(validation_size=size)
        assert [len(prepared.split(split)) for split in SPLITS] == [200 - size, size, 40]
        validation, train = (prepared.split(split) for split in ("validation", "train"))
        share = np.bincount(validation.labels, minlength=10) - np.bincount(whole) * size / 200
        assert abs(share).max() <= 1
        found[size] = {image.tobytes() for image in validation.pixels()}
        assert len(found[size] | {image.tobytes() for image in train.pixels()}) == 200
    assert found[20] < found[55] < found[100]
    assert len(prepare().split("validation")) == 20


def test_some_classes_alone_are_renumbered(prepare):
    """Every split has exactly the images of those classes, numbered as they were named; the whole is as it was."""
    whole, some = prepare(), prepare(classes=[7, 2, 9])
    assert some.id2label == {new: whole.id2label[old] for new, old in enumerate((7, 2, 9))} and some.num_labels == 3
    assert some.record()["classes"] == list(some.id2label.values())
    splits = ("train", "validation"), ("test",)
    for parts in splits:
        old, new = ([p.split(part) for part in parts] for p in (whole, some))
        for number, was in enumerate((7, 2, 9)):
            images = [
                {pixels.tobytes() for split in one for pixels in split.pixels(np.flatnonzero(split.labels == label))}
                for one, label in ((old, was), (new, number))
            ]
            assert images[0] == images[1] != set()
        assert {label for split in new for label in split.labels.tolist()} == {0, 1, 2}


def test_a_missing_test_split_is_held_out_first(tmp_path, cache):
    """It stays the same whatever is held out for validation."""
    write(tmp_path / "train.parquet", *pictures(100))
    fields = {"path": [str(tmp_path / "train.parquet")], "cache_dir": cache, "test_size": 30}
    one, two = (prepare_images(ImageDataConfig(**fields, validation_size=n), progress=False) for n in (0, 25))
    assert [len(two.split(split)) for split in SPLITS] == [45, 25, 30]
    np.testing.assert_array_equal(one.split("test").pixels(), two.split("test").pixels())


def test_images_are_decoded_once(tmp_path, folder, monkeypatch):
    """By one of several that ask at the same time; later ones, and other sizes or augmentations, read the result."""
    reads = []
    read = image_sources.ImageFiles.read
    monkeypatch.setattr(image_sources.ImageFiles, "read", lambda self: reads.append(1) or read(self))

    def prepare(number):
        fields = {"path": str(folder), "cache_dir": str(tmp_path), "validation_size": number, "augmentation": "none"}
        return prepare_images(ImageDataConfig(**fields), progress=False).index["fingerprint"]

    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(prepare, range(3)))) == 1
    assert len(reads) == 1


def test_other_files_are_other_images(tmp_path, cache):
    """A file that has changed is decoded anew, and the record says which it was."""
    records = []
    for seed in (0, 1):
        write(tmp_path / "train.parquet", *pictures(30, seed))
        fields = {"path": str(tmp_path), "cache_dir": cache}
        records.append(prepare_images(ImageDataConfig(**fields), progress=False).record())
    assert records[0]["fingerprint"] != records[1]["fingerprint"]
    assert records[0]["stored"]["train"]["pixels_sha256"] != records[1]["stored"]["train"]["pixels_sha256"]


def test_the_record_says_what_was_read(prepare, tmp_path):
    """JSON: source, notice, hashes of files and pixels, sizes, normalisation; no path of this machine."""
    record = prepare().record()
    text = json.dumps(record)
    assert str(tmp_path.parent) not in text
    assert record["source"] == "hub:uoft-cs/cifar10"
    assert "Krizhevsky" in record["notice"]
    assert [file["name"] for file in record["origin"]["files"]["train"]] == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]
    assert record["splits"] == {"train": 180, "validation": 20, "test": 40}
    assert record["mean"] == [0.4914, 0.4822, 0.4465]


def test_broken_and_damaged_files(tmp_path, folder):
    """An image that cannot be decoded leaves nothing behind; a shortened or changed file is found."""
    broken = {"bytes": b"no image", "path": None}
    write(tmp_path / "set" / "train.parquet", [pictures(1)[0][0], broken], [0, 1])
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=r"^data.path cannot be read \(cannot identify image file.*: check the files"):
        prepare_images(ImageDataConfig(path=str(tmp_path / "set"), cache_dir=str(cache)), progress=False)
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {"known"}

    prepared = prepare_images(ImageDataConfig(path=str(folder), cache_dir=str(cache)), progress=False)
    pixels = prepared.folder / "train.pixels"
    data = bytearray(pixels.read_bytes())
    data[7] ^= 1
    pixels.write_bytes(data)
    with pytest.raises(DataError, match=r"train.pixels has changed since it was written: delete .* and prepare again"):
        prepared.verify()
    pixels.write_bytes(data[:-1])
    with pytest.raises(
        DataError, match=r"train.pixels has 614399 bytes instead of 614400: delete .* and prepare again"
    ):
        prepare_images(ImageDataConfig(path=str(folder), cache_dir=str(cache)), progress=False)
    (prepared.folder / "index.json").write_text("{}")
    with pytest.raises(DataError, match=r"index.json is damaged .*: delete .* and prepare again"):
        prepare_images(ImageDataConfig(path=str(folder), cache_dir=str(cache)), progress=False)


def test_every_epoch_has_every_image_in_a_new_order(prepare):
    prepared = prepare(augmentation="none")
    images = TrainImages(prepared, seed=0, length=400)
    assert len(images) == 400
    items = [item["pixel_values"].numpy().tobytes() for item in images.__getitems__(range(400))]
    first, second, begun = items[:180], items[180:360], items[360:]
    assert len(set(first)) == 180
    assert set(first) == set(second) > set(begun)
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10
    other = [item["pixel_values"].numpy().tobytes() for item in TrainImages(prepared, 1, 180).__getitems__(range(180))]
    assert set(other) == set(first)
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 10
    with pytest.raises(IndexError, match="of 400"):
        images[400]


def test_an_item_is_a_function_of_seed_and_index(prepare):
    """Alone, in any batch, after a restart and in loader processes it is the same, and no process gets a copy of all."""
    prepared = prepare()
    images = TrainImages(prepared, seed=5, length=400)
    whole = default_data_collator(images.__getitems__(range(400)))
    assert whole["pixel_values"].shape == (400, 3, 32, 32)
    assert (whole["pixel_values"].dtype, whole["labels"].dtype) == (torch.float32, torch.int64)
    copied = pickle.dumps(images)
    assert len(copied) < 100_000
    resumed = pickle.loads(copied)
    for index in (399, 0, 179, 180, 250):
        item = resumed[index]
        assert torch.equal(item["pixel_values"], whole["pixel_values"][index])
        assert item["labels"] == whole["labels"][index]
    loader = DataLoader(images, batch_size=70, num_workers=2, collate_fn=default_data_collator)
    batches = list(loader)
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), whole["pixel_values"])
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), whole["labels"])


def test_a_part_of_a_split_is_spread_over_it(prepare):
    """`most` images, always the same, from the first on in even steps; a split that is smaller is read whole."""
    prepared = prepare()
    whole, part = EvalImages(prepared, "train"), EvalImages(prepared, "train", most=10)
    assert len(part) == 10 and len(EvalImages(prepared, "test", most=10**6)) == len(EvalImages(prepared, "test"))
    for place, item in enumerate(part.__getitems__(range(10))):
        assert torch.equal(item["pixel_values"], whole[place * len(whole) // 10]["pixel_values"])


def test_evaluation_is_what_the_saved_processor_gives(prepare):
    """On the same PIL images: the normalisation of `cifar_image_processor`, in order, nothing changed at random."""
    images = EvalImages(prepare(), "test")
    pixels, labels = pictures(40, seed=1)
    found = default_data_collator(images.__getitems__(range(len(images))))
    expected = cifar_image_processor()([Pil.fromarray(one) for one in pixels], return_tensors="pt").pixel_values
    torch.testing.assert_close(found["pixel_values"], expected)
    assert found["labels"].tolist() == labels


def test_the_processor_has_the_normalisation_of_the_data(prepare, tmp_path):
    """Numbers of a recipe, and measured ones: with those the training images have mean 0 and deviation 1."""
    prepared = prepare(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    assert list(prepared.image_processor().image_mean) == [0.1, 0.2, 0.3]
    prepared = prepare(source="squares")
    x = torch.stack([item["pixel_values"] for item in EvalImages(prepared, "train").__getitems__(range(180))])
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    assert list(prepared.image_processor().image_std) == prepared.std
    assert prepared.record()["notice"] is None


def test_a_trained_model_says_the_same_through_a_pipeline(prepare, tmp_path):
    """The stock Trainer trains on it and evaluates it; the saved folder gives each image the same class and score."""
    prepared = prepare()
    torch.manual_seed(0)
    config = ReZeroResNetConfig.cifar(8, id2label=prepared.id2label)
    model = ReZeroResNetForImageClassification(config)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path / "run"),
            max_steps=30,
            per_device_train_batch_size=32,
            learning_rate=1e-2,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=TrainImages(prepared, seed=0, length=30 * 32),
        compute_metrics=accuracy_metrics,
    )
    trainer.train()
    test = EvalImages(prepared, "test")
    metrics = trainer.evaluate(test)
    logits = torch.from_numpy(trainer.predict(test).predictions)
    labels = prepared.split("test").labels
    assert metrics["eval_accuracy"] == pytest.approx((logits.argmax(-1).numpy() == labels).mean())
    assert metrics["eval_error_percent"] == pytest.approx(100 - 100 * metrics["eval_accuracy"])
    # Brightness tells the class; one in ten would be chance.
    assert metrics["eval_accuracy"] > 0.25
    model.save_pretrained(tmp_path / "model")
    prepared.image_processor().save_pretrained(tmp_path / "model")
    classify = pipeline("image-classification", str(tmp_path / "model"), device="cpu")
    answers = classify([Pil.fromarray(one) for one in pictures(40, seed=1)[0]], top_k=1)
    best = logits.softmax(-1).max(-1)
    assert [answer[0]["label"] for answer in answers] == [CLASSES[i] for i in best.indices]
    np.testing.assert_allclose([answer[0]["score"] for answer in answers], best.values, atol=1e-4)


def test_digits_are_grey(cache):
    """scikit-learn's, split in three, at the full range of grey; the processor agrees on grey images too."""
    pytest.importorskip("sklearn")
    fields = {"source": "digits", "augmentation": "none", "cache_dir": cache}
    prepared = prepare_images(ImageDataConfig(**fields), progress=False)
    assert (prepared.channels, prepared.size, prepared.num_labels) == (1, (8, 8), 10)
    assert [len(prepared.split(split)) for split in SPLITS] == [1439, 179, 179]
    pixels = prepared.split("test").pixels()
    assert (pixels.min(), pixels.max()) == (0, 255)
    x = EvalImages(prepared, "test")[3]["pixel_values"]
    processed = prepared.image_processor()(Pil.fromarray(pixels[3, 0]), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(x, processed)


def test_a_data_set_of_the_hub(tmp_path, cache):
    """Read by `load_dataset`, its own splits as they are, whatever the columns are called."""
    features = Features({"picture": Image(), "kind": ClassLabel(names=["a", "b"])})
    for name, seed in (("train", 0), ("validation", 1), ("test", 2)):
        write(tmp_path / "set" / f"{name}.parquet", pictures(10, seed, size=8)[0], [0, 1] * 5, features)
    fields = {"source": f"hub:{tmp_path}/set", "cache_dir": cache}
    prepared = prepare_images(ImageDataConfig(**fields), progress=False)
    assert [len(prepared.split(split)) for split in SPLITS] == [10, 10, 10]
    np.testing.assert_array_equal(prepared.split("validation").pixels(), channels_first(pictures(10, 1, size=8)[0]))
    assert prepared.id2label == {0: "a", 1: "b"}
    record = prepared.record()
    assert record["source"] == "set/"
    assert record["origin"]["version"]
    assert str(tmp_path) not in json.dumps(record)


def test_cifar_is_read_at_a_fixed_commit(tmp_path, monkeypatch):
    """Unless the recipe names another; what was asked for is what is loaded and recorded, and the next time nothing is."""
    asked = []

    class Builder:
        def __init__(self, name, config_name, revision):
            asked.append((name, revision))
            self.hash = revision

    def load(name, config_name, revision):
        asked.append((name, revision))
        pixels, labels = pictures(20)
        rows = {"img": [Pil.fromarray(one) for one in pixels], "label": labels}
        split = Dataset.from_dict(rows, features=FEATURES)
        return DatasetDict(train=split, test=split)

    monkeypatch.setattr("datasets.load_dataset_builder", Builder)
    monkeypatch.setattr("datasets.load_dataset", load)
    fixed = image_config.KNOWN["hub:uoft-cs/cifar10"].revision
    for revision in (fixed, "b" * 40):
        fields = {"revision": None if revision == fixed else revision, "cache_dir": str(tmp_path)}
        for _ in range(2):
            prepared = prepare_images(ImageDataConfig(**fields), progress=False)
        assert asked == [("uoft-cs/cifar10", revision)] * 2
        assert prepared.record()["origin"]["version"] == revision
        asked.clear()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "/nowhere"}, "data.path: /nowhere does not exist"),
        ({"path": []}, r"data.path is \[\] with .*: name files"),
        ({"source": "digits"}, "data.path is .*: name files"),
        (
            {"path": None, "source": "cifar10"},
            "data.source is 'cifar10': write hub:ORG/NAME or digits, or set data.path",
        ),
        ({"path": None, "source": "hub:"}, "data.source: 'hub:' names no data set: write hub:ORG/NAME"),
        ({"revision": "main"}, "data.revision is only for data sets read from the Hub: remove it"),
        ({"validation_size": -1}, "data.validation_size is -1: it must be at least 0"),
        ({"validation_size": 200}, "data.validation_size is 200 of 200 images and leaves none to train on: lower it"),
        ({"test_size": 3}, "data.test_size is 3, but hub:uoft-cs/cifar10 has 40 test images of its own: leave it out"),
        ({"classes": [1, 1]}, r"data.classes is \[1, 1\]: name two or more, each once"),
        ({"classes": [3, 10]}, r"data.classes is \[3, 10\], but hub:uoft-cs/cifar10 has 0 to 9"),
        ({"augmentation": "cutmix"}, "data.augmentation is 'cutmix': use one of none, crop_flip"),
        ({"mean": [0.5, 0.5, 0.5]}, "data.mean is .* and data.std is None: set both"),
        ({"mean": [0.5], "std": [0.5]}, "data.mean has 1 numbers for images of 3 channels: one for each"),
        ({"mean": [0.5] * 3, "std": [0.0] * 3}, "data.mean is .*: they must be finite, and deviations above 0"),
        ({"image_column": "label"}, "data.image_column is 'label', but data.path has as columns of type Image: img"),
    ],
)
def test_values_that_make_no_sense(prepare, fields, message):
    """One line with the field, the value and the way out."""
    with pytest.raises(DataError, match=f"^{message}") as error:
        prepare(**fields)
    assert "\n" not in str(error.value)


def untyped(column):
    """A file in which one of the columns is only text or numbers."""
    features = Features({**FEATURES, column: Value("string")})
    return {"pixels": ["a"] if column == "img" else pictures(1)[0], "labels": ["a"], "features": features}


TWO_LABELS = Features({"img": Image(), "fine": ClassLabel(names=CLASSES), "coarse": ClassLabel(names=["a"])})
SQUARES = [np.zeros((size, size, 3), np.uint8) for size in (32, 32, 28)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (untyped("img") | {"labels": [1]}, "data.path has no columns of type Image among img, label: write it with"),
        (untyped("label"), "data.path has no columns of type ClassLabel among img, label: write it with"),
        (
            {"pixels": SQUARES[:1], "labels": [0], "features": TWO_LABELS, "coarse": [0]},
            "data.path has 2 columns of type ClassLabel, fine, coarse: choose one with data.label_column",
        ),
        (
            {"pixels": SQUARES, "labels": [0] * 3},
            r"data.path: image 2 of train has the shape \[3, 28, 28\] \(channels, height, width\), others have "
            r"\[3, 32, 32\]: make them all alike",
        ),
        (
            {"pixels": SQUARES[2:], "labels": [0]},
            r"data.path holds images of shape \[3, 28, 28\] .* say in data.source",
        ),
        ({"pixels": [None], "labels": [0]}, "data.path: row 0 of train has no image: check the files"),
        ({"pixels": SQUARES[:1], "labels": [None]}, "data.path: row 0 of train has label None of 10 classes: check"),
        ({"pixels": SQUARES[:1], "labels": [-1]}, "data.path: row 0 of train has label -1 of 10 classes: check"),
        ({"pixels": [Pil.new("I;16", (32, 32))], "labels": [0]}, "data.path: row 0 of train has mode I;16: convert it"),
        ({"pixels": [], "labels": []}, "data.path: train has no images"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, content, message):
    """One line with the row or the column and the way out."""
    write(tmp_path / "set" / "train.parquet", **content)
    fields = {"path": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(DataError, match=f"^{message}") as error:
        prepare_images(ImageDataConfig(**fields), progress=False)
    assert "\n" not in str(error.value)


def test_names_that_say_no_split_and_folders_without_files(tmp_path):
    """Files are told apart by name, so a name without a split, and only a test split, are errors."""
    write(tmp_path / "a" / "images.parquet", *pictures(2))
    write(tmp_path / "b" / "test.parquet", *pictures(2))
    (tmp_path / "c").mkdir()
    (tmp_path / "d" / "train.parquet").parent.mkdir()
    (tmp_path / "d" / "train.parquet").write_text("no parquet")
    for name, message in (
        ("a", "data.path: images.parquet has neither train, validation nor test in its name: rename it"),
        ("b", "data.path has no split named train, only test: check the files"),
        ("c", f"data.path: {tmp_path}/c has no .parquet files"),
        ("d", r"data.path cannot be read \(.*\): check the files of data.path"),
    ):
        with pytest.raises(DataError, match=f"^{message}") as error:
            prepare_images(ImageDataConfig(path=str(tmp_path / name), cache_dir=str(tmp_path)), progress=False)
        assert "\n" not in str(error.value)


def test_two_label_columns_can_be_chosen_from(tmp_path, cache):
    """As in CIFAR-100, by name."""
    write(tmp_path / "train.parquet", SQUARES[:2] * 10, [3, 4] * 10, TWO_LABELS, coarse=[0] * 20)
    fields = {"path": str(tmp_path), "cache_dir": cache, "label_column": "fine", "mean": [0.5] * 3, "std": [0.5] * 3}
    prepared = prepare_images(ImageDataConfig(**fields), progress=False)
    assert set(prepared.split("train").labels.tolist()) == {3, 4}


def test_an_empty_split_and_a_wrong_name(prepare):
    prepared = prepare(validation_size=0)
    with pytest.raises(DataError, match=r"^the validation split is empty: raise data.validation_size$"):
        EvalImages(prepared, "validation")
    with pytest.raises(DataError, match=r"^split 'dev' does not exist: use one of train, validation, test$"):
        EvalImages(prepared, "dev")


def test_digits_need_a_package(monkeypatch, cache):
    monkeypatch.setattr(image_sources, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"^data.source is 'digits', which needs a package: pip install scikit-learn$"):
        image_data.prepare_images(ImageDataConfig(source="digits", cache_dir=cache), progress=False)
